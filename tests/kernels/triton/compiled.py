"""The launches of the library, compiled for a card that is not here, and what the result needs."""

import re
import subprocess
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp

from paged_decode.kernels.record import AttentionCall

__all__ = ["CARDS", "Card", "Launched", "Needs", "launched", "needs"]


@dataclass(frozen=True)
class Card:
    """What one kind of card has; sizes in bytes."""

    backend: str
    arch: int | str
    generation: int  # what `Shape.generation` says of it
    processors: int
    threads: int  # of a warp
    block_bytes: int  # shared memory of one program
    processor_bytes: int  # shared memory of all programs of a multiprocessor
    registers: int  # that all threads of a multiprocessor share


CARDS = {
    "sm_80": Card("cuda", 80, 80, 108, 32, 163 << 10, 164 << 10, 1 << 16),
    "sm_89": Card("cuda", 89, 89, 128, 32, 99 << 10, 100 << 10, 1 << 16),
    "sm_90": Card("cuda", 90, 90, 132, 32, 227 << 10, 228 << 10, 1 << 16),
    "sm_100": Card("cuda", 100, 100, 148, 32, 227 << 10, 228 << 10, 1 << 16),
    "gfx942": Card("hip", "gfx942", 942, 304, 64, 64 << 10, 64 << 10, 1 << 17),
}


@dataclass(frozen=True)
class Launched:
    """One call of `compat.launch`, as the library made it; and the config behind it."""

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


def launched(
    card: Card,
    *,
    rows: int,
    kv_heads: int,
    group: int,
    dim: int,
    page_size: int,
    capacity: int,
    dtype: str,
    window: int | None = None,
    soft_cap: float | None = None,
    append: bool = False,
    tokens: int = 1,
) -> Launched:
    """The launch that the library makes of a call on `card`."""
    from paged_decode.kernels.triton import call as library
    from paged_decode.kernels.triton import compat

    seen: dict[str, Any] = {}
    shape_of, choose = library.shape_of, library.choose_config
    choose_tail = library.choose_tail_config

    def on_card(call: AttentionCall) -> Any:
        return replace(shape_of(call), generation=card.generation, processors=card.processors)

    def chosen(shape: Any) -> Any:
        seen["config"] = choose(shape)
        return seen["config"]

    def chosen_tail(shape: Any) -> Any:
        seen["config"] = choose_tail(shape)
        return seen["config"]

    def launch(
        kernel: Any, inputs: Any, outputs: Any, *, rewritten: Any = (), aliases: Any = (),
        **options: Any,
    ) -> list[jax.Array]:  # fmt: skip
        byte = jax.ShapeDtypeStruct((1,), jnp.int8)
        last = [inputs[i] for i in aliases] or [byte for _ in rewritten]
        seen.update(options, kernel=kernel, arrays=[*inputs, *outputs, *last])
        return [jnp.zeros(out.shape, out.dtype) for out in (*outputs, *last)]

    def attend(arrays: dict[str, Any]) -> Any:
        options = dict(scale=dim**-0.5, window=window, soft_cap=soft_cap, platform="gpu")
        call = AttentionCall(**arrays, **options)
        if not append:
            return library.attend(call)
        new = jnp.zeros((rows, 1, kv_heads, dim), dtype)
        return library.append_and_attend(call, new, new, jnp.zeros((rows, 1), jnp.int32))

    array = jax.ShapeDtypeStruct
    pages = array((32, 4096, kv_heads, page_size, dim), dtype)
    arrays = dict(
        q=array((rows, tokens, kv_heads * group, dim), dtype),
        k_pages=pages,
        v_pages=pages,
        layer=array((), jnp.int32),
        page_table=array((rows, capacity // page_size), jnp.int32),
        seq_lens=array((rows,), jnp.int32),
        starts=array((rows,), jnp.int32),
        sink=array((kv_heads * group,), jnp.float32),
    )
    with (
        mock.patch.object(library, "shape_of", on_card),
        mock.patch.object(library, "choose_config", chosen),
        mock.patch.object(library, "choose_tail_config", chosen_tail),
        mock.patch.object(compat, "launch", launch),
    ):
        jax.eval_shape(attend, arrays)
    return Launched(
        seen["kernel"],
        tuple(str(jnp.dtype(array.dtype)) for array in seen["arrays"]),
        seen["warps"],
        seen["stages"],
        seen["constants"],
        seen["config"],
    )


_TYPES = {
    "bfloat16": "*bf16",
    "float16": "*fp16",
    "float32": "*fp32",
    "int32": "*i32",
    "int8": "*i8",
}


def needs(launch: Launched, card: Card) -> Needs:
    """Compile `launch` for `card`, as jax-triton would, and read what it needs."""
    import triton
    from triton.backends.compiler import GPUTarget

    from paged_decode.kernels.triton import compat

    names = launch.kernel.arg_names
    signature = dict.fromkeys(names, "constexpr")
    signature |= zip(names, (_TYPES[dtype] for dtype in launch.pointers), strict=False)
    # Arrays of JAX begin at multiples of 16 bytes, and jax-triton says so.
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(len(launch.pointers))}
    source = triton.compiler.ASTSource(
        fn=launch.kernel, signature=signature, constexprs=launch.constants, attrs=aligned
    )
    target = GPUTarget(card.backend, card.arch, card.threads)
    options = dict(num_warps=launch.warps, num_stages=launch.stages)
    options |= compat.limits(launch.constants)
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
