"""Every rule of the bookkeeping, checked from scratch against the raw state."""

from collections.abc import Iterator, Sequence

import numpy as np

from .companions import Companions
from .errors import CorruptState
from .groups import PageGroup, PageTable
from .pool import PagePool
from .prefix import PrefixCache
from .rows import ALL, RowTable

__all__ = ["require_consistent"]


def require_consistent(
    main: PageGroup[PrefixCache],
    others: Sequence[PageGroup[Companions]],
    rows: RowTable,
    *,
    caching: bool,
) -> None:
    """Raise one CorruptState that lists every rule that is broken."""
    violations: list[str] = []
    for group in (main, *others):
        pool, table = group.pool, group.table
        # The other checks index arrays with page ids, so ids outside the pool come first, and
        # alone.
        violations += list(_outside_pool(pool, table)) or [
            *_free_pages(pool),
            *_owners(pool, table, rows),
            *_cached_pages(pool),
            *_sequences(group, rows),
            *(
                _content(main, rows, caching)
                if pool.number == 0
                else _companions(main, others[pool.number - 1], rows)
            ),
            *_vacant_rows(table, rows),
        ]
    if violations:
        raise CorruptState(violations)


def _outside_pool(pool: PagePool, table: PageTable) -> Iterator[str]:
    if not 0 <= pool.num_free <= pool.usable:
        yield f"num_free is {pool.num_free}, outside 0..{pool.usable}"
    free, pages = pool.free_pages, table.ids
    if ((free < 1) | (free > pool.usable)).any():
        yield "the free list holds the null page or an id outside the pool"
    if ((pages < 0) | (pages > pool.usable)).any():
        yield "a page table points outside the pool"


def _free_pages(pool: PagePool) -> Iterator[str]:
    free = pool.free_pages.tolist()
    num_referenced = int((pool.refs[1:] > 0).sum())
    evictable = set(pool.cache.eviction.order())
    if len(free) + len(evictable) + num_referenced != pool.usable:
        yield (
            f"{len(free)} free + {len(evictable)} evictable + {num_referenced} referenced pages "
            f"are not the {pool.usable} usable ones"
        )
    if len(set(free)) != len(free):
        yield f"the free list holds {len(free) - len(set(free))} duplicates"
    if set(free) & evictable:
        yield f"pages {sorted(set(free) & evictable)} are both free and evictable"
    owned = [page for page in free if pool.refs[page] != 0]
    if owned:
        yield f"free pages {owned} have owners"
    findable = [page for page in free if pool.cache.published[page]]
    if findable:
        yield f"free pages {findable} are published"


def _owners(pool: PagePool, table: PageTable, rows: RowTable) -> Iterator[str]:
    live = rows.live
    pages, column = table.ids[live], np.arange(table.ids.shape[1])
    used = (column >= table.first[live][:, None]) & (column < table.end[live][:, None])
    held = np.concatenate([pages[used], *(each.pages for each in table.aside.values())])
    counted = np.bincount(held, minlength=len(pool.refs)) + pool.raw
    for page in (counted != pool.refs).nonzero()[0].tolist():
        yield f"page {page} has ref count {pool.refs[page]} but {counted[page]} owners"
    if pool.refs[0] != 1 or not pool.raw[0]:
        yield "the null page is not raw, with one owner"
    shared = (pool.raw & (pool.refs > 1)).nonzero()[0].tolist()
    if shared:
        yield f"raw pages {shared} have more owners"
    if not 0 <= pool.num_used <= pool.peak_used <= pool.usable:
        yield f"num_used {pool.num_used} or peak_used {pool.peak_used} is impossible"


def _cached_pages(pool: PagePool) -> Iterator[str]:
    published = set(pool.cache.published.nonzero()[0].tolist())
    if published & set(pool.raw.nonzero()[0].tolist()):
        yield "a raw page is published"
    if sorted(pool.cache.eviction.order()) != sorted(p for p in published if pool.refs[p] == 0):
        yield "the evictable pages are not the published ones without an owner"


def _prefix_cache(cache: PrefixCache) -> Iterator[str]:
    by_page = set(cache.by_page)
    if by_page != set(cache.published.nonzero()[0].tolist()):
        yield "the published flags and the entries by page name different pages"
    if {id(e) for e in cache.by_page.values()} != {id(e) for e in cache.index.values()}:
        yield "the entries by page and the entries by digest differ"
    for page, entry in cache.by_page.items():
        if entry.page != page or cache.index.get(entry.digest) is not entry:
            yield f"the entry of page {page} names page {entry.page} or is not found by its digest"
    serials = [entry.serial for entry in cache.by_page.values()]
    if len(set(serials)) != len(serials):
        yield "two entries have one serial number"


def _content(group: PageGroup, rows: RowTable, caching: bool) -> Iterator[str]:
    """What only the first group has: tokens, and what can be found by them."""
    yield from _prefix_cache(group.pool.cache)
    yield from _digests(group.pool, group.pool.cache)
    yield from _chains(group, rows, caching)


def _digests(pool: PagePool, cache: PrefixCache) -> Iterator[str]:
    """A page must hold what its digest says; unknown where the page before it is gone."""
    by_serial = {entry.serial: entry.digest for entry in cache.by_page.values()}
    for page, entry in cache.by_page.items():
        if isinstance(entry.parent, bytes):
            parent = cache.root_digest(entry.parent)
        else:
            parent = by_serial.get(entry.parent)
        if parent and entry.digest != next(cache.digests(parent, pool.tokens[page : page + 1])):
            yield f"page {page} is published, but holds other tokens than its digest says"


def _sequences(group: PageGroup, rows: RowTable) -> Iterator[str]:
    pool, table = group.pool, group.table
    page_size = pool.page_size
    for row in rows.live.tolist():
        name = f"sequence {rows.name(row)}"
        length, computed = int(rows.length[row]), int(rows.computed[row])
        first, end = int(table.first[row]), int(table.end[row])
        needed = length if group.window is None else computed
        if not 0 <= computed <= length or needed > end * page_size:
            yield f"{name}: not computed {computed} <= length {length} <= {end} pages"
        given = 0 if group.window is None else max(0, computed - group.window + 1)
        if first * page_size > given:
            yield f"{name}: begins in column {first}, but {computed} computed tokens need more"
        if rows.described[row] != ALL and not computed <= rows.described[row] < length:
            yield f"{name}: described {rows.described[row]} of {length}, computed {computed}"
        if not 0 <= first <= end < table.ids.shape[1]:
            yield f"{name}: pages {first} to {end} leave no spare column"
            continue
        pages = table.pages(row)
        if len(set(pages.tolist())) != len(pages) or (pages == 0).any():
            yield f"{name}: its page table holds a page twice, or the null page"
        if table.ids[row, :first].any() or table.ids[row, end:].any():
            yield f"{name}: its page table is not 0 behind its pages"
        ahead = table.beyond(row, -(-length // page_size))
        if (pool.refs[ahead] != 1).any() or pool.cache.published[ahead].any():
            yield f"{name}: a reserved page is shared or published"
        filled = pool.tokens[pages].reshape(-1)[:length]
        if filled.size and filled.min() < 0:
            yield f"{name}: holds a negative token"


def _chains(group: PageGroup, rows: RowTable, caching: bool) -> Iterator[str]:
    """Entries stand for the content of a sequence's full pages, whichever page they name."""
    pool, page_size = group.pool, group.pool.page_size
    for row in rows.live.tolist():
        chain, known, pages = rows.chains[row], rows.digests[row], group.table.pages(row)
        public = caching and not rows.private[row]
        expected = int(rows.computed[row]) // page_size if public else 0
        if len(chain) != expected:
            yield f"sequence {rows.name(row)}: {len(chain)} entries for {expected} full pages"
        digests = [entry.digest for entry in chain]
        if digests != known[: len(chain)] or len(known) > rows.length[row] // page_size:
            yield f"sequence {rows.name(row)}: its digests are not those of its pages"
        for page, entry in zip(pages, chain, strict=False):
            if pool.cache.is_live(entry) and not np.array_equal(
                pool.tokens[page], pool.tokens[entry.page]
            ):
                yield f"page {entry.page} is published for page {page}, but holds other tokens"


def _companions(
    main: PageGroup[PrefixCache], group: PageGroup[Companions], rows: RowTable
) -> Iterator[str]:
    """What only the other groups have: pages that go with entries of the first one."""
    cache, entries = group.pool.cache, main.pool.cache
    live = {entry.serial for entry in entries.by_page.values()}
    if not (cache.pages.keys() | cache.eviction.branches.keys()) <= live:
        yield "a companion, or a branch, goes with an entry that was forgotten"
    if sorted(cache.pages.values()) != cache.published.nonzero()[0].tolist():
        yield "the published flags and the companions name different pages"
    if any(cache.serials[page] != serial for serial, page in cache.pages.items()):
        yield "a companion and its page name different entries"
    if len(cache.eviction) != len(cache.eviction.order()):
        yield "the order of eviction does not have the pages that it counts"
    for row in rows.live.tolist():
        first = int(group.table.first[row])
        for entry, page in zip(rows.chains[row][first:], group.table.pages(row), strict=False):
            other = cache.published[page] and cache.serials[page] != entry.serial
            if other and entries.is_live(entry):
                yield f"page {page} goes with another entry than that of its own column"


def _vacant_rows(table: PageTable, rows: RowTable) -> Iterator[str]:
    live, vacant = set(rows.live.tolist()), rows.vacant
    if len(set(vacant)) != len(vacant) or live & set(vacant):
        yield "a row is vacant twice, or vacant and live"
    if len(live) + len(vacant) != len(rows):
        yield "rows are neither live nor vacant"
    at = np.array(sorted(set(vacant)), np.int64)
    if table.ids[at].any() or table.end[at].any() or rows.length[at].any():
        yield "a vacant row still holds pages or tokens"
    if any(rows.chains[row] or rows.digests[row] for row in vacant):
        yield "a vacant row still holds cache entries"
