"""One launch of the kernel: where its arrays lie, and which part of them a step sees."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from .kernel import LANES, Refs, Static, decode_kernel

__all__ = ["launch", "like"]


def launch(
    scalars: dict[str, Array], arrays: dict[str, Array], static: Static, cores: int, interpret: Any
) -> tuple[Array, ...]:
    """out `[B, Hq, D]`, lse float32 `[B, Hq, 1]`, and with `static.append` the pages written.

    `scalars` and `arrays` are named as the fields of `Refs`; to be written, pages come in as `k_in`
    and `v_in`. What is not given is not there for the kernel either.
    """
    specs, out = _specs(static), like(arrays["q"])
    outputs = dict(out=out, lse=out.update(shape=(*out.shape[:2], 1), dtype=jnp.float32))
    inputs, aliases = [*scalars, *arrays], {}
    if static.append:
        for name, source in (("k_pages", "k_in"), ("v_pages", "v_in")):
            aliases[inputs.index(source)] = len(outputs)
            outputs[name] = like(arrays[source])
    scratch = _scratch(static, arrays["k_in" if static.append else "k_pages"].dtype)
    names = [*inputs, *outputs, *scratch]

    def body(*refs: Any) -> None:
        given = dict(zip(names, refs, strict=True))
        fields = Refs.__dataclass_fields__
        decode_kernel(Refs(**{name: given.get(name) for name in fields}), static)

    call = pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(cores, static.steps),
            in_specs=[specs[name] for name in arrays],
            out_specs=[specs[name] for name in outputs],
            scratch_shapes=list(scratch.values()),
        ),
        out_shape=list(outputs.values()),
        input_output_aliases=aliases,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            # The kernel keeps every index in bounds itself; the checks doubled the cost of a copy.
            disable_bounds_checks=True,
        ),
        interpret=interpret,
        name="paged_decode",
    )
    return tuple(call(*scalars.values(), *arrays.values()))


def like(array: Array) -> jax.ShapeDtypeStruct:
    """Its shape, its dtype, and over which axes of a mesh it varies."""
    kind = jax.typeof(array).manual_axis_type
    return jax.ShapeDtypeStruct(array.shape, array.dtype, manual_axis_type=kind)


def _specs(static: Static) -> dict[str, Any]:
    def row(core: Any, step: Any, rows: Any, *_: Any) -> tuple[Any, int, int]:
        return rows[core * static.steps + step], 0, 0

    def position(core: Any, step: Any, *_: Any) -> tuple[Any, int, int]:
        return core * static.steps + step, 0, 0

    heads = pl.BlockSpec((None, static.heads, static.dim), row)
    new = pl.BlockSpec((None, static.kv_heads, 1, static.dim), lambda *at: (*row(*at), 0))
    hbm = pl.BlockSpec(memory_space=pl.ANY)
    return dict(
        tables=pl.BlockSpec((None, 1, 2 * static.columns), position, memory_space=pltpu.SMEM),
        q=heads,
        sink=pl.BlockSpec((static.heads, 1), lambda *_: (0, 0)),
        new_k=new,
        new_v=new,
        out=heads,
        lse=pl.BlockSpec((None, static.heads, 1), row),
        **dict.fromkeys(("k_pages", "v_pages", "k_in", "v_in"), hbm),
    )


def _scratch(static: Static, dtype: Any) -> dict[str, Any]:
    page = (static.kv_heads, static.page_size, static.dim)
    heads, f32 = static.heads, jnp.float32
    scratch = dict(
        k_buf=pltpu.VMEM((2, static.fetch, *page), dtype),
        v_buf=pltpu.VMEM((2, static.fetch, *page), dtype),
        sems=pltpu.SemaphoreType.DMA((2, 2)),
        state=pltpu.SMEM((3,), jnp.int32),
        q32=pltpu.VMEM((heads, static.dim), f32),
        logits=pltpu.VMEM((heads, static.tokens), f32),
        acc=pltpu.VMEM((heads, static.dim), f32),
        top=pltpu.VMEM((heads, LANES), f32),
        total=pltpu.VMEM((heads, LANES), f32),
    )
    if static.append:
        strips = (2, static.kv_heads, static.strip, static.dim)
        scratch |= dict(strips=pltpu.VMEM(strips, dtype), write_sems=pltpu.SemaphoreType.DMA((2,)))
    return scratch
