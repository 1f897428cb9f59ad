"""Counts and page states, for tables and plots."""

from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from .pool import PagePool
from .sequences import SequenceTable

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
      pinned: used pages that `allocate_pages` handed out.
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
    pinned: int
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


def collect_stats(pool: PagePool, table: SequenceTable) -> AllocatorStats:
    """Count everything; the time grows with the page table."""
    pinned = int(pool.pinned[1:].sum())
    stored = _stored_tokens(pool, table)
    slots = (pool.num_used - pinned) * pool.page_size
    return AllocatorStats(
        usable=pool.usable,
        free=pool.num_free,
        evictable=pool.cache.num_evictable,
        used=pool.num_used,
        peak_used=pool.peak_used,
        shared=int((pool.refs > 1).sum()),
        pinned=pinned,
        published=len(pool.cache.by_page),
        sequences=len(table.rows),
        tokens=int(table.length[table.rows].sum()),
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
    states = np.full(len(pool.refs), PageState.FREE, np.uint8)
    states[pool.cache.published] = PageState.CACHED
    states[pool.refs == 1] = PageState.OWNED
    states[pool.refs > 1] = PageState.SHARED
    states[0] = PageState.NULL
    return states


def _stored_tokens(pool: PagePool, table: SequenceTable) -> int:
    page_size = pool.page_size
    rows = table.rows
    pages = table.page_table[rows]
    first = np.arange(pages.shape[1]) * page_size
    filled = (table.length[rows][:, None] - first).clip(0, page_size)
    most = np.zeros(len(pool.refs), np.int64)
    np.maximum.at(most, pages, filled)  # a shared page is as full as its fullest owner has it
    return int(most.sum())
