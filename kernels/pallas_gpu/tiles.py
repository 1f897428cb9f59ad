"""What both kernels do with a tile of keys and values: copy its pages, scale, mask, zero."""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ..record import HUGE, LN2, LOG2E
from .config import QUERIES
from .plan import Plan

__all__ = [
    "capped",
    "copy_pages",
    "finished",
    "live_pieces",
    "no_sums",
    "page_ids",
    "softmax",
    "tokens_of",
    "zero_hidden",
]


def tokens_of(plan: Plan, tile: Any) -> list[Any]:
    """The first token of each piece of a tile of a row."""
    return [tile * plan.tile + piece * plan.piece for piece in range(plan.pieces)]


def page_ids(plan: Plan, page_table: Any, row: Any, tile: Any) -> list[Any]:
    """The page of each piece of a tile of a row; anything where the table has no such entry."""
    row = jnp.minimum(row, plan.rows - 1)
    columns = [lax.div(token, jnp.int32(plan.page_size)) for token in tokens_of(plan, tile)]
    return [page_table[row, jnp.minimum(c, plan.columns - 1)] for c in columns]


def live_pieces(plan: Plan, tile: Any, first: Any, end: Any) -> list[Any]:
    """Which pieces of a tile have a token in `first .. end - 1`."""
    return [(t < end) & (t + plan.piece > first) for t in tokens_of(plan, tile)]


def copy_pages(
    plan: Plan,
    pool: Any,
    buffer: Any,
    full: Any,
    ids: list[Any],
    live: list[Any],
    tile: Any,
    layer: Any,
    kv_head: Any,
) -> None:
    """Send the live pieces of a tile on their way; `full` counts every piece, copied or not."""
    for piece, (page, token) in enumerate(zip(ids, tokens_of(plan, tile), strict=True)):
        at = ((layer * plan.pages + page) * plan.kv_heads + kv_head) * plan.page_size
        at += lax.rem(token, jnp.int32(plan.page_size))
        to = buffer.at[pl.ds(piece * plan.piece, plan.piece)]
        here = live[piece] & (0 <= page) & (page < plan.pages)

        @pl.when(here)
        def _(at: Any = at, to: Any = to):
            plgpu.copy_gmem_to_smem(pool.at[pl.ds(at, plan.piece)], to, full)

        @pl.when(~here)
        def _():
            plgpu.barrier_arrive(full)


def capped(plan: Plan, products: Any) -> tuple[Any, float]:
    """`logits, factor`: what becomes logits in base 2 when it is multiplied by the factor.

    The factor is above zero, so it can join the exponent: what is largest or -inf stays so.
    """
    if plan.soft_cap == 0:
        factor = plan.scale * LOG2E
        return (products, factor) if factor > 0 else (products * factor, 1.0)
    # tanh(x) = 1 - 2 / (1 + e^2x), which is right at both ends
    grown = jnp.exp2(products * (2 * plan.scale / plan.soft_cap * LOG2E))
    return 1.0 - 2.0 / (1.0 + grown), plan.soft_cap * LOG2E


def no_sums(plan: Plan) -> tuple[Any, Any, Any]:
    """`acc, top, total` of no keys, for as many queries as a product has rows."""
    rows = plgpu.Layout.WGMMA.reduce(1)
    return (
        plgpu.layout_cast(jnp.zeros((QUERIES, plan.dim), jnp.float32), plgpu.Layout.WGMMA),
        plgpu.layout_cast(jnp.full((QUERIES,), -jnp.inf, jnp.float32), rows),
        plgpu.layout_cast(jnp.zeros((QUERIES,), jnp.float32), rows),
    )


def finished(top: Any, total: Any, sink: Any) -> tuple[Any, Any]:
    """`share, lse`: what sums of weighted values are multiplied by; `sink` is None without one."""
    lse = (top + jnp.log2(total)) * LN2
    mass, share = total, jnp.ones_like(total)
    if sink is not None:
        extra = jnp.minimum(sink * LOG2E, HUGE)
        base = jnp.maximum(top, extra)
        base = jnp.where(base == -jnp.inf, 0.0, base)
        share = jnp.exp2(top - base)
        mass = total * share + jnp.exp2(extra - base)
    return share / jnp.where(mass == 0.0, 1.0, mass), lse


def softmax(logits: Any, factor: float, top: Any, empty: bool = True) -> tuple[Any, Any, Any]:
    """`weights, what the sums so far are multiplied by, new top`.

    Without `empty` every row of the logits has one that is not -inf, or had one before.
    """
    new_top = jnp.maximum(top, logits.max(axis=1) * factor)
    base = jnp.where(new_top == -jnp.inf, 0.0, new_top) if empty else new_top
    weights = jnp.exp2(logits * factor - lax.broadcast_in_dim(base, logits.shape, [0]))
    return weights, jnp.exp2(top - base), new_top


def zero_hidden(plan: Plan, v: Any, begin: Any, first: Any, end: Any) -> None:
    """Zero the values of a tile that nobody may see: their weight is zero, but they may be NaN."""
    shape = (QUERIES, 64)  # of a tile in shared memory; more would take the registers of sums
    for row in range(0, plan.tile, shape[0]):
        token = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=plgpu.Layout.WGMMA)
        token += begin + row
        seen = (token >= first) & (token < end)
        for column in range(0, plan.dim, shape[1]):
            part = v.at[pl.ds(row, shape[0]), pl.ds(column, shape[1])]
            value = plgpu.load(part, layout=plgpu.Layout.WGMMA)
            part[...] = jnp.where(seen, value, jnp.zeros_like(value))
    plgpu.commit_smem()
