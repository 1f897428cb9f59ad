"""The bookkeeping as plain arrays: out of one allocator, checked, and into another."""

from dataclasses import dataclass, replace

import numpy as np

from .errors import PageTableError
from .pool import PagePool
from .prefix import CacheEntry, Namespace, salt_key, salt_of
from .publication import plan_publication, publish
from .sequences import SequenceTable

__all__ = ["AllocatorState", "StatePages", "check_state", "collect_state"]

_MAX_TOKENS = 2**31


@dataclass(frozen=True, slots=True)
class AllocatorState:
    """Q sequences, E published pages and what M pages hold; no page id of any pool occurs in it.

    Pages are numbered 0 to M - 1 in the order in which `table` and then `entry_pages` first name
    them. So the pages of sequences come first, and behind them those that are only cached.

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

    @property
    def num_pages(self) -> int:
        """M."""
        return len(self.tokens)

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
        return np.split(self.table, self.page_counts.cumsum())[:-1]

    @property
    def columns(self) -> np.ndarray:
        """int64 `[len(table)]`: the place of every page of `table` in its sequence."""
        counts = self.page_counts
        return np.arange(len(self.table)) - np.repeat(counts.cumsum() - counts, counts)

    @property
    def settled(self) -> np.ndarray:
        """bool `[M]`: pages that are computed to the end, whichever owner one asks."""
        settled = np.full(self.num_pages, self.page_size)
        np.minimum.at(settled, self.table, self.slots_below(self.computed))
        return settled == self.page_size

    @property
    def empty_slots(self) -> np.ndarray:
        """bool `[M, S]`: slots that hold no token of a sequence or of the prefix cache."""
        filled = np.zeros(self.num_pages, np.int64)
        np.maximum.at(filled, self.table, self.slots_below(self.lengths))
        filled[self.entry_pages] = self.page_size
        return np.arange(self.page_size) >= filled[:, None]

    def slots_below(self, lengths: np.ndarray) -> np.ndarray:
        """int64 `[len(table)]`: slots of each page that lie below `lengths` `[Q]`."""
        left = np.repeat(lengths, self.page_counts) - self.columns * self.page_size
        return left.clip(0, self.page_size)

    def sequence_tokens(self, index: int) -> np.ndarray:
        """int32 `[length]`: the tokens of one sequence."""
        ends = self.page_counts.cumsum()
        begin = int(ends[index - 1]) if index else 0
        pages = self.table[begin : ends[index]]
        return self.tokens[pages].reshape(-1)[: self.lengths[index]]

    def fit(self, num_pages: int) -> "tuple[AllocatorState, np.ndarray]":
        """Leave out the cached pages that are evicted first, until M is at most `num_pages`.

        Pages of sequences stay, and what follows a page that is left out goes with it.

        Returns:
          The smaller state, and int64 `[M']`: which of the old pages its pages are.
        """
        surplus = self.num_pages - max(num_pages, self.num_owned)
        if surplus <= 0:
            return self, np.arange(self.num_pages)
        keep = np.ones(len(self.entry_pages), bool)
        keep[self.evictable[:surplus]] = False
        for entry in range(len(keep)):
            parent = self.entry_parents[entry]
            keep[entry] &= parent < 0 or keep[parent]
        return self._with_entries(keep)

    def _with_entries(self, keep: np.ndarray) -> "tuple[AllocatorState, np.ndarray]":
        entry_place = keep.cumsum() - 1
        parents, pages = self.entry_parents[keep], self.entry_pages[keep]
        kept = np.concatenate([np.arange(self.num_owned), pages[pages >= self.num_owned]])
        page_place = np.zeros(self.num_pages, np.int32)
        page_place[kept] = np.arange(len(kept))
        smaller = replace(
            self,
            entry_pages=page_place[pages],
            entry_parents=_renumbered(parents, entry_place),
            evictable=entry_place[self.evictable[keep[self.evictable]]].astype(np.int32),
            tokens=self.tokens[kept],
        )
        return smaller, kept


def _renumbered(parents: np.ndarray, entry_place: np.ndarray) -> np.ndarray:
    """Parents of entries that moved to these places; those below 0 are salts, which did not."""
    moved = parents.astype(np.int32)
    moved[parents >= 0] = entry_place[parents[parents >= 0]]
    return moved


@dataclass(frozen=True, slots=True)
class StatePages:
    """Where the M pages of an exported state lie in its pool.

    Attributes:
      pages: int32 `[M]`, page ids.
      filled: int64 `[M]`, leading slots that hold something.
      stamps: int64 `[M]`, never given twice by one allocator: as long as a page has its stamp, its
        keys and values are what they were. -1 where they may still change.
    """

    pages: np.ndarray
    filled: np.ndarray
    stamps: np.ndarray


def collect_state(
    pool: PagePool,
    table: SequenceTable,
    row: np.ndarray,
    *,
    cached: bool,
    committed_only: bool,
) -> tuple[AllocatorState, StatePages]:
    """Export the sequences of these rows, and the pages that are only cached if `cached`."""
    length, page_size = table.length[row], pool.page_size
    counts = -(-length // page_size)
    used = np.arange(table.page_table.shape[1]) < counts[:, None]
    owned = table.page_table[row][used]
    _, first = np.unique(owned, return_index=True)
    entries, parents = _reachable(pool, None if cached else set(owned.tolist()))
    listed = np.array([entry.page for entry in entries], np.int32)
    pages = np.concatenate([owned[np.sort(first)], listed[~np.isin(listed, owned)]])
    place = np.zeros(len(pool.refs), np.int32)
    place[pages] = np.arange(len(pages))

    salts = _Salts()
    state = AllocatorState(
        page_size=page_size,
        lengths=length,
        computed=table.computed[row],
        cached=table.cached[row],
        salts=np.array([salts.index(table.namespaces[r].key) for r in row], np.int32),
        table=place[owned],
        entry_pages=place[listed],
        entry_parents=np.array(
            [-1 - salts.index(p) if isinstance(p, bytes) else p for p in parents], np.int32
        ),
        salt_keys=tuple(salts.keys),  # after everything that may add one
        evictable=_eviction_order(pool, entries, set(owned.tolist())),
        tokens=pool.tokens[pages],
    )
    where = _locate(pool, state, pages, committed_only)
    state.tokens[state.empty_slots] = 0
    return state, where


class _Salts:
    """Numbers for namespace keys, in the order in which they are first asked for."""

    def __init__(self) -> None:
        self.keys: dict[bytes, int] = {}

    def index(self, key: bytes) -> int:
        return self.keys.setdefault(key, len(self.keys))


def _reachable(
    pool: PagePool, within: set[int] | None
) -> tuple[list[CacheEntry], list[int | bytes]]:
    """Entries that can be found, on the pages `within`, parents first; and the place of each one's
    parent, or its namespace key."""
    entries: list[CacheEntry] = []
    parents: list[int | bytes] = []
    places: dict[int, int] = {}
    for entry in sorted(pool.cache.by_page.values(), key=lambda e: e.serial):
        parent = entry.parent if isinstance(entry.parent, bytes) else places.get(entry.parent)
        if parent is None or (within is not None and entry.page not in within):
            continue
        places[entry.serial] = len(entries)
        entries.append(entry)
        parents.append(parent)
    return entries, parents


def _eviction_order(pool: PagePool, entries: list[CacheEntry], owned: set[int]) -> np.ndarray:
    """Entries on pages that the state has no owner for. Pages that others own come last."""
    idle = {entry.page: at for at, entry in enumerate(entries) if entry.page not in owned}
    policy = pool.cache.policy
    known = policy if hasattr(policy, "__iter__") else ()
    order = [*(p for p in known if p in idle), *idle]  # type: ignore[union-attr]
    return np.array([idle[page] for page in dict.fromkeys(order)], np.int32)


def _locate(
    pool: PagePool, state: AllocatorState, pages: np.ndarray, committed_only: bool
) -> StatePages:
    valid = state.computed if committed_only else state.lengths
    filled = np.zeros(len(pages), np.int64)
    np.maximum.at(filled, state.table, state.slots_below(valid))
    filled[state.entry_pages] = state.page_size
    # Owners outside the state may be about to write a page of it that is not full for them.
    exported = np.bincount(state.table, minlength=len(pages))
    final = state.settled & (pool.refs[pages] <= exported)
    return StatePages(pages, filled, np.where(final, pool.stamps[pages], -1))


def check_state(state: AllocatorState) -> None:
    """Raise PageTableError with the first rule that the state breaks; types are taken on trust."""
    for rule in (
        _check_sequences,
        _check_numbering,
        _check_sharing,
        _check_entries,
        _check_prefixes,
        _check_slots,
    ):
        rule(state)


def _require(holds: bool | np.bool_, message: str) -> None:
    if not holds:
        raise PageTableError(message)


def _check_sequences(state: AllocatorState) -> None:
    lengths, computed, cached = state.lengths, state.computed, state.cached
    keys = state.salt_keys
    _require(len(set(keys)) == len(keys), "two salts are equal")
    for key in keys:
        try:
            valid = salt_key(salt_of(key)) == key
        except ValueError:
            valid = False
        _require(valid, f"salt {key[:40]!r} is not b'\\0', b's' and UTF-8, or b'b' and bytes")
    same = len(lengths) == len(computed) == len(cached) == len(state.salts)
    _require(same, "the columns of the sequences differ in length")
    for name, values in (("length", lengths), ("cached", cached)):
        _require(
            ((values >= 0) & (values <= _MAX_TOKENS)).all(),
            f"a sequence's {name} is outside 0..2**31",
        )
    _require(
        ((computed >= 0) & (computed <= lengths)).all(),
        "a sequence has more tokens computed than it has, or fewer than none",
    )
    _require(
        ((state.salts >= 0) & (state.salts < len(keys))).all(), "a sequence names no known salt"
    )
    total = int(state.page_counts.sum())
    _require(
        len(state.table) == total,
        f"the page table has {len(state.table)} entries, but the lengths need {total}",
    )
    _require(
        state.tokens.shape[1:] == (state.page_size,) and (state.tokens >= 0).all(),
        "a page holds a negative token, or another number of tokens than the page size",
    )


def _check_numbering(state: AllocatorState) -> None:
    num_pages, owned = state.num_pages, state.num_owned
    for name, ids in (("page table", state.table), ("prefix cache", state.entry_pages)):
        inside = ((ids >= 0) & (ids < num_pages)).all()
        _require(inside, f"the {name} names a page outside 0..{num_pages - 1}")
    named, first = np.unique(state.table, return_index=True)
    _require(
        len(named) == owned and (np.diff(first) > 0).all(),
        "pages are not numbered in the order in which the page table first names them",
    )
    only_cached = state.entry_pages[state.entry_pages >= owned]
    _require(
        np.array_equal(only_cached, np.arange(owned, num_pages)),
        "pages without an owner are not numbered in the order in which the prefix cache names them",
    )
    _require(
        len(np.unique(state.entry_pages)) == len(state.entry_pages),
        "the prefix cache names a page twice",
    )


def _check_sharing(state: AllocatorState) -> None:
    """An owned page has one place and one salt, whoever its owners are."""
    owner = np.repeat(np.arange(len(state.lengths)), state.page_counts)
    pairs = owner * (state.num_pages + 1) + state.table
    _require(len(np.unique(pairs)) == len(pairs), "a sequence holds a page twice")
    for what, values in (("place", state.columns), ("salt", state.salts[owner])):
        seen = np.zeros(state.num_pages, np.int64)
        seen[state.table] = values
        _require((seen[state.table] == values).all(), f"a shared page has more than one {what}")


def _check_entries(state: AllocatorState) -> None:
    pages, parents = state.entry_pages, state.entry_parents
    _require(len(pages) == len(parents), "the columns of the prefix cache differ in length")
    known = (parents < np.arange(len(pages))) & (parents >= -len(state.salt_keys))
    _require(known.all(), "an entry's parent is neither an earlier entry nor a known salt")
    column, salt = np.full((2, state.num_pages), -1, np.int64)
    column[state.table] = state.columns
    salt[state.table] = np.repeat(state.salts, state.page_counts)
    depth = np.zeros(len(pages), np.int64)
    root = np.zeros(len(pages), np.int64)
    for at, parent in enumerate(parents.tolist()):
        depth[at], root[at] = (depth[parent] + 1, root[parent]) if parent >= 0 else (0, -1 - parent)
    owned = pages < state.num_owned
    _require(
        (column[pages][owned] == depth[owned]).all() and (salt[pages][owned] == root[owned]).all(),
        "an entry is published for another place or salt than its page has in a sequence",
    )
    _require(
        np.array_equal(np.sort(state.evictable), np.flatnonzero(~owned)),
        "the order of eviction does not name exactly the entries without an owner, once each",
    )


def _check_prefixes(state: AllocatorState) -> None:
    """What can be found by its tokens: each prefix once, and none that its page does not follow."""
    prefixes: dict[tuple[int, bytes], int] = {}  # what a page is found by: parent and tokens
    for parent, page in zip(state.entry_parents.tolist(), state.entry_pages.tolist(), strict=True):
        prefixes.setdefault((parent, state.tokens[page].tobytes()), len(prefixes))
    _require(len(prefixes) == len(state.entry_pages), "two entries are of one prefix")
    entry_of = dict(zip(state.entry_pages.tolist(), range(len(prefixes)), strict=True))
    tokens = [row.tobytes() for row in state.tokens]
    for salt, table in zip(state.salts.tolist(), state.tables, strict=True):
        before: int | None = -1 - salt
        for page in table.tolist():
            found = None if before is None else prefixes.get((before, tokens[page]))
            _require(
                entry_of.get(page, found) == found,
                "an entry follows other tokens than its page does in a sequence",
            )
            before = found


def _check_slots(state: AllocatorState) -> None:
    _require(not state.tokens[state.empty_slots].any(), "a slot that holds nothing has a token")


def adopt_state(
    pool: PagePool, table: SequenceTable, state: AllocatorState, pages: np.ndarray, *, caching: bool
) -> list[int]:
    """Make sequences and cache entries of pinned pages, which are pinned no more; returns rows.

    Everything was checked. Until the end each page keeps the owner that its pin was, so that none
    of them can become free half way.
    """
    table.ensure_rows(len(state.lengths))
    table.ensure_columns(int(state.page_counts.max(initial=0)))
    keys = [Namespace(key, pool.cache.root_digest(key)) for key in state.salt_keys]
    pool.pinned[pages] = False
    pool.tokens[pages] = state.tokens
    rows = []
    for q, places in enumerate(state.tables):
        held = pages[places]
        space = keys[state.salts[q]]
        row = table.open(space, salt_of(space.key), held)
        pool.refs[held] += 1
        table.length[row], table.cached[row] = state.lengths[q], state.cached[q]
        rows.append(row)
    if caching:
        _publish_entries(pool, state, keys, pages)
    for row, computed in zip(rows, state.computed.tolist(), strict=True):
        table.computed[row] = computed
        if caching:
            publish(pool, table, plan_publication(pool, table, row, computed // state.page_size))
    pool.release(pages[: state.num_owned])
    pool.release(pages[state.entry_pages[state.evictable]][::-1])
    pool.peak_used = max(pool.peak_used, pool.num_used)
    return rows


def _publish_entries(
    pool: PagePool, state: AllocatorState, keys: list[Namespace], pages: np.ndarray
) -> None:
    made: list[CacheEntry] = []
    depths: list[int] = []
    for page, parent in zip(
        pages[state.entry_pages].tolist(), state.entry_parents.tolist(), strict=True
    ):
        before = keys[-1 - parent].digest if parent < 0 else made[parent].digest
        link = keys[-1 - parent].key if parent < 0 else made[parent].serial
        depths.append(0 if parent < 0 else depths[parent] + 1)
        (digest,) = pool.cache.digests(before, pool.tokens[page : page + 1])
        made.append(pool.publish(page, digest, link, depths[-1]))
