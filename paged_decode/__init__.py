"""A paged KV cache and decode engine for JAX."""

from .allocator import BlockAllocator, DecodeBatch, Handle, PageCopies
from .cache import KVCache
from .engine import Completion, Engine, EngineConfig, EngineStats, TokenEvent
from .errors import OutOfPages, PagedDecodeError, PageTableError, SequenceTooLong, StaleHandle
from .kernels import (
    append_and_attend,
    append_kv,
    copy_pages,
    decode_attention,
    merge_attention,
    paged_attention,
)
from .sampling import SamplingParams

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
    "SamplingParams",
    "SequenceTooLong",
    "StaleHandle",
    "TokenEvent",
    "append_and_attend",
    "append_kv",
    "copy_pages",
    "decode_attention",
    "merge_attention",
    "paged_attention",
]
