"""Which cached page is given up first when the free ones are used up.

A user's code runs in one place, `EvictionRank.rank`, while a call is planned and nothing has
changed yet. What the ranks give is kept in a heap here, so nobody is asked to evict.
"""

import heapq
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import numpy as np

__all__ = [
    "LRU",
    "CachedPage",
    "EvictionQueue",
    "EvictionRank",
    "Key",
    "Queued",
    "Rank",
    "Ranked",
    "successor",
]

Number: TypeAlias = int | float
Key: TypeAlias = tuple[Number, ...]
Rank: TypeAlias = Number | Key
"""One number or several, none of them NaN; the smallest is evicted first."""


class CachedPage(NamedTuple):
    """What is known of a cached page; times count retirements, so they are the same in every run.

    Attributes:
      page: its id, in the pool of its group of layers.
      depth: pages before it in its sequence.
      born: when it first lost its last owner; of one sequence, deeper pages come first.
      last_used: when it last lost its last owner.
      uses: how often that happened.
      inflation: the largest first number of a rank that was evicted so far, for ageing costs.
      priority: what `BlockAllocator.prioritize` was told, else 0.
      digest: names its tokens and all before them, as `page_digests` does; it outlives the page.
      group: of layers; in others than the first, 0, times count tails and not pages.
    """

    page: int
    depth: int
    born: int = 0
    last_used: int = 0
    uses: int = 0
    inflation: Number = 0.0
    priority: int = 0
    digest: bytes = b""
    group: int = 0


@runtime_checkable
class EvictionRank(Protocol):
    """Orders cached pages; one object may serve many allocators, as it holds no page.

    In groups of layers beside the first one it is asked once for all pages of a tail, with the last
    of them: see `BlockAllocator`.
    """

    def rank(self, page: CachedPage) -> Rank:
        """Asked whenever a page loses its last owner, and again when it gets another priority.

        It should depend on `page` alone. If it raises, so does the call that asked, and nothing
        has changed.
        """
        ...


class LRU:
    """Give up the page that has been without an owner for longest.

    Examples:
      >>> LRU().rank(CachedPage(page=3, depth=0, last_used=7))
      (7,)
    """

    def rank(self, page: CachedPage) -> Rank:
        """By `last_used`."""
        return (page.last_used,)


class Queued(NamedTuple):
    """A page in the order of eviction; ties go to the page that lost its owner first."""

    key: Key
    clock: int
    known: CachedPage


class Ranked:
    """What an order of eviction asks a rank, and the history of pages in `known`."""

    def __init__(self, rank: EvictionRank | None):
        if rank is not None and (isinstance(rank, type) or not isinstance(rank, EvictionRank)):
            raise TypeError(
                f"eviction must be an object with a method rank(page), such as LRU(); got {rank!r}"
            )
        self._rank = rank
        self.known: dict[int, CachedPage] = {}
        self._clock = 0
        self._inflation: Number = 0.0

    def priority_of(self, page: int) -> int:
        """What `set_priority` said last of a cached page."""
        return self.known[page].priority if page in self.known else 0

    def forget(self, pages: Iterable[int]) -> None:
        """The pages left the cache."""
        if self.known:
            for page in pages:
                self.known.pop(page, None)

    def _ask(self, page: CachedPage) -> Key:
        rank: Any = None if self._rank is None else self._rank.rank(page)
        key = tuple(_plain(each) for each in (rank if isinstance(rank, tuple) else (rank,)))
        if not key or None in key:
            raise TypeError(
                "rank must return a number, or a tuple of numbers, none of them NaN; "
                f"got {rank!r} for {page}"
            )
        return key  # type: ignore[return-value]


class EvictionQueue(Ranked):
    """The cached pages without an owner, in the order in which they will be given up.

    With a rank, each change costs O(log n), and the heap holds at most twice the evictable pages.
    Without one the order is that of `LRU`, and pages have no history. `known` has that of every
    published page.
    """

    def __init__(self, rank: EvictionRank | None):
        super().__init__(None if type(rank) is LRU else rank)
        self._queued: OrderedDict[int, Queued | None] = OrderedDict()
        self._heap: list[tuple[Key, int, int]] = []

    def __len__(self) -> int:
        return len(self._queued)

    def publish(
        self, page: int, depth: int, past: CachedPage | None = None, digest: bytes = b""
    ) -> None:
        """The page entered the cache; one that replaces an equal page inherits its history."""
        if self._rank is not None:
            self.known[page] = successor(page, depth, past, digest)

    def publish_each(
        self, pages: Iterable[int], depths: Iterable[int], digests: Iterable[bytes]
    ) -> None:
        """The same for many, of which none replaces another."""
        if self._rank is not None:
            for page, depth, digest in zip(pages, depths, digests, strict=True):
                self.publish(page, depth, None, digest)

    def plan(
        self, pages: Sequence[int], coming: Mapping[int, CachedPage] | None = None
    ) -> list[int] | list[Queued]:
        """What `add` needs for pages that lose their last owner in this order; changes nothing.

        `coming` has their history if they are not published yet.
        """
        if self._rank is None:
            return list(pages)
        planned = []
        for clock, page in enumerate(pages, self._clock + 1):
            known = coming[page] if coming else self.known[page]
            born = known.born or clock
            known = CachedPage(
                page,
                known.depth,
                born,
                clock,
                known.uses + 1,
                self._inflation,
                known.priority,
                known.digest,
            )
            planned.append(Queued(self._ask(known), clock, known))
        return planned

    def add(self, planned: list[Any]) -> None:
        """The pages of a plan, or those of them that were published, lost their last owner."""
        if self._rank is None:
            self._queued.update(dict.fromkeys(planned))
            return
        for entry in planned:
            self._clock = entry.clock
            self._queue(entry)

    def plan_priority(self, pages: Iterable[int], priority: int) -> list[Queued | CachedPage]:
        """What `set_priority` needs; pages that are not cached are passed over."""
        planned: list[Queued | CachedPage] = []
        for page in pages:
            if (known := self.known.get(page)) is not None:
                known = known._replace(priority=priority)
                queued = self._queued.get(page)
                planned.append(Queued(self._ask(known), queued.clock, known) if queued else known)
        return planned

    def set_priority(self, planned: list[Queued | CachedPage]) -> None:
        """Carry it out."""
        for each in planned:
            if isinstance(each, Queued):
                self._queue(each)
            else:
                self.known[each.page] = each

    def remove(self, page: int) -> None:
        """The page has an owner again, or leaves the cache."""
        del self._queued[page]

    def pop(self) -> int:
        """Choose a page and give it up; there is one."""
        if self._rank is None:
            return self._queued.popitem(last=False)[0]
        while True:
            key, clock, page = heapq.heappop(self._heap)
            queued = self._queued.get(page)
            if queued is not None and queued.clock == clock and queued.key == key:
                del self._queued[page]
                self._inflation = max(self._inflation, key[0])
                return page

    def pop_each(self, count: int) -> list[int]:
        """So many, one after the other; there are so many."""
        if self._rank is not None:
            return [self.pop() for _ in range(count)]
        pages = [*islice(self._queued, count)]
        if len(pages) == len(self._queued):
            self._queued.clear()
        else:
            for page in pages:
                del self._queued[page]
        return pages

    def repair(self, published: dict[int, Any], idle: set[int]) -> None:
        """Queue only `idle` pages, and keep only the history of `published` ones."""
        queued = OrderedDict((p, each) for p, each in self._queued.items() if p in idle)
        known = {page: each for page, each in self.known.items() if page in published}
        known |= {page: each.known for page, each in queued.items() if each is not None}
        heap = [_entry(each) for each in queued.values() if each is not None]
        heapq.heapify(heap)
        self._queued, self.known, self._heap = queued, known, heap

    def has(self, page: int, *, idle: bool) -> bool:
        """Whether a published page has the history that it needs, and its place if it is idle."""
        return (self._rank is None or page in self.known) and (not idle or page in self._queued)

    def order(self) -> list[int]:
        """The pages, the first to be evicted first."""
        if self._rank is None:
            return list(self._queued)
        return [page for _, _, page in sorted(_entry(q) for q in self._queued.values() if q)]

    def _queue(self, entry: Queued) -> None:
        self._queued[entry.known.page] = entry
        self.known[entry.known.page] = entry.known
        heapq.heappush(self._heap, _entry(entry))
        if len(self._heap) > 2 * len(self._queued) + 64:
            self._heap = [_entry(each) for each in self._queued.values() if each is not None]
            heapq.heapify(self._heap)


def successor(page: int, depth: int, past: CachedPage | None, digest: bytes) -> CachedPage:
    """The history of a page that takes the place of another in the cache, if it does."""
    if past is None:
        return CachedPage(page, depth, digest=digest)
    return CachedPage(page, depth, past.born, uses=past.uses, priority=past.priority, digest=digest)


def _entry(queued: Queued) -> tuple[Key, int, int]:
    return queued.key, queued.clock, queued.known.page


def _plain(value: Any) -> Number | None:
    """The number as one of Python's, whose comparisons never raise; None if it is not one."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float) and (number := float(value)) == number:
        return number
    return None
