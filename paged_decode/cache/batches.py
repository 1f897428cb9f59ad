"""Batches as pytrees: what a compiled step is told of its rows."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp

from ..allocator import DecodeBatch, GroupBatch
from ..kernels.annotations import AttentionOptions, Lengths, Queries

__all__ = ["DecodeBatch", "GroupBatch", "one_token_batch", "seen"]

# The classes live with the allocator, which never imports jax; here they become pytrees.
jax.tree_util.register_dataclass(
    GroupBatch,
    data_fields=["page_table", "slots", "starts", "shared"],
    meta_fields=["page_size", "num_pages", "window"],
)
jax.tree_util.register_dataclass(
    DecodeBatch,
    data_fields=["tokens", "seq_lens", "positions", "groups", "query_lens"],
    meta_fields=["batch_invariant"],
)


def seen(
    batch: DecodeBatch, group: GroupBatch, q: Queries, options: AttentionOptions
) -> AttentionOptions:
    """Options of attention, with what a batch says about its queries and the tokens they see.

    Of its `query_lens` only where q has the T queries that they count.

    Raises:
      ValueError: `sliding_window` is wider than that of the group, which has given back the rest.
    """
    own: AttentionOptions = {}
    asked = options.get("sliding_window")
    if group.window is not None:
        newest = asked[0] + 1 if isinstance(asked, tuple) and asked else asked
        if isinstance(newest, int) and newest > group.window:
            raise ValueError(
                f"sliding_window={asked} is wider than the window of {group.window} tokens of the "
                "layer's group, which gives back what is before: leave it out"
            )
        if asked is None:
            own["sliding_window"] = group.window
    if group.starts is not None:
        given = options.get("starts")
        own["starts"] = group.starts if given is None else jnp.maximum(given, group.starts)
    if batch.batch_invariant:
        own["batch_invariant"] = True
    if group.shared is not None and options.get("shared") is None:
        own["shared"] = group.shared
    if batch.query_lens is not None and q.shape[1:-2] == group.slots.shape[1:]:
        given = options.get("query_lens")
        own["query_lens"] = batch.query_lens if given is None else given
    return options | own


def one_token_batch(batch: DecodeBatch, tokens: Lengths, seq_lens: Lengths) -> DecodeBatch:
    """The step of one newest token for each row, on the same pages: for loops on the device.

    What `KVCache.share_prefixes` has found stays with the batch.

    Args:
      batch: made by an allocator, whose tables reach as far as the loop goes (`KVCache.reserve`).
      tokens: int `[B]`, the newest token of each row.
      seq_lens: int `[B]`, lengths with it; 0 for a row that has ended, which writes to the null
        page and sees nothing.

    Examples:
      >>> from paged_decode import BlockAllocator
      >>> allocator = BlockAllocator(9, 4)
      >>> handle = allocator.allocate([5, 6, 7])
      >>> copies = allocator.reserve([handle], 2)
      >>> batch = allocator.batch([handle], 3, 3)
      >>> one_token_batch(batch, jnp.array([8]), jnp.array([4])).slots
      Array([[7]], dtype=int32)
    """
    positions = jnp.maximum(seq_lens - 1, 0)[:, None]

    def place(group: GroupBatch) -> GroupBatch:
        if (size := group.page_size) is None:
            raise ValueError("the batch must say its page_size; DecodeBatch.of takes it")
        pages = jnp.take_along_axis(group.page_table, positions // size, axis=1)
        slots = jnp.where(seq_lens[:, None] > 0, pages * size + positions % size, 0)
        return replace(group, slots=slots)

    groups = tuple(place(group) for group in batch.groups)
    new = tokens[:, None]
    new_batch = dict(tokens=new, seq_lens=seq_lens, positions=positions, groups=groups)
    return replace(batch, **new_batch, query_lens=None)
