"""From the sums of a block to results: store them, count arrivals, merge in the order of tokens."""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from . import work
from .plan import QUERY_ROWS, Plan
from .work import Place

__all__ = ["Inputs", "Outputs", "Staged", "finish", "merge_body", "staged"]

LOG2E, LN2 = math.log2(math.e), math.log(2)
HUGE = 3.0e38  # the largest sink in base 2 that still gives a finite difference to any logit
_HEADS = 8  # query heads merged at once
_LOADS = 64  # of parts before the first is used: one round trip for all of them


class Inputs(NamedTuple):
    """What a launch reads."""

    q: Any  # [B, Hq, D]
    k: Any  # [L * N * Hk * S, D]
    v: Any
    layer: Any  # int32 [1]
    page_table: Any  # int32 [B, P]
    seq_lens: Any  # int32 [B]
    starts: Any  # int32 [B]
    sink: Any  # float32 [Hq]
    counters: Any  # int32 [B * Hk], zeros before and after


class Outputs(NamedTuple):
    """What a launch writes."""

    out: Any  # [B, Hq, D]
    lse: Any  # float32 [B, Hq]
    part_acc: Any  # float32 [slots, G, D], normalised
    part_lse: Any  # float32 [slots, G], base 2


class Staged(NamedTuple):
    """The sums of a row and head in shared memory, on their way from one layout to another."""

    acc: Any  # float32 [64, D]
    top: Any  # float32 [64]
    total: Any
    arrived: Any  # int32 [1]


def staged(plan: Plan) -> Staged:
    """The types of a `Staged`."""
    return Staged(
        plgpu.SMEM((QUERY_ROWS, plan.dim), jnp.float32),
        plgpu.SMEM((QUERY_ROWS,), jnp.float32),
        plgpu.SMEM((QUERY_ROWS,), jnp.float32),
        plgpu.SMEM((1,), jnp.int32),
    )


def finish(
    plan: Plan,
    inputs: Inputs,
    outputs: Outputs,
    stage: Staged,
    sums: Any,
    place: Place,
    at: Any,
    begin: Any,
    total_tiles: Any,
) -> None:
    """Store the result if this block has all of the row and head, else a part of it."""
    acc, top, total, bad = sums
    total = total * jnp.where(bad != 0, jnp.float32(jnp.nan), jnp.float32(1))
    # No thread of this warpgroup still reads what another writes, or the other way round. Nothing
    # else in shared memory is both written and read by one warpgroup.
    plgpu.commit_smem()
    _stash(plan, acc, stage.acc)
    stage.top[...] = top
    stage.total[...] = total
    plgpu.commit_smem()
    row0 = at - place.tile
    first, parts, slot0 = work.parts_of(plan, total_tiles, row0, place.row.tiles)

    @pl.when(parts == 1)
    def _():
        @_some_heads(plan)
        def _(heads: list[Any]) -> None:
            for g in heads:
                row, head = place.index, place.head * plan.group + g
                sums = _line(plan, stage.acc, g), stage.top[g], stage.total[g]
                _store(plan, inputs, outputs, row, head, *sums)

    @pl.when(parts > 1)
    def _():
        # The first tiles of a block have the even slot, others begin in it.
        worker = lax.axis_index("worker")
        slot = 2 * worker + jnp.where(at == begin, 0, 1)

        @_some_heads(plan)
        def _(heads: list[Any]) -> None:
            for g in heads:
                mass = stage.total[g]
                acc = _line(plan, stage.acc, g) / jnp.where(mass == 0.0, 1.0, mass)
                outputs.part_acc[slot, g, :] = acc
                outputs.part_lse[slot, g] = stage.top[g] + jnp.log2(mass)

        if not plan.interpreted:
            counter = inputs.counters.at[pl.ds(place.index * plan.kv_heads + place.head, 1)]
            arrived = _arrive(counter, stage.arrived, parts)

            @pl.when(arrived == parts - 1)
            def _():
                merge_parts(plan, inputs, outputs, place.index, place.head, first, parts, slot0)


def merge_parts(
    plan: Plan,
    inputs: Inputs,
    outputs: Outputs,
    row: Any,
    kv_head: Any,
    first: Any,
    parts: Any,
    slot0: Any,
) -> None:
    """Merge the parts of a row and head, in the order of the tokens, and store the result."""

    @_some_heads(plan)
    def _(heads: list[Any]) -> None:
        count = min(_LOADS // len(heads), 16)

        def chunk(c: Any, carry: Any) -> Any:
            numbers = [c * count + i for i in range(count)]
            slots = [jnp.where(n == 0, slot0, 2 * (first + n)) for n in numbers]
            slots = [jnp.where(n < parts, s, slot0) for n, s in zip(numbers, slots, strict=True)]
            loaded = [
                [(_line(plan, outputs.part_acc.at[s], g), outputs.part_lse[s, g]) for s in slots]
                for g in heads
            ]
            return [
                _merge_some(sums, some, [n < parts for n in numbers])
                for sums, some in zip(carry, loaded, strict=True)
            ]

        nothing = (
            plgpu.layout_cast(jnp.zeros((plan.dim,), jnp.float32), _line_layout(plan)),
            jnp.float32(-jnp.inf),
            jnp.float32(0),
        )
        chunks = lax.div(parts + (count - 1), jnp.int32(count))
        merged = lax.fori_loop(0, chunks, chunk, [nothing for _ in heads])
        for g, sums in zip(heads, merged, strict=True):
            _store(plan, inputs, outputs, row, kv_head * plan.group + g, *sums)


def _some_heads(plan: Plan) -> Any:
    """Run a function of some heads of the group until it had all, the last perhaps twice."""

    def run(body: Any) -> None:
        if plan.group <= _HEADS:
            body(list(range(plan.group)))
            return

        def step(i: Any, _: None) -> None:
            body([jnp.minimum(i * _HEADS + g, plan.group - 1) for g in range(_HEADS)])

        lax.fori_loop(0, -(-plan.group // _HEADS), step, None)

    return run


def _merge_some(sums: Any, some: Any, here: Any) -> Any:
    acc, top, total = sums
    tops = [jnp.where(h, lse, -jnp.inf) for h, (_, lse) in zip(here, some, strict=True)]
    new_top = top
    for one in tops:
        new_top = jnp.maximum(new_top, one)
    base = jnp.where(new_top == -jnp.inf, 0.0, new_top)
    share = jnp.exp2(top - base)
    acc, total = acc * share, total * share
    for one, (part, _) in zip(tops, some, strict=True):
        weight = jnp.exp2(one - base)
        acc, total = acc + part * weight, total + weight
    return acc, new_top, total


def merge_body(plan: Plan, inputs: Inputs, outputs: Outputs) -> None:
    """One row and head in a launch of its own, where blocks cannot count who came last."""
    row, head = lax.axis_index("row"), lax.axis_index("head")
    first, parts, slot0 = work.lane(plan, inputs.seq_lens, inputs.starts, row, head)

    @pl.when(parts > 1)
    def _():
        merge_parts(plan, inputs, outputs, row, head, first, parts, slot0)


def _line_layout(plan: Plan) -> Any:
    if plan.dim % 128:  # fewer numbers than threads: every warp has them all, two in a lane
        return plgpu.Layout.TILED(
            plgpu.Tiling(((plan.dim,), (2,))), (plgpu.Replicated(4),), (-2,), vector_dim=-1
        )
    return plgpu.Layout.WG_STRIDED((plan.dim,), vec_size=plan.dim // 128)


def _line(plan: Plan, array: Any, g: Any) -> Any:
    """One head of `[heads, D]`, spread over the threads."""
    return plgpu.load(array.at[g], layout=_line_layout(plan), optimized=False)


def _store(plan: Plan, inputs: Inputs, outputs: Outputs, row: Any, head: Any, *sums: Any) -> None:
    """The result of one query head, from its `acc, top, total` and its sink."""
    acc, top, total = sums
    extra = jnp.minimum(inputs.sink[head] * LOG2E, HUGE) if plan.sinks else jnp.float32(-jnp.inf)
    base = jnp.maximum(top, extra)
    base = jnp.where(base == -jnp.inf, 0.0, base)
    share = jnp.exp2(top - base)
    mass = total * share + jnp.exp2(extra - base)
    result = acc * (share / jnp.where(mass == 0.0, 1.0, mass))
    outputs.out[row, head, :] = result.astype(outputs.out.dtype)
    outputs.lse[row, head] = (top + jnp.log2(total)) * LN2


def _stash(plan: Plan, acc: Any, to: Any) -> None:
    """Store the rows of the group; each warp has 16 rows, and those without such a row do nothing.

    Eight rows of 512 bytes meet in the same banks, so four warps would take four times as long.
    """
    if plan.interpreted:
        to[...] = acc
        return
    from jax.experimental.mosaic import gpu as mgpu
    from jaxlib.mlir.dialects import arith

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, plgpu.RefType()))
    def store(_: Any, acc: Any, to: Any) -> None:
        warp = mgpu.utils.warp_idx()
        warp = arith.remui(warp, mgpu.utils.c(4, warp.type))
        most = mgpu.utils.c(-(-plan.group // 16), warp.type)
        with mgpu.utils.when(arith.cmpi(arith.CmpIPredicate.ult, warp, most)):
            acc.store_untiled(to, optimized=False)

    store(acc, to)


def _arrive(counter: Any, box: Any, parts: Any) -> Any:
    """Count this block; how many came before. The last sets the counter back to zero."""
    from jax.experimental.mosaic import gpu as mgpu
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, memref

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), plgpu.RefType(), plgpu.Layout.WG_SPLAT(())),
        return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=plgpu.Layout.WG_SPLAT(())),
    )
    def count(_: Any, counter: Any, box: Any, parts: Any) -> Any:
        i32 = ir.IntegerType.get_signless(32)
        zero = mgpu.utils.c(0, ir.IndexType.get())
        # All threads have stored; the atomic releases that, and acquires what others stored.
        mgpu.utils.warpgroup_barrier()
        with mgpu.utils.single_thread(mgpu.ThreadSubset.WARPGROUP):
            one = mgpu.utils.c(1, i32)
            pointer = mgpu.utils.memref_ptr(counter)
            old = mgpu.utils.inline_ptx(
                "atom.acq_rel.gpu.global.add.u32 $0, [$1], $2;",
                pointer, one, result_types=i32, has_side_effects=True,
            )  # fmt: skip
            memref.store(old, box, [zero])
            last = arith.cmpi(arith.CmpIPredicate.eq, old, arith.subi(parts.registers.item(), one))
            with mgpu.utils.when(last):
                memref.store(mgpu.utils.c(0, i32), counter, [zero])
        mgpu.utils.warpgroup_barrier()
        before = memref.load(box, [zero])
        return mgpu.FragmentedArray.splat(before, (), is_signed=True)

    return count(counter, box, parts)
