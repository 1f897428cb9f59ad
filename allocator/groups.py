"""Groups of layers: each has a pool of pages, and a page table of where the rows lie in it."""

from dataclasses import dataclass
from typing import Generic, NamedTuple

import numpy as np

from .pool import C, PagePool

__all__ = ["Aside", "PageGroup", "PageTable"]

_ALL = 2**32  # columns: more than any sequence has


class Aside(NamedTuple):
    """Pages that a row holds in no column yet: a copy fills them, for so many tokens in all."""

    computed: int
    pages: np.ndarray


class PageTable:
    """Page ids of R rows in columns `[first, end)`, 0 everywhere else.

    There is always one column more than any row uses: reading the column of the next token is
    valid for every row, and gives 0, the null page, where a new page is needed.

    ```
    page_size 4, length 6, computed 5, one page reserved:      first 0, end 3, capacity 12

      ids[row]     [     7     |     2     |     9     |  0  0 ...
      tokens         a b c d     e f . .     . . . .
                     written     ^ not yet computed
                     published
    ```
    """

    def __init__(self, rows: int) -> None:
        self.first, self.end = np.zeros((2, rows), np.int64)
        self.ids = np.zeros((rows, 8), np.int32)
        self.aside: dict[int, Aside] = {}  # by row

    def pages(self, row: int) -> np.ndarray:
        """int32, a view: the row's pages in order."""
        return self.ids[row, self.first[row] : self.end[row]]

    def beyond(self, row: int, end: int) -> np.ndarray:
        """int32, a view: the row's pages in columns from `end` on."""
        return self.ids[row, max(end, int(self.first[row])) : self.end[row]]

    def set(self, row: int, pages: np.ndarray, first: int = 0) -> None:
        """Let a vacant row hold these pages from that column on; there is room for them."""
        end = first + len(pages)
        self.ids[row, first:end] = pages
        self.first[row], self.end[row] = first, end

    def cut(self, row: int, end: int) -> None:
        """Hold no page in columns from `end` on."""
        if end < (held := int(self.end[row])):
            self.first[row], self.end[row] = min(end, int(self.first[row])), end
            self.ids[row, end:held] = 0

    def make_room(self, rows: int, num_pages: int) -> None:
        """Make room for so many rows, for pages up to that column, and the spare one behind it."""
        old_rows, columns = self.ids.shape
        while columns <= num_pages:
            columns *= 2
        if (rows, columns) != self.ids.shape:
            ids = np.zeros((rows, columns), np.int32)
            first, end = np.zeros((2, rows), np.int64)
            first[:old_rows], end[:old_rows] = self.first, self.end
            ids[:old_rows, : self.ids.shape[1]] = self.ids
            self.ids, self.first, self.end = ids, first, end

    def repair(self, live: np.ndarray) -> None:
        """Let rows that are not `live` hold nothing, and the others 0 where they hold no page."""
        self.make_room(len(live), 0)
        self.first[~live] = self.end[~live] = 0
        self.ids[~self._used()] = 0
        self.aside = {row: aside for row, aside in self.aside.items() if live[row]}

    def owners(self, num_pages: int) -> np.ndarray:
        """int64 `[N]`: how many rows hold each page; only of a table that was repaired."""
        aside = (each.pages for each in self.aside.values())
        return np.bincount(np.concatenate([self.ids[self._used()], *aside]), minlength=num_pages)

    def _used(self) -> np.ndarray:
        column = np.arange(self.ids.shape[1])
        return (column >= self.first[:, None]) & (column < self.end[:, None])


@dataclass(frozen=True, slots=True)
class PageGroup(Generic[C]):
    """The pages of one group of layers. The first group has the tokens and the prefix cache.

    Attributes:
      pool, table: what is counted here, with ids from 0.
      base: what users call page 0 of it; not 0 on a shard of a larger pool.
      num_pages: of the whole pool.
      window: newest tokens that its layers see; None: all.
    """

    pool: PagePool[C]
    table: PageTable
    base: int
    num_pages: int
    window: int | None = None

    @property
    def lookback(self) -> int:
        """Columns before it that a query at the start of a page sees, as far as there are any."""
        return _ALL if self.window is None else self.pool.pages_for(self.window - 1)

    def slots(self, row: np.ndarray, position: np.ndarray) -> np.ndarray:
        """Where positions of rows (two arrays of one shape) lie in the pool."""
        size = self.pool.page_size
        return self.table.ids[row, position // size] * size + position % size

    def whole(self, ids: np.ndarray, unit: int = 1) -> np.ndarray:
        """Page ids, or slots with `unit` page_size, as users know them; the null page stays 0."""
        return np.where(ids >= unit, ids + self.base * unit, 0) if self.base else ids
