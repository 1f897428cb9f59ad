"""Host bookkeeping of a paged KV cache: NumPy and the standard library, never jax."""

from .batch import DecodeBatch, PageCopies
from .block_allocator import BlockAllocator
from .errors import (
    CorruptState,
    OutOfPages,
    PagedDecodeError,
    PageTableError,
    SequenceTooLong,
    StaleHandle,
)
from .policy import LRU, CacheWatcher, EvictionPolicy
from .sequences import Handle, SequenceInfo
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
    "CacheWatcher",
    "CorruptState",
    "DecodeBatch",
    "EvictionPolicy",
    "Handle",
    "OutOfPages",
    "PageCopies",
    "PageState",
    "PageTableError",
    "PagedDecodeError",
    "SequenceInfo",
    "SequenceTooLong",
    "ShardedAllocator",
    "StaleHandle",
    "StatePages",
    "check_state",
]
