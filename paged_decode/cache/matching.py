"""Whether a cache, a batch and an allocator are for pools of the same sizes."""

from __future__ import annotations

from collections.abc import Sequence

from ..allocator import DecodeBatch, GroupBatch
from ..allocator.view import AllocatorView

__all__ = ["check_sizes", "matching_group"]

Pools = Sequence[tuple[int, int | None]]
"""Pages and window of every group of layers."""


def matching_group(
    batch: DecodeBatch, number: int, pools: Pools, page_size: int, *, shards: int = 1
) -> GroupBatch:
    """The part of a batch for one group of layers, if it is for pools like these; known while
    tracing. Over `shards`, its ids are those of one of them."""
    if not isinstance(batch, DecodeBatch):
        raise TypeError(f"batch must be a DecodeBatch, got {type(batch).__name__}")
    if len(batch.groups) != len(pools):
        raise ValueError(
            f"the batch has {len(batch.groups)} groups of layers, the cache {len(pools)}: make the "
            "cache and the allocator of the same layout"
        )
    group, (pages, window) = batch.groups[number], pools[number]
    for name, ours in dict(page_size=page_size, num_pages=pages // shards).items():
        theirs = getattr(group, name)
        if theirs is not None and theirs != ours:
            split = "" if shards == 1 else " in each shard (call split first)"
            raise ValueError(
                f"the batch is for a pool with {name} {theirs}, but the cache has {ours}{split}: "
                "make the cache and the allocator with the same sizes"
            )
    if len(pools) > 1 and group.window != window:
        raise ValueError(
            f"the batch has a window of {group.window} tokens in group {number}, but the cache has "
            f"{window}: make the cache and the allocator of the same layout"
        )
    return group


def check_sizes(pools: Pools, page_size: int, allocator: AllocatorView) -> None:
    """Refuse an allocator of pages of another size, of another number of them, or of other
    groups."""
    ours, theirs = tuple(pools), allocator.pools
    for name, mine, other in (
        ("page_size", page_size, allocator.page_size),
        ("num_pages", ours[0][0], theirs[0][0]),
    ):
        if mine != other:
            raise ValueError(f"cache and allocator differ in {name}: {mine} and {other}")
    if ours != theirs:
        raise ValueError(
            f"cache and allocator differ in (pages, window) of their groups: {ours} and {theirs}; "
            "make both of the same layout"
        )
