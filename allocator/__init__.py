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
from .stats import AllocatorStats, PageState

__all__ = [
    "LRU",
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
    "StaleHandle",
]
