"""Hits over groups of layers, and what makes them: full pages that are computed in all of them.

Only the first group's pages are found by their tokens; a page of another group is published as the
companion of the entry of the same column. A sequence can go on from a column if every group has
companions for what its next query sees:

```
W 6, S 4: a query at the start of a page sees two pages before it

column              0     1     2     3     4
entries             x     x     x     x     x     found: 5 columns
companions          .     x     x     .     x     served: 3 columns, with the companions 1 and 2
```

An entry that is forgotten takes its companions along. A companion that is evicted leaves the entry:
who computes that page again finds the entry, and hangs a page of its own on it.
"""

from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter
from typing import NamedTuple

import numpy as np

from .companions import Companions
from .eviction import CachedPage
from .groups import PageGroup
from .prefix import CacheEntry, Namespace, PrefixCache
from .rows import RowTable
from .tails import Tail
from .windows import require_room

__all__ = ["Match", "hang", "longest_hit", "plan_priorities", "plan_start", "with_rest_of_tails"]

Others = Sequence[PageGroup[Companions]]


class Match(NamedTuple):
    """What is known of a prompt: where its chain of pages begins, the entries of its leading full
    pages, and how many of these columns all groups can serve."""

    root: Namespace
    entries: list[CacheEntry]
    served: int


class Hit(NamedTuple):
    """What a new sequence shares in one group: int32 `[n]` pages of columns from `first` on.

    `revived` is how many of them have no owner now.
    """

    first: int
    pages: np.ndarray
    revived: int


_NO_HIT = Hit(0, np.empty(0, np.int32), 0)
_own_page = attrgetter("page")


def longest_hit(entries: Sequence[CacheEntry], others: Others) -> int:
    """How many leading columns, of those with these entries, all of the other groups can serve."""
    end = len(entries)
    begins = [end] * len(others)  # from there to `end` each of them has every companion
    while True:
        before = end
        for number, group in enumerate(others):
            begin, needed = min(begins[number], end), max(0, end - group.lookback)
            page_of = group.pool.cache.page_of
            while begin > needed and page_of(entries[begin - 1]):
                begin -= 1
            if begin > needed:  # the one before is missing, so nothing behind it can be served
                end = begin = begin - 1
            begins[number] = begin
        if end == before:
            return end


def plan_start(
    main: PageGroup[PrefixCache],
    others: Others,
    entries: Sequence[CacheEntry],
    served: int,
    ends: Sequence[int],
    keep_free: Sequence[int],
) -> Callable[[int], None]:
    """Plan the pages of a new sequence: groups share the columns that all can serve, and have new
    pages for those from there to `ends`, with so many kept free. Returns what gives them to a row.

    Raises:
      OutOfPages, SequenceTooLong: a pool has not so many, or never.
    """
    starts: list[tuple[PageGroup, Hit, int]] = []
    for group, end, kept in zip((main, *others), ends, keep_free, strict=True):
        hit = _plan_hit(group, entries, served)
        require_room(group, end - hit.first)
        group.pool.require(end - served + hit.revived + kept)
        starts.append((group, hit, end - served))
    windows = [group for group in others if group.window is not None]
    branches = [_plan_branches(main, group, entries, served) for group in windows]

    def apply(row: int) -> None:
        for group, hit, _ in starts if served else ():
            group.pool.share(hit.pages)  # first: from here on none is evicted for new pages
        for each in branches:
            each()
        for group, hit, count in starts:
            group.table.set(row, np.concatenate([hit.pages, group.pool.take(count)]), hit.first)

    return apply


def _plan_hit(group: PageGroup, entries: Sequence[CacheEntry], end: int) -> Hit:
    """What there is to share of the first `end` columns, which the group can serve."""
    if not end:
        return _NO_HIT
    first, cache = max(0, end - group.lookback), group.pool.cache
    page_of = cache.page_of if isinstance(cache, Companions) else _own_page
    pages = np.array([*map(page_of, entries[first:end])], np.int32)
    return Hit(first, pages, int(np.count_nonzero(group.pool.refs.take(pages) == 0)))


def _plan_branches(
    main: PageGroup[PrefixCache],
    group: PageGroup[Companions],
    entries: Sequence[CacheEntry],
    end: int,
) -> Callable[[], None]:
    """Plan to keep what lies before the columns where sequences part, whoever passes it.

    They part where the entries that are found end, if a part of them is computed again, or the
    pages there are no tail of a sequence that ended: one holds them, or passed them. So what many
    prompts begin with is found by the third of them, however far behind their windows it lies.
    """
    cache, queue = group.pool.cache, group.pool.cache.eviction
    planned: list[tuple[Tail, list[tuple[int, int]]]] = []
    for at in _ends(group, entries, end):
        last, span = entries[at - 1], entries[max(0, at - group.lookback) : at]
        priority = main.pool.cache.eviction.priority_of(last.page)
        known = CachedPage(
            cache.page_of(last),
            at - 1,
            priority=priority,
            digest=last.digest,
            group=group.pool.number,
        )
        tail = queue.plan_branch(known, queue.branches.get(last.serial))
        planned.append((tail, [(entry.serial, cache.page_of(entry)) for entry in span]))

    def apply() -> None:
        for tail, pages in planned:
            queue.branch(tail, pages)

    return apply


def _ends(group: PageGroup[Companions], entries: Sequence[CacheEntry], end: int) -> list[int]:
    """The columns where branches end, of which at least one page is seen from there."""
    if not group.lookback:
        return []
    pool, queue, found = group.pool, group.pool.cache.eviction, len(entries)
    ends = [found] if end < found else []
    if end:
        page = pool.cache.page_of(entries[end - 1])
        is_no_tail = end == found and (pool.refs[page] > 0 or queue.has_passed(page))
        if is_no_tail or entries[end - 1].serial in queue.branches:
            ends.append(end)
    return ends


def hang(
    main: PageGroup[PrefixCache],
    group: PageGroup[Companions],
    pages: np.ndarray,
    entries: Sequence[CacheEntry],
    depths: Sequence[int],
) -> None:
    """Publish pages `[n]` of rows (0: not held) as companions of the entries of their columns."""
    pool, live = group.pool, main.pool.cache.by_page
    has, known = pool.cache.pages, pool.cache.published.take(pages).tolist()
    new = {
        entry.serial: (page, entry, depth)  # rows may share a page, or an entry
        for page, entry, depth, its in zip(pages.tolist(), entries, depths, known, strict=True)
        if page and not its and entry.serial not in has and live.get(entry.page) is entry
    }
    if new:
        pool.attach_each(*map(list, zip(*new.values(), strict=True)))


def plan_priorities(
    cache: PrefixCache, others: Others, pages: Iterable[int], priority: int
) -> Callable[[], None]:
    """Plan to give cached pages of the first group a priority, and their companions with them."""
    entries = [cache.by_page[page] for page in pages if page in cache.by_page]
    ours = cache.eviction.plan_priority([entry.page for entry in entries], priority)
    serials, theirs = [entry.serial for entry in entries], []
    for group in others:
        companions = group.pool.cache
        own = [page for entry in entries if (page := companions.page_of(entry))]
        queue = companions.eviction
        theirs.append((queue, queue.plan_priority(own, serials, priority)))

    def apply() -> None:
        cache.eviction.set_priority(ours)
        for queue, planned in theirs:
            queue.set_priority(planned)

    return apply


def with_rest_of_tails(
    group: PageGroup[Companions], rows: RowTable, ending: list[int], held: list[np.ndarray]
) -> tuple[list[np.ndarray], list[int]]:
    """What rows that end hold, the last page first; and behind it what they passed since their last
    page began: who goes on from the start of that one needs it, too. Returns that alone as well."""
    cache, together, passed = group.pool.cache, list[np.ndarray](), dict[int, None]()
    for row, pages in zip(ending, held, strict=True):
        chain, first = rows.chains[row], int(group.table.first[row])
        missing = map(cache.page_of, chain[max(0, len(chain) - group.lookback) : first])
        rest = [page for page in missing if cache.eviction.has_passed(page) and page not in passed]
        passed |= dict.fromkeys(rest)
        together += [pages, np.array(rest[::-1], np.int32)]
    return together, list(passed)
