"""The kernel for TPUs (Mosaic), whatever T is: a step of the grid attends with one item."""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from ..record import HUGE, LN2, LOG2E
from .config import LANES
from .pages import Refs, append, clear, in_block, start, wait, wait_written
from .plan import Plan
from .softmax import lanes, multiply, strips
from .work import Flag, Scalar, Span, span_of

__all__ = ["attention_kernel"]


def attention_kernel(refs: Refs, plan: Plan) -> None:
    """Attend with the item of this step; its first pages are already on their way.

    ```
    step          item 3                     item 4 (no pages)  item 5
    in flight     [block 0][block 1][b. 2]                      [block 0]...
    multiplied             [block 0][b. 1][block 2]                      [block 0]
                                          ^ starts block 0 of item 5, the next that has pages
    ```
    """
    step = pl.program_id(1)
    at = pl.program_id(0) * plan.steps + step
    item, following = refs.items[at], refs.following[at]
    span = _span(refs, plan, item)
    first = step == 0
    # A step that repeats the item of the one before pads the shorter core; its output stands.
    repeated = ~first & (item == refs.items[jnp.maximum(at - 1, 0)])

    @pl.when(first)
    def _() -> None:
        refs.state[0] = 0

    @pl.when(~repeated)
    def _() -> None:
        strips(plan.rows, LANES, lambda rows: _clean(refs, plan, rows))

        def block(index: Scalar, broken: Scalar) -> Scalar:
            return broken | _block(refs, plan, span, item, following, index)

        # Nobody has sent the very first block of a core: block -1 is there to do it.
        begin = jnp.where(first, -1, 0)
        broken = lax.fori_loop(begin, span.blocks, block, span.too_long)
        strips(plan.rows, LANES, lambda rows: _finish(refs, plan, broken, rows))


def _row(plan: Plan, item: Scalar) -> Scalar:
    return item if plan.tiles == 1 else lax.div(item, plan.tiles)


def _span(refs: Refs, plan: Plan, item: Scalar) -> Span:
    row = _row(plan, item)
    given = refs.starts[row] if plan.starts else jnp.int32(0)
    own = refs.query_lens[row] if plan.query_lens else jnp.int32(plan.tokens)
    return span_of(plan, refs.seq_lens[row], given, own, item - row * plan.tiles)


def _clean(refs: Refs, plan: Plan, rows: pl.Slice) -> None:
    """No sums yet, and q as the products take it."""
    if not plan.aligned:
        refs.q32[rows] = refs.q[rows].astype(jnp.float32)
    for sums, begin in ((refs.acc, 0.0), (refs.top, -jnp.inf), (refs.total, 0.0)):
        sums[rows] = jnp.full((rows.size, sums.shape[1]), begin, jnp.float32)


def _block(
    refs: Refs, plan: Plan, span: Span, item: Scalar, following: Scalar, block: Scalar
) -> Scalar:
    """Send the next block on its way, and multiply this one; not 0 if a page id was wrong."""
    free = refs.state[0]
    slot = 1 - free
    refs.state[0] = slot
    last = block + 1 == span.blocks

    @pl.when(~last)
    def _() -> None:
        start(refs, plan, span, refs.table, block + 1, free)

    @pl.when(last & (following >= 0))
    def _() -> None:
        start(refs, plan, _span(refs, plan, following), refs.next_table, 0, free)

    arrived = block >= 0
    pl.when(arrived)(lambda: _attend(refs, plan, span, item, block, slot, last))
    return jnp.where(arrived, refs.state[1 + slot], 0)


def _attend(
    refs: Refs, plan: Plan, span: Span, item: Scalar, block: Scalar, slot: Scalar, last: Flag
) -> None:
    """Wait for the pages of a block, and add them to the sums of the item."""
    count = in_block(plan, span, block)
    wait(refs, plan, slot, count)
    token = (span.first_page + block * plan.config.fetch) * plan.page_size
    tiles = lax.div(count + (plan.config.tile - 1), plan.config.tile)
    written = jnp.bool_(False)
    if plan.append:
        written = append(refs, plan, span, _row(plan, item), slot, count - 1, last)
    hidden = (span.first > token) | (token + tiles * plan.tile_tokens > span.end)
    pl.when(hidden)(lambda: clear(refs, plan, span, slot, token, tiles * plan.config.tile))

    def tile(index: Scalar, _: None) -> None:
        at = token + index * plan.tile_tokens
        multiply(refs, plan, span, slot, index * plan.config.tile, at)

    lax.fori_loop(0, tiles, tile, None)
    if plan.append:
        pl.when(written)(lambda: wait_written(refs, plan))


def _finish(refs: Refs, plan: Plan, broken: Scalar, rows: pl.Slice) -> None:
    """The results of some rows from their sums and their sinks."""
    top, total = refs.top[rows], refs.total[rows]
    total = jnp.broadcast_to(jnp.sum(total, axis=1, keepdims=True), total.shape)
    share, mass = jnp.ones_like(total), total
    if plan.sinks:
        extra = jnp.minimum(refs.sink[rows] * LOG2E, HUGE)
        base = jnp.maximum(top, extra)
        base = jnp.where(base == -jnp.inf, 0.0, base)
        share = jnp.exp2(top - base)
        mass = total * share + jnp.exp2(extra - base)
    share = share / jnp.where(mass == 0, 1.0, mass)
    lse = jnp.where(total == 0, -jnp.inf, top * LN2 + jnp.log(jnp.where(total == 0, 1.0, total)))
    nan = jnp.where(broken != 0, jnp.nan, 0.0)
    out = refs.acc[rows] * lanes(share, plan.dim) + nan
    refs.out[rows] = out.astype(refs.out.dtype)
    # From one number a row to one number a lane: in HBM a row each would take up 128.
    row, lane = (lax.broadcasted_iota(jnp.int32, lse.shape, axis) for axis in (0, 1))
    turned = jnp.sum(jnp.where(row == lane, lse + nan, 0.0), axis=0, keepdims=True)
    refs.lse[:, rows] = turned[:, : rows.size]
