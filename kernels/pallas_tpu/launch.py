"""One launch of the kernel: where its arrays lie, and which part of them a step sees."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from ..record import POOLS
from .config import LANES
from .decode_tail import attention_kernel
from .pages import Refs
from .plan import Plan

__all__ = ["NEW", "TO_WRITE", "launch", "like"]

NEW = ("new_k", "new_v", "new_k_scales", "new_v_scales")
"""The names of what is written into each of `POOLS`."""
TO_WRITE = ("k_in", "v_in", "k_scales_in", "v_scales_in")
"""The names of `POOLS` that are to be written, as they come in."""


def launch(
    scalars: dict[str, Array], arrays: dict[str, Array], plan: Plan, interpret: Any
) -> tuple[Array, ...]:
    """out `[items, rows, D]`, lse float32 `[items, 1, rows]`; with `plan.append` the pools written.

    `scalars` and `arrays` are named as the fields of `Refs`, and those of `TO_WRITE`. What is not
    given is not there for the kernel either.
    """
    specs, out = _specs(plan), like(arrays["q"])
    lse = out.update(shape=(out.shape[0], 1, plan.rows), dtype=jnp.float32)
    outputs = dict(out=out, lse=lse)
    inputs, aliases = [*scalars, *arrays], {}
    if plan.append:
        for name, source in zip(POOLS, TO_WRITE, strict=True):
            if source in arrays:
                aliases[inputs.index(source)] = len(outputs)
                outputs[name] = like(arrays[source])
    scratch = _scratch(plan, arrays["k_in" if plan.append else "k_pages"].dtype)
    names = [*inputs, *outputs, *scratch]

    def body(*refs: Any) -> None:
        given = dict(zip(names, refs, strict=True))
        fields = Refs.__dataclass_fields__
        attention_kernel(Refs(**{name: given.get(name) for name in fields}), plan)

    call = pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(plan.config.cores, plan.steps),
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


def _specs(plan: Plan) -> dict[str, Any]:
    def item(core: Any, step: Any, items: Any, *_: Any) -> tuple[Any, int, int]:
        return items[core * plan.steps + step], 0, 0

    def row(core: Any, step: Any, items: Any, *_: Any) -> tuple[Any, int, int]:
        return lax.div(items[core * plan.steps + step], plan.tiles), 0, 0

    def next_row(core: Any, step: Any, _: Any, following: Any, *__: Any) -> tuple[Any, int, int]:
        return lax.div(jnp.maximum(following[core * plan.steps + step], 0), plan.tiles), 0, 0

    queries = pl.BlockSpec((None, plan.rows, plan.dim), item)
    new = pl.BlockSpec((None, plan.kv_heads, 1, plan.dim), lambda *at: (*row(*at), 0))
    new_scales = pl.BlockSpec((None, plan.kv_heads, 1), row)
    hbm = pl.BlockSpec(memory_space=pl.ANY)
    table = (None, 1, plan.columns)
    return dict(
        table=pl.BlockSpec(table, row, memory_space=pltpu.SMEM),
        next_table=pl.BlockSpec(table, next_row, memory_space=pltpu.SMEM),
        q=queries,
        sink=pl.BlockSpec((plan.rows, 1), lambda *_: (0, 0)),
        new_k=new,
        new_v=new,
        new_k_scales=new_scales,
        new_v_scales=new_scales,
        out=queries,
        lse=pl.BlockSpec((None, 1, plan.rows), item),
        **dict.fromkeys((*POOLS, *TO_WRITE), hbm),
    )


def _scratch(plan: Plan, dtype: Any) -> dict[str, Any]:
    kinds = 4 if plan.scaled else 2
    scales = (2, plan.config.fetch, plan.kv_heads, plan.page_size)
    buffer = (*scales, plan.dim)
    logits, f32 = (plan.config.heads * plan.head_rows, plan.tile_tokens), jnp.float32
    scratch = dict(
        k_buf=pltpu.VMEM(buffer, dtype),
        v_buf=pltpu.VMEM(buffer, dtype),
        sems=pltpu.SemaphoreType.DMA((kinds, 2)),
        state=pltpu.SMEM((3,), jnp.int32),
        logits=pltpu.VMEM(logits, f32),
        acc=pltpu.VMEM((plan.rows, plan.dim), f32),
        top=pltpu.VMEM((plan.rows, LANES), f32),
        total=pltpu.VMEM((plan.rows, LANES), f32),
    )
    if plan.scaled:
        scratch |= dict(k_scale_buf=pltpu.VMEM(scales, f32), v_scale_buf=pltpu.VMEM(scales, f32))
    if not plan.aligned:
        scratch |= dict(q32=pltpu.VMEM((plan.rows, plan.dim), f32))
    if plan.append:
        tile = (2, plan.kv_heads, plan.strip, plan.dim)
        sems = pltpu.SemaphoreType.DMA((kinds,))
        scratch |= dict(strips=pltpu.VMEM(tile, dtype), write_sems=sems)
        if plan.scaled:
            page = (2, plan.kv_heads, plan.page_size)
            scratch |= dict(scale_strips=pltpu.VMEM(page, f32))
    return scratch
