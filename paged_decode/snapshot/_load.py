"""Loading: check all, stage all, and only then touch the cache and the allocator."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np

from .._text import printable, shown
from ..allocator import AllocatorState, BlockAllocator, Handle
from ..allocator.prefix import salt_key
from ..allocator.regrouping import regrouped
from ..errors import OutOfPages, SnapshotCorrupt, SnapshotMismatch
from ._engine import ENGINE, EngineState, engine_from
from ._format import DTYPES, ArraySpec, Parent, SavedGroup, Scalar, layer_of
from ._groups import GroupMismatch, match_groups
from ._pages import prepare_insert
from ._parts import Part, parts_of
from ._reader import (
    Chain,
    Progress,
    SnapshotFile,
    fresh_arrays,
    read_all,
)
from ._save import GENERATION, Snapshot, marked_fingerprint
from ._state import require_shapes, state_from, state_names

__all__ = [
    "AS_SAVED",
    "Restored",
    "SavedSalt",
    "SnapshotInfo",
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
      num_pages: pages that it consists of, of all groups of layers; own_pages are in this file.
      sequences, tokens, cached_pages: how many; tokens of shared pages count for each sequence.
      groups: of layers: window, pages and layers of each.
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
    groups: tuple[SavedGroup, ...]


@dataclass(frozen=True, slots=True)
class Restored:
    """What `load_snapshot` made.

    Attributes:
      cache: use it instead of the one that was passed in.
      handles: of the sequences, in the order of the file.
      pages_loaded: pages taken from the pool, or from those of all groups of layers.
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
        )

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


def _bookkeeping(file: SnapshotFile) -> tuple[AllocatorState, EngineState | None]:
    """What one file says besides its pages, all of it checked."""
    names, wanted = [s.name for s in file.header.arrays], state_names(len(file.header.counts))
    extra = any(name.startswith("engine/") for name in names)
    require_shapes(file.specs, wanted)
    if extra:
        require_shapes(file.specs, ENGINE)
    kv = sum(name.startswith("kv/") for name in names)
    sources = len(file.header.counts) if file.header.parent else 0
    if kv + len(wanted) + len(ENGINE) * extra + sources != len(names):
        raise SnapshotCorrupt("there are arrays that the format does not have")
    state = state_from({name: file.array(name) for name in wanted}, file.header)
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
    stack. Cached pages that have no room are left out, the ones evicted first before others. A
    group of layers may be split, and may become a window or a narrower one: what that has passed is
    left out.

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
      OutOfPages: the sequences need more pages than are free and evictable in its `group`.
      OSError: the file cannot be read.
    """
    terms = Terms(accept_fingerprint, cache_salt, prefix_cache)
    with Opened(path) as opened:
        cache, allocator = into
        return place_snapshot(opened, cache, allocator, terms)


def place_snapshot(opened: Opened, cache: Any, allocator: BlockAllocator, terms: Terms) -> Restored:
    """The second half of `load_snapshot`.

    Raises:
      GroupMismatch: the groups of layers are all that does not fit.
    """
    parts = parts_of(cache, allocator)
    sources = _require_match(opened, parts, allocator, terms.accept_fingerprint)
    whole, places = _in_groups(opened.state, allocator, sources)
    state, kept = _fit(terms, whole, allocator)
    kept = [place[some] for place, some in zip(places, kept, strict=True)]
    insert = prepare_insert(cache, parts, stage_pages(opened.chain, parts, kept))
    pages: list[list[int]] = []
    try:
        for group, its in enumerate((state, *state.groups)):
            pages.append(allocator.allocate_pages(its.num_pages, group=group))
        cache = insert(pages) if any(pages) else cache
        named = pages if state.groups else pages[0]
        handles = allocator.import_state(state, named, private=not terms.prefix_cache)
    except BaseException:
        for group, its in enumerate(pages):
            allocator.free_pages(its, group=group)
        raise
    return Restored(
        cache=cache,
        handles=tuple(handles),
        pages_loaded=sum(map(len, pages)),
        pages_dropped=sum(map(len, places)) - sum(map(len, pages)),
        metadata=opened.chain.header.metadata,
        snapshot=_as_parent(opened, allocator, state, kept, pages, sources),
    )


def _in_groups(
    state: AllocatorState, allocator: BlockAllocator, sources: list[int]
) -> tuple[AllocatorState, tuple[np.ndarray, ...]]:
    """The state in the groups of the allocator, whose pages come from these of its own; and which
    ones they are."""
    windows = [window for _, window in allocator.pools]
    return regrouped(state, list(zip(sources, windows, strict=True))[1:])


def _as_parent(
    opened: Opened,
    allocator: BlockAllocator,
    state: AllocatorState,
    kept: list[np.ndarray],
    pages: list[list[int]],
    sources: list[int],
) -> Snapshot:
    """What was loaded, as parent of a delta. One whose groups were others is the parent of none,
    and no page of it is known."""
    file, counts = opened.chain.files[0], opened.chain.header.counts
    stamps = [np.full(count, -1) for count in counts]
    windows = opened.chain.header.windows
    if sources == list(range(len(counts))) and windows == [w for _, w in allocator.pools]:
        each = zip(stamps, (state.first_group, *state.groups), strict=True)
        for group, (known, its) in enumerate(each):
            settled = its.settled(state.computed, state.page_size)
            here = allocator.page_stamps(pages[group], group=group)
            known[kept[group]] = np.where(settled, here, -1)
    return Snapshot(
        path=file.path.absolute(),
        id=file.id,
        num_pages=sum(counts),
        written_pages=sum(counts),
        _allocator=allocator,
        _stamps=tuple(stamps),
        _parents=tuple(str(f.real) for f in opened.chain.files[1:]),
    )


def stage_pages(chain: Chain, parts: list[Part], kept: list[np.ndarray]) -> list[np.ndarray]:
    """All pages in host memory, those of its group for every part, their checksums compared."""
    staged = fresh_arrays(
        ((len(kept[part.group]), *part.shape), DTYPES[part.dtype]) for part in parts
    )
    read_all(
        read
        for part, out in zip(parts, staged, strict=True)
        for read in chain.reads(part.name, kept[part.group], out)
    )
    return staged


def _fit(
    terms: Terms, state: AllocatorState, allocator: BlockAllocator
) -> tuple[AllocatorState, list[np.ndarray]]:
    """What is taken on these terms and has room, and which of its pages that are, of every
    group."""
    free, kept = [], []
    for group, its in enumerate((state, *state.groups)):
        stats = allocator.stats(group)
        if its.num_owned > stats.free + stats.evictable:
            raise OutOfPages(its.num_owned, stats.free, stats.evictable, group)
        free.append(stats.free if allocator.prefix_cache else 0)
        kept.append(np.arange(its.num_pages))
    if not terms.prefix_cache:
        state, some = state.without_entries()
        kept = [each[at] for each, at in zip(kept, some, strict=True)]
    if not isinstance(terms.cache_salt, SavedSalt):
        state, some = state.under(salt_key(terms.cache_salt))
        kept = [each[at] for each, at in zip(kept, some, strict=True)]
    state, some = state.fit(*free)
    return state, [each[at] for each, at in zip(kept, some, strict=True)]


def _require_match(
    opened: Opened, parts: list[Part], allocator: BlockAllocator, accept: bytes | None
) -> list[int]:
    """From which group of the file the pages of each of ours come."""
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
    sources, widened = match_groups(opened.groups, parts, allocator.pools)
    if problems or widened:
        kind = SnapshotMismatch if problems else GroupMismatch
        raise kind(f"{opened.chain.files[0]}: " + "; ".join(problems + widened))
    return sources


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
