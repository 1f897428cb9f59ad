"""Every change of an allocator in two halves: a plan, and the function that carries it out.

A plan looks at arguments and pages, calls what a user's objects have to say (a rank, a digest),
makes room in the tables, and raises; nothing that can be seen has changed then. What it returns
changes everything at once and cannot fail. So a call over several groups of layers, and over
several shards, first makes all its plans and then carries all of them out.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import islice
from typing import Any, NamedTuple, TypeAlias, TypeVar

import numpy as np

from .adoption import adopt_state, checked_pages, plan_adoption
from .batch import PageCopies, Prepared
from .companions import Companions
from .errors import PageTableError, SequenceTooLong
from .framing import Frame, fill_span
from .groups import PageGroup, PageTable
from .growth import Growth, apply_growth, plan_growth
from .hits import Match, longest_hit, plan_priorities, plan_start, with_rest_of_tails
from .pool import C, PagePool, Release
from .prefix import Namespace, PrefixCache
from .prompt import PromptKey
from .publication import plan_publications, publish
from .rows import Handle, RowTable
from .state import AllocatorState
from .windows import no_change, plan_pass, require_held, require_pages, require_room

__all__ = ["Bookkeeping", "Growing", "Plan"]

T = TypeVar("T")
Plan: TypeAlias = Callable[[], T]

_NONE = np.empty(0, np.int64)
_MANY = 2**32  # tokens: more than any pool holds, and far from overflow


class Growing(NamedTuple):
    """What a call takes for rows of `start` tokens that are to have `stop`: a plan for each group.

    `held` and `needed` are the most pages of a row, now and then.
    """

    start: np.ndarray
    stop: np.ndarray
    held: int
    needed: int
    groups: list[Growth]


class Cut(NamedTuple):
    """What rows let go of in one group: the columns that they keep, and the pages behind those."""

    ends: list[int]
    release: Release
    num_pages: int


class Bookkeeping:
    """The rows of one allocator, and where they lie in every group of layers.

    `row` is int64 `[B]` everywhere: rows of distinct live handles.
    """

    def __init__(
        self,
        pools: Sequence[tuple[int, int | None]],
        page_size: int,
        cache: PrefixCache,
        *,
        caching: bool,
        shard: int = 0,
        num_shards: int = 1,
    ):
        """`pools` are pages of this shard and window of every group, `cache` is the first one's."""
        self.rows, self.cache = RowTable(shard, num_shards), cache

        def group(number: int, own: C) -> PageGroup[C]:
            num_pages, window = pools[number]
            pool = PagePool(num_pages, page_size, own, number=number)
            table, whole = PageTable(len(self.rows)), num_shards * num_pages
            return PageGroup(pool, table, shard * num_pages, whole, window)

        self.main = group(0, cache)  # the first group is full, and has the tokens
        others = range(1, len(pools))
        self.others = tuple(group(i, Companions(pools[i][0], cache, i)) for i in others)
        cache.followers = [group.pool.drop for group in self.others]
        self.groups: tuple[PageGroup, ...] = (self.main, *self.others)
        self.windows = tuple(group for group in self.others if group.window is not None)
        self.caching = caching

    # ---- the start and the end of a sequence

    def match(self, key: PromptKey) -> Match:
        """Look up the leading full pages, the last token left out."""
        cache, size = self.cache, self.main.pool.page_size
        chain, pages = key.chain(cache, size), key.pages(len(key) - 1, size)
        if not self.caching or not len(pages):
            return Match(chain.root, [], 0)
        digests = islice(key.digests(cache, size, chain), len(pages))
        entries = cache.match(chain.root, digests, pages, self.main.pool.tokens)
        return Match(chain.root, entries, longest_hit(entries, self.others))

    def plan_allocate(
        self, key: PromptKey, keep_free: Sequence[int], chunk: int | None = None
    ) -> Plan[Handle]:
        """`BlockAllocator.allocate`; so many pages stay free in each group."""
        rows, pool, table = self.rows, self.main.pool, self.main.table
        num_pages = pool.pages_for(len(key))
        if num_pages > pool.usable:
            raise SequenceTooLong(
                f"tokens has {len(key)} entries and needs {num_pages} pages of "
                f"{pool.page_size}, but the whole pool has {pool.usable}; shorten it, or "
                "create a larger pool"
            )
        root, entries, served = self.match(key)
        found = served * pool.page_size
        until = len(key) if chunk is None else min(len(key), found + chunk)
        ends = [num_pages if g.window is None else pool.pages_for(until) for g in self.groups]
        start = plan_start(self.main, self.others, entries, served, ends, keep_free)
        self._make_room(1, num_pages)
        known = list(key.chain(pool.cache, pool.page_size).digests)

        def apply() -> Handle:
            row = rows.open(root)
            start(row)
            rows.chains[row] = entries[:served]
            rows.digests[row] = known
            rows.length[row] = len(key)
            rows.computed[row] = rows.cached[row] = found
            rows.described[row] = found
            pool.store(table.ids[row, served:num_pages], key.tokens[found:])
            for group in self.groups:
                group.pool.cache.count_query(len(key), found)
            rows.enter(row)
            return rows.name(row)

        return apply

    def plan_fork(self, row: np.ndarray, n: int) -> Plan[list[Handle]]:
        """`BlockAllocator.fork` of one row."""
        rows, parent = self.rows, int(row[0])
        for group in self.windows:
            held = int(group.table.end[parent]) * group.pool.page_size
            if held < rows.length[parent]:
                raise PageTableError(
                    f"sequence {rows.name(parent)} of {rows.length[parent]} tokens has pages for "
                    f"{held} of them in group {group.pool.number}: compute it, then fork"
                )
        self._make_room(n)

        def apply() -> list[Handle]:
            end = self.main.pool.pages_for(int(rows.length[parent]))
            firsts = [int(group.table.first[parent]) for group in self.groups]
            spans = zip(self.groups, firsts, strict=True)
            held = [group.table.ids[parent, first:end].copy() for group, first in spans]
            for group, pages in zip(self.groups, held, strict=True):
                group.pool.share(pages, n)
            children = [rows.copy(parent) for _ in range(n)]
            for child in children:
                for group, pages, first in zip(self.groups, held, firsts, strict=True):
                    group.table.set(child, pages, first)
            rows.enter(np.array(children, np.int64))
            return [rows.name(child) for child in children]

        return apply

    def plan_free(self, row: np.ndarray) -> Plan[None]:
        """`BlockAllocator.free`."""
        cuts = self._plan_cut(row)  # of each row a tail, for whoever goes on from there

        def apply() -> None:
            self.rows.leave(row)  # first: all of them at once
            self._cut(row, cuts)
            for each in row.tolist():
                self.rows.close(each)

        return apply

    # ---- growth

    def plan_growth(
        self, row: np.ndarray, count: np.ndarray | int, chunk: int | None = None
    ) -> Growing:
        """Pages for `count` more tokens of each row; in windows, of which `chunk` are computed
        next, for those alone."""
        start = self.rows.length.take(row)
        stop = start + (count if isinstance(count, int) else np.minimum(count, _MANY))
        until = stop if chunk is None else np.minimum(stop, self.rows.computed[row] + chunk)
        return self._plan_growth(row, start, stop, until)

    def plan_pages(self, row: np.ndarray, end: np.ndarray) -> Growing:
        """`BlockAllocator.prepare`: pages for all positions below `end`."""
        start = self.rows.length.take(row)
        end = np.minimum(end, _MANY)
        return self._plan_growth(row, start, np.maximum(start, end), end)

    def _plan_growth(
        self, row: np.ndarray, start: np.ndarray, stop: np.ndarray, until: np.ndarray
    ) -> Growing:
        pool = self.main.pool
        at = int(stop.argmax()) if stop.size else 0  # faster than `max`
        longest = int(stop[at]) if stop.size else 0
        if longest > pool.usable * pool.page_size:
            raise SequenceTooLong(
                f"sequence {self.rows.name(int(row[at]))} of {start[at]} tokens cannot grow by "
                f"{stop[at] - start[at]}: the whole pool holds "
                f"{pool.usable * pool.page_size} tokens ({pool.usable} pages of "
                f"{pool.page_size}); stop it here, or create a larger pool"
            )
        growths = [plan_growth(self.main, row, start, stop, stop)]
        for group in self.others:
            end = stop if group.window is None else until
            held = -(-end // pool.page_size) - group.table.first[row]
            require_room(group, int(held.max(initial=0)))
            growths.append(plan_growth(group, row, start, stop, end))
        needed = pool.pages_for(longest)
        self._make_room(0, needed)
        held = max([growth.held for growth in growths])
        return Growing(start, stop, held, needed, growths)

    def grow(self, growing: Growing) -> list[Prepared]:
        """Carry it out; lengths are what they were."""
        pairs = zip(self.groups, growing.groups, strict=True)
        return [apply_growth(group, growth) for group, growth in pairs]

    def append(
        self, row: np.ndarray, token: np.ndarray, count: np.ndarray, growing: Growing
    ) -> list[PageCopies]:
        """`BlockAllocator.append` of the first `count[b]` of `token` `[B, k]`."""
        prepared = self.grow(growing)
        at, step = (np.arange(token.shape[1]) < count[:, None]).nonzero()
        slots = self.main.slots(row[at], growing.start[at] + step)
        self.main.pool.tokens.reshape(-1)[slots] = token[at, step]
        described = np.minimum(self.rows.described[row], growing.start)
        self.rows.described[row] = described  # before the length: it may have been `ALL`
        self.rows.length[row] = growing.start + count
        self.rows.describe(row, described)
        return [each.copies for each in prepared]

    def advance(
        self,
        row: np.ndarray,
        token: np.ndarray,
        count: np.ndarray | None,
        growing: Growing,
        frame: Frame,
        at: slice | np.ndarray,
    ) -> list[PageCopies]:
        """`BlockAllocator.advance`: fills these places of the frame; `count` None is one each."""
        start, rows, size = growing.start, self.rows, self.main.pool.page_size
        if count is not None:
            copies = self.append(row, token, count, growing)
            self.describe(row, start, start + count, frame, at)()
            return copies
        prepared = self.grow(growing)
        offset = start & (size - 1)
        for number, (group, growth) in enumerate(zip(self.groups, growing.groups, strict=True)):
            pages, entries = growth.tail, (row[growth.places], growth.columns)
            if growth.places.size:
                pages[growth.places] = group.table.ids[entries]
            slots = pages * size + offset
            if number == 0:
                group.pool.tokens.reshape(-1)[slots] = token[:, 0]
            frame.groups[number][1][at, 0] = group.whole(slots, size)
            frame.put(number, group, at, row)
        frame.tokens[at], frame.seq_lens[at], frame.positions[at, 0] = token, growing.stop, start
        rows.length[row] = growing.stop
        return [each.copies for each in prepared]

    def plan_trim(self, row: np.ndarray) -> Plan[int]:
        """`BlockAllocator.trim`."""
        return partial(self._cut, row, self._plan_cut(row, self.rows.length[row]))

    def plan_truncate(self, row: np.ndarray, length: np.ndarray) -> Plan[None]:
        """`BlockAllocator.truncate`."""
        rows, pool = self.rows, self.main.pool
        size, have = pool.page_size, rows.length[row]
        if (longer := length > have).any():
            at = int(longer.argmax())
            raise ValueError(
                f"length must be at most the sequence's length {have[at]}, got {length[at]}"
            )
        require_held(self.windows, rows, row, length)
        cuts = self._plan_cut(row, length)
        cut = (length < have) & (length % size > 0)
        tails = [np.where(cut, g.table.ids[row, length // size], 0) for g in self.groups]
        alone = [
            tail[cut.release.owners_of(tail, group.pool.refs[tail]) == 1].tolist()
            for group, cut, tail in zip(self.groups, cuts, tails, strict=True)
        ]

        def apply() -> None:
            for group, pages in zip(self.groups, tails, strict=True):
                group.pool.stamp(pages[pages > 0])  # their last slots may be written again
            for each, keep in zip(row.tolist(), length.tolist(), strict=True):
                rows.cut(each, keep, keep // size)  # before its pages: those are reserved then
            self._cut(row, cuts)
            for group, pages in zip(self.groups, alone, strict=True):  # after what was planned
                for page in pages:
                    if group.pool.cache.published[page]:
                        group.pool.unpublish(page)

        return apply

    # ---- what is computed, and what can be found

    def describe(
        self,
        row: np.ndarray,
        begin: np.ndarray,
        end: np.ndarray,
        frame: Frame,
        at: slice | np.ndarray,
    ) -> Plan[None]:
        """`BlockAllocator.batch`: fills these places of the frame; the rest is to take note."""
        rows = self.rows
        fill_span(frame, at, self.groups, rows, row, begin, end)
        before = np.minimum(rows.described[row], rows.length[row])
        after = np.where(begin <= before, np.maximum(before, end), before)
        return partial(rows.describe, row, after)

    def plan_commit(self, row: np.ndarray, computed: np.ndarray | None) -> Plan[None]:
        """`BlockAllocator.commit`; None: of all that batches have described."""
        rows = self.rows
        length, before = rows.length[row], rows.computed[row]
        described = np.minimum(rows.described[row], length)
        if computed is None:
            computed = described
        if ((excess := computed - length) > 0).any():
            at = int(excess.argmax())
            raise ValueError(
                f"computed must be at most the length, got {computed[at]} for a sequence of "
                f"{length[at]} tokens; append first"
            )
        computed = np.maximum(computed, before)
        require_pages(self.windows, rows, row, computed)
        passes = [plan_pass(group, row, computed) for group in self.windows]
        published = self.plan_publication(row, computed)

        def apply() -> None:
            published()
            rows.computed[row] = computed  # never more than there are entries for
            if np.count_nonzero(computed > described):
                rows.describe(row, np.maximum(computed, described))
            for each in passes:  # after publication
                each()

        return apply

    def plan_publication(self, row: np.ndarray, computed: np.ndarray) -> Plan[None]:
        """Let the full pages among so many tokens of rows be found."""
        rows, size = self.rows, self.main.pool.page_size
        full = computed // size
        fuller = (full > rows.computed[row] // size).nonzero()[0] if self.caching else _NONE
        if not fuller.size:
            return no_change
        fuller = fuller[rows.private[row[fuller]] == 0]
        plan = plan_publications(self.main, rows, row[fuller], full[fuller])
        return partial(publish, self.groups, rows, plan)

    def withdraw(self, row: np.ndarray) -> None:
        """`BlockAllocator.withdraw`."""
        for group in self.groups if row.size else ():
            held = [group.table.pages(each) for each in row.tolist()]
            group.pool.withdraw(np.unique(np.concatenate(held)))
        for group in self.others:  # and what it computed for an entry of someone, and passed
            for each in row.tolist():
                for entry in self.rows.chains[each]:
                    group.pool.drop(entry)

    def plan_renewal(self, generation: bytes | None, weights: bytes | None = None) -> Plan[None]:
        """Empty the prefix cache, with another root for every digest from then on.

        Who holds pages is private afterwards, who holds none begins anew. None keeps the root, or
        what a snapshot calls the weights.
        """
        cache, rows = self.cache, self.rows
        live = np.array([], np.int64) if generation is None else rows.live
        new = cache.generation if generation is None else generation
        keys = {rows.namespaces[row].key for row in live.tolist()}
        roots = {key: Namespace(key, cache.root_digest(key, new)) for key in keys}

        def apply() -> None:
            held = np.any([group.table.end[live] for group in self.groups], axis=0)
            public = live[(rows.private[live] == 0) & ~held]
            rows.make_private(live)  # first: from here on nothing of before is found or published
            self.main.pool.clear_cache()
            cache.generation = new
            if weights is not None:
                cache.num_updates, cache.weights = cache.num_updates + 1, weights
            for row in live.tolist():
                rows.namespaces[row] = roots[rows.namespaces[row].key]
            rows.private[public] = False

        return apply

    def plan_prioritize(self, pages: Iterable[int], priority: int) -> Plan[None]:
        """`BlockAllocator.prioritize`, of pages with ids from 0."""
        return plan_priorities(self.cache, self.others, pages, priority)

    # ---- pages outside sequences

    def plan_take_raw(self, count: int, group: int) -> Plan[list[int]]:
        """`BlockAllocator.allocate_pages`."""
        pool, base = self.groups[group].pool, self.groups[group].base
        pool.require(count)
        return lambda: [base + page for page in pool.take_raw(count)]

    def plan_free_raw(self, pages: np.ndarray, group: int) -> Plan[None]:
        """`BlockAllocator.free_pages`, with ids from 0."""
        pool, base = self.groups[group].pool, self.groups[group].base
        return partial(pool.release_raw, pool.plan_raw_release(pages, base))

    def plan_import(
        self, state: AllocatorState, pages: Any, *, private: bool
    ) -> Plan[list[Handle]]:
        """`BlockAllocator.import_state`."""
        main, others, rows = self.main, self.others, self.rows
        ids = checked_pages(self.groups, state, pages)
        if private and len(state.entry_pages):
            raise ValueError("a state with cached pages cannot be private; drop its entries first")
        plan = plan_adoption(main, others, state, ids, caching=self.caching, private=private)
        self._make_room(len(state.lengths), int(state.page_counts.max(initial=0)))

        def apply() -> list[Handle]:
            opened = adopt_state(main, others, rows, state, ids, plan, private=private)
            return [rows.name(row) for row in opened]

        return apply

    # ---- steps that several plans share

    def _make_room(self, num_rows: int, num_pages: int = 0) -> None:
        if num_rows:
            self.rows.make_room(num_rows)
        for group in self.groups:
            if num_rows or num_pages >= group.table.ids.shape[1]:
                group.table.make_room(len(self.rows), num_pages)

    def _plan_cut(self, row: np.ndarray, length: np.ndarray | None = None) -> list[Cut]:
        """For every group: let go of the pages that only tokens from `length[b]` on need.

        None is 0, and the end of the sequences: a tail is then all that whoever goes on needs.
        """
        cuts, rows = [], row.tolist()
        for group in self.groups:
            pool, table = group.pool, group.table
            ends = [0] * len(rows) if length is None else (-(-length // pool.page_size)).tolist()
            gone = [table.beyond(at, end)[::-1] for at, end in zip(rows, ends, strict=True)]
            ended = zip(rows, ends, strict=True) if table.aside else ()
            aside = [table.aside[at].pages for at, end in ended if not end and at in table.aside]
            num_pages, passed = sum(map(len, gone + aside)), ()
            if length is None and group.window is not None:
                gone, passed = with_rest_of_tails(group, self.rows, rows, gone)
            pages = np.concatenate(gone + aside) if rows else np.empty(0, np.int32)
            release = pool.plan_release(pages, several=len(rows) > 1, passed=passed)
            cuts.append(Cut(ends, release, num_pages))
        return cuts

    def _cut(self, row: np.ndarray, cuts: list[Cut]) -> int:
        """Carry it out; returns how many pages the rows had there."""
        for group, cut in zip(self.groups, cuts, strict=True):
            for each, end in zip(row.tolist(), cut.ends, strict=True):
                group.table.cut(each, end)
                if not end:
                    group.table.aside.pop(each, None)
            group.pool.release(cut.release)
        return sum(cut.num_pages for cut in cuts)
