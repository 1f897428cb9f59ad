"""The launch: a kernel as one XLA custom call, or two where blocks cannot count each other."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from . import tail, work
from .decode import decode_body, scratch
from .merge import Inputs, Outputs, merge_body, staged
from .plan import Plan

__all__ = ["launch", "launch_tail"]


def _options(interpret: Any) -> dict[str, Any]:
    # Barriers around every store would cost more than the stores: the kernels have their own.
    params = plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True)
    return dict(compiler_params=params, interpret=interpret)


def launch_tail(plan: Plan, inputs: tail.Inputs, interpret: Any = None) -> tuple[Array, Array]:
    """`out [B, T, Hq, D], lse [B, Hq, T]` of the plan on arrays as `tail.Inputs` describes them."""
    rows, tokens, heads, _ = inputs.q.shape
    out_type = (
        jax.ShapeDtypeStruct(inputs.q.shape, inputs.q.dtype),
        jax.ShapeDtypeStruct((rows, heads, tokens), jnp.float32),
    )

    def attend(*refs: Any) -> None:
        *given, out, lse, ring = refs
        tail.tail_body(plan, tail.Inputs(*given), out, lse, ring)

    return plgpu.kernel(
        attend,
        out_type=out_type,
        scratch_types=[tail.scratch(plan, inputs.q.dtype)],
        grid=(plan.blocks,),
        grid_names=("unit",),
        num_threads=3,
        thread_name="thread",
        kernel_name="paged_tail",
        **_options(interpret),
    )(*inputs)


def launch(plan: Plan, inputs: Inputs, interpret: Any = None) -> tuple[Array, Array]:
    """`out [B, Hq, D], lse [B, Hq]` of the plan on arrays as `Inputs` describes them; T = 1."""
    heads = plan.kv_heads * plan.group
    types = Outputs(
        out=jax.ShapeDtypeStruct((plan.rows, heads, plan.dim), inputs.q.dtype),
        lse=jax.ShapeDtypeStruct((plan.rows, heads), jnp.float32),
        part_acc=jax.ShapeDtypeStruct((plan.slots, plan.lines, plan.dim), jnp.float32),
        part_lse=jax.ShapeDtypeStruct((plan.slots, plan.lines), jnp.float32),
    )

    def decode(*refs: Any) -> None:
        count = len(inputs)
        outputs, ring = Outputs(*refs[count:-1]), refs[-1]
        decode_body(plan, Inputs(*refs[:count]), outputs, ring)

    made = plgpu.kernel(
        decode,
        out_type=tuple(types),
        scratch_types=[scratch(plan, inputs.q.dtype)],
        grid=(plan.blocks,),
        grid_names=("worker",),
        num_threads=2,
        thread_name="thread",
        kernel_name="paged_decode",
        **_options(interpret),
    )(*inputs)
    made = Outputs(*made)
    if not plan.interpreted:
        return made.out, made.lse

    def merge(*refs: Any) -> None:
        given, parts, made = refs[: len(inputs)], refs[len(inputs) : -3], refs[-3:-1]
        merge_body(plan, Inputs(*given), Outputs(*made, *parts), refs[-1])

    out, lse = plgpu.kernel(
        merge,
        out_type=(types.out, types.lse),
        scratch_types=[staged(plan)],
        grid=(plan.rows, plan.kv_heads),
        grid_names=("row", "head"),
        kernel_name="paged_decode_merge",
        **_options(interpret),
    )(*inputs, made.part_acc, made.part_lse)
    whole = _whole(plan, inputs)
    return jnp.where(whole[..., None], made.out, out), jnp.where(whole, made.lse, lse)


def _whole(plan: Plan, inputs: Inputs) -> Array:
    """Which query heads have their result from one block, `[B, Hq]`."""

    def parts(row: Array, head: Array) -> Array:
        return work.lane(plan, inputs.seq_lens, inputs.starts, row, head)[1]

    heads, rows = jnp.arange(plan.kv_heads), jnp.arange(plan.rows)
    every = jax.vmap(jax.vmap(parts, (None, 0)), (0, None))(rows, heads)
    return jnp.repeat(every == 1, plan.group, axis=1)
