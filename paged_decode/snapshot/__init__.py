"""Snapshots: a file that is safe to open, survives a crash, and restores into another pool."""

from __future__ import annotations

import os
from typing import Any

from .._text import printable
from ..allocator import BlockAllocator, Handle
from ..errors import SnapshotMismatch
from ._compact import compact_snapshot
from ._files import Files, OSFiles
from ._load import (
    AS_SAVED,
    Opened,
    Restored,
    SavedSalt,
    SnapshotInfo,
    Terms,
    inspect_snapshot,
    load_snapshot,
    place_snapshot,
    verify_snapshot,
)
from ._save import Snapshot, save_snapshot, save_snapshot_async

__all__ = [
    "AS_SAVED",
    "Files",
    "OSFiles",
    "Restored",
    "SavedSalt",
    "Snapshot",
    "SnapshotInfo",
    "compact_snapshot",
    "export_sequence",
    "import_sequence",
    "inspect_snapshot",
    "load_snapshot",
    "save_snapshot",
    "save_snapshot_async",
    "verify_snapshot",
]


def export_sequence(
    path: str | os.PathLike[str],
    cache: Any,
    allocator: BlockAllocator,
    handle: Handle,
    **options: Any,
) -> Snapshot:
    """Save one sequence and nothing else: `save_snapshot` with one handle; options as there."""
    return save_snapshot(path, cache, allocator, handles=[handle], cached=False, **options)


def import_sequence(
    path: str | os.PathLike[str],
    *,
    into: tuple[Any, BlockAllocator],
    accept_fingerprint: bytes | None = None,
    cache_salt: str | bytes | SavedSalt | None = AS_SAVED,
    prefix_cache: bool = True,
) -> tuple[Any, Handle]:
    """Load a snapshot of one sequence; returns the cache (the one passed in is donated) and its
    handle. Arguments as in `load_snapshot`.

    Raises:
      SnapshotMismatch: the file holds no or several sequences; else as `load_snapshot`.
    """
    terms = Terms(accept_fingerprint, cache_salt, prefix_cache)
    with Opened(path) as opened:
        count = len(opened.state.lengths)
        if count != 1:
            raise SnapshotMismatch(
                f"{printable(path)} holds {count} sequences, not one; use load_snapshot"
            )
        cache, allocator = into
        restored = place_snapshot(opened, cache, allocator, terms)
    return restored.cache, restored.handles[0]
