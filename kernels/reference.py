"""The contract in its plainest form: everything at once, in float32. Slow; read this first."""

import jax.numpy as jnp
from jax.nn import logsumexp
from jaxtyping import Array, Bool, Float

from .eight_bits import dequantise
from .record import AttentionCall

__all__ = ["attend", "refusal"]


def refusal(call: AttentionCall) -> str | None:
    """Why this backend cannot serve `call`, or None."""
    return call.pool_refusal()


def attend(call: AttentionCall) -> tuple[Float[Array, "B T Hq D"], Float[Array, "B T Hq"]]:
    """Gather every page of every row, then one masked softmax over all P * S tokens.

    Its memory grows with the table's width: an oracle for tests, not a kernel.
    """
    q = call.q.astype(jnp.float32)
    k = _tokens(call, call.k_pages, call.k_scales)  # [B, tokens, Hq, D]
    v = _tokens(call, call.v_pages, call.v_scales)

    seen = _seen(call)[:, :, None, :]  # [B, T, 1, tokens]: the same for every head

    logits = call.scale * jnp.einsum("bthd,bnhd->bthn", q, k, precision="highest")
    if call.soft_cap is not None:
        logits = call.soft_cap * jnp.tanh(logits / call.soft_cap)
    logits = jnp.where(seen, logits, -jnp.inf)

    lse = logsumexp(logits, axis=-1)
    mass = lse if call.sink is None else jnp.logaddexp(lse, call.sink)  # of the denominator
    mass = jnp.where(mass == -jnp.inf, 0.0, mass)  # sees nothing: -inf - -inf would be NaN
    weights = jnp.exp(logits - mass[..., None])
    out = jnp.einsum("bthn,bnhd->bthd", weights, v, precision="highest")

    broken = call.broken()[..., None]
    out = jnp.where(broken[..., None], jnp.nan, out)
    return out.astype(call.q.dtype), jnp.where(broken, jnp.nan, lse)


def _seen(call: AttentionCall) -> Bool[Array, "B T tokens"]:
    token = jnp.arange(call.capacity, dtype=jnp.int32)
    return call.sees(jnp.broadcast_to(token, (call.rows, call.capacity)))


def _tokens(
    call: AttentionCall, pages: Array, scales: Array | None
) -> Float[Array, "B tokens Hq D"]:
    """The pages of every row as a run of tokens, zero where no query sees them."""
    used = jnp.arange(call.columns, dtype=jnp.int32) * call.page_size < call.seq_lens[:, None]
    ids = jnp.clip(jnp.where(used, call.page_table, 0), 0, call.pages - 1)
    own = None if scales is None else scales[call.layer, ids]
    tokens = dequantise(pages[call.layer, ids], own)  # [B, P, Hk, S, D]
    tokens = jnp.moveaxis(tokens, 2, 3).reshape(call.rows, call.capacity, call.kv_heads, call.dim)
    # Slots that no query sees may hold NaN, and 0 * NaN is NaN: mask the values too.
    held = jnp.any(_seen(call), axis=1)
    tokens = jnp.where(held[..., None, None], tokens, 0.0)
    return jnp.repeat(tokens, call.group, axis=2)
