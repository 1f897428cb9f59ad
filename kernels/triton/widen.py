"""Pages of 8 bits as pages of 16, for a kernel that multiplies what it reads as it is.

Many queries of a row read its keys and values many times, so it pays to take the numbers apart
once. Each row gets pages of its own, in the order of its table; those that none of its queries can
see are left as they are found.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from ..record import AttentionCall
from . import launch
from .config import power

__all__ = ["problem", "widen_kernel", "widened"]

MOST_BYTES = 2**30  # of widened pages
BLOCK = 8192  # numbers of K, and as many of V, that a program moves; a power of two
WARPS = 8


@triton.jit
def widen_kernel(
    k_pages,
    v_pages,
    k_scales,
    v_scales,
    layer,
    page_table,
    seq_lens,
    lowest,
    k_out,
    v_out,
    COLUMNS: tl.constexpr,
    PAGES: tl.constexpr,
    PAGE: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Some vectors of one page: the one in a column of a row, if that holds `lowest .. length - 1`.

    Pointers: pages `[L, PAGES, KV_HEADS, PAGE, D]`, scales the same without D; layer `[]`;
    page_table `[rows, COLUMNS]`; seq_lens, lowest `[rows]`; outputs
    `[rows * COLUMNS, KV_HEADS, PAGE, D]`.
    """
    VECTORS: tl.constexpr = KV_HEADS * PAGE
    PARTS: tl.constexpr = (VECTORS + BLOCK_V - 1) // BLOCK_V
    place = tl.program_id(0) // PARTS
    row, column = place // COLUMNS, place % COLUMNS
    seen = (column * PAGE < tl.load(seq_lens + row)) & ((column + 1) * PAGE > tl.load(lowest + row))
    page = tl.load(page_table + place)
    if seen & (page >= 0) & (page < PAGES):
        vector = tl.program_id(0) % PARTS * BLOCK_V + tl.arange(0, BLOCK_V)
        dim = tl.arange(0, BLOCK_D)
        real = vector < VECTORS
        mask = real[:, None] & (dim < D)[None, :]
        come = (tl.load(layer).to(tl.int64) * PAGES + page) * VECTORS + vector
        go = place.to(tl.int64) * VECTORS + vector
        k = tl.load(k_pages + come[:, None] * D + dim[None, :], mask=mask, other=0.0)
        v = tl.load(v_pages + come[:, None] * D + dim[None, :], mask=mask, other=0.0)
        k = k.to(tl.float32) * tl.load(k_scales + come, mask=real, other=0.0)[:, None]
        v = v.to(tl.float32) * tl.load(v_scales + come, mask=real, other=0.0)[:, None]
        at = go[:, None] * D + dim[None, :]
        tl.store(k_out + at, k.to(k_out.dtype.element_ty), mask=mask)
        tl.store(v_out + at, v.to(v_out.dtype.element_ty), mask=mask)


def problem(call: AttentionCall) -> str | None:
    """Why `widened` is not for a call over pages of 8 bits, or None."""
    if call.q.dtype != jnp.bfloat16:
        return f"pages of 8 bits are widened to bfloat16, not to {call.q.dtype}"
    size = 2 * call.rows * call.capacity * call.kv_heads * call.dim * call.q.dtype.itemsize
    if size > MOST_BYTES:
        return f"pages of 8 bits are widened to {MOST_BYTES >> 20} MiB at most; got {size >> 20}"
    return None


def widened(call: AttentionCall) -> AttentionCall:
    """The same call over pages in the dtype of q, each number rounded to it once."""
    dtype, (_, pages, heads, size, dim) = call.q.dtype, call.k_pages.shape
    places = call.rows * call.columns
    block_d = power(dim)
    block = max(BLOCK // block_d, 1)
    lowest = jnp.zeros_like(call.seq_lens) if call.starts is None else call.starts
    if call.window is not None:
        first = jnp.clip(call.seq_lens, 0, call.capacity) - call.tokens
        lowest = jnp.maximum(lowest, first - call.window + 1)
    out = jax.ShapeDtypeStruct((places, heads, size, dim), dtype)
    k, v = launch.looped(
        widen_kernel,
        (*call.pools, call.layer, call.page_table, call.seq_lens, lowest),
        [out, out],
        grid=places * -(-heads * size // block),
        warps=WARPS,
        stages=1,
        name="paged_widen",
        constants=dict(
            COLUMNS=call.columns,
            PAGES=pages,
            PAGE=size,
            KV_HEADS=heads,
            D=dim,
            BLOCK_D=block_d,
            BLOCK_V=block,
        ),
    )
    known = (call.page_table >= 0) & (call.page_table < pages)
    own = jnp.arange(places, dtype=jnp.int32).reshape(call.page_table.shape)
    return replace(
        call,
        k_pages=k[None],
        v_pages=v[None],
        k_scales=None,
        v_scales=None,
        layer=jnp.int32(0),
        page_table=jnp.where(known, own, -1),  # a page that there is not stays one
    )
