"""The bookkeeping out of one allocator as plain arrays, and into another."""

from dataclasses import dataclass

import numpy as np

from .pool import PagePool
from .prefix import CacheEntry, Namespace, salt_of
from .publication import plan_publication, publish
from .sequences import SequenceTable
from .state import AllocatorState

__all__ = ["StatePages", "adopt_state", "collect_state"]


@dataclass(frozen=True, slots=True)
class StatePages:
    """Where the M pages of an exported state lie in its pool.

    Attributes:
      pages: int32 `[M]`, page ids.
      filled: int64 `[M]`, leading slots that hold something.
      stamps: int64 `[M]`, never given twice by one allocator: as long as a page has its stamp, its
        keys and values are what they were. -1 where they may still change.
    """

    pages: np.ndarray
    filled: np.ndarray
    stamps: np.ndarray


def collect_state(
    pool: PagePool,
    table: SequenceTable,
    row: np.ndarray,
    *,
    cached: bool,
    committed_only: bool,
) -> tuple[AllocatorState, StatePages]:
    """Export the sequences of these rows, and the pages that are only cached if `cached`."""
    length, page_size = table.length[row], pool.page_size
    counts = -(-length // page_size)
    begins = row * table.page_table.shape[1] - (counts.cumsum() - counts)
    owned = table.page_table.reshape(-1).take(np.arange(counts.sum()) + np.repeat(begins, counts))
    _, first = np.unique(owned, return_index=True)
    entries, parents = _reachable(pool, None if cached else set(owned.tolist()))
    listed = np.array([entry.page for entry in entries], np.int32)
    pages = np.concatenate([owned[np.sort(first)], listed[~np.isin(listed, owned)]])
    place = np.zeros(len(pool.refs), np.int32)
    place[pages] = np.arange(len(pages))

    salts = _Salts()
    state = AllocatorState(
        page_size=page_size,
        lengths=length,
        computed=np.where(table.private(row), 0, table.computed[row]),
        cached=table.cached[row],
        salts=np.array([salts.index(table.namespaces[r].key) for r in row], np.int32),
        table=place[owned],
        entry_pages=place[listed],
        entry_parents=np.array(
            [-1 - salts.index(p) if isinstance(p, bytes) else p for p in parents], np.int32
        ),
        salt_keys=tuple(salts.keys),  # after everything that may add one
        evictable=_eviction_order(pool, entries, set(owned.tolist())),
        tokens=pool.tokens[pages],
    )
    where = _locate(pool, state, pages, committed_only)
    state.tokens[state.empty_slots] = 0
    return state, where


class _Salts:
    """Numbers for namespace keys, in the order in which they are first asked for."""

    def __init__(self) -> None:
        self.keys: dict[bytes, int] = {}

    def index(self, key: bytes) -> int:
        return self.keys.setdefault(key, len(self.keys))


def _reachable(
    pool: PagePool, within: set[int] | None
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


def _eviction_order(pool: PagePool, entries: list[CacheEntry], owned: set[int]) -> np.ndarray:
    """Entries on pages that the state has no owner for. Pages that others own come last."""
    idle = {entry.page: at for at, entry in enumerate(entries) if entry.page not in owned}
    policy = pool.cache.policy
    known = policy if hasattr(policy, "__iter__") else ()
    order = [*(p for p in known if p in idle), *idle]  # type: ignore[union-attr]
    return np.array([idle[page] for page in dict.fromkeys(order)], np.int32)


def _locate(
    pool: PagePool, state: AllocatorState, pages: np.ndarray, committed_only: bool
) -> StatePages:
    valid = state.computed if committed_only else state.lengths
    filled = np.zeros(len(pages), np.int64)
    np.maximum.at(filled, state.table, state.slots_below(valid))
    filled[state.entry_pages] = state.page_size
    # Owners outside the state may be about to write a page of it that is not full for them.
    exported = np.bincount(state.table, minlength=len(pages))
    final = state.settled & (pool.refs[pages] <= exported)
    return StatePages(pages, filled, np.where(final, pool.stamps[pages], -1))


def adopt_state(
    pool: PagePool,
    table: SequenceTable,
    state: AllocatorState,
    pages: np.ndarray,
    *,
    caching: bool,
    private: bool,
) -> list[int]:
    """Make sequences and cache entries of pinned pages, which are pinned no more; returns rows.

    Everything was checked. Until the end each page keeps the owner that its pin was, so that none
    of them can become free half way.
    """
    table.ensure_rows(len(state.lengths))
    table.ensure_columns(int(state.page_counts.max(initial=0)))
    keys = [Namespace(key, pool.cache.root_digest(key)) for key in state.salt_keys]
    pool.pinned[pages] = False
    pool.tokens[pages] = state.tokens
    rows = []
    for q, places in enumerate(state.tables):
        held = pages[places]
        space = keys[state.salts[q]]
        row = table.open(space, salt_of(space.key), held)
        pool.refs[held] += 1
        table.length[row], table.cached[row] = state.lengths[q], state.cached[q]
        if private:
            table.make_private(row)
        rows.append(row)
    if caching:
        _publish_entries(pool, state, keys, pages)
    table.computed[rows] = state.computed
    if caching and not private:
        _publish_rows(pool, table, rows)
    pool.release(pages[: state.num_owned])
    pool.release(pages[state.entry_pages[state.evictable]][::-1])
    pool.peak_used = max(pool.peak_used, pool.num_used)
    return rows


def _publish_rows(pool: PagePool, table: SequenceTable, rows: list[int]) -> None:
    """Publish the full, computed pages of each row; a page that rows share is digested once."""
    known: dict[tuple[int | bytes, int], CacheEntry] = {}  # by the entry before it, and the page
    for row in rows:
        full = int(table.computed[row]) // pool.page_size
        pages, chain = table.pages(row)[:full].tolist(), table.chains[row]
        link: int | bytes = table.namespaces[row].key
        for page in pages:
            entry = known.get((link, page))
            if entry is None:
                break
            chain.append(entry)
            link, table.borrows[row] = entry.serial, table.borrows[row] or entry.page != page
        publish(pool, table, plan_publication(pool, table, row, full))
        links = [table.namespaces[row].key, *(entry.serial for entry in chain)]
        known.update(zip(zip(links, pages, strict=False), chain, strict=True))


def _publish_entries(
    pool: PagePool, state: AllocatorState, keys: list[Namespace], pages: np.ndarray
) -> None:
    made: list[CacheEntry] = []
    depths: list[int] = []
    for page, parent in zip(
        pages[state.entry_pages].tolist(), state.entry_parents.tolist(), strict=True
    ):
        before = keys[-1 - parent].digest if parent < 0 else made[parent].digest
        link = keys[-1 - parent].key if parent < 0 else made[parent].serial
        depths.append(0 if parent < 0 else depths[parent] + 1)
        (digest,) = pool.cache.digests(before, pool.tokens[page : page + 1])
        made.append(pool.publish(page, digest, link, depths[-1]))
