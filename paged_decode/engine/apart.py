"""Every token a row of its own, in programs of one shape: what makes bits independent of a batch.

```
chunk  row 0  [ - t4 t5 t6 ]        rows  [ -  t4 t5 t6  u0 u1 u2 u3  -  - ]      T = 1
       row 1  [u0 u1 u2 u3 ]        lens  [ 0   5  6  7   1  2  3  4  0  0 ]
```

A matrix product rounds by its shape, and attention by the tiles of its queries. So here prompts,
decode steps and scores run the model over the same number of rows with one token each: all of them
write, in every layer, before one is read, as rows of a chunk do. A token's bits then follow from
itself and from what is in front of it, whichever program has computed that.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ..cache import DecodeBatch, KVCache
from .model import Model, call_model

__all__ = ["call_model_apart"]


def call_model_apart(
    model: Model, params: Any, cache: KVCache, batch: DecodeBatch, *, every: bool, rows: int
) -> tuple[Array, KVCache]:
    """`call_model`, over `rows` rows of one token in each shard; batch has no more tokens there."""
    (size, width), shards = batch.tokens.shape, cache.data_shards
    apart = jax.lax.optimization_barrier(_apart(batch, shards, rows))
    logits, cache = call_model(model, params, cache, apart, every=every)
    # What comes before and behind must not be fused with the model: it differs between programs.
    logits, cache = jax.lax.optimization_barrier((logits, cache))
    if cache.placement is not None:
        logits = cache.placement.untyped(logits)
    logits = logits.reshape(shards, rows, -1)[:, : size // shards * width]
    logits = logits.reshape(size, width, -1)
    return logits if every else logits[:, -1], cache


def _apart(batch: DecodeBatch, shards: int, rows: int) -> DecodeBatch:
    """The batch with a row for every token, and empty ones behind those of each shard."""
    size, width = batch.tokens.shape
    own = jnp.full(size, width, jnp.int32) if batch.query_lens is None else batch.query_lens
    token = jnp.arange(width, dtype=jnp.int32)
    there = (token >= width - own[:, None]) & (batch.seq_lens[:, None] > 0)

    def spread(array: Array) -> Array:
        behind = rows - size // shards * width
        array = array.reshape(shards, size // shards * width, *array.shape[2:])
        pads = [(0, 0), (0, behind)] + [(0, 0)] * (array.ndim - 2)
        return jnp.pad(array, pads).reshape(shards * rows, *array.shape[2:])

    def place(group: Any) -> Any:
        table = group.page_table
        table = jnp.broadcast_to(table[:, None], (size, width, table.shape[1]))
        slots = spread(group.slots)[:, None]
        # `starts` keep the padding of a chunk from what is gone; a token sees no more than it may.
        return replace(group, page_table=spread(table), slots=slots, starts=None)

    return DecodeBatch(
        tokens=spread(batch.tokens)[:, None],
        seq_lens=spread(jnp.where(there, batch.positions + 1, 0)),
        positions=spread(batch.positions)[:, None],
        groups=tuple(place(group) for group in batch.groups),
        batch_invariant=True,
    )
