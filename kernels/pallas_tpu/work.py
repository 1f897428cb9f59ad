"""Which step attends with which queries, and which tokens these see."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int32

from ..record import AttentionCall
from .plan import Plan

__all__ = ["Flag", "Scalar", "Span", "deal", "span_of"]

Scalar = Int32[Array, ""] | int
Numbers = Int32[Array, "..."] | int
Flag = Bool[Array, ""]


class Span(NamedTuple):
    """Which tokens the queries of an item see, and which pages hold them; int32, of any shape.

    ```
    position, rising   lowest ........ a query, and the next ones
    seen by some       first [=====================) end
    ```
    """

    first: Numbers
    end: Numbers
    lowest: Numbers  # position of the first of its queries, padding included; may be negative
    first_page: Numbers
    count: Numbers  # pages
    blocks: Numbers
    too_long: Numbers  # 1 if the row is longer than its table


def span_of(plan: Plan, length: Numbers, start: Numbers, own: Numbers, tile: Numbers) -> Span:
    """The tokens that are visible to tile `tile` of a row, for scalars and for arrays.

    `own` of its T tokens are the row's own: a tile with none of them sees nothing.
    """
    size, queries = plan.page_size, plan.config.queries
    too_long = length > plan.columns * size
    length = jnp.where(too_long, 0, jnp.maximum(length, 0))
    end = jnp.maximum(length - (plan.tiles - 1 - tile) * queries, 0)
    lowest = end - queries
    real = length - jnp.clip(own, 0, plan.tokens)  # what is in front is padding
    first = jnp.maximum(start, 0)
    if plan.window is not None:
        first = jnp.maximum(first, jnp.maximum(lowest, real) - (plan.window - 1))
    if plan.query_lens:
        end = jnp.where(end > real, end, 0)
    first_page, end_page = _div(first, size), _div(end + (size - 1), size)
    if plan.append:  # the page of the newest token is needed even if nothing in it is visible
        first_page = jnp.minimum(first_page, jnp.maximum(end_page - 1, 0))
    count = jnp.where((first < end) | plan.append, end_page - first_page, 0)
    blocks = _div(count + (plan.config.fetch - 1), plan.config.fetch)
    return Span(first, end, lowest, first_page, count, blocks, too_long.astype(jnp.int32))


def _div(number: Numbers, by: int) -> Numbers:
    """Of numbers that are not negative: `//` would cost the core a few instructions more."""
    return lax.div(number, jnp.int32(by))


def deal(call: AttentionCall, plan: Plan) -> tuple[Int32[Array, "G"], Int32[Array, "G"]]:
    """The item of every step of every core, and the next one of that core that has pages, or -1.

    On two cores the longest items are dealt out like cards, back and forth, so that the sums of
    their lengths differ by less than the longest. A core that is one short repeats its last.

    ```
    lengths 90 70 50 40 30      core 0: 90 40 30      core 1: 70 50 (50 again: not computed)
    ```
    """
    items, cores, steps = call.rows * plan.tiles, plan.config.cores, plan.steps
    tile = jnp.arange(plan.tiles, dtype=jnp.int32)[None]
    starts = jnp.int32(0) if call.starts is None else call.starts[:, None]
    own = jnp.int32(call.tokens) if call.query_lens is None else call.query_lens[:, None]
    span = span_of(plan, call.seq_lens[:, None], starts, own, tile)
    length, live = (x.reshape(-1) for x in (span.end - span.first, span.count > 0))
    dealt = order = jnp.arange(items, dtype=jnp.int32).reshape(1, -1)
    if cores > 1:
        order = jnp.argsort(-length).astype(jnp.int32)
        order = jnp.concatenate([order, jnp.full(steps * cores - items, -1, jnp.int32)])
        order = order.reshape(steps, cores)
        order = jnp.where(jnp.arange(steps)[:, None] % 2 == 1, order[:, ::-1], order).T
        dealt = order.at[:, -1].set(jnp.where(order[:, -1] < 0, order[:, -2], order[:, -1]))
    step = jnp.where(live[dealt] & (order >= 0), jnp.arange(steps, dtype=jnp.int32), steps)
    later = jax.lax.cummin(step, axis=1, reverse=True)
    later = jnp.concatenate([later[:, 1:], jnp.full((cores, 1), steps, jnp.int32)], axis=1)
    found = jnp.take_along_axis(dealt, jnp.minimum(later, steps - 1), axis=1)
    return dealt.reshape(-1), jnp.where(later < steps, found, -1).reshape(-1)
