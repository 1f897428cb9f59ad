"""The bookkeeping out of one allocator as plain arrays, and into another."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from .eviction import Queued, successor
from .groups import PageGroup
from .pool import PagePool, Release
from .prefix import CacheEntry, Namespace
from .rows import RowTable
from .state import AllocatorState

__all__ = ["Adoption", "StatePages", "adopt_state", "collect_state", "plan_adoption"]


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
    group: PageGroup,
    rows: RowTable,
    row: np.ndarray,
    *,
    cached: bool,
    committed_only: bool,
) -> tuple[AllocatorState, StatePages]:
    """Export the sequences of these rows, and the pages that are only cached if `cached`."""
    pool, table = group.pool, group.table
    length, page_size = rows.length[row], pool.page_size
    counts = -(-length // page_size)
    begins = row * table.ids.shape[1] - (counts.cumsum() - counts)
    owned = table.ids.reshape(-1).take(np.arange(counts.sum()) + np.repeat(begins, counts))
    _, first = np.unique(owned, return_index=True)
    entries, parents = _reachable(pool, None if cached else set(owned.tolist()))
    listed = np.array([entry.page for entry in entries], np.int32)
    pages = np.concatenate([owned[np.sort(first)], listed[~np.isin(listed, owned)]])
    place = np.zeros(len(pool.refs), np.int32)
    place[pages] = np.arange(len(pages))

    # A page whose content may be wrong is not computed, for whoever holds it: as all are published
    # that are, whoever imports it would find it again.
    spoilt = np.zeros(len(row), bool)
    spoilt[np.repeat(np.arange(len(row)), counts)[pool.withdrawn[owned]]] = True
    salts = _Salts()
    state = AllocatorState(
        page_size=page_size,
        lengths=length,
        computed=np.where(spoilt | (rows.private[row] != 0), 0, rows.computed[row]),
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
    order = [*(page for page in pool.cache.eviction.order() if page in idle), *idle]
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


class Link(NamedTuple):
    """A page to be published: its number in the state, its digest, and the link before it.

    `parent` is an earlier link, or -1 - s: the page begins salt s.
    """

    place: int
    digest: bytes
    parent: int
    depth: int


class Adoption(NamedTuple):
    """What `import_state` will do: everything that calls a user's code is done.

    Attributes:
      roots: the namespace of every salt of the state.
      links: first those of the state's entries, then those that only sequences have.
      chains: the links of the full, computed pages of every sequence.
      idle: pages without an owner in the state, the first to be evicted first.
      retired: what the order of eviction needs of each of them.
    """

    roots: list[Namespace]
    links: list[Link]
    chains: list[list[int]]
    idle: np.ndarray
    retired: list[int] | list[Queued]


def plan_adoption(
    pool: PagePool, state: AllocatorState, pages: np.ndarray, *, caching: bool, private: bool
) -> Adoption:
    """Plan what `adopt_state` does with raw pages; the state was checked. Changes nothing."""
    cache = pool.cache
    roots = [Namespace(key, cache.root_digest(key)) for key in state.salt_keys]
    links: list[Link] = []
    known: dict[tuple[int, int], int] = {}  # a page that sequences share is digested once

    def link(parent: int, place: int) -> int:
        if (number := known.get((parent, place))) is None:
            before, depth = (
                (roots[-1 - parent].digest, 0)
                if parent < 0
                else (links[parent].digest, links[parent].depth + 1)
            )
            (digest,) = cache.digests(before, state.tokens[place : place + 1])
            number = known[parent, place] = len(links)
            links.append(Link(place, digest, parent, depth))
        return number

    if caching:
        for parent, place in zip(
            state.entry_parents.tolist(), state.entry_pages.tolist(), strict=True
        ):
            link(parent, place)
    coming = {}
    for each in links:
        found, page = cache.index.get(each.digest), int(pages[each.place])
        past = None if found is None else cache.eviction.known.get(found.page)
        coming[page] = successor(page, each.depth, past)
    chains: list[list[int]] = [[] for _ in state.lengths]
    if caching and not private:
        full = (state.computed // state.page_size).tolist()
        for chain, salt, places, count in zip(
            chains, state.salts.tolist(), state.tables, full, strict=True
        ):
            for place in places[:count].tolist():
                chain.append(link(chain[-1] if chain else -1 - salt, place))
    idle = pages[state.entry_pages[state.evictable]]
    retired = cache.eviction.plan(idle.tolist(), coming) if caching else []
    return Adoption(roots, links, chains, idle, retired)


def adopt_state(
    group: PageGroup,
    rows: RowTable,
    state: AllocatorState,
    pages: np.ndarray,
    plan: Adoption,
    *,
    private: bool,
) -> list[int]:
    """Make sequences and cache entries of raw pages, which are raw no more; returns rows.

    Until the end each page keeps the owner that it was taken with, so that none of them can become
    free half way. There is room for the rows and their pages. All sequences begin at once, and
    until then the pages are raw: whatever is torn before is as if it had not begun.
    """
    pool, made, opened = group.pool, list[CacheEntry](), []
    pool.tokens[pages] = state.tokens
    for place, digest, parent, depth in plan.links:
        before = plan.roots[-1 - parent].key if parent < 0 else made[parent].serial
        made.append(pool.publish(int(pages[place]), digest, before, depth))
    for q, (places, chain) in enumerate(zip(state.tables, plan.chains, strict=True)):
        row, held = rows.open(plan.roots[state.salts[q]]), pages[places]
        group.table.set(row, held)
        pool.refs[held] += 1
        rows.length[row], rows.cached[row] = state.lengths[q], state.cached[q]
        rows.computed[row], rows.private[row] = state.computed[q], private
        rows.describe(row, int(state.computed[q]))
        rows.chains[row] = [made[number] for number in chain]
        rows.digests[row] = [plan.links[number].digest for number in chain]
        rows.borrows[row] = any(
            e.page != p for e, p in zip(rows.chains[row], held.tolist(), strict=False)
        )
        rows.chain_seen[row] = -1  # entries of one import may have replaced each other
        opened.append(row)
    rows.enter(np.array(opened, np.int64))
    pool.raw[pages] = False
    pool.refs[pages[: state.num_owned]] -= 1
    stays = pool.cache.published[plan.idle]
    retired: list[Any] = [each for each, kept in zip(plan.retired, stays, strict=False) if kept]
    pool.release(Release(plan.idle, np.zeros_like(plan.idle), plan.idle[~stays], retired))
    pool.peak_used = max(pool.peak_used, pool.num_used)
    return opened
