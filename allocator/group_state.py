"""Where the sequences of a state lie in a group of layers that is not the first, and what can be
found there."""

from collections.abc import Container, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["GroupState"]


@dataclass(frozen=True, slots=True)
class GroupState:
    """The pages of Q sequences in one group, and the C pages there that go with entries.

    Pages are numbered 0 to M - 1 in the order in which `table` and then `entry_pages` first name
    them, as those of the first group are.

    ```
    lengths 10 and 9, all computed, page_size 4, a window of 6 tokens:
    first        [ 1, 1 ]         column 0 was given back
    end          [ 3, 3 ]
    table        [ 0 1 | 0 2 ]    the columns 1 and 2 of each; page 0 is shared
    entries      [ 0, 1 ]         which have pages here, their companions:
    entry_pages  [ 3, 0 ]         page 3 has no owner: it is cached, and can be evicted
    evictable    [ 0 ]            companions, the first to be evicted first
    ```

    Attributes:
      window: W, the newest tokens that its layers see; None: all.
      num_pages: M.
      first, end: int64 `[Q]`, the columns in which a sequence has pages here, `end` not included.
      table: int32 `[sum of end - first]`, the pages of every sequence in order.
      entries: int32 `[C]`, ascending, the entries of the first group that have a page here.
      entry_pages: int32 `[C]`, these pages.
      evictable: int32 `[M - pages of sequences]`, which of the C pages have no owner.
      num_passed: how many of these, the first ones, were passed by a sequence that went on.
    """

    window: int | None
    num_pages: int
    first: np.ndarray
    end: np.ndarray
    table: np.ndarray
    entries: np.ndarray
    entry_pages: np.ndarray
    evictable: np.ndarray
    num_passed: int = 0

    @classmethod
    def of(
        cls,
        window: int | None,
        span: tuple[np.ndarray, np.ndarray],
        table: np.ndarray,
        entries: np.ndarray,
        entry_pages: np.ndarray,
        order: Iterable[int],
        passed: Container[int],
    ) -> "tuple[GroupState, np.ndarray]":
        """The state of pages that have any other numbers.

        Args:
          span: `first` and `end`.
          order: pages in the order of eviction; those that the state does not have, or that have
            an owner, are left out, and those that it does not name come last.
          passed: which of them were passed; they come first.

        Returns:
          The state, and `[M]`: which pages its pages are.
        """
        both = np.concatenate([table, entry_pages])
        named, first, number = np.unique(both, return_index=True, return_inverse=True)
        by_name = first.argsort()
        place = np.empty(len(named), np.int32)
        place[by_name] = np.arange(len(named))
        numbers = place[number.reshape(-1)]
        owned = set(table.tolist())
        idle = {page: i for i, page in enumerate(entry_pages.tolist()) if page not in owned}
        queue = dict.fromkeys([*(page for page in order if page in idle), *idle])
        begin, end = (np.asarray(each, np.int64) for each in span)
        state = cls(
            window=window,
            num_pages=len(named),
            first=begin,
            end=end,
            table=numbers[: len(table)],
            entries=np.asarray(entries, np.int32),
            entry_pages=numbers[len(table) :],
            evictable=np.array([idle[page] for page in queue], np.int32),
            num_passed=sum(page in passed for page in queue),
        )
        return state, named[by_name]

    @property
    def num_owned(self) -> int:
        """Pages that a sequence needs; the others are only cached."""
        return int(self.table.max(initial=-1)) + 1

    @property
    def evicted_first(self) -> list[int]:
        """Pages without an owner, the first to be evicted first."""
        return self.entry_pages[self.evictable].tolist()

    @property
    def page_counts(self) -> np.ndarray:
        """int64 `[Q]`: pages of each sequence."""
        return self.end - self.first

    @property
    def tables(self) -> list[np.ndarray]:
        """The pages of each sequence in order."""
        return np.split(self.table, self.page_counts.cumsum())[:-1]

    @property
    def columns(self) -> np.ndarray:
        """int64 `[len(table)]`: the place of every page of `table` in its sequence."""
        counts = self.page_counts
        return np.arange(len(self.table)) + np.repeat(self.first - counts.cumsum() + counts, counts)

    def slots_below(self, lengths: np.ndarray, page_size: int) -> np.ndarray:
        """int64 `[len(table)]`: slots of each page that lie below `lengths` `[Q]`."""
        left = np.repeat(lengths, self.page_counts) - self.columns * page_size
        return left.clip(0, page_size)

    def filled(self, lengths: np.ndarray, page_size: int) -> np.ndarray:
        """int64 `[M]`: leading slots of each page that hold something, of so many tokens each."""
        filled = np.zeros(self.num_pages, np.int64)
        np.maximum.at(filled, self.table, self.slots_below(lengths, page_size))
        filled[self.entry_pages] = page_size
        return filled

    def settled(self, computed: np.ndarray, page_size: int) -> np.ndarray:
        """bool `[M]`: pages that are computed to the end, whichever owner one asks."""
        settled = np.full(self.num_pages, page_size)
        np.minimum.at(settled, self.table, self.slots_below(computed, page_size))
        return settled == page_size

    def with_entries(self, place: np.ndarray) -> "tuple[GroupState, np.ndarray]":
        """The same with other entries: entry i is `place[i]` now, or gone if that is -1.

        Of entries that have become one, the first that has a page here gives it.

        Returns:
          The state, and int64 `[M']`: which of the old pages its pages are.
        """
        known: dict[int, int] = {}
        moved = place[self.entries]
        for entry, page in zip(moved.tolist(), self.entry_pages.tolist(), strict=True):
            if entry >= 0:
                known.setdefault(entry, page)
        entries = sorted(known)
        pages = np.array([known[entry] for entry in entries], np.int32)
        return self._with_companions(np.array(entries, np.int32), pages)

    def fit(self, num_pages: int) -> "tuple[GroupState, np.ndarray]":
        """Leave out the companions that are evicted first, until M is at most `num_pages`, or only
        pages of sequences are left; returns as `with_entries`."""
        surplus = max(0, self.num_pages - max(num_pages, self.num_owned))
        keep = np.ones(len(self.entries), bool)
        keep[self.evictable[:surplus]] = False
        return self._with_companions(self.entries[keep], self.entry_pages[keep])

    def _with_companions(self, entries: Any, pages: Any) -> "tuple[GroupState, np.ndarray]":
        order, span = self.evicted_first, (self.first, self.end)
        passed = set(order[: self.num_passed])
        return GroupState.of(self.window, span, self.table, entries, pages, order, passed)
