"""A paged KV cache and decode engine for JAX."""

from importlib import metadata as _metadata

from .allocator import (
    BlockAllocator,
    CacheLayout,
    DecodeBatch,
    Handle,
    PageCopies,
    PageSpec,
    PromptKey,
    ShardedAllocator,
)
from .cache import KVCache, one_token_batch
from .engine import (
    AsyncEngine,
    Completion,
    Engine,
    EngineConfig,
    EngineStats,
    Events,
    Model,
    TokenEvent,
)
from .engine.sampling import SamplingParams
from .errors import (
    CorruptState,
    MissingExtra,
    OutOfPages,
    PagedDecodeError,
    PageTableError,
    ReplicaMismatch,
    SequenceTooLong,
    SnapshotCorrupt,
    SnapshotError,
    SnapshotMismatch,
    SnapshotVersion,
    StaleHandle,
)
from .kernels import (
    AttentionOptions,
    Placement,
    append_and_attend,
    append_kv,
    copy_pages,
    decode_attention,
    merge_attention,
    paged_attention,
)
from .replicas import ReplicaCheck
from .snapshot import (
    PendingSnapshot,
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
    "AsyncEngine",
    "AttentionOptions",
    "BlockAllocator",
    "CacheLayout",
    "Completion",
    "CorruptState",
    "DecodeBatch",
    "Engine",
    "EngineConfig",
    "EngineStats",
    "Events",
    "Handle",
    "KVCache",
    "MissingExtra",
    "Model",
    "OutOfPages",
    "PageCopies",
    "PageSpec",
    "PageTableError",
    "PagedDecodeError",
    "PendingSnapshot",
    "Placement",
    "PromptKey",
    "ReplicaCheck",
    "ReplicaMismatch",
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
    "StaleHandle",
    "TokenEvent",
    "__version__",
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
    "one_token_batch",
    "paged_attention",
    "save_snapshot",
    "save_snapshot_async",
    "verify_snapshot",
]

try:
    __version__ = _metadata.version("paged-decode")
except _metadata.PackageNotFoundError:  # a checkout on the path that was never installed
    __version__ = "0+unknown"
