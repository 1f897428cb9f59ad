"""The bookkeeping out of an allocator as plain arrays."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from .companions import Companions
from .group_state import GroupState
from .groups import PageGroup
from .pool import PagePool
from .prefix import CacheEntry, PrefixCache
from .rows import RowTable
from .state import AllocatorState

__all__ = ["StatePages", "collect_state"]


@dataclass(frozen=True, slots=True)
class StatePages:
    """Where the M pages of an exported state lie in its pool.

    Attributes:
      pages: int32 `[M]`, page ids.
      filled: int64 `[M]`, leading slots that hold something.
      stamps: int64 `[M]`, never given twice by one allocator: as long as a page has its stamp, its
        keys and values are what they were. -1 where they may still change.
      groups: the same of the other groups of layers.
    """

    pages: np.ndarray
    filled: np.ndarray
    stamps: np.ndarray
    groups: "tuple[StatePages, ...]" = ()


def collect_state(
    main: PageGroup[PrefixCache],
    others: Sequence[PageGroup[Companions]],
    rows: RowTable,
    row: np.ndarray,
    *,
    cached: bool,
    committed_only: bool,
) -> tuple[AllocatorState, StatePages]:
    """Export the sequences of these rows, and the pages that are only cached if `cached`."""
    groups, pool = (main, *others), main.pool
    length, page_size = rows.length[row], pool.page_size
    counts = -(-length // page_size)
    spans = [_span(group, row, counts) for group in groups]
    held = [_held(group, row, *span) for group, span in zip(groups, spans, strict=True)]
    owned = held[0]
    _, first = np.unique(owned, return_index=True)
    entries, parents = _reachable(pool, None if cached else set(owned.tolist()))
    listed = np.array([entry.page for entry in entries], np.int32)
    pages = np.concatenate([owned[np.sort(first)], listed[~np.isin(listed, owned)]])
    place = np.zeros(len(pool.refs), np.int32)
    place[pages] = np.arange(len(pages))

    spoilt = _spoilt(groups, spans, held) | (rows.private[row] != 0)
    salts = _Salts()
    state = AllocatorState(
        page_size=page_size,
        lengths=length,
        computed=np.where(spoilt, 0, rows.computed[row]),
        cached=rows.cached[row],
        salts=np.array([salts.index(rows.namespaces[r].key) for r in row], np.int32),
        table=place[owned],
        entry_pages=place[listed],
        entry_parents=np.array(
            [-1 - salts.index(p) if isinstance(p, bytes) else p for p in parents], np.int32
        ),
        salt_keys=tuple(salts.keys),  # after everything that may add one
        evictable=_eviction_order(pool, entries, set(owned.tolist())),
        tokens=pool.tokens[pages],
    )
    valid = state.computed if committed_only else state.lengths
    where, elsewhere = _locate(pool, state.first_group, pages, state, valid), []
    for group in others:
        its, ids = _collect_group(group, row, state, spoilt, entries, cached=cached)
        state = replace(state, groups=(*state.groups, its))
        elsewhere.append(_locate(group.pool, its, ids, state, valid))
    state.tokens[state.empty_slots] = 0
    return state, replace(where, groups=tuple(elsewhere))


def _span(group: PageGroup, row: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The columns that rows hold in a group, reserved pages left out."""
    return group.table.first[row], np.minimum(group.table.end[row], counts)


def _held(group: PageGroup, row: np.ndarray, first: np.ndarray, end: np.ndarray) -> np.ndarray:
    """int32 `[n]`: the pages of rows in these columns, row by row."""
    ids, counts = group.table.ids, end - first
    begins = row * ids.shape[1] + first - (counts.cumsum() - counts)
    return ids.reshape(-1).take(np.arange(counts.sum()) + np.repeat(begins, counts))


def _spoilt(
    groups: Sequence[PageGroup],
    spans: list[tuple[np.ndarray, np.ndarray]],
    held: list[np.ndarray],
) -> np.ndarray:
    """bool `[Q]`: who holds a page whose content may be wrong.

    It is not computed, for whoever holds it: as all are published that are, whoever imports it
    would find it again.
    """
    spoilt = np.zeros(len(spans[0][0]), bool)
    for group, (first, end), pages in zip(groups, spans, held, strict=True):
        owner = np.repeat(np.arange(len(spoilt)), end - first)
        spoilt[owner[group.pool.withdrawn[pages]]] = True
    return spoilt


def _collect_group(
    group: PageGroup[Companions],
    row: np.ndarray,
    state: AllocatorState,
    spoilt: np.ndarray,
    entries: list[CacheEntry],
    *,
    cached: bool,
) -> tuple[GroupState, np.ndarray]:
    """What rows have in another group, and which of its pages go with the entries.

    Of a window, who is computed anew has nothing: what was passed is gone.
    """
    first, end = _span(group, row, state.page_counts)
    if group.window is not None:
        first, end = (np.where(spoilt, 0, each) for each in (first, end))
    table, cache = _held(group, row, first, end), group.pool.cache
    pages = np.array([*map(cache.page_of, entries)], np.int32)
    known = pages > 0
    if not cached:
        known &= np.isin(pages, table)
    at = np.flatnonzero(known)
    order, span = cache.eviction.order(), (first, end)
    passed = set(filter(cache.eviction.has_passed, order))
    return GroupState.of(group.window, span, table, at, pages[at], order, passed)


class _Salts:
    """Numbers for namespace keys, in the order in which they are first asked for."""

    def __init__(self) -> None:
        self.keys: dict[bytes, int] = {}

    def index(self, key: bytes) -> int:
        return self.keys.setdefault(key, len(self.keys))


def _reachable(
    pool: PagePool[PrefixCache], within: set[int] | None
) -> tuple[list[CacheEntry], list[int | bytes]]:
    """Entries that can be found, on the pages `within`, parents first; and the place of each one's
    parent, or its namespace key."""
    entries: list[CacheEntry] = []
    parents: list[int | bytes] = []
    places: dict[int, int] = {}
    for entry in sorted(pool.cache.by_page.values(), key=lambda e: e.serial):
        parent = entry.parent if isinstance(entry.parent, bytes) else places.get(entry.parent)
        if parent is None or (within is not None and entry.page not in within):
            continue
        places[entry.serial] = len(entries)
        entries.append(entry)
        parents.append(parent)
    return entries, parents


def _eviction_order(
    pool: PagePool[PrefixCache], entries: list[CacheEntry], owned: set[int]
) -> np.ndarray:
    """Entries on pages that the state has no owner for. Pages that others own come last."""
    idle = {entry.page: at for at, entry in enumerate(entries) if entry.page not in owned}
    order = [*(page for page in pool.cache.eviction.order() if page in idle), *idle]
    return np.array([idle[page] for page in dict.fromkeys(order)], np.int32)


def _locate(
    pool: PagePool,
    group: GroupState,
    pages: np.ndarray,
    state: AllocatorState,
    valid: np.ndarray,
) -> StatePages:
    filled = group.filled(valid, state.page_size)
    # Owners outside the state may be about to write a page of it that is not full for them.
    exported = np.bincount(group.table, minlength=len(pages))
    settled = group.settled(state.computed, state.page_size)
    final = settled & (pool.refs[pages] <= exported)
    return StatePages(pages, filled, np.where(final, pool.stamps[pages], -1))
