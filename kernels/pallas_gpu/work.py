"""Which tiles or units a block has: every block finds its own from the lengths of the batch.

T = 1:
```
tiles    [row 0 head 0 | row 0 head 1 | row 1 head 0 | row 1 head 1 ...]   one line of them all
blocks   [   0    |    1    |    2    |    3    | ...                  ]   cut into equal parts
```
A row and head that lies in several blocks has a partial result in each; the first has the parts of
the others behind it, so where they lie follows from the two ends alone.

T > 1: a block has one unit, two tiles of 64 queries of one KV head. Blocks begin in their order, as
multiprocessors become free, so the order is the balance: rows with more keys come first, and in a
row the units that see most.
```
units    [row 2: last tokens ... first tokens | row 0: last ... first | row 1 ...]
```
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
    "Unit",
    "advance",
    "any_outside",
    "find",
    "guess",
    "lane",
    "parts_of",
    "row_at",
    "row_of",
    "share",
    "total_tiles",
    "unit_of",
]

_ROUND = 512  # numbers that are loaded at once: 16 by each thread of a warp

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
    count = _count(plan, plan.rows)
    length = _load(plan, lens, first, plan.rows - 1, count)
    start = jnp.zeros_like(length)
    if plan.starts:
        start = _load(plan, starts, first, plan.rows - 1, count)
    tiles = row_of(plan, length, start).tiles * plan.kv_heads
    number = _numbers(plan, count)
    return number, jnp.where(number < plan.rows - first, tiles, 0)


def _rounds(plan: Plan, step: Any, init: Any) -> Any:
    """`step(first row, carry)` until all rows were there: mostly once."""
    count = _count(plan, plan.rows)
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


class Unit(NamedTuple):
    """Two tiles of queries of one KV head: what one block attends with where T > 1.

    Its queries see the keys from `first` to `end - 1`, each of them some of these: the blocks of
    keys from `block0` on.
    """

    row: Scalar
    head: Scalar  # the first of its query heads
    kv_head: Scalar
    t0: Scalar  # the first of its tokens
    padding: Scalar  # tokens in front of the row's own
    length: Scalar
    start: Scalar
    lowest: Scalar  # position of its first query that is the row's own
    first: Scalar
    end: Scalar
    block0: Scalar
    blocks: Scalar


def unit_of(plan: Plan, lens: Any, starts: Any, query_lens: Any, index: Scalar) -> Unit:
    """The unit of this block; one without a query of the row's own sees nothing."""
    heads = 2 if plan.paired else 1
    head = lax.rem(index, jnp.int32(plan.lanes)) * heads
    place = lax.div(index, jnp.int32(plan.lanes))
    row = _row_in_order(plan, lens, lax.div(place, jnp.int32(plan.units)))
    t0 = (plan.units - 1 - lax.rem(place, jnp.int32(plan.units))) * plan.unit_tokens
    length = jnp.clip(lens[row], 0, plan.capacity + 1)
    start = jnp.clip(starts[row], 0, plan.capacity) if plan.starts else jnp.int32(0)
    own = jnp.clip(query_lens[row], 0, plan.new) if plan.query_lens else plan.new
    padding = jnp.int32(plan.tokens - own)
    lowest = length - plan.tokens + jnp.maximum(t0, padding)
    end = jnp.clip(length - plan.tokens + t0 + plan.unit_tokens, 0, plan.capacity)
    end = jnp.where(t0 + plan.unit_tokens > padding, end, 0)
    first = jnp.maximum(start, lowest - plan.window + 1) if plan.window else start
    first = jnp.minimum(first, end)
    block0 = lax.div(first, jnp.int32(plan.tile))
    blocks = lax.div(end + (plan.tile - 1), jnp.int32(plan.tile)) - block0
    blocks = jnp.where(first < end, blocks, 0)
    kv_head = lax.div(head, jnp.int32(plan.group))
    place = (row, head, kv_head, t0, padding)
    return Unit(*place, length, start, lowest, first, end, block0, blocks)


def _row_in_order(plan: Plan, lens: Any, rank: Scalar) -> Scalar:
    """The row of this rank, longest first: over half of the longest, over an eighth, the rest.

    One scan counts all three kinds, in 10 bits of an int32 each, so it is for up to `_ROUND` rows.
    """
    if plan.rows == 1 or plan.rows > _ROUND:
        return rank
    count = _count(plan, plan.rows)
    row, length = _numbers(plan, count), _load(plan, lens, jnp.int32(0), plan.rows - 1, count)
    length = jnp.clip(length, 0, plan.capacity)
    longest = length.max()
    half, eighth = lax.div(longest, jnp.int32(2)), lax.div(longest, jnp.int32(8))
    kind = (length <= half).astype(jnp.int32) + (length <= eighth).astype(jnp.int32)
    shift = jnp.where(row < plan.rows, kind * 10, 20)
    ends = _running_sum(plan, jnp.left_shift(jnp.ones_like(shift), shift))
    every = ends.max()
    mask = (1 << 10) - 1
    longer = jnp.where(shift > 0, every & mask, 0)
    longer += jnp.where(shift > 10, lax.shift_right_logical(every, 10) & mask, 0)
    place = (lax.shift_right_logical(ends, shift) & mask) + longer - 1
    return jnp.where(place == rank, row, 0).sum()


def any_outside(plan: Plan, page_table: Any, row: Scalar, length: Scalar) -> Scalar:
    """Whether a row's table names a page outside the pool, of those its length reaches; 1 or 0."""
    used = lax.div(jnp.minimum(length, plan.capacity) + (plan.page_size - 1), plan.page_size)
    count = _count(plan, plan.columns)

    def step(i: Scalar, wrong: Scalar) -> Scalar:
        ids = _load(plan, page_table.at[row], i * count, used - 1, count)
        return wrong | ((ids < 0) | (ids >= plan.pages)).astype(jnp.int32).max()

    return lax.fori_loop(0, lax.div(used + (count - 1), jnp.int32(count)), step, jnp.int32(0))


def _count(plan: Plan, numbers: int) -> int:
    """How many of so many are loaded at once; on a card some for each thread of a warp."""
    if plan.interpreted:
        return min(_ROUND, numbers)
    each = 2
    while 32 * each < min(_ROUND, numbers):
        each *= 2
    return 32 * each


def _layout(count: int) -> Any:
    """Some numbers after the other for each thread, the same in all warps."""
    return plgpu.Layout.TILED(
        plgpu.Tiling(((count,), (count // 32,))), (plgpu.Replicated(4),), (-2,), vector_dim=-1
    )


def _numbers(plan: Plan, count: int) -> Any:
    """0, 1, 2 and so on."""
    layout = None if plan.interpreted else _layout(count)
    return plgpu.broadcasted_iota(jnp.int32, (count,), 0, layout=layout)


def _load(plan: Plan, array: Any, first: Scalar, last: Any, count: int) -> Any:
    """`count` numbers from `first` on, and number `last` again behind it."""
    if plan.interpreted:
        return array[...][jnp.minimum(first + jnp.arange(count), last)]
    from jax.experimental.mosaic import gpu as mgpu
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, memref, vector

    scalar = plgpu.Layout.WG_SPLAT(())

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), scalar, scalar),
        return_type=plgpu.ShapeDtypeStruct((count,), jnp.int32, layout=_layout(count)),
    )
    def load(_: Any, array: Any, first: Any, last: Any) -> Any:
        i32, each = ir.IntegerType.get_signless(32), count // 32
        lane = arith.remui(mgpu.utils.thread_idx(), mgpu.utils.c(32, i32))
        number = arith.addi(first.registers.item(), arith.muli(lane, mgpu.utils.c(each, i32)))
        numbers = []
        for i in range(each):
            at = arith.addi(number, mgpu.utils.c(i, i32))
            at = arith.minsi(at, last.registers.item())
            numbers.append(memref.load(array, [arith.index_cast(ir.IndexType.get(), at)]))
        register = vector.from_elements(ir.VectorType.get((each,), i32), numbers)
        return _array(count, register)

    return load(array, first, jnp.int32(last))


def _running_sum(plan: Plan, numbers: Any) -> Any:
    """The sums up to and with each number."""
    if plan.interpreted:
        return jnp.cumsum(numbers)
    from jax.experimental.mosaic import gpu as mgpu
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, vector

    (count,) = numbers.shape
    layout = _layout(count)

    @plgpu.inline_mgpu(
        arg_types=(layout,),
        return_type=plgpu.ShapeDtypeStruct(numbers.shape, jnp.int32, layout=layout),
    )
    def scan(_: Any, numbers: Any) -> Any:
        i32 = ir.IntegerType.get_signless(32)
        register, each = numbers.registers.item(), count // 32
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
        return _array(count, vector.from_elements(register.type, ends))

    return scan(numbers)


def _array(count: int, register: Any) -> Any:
    """An array in `_layout` of one vector for each thread."""
    from jax.experimental.mosaic import gpu as mgpu

    layout = _layout(count).to_mgpu()
    registers = np.array([register], dtype=object).reshape(layout.registers_shape((count,)))
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=True)
