"""The sequences: one row per live sequence, every field an array over rows."""

from dataclasses import dataclass, replace
from typing import NewType, SupportsIndex

import numpy as np

from .arguments import Ints, as_ints
from .errors import StaleHandle
from .prefix import CacheEntry, Namespace

__all__ = ["Handle", "SequenceInfo", "SequenceTable", "as_handles"]

Handle = NewType("Handle", int)
"""Names one sequence: a plain int, generation << 32 | row. A freed handle never becomes valid."""

_ROW_MASK = 0xFFFF_FFFF
_VACANT = 1 << 40  # added to the generation of a vacant row: no 64-bit handle can equal it
_NOWHERE = Namespace(b"", b"")  # of a vacant row


def as_handles(handles: Ints) -> np.ndarray:
    """One handle or B of them as int64 `[]` or `[B]`; whether they are live is not looked at."""
    try:
        array = as_ints("handles", handles)
    except ValueError:
        raise StaleHandle(f"handles {handles!r} were never made by this allocator") from None
    if array.ndim > 1:
        raise ValueError(f"handles must be one handle or have shape [B], got {list(array.shape)}")
    return array


@dataclass(frozen=True, slots=True)
class SequenceInfo:
    """What the allocator knows about one sequence; lengths in tokens.

    Attributes:
      length: tokens that it has.
      computed: leading tokens whose keys and values are written, by what `commit` was told.
      cached: leading tokens that its `allocate` found in the prefix cache.
      capacity: tokens that its pages can hold; more than length where pages are reserved.
      pages: its page ids in order, reserved ones included.
      cache_salt: the salt that it was allocated with.
      private: what it holds is never published, nor what its forks hold.
    """

    length: int
    computed: int
    cached: int
    capacity: int
    pages: tuple[int, ...]
    cache_salt: str | bytes | None
    private: bool


class SequenceTable:
    """Struct of arrays with R rows; rows and columns grow by doubling.

    `page_table` `[R, C]` holds page ids in order and 0 behind them. There is always one column
    more than any row uses: reading the column of the next token is valid for every row, and gives
    0, the null page, where a new page is needed.

    ```
    page_size 4, length 6, computed 5, one page reserved:      num_pages 3, capacity 12

      page_table[row]     [     7     |     2     |     9     |  0  0 ...
      tokens                a b c d     e f . .     . . . .
                            written     ^ not yet computed
                            published
    ```
    """

    def __init__(self) -> None:
        rows, columns = 8, 8
        self.length = np.zeros(rows, np.int64)
        self.computed = np.zeros(rows, np.int64)
        self.cached = np.zeros(rows, np.int64)
        self.num_pages = np.zeros(rows, np.int64)
        self.generation = np.full(rows, _VACANT, np.int64)
        self.page_table = np.zeros((rows, columns), np.int32)
        # Per row: the cache entries that stand for its committed full pages, and their root;
        # whether one of them may be on a page that the row does not hold; and how many entries of
        # such a kind the cache had forgotten when all of these were last seen to be live.
        self.borrows = np.zeros(rows, bool)
        self.chain_seen = np.zeros(rows, np.int64)
        self.chains: list[list[CacheEntry]] = [[] for _ in range(rows)]
        self.namespaces = [_NOWHERE] * rows
        self.salts: list[str | bytes | None] = [None] * rows
        self.vacant = list(range(rows - 1, -1, -1))
        self._last_seen = np.zeros(rows, np.int64)

    @property
    def rows(self) -> np.ndarray:
        """int64 `[n]`: the rows of live sequences, ascending."""
        return np.flatnonzero(self.generation < _VACANT)

    def resolve(self, handles: Ints) -> np.ndarray:
        """Rows `[B]` of distinct live handles, or an error; changes nothing that can be seen."""
        handle = as_handles(handles).reshape(-1)
        if handle.size == 0:
            return handle
        row = handle & _ROW_MASK
        try:
            stale = np.count_nonzero(self.generation[row] != handle >> 32)
        except IndexError:  # a row that never was
            stale = True
        if stale:
            self._refuse_stale(handle)
        # Every row is marked with the last place that names it: a mark from elsewhere is a twin.
        place = np.arange(len(row))
        self._last_seen[row] = place
        if np.count_nonzero(self._last_seen[row] != place):
            twin = handle[np.flatnonzero(self._last_seen[row] != place)[0]]
            raise ValueError(f"handles must name each sequence once, got {twin} more than once")
        return row

    def resolve_one(self, handle: SupportsIndex) -> int:
        """The row of one live handle."""
        array = as_handles(handle)
        if array.ndim != 0:
            raise TypeError(f"handle must be one handle, got {handle!r}")
        return int(self.resolve(array)[0])

    def handle(self, row: int) -> Handle:
        """The handle of a live row."""
        return Handle(int(self.generation[row]) << 32 | row)

    def ensure_rows(self, count: int) -> None:
        """Make room for `count` more sequences."""
        while len(self.vacant) < count:
            old = len(self.generation)
            grown = {
                name: np.concatenate([array, np.full_like(array, _VACANT * (name == "generation"))])
                for name, array in vars(self).items()
                if isinstance(array, np.ndarray)
            }
            vars(self).update(grown)  # all of them, or none if memory runs out
            self.chains += [[] for _ in range(old)]
            self.namespaces += [_NOWHERE] * old
            self.salts += [None] * old
            self.vacant = list(range(2 * old - 1, old - 1, -1)) + self.vacant

    def ensure_columns(self, num_pages: int) -> None:
        """Make room for `num_pages` pages in a row, and the spare column behind them."""
        columns = self.page_table.shape[1]
        while columns <= num_pages:
            columns *= 2
        if columns > self.page_table.shape[1]:
            grown = np.zeros((len(self.page_table), columns), np.int32)
            grown[:, : self.page_table.shape[1]] = self.page_table
            self.page_table = grown

    def open(self, namespace: Namespace, salt: str | bytes | None, pages: np.ndarray) -> int:
        """Start a sequence that holds these pages and no tokens yet; there is room for it."""
        row = self.vacant.pop()
        self.generation[row] = (self.generation[row] - _VACANT) + 1
        self.namespaces[row], self.salts[row] = namespace, salt
        self.num_pages[row] = len(pages)
        self.page_table[row, : len(pages)] = pages
        return row

    def copy(self, row: int, pages: np.ndarray) -> int:
        """Start a sequence like `row`, on these pages; there is room for it."""
        child = self.open(self.namespaces[row], self.salts[row], pages)
        inherited = (self.length, self.computed, self.cached, self.borrows, self.chain_seen)
        for field in inherited:
            field[child] = field[row]
        self.chains[child] = list(self.chains[row])
        return child

    def make_private(self, row: int) -> None:
        """From now on the row publishes nothing, and neither do its forks; what it has published
        stays."""
        self.namespaces[row] = replace(self.namespaces[row], private=True)
        self.chains[row], self.borrows[row] = [], False

    def private(self, rows: np.ndarray) -> np.ndarray:
        """bool `[n]`: which of the live rows are private."""
        return np.array([self.namespaces[row].private for row in rows.tolist()], bool)

    def close(self, row: int) -> np.ndarray:
        """End a sequence; its handle is stale from now on. Returns the pages it held."""
        pages = self.shrink(row, 0)
        self.length[row] = self.computed[row] = self.cached[row] = 0
        self.chains[row], self.namespaces[row], self.salts[row] = [], _NOWHERE, None
        self.borrows[row] = False
        self.generation[row] += _VACANT
        self.vacant.append(row)
        return pages

    def pages(self, row: int) -> np.ndarray:
        """int32 `[num_pages]`, a view: the row's pages in order."""
        return self.page_table[row, : self.num_pages[row]]

    def shrink(self, row: int, keep: int) -> np.ndarray:
        """Cut the row to its first `keep` pages; returns those behind them, in order."""
        dropped = self.pages(row)[keep:].copy()
        self.page_table[row, keep : self.num_pages[row]] = 0
        self.num_pages[row] = min(keep, self.num_pages[row])
        return dropped

    def _refuse_stale(self, handle: np.ndarray) -> None:
        row = handle & _ROW_MASK
        known = row < len(self.generation)
        fresh = self.generation[np.where(known, row, 0)] == handle >> 32
        bad = handle[~(known & fresh)][0]
        raise StaleHandle(
            f"handle {bad} names no live sequence: it was freed, or this allocator never made it"
        )
