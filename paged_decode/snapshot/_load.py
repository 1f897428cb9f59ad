"""Loading: check all, stage all, and only then touch the cache and the allocator."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, SupportsIndex

import numpy as np

from .._text import printable, shown
from ..allocator import AllocatorState, BlockAllocator, Handle
from ..allocator.prefix import salt_key
from ..allocator.regrouping import regrouped
from ..errors import OutOfPages, SnapshotMismatch
from ._about import about
from ._behind import Snapshot
from ._format import DTYPES, ArraySpec, Scalar
from ._fresh import as_pool_sizes, new_pools
from ._groups import GroupMismatch, match_groups
from ._in import prepare_insert
from ._open import Opened
from ._parts import Part, parts_of
from ._reader import Chain, Progress, fresh_arrays, read_all
from ._save import GENERATION, marked_fingerprint

__all__ = [
    "AS_SAVED",
    "Restored",
    "SavedSalt",
    "Terms",
    "import_sequence",
    "load_snapshot",
    "place_snapshot",
]


@dataclass(frozen=True, slots=True)
class Restored:
    """What `load_snapshot` made.

    Attributes:
      cache: use it instead of the one that was passed in.
      allocator: the one that was passed in, or a new one.
      handles: of the sequences, in the order of the file.
      pages_loaded: pages taken from the pool, or from those of all groups of layers.
      pages_dropped: cached pages that had no room, or were not wanted on the terms of the call.
      metadata: the user's.
      extra: the user's arrays, as NumPy ones, by the names that they were given.
      snapshot: name it as `parent` of a delta.
    """

    cache: Any
    allocator: BlockAllocator
    handles: tuple[Handle, ...]
    pages_loaded: int
    pages_dropped: int
    metadata: Mapping[str, Scalar]
    extra: dict[str, np.ndarray]
    snapshot: Snapshot

    @property
    def handle(self) -> Handle:
        """That of the only sequence; ValueError if there are none or several."""
        if len(self.handles) != 1:
            raise ValueError(f"the snapshot has {len(self.handles)} sequences; use handles")
        return self.handles[0]


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


def load_snapshot(
    path: str | os.PathLike[str],
    cache: Any = None,
    allocator: BlockAllocator | None = None,
    *,
    num_pages: SupportsIndex | Iterable[SupportsIndex] | None = None,
    accept_fingerprint: bytes | None = None,
    cache_salt: str | bytes | SavedSalt | None = AS_SAVED,
    prefix_cache: bool = True,
    progress: Progress | None = None,
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
      cache: is donated: use the one that comes back. Without it and the allocator both are made as
        the file says, with its fingerprint, the cache on JAX's default device.
      allocator: of that cache.
      num_pages: of the pool that is made, the null page included, so that there is room to go on;
        of several groups of layers one number for all, or one for each. None: what the file needs.
      accept_fingerprint: take a snapshot with exactly this fingerprint, although the allocator has
        another one, or has got new weights since (`BlockAllocator.new_weights`).
      cache_salt: put every sequence and cached page under this salt (None is one, too), whatever
        the file says; of two pages of one prefix the first stays. As it is, the file's own hold.
      prefix_cache: False takes the sequences alone, and they are private: nothing that they hold is
        found by others, now or when they grow or are forked.
      progress: called with bytes of pages read and those in all, by the threads that read, one at a
        time. If it raises, so does the call, and nothing has changed.

    Raises:
      TypeError, ValueError: an argument is not what it should be, or a cache is given without an
        allocator, or the other way round.
      SnapshotCorrupt, SnapshotVersion: the file is not a sound snapshot.
      SnapshotMismatch: it does not fit this cache, model or parent; all differences are listed.
      OutOfPages: the sequences need more pages than are free and evictable in its `group`.
      OSError: the file cannot be read.
    """
    target = Target(cache, allocator, num_pages)
    terms = Terms(accept_fingerprint, cache_salt, prefix_cache)
    with Opened(path) as opened:
        return place_snapshot(opened, *target.pools(opened, terms), terms, progress)


def import_sequence(
    path: str | os.PathLike[str],
    cache: Any = None,
    allocator: BlockAllocator | None = None,
    *,
    num_pages: SupportsIndex | Iterable[SupportsIndex] | None = None,
    accept_fingerprint: bytes | None = None,
    cache_salt: str | bytes | SavedSalt | None = AS_SAVED,
    prefix_cache: bool = True,
    progress: Progress | None = None,
) -> Restored:
    """Load a snapshot of one sequence, whose handle is `Restored.handle`; all else as
    `load_snapshot`.

    Raises:
      SnapshotMismatch: the file holds no or several sequences; else as `load_snapshot`.
    """
    target = Target(cache, allocator, num_pages)
    terms = Terms(accept_fingerprint, cache_salt, prefix_cache)
    with Opened(path) as opened:
        count = len(opened.state.lengths)
        if count != 1:
            with about(path):
                raise SnapshotMismatch(f"it holds {count} sequences, not one; use load_snapshot")
        return place_snapshot(opened, *target.pools(opened, terms), terms, progress)


class Target:
    """Where a file goes: to pools of the caller, or to new ones.

    Raises:
      TypeError, ValueError: as `load_snapshot`.
    """

    def __init__(
        self,
        cache: Any,
        allocator: BlockAllocator | None,
        num_pages: SupportsIndex | Iterable[SupportsIndex] | None,
    ):
        if (cache is None) != (allocator is None):
            given, missing = ("allocator", "cache") if cache is None else ("cache", "allocator")
            raise TypeError(
                f"there is {given}, but no {missing}: pass both, or neither to get new ones"
            )
        self._given = None if allocator is None else (cache, allocator)
        self._sizes = as_pool_sizes(num_pages)
        if self._given is not None and num_pages is not None:
            raise TypeError("num_pages is of a pool that is made: give no cache and no allocator")

    def pools(self, opened: Opened, terms: Terms) -> tuple[Any, BlockAllocator]:
        """The cache and the allocator."""
        return self._given or new_pools(opened, self._sizes, terms.accept_fingerprint)


def place_snapshot(
    opened: Opened,
    cache: Any,
    allocator: BlockAllocator,
    terms: Terms,
    progress: Progress | None = None,
) -> Restored:
    """The second half of `load_snapshot`.

    Raises:
      GroupMismatch: the groups of layers are all that does not fit.
    """
    parts = parts_of(cache, allocator)
    sources = _require_match(opened, parts, allocator, terms.accept_fingerprint)
    whole, places = _in_groups(opened.state, allocator, sources)
    state, kept = _fit(terms, whole, allocator)
    kept = [place[some] for place, some in zip(places, kept, strict=True)]
    extra = opened.read_extra()
    insert = prepare_insert(cache, parts, stage_pages(opened.chain, parts, kept, progress))
    pages: list[list[int]] = []
    try:
        for group, its in enumerate((state, *state.groups)):
            pages.append(allocator.allocate_pages(its.num_pages, group=group))
        cache = insert(pages) if any(pages) else cache
        named = pages if state.groups else pages[0]
        handles = allocator.import_state(state, named, private=not terms.prefix_cache)
    except BaseException:  # an interrupt too: raw pages have no other owner
        for group, its in enumerate(pages):
            allocator.free_pages(its, group=group)
        raise
    return Restored(
        cache=cache,
        allocator=allocator,
        handles=tuple(handles),
        pages_loaded=sum(map(len, pages)),
        pages_dropped=sum(map(len, places)) - sum(map(len, pages)),
        metadata=opened.chain.header.metadata,
        extra=extra,
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


def stage_pages(
    chain: Chain, parts: list[Part], kept: list[np.ndarray], progress: Progress | None
) -> list[np.ndarray]:
    """All pages in host memory, those of its group for every part, their checksums compared."""
    staged = fresh_arrays(
        ((len(kept[part.group]), *part.shape), DTYPES[part.dtype]) for part in parts
    )
    each = zip(parts, staged, strict=True)
    reads = (r for part, out in each for r in chain.reads(part.name, kept[part.group], out))
    read_all(reads, progress)
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
        with about(opened.chain.files[0].path):
            raise kind("; ".join(problems + widened))
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
