"""The raw kernel for T > 1: two warpgroups multiply 64 queries each, a third one loads pages.

```
loader       ids of the next tile | pages of K | pages of V | ...      up to `stages` tiles ahead
            v full                                         ^ free
consumer 0   K q -> logits | softmax        | weights V      | K q -> ...
consumer 1   ... weights V | K q -> logits  | softmax        | weights V ...
```
Both consumers have queries of one KV head, so a tile of keys and values is loaded once for 128
queries: two heads of the same 64 tokens, or, where the heads of a KV head are an odd number, 128
tokens of one. While one of them has the matrix unit, the other takes exponentials. A block of the
grid has one such unit (work.py), and no part of a result is ever merged.

T is filled up to whole units in front, with queries that nobody asked for. A unit without a query
of its row's own, or that sees no key, reads none and writes its zeros.
"""

from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from . import work
from .config import QUERIES
from .plan import Plan
from .tiles import (
    capped,
    copy_pages,
    finished,
    live_pieces,
    no_sums,
    page_ids,
    softmax,
    zero_hidden,
)
from .work import Unit

__all__ = ["Inputs", "Ring", "scratch", "tail_body"]

# Of a thread, in a block of three warpgroups that may have 504 together.
CONSUMER_REGISTERS, LOADER_REGISTERS = 232, 40


class Inputs(NamedTuple):
    """What a launch reads."""

    q: Any  # [B, T, Hq, D], T whole units
    k: Any  # [L * N * Hk * S, D]
    v: Any
    layer: Any  # int32 [1]
    page_table: Any  # int32 [B, P]
    seq_lens: Any  # int32 [B]
    starts: Any  # int32 [B]
    sink: Any  # float32 [Hq]
    query_lens: Any  # int32 [B]


class Ring(NamedTuple):
    """What the warpgroups of a block share."""

    q: Any  # [2, 64, D], of each consumer, and then its result
    k: Any  # [stages, tile, D]
    v: Any
    lse: Any  # float32 [2, 64]
    weights: Any  # [2, 64, tile], None where it is not interpreted
    q_full: Any
    k_full: Any
    v_full: Any
    k_free: Any
    v_free: Any
    clean: Any  # consumer 0 has zeroed what nobody may see of this tile of V
    turn: Any  # one consumer leaves the matrix unit to the other


def scratch(plan: Plan, dtype: Any) -> Ring:
    """The types of a `Ring`."""
    swizzle = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    tiles = plgpu.SMEM((plan.stages, plan.tile, plan.dim), dtype, transforms=swizzle)
    return Ring(
        q=plgpu.SMEM((2, QUERIES, plan.dim), dtype, transforms=swizzle),
        k=tiles,
        v=tiles,
        lse=plgpu.SMEM((2, QUERIES), jnp.float32),
        weights=plgpu.SMEM((2, QUERIES, plan.tile), dtype, transforms=swizzle)
        if plan.interpreted
        else None,
        q_full=plgpu.Barrier(num_barriers=2),
        k_full=plgpu.Barrier(num_arrivals=plan.pieces, num_barriers=plan.stages),
        v_full=plgpu.Barrier(num_arrivals=plan.pieces, num_barriers=plan.stages),
        k_free=plgpu.Barrier(num_arrivals=2, num_barriers=plan.stages),
        v_free=plgpu.Barrier(num_arrivals=2, num_barriers=plan.stages),
        clean=plgpu.Barrier(),
        turn=plgpu.Barrier(num_arrivals=2),
    )


def tail_body(plan: Plan, inputs: Inputs, out: Any, lse: Any, ring: Ring) -> None:
    """What one warpgroup of one block does; out as q, lse float32 `[B, Hq, T]`."""
    thread = lax.axis_index("thread")

    def unit() -> Unit:
        index = lax.axis_index("unit")
        return work.unit_of(plan, inputs.seq_lens, inputs.starts, inputs.query_lens, index)

    @pl.when(thread < 2)
    def _():
        _give_registers(plan, CONSUMER_REGISTERS, "increase")
        _consume(plan, inputs, out, lse, ring, unit(), thread)

    @pl.when(thread == 2)
    def _():
        _give_registers(plan, LOADER_REGISTERS, "decrease")
        _load(plan, inputs, ring, unit())


def _give_registers(plan: Plan, count: int, action: Any) -> None:
    if not plan.interpreted:
        plgpu.set_max_registers(count, action=action)


def _load(plan: Plan, inputs: Inputs, ring: Ring, unit: Unit) -> None:
    """Fill the ring with the tiles of this unit."""
    layer, stages = inputs.layer[0], jnp.int32(plan.stages)

    def step(i: Any, ids: list[Any]) -> list[Any]:
        tile, slot = unit.block0 + i, lax.rem(i, stages)
        # On their way while this tile waits for its place.
        following = page_ids(plan, inputs.page_table, unit.row, tile + 1)
        live = live_pieces(plan, tile, unit.first, unit.end)
        for pool, buffer, full, free in (
            (inputs.k, ring.k, ring.k_full, ring.k_free),
            (inputs.v, ring.v, ring.v_full, ring.v_free),
        ):

            @pl.when(i >= plan.stages)
            def _(free: Any = free):
                plgpu.barrier_wait(free.at[slot])

            copy_pages(
                plan, pool, buffer.at[slot], full.at[slot], ids, live, tile, layer, unit.kv_head
            )
        return following

    ids = page_ids(plan, inputs.page_table, unit.row, unit.block0)
    lax.fori_loop(0, unit.blocks, step, ids)
    # No barrier ends half used.
    for i in range(plan.stages):

        @pl.when(i < unit.blocks)
        def _(i: int = i):
            slot = lax.rem(unit.blocks - 1 - i, stages)
            plgpu.barrier_wait(ring.k_free.at[slot])
            plgpu.barrier_wait(ring.v_free.at[slot])


def _consume(
    plan: Plan, inputs: Inputs, out: Any, lse: Any, ring: Ring, unit: Unit, mine: Any
) -> None:
    """Attend with the queries of consumer `mine`, and store their result."""
    t0 = unit.t0 if plan.paired else unit.t0 + mine * QUERIES
    head = unit.head + mine if plan.paired else unit.head
    where = (unit.row, pl.ds(t0, QUERIES), head)
    plgpu.copy_gmem_to_smem(inputs.q.at[where], ring.q.at[mine], ring.q_full.at[mine])
    broken = work.any_outside(plan, inputs.page_table, unit.row, unit.length)
    broken = broken | (unit.length > plan.capacity).astype(jnp.int32)
    plgpu.barrier_wait(ring.q_full.at[mine])

    attend = partial(_tile, plan, ring, unit, mine, unit.length - plan.tokens + t0)
    sums = no_sums(plan)
    pl.when(unit.blocks > 0)(lambda: plgpu.barrier_wait(ring.k_full.at[0]))
    pl.when(mine == 1)(lambda: _pass(ring))  # the matrix unit is consumer 0's first
    hidden, whole = _phases(plan, unit)
    if plan.window or plan.starts:
        sums = lax.fori_loop(0, hidden, partial(attend, True), sums)
    sums = lax.fori_loop(hidden, whole, partial(attend, False), sums)
    sums = lax.fori_loop(whole, unit.blocks, partial(attend, True), sums)
    pl.when(mine == 0)(lambda: _pass(ring))

    acc, top, total = sums
    total = total * jnp.where(broken != 0, jnp.float32(jnp.nan), jnp.float32(1))
    share, lse_tile = finished(top, total, inputs.sink[head] if plan.sinks else None)
    out_tile = acc * lax.broadcast_in_dim(share, acc.shape, [0])
    if plan.query_lens:
        out_tile, lse_tile = _without_padding(out_tile, lse_tile, unit.padding - t0)
    ring.q[mine] = out_tile.astype(ring.q.dtype)
    ring.lse[mine] = lse_tile
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(ring.q.at[mine], out.at[where])
    plgpu.copy_smem_to_gmem(ring.lse.at[mine], lse.at[unit.row, head, where[1]])
    plgpu.wait_smem_to_gmem(0)


def _phases(plan: Plan, unit: Unit) -> tuple[Any, Any]:
    """Which tiles every query sees whole: from the first number on, below the second.

    ```
    keys     |first ....|..........|..........|..... lowest .... end
    tiles     masked     whole      whole      masked
    ```
    """
    hidden = jnp.int32(0)
    if plan.window or plan.starts:
        clear = unit.start
        if plan.window:  # of the last query
            clear = jnp.maximum(clear, unit.end - plan.window)
        hidden = lax.div(clear + (plan.tile - 1), jnp.int32(plan.tile)) - unit.block0
        hidden = jnp.clip(hidden, 0, unit.blocks)
    whole = lax.div(jnp.maximum(unit.lowest + 1, 0), jnp.int32(plan.tile)) - unit.block0
    return hidden, jnp.clip(whole, hidden, unit.blocks)


def _pass(ring: Ring) -> None:
    """Leave the matrix unit to the other consumer, and wait until it leaves it in turn."""
    plgpu.barrier_arrive(ring.turn)
    plgpu.barrier_wait(ring.turn)


def _tile(
    plan: Plan, ring: Ring, unit: Unit, mine: Any, position: Any, masked: bool, i: Any, sums: Any
) -> Any:
    """The sums with one tile of keys more; `position` is that of the first query."""
    acc, top, total = sums
    slot = lax.rem(i, jnp.int32(plan.stages))
    begin = (unit.block0 + i) * plan.tile

    def multiply_keys(products: Any) -> Any:
        plgpu.wgmma(products, ring.q.at[mine], ring.k.at[slot].transpose((1, 0)))
        _pass(ring)
        return products[...]

    logits = pl.run_scoped(multiply_keys, plgpu.ACC((QUERIES, plan.tile), jnp.float32))
    plgpu.barrier_arrive(ring.k_free.at[slot])
    logits, factor = capped(plan, logits)
    if masked:
        logits = _visible(plan, unit, position, begin, logits)
    weights, decay, top = softmax(logits, factor, top, empty=masked)
    acc = acc * lax.broadcast_in_dim(decay, acc.shape, [0])
    total = total * decay + weights.sum(axis=1)
    weights = weights.astype(ring.v.dtype)
    if not plan.interpreted:  # all of it is done when the turn is passed on
        acc, total, top, weights = lax.optimization_barrier((acc, total, top, weights))
    plgpu.barrier_arrive(ring.turn)
    plgpu.barrier_wait(ring.v_full.at[slot])
    plgpu.barrier_wait(ring.turn)
    if masked:
        _clean(plan, ring, unit, mine, begin, slot)
    acc = _add_values(plan, ring, unit, mine, i, acc, weights)
    plgpu.barrier_arrive(ring.v_free.at[slot])
    return acc, top, total


def _visible(plan: Plan, unit: Unit, position: Any, begin: Any, logits: Any) -> Any:
    def count(axis: int) -> Any:
        return plgpu.broadcasted_iota(jnp.int32, logits.shape, axis, layout=plgpu.Layout.WGMMA)

    query, token = count(0) + position, count(1) + begin
    live = token <= query
    if plan.starts:
        live &= token >= unit.start
    if plan.window:
        live &= token > query - plan.window
    return jnp.where(live, logits, -jnp.inf)


def _clean(plan: Plan, ring: Ring, unit: Unit, mine: Any, begin: Any, slot: Any) -> None:
    """Zero what nobody may see. Consumer 0 does it for both: it is half a tile ahead."""

    @pl.when((begin < unit.first) | (begin + plan.tile > unit.end))
    def _():
        @pl.when(mine == 0)
        def _():
            zero_hidden(plan, ring.v.at[slot], begin, unit.first, unit.end)
            plgpu.barrier_arrive(ring.clean)

        @pl.when(mine == 1)
        def _():
            plgpu.barrier_wait(ring.clean)


def _add_values(
    plan: Plan, ring: Ring, unit: Unit, mine: Any, i: Any, acc: Any, weights: Any
) -> Any:
    """The sums with the weighted values of tile i; its keys' successors have come by then."""

    def multiply(sums: Any, weights: Any) -> None:
        plgpu.wgmma(sums, weights, ring.v.at[lax.rem(i, jnp.int32(plan.stages))])
        following = i + 1

        @pl.when(following < unit.blocks)
        def _():
            plgpu.barrier_wait(ring.k_full.at[lax.rem(following, jnp.int32(plan.stages))])

    if not plan.interpreted:
        return pl.run_state(lambda sums: multiply(sums, weights))(plgpu.ACC.init(acc))

    def of_shared_memory(sums: Any) -> Any:  # the interpreter knows no other products
        ring.weights[mine] = weights
        plgpu.commit_smem()
        multiply(sums, ring.weights.at[mine])
        return sums[...]

    return acc + pl.run_scoped(of_shared_memory, plgpu.ACC(acc.shape, jnp.float32))


def _without_padding(out: Any, lse: Any, padding: Any) -> tuple[Any, Any]:
    """The result with zeros, and lse -inf, for so many queries in front."""

    def query(like: Any, layout: Any) -> Any:
        return plgpu.broadcasted_iota(jnp.int32, like.shape, 0, layout=layout)

    out = jnp.where(query(out, plgpu.Layout.WGMMA) >= padding, out, 0.0)
    return out, jnp.where(query(lse, plgpu.Layout.WGMMA.reduce(1)) >= padding, lse, -jnp.inf)
