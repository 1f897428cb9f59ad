"""The launches of the library, compiled for a card that is not here, and what the result needs."""

import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp

from paged_decode.kernels.cards import Card
from paged_decode.kernels.record import AttentionCall

__all__ = ["CARDS", "Hardware", "Launched", "Needs", "launched", "needs", "recorded"]


@dataclass(frozen=True, kw_only=True)
class Hardware(Card):
    """What one kind of card has beside what a plan asks; sizes in bytes."""

    backend: str = "cuda"
    arch: int | str
    threads: int = 32  # of a warp
    block_bytes: int  # shared memory of one program
    processor_bytes: int  # shared memory of all programs of a multiprocessor
    registers: int = 1 << 16  # that all threads of a multiprocessor share


CARDS = {
    "sm_80": Hardware(
        arch=80, generation=80, processors=108, block_bytes=163 << 10, processor_bytes=164 << 10
    ),
    "sm_89": Hardware(
        arch=89, generation=89, processors=128, block_bytes=99 << 10, processor_bytes=100 << 10
    ),
    "sm_90": Hardware(
        arch=90, generation=90, processors=132, block_bytes=227 << 10, processor_bytes=228 << 10
    ),
    "sm_100": Hardware(
        arch=100, generation=100, processors=148, block_bytes=227 << 10, processor_bytes=228 << 10
    ),
    "gfx942": Hardware(
        backend="hip", arch="gfx942", generation=942, processors=304, threads=64,
        block_bytes=64 << 10, processor_bytes=64 << 10, registers=1 << 17,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Launched:
    """One call of `launch.launch`, as the library made it; and the config behind it."""

    kernel: Any
    pointers: tuple[str, ...]  # dtypes of inputs and outputs, in the order of the kernel
    warps: int
    stages: int
    constants: dict[str, Any]
    config: Any


@dataclass(frozen=True)
class Needs:
    """What one compiled program needs."""

    registers: int  # of a thread
    stack_bytes: int  # of a thread; spilled registers lie there
    shared_bytes: int
    listing: str  # PTX, or the assembler of the card


def recorded(run: Callable[..., Any], *shapes: Any, config: Any = None) -> Launched:
    """The last launch that `run` makes of arrays of these shapes."""
    from paged_decode.kernels.triton import launch as launching

    seen: dict[str, Any] = {}

    def launch(
        kernel: Any, inputs: Any, outputs: Any, *, rewritten: Any = (), aliases: Any = (),
        **options: Any,
    ) -> list[jax.Array]:  # fmt: skip
        byte = jax.ShapeDtypeStruct((1,), jnp.int8)
        last = [inputs[i] for i in aliases] or [byte for _ in rewritten]
        seen.update(options, kernel=kernel, arrays=[*inputs, *outputs, *last])
        return [jnp.zeros(out.shape, out.dtype) for out in (*outputs, *last)]

    with mock.patch.object(launching, "launch", launch):
        jax.eval_shape(run, *shapes)
    pointers = tuple(str(jnp.dtype(array.dtype)) for array in seen["arrays"])
    own = (seen[name] for name in ("warps", "stages", "constants"))
    return Launched(seen["kernel"], pointers, *own, config)


def launched(
    hardware: Hardware, *, append: bool = False, filled: int | None = None, **sizes: Any
) -> Launched:
    """The launch that the library makes of a call of these sizes on `hardware`."""
    from paged_decode.kernels.triton import call as library
    from paged_decode.kernels.triton.config import choose_config

    given = dict(layers=32, pages=4096, scale=sizes["dim"] ** -0.5, starts=True, sinks=True)
    call = AttentionCall.of_sizes(**given | sizes)

    def run(arrays: dict[str, Any]) -> Any:
        new = jnp.zeros((call.rows, 1, call.kv_heads, call.dim), call.q.dtype)
        newest = (new, new, jnp.zeros((call.rows, 1), jnp.int32)) if append else None
        return library.run(replace(call, **arrays), hardware, newest, filled)

    arrays = {f.name: getattr(call, f.name) for f in fields(call)}
    arrays = {k: v for k, v in arrays.items() if isinstance(v, jax.ShapeDtypeStruct)}
    return recorded(run, arrays, config=choose_config(call, hardware))


_TYPES = {
    "bfloat16": "*bf16",
    "float16": "*fp16",
    "float32": "*fp32",
    "int32": "*i32",
    "int8": "*i8",
    "float8_e4m3fn": "*fp8e4nv",
    "bool": "*i1",
    "float": "fp32",  # a number, not an array
}


def needs(launch: Launched, card: Hardware) -> Needs:
    """Compile `launch` for `card`, as jax-triton would, and read what it needs."""
    import triton
    from triton.backends.compiler import GPUTarget

    from paged_decode.kernels.triton.launch import limits

    names = launch.kernel.arg_names
    signature = dict.fromkeys(names, "constexpr")
    signature |= zip(names, (_TYPES[dtype] for dtype in launch.pointers), strict=False)
    # Arrays of JAX begin at multiples of 16 bytes, and jax-triton says so.
    arrays = [i for i, dtype in enumerate(launch.pointers) if dtype != "float"]
    aligned = {(i,): [["tt.divisibility", 16]] for i in arrays}
    source = triton.compiler.ASTSource(
        fn=launch.kernel, signature=signature, constexprs=launch.constants, attrs=aligned
    )
    target = GPUTarget(card.backend, card.arch, card.threads)
    options = dict(num_warps=launch.warps, num_stages=launch.stages)
    options |= limits(launch.constants)
    with tempfile.TemporaryDirectory() as folder, triton.knobs.cache.scope():
        triton.knobs.cache.dir = folder  # nothing is taken from an earlier run
        built = triton.compile(source, target=target, options=options)
    if card.backend == "hip":
        return _needs_amd(built)
    return _needs_nvidia(built, Path(triton.__file__).parent)


def _needs_nvidia(built: Any, root: Path) -> Needs:
    tool = root / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        command = [tool, "-res-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise ValueError(f"cuobjdump does not say REG and STACK: {usage}")
    return Needs(int(found[1]), int(found[2]), built.metadata.shared, built.asm["ptx"])


def _needs_amd(built: Any) -> Needs:
    text = built.asm["amdgcn"]

    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        if found is None:
            raise ValueError(f"the listing does not say {name}")
        return int(found[1])

    # Spilled scalars go to lanes of a vector register, not to memory, so they do not count here.
    stack = number("private_segment_fixed_size") + 4 * number("vgpr_spill_count")
    return Needs(number("vgpr_count"), stack, built.metadata.shared, text)
