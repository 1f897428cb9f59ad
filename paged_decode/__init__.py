"""A paged KV cache and decode engine for JAX."""

from ._replicas import ReplicaMismatch, ReplicatedAllocator
from .allocator import BlockAllocator, DecodeBatch, Handle, PageCopies, ShardedAllocator
from .cache import KVCache
from .engine import Completion, Engine, EngineConfig, EngineStats, TokenEvent
from .errors import (
    OutOfPages,
    PagedDecodeError,
    PageTableError,
    SequenceTooLong,
    SnapshotCorrupt,
    SnapshotError,
    SnapshotMismatch,
    SnapshotVersion,
    StaleHandle,
)
from .kernels import (
    Placement,
    append_and_attend,
    append_kv,
    copy_pages,
    decode_attention,
    merge_attention,
    paged_attention,
)
from .sampling import SamplingParams
from .sharding import Spread, split_batch
from .snapshot import (
    Restored,
    Snapshot,
    SnapshotInfo,
    compact_snapshot,
    export_sequence,
    import_sequence,
    inspect_snapshot,
    load_snapshot,
    save_snapshot,
    save_snapshot_async,
    verify_snapshot,
)

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
    "Restored",
    "SamplingParams",
    "SequenceTooLong",
    "ShardedAllocator",
    "Snapshot",
    "SnapshotCorrupt",
    "SnapshotError",
    "SnapshotInfo",
    "SnapshotMismatch",
    "SnapshotVersion",
    "Spread",
    "StaleHandle",
    "TokenEvent",
    "append_and_attend",
    "append_kv",
    "compact_snapshot",
    "copy_pages",
    "decode_attention",
    "export_sequence",
    "import_sequence",
    "inspect_snapshot",
    "load_snapshot",
    "merge_attention",
    "paged_attention",
    "save_snapshot",
    "save_snapshot_async",
    "split_batch",
    "verify_snapshot",
]
