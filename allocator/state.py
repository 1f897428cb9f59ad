"""The bookkeeping as plain arrays, of no pool in particular."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from .group_state import GroupState

__all__ = ["AllocatorState"]


@dataclass(frozen=True, slots=True)
class AllocatorState:
    """Q sequences, E published pages and what M pages hold; no page id of any pool occurs in it.

    Pages are numbered 0 to M - 1 in the order in which `table` and then `entry_pages` first name
    them. So the pages of sequences come first, and behind them those that are only cached. Of
    several groups of layers these are the pages of the first one, which is full.

    ```
    lengths    [ 6, 7 ]   page_size 4:  two pages each
    table      [ 0 1 | 0 2 ]            page 0 is shared
    entry_pages    [ 0, 3 ]             page 3 has no owner: it is cached, and can be evicted
    entry_parents  [ -1, 0 ]            page 0 begins salt 0, page 3 follows entry 0
    evictable      [ 1 ]                entries, the first to be evicted first
    ```

    Attributes:
      page_size: S.
      lengths, computed, cached: int64 `[Q]`, as in `SequenceInfo`.
      salts: int32 `[Q]`, which of `salt_keys` each sequence was allocated with.
      salt_keys: the salts in use: b"\\0" for None, b"s" and UTF-8, or b"b" and bytes.
      table: int32 `[sum of ceil(lengths / S)]`, the pages of every sequence in order.
      entry_pages: int32 `[E]`, parents before children.
      entry_parents: int32 `[E]`, the entry of the page before, or -1 - s: first page of salt s.
      evictable: int32 `[M - pages of sequences]`, the entries whose page has no owner.
      tokens: int32 `[M, S]`.
      groups: where the sequences lie in the other groups of layers, and which pages there go with
        entries.
    """

    page_size: int
    lengths: np.ndarray
    computed: np.ndarray
    cached: np.ndarray
    salts: np.ndarray
    salt_keys: tuple[bytes, ...]
    table: np.ndarray
    entry_pages: np.ndarray
    entry_parents: np.ndarray
    evictable: np.ndarray
    tokens: np.ndarray
    groups: tuple[GroupState, ...] = ()

    @property
    def num_pages(self) -> int:
        """M."""
        return len(self.tokens)

    @property
    def first_group(self) -> GroupState:
        """Its pages as those of any other group: all entries have one, and none has passed."""
        return GroupState(
            window=None,
            num_pages=self.num_pages,
            first=np.zeros(len(self.lengths), np.int64),
            end=self.page_counts,
            table=self.table,
            entries=np.arange(len(self.entry_pages), dtype=np.int32),
            entry_pages=self.entry_pages,
            evictable=self.evictable,
        )

    @property
    def num_owned(self) -> int:
        """Pages that a sequence needs; the others are only cached."""
        return int(self.table.max(initial=-1)) + 1

    @property
    def page_counts(self) -> np.ndarray:
        """int64 `[Q]`: pages of each sequence."""
        return -(-self.lengths // self.page_size)

    @property
    def tables(self) -> list[np.ndarray]:
        """The pages of each sequence in order."""
        return self.first_group.tables

    @property
    def columns(self) -> np.ndarray:
        """int64 `[len(table)]`: the place of every page of `table` in its sequence."""
        return self.first_group.columns

    @property
    def contents(self) -> list[int]:
        """For each of the M pages a number: the same for pages with the same tokens."""
        known: dict[bytes, int] = {}
        return [known.setdefault(row.tobytes(), len(known)) for row in self.tokens]

    @property
    def empty_slots(self) -> np.ndarray:
        """bool `[M, S]`: slots that hold no token of a sequence or of the prefix cache."""
        if self.num_pages == 0:  # a file without pages may claim any S, and pays for none
            return np.zeros(self.tokens.shape, bool)
        filled = self.first_group.filled(self.lengths, self.page_size)
        return np.arange(self.page_size, dtype=np.int32) >= filled[:, None]

    def sequence_tokens(self) -> Iterator[np.ndarray]:
        """int32 `[length]` for every sequence: its tokens, and no other slot of a long page."""
        for pages, length in zip(self.tables, self.lengths.tolist(), strict=True):
            full, rest = divmod(length, self.page_size)
            tokens = self.tokens[pages[:full]].reshape(-1)
            tail = self.tokens[pages[full], :rest] if rest else tokens[:0]
            yield np.concatenate([tokens, tail])

    def fit(self, *num_pages: int) -> "tuple[AllocatorState, tuple[np.ndarray, ...]]":
        """Leave out the cached pages that are evicted first, until M is at most `num_pages`, a
        number for each group.

        Pages of sequences stay. What follows a page of the first group that is left out goes with
        it, and so do the pages of its entry in other groups.

        Returns:
          The smaller state, and for each group int64 `[M']`: which of the old pages its pages are.
        """
        room, *others = num_pages
        keep = np.ones(len(self.entry_pages), bool)
        keep[self.evictable[: max(0, self.num_pages - max(room, self.num_owned))]] = False
        if keep.all() and all(g.num_pages <= n for g, n in zip(self.groups, others, strict=True)):
            sizes = [self.num_pages, *(group.num_pages for group in self.groups)]
            return self, tuple(map(np.arange, sizes))
        kept = keep.tolist()
        for entry, parent in enumerate(self.entry_parents.tolist()):
            kept[entry] = kept[entry] and (parent < 0 or kept[parent])
        smaller, pages = self._with_entries(np.array(kept, bool))
        fitted = [group.fit(n) for group, n in zip(smaller.groups, others, strict=True)]
        places = [at[more] for at, (_, more) in zip(pages[1:], fitted, strict=True)]
        return replace(smaller, groups=tuple(group for group, _ in fitted)), (pages[0], *places)

    def under(self, salt: bytes) -> "tuple[AllocatorState, tuple[np.ndarray, ...]]":
        """Put every sequence and entry under the salt with that key, whatever theirs were.

        Of entries that are of one prefix then, the first stays, with the first page that one of
        them has in another group; what followed another follows it.

        Returns:
          The state without pages that neither a sequence nor an entry needs any more, and which of
          the old pages its pages are, as `fit`.
        """
        contents, first, parent_of = self.contents, {}, []
        stands_for: list[int] = []  # which entry stays in the place of each
        for entry, (parent, page) in enumerate(
            zip(self.entry_parents.tolist(), self.entry_pages.tolist(), strict=True)
        ):
            parent_of.append(-1 if parent < 0 else stands_for[parent])
            stands_for.append(first.setdefault((parent_of[-1], contents[page]), entry))
        merged = replace(
            self,
            salts=np.zeros_like(self.salts),
            salt_keys=(salt,),
            entry_parents=np.array(parent_of, np.int32),
        )
        stays = np.array(stands_for, np.int64)
        return merged._with_entries(stays == np.arange(len(stays)), stays)

    def without_entries(self) -> "tuple[AllocatorState, tuple[np.ndarray, ...]]":
        """The sequences alone; returns as `fit`."""
        return self._with_entries(np.zeros(len(self.entry_pages), bool))

    def _with_entries(
        self, keep: np.ndarray, stands_for: np.ndarray | None = None
    ) -> "tuple[AllocatorState, tuple[np.ndarray, ...]]":
        """`stands_for[i]` is the entry that other groups find in the place of entry i."""
        entry_place = np.where(keep, keep.cumsum() - 1, -1)
        parents, pages = self.entry_parents[keep], self.entry_pages[keep]
        kept = np.concatenate([np.arange(self.num_owned), pages[pages >= self.num_owned]])
        page_place = np.zeros(self.num_pages, np.int32)
        page_place[kept] = np.arange(len(kept))
        stands = entry_place if stands_for is None else entry_place[stands_for]
        groups = [group.with_entries(stands) for group in self.groups]
        smaller = replace(
            self,
            entry_pages=page_place[pages],
            entry_parents=_renumbered(parents, entry_place),
            evictable=entry_place[self.evictable[keep[self.evictable]]].astype(np.int32),
            tokens=self.tokens[kept],
            groups=tuple(group for group, _ in groups),
        )
        smaller.tokens[smaller.empty_slots] = 0  # of a page that only an entry had to the end
        return smaller, (kept, *(at for _, at in groups))


def _renumbered(parents: np.ndarray, entry_place: np.ndarray) -> np.ndarray:
    """Parents of entries that moved to these places; those below 0 are salts, which did not."""
    moved = parents.astype(np.int32)
    moved[parents >= 0] = entry_place[parents[parents >= 0]]
    return moved
