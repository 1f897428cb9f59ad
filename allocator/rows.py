"""The sequences: one row per live sequence, every field an array over rows."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple, NewType, SupportsIndex

import numpy as np

from .arguments import Ints, as_ints
from .errors import StaleHandle
from .prefix import CacheEntry, Namespace

__all__ = [
    "ALL",
    "ROW_MASK",
    "Handle",
    "HeldPages",
    "RowTable",
    "SequenceInfo",
    "as_handle",
    "as_handles",
]

Handle = NewType("Handle", int)
"""Names one sequence: a plain int, generation << 32 | row. A freed handle never becomes valid."""

ROW_MASK = 0xFFFF_FFFF
ALL = 2**62  # in `described`: more tokens than any sequence has
_VACANT = -1  # no handle: it names row 2**32 - 1
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


def as_handle(handle: SupportsIndex) -> np.ndarray:
    """One handle as int64 `[1]`."""
    array = as_handles(handle)
    if array.ndim != 0:
        raise TypeError(f"handle must be one handle, got {handle!r}")
    return array.reshape(1)


class HeldPages(NamedTuple):
    """The pages of a sequence in one group of layers: `pages` ids in order, of columns from `first`
    on. Columns before it were given back."""

    first: int
    pages: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SequenceInfo:
    """What the allocator knows about one sequence; lengths in tokens.

    Attributes:
      length: tokens that it has.
      computed: tokens from its start whose keys and values have been committed.
      cached: leading tokens that its `allocate` found in the prefix cache.
      capacity: tokens that its pages can hold; more than length where pages are reserved.
      pages: its page ids in order, reserved ones included; of the first group.
      cache_salt: the salt that it was allocated with.
      private: what it holds is never published, nor what its forks hold.
      groups: its pages in every group of layers.
    """

    length: int
    computed: int
    cached: int
    capacity: int
    pages: tuple[int, ...]
    cache_salt: str | bytes | None
    private: bool
    groups: tuple[HeldPages, ...] = field(default=(), repr=False)


class RowTable:
    """What a sequence is, wherever its pages lie: int64 columns `[R]` that double. Flags are 0, 1.

    Of several shards, the tables share one numbering of rows: row r of shard i is r * shards + i.

    Attributes:
      handle: -1 where the row is vacant.
      generation: how often the row was used.
      length, computed, cached: as in `SequenceInfo`.
      described: tokens from the start that batches have described, which are computed once the
        programs that took those are done. `ALL`: every one, and so are those that `advance` adds.
      private: as in `SequenceInfo`.
      namespaces: where the chain of its digests begins.
      digests: of its leading full pages, as far as someone asked.
      chains: the cache entries that stand for its committed full pages.
      borrows: whether one of them may be on a page that the row does not hold.
      chain_seen: how many entries of such a kind the cache had forgotten when all of these were
        last seen to be live.
      vacant: rows to be used next, the last one first.
    """

    length: np.ndarray
    computed: np.ndarray
    cached: np.ndarray
    described: np.ndarray
    chain_seen: np.ndarray
    borrows: np.ndarray
    private: np.ndarray

    def __init__(self, shard: int = 0, num_shards: int = 1) -> None:
        self._shard, self._num_shards = shard, num_shards
        self.handle, self.generation = np.full(8, _VACANT, np.int64), np.zeros(8, np.int64)
        self._set_columns(np.zeros((len(_COLUMNS), 8), np.int64))
        self.namespaces = [_NOWHERE] * 8
        self.digests: list[list[bytes]] = [[] for _ in range(8)]
        self.chains: list[list[CacheEntry]] = [[] for _ in range(8)]
        self.vacant = list(range(7, -1, -1))
        self._last_seen = np.zeros(8, np.int64)

    def __len__(self) -> int:
        return len(self.handle)

    @property
    def live(self) -> np.ndarray:
        """int64 `[n]`: the rows of live sequences, ascending."""
        return np.flatnonzero(self.handle != _VACANT)

    def resolve(self, handle: np.ndarray) -> np.ndarray:
        """Rows `[B]` of distinct live handles `[B]`, or an error; changes nothing seen."""
        if handle.size == 0:
            return handle
        row = self._row(handle)
        try:
            stale = np.count_nonzero(self.handle[row] != handle)
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

    def name(self, row: int) -> Handle:
        """The handle of a live row."""
        return Handle(int(self.handle[row]))

    def make_room(self, count: int) -> None:
        """Make room for `count` more sequences."""
        while len(self.vacant) < count:
            old = len(self)
            none = np.zeros(old, np.int64)
            columns = np.concatenate([self._columns, np.zeros_like(self._columns)], axis=1)
            handle = np.concatenate([self.handle, none + _VACANT])
            generation = np.concatenate([self.generation, none])
            self._last_seen = np.concatenate([none, none])
            self._set_columns(columns)  # all of them, or none if memory runs out; `repair` knows
            self.handle, self.generation = handle, generation
            self.chains += [[] for _ in range(old)]
            self.digests += [[] for _ in range(old)]
            self.namespaces += [_NOWHERE] * old
            self.vacant = list(range(2 * old - 1, old - 1, -1)) + self.vacant

    def open(self, namespace: Namespace) -> int:
        """A row for a sequence without tokens, which `enter` begins; there is room for it."""
        row = self.vacant.pop()
        self.namespaces[row] = namespace
        return row

    def enter(self, row: int | np.ndarray) -> None:
        """Begin the sequences of opened rows: all else that makes them up is there."""
        self.generation[row] += 1
        number = row * self._num_shards + self._shard
        self.handle[row] = self.generation[row] << 32 | number

    def leave(self, row: np.ndarray) -> None:
        """End sequences, whose handles are stale from now on; `close` their rows afterwards."""
        self.handle[row] = _VACANT

    def copy(self, row: int) -> int:
        """A row like `row`, which `enter` begins; there is room for it."""
        child = self.open(self.namespaces[row])
        self._columns[:, child] = self._columns[:, row]
        self.digests[child], self.chains[child] = list(self.digests[row]), list(self.chains[row])
        return child

    def cut(self, row: int, length: int, num_pages: int) -> None:
        """Forget all tokens from `length` on; `num_pages` pages are full then."""
        self.length[row] = length
        self.computed[row] = min(length, int(self.computed[row]))
        self.describe(row, int(self.described[row]))
        del self.digests[row][num_pages:], self.chains[row][num_pages:]

    def describe(self, row: np.ndarray | int, end: np.ndarray | int) -> None:
        """Batches have described the tokens below `end`."""
        self.described[row] = np.where(end >= self.length[row], ALL, end)

    def make_private(self, row: np.ndarray | int) -> None:
        """From now on rows publish nothing, and neither do their forks; what they have published
        stays."""
        self.private[row], self.borrows[row] = True, False
        for each in np.atleast_1d(row).tolist():
            self.digests[each], self.chains[each] = [], []

    def close(self, row: int) -> None:
        """Make a row vacant whose sequence has ended."""
        self._columns[:, row] = 0
        self.namespaces[row] = _NOWHERE
        self.digests[row], self.chains[row] = [], []
        self.vacant.append(row)

    def repair(self) -> None:
        """Let whatever has no handle be vacant; and all columns as long as the longest."""
        self._set_columns(self._columns)  # the first to grow, with all that the others have
        size = self._columns.shape[1]
        self._last_seen = np.zeros(size, np.int64)
        self.generation = np.append(self.generation, self._last_seen[len(self.generation) :])
        self.handle = np.append(self.handle, self._last_seen[len(self.handle) :] + _VACANT)
        live = (self.handle != _VACANT).tolist()
        self.namespaces = [self.namespaces[r] if on else _NOWHERE for r, on in enumerate(live)]
        self.digests = [self.digests[row] if on else [] for row, on in enumerate(live)]
        self.chains = [self.chains[row] if on else [] for row, on in enumerate(live)]
        unused = np.flatnonzero(self.handle == _VACANT)
        self._columns[:, unused] = 0
        listed = [row for row in dict.fromkeys(self.vacant) if not live[row]]
        self.vacant = np.setdiff1d(unused, listed)[::-1].tolist() + listed

    def __getstate__(self) -> dict[str, object]:
        """What `copy.deepcopy` copies: the columns once, not their views by name."""
        return {name: value for name, value in vars(self).items() if name not in _COLUMNS}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._set_columns(self._columns)

    def _set_columns(self, columns: np.ndarray) -> None:
        self._columns = columns
        for name, column in zip(_COLUMNS, columns, strict=True):
            setattr(self, name, column)

    def _row(self, handle: np.ndarray) -> np.ndarray:
        number = handle & ROW_MASK
        return number if self._num_shards == 1 else number // self._num_shards

    def _refuse_stale(self, handle: np.ndarray) -> None:
        row = self._row(handle)
        known = row < len(self)
        fresh = self.handle[np.where(known, row, 0)] == handle
        bad = handle[~(known & fresh)][0]
        raise StaleHandle(
            f"handle {bad} names no live sequence: it was freed, or this allocator never made it"
        )


_COLUMNS = tuple(RowTable.__annotations__)
