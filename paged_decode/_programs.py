"""The two device programs of the engine: one prefill chunk, and k decode steps in one launch.

They are compiled once per model function and shape, whatever the number of engines.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int

from .cache import DecodeBatch, KVCache, one_token_batch
from .sampling import SamplingRows, draw

__all__ = ["DecodeOut", "Model", "decode", "null_batch", "prefill"]

Model = Callable[[Any, KVCache, Array, DecodeBatch], tuple[Array, KVCache]]


class DecodeOut(NamedTuple):
    """What k steps produced: int32 tokens `[K, B]`, how many are real per row `[B]`, which rows
    then had logits of which no token can be chosen, bool `[B]`, and the largest logits of every
    step, ids and values `[K, B, top]` (top may be 0)."""

    tokens: Any
    counts: Any
    invalid: Any
    top_ids: Any
    top_logits: Any


@partial(jax.jit, static_argnames="model", donate_argnames="cache")
def prefill(
    cache: KVCache,
    params: Any,
    batch: DecodeBatch,
    *,
    model: Model,
) -> KVCache:
    """Compute one chunk of every row, only to fill the cache. Donates the cache.

    No logits come back: the newest token of a prompt is left to `decode`, so that sampling has
    one home and forks of a prompt need nothing special.
    """
    return _call(model, params, cache, batch)[1]


@partial(jax.jit, static_argnames=("model", "steps", "top"), donate_argnames="cache")
def decode(
    cache: KVCache,
    params: Any,
    tokens: Int[Array, " B"],
    batch: DecodeBatch,
    budget: Int[Array, " B"],
    rows: SamplingRows,
    *,
    model: Model,
    steps: int,
    top: int,
) -> tuple[KVCache, DecodeOut]:
    """Run up to `steps` tokens per row without the host. Donates the cache.

    Row b stops after `budget[b]` tokens (0 pads the batch), with a stop token, or before a token
    that cannot be chosen, and the loop ends with its last living row. Every page that the steps
    may write must be in the table before.
    """
    size = tokens.shape[0]
    out = DecodeOut(
        tokens=jnp.zeros((steps, size), jnp.int32),
        counts=jnp.zeros(size, jnp.int32),
        invalid=jnp.zeros(size, bool),
        top_ids=jnp.zeros((steps, size, top), jnp.int32),
        top_logits=jnp.zeros((steps, size, top), jnp.float32),
    )

    def living(state: tuple) -> Array:
        return (state[0] < steps) & jnp.any(state[3])

    def step(state: tuple) -> tuple:
        i, cache, tokens, alive, out = state
        lens = jnp.where(alive, batch.seq_lens + out.counts, 0)
        now = one_token_batch(batch, tokens, lens)
        logits, cache = _call(model, params, cache, now)
        if cache.placement is not None:
            logits = cache.placement.untyped(logits)
        chosen, invalid = draw(logits, replace(rows, index=rows.index + out.counts))
        invalid, alive = alive & invalid, alive & ~invalid
        stopped = jnp.any(rows.stop_tokens == chosen[:, None], axis=-1)
        counts = out.counts + alive.astype(jnp.int32)
        values, ids = lax.top_k(logits.astype(jnp.float32), top)
        out = DecodeOut(
            tokens=out.tokens.at[i].set(chosen),
            counts=counts,
            invalid=out.invalid | invalid,
            top_ids=out.top_ids.at[i].set(ids.astype(jnp.int32)),
            top_logits=out.top_logits.at[i].set(values),
        )
        return i + 1, cache, chosen, alive & ~stopped & (counts < budget), out

    state = (jnp.int32(0), cache, tokens, budget > 0, out)
    _, cache, _, _, out = lax.while_loop(living, step, state)
    return cache, out if cache.placement is None else cache.placement.whole(out)


def _call(model: Model, params: Any, cache: KVCache, batch: DecodeBatch) -> tuple[Array, KVCache]:
    """What the model returns, checked while it is traced: its slips compile without a word."""
    tokens = batch.tokens
    out = model(params, cache, tokens, batch)
    if not isinstance(out, tuple | list) or len(out) != 2 or not isinstance(out[1], KVCache):
        kinds = [type(each).__name__ for each in (out if isinstance(out, tuple | list) else [out])]
        raise TypeError(f"the model must return (logits, cache); got {', '.join(kinds)}")
    logits, after = out
    shape, dtype = getattr(logits, "shape", None), getattr(logits, "dtype", None)
    if shape is None or dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        kind = type(logits).__name__ if dtype is None else f"dtype {dtype}"
        raise TypeError(f"the model's logits must be a floating-point array [B, V]; got {kind}")
    if len(shape) != 2 or shape[0] != len(tokens) or shape[1] == 0:
        cure = ": return those of column T-1, logits[:, -1]" if len(shape) == 3 else ""
        raise ValueError(
            f"the model's logits must be [B, V] with B = {len(tokens)}; got shape {shape}{cure}"
        )
    old, new = jax.tree.leaves(cache), jax.tree.leaves(after)
    if [(a.shape, a.dtype) for a in old] != [(a.shape, a.dtype) for a in new]:
        raise ValueError("the model must return a cache of the shapes and dtypes that it was given")
    if all(a is b for a, b in zip(old, new, strict=True)):
        raise ValueError(
            "the model returned the cache that it was given, without the new keys and values: "
            "return what cache.append or cache.append_and_attend returned last"
        )
    return logits, after


def null_batch(cache: KVCache, rows: int, chunk: int, *, columns: int) -> DecodeBatch:
    """A batch of padding: it touches the null page only."""
    none = np.zeros((rows, chunk), np.int32)
    return DecodeBatch.of(
        page_table=np.zeros((rows, columns), np.int32),
        seq_lens=np.zeros(rows, np.int32),
        positions=none,
        slots=none,
        tokens=none,
        page_size=cache.page_size,
        num_pages=cache.num_pages,
    )
