"""Counts and page states, for tables and plots."""

from dataclasses import dataclass, fields
from enum import IntEnum
from typing import Any

import numpy as np

from .groups import PageGroup
from .pool import PagePool
from .rows import RowTable

__all__ = ["AllocatorStats", "PageState"]


class PageState(IntEnum):
    """What a page is doing; the values of `BlockAllocator.page_states`."""

    FREE = 0
    CACHED = 1
    OWNED = 2
    SHARED = 3
    NULL = 4


@dataclass(frozen=True, slots=True)
class AllocatorStats:
    """A reading of one moment; counters run from the making of the allocator.

    Attributes:
      usable: pages of the pool without the null page; free + evictable + used.
      free, evictable, used: pages, as in `BlockAllocator.num_free` and its sisters.
      peak_used: the most pages used at once.
      shared: used pages with more than one owner.
      raw: used pages that `allocate_pages` handed out.
      published: pages in the prefix cache, evictable ones included.
      sequences: live sequences.
      tokens: sum of their lengths; a shared token counts for each.
      stored_tokens: slots of used pages that hold a token of some sequence; each counts once.
      tail_waste: part of the slots of sequences' pages that holds no token, 0 to 1.
      taken: counter of pages taken, new ones and copies.
      evictions: counter of cached pages given up for them.
      copies: counter of copy-on-write copies.
      prefix_query_tokens, prefix_hit_tokens: counters over `allocate` calls: tokens asked for,
        and tokens found in the prefix cache.
    """

    usable: int
    free: int
    evictable: int
    used: int
    peak_used: int
    shared: int
    raw: int
    published: int
    sequences: int
    tokens: int
    stored_tokens: int
    tail_waste: float
    taken: int
    evictions: int
    copies: int
    prefix_query_tokens: int
    prefix_hit_tokens: int

    @classmethod
    def total(cls, shards: "list[AllocatorStats]", page_size: int) -> "AllocatorStats":
        """Counts added up; of several shards, the peaks may be of different moments."""
        if len(shards) == 1:
            return shards[0]
        total: dict[str, Any] = {
            field.name: sum(getattr(each, field.name) for each in shards) for field in fields(cls)
        }
        slots = (total["used"] - total["raw"]) * page_size
        total["tail_waste"] = 1 - total["stored_tokens"] / slots if slots else 0.0
        return cls(**total)


def collect_stats(group: PageGroup, rows: RowTable) -> AllocatorStats:
    """Count everything; the time grows with the page table."""
    pool = group.pool
    raw = int(pool.raw[1:].sum())
    stored = _stored_tokens(group, rows)
    slots = (pool.num_used - raw) * pool.page_size
    return AllocatorStats(
        usable=pool.usable,
        free=pool.num_free,
        evictable=pool.cache.num_evictable,
        used=pool.num_used,
        peak_used=pool.peak_used,
        shared=int((pool.refs > 1).sum()),
        raw=raw,
        published=int(np.count_nonzero(pool.cache.published)),
        sequences=len(rows.live),
        tokens=int(rows.length[rows.live].sum()),
        stored_tokens=stored,
        tail_waste=1 - stored / slots if slots else 0.0,
        taken=pool.taken,
        evictions=pool.evicted,
        copies=pool.copied,
        prefix_query_tokens=pool.cache.queried_tokens,
        prefix_hit_tokens=pool.cache.hit_tokens,
    )


def page_states(pool: PagePool) -> np.ndarray:
    """uint8 `[N]` of `PageState`."""
    states = np.minimum(pool.refs, 2).astype(np.uint8)
    states += states > 0  # OWNED and SHARED are one more than their owners
    np.maximum(states, pool.cache.published, out=states)
    states[0] = PageState.NULL
    return states


def _stored_tokens(group: PageGroup, rows: RowTable) -> int:
    page_size, live = group.pool.page_size, rows.live
    lengths = rows.length[live]
    pages = group.table.ids[live, : group.pool.pages_for(int(lengths.max(initial=0)))]
    filled = lengths[:, None] - np.arange(pages.shape[1]) * page_size
    most = np.zeros(len(group.pool.refs), np.int64)
    most[pages[filled >= page_size]] = page_size
    part = (filled > 0) & (filled < page_size)
    np.maximum.at(most, pages[part], filled[part])  # as full as its fullest owner has it
    return int(most[1:].sum())
