"""Host bookkeeping of a paged KV cache: NumPy and the standard library, never jax.

The life of one call, `advance(handles, tokens)`:

```
block_allocator.advance      arguments become arrays, or an error; the lock is taken
rows.resolve                 handles -> rows, all live and distinct
bookkeeping.plan_advance     the plan, which may raise and changes nothing that can be seen:
  growth.plan_growth           per group of layers: which entries of the page table get a page,
                               which tails are copied; `pool.require`: are there enough pages?
  framing.empty_page_table     the arrays of the batch, before anything has changed
its `apply`                  cannot fail:
  growth.apply_growth          `pool.take`: free pages, then evicted ones (`eviction.pop`)
  framing.frame                rows of the page tables and slots -> `DecodeBatch`
```

A call over shards (`sharded`) makes the plans of all shards first.
"""

from .batch import DecodeBatch, GroupBatch, PageCopies, Prepared
from .block_allocator import BlockAllocator
from .errors import (
    CorruptState,
    OutOfPages,
    PagedDecodeError,
    PageTableError,
    SequenceTooLong,
    StaleHandle,
)
from .eviction import LRU, CachedPage, EvictionRank
from .group_state import GroupState
from .layout import CacheLayout, PageSpec
from .prompt import PromptKey
from .rows import Handle, HeldPages, SequenceInfo
from .sharded import ShardedAllocator
from .state import AllocatorState
from .state_rules import check_state
from .stats import AllocatorStats, PageState
from .transfer import StatePages

__all__ = [
    "LRU",
    "AllocatorState",
    "AllocatorStats",
    "BlockAllocator",
    "CacheLayout",
    "CachedPage",
    "CorruptState",
    "DecodeBatch",
    "EvictionRank",
    "GroupState",
    "GroupBatch",
    "Handle",
    "HeldPages",
    "OutOfPages",
    "PageCopies",
    "PageState",
    "PageSpec",
    "PageTableError",
    "PagedDecodeError",
    "Prepared",
    "PromptKey",
    "SequenceInfo",
    "SequenceTooLong",
    "ShardedAllocator",
    "StaleHandle",
    "StatePages",
    "check_state",
]
