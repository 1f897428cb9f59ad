"""The order of eviction in a group that is not the first: of tails, not of pages.

Pages there are of use in runs, before a column from which sequences go on: the *tail* that one
still held when it ended, or the end of what several have in common, a *branch*. Without one of its
pages a run is worth nothing. So it is ranked as a whole, by its last page, and given up page by
page before the next one is touched. Pages that a sequence passed on its way go before all of them.
"""

import heapq
from collections import OrderedDict
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from .eviction import LRU, CachedPage, EvictionRank, Key, Ranked

__all__ = ["Tail", "TailQueue"]


@dataclass(slots=True)
class Tail:
    """A tail or branch in the order of eviction; ties go to the one of the smaller `clock`.

    `known` is the history of its last page, `pages` those of its pages that have no owner now.
    """

    key: Key
    clock: int
    known: CachedPage
    pages: dict[int, None] = field(default_factory=dict)


class TailQueue(Ranked):
    """The cached pages without an owner: passed ones, the oldest first, then those of tails.

    Attributes:
      depths: int64 `[N]`, pages before each one in its sequence.
      branches: by the serial numbers of the entries with which their pages go, whether these are
        there or not.
    """

    def __init__(self, num_pages: int, rank: EvictionRank | None, group: int = 1):
        super().__init__(LRU() if rank is None else rank)
        self.depths = np.zeros(num_pages, np.int64)
        self.branches: dict[int, Tail] = {}
        self._digests, self._group = [b""] * num_pages, group
        self._passed: OrderedDict[int, None] = OrderedDict()
        self._tail_of: dict[int, Tail] = {}
        self._tails: dict[int, Tail] = {}  # those that have pages, by their clock
        self._heap: list[tuple[Key, int]] = []

    def __len__(self) -> int:
        return len(self._passed) + len(self._tail_of)

    def history(self, page: int) -> CachedPage:
        """Of a published page."""
        depth, digest = int(self.depths[page]), self._digests[page]
        now = CachedPage(page, depth, digest=digest, group=self._group)
        if (known := self.known.get(page)) is None:
            return now
        return known._replace(page=page, depth=now.depth, digest=now.digest)

    def name(self, pages: Iterable[int], digests: Iterable[bytes]) -> None:
        """Pages are about to be published beside entries with these digests."""
        for page, digest in zip(pages, digests, strict=True):
            self._digests[page] = digest

    # ---- pages without an owner

    def pass_by(self, pages: Sequence[int], serials: Sequence[int]) -> None:
        """Pages, which go with these entries, lost their last owner, who goes on without them."""
        for page, serial in zip(pages, serials, strict=True):
            if self.branches and (branch := self.branches.get(serial)):
                self._join(branch, [page])
            else:
                self._passed[page] = None

    def has_passed(self, page: int) -> bool:
        """Whether the page goes before all tails."""
        return page in self._passed

    def plan(self, pages: Sequence[int]) -> list[Tail]:
        """What `add` needs for pages of tails, of each the last page first; changes nothing."""
        tails, depth = list[Tail](), -1
        for page, its in zip(pages, self.depths[pages].tolist(), strict=True):
            if not tails or its != depth - 1:
                tails.append(self._rank_now(self.history(page), self._clock + 1 + len(tails)))
            tails[-1].pages[page], depth = None, its
        return tails

    def add(self, planned: list[Tail]) -> None:
        """Carry it out: they lost their last owner, or had passed."""
        for tail in planned:
            self._clock, pages = tail.clock, list(tail.pages)
            tail.pages.clear()
            self._join(tail, pages)

    def remove(self, page: int) -> None:
        """The page has an owner again, or leaves the cache."""
        if page in self._passed:
            del self._passed[page]
            return
        tail = self._tail_of.pop(page)
        del tail.pages[page]
        if not tail.pages:
            del self._tails[tail.clock]

    def pop(self) -> int:
        """Choose a page and give it up; there is one."""
        if self._passed:
            return self._passed.popitem(last=False)[0]
        while (tail := self._tails.get(self._heap[0][1])) is None or tail.key != self._heap[0][0]:
            heapq.heappop(self._heap)
        page = next(iter(tail.pages))
        self._inflation = max(self._inflation, tail.key[0])
        self.remove(page)
        return page

    def pop_each(self, count: int) -> list[int]:
        """So many, one after the other; there are so many."""
        return [self.pop() for _ in range(count)]

    def order(self) -> list[int]:
        """The pages, the first to be evicted first."""
        tails = sorted(self._tails.values(), key=lambda tail: (tail.key, tail.clock))
        return [*self._passed, *(page for tail in tails for page in tail.pages)]

    # ---- branches, and priorities

    def plan_branch(self, last: CachedPage, past: Tail | None) -> Tail:
        """A branch that is used now and ends with this page, in the place of a `past` one; changes
        nothing."""
        if past is not None:
            last = last._replace(born=past.known.born, uses=past.known.uses)
        return self._rank_now(last, self._clock + 1)

    def branch(self, tail: Tail, pages: Iterable[tuple[int, int]]) -> None:
        """Carry it out for the pages that go with entries: serial number, and page or 0."""
        self._clock += 1
        tail.clock = self._clock
        for serial, page in pages:
            self.branches[serial] = tail
            if page in self._passed or page in self._tail_of:
                self._join(tail, [page])

    def inherit(self, pages: Iterable[int], other: Ranked, theirs: Iterable[int]) -> None:
        """Give newly published pages the priority that those have in another order."""
        if other.known:
            for page, its in zip(pages, theirs, strict=True):
                if priority := other.priority_of(its):
                    self.known[page] = self.history(page)._replace(priority=priority)

    def plan_priority(
        self, pages: Sequence[int], serials: Iterable[int], priority: int
    ) -> tuple[list[tuple[Tail, Key, CachedPage]], dict[int, CachedPage]]:
        """What `set_priority` needs for published pages, and for branches of these entries."""
        tails = [self._tail_of[page] for page in pages if page in self._tail_of]
        tails += [self.branches[serial] for serial in serials if serial in self.branches]
        planned = []
        for tail in {tail.clock: tail for tail in tails}.values():
            known = tail.known._replace(priority=priority)
            planned.append((tail, self._ask(known), known))
        known = {page: self.history(page)._replace(priority=priority) for page in pages}
        return planned, known

    def set_priority(
        self, planned: tuple[list[tuple[Tail, Key, CachedPage]], dict[int, CachedPage]]
    ) -> None:
        """Carry it out."""
        self.known |= planned[1]
        for tail, key, known in planned[0]:
            tail.key, tail.known = key, known
            if tail.clock in self._tails:
                self._push(tail)

    # ---- what is torn, and steps that several calls share

    def repair(self, published: Container[int], idle: set[int]) -> None:
        """Keep only `idle` pages, and only the history of `published` ones."""
        tail_of = {page: tail for page, tail in self._tail_of.items() if page in idle}
        for tail in (*self._tail_of.values(), *self.branches.values()):
            tail.pages = {}
        for page in sorted(tail_of, key=lambda page: (-self.depths[page], page)):
            tail_of[page].pages[page] = None
        self._tail_of, self._tails = tail_of, {tail.clock: tail for tail in tail_of.values()}
        self._heap = [(tail.key, tail.clock) for tail in self._tails.values()]
        heapq.heapify(self._heap)
        passed = [page for page in self._passed if page in idle and page not in tail_of]
        self._passed = OrderedDict.fromkeys(passed)
        self.known = {page: each for page, each in self.known.items() if page in published}

    def has(self, page: int, *, idle: bool) -> bool:
        """Whether a published page has its place if it is idle."""
        return not idle or page in self._passed or page in self._tail_of

    def _rank_now(self, last: CachedPage, clock: int) -> Tail:
        """A tail without pages that ends with this one, and loses its owner now."""
        known = last._replace(
            born=last.born or clock,
            last_used=clock,
            uses=last.uses + 1,
            inflation=self._inflation,
        )
        return Tail(self._ask(known), clock, known)

    def _join(self, tail: Tail, pages: Sequence[int]) -> None:
        for page in pages:
            if page in self._passed or page in self._tail_of:
                self.remove(page)
        tail.pages.update(dict.fromkeys(pages))
        self._tail_of.update(dict.fromkeys(pages, tail))
        self.known.update(dict.fromkeys(pages, tail.known))
        if tail.clock not in self._tails:
            self._tails[tail.clock] = tail
            self._push(tail)

    def _push(self, tail: Tail) -> None:
        heapq.heappush(self._heap, (tail.key, tail.clock))
        if len(self._heap) > 2 * len(self._tails) + 64:
            self._heap = [(tail.key, tail.clock) for tail in self._tails.values()]
            heapq.heapify(self._heap)
