"""One step of the online softmax: some queries over a tile of pages."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float, Num

from ..record import LOG2E
from .config import LANES, SUBLANES
from .pages import Refs
from .plan import Plan
from .work import Scalar, Span

__all__ = ["lanes", "multiply", "strips"]


def multiply(
    refs: Refs, plan: Plan, span: Span, slot: Scalar, place: Scalar, token: Scalar
) -> None:
    """Add the pages from `place` on, whose first token is `token`, to the sums of the item.

    Most tiles of a long prefix are seen whole by all queries: those need no mask.
    """

    def some(masked: bool) -> None:
        def heads(index: Scalar, _: None = None) -> None:
            _heads(refs, plan, span, slot, place, token, index * plan.config.heads, masked)

        if plan.kv_heads == plan.config.heads:
            heads(0)
        else:
            lax.fori_loop(0, plan.kv_heads // plan.config.heads, heads, None)

    if plan.config.queries == 1:  # one mask for all rows costs less than a branch
        some(True)
        return
    last = token + plan.tile_tokens - 1
    whole = (span.first <= token) & (last <= span.lowest)
    if plan.window is not None:
        whole &= token > span.end - 1 - plan.window
    pl.when(whole)(lambda: some(False))
    pl.when(~whole)(lambda: some(True))


def _heads(
    refs: Refs,
    plan: Plan,
    span: Span,
    slot: Scalar,
    place: Scalar,
    token: Scalar,
    begin: Scalar,
    masked: bool,
) -> None:
    """`multiply` for the KV heads from `begin` on whose logits are there together."""
    pages, tokens, count = pl.ds(place, plan.config.tile), plan.tile_tokens, plan.head_rows
    exact = plan.compute == jnp.float32
    precision = lax.Precision.HIGHEST if exact else None

    def load(buffer: Any, head: Scalar) -> Num[Array, "C D"]:
        return buffer[slot, pages, begin + head].reshape(tokens, plan.dim).astype(plan.compute)

    def scales(buffer: Any, head: Scalar) -> Float[Array, "1 C"]:
        rows = range(plan.config.tile)
        rows = [buffer[slot, place + page, pl.ds(begin + head, 1)] for page in rows]
        return jnp.concatenate(rows, axis=1)

    def multiply_keys(head: Scalar, _: None = None) -> None:
        q = (refs.q if plan.aligned else refs.q32)[_rows((begin + head) * count, count)]
        products = lax.dot_general(
            q.astype(plan.compute),
            load(refs.k_buf, head),
            (((1,), (1,)), ((), ())),
            precision=precision,
            preferred_element_type=jnp.float32,
        )
        if plan.scaled:
            products *= scales(refs.k_scale_buf, head)
        refs.logits[_rows(head * count, count)] = products

    def weights(head: Scalar) -> Float[Array, "rows C"]:
        found = refs.logits[_rows(head * count, count)]
        return found * scales(refs.v_scale_buf, head) if plan.scaled else found

    def multiply_values(head: Scalar, _: None = None) -> None:
        refs.acc[_rows((begin + head) * count, count)] += jnp.dot(
            weights(head).astype(plan.compute),
            load(refs.v_buf, head),
            precision=precision,
            preferred_element_type=jnp.float32,
        )

    def each_head(multiply: Callable[..., None]) -> None:
        # The partial products of float32, or unpacked bytes, of several heads at once would not fit
        # the registers.
        if exact or plan.scaled:
            lax.fori_loop(0, plan.config.heads, multiply, None)
        else:
            for head in range(plan.config.heads):
                multiply(head)

    each_head(multiply_keys)
    for first in range(0, plan.config.heads * count, plan.config.strip):
        size = min(plan.config.strip, plan.config.heads * count - first)
        seen = _seen(plan, span, token, first, size) if masked else None
        _weigh(refs, plan, seen, _rows(first, size), _rows(begin * count + first, size))
    each_head(multiply_values)


def _rows(first: Scalar, size: int) -> Any:
    """Rows that begin at a register's edge, unless their number is known."""
    return pl.ds(first if isinstance(first, int) else pl.multiple_of(first, SUBLANES), size)


def _seen(
    plan: Plan, span: Span, token: Scalar, first: int, size: int
) -> Bool[Array, "rows tokens"]:
    """Which tokens of a tile each row of a strip sees."""
    at = token + lax.broadcasted_iota(jnp.int32, (1, plan.tile_tokens), 1)
    seen = (at >= span.first) & (at < span.end)
    if plan.config.queries == 1:
        return seen
    row = first + lax.broadcasted_iota(jnp.int32, (size, 1), 0)
    position = span.lowest + (row & (plan.config.queries - 1))
    seen &= at <= position
    if plan.window is not None:
        seen &= at > position - plan.window
    return seen


def _weigh(
    refs: Refs, plan: Plan, seen: Bool[Array, "rows tokens"] | None, rows: Any, sums: Any
) -> None:
    """Turn a strip of logits into weights, and its sums into sums of the new scale."""
    logits = _scaled(refs.logits[rows], plan)
    if seen is not None:
        logits = jnp.where(seen, logits, -jnp.inf)
    old = refs.top[sums]
    top = jnp.maximum(old, jnp.max(logits, axis=1, keepdims=True))
    base = jnp.where(top == -jnp.inf, 0.0, top)
    weights = jnp.exp2(logits - lanes(base, plan.tile_tokens))
    decay = jnp.exp2(old - base)
    refs.top[sums] = top
    refs.total[sums] = refs.total[sums] * decay + _folded(weights)
    refs.logits[rows] = weights
    refs.acc[sums] = refs.acc[sums] * lanes(decay, plan.dim)


def _scaled(products: Float[Array, "rows C"], plan: Plan) -> Float[Array, "rows C"]:
    """Logits in base 2 from q.k."""
    if plan.soft_cap is None:
        return products * (plan.scale * LOG2E)
    return jnp.tanh(products * (plan.scale / plan.soft_cap)) * (plan.soft_cap * LOG2E)


def _folded(weights: Float[Array, "rows C"]) -> Float[Array, "rows 128"]:
    """Numbers with the sum of each row: adding up the lanes can wait for the last tile."""
    tokens = weights.shape[1]
    if tokens % LANES:
        total = jnp.sum(weights, axis=1, keepdims=True)
        lane = lax.broadcasted_iota(jnp.int32, (weights.shape[0], LANES), 1)
        return jnp.where(lane == 0, total, 0.0)
    return sum(weights[:, at : at + LANES] for at in range(0, tokens, LANES))  # type: ignore


def lanes(x: Float[Array, "rows 128"], width: int) -> Float[Array, "rows width"]:
    """An array whose lanes are all equal, made wider or narrower."""
    if width <= LANES:
        return x[:, :width]
    return jnp.concatenate([x] * pl.cdiv(width, LANES), axis=1)[:, :width]


def strips(rows: int, size: int, do: Callable[[Any], None]) -> None:
    """`do(slice)` for at most `size` rows at a time: all at once would not fit the registers."""
    whole = rows // size
    if whole == 1:
        do(pl.ds(0, size))
    elif whole:
        lax.fori_loop(
            0, whole, lambda at, _: do(pl.ds(pl.multiple_of(at * size, size), size)), None
        )
    if rows % size:
        do(pl.ds(whole * size, rows % size))
