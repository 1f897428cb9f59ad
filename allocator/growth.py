"""What a write of more tokens needs, worked out before anything is changed."""

from typing import NamedTuple

import numpy as np

from .batch import PageCopies
from .errors import SequenceTooLong
from .pool import PagePool
from .sequences import SequenceTable

__all__ = ["Growth", "apply_growth", "plan_growth"]

_NO_COPIES = PageCopies(np.empty(0, np.int32), np.empty(0, np.int32))


class Growth(NamedTuple):
    """A plan for B rows that will be written from their length on. Making it changes nothing.

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
      start, stop: int64 `[B]`, the length now, and the length that the pages are to serve.
      longest: the largest `stop`; 0 without rows.
      column: int64 `[B]`, the column of the page table in which the next token lies.
      held: int64 `[B]`, pages held now.
      grown, new: int64 `[n]`, indices into the batch of rows that need pages, and how many.
      copied: indices into the batch of rows whose tail page is replaced by a copy.
      unpublished: tail pages that leave the prefix cache, to be written in place.
    """

    row: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    longest: int
    column: np.ndarray
    held: np.ndarray
    grown: np.ndarray
    new: np.ndarray
    copied: list[int]
    unpublished: list[int]

    @property
    def needed(self) -> int:
        """Pages to take from the pool."""
        return int(self.new.sum()) + len(self.copied)


def plan_growth(
    pool: PagePool, table: SequenceTable, row: np.ndarray, count: np.ndarray | int
) -> Growth:
    """Plan `count` (`[B]`, or one for all) more tokens for the rows; raises if it cannot be.

    Raises:
      SequenceTooLong: a row would outgrow the whole pool.
      OutOfPages: the pages are not there now.
    """
    page_size = pool.page_size
    capacity = pool.usable * page_size
    length = table.length[row]
    stop = length + np.minimum(count, capacity + 1)  # clipped: an absurd count cannot overflow
    at = int(stop.argmax()) if stop.size else 0
    longest = int(stop[at]) if stop.size else 0
    if longest > capacity:
        raise SequenceTooLong(
            f"sequence {table.handle(int(row[at]))} of {length[at]} tokens cannot grow by "
            f"{np.broadcast_to(count, row.shape)[at]}: the whole pool holds {capacity} tokens "
            f"({pool.usable} pages of {page_size}); stop it here, or create a larger pool"
        )
    held = table.num_pages[row]
    grown = (stop > held * page_size).nonzero()[0]
    new = -(-stop[grown] // page_size) - held[grown]
    column = length // page_size
    tail = table.page_table[row, column]
    # Where the next token begins a page, `tail` is a reserved page or the null page: both pass.
    guarded = ((pool.refs.take(tail) != 1) | pool.cache.published.take(tail)).nonzero()[0]
    written = [b for b in guarded.tolist() if stop[b] > length[b]]
    copied, unpublished = _settle_guarded(pool, tail, written)
    growth = Growth(row, length, stop, longest, column, held, grown, new, copied, unpublished)
    pool.require(growth.needed)
    return growth


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


def apply_growth(pool: PagePool, table: SequenceTable, growth: Growth) -> PageCopies:
    """Carry a plan out; returns the pages that the device must copy before it writes."""
    needed = growth.needed
    if needed == 0 and not growth.unpublished:
        return _NO_COPIES
    row, held, new = growth.row[growth.grown], growth.held[growth.grown], growth.new
    table.ensure_columns(pool.pages_for(growth.longest))
    fresh = pool.take(needed)
    copies = _NO_COPIES
    if growth.copied:
        dst, fresh = fresh[: len(growth.copied)], fresh[len(growth.copied) :]
        copies = _copy_tails(pool, table, growth.row[growth.copied], dst)
    for page in growth.unpublished:
        pool.unpublish(page)
    for step in range(int(new.max(initial=0))):  # the next page of every row that needs one more
        more = (new > step).nonzero()[0]
        pages, fresh = fresh[: len(more)], fresh[len(more) :]
        table.page_table[row[more], held[more] + step] = pages
    table.num_pages[row] = held + new
    return copies


def _copy_tails(
    pool: PagePool, table: SequenceTable, row: np.ndarray, dst: np.ndarray
) -> PageCopies:
    column = table.length[row] // pool.page_size
    src = table.page_table[row, column]
    table.page_table[row, column] = dst
    pool.tokens[dst] = pool.tokens[src]
    pool.copied += len(src)
    np.subtract.at(pool.refs, src, 1)  # another owner remains: never the last one
    return PageCopies(src, dst)
