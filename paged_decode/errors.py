"""The exception tree. ValueError and TypeError mean a bad argument; these mean a bad state."""

from paged_decode.allocator.errors import (
    OutOfPages,
    PagedDecodeError,
    PageTableError,
    SequenceTooLong,
    StaleHandle,
)

__all__ = [
    "OutOfPages",
    "PageTableError",
    "PagedDecodeError",
    "SequenceTooLong",
    "SnapshotCorrupt",
    "SnapshotError",
    "SnapshotMismatch",
    "SnapshotVersion",
    "StaleHandle",
]


class SnapshotError(PagedDecodeError):
    """A snapshot cannot be used. Nothing was changed."""


class SnapshotCorrupt(SnapshotError):
    """The file is not a whole snapshot: cut, altered, or something else. The message says where."""


class SnapshotVersion(SnapshotError):
    """The file is a snapshot of a format version that this release does not read."""


class SnapshotMismatch(SnapshotError):
    """The snapshot is sound, but of another cache, model or parent; every difference is listed."""
