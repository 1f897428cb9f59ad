"""The exceptions. ValueError and TypeError mean a bad argument; these mean a bad state."""

from pathlib import Path

from paged_decode.allocator.errors import (
    CorruptState,
    OutOfPages,
    PagedDecodeError,
    PageTableError,
    SequenceTooLong,
    StaleHandle,
)

__all__ = [
    "CopyFailed",
    "CopyPending",
    "CorruptState",
    "MissingExtra",
    "OutOfPages",
    "PageTableError",
    "PagedDecodeError",
    "ReplicaMismatch",
    "SequenceTooLong",
    "SnapshotCorrupt",
    "SnapshotError",
    "SnapshotMismatch",
    "SnapshotVersion",
    "StaleHandle",
]


class SnapshotError(PagedDecodeError):
    """A snapshot cannot be used. Nothing was changed.

    Attributes:
      path: of the file that it is about, which may be a parent of the one that was named; None if
        no file is.
    """

    path: Path | None = None


class SnapshotCorrupt(SnapshotError):
    """The file is not a whole snapshot: cut, altered, or something else. The message says where."""


class SnapshotVersion(SnapshotError):
    """The file is a snapshot of a format version that this release does not read."""


class SnapshotMismatch(SnapshotError):
    """The snapshot is sound, but of another cache, model or parent; every difference is listed."""


class ReplicaMismatch(PagedDecodeError):
    """The processes have checked different batches: do not go on.

    `step` is the call of the check that showed it; `digests` holds what every process has, in
    order of the processes.
    """

    def __init__(self, step: int, digests: tuple[str, ...]):
        self.step, self.digests = step, digests
        super().__init__(
            f"the processes differ at check {step}: digests {', '.join(digests)}; "
            "every process must make the same calls with the same arguments in the same order"
        )

    def __reduce__(self):
        return type(self), (self.step, self.digests)


class CopyFailed(RuntimeError):
    """A copy of pages did not happen; raise it in a `PageMover` of your own."""


class CopyPending(Exception):
    """A copy is not done yet; from `finish`, which is then asked again at the next `settle`."""


class MissingExtra(ModuleNotFoundError):
    """A package is not installed that only an extra of paged-decode brings.

    `name` is the package, `extra` what to install.
    """

    def __init__(self, name: str | None, extra: str):
        self.extra = extra
        super().__init__(
            f"{name} is not installed; get it with pip install 'paged-decode[{extra}]'", name=name
        )

    def __reduce__(self):
        return type(self), (self.name, self.extra)
