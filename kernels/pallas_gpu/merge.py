"""From the sums of a block to results: store them, count arrivals, merge in the order of tokens."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from . import work
from .config import QUERIES
from .plan import Plan
from .tiles import finished
from .work import Place

__all__ = ["Inputs", "Outputs", "Staged", "finish", "merge_body", "staged"]

_LOADS = 80  # lines of parts before the first is used: one round trip for all of them


class Inputs(NamedTuple):
    """What a launch reads."""

    q: Any  # [B, Hq, D]
    k: Any  # [L * N * Hk * S, D]
    v: Any
    layer: Any  # int32 [1]
    page_table: Any  # int32 [B, P]
    seq_lens: Any  # int32 [B]
    starts: Any  # int32 [B]
    sink: Any  # float32 [Hq], one more where G is odd
    counters: Any  # int32 [B * Hk], zeros before and after


class Outputs(NamedTuple):
    """What a launch writes."""

    out: Any  # [B, Hq, D]
    lse: Any  # float32 [B, Hq]
    part_acc: Any  # float32 [slots, lines, D], normalised; a line more than G where G is odd
    part_lse: Any  # float32 [slots, lines], base 2


class Staged(NamedTuple):
    """The sums of a row and head in shared memory, on their way from one layout to another."""

    acc: Any  # float32 [lines, D]
    top: Any  # float32 [64]
    total: Any
    arrived: Any  # int32 [1]


def staged(plan: Plan) -> Staged:
    """The types of a `Staged`."""
    return Staged(
        plgpu.SMEM((plan.lines, plan.dim), jnp.float32),
        plgpu.SMEM((QUERIES,), jnp.float32),
        plgpu.SMEM((QUERIES,), jnp.float32),
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
    row0 = at - place.tile
    first, parts, slot0 = work.parts_of(plan, total_tiles, row0, place.row.tiles)

    @pl.when(parts == 1)
    def _():
        # No thread of this warpgroup still reads what another writes, or the other way round.
        # Nothing else in shared memory is both written and read by one warpgroup.
        plgpu.commit_smem()
        _put_lines(plan, acc, stage.acc)
        stage.top[...] = top
        stage.total[...] = total
        plgpu.commit_smem()
        sums = _load(plan, stage.acc), _load(plan, stage.top), _load(plan, stage.total)
        _store(plan, inputs, outputs, stage, place.index, place.head, sums)

    @pl.when(parts > 1)
    def _():
        # The first tiles of a block have the even slot, others begin in it.
        slot = 2 * lax.axis_index("worker") + jnp.where(at == begin, 0, 1)
        scale = 1.0 / jnp.where(total == 0.0, 1.0, total)
        part = acc * lax.broadcast_in_dim(scale, acc.shape, [0])
        _put_lines(plan, part, outputs.part_acc.at[slot])
        _put_lines(plan, top + jnp.log2(total), outputs.part_lse.at[slot])
        if not plan.interpreted:
            counter = inputs.counters.at[pl.ds(place.index * plan.kv_heads + place.head, 1)]
            arrived = _arrive(counter, stage.arrived, parts)

            @pl.when(arrived == parts - 1)
            def _():
                where = first, parts, slot0
                merge_parts(plan, inputs, outputs, stage, place.index, place.head, where)


def merge_parts(
    plan: Plan, inputs: Inputs, outputs: Outputs, stage: Staged, row: Any, head: Any, where: Any
) -> None:
    """Merge the parts of a row and head, in the order of the tokens, and store the result.

    `where` is what `work.parts_of` says of them.
    """
    first, parts, slot0 = where
    count = max(min(_LOADS // plan.lines, 20), 1)

    def chunk(c: Any, sums: Any) -> Any:
        some = []
        for i in range(count):
            number = c * count + i
            here = number < parts
            slot = jnp.where((number > 0) & here, 2 * (first + number), slot0)
            hide = jnp.where(here, jnp.float32(0), jnp.float32(-jnp.inf))
            some.append((_load(plan, outputs.part_acc, slot), outputs.part_lse, slot, hide))
        return _merge_some(
            plan, sums, [(acc, _load(plan, lse, slot) + hide) for acc, lse, slot, hide in some]
        )

    nothing = (
        plgpu.layout_cast(jnp.zeros((plan.lines, plan.dim), jnp.float32), _layout(plan)),
        plgpu.layout_cast(jnp.full((plan.lines,), -jnp.inf, jnp.float32), _layout(plan).reduce(1)),
        plgpu.layout_cast(jnp.zeros((plan.lines,), jnp.float32), _layout(plan).reduce(1)),
    )
    chunks = lax.div(parts + (count - 1), jnp.int32(count))
    sums = lax.fori_loop(0, chunks, chunk, nothing)
    _store(plan, inputs, outputs, stage, row, head, sums)


def _merge_some(plan: Plan, sums: Any, some: Any) -> Any:
    acc, top, total = sums
    new_top = top
    for _, lse in some:
        new_top = jnp.maximum(new_top, lse)
    base = jnp.where(new_top == -jnp.inf, 0.0, new_top)
    share = jnp.exp2(top - base)
    acc, total = acc * _wide(plan, share), total * share
    for part, lse in some:
        weight = jnp.exp2(lse - base)
        acc, total = acc + part * _wide(plan, weight), total + weight
    return acc, new_top, total


def merge_body(plan: Plan, inputs: Inputs, outputs: Outputs, stage: Staged) -> None:
    """One row and head in a launch of its own, where blocks cannot count who came last."""
    row, head = lax.axis_index("row"), lax.axis_index("head")
    where = work.lane(plan, inputs.seq_lens, inputs.starts, row, head)

    @pl.when(where[1] > 1)
    def _():
        merge_parts(plan, inputs, outputs, stage, row, head, where)


def _layout(plan: Plan) -> Any:
    """Of `[lines, D]`: a warp has whole lines, so what is said of a line is said once in a warp."""
    rows = 4 if plan.lines % 4 == 0 else 2
    warps = (-3,) if rows == 4 else (-3, plgpu.Replicated(2))
    tiling = plgpu.Tiling(((rows, plan.dim), (plan.dim // 32,)))
    return plgpu.Layout.TILED(tiling, warps, (-2,), vector_dim=-1)


def _load(plan: Plan, array: Any, slot: Any = None) -> Any:
    """The lines of a group, of `[.., D]` or of one number each."""
    of_one = array.at[pl.ds(0, plan.lines)] if slot is None else array.at[slot]
    layout = _layout(plan) if len(of_one.shape) == 2 else _layout(plan).reduce(1)
    return plgpu.load(of_one, layout=layout, optimized=False)


def _put(to: Any, value: Any) -> None:
    """Store a few numbers, which are less than jax 0.12 lets a store have by default."""
    if (store := getattr(plgpu, "store", None)) is None:
        to[...] = value
    else:
        store(to, value, optimized=False)


def _wide(plan: Plan, lines: Any) -> Any:
    return lax.broadcast_in_dim(lines, (plan.lines, plan.dim), [0])


def _store(
    plan: Plan, inputs: Inputs, outputs: Outputs, stage: Staged, row: Any, kv_head: Any, sums: Any
) -> None:
    """The result of a row and head, from its sums and its sinks."""
    acc, top, total = sums
    heads = pl.ds(kv_head * plan.group, plan.lines)
    sink = None
    if plan.sinks:
        sink = plgpu.load(inputs.sink.at[heads], layout=_layout(plan).reduce(1), optimized=False)
    share, lse = finished(top, total, sink)
    result = acc * _wide(plan, share)
    if plan.lines == plan.group:
        outputs.out[row, heads] = result.astype(outputs.out.dtype)
        _put(outputs.lse.at[row, heads], lse)
        return
    # The last line is another head's: all pass through shared memory, and it stays there.
    plgpu.commit_smem()
    stage.acc[pl.ds(0, plan.lines), :] = result
    stage.top[pl.ds(0, plan.lines)] = lse
    plgpu.commit_smem()
    layout = plgpu.Layout.TILED(
        plgpu.Tiling(((plan.dim,), (plan.dim // 32,))), (plgpu.Replicated(4),), (-2,), vector_dim=-1
    )
    for g in range(plan.group):
        line = plgpu.load(stage.acc.at[g], layout=layout, optimized=False)
        outputs.out[row, kv_head * plan.group + g] = line.astype(outputs.out.dtype)
        outputs.lse[row, kv_head * plan.group + g] = stage.top[g]


def _put_lines(plan: Plan, value: Any, to: Any) -> None:
    """Store the lines of a group of `[64, D]` or `[64]`, each from the threads that hold it."""
    if plan.interpreted:
        to[...] = value[: to.shape[0]]
        return
    from jax.experimental.mosaic import gpu as mgpu
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, memref, vector

    wide = len(value.shape) == 2
    layout = plgpu.Layout.WGMMA if wide else plgpu.Layout.WGMMA.reduce(1)

    @plgpu.inline_mgpu(arg_types=(layout, plgpu.RefType()))
    def store(_: Any, value: Any, to: Any) -> None:
        def number(x: int) -> Any:
            return mgpu.utils.c(x, ir.IntegerType.get_signless(32))

        def index(x: Any) -> Any:
            return arith.index_cast(ir.IndexType.get(), x)

        # A warp has 16 lines: four threads hold line i of it, and i + 8.
        thread = arith.remui(mgpu.utils.thread_idx(), number(128))
        lane = arith.remui(thread, number(32))
        line0 = arith.addi(
            arith.muli(arith.divui(thread, number(32)), number(16)), arith.divui(lane, number(4))
        )
        column0 = arith.muli(arith.remui(lane, number(4)), number(2))
        registers = value.registers.reshape(-1, 2)
        for half in range(2 if plan.lines > 8 else 1):
            line = arith.addi(line0, number(8 * half))
            mine = arith.cmpi(arith.CmpIPredicate.ult, line, number(plan.lines))
            if not wide:
                first = arith.cmpi(arith.CmpIPredicate.eq, column0, number(0))
                mine = arith.andi(mine, first)
            with mgpu.utils.when(mine):
                for i, register in enumerate(registers[:, half]):
                    if wide:
                        column = arith.addi(column0, number(8 * i))
                        vector.store(register, to, [index(line), index(column)])
                    else:
                        one = vector.extract(register, dynamic_position=[], static_position=[0])
                        memref.store(one, to, [index(line)])

    store(value, to)


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
