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
from jax import lax

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
    "share",
    "total_tiles",
]

_CHUNK = 32  # rows whose lengths are loaded at once

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


def row_at(plan: Plan, lens: Any, starts: Any, index: Scalar) -> Row:
    """The row of this index, or the last one."""
    index = jnp.minimum(index, plan.rows - 1)
    length = lens[index]
    first = jnp.maximum(starts[index], 0) if plan.starts else jnp.int32(0)
    if plan.window:
        first = jnp.maximum(first, length - plan.window)
    end = jnp.minimum(length, plan.capacity)
    first = jnp.minimum(first, plan.capacity)
    tile0 = lax.div(first, jnp.int32(plan.tile))
    tiles = lax.div(jnp.maximum(end, 0) + (plan.tile - 1), jnp.int32(plan.tile)) - tile0
    return Row(first, end, tile0, jnp.maximum(tiles, 1), length > plan.capacity)


def _fold(plan: Plan, lens: Any, starts: Any, step: Any, init: Any) -> Any:
    """`step(carry, row, tiles of all its heads)` over all rows, some loads at a time."""

    def chunk(c: Scalar, carry: Any) -> Any:
        rows = [c * _CHUNK + i for i in range(min(_CHUNK, plan.rows))]
        tiles = [row_at(plan, lens, starts, row).tiles * plan.kv_heads for row in rows]
        whole = plan.rows <= _CHUNK or plan.rows % _CHUNK == 0
        for row, some in zip(rows, tiles, strict=True):
            carry = step(carry, row, some if whole else jnp.where(row < plan.rows, some, 0))
        return carry

    if plan.rows <= _CHUNK:
        return chunk(jnp.int32(0), init)
    return lax.fori_loop(0, -(-plan.rows // _CHUNK), chunk, init)


def total_tiles(plan: Plan, lens: Any, starts: Any) -> Scalar:
    """Tiles of all rows and heads."""
    return _fold(plan, lens, starts, lambda total, _, some: total + some, jnp.int32(0))


def share(plan: Plan, total: Scalar, worker: Scalar) -> Scalar:
    """Where the tiles of a block begin; with fewer tiles than blocks the last have none."""
    workers = jnp.minimum(total, plan.workers)
    return lax.div(jnp.minimum(worker, workers) * total, workers)


def find(plan: Plan, lens: Any, starts: Any, begin: Scalar) -> Place:
    """The tile with this number."""

    def step(carry: Any, _: Scalar, some: Scalar) -> Any:
        index, base, end = carry
        end += some
        behind = end <= begin
        return index + behind.astype(jnp.int32), jnp.where(behind, end, base), end

    index, base, _ = _fold(plan, lens, starts, step, (jnp.int32(0),) * 3)
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

    def step(base: Scalar, row: Scalar, some: Scalar) -> Scalar:
        return base + jnp.where(row < index, some, 0)

    row = row_at(plan, lens, starts, index)
    begin = _fold(plan, lens, starts, step, jnp.int32(0)) + head * row.tiles
    return parts_of(plan, total_tiles(plan, lens, starts), begin, row.tiles)
