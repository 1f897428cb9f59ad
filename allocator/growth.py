"""What a write of more tokens needs, worked out before anything is changed."""

from typing import NamedTuple

import numpy as np

from .batch import PageCopies, Prepared
from .groups import PageGroup
from .pool import PagePool

__all__ = ["Growth", "apply_growth", "plan_growth"]

_NONE = np.empty(0, np.int64)
_NO_PAGES = np.empty(0, np.int32)
_NO_COPIES = PageCopies(_NO_PAGES, _NO_PAGES)


class Growth(NamedTuple):
    """A plan for the pages of B rows in one group that will be written from their length on.

    A page may be written when the sequence is its only owner and it is not published. Only the
    page of the first new token can break that rule; the pages behind it are new or reserved.

    ```
    the tail page has            published     not published
      other owners               copy          copy              (copy-on-write)
      other owners, but all      copy but the last, which writes in place
        write in this call
      one owner                  unpublish     write in place
    ```

    Attributes:
      row: int64 `[B]`.
      tail: int32 `[B]`, the page in whose column the next token lies; 0 where none is there yet.
      held: the most pages that one of the rows has now.
      places, columns: int64 `[n]`, entries of the page table that get a page, which row of the
        batch and which column; tails that are replaced by a copy come first.
      num_copied: how many those are.
      unpublished: tail pages that leave the prefix cache, to be written in place.
    """

    row: np.ndarray
    tail: np.ndarray
    held: int
    places: np.ndarray
    columns: np.ndarray
    num_copied: int
    unpublished: list[int]


def plan_growth(
    group: PageGroup, row: np.ndarray, start: np.ndarray, stop: np.ndarray, until: np.ndarray
) -> Growth:
    """Plan a write of positions `start` to `stop` of rows, with pages for those below `until`.

    Raises:
      OutOfPages: the pages are not there now.
    """
    pool, table = group.pool, group.table
    page_size = pool.page_size
    held = table.end.take(row)
    places = (until > held * page_size).nonzero()[0]
    columns = held[places]
    if places.size:
        places, columns = _new_entries(places, columns, -(-until[places] // page_size) - columns)
    column = start // page_size
    tail = table.ids[row, column]
    # Where the next token begins a page, `tail` is a reserved page or the null page: both pass.
    guarded = ((pool.refs.take(tail) != 1) | pool.cache.published.take(tail)).nonzero()[0]
    copied, unpublished = [], []
    if guarded.size:
        written = [b for b in guarded.tolist() if stop[b] > start[b]]
        copied, unpublished = _settle_guarded(pool, tail, written)
        places = np.concatenate([np.array(copied, np.int64), places])
        columns = np.concatenate([column[copied], columns])
    pool.require(len(places))
    most = int(held[held.argmax()]) if held.size else 0
    return Growth(row, tail, most, places, columns, len(copied), unpublished)


def _new_entries(
    places: np.ndarray, columns: np.ndarray, count: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """`count` entries of each row: first the next page of every row, then those after it."""
    if (most := int(count.max())) == 1:
        return places, columns
    more = [(count > step).nonzero()[0] for step in range(most)]
    ahead = [columns[at] + step for step, at in enumerate(more)]
    return places[np.concatenate(more)], np.concatenate(ahead)


def _settle_guarded(
    pool: PagePool, tail: np.ndarray, guarded: list[int]
) -> tuple[list[int], list[int]]:
    """Which of the guarded rows copy their tail page, and which pages are unpublished instead."""
    copied: list[int] = []
    unpublished: list[int] = []
    left: dict[int, int] = {}  # owners that a page still has after the rows before this one
    for at in guarded:
        page = int(tail[at])
        owners = left.get(page, int(pool.refs[page]))
        if owners > 1:
            copied.append(at)
            left[page] = owners - 1
        elif pool.cache.published[page]:
            unpublished.append(page)
    return copied, unpublished


def apply_growth(group: PageGroup, growth: Growth) -> Prepared:
    """Carry a plan out. There is room in the page table, which the last column was made for."""
    pool, table = group.pool, group.table
    for page in growth.unpublished:
        if pool.cache.published[page]:  # another one may have taken its place meanwhile
            pool.unpublish(page)
    if not growth.places.size:
        return Prepared(_NO_COPIES, _NONE, _NONE, _NO_PAGES)
    pages = pool.take(len(growth.places))
    row, copied = growth.row[growth.places], slice(growth.num_copied)
    copies = _NO_COPIES
    if growth.num_copied:
        src, dst = table.ids[row[copied], growth.columns[copied]], pages[copied]
        pool.tokens[dst], pool.withdrawn[dst] = pool.tokens[src], pool.withdrawn[src]
        pool.copied += len(src)
        pool.pass_by(src)  # another owner remains, if a commit in the same call passed none of them
        copies = PageCopies(group.whole(src), group.whole(dst))
    table.ids[row, growth.columns] = pages
    new, columns = row[growth.num_copied :], growth.columns[growth.num_copied :]
    table.end[new] = columns + 1  # of one row they ascend, and the last one stays
    return Prepared(copies, growth.places, growth.columns, group.whole(pages))
