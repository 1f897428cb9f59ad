"""Saving: a cache and its allocator, whole or as a delta, at once or behind the decode loop."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypedDict, Unpack

import numpy as np

from .._text import printable, shown
from ..allocator import AllocatorState, BlockAllocator, Handle
from ..cache import KVCache
from ..errors import SnapshotError
from . import _files
from ._behind import WRITER, PendingSnapshot, Snapshot
from ._extra import extra_arrays
from ._files import Files
from ._format import (
    MAX_PARENTS,
    Header,
    Parent,
    SavedGroup,
    Scalar,
    check_metadata,
)
from ._names import is_plain_name
from ._out import page_chunks
from ._parts import Part, parts_of
from ._reader import Progress, SnapshotFile, source_name
from ._state import array_specs, state_arrays
from ._writer import array_chunks, write_file

__all__ = ["export_sequence", "save_snapshot", "save_snapshot_async"]

GENERATION = b"\0generation\0"


class FileOptions(TypedDict, total=False):
    """Options of everything that saves: as in `save_snapshot`."""

    metadata: Mapping[str, Scalar] | None
    extra: Mapping[str, Any] | None
    parent: Snapshot | None
    progress: Progress | None


class SaveOptions(FileOptions, total=False):
    """Options of `save_snapshot`."""

    handles: Sequence[Handle] | None
    cached: bool


def save_snapshot(
    path: str | os.PathLike[str],
    cache: Any,
    allocator: BlockAllocator,
    *,
    handles: Sequence[Handle] | None = None,
    cached: bool = True,
    metadata: Mapping[str, Scalar] | None = None,
    extra: Mapping[str, Any] | None = None,
    parent: Snapshot | None = None,
    progress: Progress | None = None,
) -> Snapshot:
    """Write sequences, their pages and the prefix cache to one file, atomically and durably.

    Only pages in use are written, shared ones once; slots behind a sequence's tokens are written
    as zeros, reserved pages and those of `allocate_pages` not at all. `path` shows the old file or
    the new one, whole, whatever happens; the file is readable by its owner only.

    Args:
      path: to be replaced; a symbolic link is followed.
      cache: a `KVCache`, or any pytree of arrays `[N, ...]` of up to four axes, or stacked
        `[L, N, ...]`; for several groups of layers a `KVCache`. A third axis of a page array (`[N,
        Hk, S, ...]`) as long as a page is that of its slots.
      allocator: its bookkeeping.
      handles: the sequences to save, in this order; None is all, as in `allocator.handles`.
      cached: save cached pages without an owner, too.
      metadata: text to text, int, float, bool or None; yours.
      extra: arrays of yours by name, of NumPy or JAX: newest tokens, keys of a sampler. Any shape,
        scalars too; sharded ones are put together. `Restored.extra` gives them back as NumPy
        arrays. A name is no path; a delta has its own, none of its parent.
      parent: write a delta: pages that have not changed since this snapshot (of the same
        allocator, in the same folder) are left out. It must be there still, and have fewer than 256
        parents.
      progress: called with bytes done and bytes in all.

    Raises:
      OSError: the file could not be written; the old one is as it was.
      ValueError, TypeError, NotImplementedError: an argument is not what it should be.

    Examples:
      >>> import tempfile
      >>> from paged_decode import BlockAllocator, KVCache, load_snapshot, save_snapshot
      >>> sizes = dict(num_layers=1, num_kv_heads=1, page_size=4, head_dim=8)
      >>> cache, allocator = KVCache.create(num_pages=9, **sizes), BlockAllocator(9, 4)
      >>> handle = allocator.allocate([5, 6, 7])
      >>> path = tempfile.mkdtemp() + "/chat.pgd"
      >>> save_snapshot(path, cache, allocator).num_pages
      1
      >>> cache, allocator = KVCache.create(num_pages=5, **sizes), BlockAllocator(5, 4)
      >>> restored = load_snapshot(path, cache, allocator)  # donates the cache
      >>> allocator.tokens(restored.handles[0]).tolist()
      [5, 6, 7]
    """
    job = plan_save(
        path,
        cache,
        allocator,
        handles=handles,
        cached=cached,
        metadata=metadata,
        extra=extra,
        parent=parent,
        progress=progress,
        copy=False,
    )
    return job.write()


def save_snapshot_async(
    path: str | os.PathLike[str],
    cache: Any,
    allocator: BlockAllocator,
    **options: Unpack[SaveOptions],
) -> PendingSnapshot:
    """`save_snapshot`, but return as soon as the pages are copied out; a thread writes them.

    Call it between two steps: what it saves is the state of that moment, and the next step may
    donate the cache. The copies take as much host memory as the live pages. One thread of the
    process writes all of them, in the order of the calls, to the end even while the interpreter
    exits. A save that has not begun can be cancelled; it then writes nothing.

    Args:
      options: as in `save_snapshot`; `progress` is called by that thread.

    Returns:
      A `concurrent.futures.Future` of the snapshot; its `result` raises what writing raised.
      Callbacks of the future run in the writing thread and hold up the next save.

    Raises:
      ValueError, TypeError, NotImplementedError: as in `save_snapshot`.
    """
    return plan_save(path, cache, allocator, copy=True, **options).write_behind()


def export_sequence(
    path: str | os.PathLike[str],
    cache: Any,
    allocator: BlockAllocator,
    handle: Handle,
    **options: Unpack[FileOptions],
) -> Snapshot:
    """Save one sequence and nothing else: `save_snapshot` with one handle; options as there."""
    return save_snapshot(path, cache, allocator, handles=[handle], cached=False, **options)


@dataclass(frozen=True, slots=True)
class SaveJob:
    """Everything that a file will hold, settled; only writing is left."""

    path: Path
    header: Header
    sources: list[Iterable[np.ndarray]]
    allocator: BlockAllocator
    stamps: tuple[np.ndarray, ...]
    written_pages: int
    parents: tuple[str, ...]
    progress: Progress | None
    files: Files  # those of the call: a test may have others by the time they are used

    def write(self) -> Snapshot:
        """Write in this thread, behind what the writing thread has for the path: it is older."""
        WRITER.wait_for(self.path)
        return self.write_now()

    def write_behind(self) -> PendingSnapshot:
        """Let the writing thread write."""
        return WRITER.submit(self.path, self.write_now)

    def write_now(self) -> Snapshot:
        ident = write_file(
            self.path, self.header, self.sources, files=self.files, progress=self.progress
        )
        return Snapshot(
            path=self.path,
            id=ident,
            num_pages=sum(self.header.counts),
            written_pages=self.written_pages,
            _allocator=self.allocator,
            _stamps=self.stamps,
            _parents=self.parents,
        )


def plan_save(
    path: str | os.PathLike[str],
    cache: Any,
    allocator: BlockAllocator,
    *,
    handles: Sequence[Handle] | None = None,
    cached: bool = True,
    metadata: Mapping[str, Scalar] | None = None,
    extra: Mapping[str, Any] | None = None,
    parent: Snapshot | None = None,
    progress: Progress | None = None,
    copy: bool,
    committed_only: bool = False,
    engine: Mapping[str, np.ndarray] | None = None,
) -> SaveJob:
    """Take the state of this moment; with `copy`, the pages too. `engine`: its arrays."""
    path = Path(path).absolute()  # wherever the process goes while a thread writes
    metadata = {} if metadata is None else metadata
    check_metadata(metadata, ValueError)
    parts = parts_of(cache, allocator)
    if isinstance(cache, KVCache):
        cache.check_sizes(allocator)
    own = extra_arrays(extra, copy=copy)
    state, main = allocator.export_state(
        None if handles is None else list(handles), cached=cached, committed_only=committed_only
    )
    groups = _saved_groups(cache, allocator, state)
    where = [main, *main.groups]
    arrays = state_arrays(state) | dict(engine or {})
    new = [np.ones(len(each.pages), bool) for each in where]
    named, parents = None, ()
    if parent is not None:
        named, parents = _checked_parent(parent, path, allocator, parts, groups)
        for number, (each, stamps) in enumerate(zip(where, parent._stamps, strict=True)):
            known = _positions(stamps, each.stamps)
            new[number] = fresh = known < 0
            source = np.where(fresh, fresh.cumsum() - 1, -1 - known)
            arrays[source_name(number)] = source.astype(np.int32)
    arrays |= own
    counts = [int(fresh.sum()) for fresh in new]
    specs = array_specs(arrays)
    sources: list[Iterable[np.ndarray]] = [
        array_chunks(a, s) for a, s in zip(arrays.values(), specs, strict=True)
    ]
    pages = [each.pages[fresh] for each, fresh in zip(where, new, strict=True)]
    filled = [each.filled[fresh] for each, fresh in zip(where, new, strict=True)]
    chunks = page_chunks(cache, parts, pages, filled, state.page_size, copy=copy)
    for spec in (part.spec(counts[part.group]) for part in parts):
        mine = islice(chunks, spec.num_chunks)  # the sources are asked in the order of the file
        sources.append(mine)
        specs.append(spec)
    header = Header(
        page_size=state.page_size,
        num_pages=state.num_pages,
        fingerprint=marked_fingerprint(allocator),
        metadata=dict(metadata),
        parent=named,
        arrays=tuple(specs),
        groups=groups,
    )
    stamps = tuple(each.stamps for each in where)
    return SaveJob(
        path=path,
        header=header,
        sources=sources,
        allocator=allocator,
        stamps=stamps,
        written_pages=sum(counts),
        parents=parents,
        progress=progress,
        files=_files.DEFAULT,
    )


def _saved_groups(
    cache: Any, allocator: BlockAllocator, state: AllocatorState
) -> tuple[SavedGroup, ...]:
    """What the header says of the groups of layers; nothing if there is one."""
    if not state.groups:
        return ()
    layers = [spec.layers for spec in cache.layout.groups]
    counts = [state.num_pages, *(group.num_pages for group in state.groups)]
    windows = [window for _, window in allocator.pools]
    return tuple(map(SavedGroup, windows, counts, layers))


def marked_fingerprint(allocator: BlockAllocator) -> bytes:
    """The fingerprint, and behind it what the weights are called if they were replaced."""
    return allocator.fingerprint + (GENERATION + allocator.weights if allocator.weights else b"")


def _checked_parent(
    parent: Snapshot,
    path: Path,
    allocator: BlockAllocator,
    parts: list[Part],
    groups: tuple[SavedGroup, ...],
) -> tuple[Parent, tuple[str, ...]]:
    """What a delta at `path` says of its parent, and the real paths of all files that it needs.

    Raises:
      TypeError, ValueError: it is no snapshot, or a reader of that delta would not find them.
    """
    if not isinstance(parent, Snapshot):
        raise TypeError(
            f"parent must be a Snapshot, got {type(parent).__name__}: pass what save_snapshot "
            "returned, the `snapshot` of a load, or the result() of a pending one"
        )
    if parent._allocator is not allocator:
        raise ValueError("parent is a snapshot of another allocator; save a whole snapshot")
    here, there = os.path.realpath(path), os.path.realpath(parent.path)
    needed = (there, *parent._parents)
    if len(needed) > MAX_PARENTS:
        raise ValueError(
            f"a delta has at most {MAX_PARENTS} parents; save a whole snapshot now and then"
        )
    if here in needed:
        raise ValueError(
            f"a delta cannot replace its parent {printable(here)}; give it its own name"
        )
    folder = os.path.dirname(here)  # where a reader looks: beside the file itself, not a link to it
    names = (os.path.basename(there), parent.path.name)
    name = next((n for n in names if os.path.realpath(os.path.join(folder, n)) == there), None)
    if name is None:
        raise ValueError(
            f"a delta must lie in the folder of its parent, {printable(os.path.dirname(there))}"
        )
    if not is_plain_name(name):
        raise ValueError(f"the parent's name {shown(name)} cannot be stored; rename the file")
    _require_unchanged(there, parent, parts, groups)
    return Parent(parent.id, name, len(parent._stamps[0])), needed


def _require_unchanged(
    path: str, parent: Snapshot, parts: list[Part], groups: tuple[SavedGroup, ...]
) -> None:
    """Raise ValueError unless the parent and all that it needs lie there, with arrays and groups as
    these."""
    WRITER.wait_for(path)  # it may be about to be replaced
    where, older = Path(path), Parent(parent.id, "", 0)
    files: list[SnapshotFile] = []
    while older is not None:
        if (file := _file_with(older.id, where)) is None:
            raise ValueError(
                f"{printable(where)} is no longer the snapshot that the delta needs: it was "
                "removed or replaced; save a whole snapshot"
            )
        files.append(file)
        if (older := file.header.parent) is not None:
            where = file.real.parent / older.name
    arrays = files[0].header.arrays
    theirs = {s.name: (s.dtype, s.shape[1:]) for s in arrays if s.name.startswith("kv/")}
    if theirs != {part.name: (part.dtype, part.shape) for part in parts}:
        raise ValueError(
            f"{printable(path)}, the parent, has other arrays of keys and values than this cache; "
            "save a whole snapshot"
        )
    theirs, ours = (
        [(g.window, g.layers) for g in each] for each in (files[0].header.groups, groups)
    )
    if theirs != ours:
        raise ValueError(
            f"{printable(path)}, the parent, has other groups of layers than this cache; save a "
            "whole snapshot"
        )


def _file_with(ident: bytes, path: Path) -> SnapshotFile | None:
    """What the file says, closed again; None if it is not there, or another one by now."""
    try:
        with SnapshotFile(path) as file:
            return file if file.id == ident else None
    except (OSError, SnapshotError):
        return None


def _positions(stamps: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """int64: where each wanted stamp is in `stamps`; -1 if it is not, or is -1 itself.

    A stamp is given once in the life of an allocator, so equal stamps are equal bits; -1 is of a
    page that may still be written.
    """
    if len(stamps) == 0:
        return np.full(len(wanted), -1)
    order = stamps.argsort(kind="stable")
    at = order[np.searchsorted(stamps, wanted, sorter=order).clip(max=len(stamps) - 1)]
    return np.where((stamps[at] == wanted) & (wanted >= 0), at, -1)
