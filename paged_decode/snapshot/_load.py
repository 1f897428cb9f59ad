"""Loading: check all, stage all, and only then touch the cache and the allocator."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np

from .._text import printable, shown
from ..allocator import AllocatorState, BlockAllocator, Handle
from ..allocator.layout import require_one_group
from ..allocator.prefix import salt_key
from ..errors import OutOfPages, SnapshotCorrupt, SnapshotMismatch
from ._engine import ENGINE, EngineState, engine_from
from ._files import Files, OSFiles
from ._format import DTYPES, ArraySpec, Header, Parent, Scalar, encode_header
from ._pages import prepare_insert
from ._parts import Part, parts_of
from ._reader import Chain, Progress, SnapshotFile, chunk_bytes, fresh_arrays, read_all
from ._save import GENERATION, Snapshot, marked_fingerprint
from ._state import STATE, require_shapes, state_from
from ._writer import array_chunks, write_file

__all__ = [
    "AS_SAVED",
    "Restored",
    "SavedSalt",
    "SnapshotInfo",
    "compact_snapshot",
    "inspect_snapshot",
    "load_snapshot",
    "verify_snapshot",
]


@dataclass(frozen=True, slots=True)
class SnapshotInfo:
    """What a snapshot file says about itself.

    Attributes:
      path, id: the file, and 16 bytes that name its content.
      file_bytes: its size.
      page_size: tokens per page.
      num_pages: pages that it consists of; own_pages of them are in this file.
      sequences, tokens, cached_pages: how many; tokens of shared pages count for each sequence.
      requests: samples of an engine, running and waiting; None without an engine.
      fingerprint: of the allocator that was saved.
      metadata: the user's.
      parent: the snapshot that it is a delta of, or None.
      arrays: the arrays of the file.
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


@dataclass(frozen=True, slots=True)
class Restored:
    """What `load_snapshot` made.

    Attributes:
      cache: use it instead of the one that was passed in.
      handles: of the sequences, in the order of the file.
      pages_loaded: pages taken from the pool.
      pages_dropped: cached pages that had no room, or were not wanted on the terms of the call.
      metadata: the user's.
      snapshot: name it as `parent` of a delta.
    """

    cache: Any
    handles: tuple[Handle, ...]
    pages_loaded: int
    pages_dropped: int
    metadata: Mapping[str, Scalar]
    snapshot: Snapshot


class SavedSalt(Enum):
    """The salts that the file names."""

    AS_SAVED = "as saved"


AS_SAVED = SavedSalt.AS_SAVED


@dataclass(frozen=True, slots=True)
class Terms:
    """On which terms a file is taken: arguments of `load_snapshot`, checked."""

    accept_fingerprint: bytes | None = None
    cache_salt: str | bytes | SavedSalt | None = AS_SAVED
    prefix_cache: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.accept_fingerprint, bytes | None):
            kind = type(self.accept_fingerprint).__name__
            raise TypeError(f"accept_fingerprint must be bytes or None, got {kind}")
        if not isinstance(self.cache_salt, SavedSalt):
            salt_key(self.cache_salt)
        if not isinstance(self.prefix_cache, bool):
            raise TypeError(f"prefix_cache must be a bool, got {self.prefix_cache!r}")


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
            try:
                self._check_pages(older)
                self.state, self.engine = _bookkeeping(older)
            except SnapshotCorrupt as error:
                if str(error).startswith(str(older)):
                    raise
                raise SnapshotCorrupt(f"{older}: {error}") from None

    def _check_pages(self, file: SnapshotFile) -> None:
        header = file.header
        kv = [s for s in header.arrays if s.name.startswith("kv/")]
        theirs, ours = ({s.name: (s.dtype, s.shape[1:]) for s in each} for each in (kv, self.kv))
        if theirs != ours:
            raise SnapshotMismatch(
                f"{file}, a parent, has other arrays of keys and values than its delta"
            )
        if header.page_size != self.chain.header.page_size:
            raise SnapshotMismatch(f"{file}, a parent, has another page size than its delta")

    def info(self) -> SnapshotInfo:
        file, header, state = self.chain.files[0], self.chain.header, self.state
        return SnapshotInfo(
            path=file.path,
            id=file.id,
            file_bytes=file.file_bytes,
            page_size=header.page_size,
            num_pages=header.num_pages,
            own_pages=int((self.chain.place[:, 0] == 0).sum()),
            sequences=len(state.lengths),
            tokens=int(state.lengths.sum()),
            cached_pages=state.num_pages - state.num_owned,
            requests=None if self.engine is None else len(self.engine.samples),
            fingerprint=header.fingerprint,
            metadata=header.metadata,
            parent=header.parent,
            arrays=header.arrays,
        )

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, *_: Any) -> None:
        self.chain.close()


def _bookkeeping(file: SnapshotFile) -> tuple[AllocatorState, EngineState | None]:
    """What one file says besides its pages, all of it checked."""
    names = [s.name for s in file.header.arrays]
    extra = any(name.startswith("engine/") for name in names)
    require_shapes(file.specs, STATE)
    if extra:
        require_shapes(file.specs, ENGINE)
    kv = sum(name.startswith("kv/") for name in names)
    if kv + len(STATE) + len(ENGINE) * extra + (file.header.parent is not None) != len(names):
        raise SnapshotCorrupt("there are arrays that the format does not have")
    state = state_from({name: file.array(name) for name in STATE}, file.header.page_size)
    if not extra:
        return state, None
    return state, engine_from({name: file.array(name) for name in ENGINE}, state)


def load_snapshot(
    path: str | os.PathLike[str],
    *,
    into: tuple[Any, BlockAllocator],
    accept_fingerprint: bytes | None = None,
    cache_salt: str | bytes | SavedSalt | None = AS_SAVED,
    prefix_cache: bool = True,
) -> Restored:
    """Add the sequences and cached pages of a snapshot to a cache and its allocator.

    What they hold already stays. Pages get new numbers, so the pool may be larger, smaller or
    fragmented, on one device or many (heads split, as the cache is), its layers a tuple or a
    stack. Cached pages that have no room are left out, the ones evicted first before others.

    Nothing is changed before the file, and what it needs of its parents, is found sound and every
    page lies ready beside the cache; then one program per layer writes the pages. A device that has
    no room for all of them gets them in batches, once they are checked.

    A file chooses its salts, so any prompt that begins with its tokens may be answered from its
    pages. If it is not from you, and the allocator serves others, say `cache_salt` or
    `prefix_cache=False`.

    Args:
      path: the file; its parents lie in the same folder.
      into: the cache, which is donated, and its allocator.
      accept_fingerprint: take a snapshot with exactly this fingerprint, although the allocator has
        another one, or has got new weights since (`BlockAllocator.new_weights`).
      cache_salt: put every sequence and cached page under this salt (None is one, too), whatever
        the file says; of two pages of one prefix the first stays. As it is, the file's own hold.
      prefix_cache: False takes the sequences alone, and they are private: nothing that they hold is
        found by others, now or when they grow or are forked.

    Raises:
      ValueError, TypeError: `cache_salt` is none, or `prefix_cache` no bool.
      SnapshotCorrupt, SnapshotVersion: the file is not a sound snapshot.
      SnapshotMismatch: it does not fit this cache, model or parent; all differences are listed.
      OutOfPages: the sequences need more pages than are free and evictable.
      OSError: the file cannot be read.
    """
    terms = Terms(accept_fingerprint, cache_salt, prefix_cache)
    with Opened(path) as opened:
        cache, allocator = into
        return place_snapshot(opened, cache, allocator, terms)


def place_snapshot(opened: Opened, cache: Any, allocator: BlockAllocator, terms: Terms) -> Restored:
    """The second half of `load_snapshot`."""
    require_one_group(allocator.pools, "a snapshot")
    parts = parts_of(cache, allocator.num_pages)
    _require_match(opened, parts, allocator, terms.accept_fingerprint)
    state, kept = _fit(terms, opened.state, allocator)
    insert = prepare_insert(cache, parts, stage_pages(opened.chain, parts, kept))
    pages = allocator.allocate_pages(state.num_pages)
    try:
        cache = insert(pages) if pages else cache
        handles = allocator.import_state(state, pages, private=not terms.prefix_cache)
    except BaseException:
        allocator.free_pages(pages)
        raise
    stamps = np.full(opened.state.num_pages, -1)
    stamps[kept] = np.where(state.settled, allocator.page_stamps(pages), -1)
    file = opened.chain.files[0]
    return Restored(
        cache=cache,
        handles=tuple(handles),
        pages_loaded=len(pages),
        pages_dropped=opened.state.num_pages - len(pages),
        metadata=opened.chain.header.metadata,
        snapshot=Snapshot(
            path=file.path.absolute(),
            id=file.id,
            num_pages=len(stamps),
            written_pages=len(stamps),
            _allocator=allocator,
            _stamps=stamps,
            _parents=tuple(str(f.real) for f in opened.chain.files[1:]),
        ),
    )


def stage_pages(chain: Chain, parts: list[Part], kept: np.ndarray) -> list[np.ndarray]:
    """All pages in host memory, their checksums compared."""
    staged = fresh_arrays(((len(kept), *part.shape), DTYPES[part.dtype]) for part in parts)
    read_all(
        read
        for part, out in zip(parts, staged, strict=True)
        for read in chain.reads(part.name, kept, out)
    )
    return staged


def _fit(
    terms: Terms, state: AllocatorState, allocator: BlockAllocator
) -> tuple[AllocatorState, np.ndarray]:
    """What is taken on these terms and has room, and which of the file's pages that are."""
    free, evictable = allocator.num_free, allocator.num_evictable
    if state.num_owned > free + evictable:
        raise OutOfPages(state.num_owned, free, evictable)
    kept = np.arange(state.num_pages)
    if not terms.prefix_cache:
        state, some = state.without_entries()
        kept = kept[some]
    if not isinstance(terms.cache_salt, SavedSalt):
        state, some = state.under(salt_key(terms.cache_salt))
        kept = kept[some]
    state, some = state.fit(free if allocator.prefix_cache else 0)
    return state, kept[some]


def _require_match(
    opened: Opened, parts: list[Part], allocator: BlockAllocator, accept: bytes | None
) -> None:
    header = opened.chain.header
    problems = []
    if header.page_size != allocator.page_size:
        problems.append(f"page_size is {header.page_size} in the file, {allocator.page_size} here")
    problems += _differences(opened.kv, parts)
    saved, ours = header.fingerprint, marked_fingerprint(allocator)
    # An allocator whose weights were not replaced has those that its fingerprint names.
    named = saved if allocator.weights else saved.partition(GENERATION)[0]
    if ours not in (saved, named) and accept != saved:
        problems.append(
            f"the fingerprint is {shown(saved)} in the file, {shown(ours)} here: "
            "keys and values of another model, or from before new weights (pass accept_fingerprint "
            "to take them all the same)"
        )
    if problems:
        raise SnapshotMismatch(f"{opened.chain.files[0]}: " + "; ".join(problems))


def _differences(theirs: list[ArraySpec], ours: list[Part]) -> list[str]:
    saved = {s.name: (list(s.shape[1:]), s.dtype) for s in theirs}
    here = {p.name: (list(p.shape), p.dtype) for p in ours}
    missing, unknown = list(here.keys() - saved.keys()), list(saved.keys() - here.keys())
    problems = []
    for what, names in (("only here", missing), ("only in the file", unknown)):
        if names:
            problems.append(f"{len(names)} arrays are {what}, such as {printable(min(names))}")
    groups: dict[str, list[str]] = {}
    for name in saved.keys() & here.keys():
        if saved[name] != here[name]:
            (shape, dtype), (wanted, kind) = saved[name], here[name]
            difference = f"{shape} of {dtype} in the file, {wanted} of {kind} here"
            groups.setdefault(difference, []).append(name)
    for difference, names in groups.items():
        problems.append(f"a page of {printable(min(names))} ({len(names)} alike) is {difference}")
    return problems


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
    """`inspect_snapshot`, and compare every checksum of the file and of its parents."""
    with Opened(path) as opened:
        for file in opened.chain.files:
            file.verify(progress)
        return opened.info()


def compact_snapshot(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    progress: Progress | None = None,
    files: Files | None = None,
) -> SnapshotInfo:
    """Fold a delta and its parents to one whole snapshot, in place of `path` or at `out`.

    Deltas of `path` name its old content: after folding in place they are refused.

    Raises:
      SnapshotCorrupt, SnapshotVersion, SnapshotMismatch, OSError: as `load_snapshot`; OSError also
        if `out` is one of the parents, or cannot be written, or its header would be too long.
    """
    target = path if out is None else out
    with Opened(path) as opened:
        header, chain = opened.chain.header, opened.chain
        real = os.path.realpath(target)
        if any(str(parent.real) == real for parent in chain.files[1:]):
            text = f"this is a parent of {printable(path)}; others may need it: name another file"
            raise OSError(errno.EINVAL, text, str(target))
        specs, sources = [], []
        for spec in header.arrays:
            if spec.name == "pages/source":
                continue
            if spec.name.startswith("kv/"):
                whole = ArraySpec(spec.name, spec.dtype, (header.num_pages, *spec.shape[1:]))
                sources.append(_kv_chunks(chain, whole))
            else:
                whole = spec
                sources.append(array_chunks(chain.files[0].array(spec.name), spec))
            specs.append(whole)
        folded = Header(
            page_size=header.page_size,
            num_pages=header.num_pages,
            fingerprint=header.fingerprint,
            metadata=header.metadata,
            parent=None,
            arrays=tuple(specs),
        )
        try:
            encode_header(folded)  # the checksums of all pages may be too many for it
        except ValueError as error:
            raise OSError(errno.EFBIG, f"it cannot be folded: {error}", str(target)) from None
        write_file(target, folded, sources, files=files or OSFiles(), progress=progress)
    return inspect_snapshot(target)


def _kv_chunks(chain: Chain, spec: ArraySpec) -> Any:
    for chunk in range(spec.num_chunks):
        first = chunk * spec.chunk_rows
        count = chunk_bytes(spec, chunk) // spec.row_bytes
        out = np.empty((count, *spec.shape[1:]), DTYPES[spec.dtype])
        for read in chain.reads(spec.name, np.arange(first, first + count), out):
            read()
        yield out
