"""Paged attention in plain XLA, for every platform: an online softmax over chunks of pages.

Three parts, as in every backend: the raw kernel, the call, the config.
"""

import math
from dataclasses import dataclass

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32, Num

from .eight_bits import dequantise
from .merge import finished, finite
from .record import AttentionCall

__all__ = ["Config", "attend", "choose_config", "refusal"]


# --- the kernel -------------------------------------------------------------------------------


def _kernel(call: AttentionCall, chunk_pages: int) -> tuple[Array, Array, Array]:
    """The running sums of every query after all chunks of `chunk_pages` pages a row.

    ```
    row 0   [first ====|=========|==== end)      every row starts at its own first needed page;
    row 1          [===|== end)                  the loop ends with the row that needs most
    step         0          1        2
    ```
    Returns float32 `acc [B, Hk, M, D]`, `top` and `total [B, Hk, M]`, M = T * G queries per KV
    head. M stays one axis throughout: with two, XLA transposes K as it gathers, at twice the time.
    """
    batch, tokens, dim = call.rows, call.tokens, call.dim
    page_size, kv_heads = call.page_size, call.kv_heads
    q = call.q.astype(jnp.float32) * call.scale
    q = q.reshape(batch, tokens, kv_heads, call.group, dim).swapaxes(1, 2)
    q = q.reshape(batch, kv_heads, tokens * call.group, dim)
    rows = [_head_rows(pool) for pool in call.pools]
    k_rows, v_rows = rows[::2], rows[1::2]  # numbers, and scales if there are some
    first, end = call.visible()
    first_page = first[:, 0] // page_size
    end_page = (end[:, -1] + (page_size - 1)) // page_size
    steps = jnp.max((end_page - first_page + (chunk_pages - 1)) // chunk_pages)

    def step(i: Int32[Array, ""], carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        column = first_page[:, None] + i * chunk_pages + jnp.arange(chunk_pages, dtype=jnp.int32)
        token = column[..., None] * page_size + jnp.arange(page_size, dtype=jnp.int32)
        seen = call.sees(token.reshape(batch, -1))
        # What no query sees may hold NaN, and 0 * NaN is NaN. For K, -inf over its logits is
        # enough: every logit depends on one token alone.
        held = jnp.any(seen, axis=1, keepdims=True)
        seen = jnp.repeat(seen, call.group, axis=1)
        ids = _page_ids(call, column, column < end_page[:, None])
        k = _gather(k_rows, ids, kv_heads, dim)
        v = jnp.where(held[..., None], _gather(v_rows, ids, kv_heads, dim), 0.0)
        return _update(carry, _logits(call, q, k, seen), v)

    # Made from q, which is never read here: under shard_map the carry must vary as q does.
    acc = jnp.where(False, q, 0.0)
    nothing = (acc, jnp.where(False, q[..., 0], -jnp.inf), acc[..., 0])
    return lax.fori_loop(jnp.int32(0), steps, step, nothing)


def _page_ids(
    call: AttentionCall, column: Int32[Array, "B C"], used: Bool[Array, "B C"]
) -> Int32[Array, "B C"]:
    """Ids of the pages in these table columns, counted through all layers; page 0 if unused."""
    ids = jnp.take_along_axis(call.page_table, column, axis=1, mode="clip")
    return jnp.where(used, jnp.clip(ids, 0, call.pages - 1), 0) + call.layer * call.pages


def _head_rows(
    pages: Num[Array, "L N Hk S D"] | Float[Array, "L N Hk S"],
) -> Num[Array, "LNHk SD"] | Num[Array, "LNHk"]:
    """The pool with one head of one page as one row: a view.

    On CPU a gather of rows of S * D numbers runs as fast as a plain copy, 2.4 times faster than
    one of S rows of D. The view is taken outside the loop: inside, XLA may lay it out by a copy.
    """
    width = math.prod(pages.shape[3:])
    # An axis of one number is left out: XLA of jax 0.10 would lay the pool out anew for it.
    return pages.reshape(-1, width) if width > 1 else pages.reshape(-1)


def _gather(
    pools: list[Array], ids: Int32[Array, "B C"], kv_heads: int, dim: int
) -> Float[Array, "B Hk CS D"]:
    """The tokens of these pages, head-major as the matmuls want them: no transpose follows.

    `pools` are numbers, and perhaps their scales, as `_head_rows` sees them.
    """
    index = ids[:, None, :] * kv_heads + jnp.arange(kv_heads, dtype=jnp.int32)[:, None]
    # `_page_ids` has clipped them: another check would be a select over all that is gathered.
    taken = [rows.at[index.reshape(-1)].get(mode="promise_in_bounds") for rows in pools]
    shape = ids.shape[0], kv_heads, -1
    numbers = taken[0].reshape(*shape, dim)
    return dequantise(numbers, *(scales.reshape(shape) for scales in taken[1:]))


def _logits(
    call: AttentionCall,
    q: Float[Array, "B Hk M D"],
    k: Float[Array, "B Hk C D"],
    seen: Bool[Array, "B M C"],
) -> Float[Array, "B Hk M C"]:
    # By default XLA rounds float32 factors: to bfloat16 on a TPU, to tf32 on a GPU.
    logits = jnp.einsum("bhmd,bhcd->bhmc", q, k, precision="highest")
    if call.soft_cap is not None:
        logits = call.soft_cap * jnp.tanh(logits / call.soft_cap)
    return jnp.where(seen[:, None], logits, -jnp.inf)


def _update(
    carry: tuple[Array, Array, Array],
    logits: Float[Array, "B Hk M C"],
    v: Float[Array, "B Hk C D"],
) -> tuple[Array, Array, Array]:
    """One step of the online softmax (Milakov and Gimelshein, 2018)."""
    acc, top, total = carry
    new_top = jnp.maximum(top, jnp.max(logits, axis=-1))
    base = finite(new_top)
    weights = jnp.exp(logits - base[..., None])
    decay = jnp.exp(top - base)
    acc = acc * decay[..., None]
    acc = acc + jnp.einsum("bhmc,bhcd->bhmd", weights, v, precision="highest")
    return acc, new_top, total * decay + jnp.sum(weights, axis=-1)


# --- the call ---------------------------------------------------------------------------------


def refusal(call: AttentionCall) -> str | None:
    """Why this backend cannot serve `call`, or None."""
    layers, pages, kv_heads = call.k_pages.shape[:3]
    if layers * pages * kv_heads >= 2**31:
        return f"L * N * Hk = {layers * pages * kv_heads} does not fit the int32 index of a gather"
    return call.pool_refusal()


def attend(call: AttentionCall) -> tuple[Float[Array, "B T Hq D"], Float[Array, "B T Hq"]]:
    """Serve `call`; the memory it needs does not depend on the table's width."""
    acc, top, total = _kernel(call, choose_config(call).chunk_pages)
    per_query = (call.rows, call.kv_heads, call.tokens, call.group)
    acc = acc.reshape(*per_query, call.dim)
    top, total = top.reshape(per_query), total.reshape(per_query)
    sink = None if call.sink is None else call.sink.reshape(-1, 1, call.group)
    out, lse = finished(acc, top, total, sink)

    broken = call.broken()[:, None, :, None]
    out = jnp.where(broken[..., None], jnp.nan, out).swapaxes(1, 2).astype(call.q.dtype)
    lse = jnp.where(broken, jnp.nan, lse).swapaxes(1, 2)
    return out.reshape(call.q.shape), lse.reshape(call.q.shape[:-1])


# --- the config -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Config:
    """How many pages of every row one step of the loop gathers."""

    chunk_pages: int


def choose_config(call: AttentionCall) -> Config:
    """As many tokens a row as keep a gathered chunk in cache, and no more than the table has.

    Measured on 2 CPU cores (benchmarks/attention_xla.py): longer chunks fall out of the cache and
    waste more behind the end of a row; shorter ones pay for the steps. Elsewhere a step costs
    kernel launches, so a chunk is larger.
    """
    token_bytes = 4 * call.rows * call.kv_heads * call.dim
    chunk_bytes, shortest, longest = (
        (2**19, 64, 128) if call.platform == "cpu" else (2**26, 64, 512)
    )
    tokens = min(max(chunk_bytes // max(token_bytes, 1), shortest), longest)
    pages = max(tokens // call.page_size, 1)
    return Config(min(pages, call.columns))
