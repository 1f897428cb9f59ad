"""What a call left that was torn between two lines, made consistent again."""

import numpy as np

from .bookkeeping import Bookkeeping
from .groups import PageGroup
from .rows import ALL, RowTable
from .windows import first_column, window_of

__all__ = ["repair"]


def repair(books: Bookkeeping) -> None:
    """Make one shard consistent; where it is, nothing that can be seen changes.

    All is worked out from what one assignment sets: a sequence lives if its row has a handle, and
    holds the columns of the page table that it says. It calls no user's code and may be torn
    itself: it is begun again then.
    """
    rows = books.rows
    rows.repair()
    live = np.zeros(len(rows), bool)
    live[rows.live] = True
    for group in books.groups:
        group.table.repair(live)
        _recount(group)
        if _cut_reserved(group, rows):
            _recount(group)
    _fit_lengths(books)
    _fit_windows(books)
    for row in rows.live.tolist():
        _fit_chain(books, row)


def _recount(group: PageGroup) -> None:
    pool = group.pool
    pool.repair(group.table.owners(len(pool.refs)))


def _cut_reserved(group: PageGroup, rows: RowTable) -> bool:
    """Let go of pages behind the tokens that are shared or published: those are of a `truncate`
    that got no further."""
    pool, table, found = group.pool, group.table, False
    for row in rows.live.tolist():
        begin = pool.pages_for(int(rows.length[row]))
        ahead = table.beyond(row, begin)
        if ((pool.refs[ahead] != 1) | pool.cache.published[ahead]).any():
            table.cut(row, begin)
            found = True
    return found


def _fit_lengths(books: Bookkeeping) -> None:
    """No token without a page, none computed that is not there, and the rest described as said.

    A window group has pages of what is computed, and of what was prepared.
    """
    rows, live = books.rows, books.rows.live
    held = [group.table.end[live] * group.pool.page_size for group in books.groups]
    full = [each for each, group in zip(held, books.groups, strict=True) if group.window is None]
    length = np.minimum.reduce([rows.length[live], *full])
    computed = np.minimum.reduce([rows.computed[live], length, *held])
    rows.length[live], rows.computed[live] = length, computed
    described = np.maximum(rows.described[live], computed)
    rows.described[live] = np.where(described >= length, ALL, described)


def _fit_windows(books: Bookkeeping) -> None:
    """Who lacks what its window needs has nothing computed: a call that replaced it got no further.

    The pages that it has left go back.
    """
    rows, live = books.rows, books.rows.live
    lost = np.zeros(len(live), bool)
    for group in books.windows:
        needed = first_column(rows.computed[live], window_of(group), group.pool.page_size)
        lost |= group.table.first[live] > needed
    rows.computed[live[lost]] = 0
    for group in books.windows if lost.any() else ():
        for row in live[lost].tolist():
            group.table.cut(row, 0)
        _recount(group)


def _fit_chain(books: Bookkeeping, row: int) -> None:
    """As many entries as computed full pages, and no digest of a page that is not full."""
    rows, size = books.rows, books.main.pool.page_size
    computed, full = int(rows.computed[row]), int(rows.length[row]) // size
    public = books.caching and not rows.private[row]
    chain = rows.chains[row][: computed // size if public else 0]
    rows.chains[row], rows.digests[row] = chain, rows.digests[row][:full]
    pages = books.main.table.pages(row).tolist()
    rows.borrows[row] = any(e.page != page for e, page in zip(chain, pages, strict=False))
    rows.chain_seen[row] = -1  # entries may have gone: all are looked at again
