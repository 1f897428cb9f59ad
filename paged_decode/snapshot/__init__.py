"""Snapshots: a file that is safe to open, survives a crash, and restores into another pool."""

from __future__ import annotations

from ._behind import PendingSnapshot, Snapshot
from ._compact import compact_snapshot
from ._load import AS_SAVED, Restored, SavedSalt, import_sequence, load_snapshot
from ._open import SnapshotInfo, inspect_snapshot, verify_snapshot
from ._save import export_sequence, save_snapshot, save_snapshot_async

__all__ = [
    "AS_SAVED",
    "PendingSnapshot",
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
