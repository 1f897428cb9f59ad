"""Which tiles a block has: every block finds its own from the lengths of the batch.

```
tiles    [row 0 head 0 | row 0 head 1 | row 1 head 0 | row 1 head 1 ...]   one line of them all
blocks   [   0    |    1    |    2    |    3    | ...                  ]   cut into equal parts
```
A row and head that lies in several blocks has a partial result in each; the first has the parts of
the others behind it, so where they lie follows from the two ends alone.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from .plan import Plan

__all__ = [
    "Place",
    "Row",
    "advance",
    "find",
    "guess",
    "lane",
    "parts_of",
    "row_at",
    "row_of",
    "share",
    "total_tiles",
]

_ROUND = 512  # rows whose lengths are loaded at once: 16 by each thread of a warp

_MOST = 2**22  # tiles of a guess, so that times blocks it is an int32

Scalar = Any  # int32 in a register


class Row(NamedTuple):
    """The visible tokens of a row, its first tile, its tiles, and whether it breaks the contract.

    A row without tokens has one tile, so that somebody writes its zeros.
    """

    first: Scalar
    end: Scalar
    tile0: Scalar
    tiles: Scalar
    broken: Scalar


class Place(NamedTuple):
    """A tile in the line of all tiles."""

    index: Scalar
    head: Scalar
    tile: Scalar
    row: Row


def row_of(plan: Plan, length: Any, start: Any) -> Row:
    """The row, or rows, of this length and start."""
    first = jnp.maximum(start, 0)
    if plan.window:
        first = jnp.maximum(first, length - plan.window)
    end = jnp.minimum(length, plan.capacity)
    first = jnp.minimum(first, plan.capacity)
    tile0 = lax.div(first, jnp.full_like(first, plan.tile))
    tiles = jnp.maximum(end, 0) + (plan.tile - 1)
    tiles = lax.div(tiles, jnp.full_like(tiles, plan.tile)) - tile0
    return Row(first, end, tile0, jnp.maximum(tiles, 1), length > plan.capacity)


def row_at(plan: Plan, lens: Any, starts: Any, index: Scalar) -> Row:
    """The row of this index, or the last one."""
    index = jnp.minimum(index, plan.rows - 1)
    return row_of(plan, lens[index], starts[index] if plan.starts else jnp.int32(0))


def _tiles(plan: Plan, lens: Any, starts: Any, first: Scalar) -> tuple[Any, Any]:
    """`number of a row from first on, tiles of all its heads`, 0 behind the last row."""
    length = _load(plan, lens, first)
    start = _load(plan, starts, first) if plan.starts else jnp.zeros_like(length)
    tiles = row_of(plan, length, start).tiles * plan.kv_heads
    (count,) = tiles.shape
    layout = None if plan.interpreted else _layout(plan)
    number = plgpu.broadcasted_iota(jnp.int32, (count,), 0, layout=layout)
    return number, jnp.where(number < plan.rows - first, tiles, 0)


def _rounds(plan: Plan, step: Any, init: Any) -> Any:
    """`step(first row, carry)` until all rows were there: mostly once."""
    count = _count(plan)
    if plan.rows <= count:
        return step(jnp.int32(0), init)
    return lax.fori_loop(0, -(-plan.rows // count), lambda i, carry: step(i * count, carry), init)


def total_tiles(plan: Plan, lens: Any, starts: Any) -> Scalar:
    """Tiles of all rows and heads."""

    def step(first: Scalar, total: Scalar) -> Scalar:
        return total + _tiles(plan, lens, starts, first)[1].sum()

    return _rounds(plan, step, jnp.int32(0))


def share(plan: Plan, total: Scalar, worker: Scalar) -> Scalar:
    """Where the tiles of a block begin; with fewer tiles than blocks the last have none."""
    workers = jnp.minimum(total, plan.workers)
    return lax.div(jnp.minimum(worker, workers) * total, workers)


def find(plan: Plan, lens: Any, starts: Any, begin: Scalar) -> Place:
    """The tile with this number."""

    def step(first: Scalar, carry: Any) -> Any:
        index, base, end = carry
        ends = _running_sum(plan, _tiles(plan, lens, starts, first)[1]) + end
        behind = ends <= begin
        index += behind.astype(jnp.int32).sum()
        return index, jnp.maximum(base, jnp.where(behind, ends, 0).max()), ends.max()

    index, base, _ = _rounds(plan, step, (jnp.int32(0),) * 3)
    row = row_at(plan, lens, starts, index)
    head = lax.div(begin - base, row.tiles)
    return Place(index, head, begin - base - head * row.tiles, row)


def guess(plan: Plan, worker: Scalar) -> tuple[Scalar, Scalar]:
    """`row, tile` where a block begins if all rows are full: known before any length is."""
    tiles = -(-plan.capacity // plan.tile)
    begin = lax.div(worker * min(plan.rows * plan.kv_heads * tiles, _MOST), jnp.int32(plan.workers))
    index = lax.div(begin, jnp.int32(plan.kv_heads * tiles))
    return index, lax.rem(begin, jnp.int32(tiles))


def advance(plan: Plan, lens: Any, starts: Any, place: Place, tiles: Scalar) -> Place:
    """The place that many tiles further, at most at the start of the next head."""
    tile = place.tile + tiles
    done = tile >= place.row.tiles
    head = jnp.where(done, place.head + 1, place.head)
    wrap = head >= plan.kv_heads
    index = jnp.where(wrap, place.index + 1, place.index)
    return Place(
        index,
        jnp.where(wrap, 0, head),
        jnp.where(done, 0, tile),
        row_at(plan, lens, starts, index),
    )


def parts_of(plan: Plan, total: Scalar, begin: Scalar, tiles: Scalar) -> tuple[Any, Any, Any]:
    """`first block, blocks, slot in the first block` of the tiles from `begin` on."""

    def owner(tile: Scalar) -> Scalar:
        return lax.div((tile + 1) * jnp.minimum(total, plan.workers) - 1, total)

    first = owner(begin)
    inside = share(plan, total, first) < begin
    return first, owner(begin + tiles - 1) - first + 1, 2 * first + jnp.where(inside, 1, 0)


def lane(plan: Plan, lens: Any, starts: Any, index: Scalar, head: Scalar) -> tuple[Any, Any, Any]:
    """`parts_of` one row and head."""

    def step(first: Scalar, base: Scalar) -> Scalar:
        number, tiles = _tiles(plan, lens, starts, first)
        return base + jnp.where(number < index - first, tiles, 0).sum()

    row = row_at(plan, lens, starts, index)
    begin = _rounds(plan, step, jnp.int32(0)) + head * row.tiles
    return parts_of(plan, total_tiles(plan, lens, starts), begin, row.tiles)


def _count(plan: Plan) -> int:
    """Rows of a round; on a card two times a power of two for each thread of a warp."""
    if plan.interpreted:
        return min(_ROUND, plan.rows)
    each = 2
    while 32 * each < min(_ROUND, plan.rows):
        each *= 2
    return 32 * each


def _layout(plan: Plan) -> Any:
    """Some rows after the other for each thread, the same in all warps."""
    count = _count(plan)
    return plgpu.Layout.TILED(
        plgpu.Tiling(((count,), (count // 32,))), (plgpu.Replicated(4),), (-2,), vector_dim=-1
    )


def _load(plan: Plan, array: Any, first: Scalar) -> Any:
    """`_count` numbers from `first` on, and the last one again behind the end."""
    count = _count(plan)
    if plan.interpreted:
        padded = jnp.pad(array[...], (0, count), mode="edge")
        return lax.dynamic_slice(padded, (first,), (count,))
    from jax.experimental.mosaic import gpu as mgpu
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, memref, vector

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT(())),
        return_type=plgpu.ShapeDtypeStruct((count,), jnp.int32, layout=_layout(plan)),
    )
    def load(_: Any, array: Any, first: Any) -> Any:
        i32, each = ir.IntegerType.get_signless(32), count // 32
        last = mgpu.utils.c(plan.rows - 1, i32)
        lane = arith.remui(mgpu.utils.thread_idx(), mgpu.utils.c(32, i32))
        row = arith.addi(first.registers.item(), arith.muli(lane, mgpu.utils.c(each, i32)))
        numbers = []
        for i in range(each):
            at = arith.minsi(arith.addi(row, mgpu.utils.c(i, i32)), last)
            numbers.append(memref.load(array, [arith.index_cast(ir.IndexType.get(), at)]))
        register = vector.from_elements(ir.VectorType.get((each,), i32), numbers)
        return _array(plan, register)

    return load(array, first)


def _running_sum(plan: Plan, numbers: Any) -> Any:
    """The sums up to and with each number."""
    if plan.interpreted:
        return jnp.cumsum(numbers)
    from jax.experimental.mosaic import gpu as mgpu
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, vector

    layout = _layout(plan)

    @plgpu.inline_mgpu(
        arg_types=(layout,),
        return_type=plgpu.ShapeDtypeStruct(numbers.shape, jnp.int32, layout=layout),
    )
    def scan(_: Any, numbers: Any) -> Any:
        i32 = ir.IntegerType.get_signless(32)
        register, each = numbers.registers.item(), numbers.shape[0] // 32
        sums: list[Any] = []
        for i in range(each):
            number = vector.extract(register, dynamic_position=[], static_position=[i])
            sums.append(arith.addi(sums[-1], number) if sums else number)
        mine = before = sums[-1]
        for distance in (1, 2, 4, 8, 16):
            got = mgpu.utils.inline_ptx(
                "{ .reg .pred p; shfl.sync.up.b32 $0|p, $1, $2, 0, 0xffffffff; "
                "@!p mov.b32 $0, 0; }",
                before, mgpu.utils.c(distance, i32), result_types=i32, has_side_effects=True,
            )  # fmt: skip
            before = arith.addi(before, got)
        before = arith.subi(before, mine)
        ends = [arith.addi(number, before) for number in sums]
        return _array(plan, vector.from_elements(register.type, ends))

    return scan(numbers)


def _array(plan: Plan, register: Any) -> Any:
    """An array in `_layout` of one vector for each thread."""
    from jax.experimental.mosaic import gpu as mgpu

    layout = _layout(plan).to_mgpu()
    registers = np.array([register], dtype=object).reshape(layout.registers_shape((_count(plan),)))
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=True)
