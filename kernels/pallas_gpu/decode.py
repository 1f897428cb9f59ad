"""The raw kernel for T = 1: a block for each multiprocessor, one warpgroup loads, one computes.

```
loader     ids of the next tile | TMA of K | TMA of V | ...           up to `stages` tiles ahead
            v full                                  ^ free
consumer   K q -> logits -> online softmax -> weights V -> ...    end of a row: store, or merge
```
The tiles of all rows and heads form one line, of which each block has an equal part (work.py), so
the ring of buffers runs on over the ends of rows. The matrix unit multiplies at least 64 rows: the
queries of a group are the first of them, and the rest is whatever lay there. A row of a product
depends on no other row, and only those of the group are stored.

Pages smaller than a tile are gathered by one copy each. A page that nobody may read is not copied;
its place in the ring holds old bytes, so V is zeroed there before the product, and so is what lies
in a page in front of the first and behind the last visible token.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from . import merge, work
from .config import QUERIES
from .plan import Plan
from .tiles import capped, copy_pages, live_pieces, no_sums, page_ids, softmax, zero_hidden
from .work import Place, Row

__all__ = ["Ring", "decode_body", "scratch"]

Q_SLOTS = 2


class Ring(NamedTuple):
    """What both warpgroups of a block share."""

    q: Any  # [Q_SLOTS, 64, D], the first rows are real
    k: Any  # [stages, tile, D]
    v: Any
    left: Any  # [64, D], the query of this row and head as the matrix unit reads it
    weights: Any  # [64, tile], None where it is not interpreted
    bad: Any  # int32 [stages]: the tile has a page id outside the pool
    staged: merge.Staged
    q_full: Any
    k_full: Any
    v_full: Any
    q_free: Any
    k_free: Any
    v_free: Any


def scratch(plan: Plan, dtype: Any) -> Ring:
    """The types of a `Ring`."""
    swizzle = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    tiles = plgpu.SMEM((plan.stages, plan.tile, plan.dim), dtype, transforms=swizzle)
    return Ring(
        q=plgpu.SMEM((Q_SLOTS, QUERIES, plan.dim), dtype),
        k=tiles,
        v=tiles,
        left=plgpu.SMEM((QUERIES, plan.dim), dtype, transforms=swizzle),
        weights=plgpu.SMEM((QUERIES, plan.tile), dtype, transforms=swizzle)
        if plan.interpreted
        else None,
        bad=plgpu.SMEM((plan.stages,), jnp.int32),
        staged=merge.staged(plan),
        q_full=plgpu.Barrier(num_barriers=Q_SLOTS),
        k_full=plgpu.Barrier(num_arrivals=plan.pieces, num_barriers=plan.stages),
        v_full=plgpu.Barrier(num_arrivals=plan.pieces, num_barriers=plan.stages),
        q_free=plgpu.Barrier(num_barriers=Q_SLOTS),
        k_free=plgpu.Barrier(num_barriers=plan.stages),
        v_free=plgpu.Barrier(num_barriers=plan.stages),
    )


def decode_body(plan: Plan, inputs: merge.Inputs, outputs: merge.Outputs, ring: Ring) -> None:
    """What one warpgroup of one block does."""
    worker, thread = lax.axis_index("worker"), lax.axis_index("thread")
    lens, starts = inputs.seq_lens, inputs.starts

    def mine() -> tuple[Any, Any, Any]:
        total = work.total_tiles(plan, lens, starts)
        return work.share(plan, total, worker), work.share(plan, total, worker + 1), total

    @pl.when(thread == 0)
    def _():
        begin, stop, total = mine()

        @pl.when(begin < stop)
        def _():
            place = work.find(plan, lens, starts, begin)
            _consume(plan, inputs, outputs, ring, place, begin, stop, total)

    @pl.when(thread == 1)
    def _():
        # On their way while the lengths are: an even batch of full rows starts with these.
        layer, index, tile = inputs.layer[0], *work.guess(plan, worker)
        guessed = page_ids(plan, inputs.page_table, index, tile)
        begin, stop, _ = mine()

        @pl.when(begin < stop)
        def _():
            place = work.find(plan, lens, starts, begin)
            right = (place.index == index) & (place.row.tile0 + place.tile == tile)
            ids = lax.cond(right, lambda: guessed, lambda: _ids_of(plan, inputs, place))
            _load(plan, inputs, ring, place, ids, layer, stop - begin)


def _load(
    plan: Plan, inputs: merge.Inputs, ring: Ring, place: Place, ids: Any, layer: Any, steps: Any
) -> None:
    """Fill the ring with the tiles of this block, one after the other; `ids` are of the first."""
    lens, starts = inputs.seq_lens, inputs.starts

    def step(i: Any, carry: Any) -> Any:
        place, ids, queries = carry
        fresh = (i == 0) | (place.tile == 0)

        @pl.when(fresh)
        def _():
            slot = lax.rem(queries, jnp.int32(Q_SLOTS))

            @pl.when(queries >= Q_SLOTS)
            def _():
                plgpu.barrier_wait(ring.q_free.at[slot])

            head = place.head * plan.group
            plgpu.copy_gmem_to_smem(
                inputs.q.at[place.index, pl.ds(head, plan.group)],
                ring.q.at[slot, pl.ds(0, plan.group)],
                ring.q_full.at[slot],
            )

        _load_tile(plan, inputs, ring, place, ids, layer, i)
        place = work.advance(plan, lens, starts, place, jnp.int32(1))
        return place, _ids_of(plan, inputs, place), queries + fresh.astype(jnp.int32)

    _, _, queries = lax.fori_loop(0, steps, step, (place, ids, jnp.int32(0)))
    _drain(steps, plan.stages, ring.k_free, ring.v_free)
    _drain(queries, Q_SLOTS, ring.q_free)


def _drain(steps: Any, slots: int, *free: Any) -> None:
    """Wait until the last of so many steps have left their slots: no barrier ends half used."""

    def step(i: Any, _: None) -> None:
        for barrier in free:
            plgpu.barrier_wait(barrier.at[lax.rem(i, jnp.int32(slots))])

    lax.fori_loop(jnp.maximum(steps, slots), steps + slots, step, None)


def _ids_of(plan: Plan, inputs: merge.Inputs, place: Place) -> list[Any]:
    return page_ids(plan, inputs.page_table, place.index, place.row.tile0 + place.tile)


def _load_tile(
    plan: Plan, inputs: merge.Inputs, ring: Ring, place: Place, ids: list[Any], layer: Any, i: Any
) -> None:
    row, slot = place.row, lax.rem(i, jnp.int32(plan.stages))
    tile = row.tile0 + place.tile
    live = live_pieces(plan, tile, row.first, row.end)
    known = [(0 <= page) & (page < plan.pages) for page in ids]
    wrong = row.broken
    for a, b in zip(live, known, strict=True):
        wrong |= a & ~b
    for pool, buffer, full, free in (
        (inputs.k, ring.k, ring.k_full, ring.k_free),
        (inputs.v, ring.v, ring.v_full, ring.v_free),
    ):

        @pl.when(i >= plan.stages)
        def _(free: Any = free):
            plgpu.barrier_wait(free.at[slot])

        if pool is inputs.k:  # read with K, so free when K is
            ring.bad[slot] = wrong.astype(jnp.int32)
        copy_pages(plan, pool, buffer.at[slot], full.at[slot], ids, live, tile, layer, place.head)


def _consume(
    plan: Plan,
    inputs: merge.Inputs,
    outputs: merge.Outputs,
    ring: Ring,
    place: Place,
    begin: Any,
    stop: Any,
    total: Any,
) -> None:
    """Attend to every row and head that has tiles in this block, and store or merge its result."""

    def segment(carry: Any) -> Any:
        place, at, queries = carry
        tiles = jnp.minimum(place.row.tiles - place.tile, stop - at)
        slot = lax.rem(queries, jnp.int32(Q_SLOTS))
        plgpu.barrier_wait(ring.q_full.at[slot])
        # Not kept in registers for all tiles: ptxas 13.0 gives these to the weights of the first
        # tile where both are as many (D 64), and the second is multiplied by weights for queries.
        ring.left[...] = plgpu.load(ring.q.at[slot], layout=plgpu.Layout.WGMMA, optimized=False)
        plgpu.barrier_arrive(ring.q_free.at[slot])
        plgpu.commit_smem()
        sums = _attend(plan, ring, place, at - begin, tiles)
        merge.finish(plan, inputs, outputs, ring.staged, sums, place, at, begin, total)
        place = work.advance(plan, inputs.seq_lens, inputs.starts, place, tiles)
        return place, at + tiles, queries + 1

    lax.while_loop(lambda carry: carry[1] < stop, segment, (place, begin, jnp.int32(0)))


def _attend(plan: Plan, ring: Ring, place: Place, first_step: Any, tiles: Any) -> Any:
    """`acc, top, total, bad` over some tiles of one row and head."""

    def tile(i: Any, carry: Any) -> Any:
        acc, top, total, bad = carry
        slot = lax.rem(first_step + i, jnp.int32(plan.stages))
        begin = (place.row.tile0 + place.tile + i) * plan.tile
        plgpu.barrier_wait(ring.k_full.at[slot])
        bad = bad | ring.bad[slot]

        logits = _multiply(ring.left, ring.k.at[slot].transpose((1, 0)))
        plgpu.barrier_arrive(ring.k_free.at[slot])
        logits, factor = capped(plan, logits)
        weights, share, top = softmax(_visible(plan, place.row, begin, logits), factor, top)
        total = total * share + weights.sum(axis=1)
        weights = weights.astype(ring.v.dtype)
        if plan.interpreted:  # it knows products of shared memory only
            ring.weights[...] = weights
            plgpu.commit_smem()
            weights = ring.weights
        plgpu.barrier_wait(ring.v_full.at[slot])

        @pl.when((begin < place.row.first) | (begin + plan.tile > place.row.end))
        def _():
            zero_hidden(plan, ring.v.at[slot], begin, place.row.first, place.row.end)

        mix = _multiply(weights, ring.v.at[slot])
        plgpu.barrier_arrive(ring.v_free.at[slot])
        acc = acc * lax.broadcast_in_dim(share, acc.shape, [0]) + mix
        return acc, top, total, bad

    return lax.fori_loop(0, tiles, tile, (*no_sums(plan), jnp.int32(0)))


def _multiply(left: Any, right: Any) -> Any:
    """`left [64, n]` times `right [n, m]` from shared memory, in float32."""

    def run(out: Any) -> Any:
        plgpu.wgmma(out, left, right)
        return out[...]

    return pl.run_scoped(run, plgpu.ACC((QUERIES, right.shape[1]), jnp.float32))


def _visible(plan: Plan, row: Row, begin: Any, logits: Any) -> Any:
    shape = (QUERIES, plan.tile)
    token = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA) + begin
    return jnp.where((token >= row.first) & (token < row.end), logits, -jnp.inf)
