"""Opening: a file and its parents with everything checked but the pages themselves."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..allocator import AllocatorState
from ..errors import SnapshotCorrupt, SnapshotMismatch
from ._about import about
from ._engine import EngineState, arrays_of, engine_from
from ._format import ArraySpec, Parent, SavedGroup, Scalar, layer_of
from ._names import EXTRA
from ._reader import Chain, Counter, Progress, SnapshotFile
from ._state import require_shapes, state_from, state_names

__all__ = ["Opened", "SnapshotInfo", "inspect_snapshot", "verify_snapshot"]


@dataclass(frozen=True, slots=True)
class SnapshotInfo:
    """What a snapshot file says about itself.

    Attributes:
      path, id: the file, and 16 bytes that name its content.
      file_bytes: its size.
      page_size: tokens per page.
      num_pages: pages that it consists of, of all groups of layers; own_pages are in this file.
      sequences, tokens, cached_pages: how many; tokens of shared pages count for each sequence.
      groups: of layers: window, pages and layers of each.
      requests: samples of an engine, running and waiting; None without an engine.
      fingerprint: of the allocator that was saved.
      metadata: the user's.
      parent: the snapshot that it is a delta of, or None.
      arrays: the arrays of the file.
      extra: the user's, by the names that they were given.
    """

    path: Path
    id: bytes
    file_bytes: int
    page_size: int
    num_pages: int
    own_pages: int
    sequences: int
    tokens: int
    cached_pages: int
    requests: int | None
    fingerprint: bytes
    metadata: Mapping[str, Scalar]
    parent: Parent | None
    arrays: tuple[ArraySpec, ...]
    groups: tuple[SavedGroup, ...]
    extra: Mapping[str, ArraySpec]


class Opened:
    """A snapshot with its parents and its state, everything checked but the pages themselves."""

    def __init__(self, path: str | os.PathLike[str]):
        self.chain = Chain(path)
        try:
            self._check()
        except BaseException:
            self.chain.close()
            raise

    def _check(self) -> None:
        self.kv = [s for s in self.chain.header.arrays if s.name.startswith("kv/")]
        for older in reversed(self.chain.files):  # the newest is the last
            with about(older.path):
                self._check_pages(older)
                self.state, self.engine = _bookkeeping(older)

    def _check_pages(self, file: SnapshotFile) -> None:
        header = file.header
        kv = [s for s in header.arrays if s.name.startswith("kv/")]
        theirs, ours = ({s.name: (s.dtype, s.shape[1:]) for s in each} for each in (kv, self.kv))
        if theirs != ours:
            raise SnapshotMismatch("this parent has other arrays of keys and values than its delta")
        if header.page_size != self.chain.header.page_size:
            raise SnapshotMismatch("this parent has another page size than its delta")

    def info(self) -> SnapshotInfo:
        file, header, state = self.chain.files[0], self.chain.header, self.state
        return SnapshotInfo(
            path=file.path,
            id=file.id,
            file_bytes=file.file_bytes,
            page_size=header.page_size,
            num_pages=sum(header.counts),
            own_pages=sum(int((place[:, 0] == 0).sum()) for place in self.chain.places),
            sequences=len(state.lengths),
            tokens=int(state.lengths.sum()),
            cached_pages=sum(each.num_pages - each.num_owned for each in (state, *state.groups)),
            requests=None if self.engine is None else len(self.engine.samples),
            fingerprint=header.fingerprint,
            metadata=header.metadata,
            parent=header.parent,
            arrays=header.arrays,
            groups=self.groups,
            extra={_own_name(spec): spec for spec in header.extra},
        )

    def read_extra(self) -> dict[str, np.ndarray]:
        """The user's arrays, their checksums compared."""
        file = self.chain.files[0]
        return {_own_name(s): _as_written(file.array(s.name)) for s in self.chain.header.extra}

    @property
    def groups(self) -> tuple[SavedGroup, ...]:
        """Those of the header; of one group with the layers that the names of its arrays say."""
        header = self.chain.header
        if header.groups:
            return header.groups
        layers = {layer for s in self.kv if (layer := layer_of(s.name)) is not None}
        return (SavedGroup(None, header.num_pages, tuple(sorted(layers))),)

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, *_: Any) -> None:
        self.chain.close()


def _own_name(spec: ArraySpec) -> str:
    """What the user calls it."""
    return spec.name.removeprefix(EXTRA)


def _as_written(array: np.ndarray) -> np.ndarray:
    """The array; of truth values whose bytes may be anything 0 is false, and all else true."""
    return np.asarray(array.view(np.uint8) != 0) if array.dtype == bool else array


def _bookkeeping(file: SnapshotFile) -> tuple[AllocatorState, EngineState | None]:
    """What one file says besides its pages, all of it checked."""
    names, wanted = [s.name for s in file.header.arrays], state_names(len(file.header.counts))
    engine = any(name.startswith("engine/") for name in names)
    require_shapes(file.specs, wanted)
    requests = arrays_of(file.header) if engine else {}
    require_shapes(file.specs, requests)
    kv = sum(name.startswith("kv/") for name in names) + len(file.header.extra)
    sources = len(file.header.counts) if file.header.parent else 0
    if kv + len(wanted) + len(requests) + sources != len(names):
        raise SnapshotCorrupt("there are arrays that the format does not have")
    state = state_from({name: file.array(name) for name in wanted}, file.header)
    if not engine:
        return state, None
    return state, engine_from({name: file.array(name) for name in requests}, state)


def inspect_snapshot(path: str | os.PathLike[str]) -> SnapshotInfo:
    """Read what a snapshot says about itself: header and bookkeeping, checked; no pages.

    Raises:
      SnapshotCorrupt, SnapshotVersion, SnapshotMismatch, OSError: as `load_snapshot`.
    """
    with Opened(path) as opened:
        return opened.info()


def verify_snapshot(
    path: str | os.PathLike[str], *, progress: Progress | None = None
) -> SnapshotInfo:
    """`inspect_snapshot`, and compare every checksum of the file and of its parents.

    `progress` is called with bytes compared and bytes in all.
    """
    with Opened(path) as opened:
        files = opened.chain.files
        counter = Counter(progress, sum(s.nbytes for f in files for s in f.header.arrays))
        for file in files:
            file.verify(counter)
        return opened.info()
