"""A paged KV cache and decode engine for JAX."""

from ._replicas import ReplicaMismatch, ReplicatedAllocator
from .allocator import BlockAllocator, DecodeBatch, Handle, PageCopies, ShardedAllocator
from .cache import KVCache
from .engine import Completion, Engine, EngineConfig, EngineStats, TokenEvent
from .errors import OutOfPages, PagedDecodeError, PageTableError, SequenceTooLong, StaleHandle
from .kernels import (
    Placement,
    append_kv,
    copy_pages,
    decode_attention,
    merge_attention,
    paged_attention,
)
from .sampling import SamplingParams
from .sharding import Spread, split_batch

__all__ = [
    "BlockAllocator",
    "Completion",
    "DecodeBatch",
    "Engine",
    "EngineConfig",
    "EngineStats",
    "Handle",
    "KVCache",
    "OutOfPages",
    "PageCopies",
    "PageTableError",
    "PagedDecodeError",
    "Placement",
    "ReplicaMismatch",
    "ReplicatedAllocator",
    "SamplingParams",
    "SequenceTooLong",
    "ShardedAllocator",
    "Spread",
    "StaleHandle",
    "TokenEvent",
    "append_kv",
    "copy_pages",
    "decode_attention",
    "merge_attention",
    "paged_attention",
    "split_batch",
]
