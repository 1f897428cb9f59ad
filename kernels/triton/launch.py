"""Arrays to one custom call through jax-triton, and what differs between its versions.

| set | state |
| --- | --- |
| jax-triton 0.3.1, triton 3.6, any jax from 0.10.2 to 0.12 | works: what the `cuda` extra pins |
| jax-triton 0.4.x, triton 3.7 and newer, jax 0.11 | works; PTX 8.7 is asked for |
| jax-triton 0.4.x, triton 3.6 | its CUDA backend silently becomes a stub: fails at lowering |
| jax-triton 0.4.1, jax 0.12 | its dead-code rule has another signature: fails under `jit` |

0.3.1 cannot be imported where jax has no GPU plugin, so it is imported only for a call on a GPU.
What it calls cannot be part of a CUDA graph, which XLA makes of five or more kernels in a row; the
same call by way of the other entry of jaxlib can, as in 0.4, and `_lowered_by_us` arranges that.
They also disagree on whether an output that shares the buffer of an input has a pointer of its own:
in 0.3.1 it has, in 0.4 not. A kernel writes through the input's pointer and names the other last.
"""

import importlib
import re
from collections.abc import Sequence
from functools import cache
from importlib import metadata
from types import ModuleType
from typing import Any

import jax
import numpy as np
from jax.interpreters import mlir

__all__ = ["launch", "limits", "looped", "problem"]

CURE = "install the set that works: pip install 'paged-decode[cuda]' (jax-triton 0.3.1, triton 3.6)"


def problem(versions: dict[str, str | None] | None = None) -> str | None:
    """Why the installed set cannot launch a kernel, with the cure; None if it can.

    `versions` of "jax", "jax-triton" and "triton" replace the installed ones in tests, which are
    then not imported.
    """
    found = _installed() if versions is None else versions
    missing = [name for name, version in found.items() if version is None]
    if missing:
        return f"{' and '.join(missing)} not installed; {CURE}"
    ours, triton, jax_version = (_numbers(found[n]) for n in ("jax-triton", "triton", "jax"))
    named = ", ".join(f"{name} {version}" for name, version in found.items())
    if ours < (0, 3, 1):
        return f"{named}: jax-triton before 0.3.1 does not know this jax; {CURE}"
    if ours >= (0, 4) and triton < (3, 7):
        return f"{named}: jax-triton 0.4 needs triton 3.7 and fails at lowering; {CURE}"
    if (0, 4) <= ours <= (0, 4, 1) and jax_version >= (0, 12):
        return f"{named}: jax-triton 0.4.1 fails under jit in jax 0.12; {CURE}"
    return _import_problem() if versions is None else None


def launch(
    kernel: Any,
    inputs: Sequence[jax.Array | np.float32],
    outputs: Sequence[jax.ShapeDtypeStruct],
    *,
    rewritten: Sequence[str] = (),
    aliases: Sequence[int] = (),
    grid: int,
    warps: int,
    stages: int,
    name: str,
    constants: dict[str, Any],
    compute_capability: int | None = None,
) -> list[jax.Array]:
    """One launch of a Triton kernel; pointers of `outputs` follow those of `inputs`.

    The inputs numbered in `aliases` are written in place and come back after the outputs. Pointers
    to them once more are the last of the kernel, named in `rewritten`; if there are no aliases,
    they point to a byte of their own.

    Scalars are passed as `np.float32`: a Python float would become a double in 0.3.1.
    """
    binding = importlib.import_module("jax_triton")
    modern = _numbers(metadata.version("jax-triton")) >= (0, 4)
    outputs = list(outputs) + [
        jax.ShapeDtypeStruct(inputs[i].shape, inputs[i].dtype) for i in aliases
    ]
    options: dict[str, Any] = {}
    if aliases:
        first = len(outputs) - len(aliases)
        options["input_output_aliases"] = {i: first + n for n, i in enumerate(aliases)}
    if not aliases:
        outputs += [jax.ShapeDtypeStruct((1,), np.int8) for _ in rewritten]
    elif modern:
        # Scalars, because here these pointers do not exist.
        options |= dict.fromkeys(rewritten, 0)
    options["out_type" if modern else "out_shape"] = outputs
    if not modern:
        options |= _lowered_by_us(importlib.import_module("jax_triton.triton_lib"))
    else:
        # Newer Triton writes PTX that the assembler of CUDA 13.0 rejects.
        options["backend_options"] = {"ptx_version": 87, **limits(constants)}
    return binding.triton_call(
        *inputs,
        kernel=kernel,
        grid=(grid,),
        name=name,
        num_warps=warps,
        num_stages=stages,
        compute_capability=compute_capability,
        **options,
        **constants,
    )


def looped(
    kernel: Any,
    inputs: Sequence[jax.Array],
    outputs: Sequence[jax.ShapeDtypeStruct],
    **options: Any,
) -> list[jax.Array]:
    """`launch`, which `vmap` makes a loop of.

    A batch of launches would count arrivals in the same counters, or write in the same pages.
    """
    launch_one = launch  # taken now: under `vmap` the call below is traced later

    @jax.custom_batching.sequential_vmap
    def launched(*arrays: jax.Array) -> list[jax.Array]:
        return launch_one(kernel, arrays, outputs, **options)

    return launched(*inputs)


def limits(constants: dict[str, Any]) -> dict[str, Any]:
    """What a kernel's constant REGISTERS, if it has one, says to Triton's compiler."""
    registers = constants.get("REGISTERS", 0)
    return {"maxnreg": registers} if registers else {}


@cache
def _lowered_by_us(library: ModuleType) -> dict[str, Any]:
    """Let 0.3.1 limit registers, and call the entry that CUDA graphs can hold where jaxlib has it.

    Returns the options of a call that goes there.
    """
    plugin = getattr(library.triton_kernel_call_lib, "_cuda_triton", None)
    target = "triton_kernel_call_ffi"
    original = library.triton_kernel_call_lowering

    def lower(ctx: Any, *args: Any, **params: Any) -> Any:
        def backend(*device: Any) -> Any:
            made = library.get_cuda_backend(*device)
            parse = made.parse_options
            made.parse_options = lambda options: parse(options | limits(params))
            return made

        results = original(backend, ctx, *args, **params)
        if params["custom_call_target_name"] == target:  # nobody else's calls change
            call = results[0].owner
            with call.context:
                number = mlir.ir.IntegerType.get_signless(32)
                call.attributes["api_version"] = mlir.ir.IntegerAttr.get(number, 4)
                opaque = {"opaque": call.attributes["backend_config"]}
                call.attributes["backend_config"] = mlir.ir.DictAttr.get(opaque)
        return results

    mlir.register_lowering(library.triton_kernel_call_p, lower, platform="cuda")
    if plugin is None or target not in plugin.registrations():
        return {}
    return {"custom_call_target_name": target}


def _import_problem() -> str | None:
    try:
        importlib.import_module("jax_triton")
    except ImportError as error:
        return f"jax-triton cannot be imported: {error}; {CURE}"
    return None


def _installed() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in ("jax", "jax-triton", "triton"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def _numbers(version: str | None) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version or "")[:3])
