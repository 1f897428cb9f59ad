"""The bookkeeping as plain arrays into an allocator."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from .arguments import Ints, as_ints
from .companions import Companions
from .errors import PageTableError
from .eviction import successor
from .group_state import GroupState
from .groups import PageGroup
from .hits import hang
from .pool import PagePool, Release
from .prefix import CacheEntry, Namespace, PrefixCache
from .rows import RowTable
from .state import AllocatorState
from .state_rules import check_state

__all__ = ["Adoption", "adopt_state", "checked_pages", "plan_adoption"]


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
      idle: of every group, pages without an owner in the state, the first to be evicted first.
      retired: what the order of eviction needs of each of them.
    """

    roots: list[Namespace]
    links: list[Link]
    chains: list[list[int]]
    idle: list[np.ndarray]
    retired: list[Any]


def checked_pages(
    groups: Sequence[PageGroup], state: AllocatorState, pages: Any
) -> list[np.ndarray]:
    """Of every group the raw pages that a caller names, all of them and the state checked."""
    windows, its = ([g.window for g in each] for each in (groups[1:], state.groups))
    if windows != its:
        raise PageTableError(
            f"the state's groups of layers have windows {[None, *its]}, those of this allocator "
            f"{[None, *windows]}"
        )
    each = [pages] if len(groups) == 1 else list(pages)
    if len(each) != len(groups):
        raise ValueError(f"pages must be page ids of {len(groups)} groups, got {len(each)}")
    if state.page_size != (size := groups[0].pool.page_size):
        raise PageTableError(f"page size {state.page_size} is not this pool's {size}")
    counts = [state.num_pages, *(group.num_pages for group in state.groups)]
    found = [_raw_pages(*one) for one in zip(groups, each, counts, strict=True)]
    check_state(state)
    return found


def _raw_pages(group: PageGroup, pages: Ints, count: int) -> np.ndarray:
    pool, ids = group.pool, as_ints("pages", pages)
    if ids.shape != (count,) or len(np.unique(ids)) != len(ids):
        raise ValueError(f"pages must be {count} different page ids, got {ids}")
    if ids.size and (ids.min() < 1 or ids.max() > pool.usable):
        raise ValueError(f"pages must be from 1 to {pool.usable}, got {ids}")
    if not pool.raw[ids].all():
        raise PageTableError("pages must be from allocate_pages, and not freed since")
    return ids


def plan_adoption(
    main: PageGroup[PrefixCache],
    others: Sequence[PageGroup[Companions]],
    state: AllocatorState,
    pages: Sequence[np.ndarray],
    *,
    caching: bool,
    private: bool,
) -> Adoption:
    """Plan what `adopt_state` does with raw pages; the state was checked. Changes nothing."""
    cache = main.pool.cache
    roots = [Namespace(key, cache.root_digest(key)) for key in state.salt_keys]
    links, chains = _links(cache, state, roots, public=not private) if caching else ([], [])
    chains = chains or [[] for _ in state.lengths]
    coming = {}
    for each in links[: len(state.entry_pages)]:
        found, page = cache.index.get(each.digest), int(pages[0][each.place])
        past = None if found is None else cache.eviction.known.get(found.page)
        coming[page] = successor(page, each.depth, past, each.digest)
    idle = [pages[0][state.entry_pages[state.evictable]]]
    retired: list[Any] = [cache.eviction.plan(idle[0].tolist(), coming) if caching else []]
    for group, its, ids in zip(others, state.groups, pages[1:], strict=True):
        gone, queue = ids[its.evicted_first], group.pool.cache.eviction
        if caching:  # who asks for the history of a page that is not published finds its depth
            theirs = [links[entry] for entry in its.entries[its.evictable].tolist()]
            queue.depths[gone] = [link.depth for link in theirs]
            queue.name(gone.tolist(), [link.digest for link in theirs])
        idle.append(gone)
        retired.append(queue.plan(gone[its.num_passed :].tolist()) if caching else [])
    return Adoption(roots, links, chains, idle, retired)


def _links(
    cache: PrefixCache, state: AllocatorState, roots: list[Namespace], *, public: bool
) -> tuple[list[Link], list[list[int]]]:
    """All pages to be published, of which the first are the state's entries; and, if sequences are
    `public`, those of every sequence."""
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

    entries = zip(state.entry_parents.tolist(), state.entry_pages.tolist(), strict=True)
    for parent, place in entries:
        link(parent, place)
    chains: list[list[int]] = [[] for _ in state.lengths]
    full = (state.computed // state.page_size).tolist() if public else [0] * len(chains)
    for chain, salt, places, count in zip(
        chains, state.salts.tolist(), state.tables, full, strict=True
    ):
        for place in places[:count].tolist():
            chain.append(link(chain[-1] if chain else -1 - salt, place))
    return links, chains


def adopt_state(
    main: PageGroup[PrefixCache],
    others: Sequence[PageGroup[Companions]],
    rows: RowTable,
    state: AllocatorState,
    pages: Sequence[np.ndarray],
    plan: Adoption,
    *,
    private: bool,
) -> list[int]:
    """Make sequences and cache entries of raw pages, which are raw no more; returns rows.

    Until the end each page keeps the owner that it was taken with, so that none of them can become
    free half way. There is room for the rows and their pages. All sequences begin at once, and
    until then the pages are raw: whatever is torn before is as if it had not begun.
    """
    pool, made, opened = main.pool, list[CacheEntry](), list[int]()
    pool.tokens[pages[0]] = state.tokens
    for place, digest, parent, depth in plan.links:
        before = plan.roots[-1 - parent].key if parent < 0 else made[parent].serial
        made.append(pool.publish(int(pages[0][place]), digest, before, depth))
    for q, (places, chain) in enumerate(zip(state.tables, plan.chains, strict=True)):
        row, held = rows.open(plan.roots[state.salts[q]]), pages[0][places]
        main.table.set(row, held)
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
    for group, its, ids in zip(others, state.groups, pages[1:], strict=True):
        if made:
            known = its.entries.tolist()
            depths = [plan.links[entry].depth for entry in known]
            hang(main, group, ids[its.entry_pages], [made[entry] for entry in known], depths)
        for row, places, first in zip(opened, its.tables, its.first.tolist(), strict=True):
            group.table.set(row, ids[places], first)
            group.pool.refs[ids[places]] += 1
            chain = rows.chains[row][first : first + len(places)]
            columns = range(first, first + len(chain))
            hang(main, group, ids[places[: len(chain)]], chain, columns)
    rows.enter(np.array(opened, np.int64))
    given_up = zip((main, *others), (state, *state.groups), pages, strict=True)
    for (group, its, ids), idle, retired in zip(given_up, plan.idle, plan.retired, strict=True):
        group.pool.raw[ids] = False
        group.pool.refs[ids[: its.num_owned]] -= 1
        passed = its.num_passed if isinstance(its, GroupState) else 0
        group.pool.pass_by(idle[:passed])
        _retire(group.pool, idle[passed:], retired)
    return opened


def _retire(pool: PagePool, idle: np.ndarray, retired: list[Any]) -> None:
    """Take the owner that pages were taken with from those that no sequence has. Those that were
    not published, because what they hold was there already, become free."""
    stays = pool.cache.published[idle]
    kept = _staying(retired, pool, idle)
    pool.release(Release(idle, np.zeros_like(idle), idle[~stays], kept))
    pool.peak_used = max(pool.peak_used, pool.num_used)


def _staying(retired: list[Any], pool: PagePool, idle: np.ndarray) -> list[Any]:
    """What the order of eviction needs of the pages that were published: each, or whole tails."""
    published = pool.cache.published
    if pool.number == 0:
        pairs = zip(retired, idle.tolist(), strict=False)
        return [each for each, page in pairs if published[page]]
    for tail in retired:
        tail.pages = {page: None for page in tail.pages if published[page]}
    return [tail for tail in retired if tail.pages]
