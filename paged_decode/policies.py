"""Who gives way under memory pressure: ranks of cached pages, and the choice of a victim.

Each policy is an object with one method, so one of your own takes a few lines:

```
class ShallowLast:                       # keep what most prompts can share
    def rank(self, page):
        return -page.depth, page.last_used

allocator = BlockAllocator(1024, 16, eviction=Ranked(ShallowLast()))
```
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

__all__ = [
    "FIFO",
    "LFU",
    "SLRU",
    "CachedPage",
    "CostAware",
    "EvictionRank",
    "LastAdmitted",
    "LeastComputed",
    "MostPages",
    "Ranked",
    "VictimPolicy",
]


@dataclass(slots=True)
class CachedPage:
    """What is known of a cached page; times count retirements, so they are the same in every run.

    Attributes:
      page: its id.
      depth: pages before it in its sequence.
      born: when it first lost its last owner; of one sequence, deeper pages come first.
      last_used: when it last lost its last owner.
      uses: how often that happened.
      inflation: the largest first rank that was evicted so far, for ageing costs.
    """

    page: int
    depth: int
    born: int = 0
    last_used: int = 0
    uses: int = 0
    inflation: float = 0.0


@runtime_checkable
class EvictionRank(Protocol):
    """Orders cached pages: the smallest rank is evicted first."""

    def rank(self, page: CachedPage) -> tuple[float | int, ...]:
        """Asked once, whenever the page loses its last owner."""
        ...


class Ranked:
    """An eviction policy for `BlockAllocator` that evicts the page of the smallest rank.

    Ties go to the page that lost its owner first. One object serves one allocator. Each call costs
    O(log n); the heap holds at most twice the evictable pages.

    Example:
      >>> policy = Ranked(FIFO())
      >>> for page in (3, 5):
      ...     policy.publish(page, depth=0)
      >>> policy.add(3); policy.add(5)
      >>> policy.remove(3); policy.add(3)
      >>> policy.pop()
      3
    """

    def __init__(self, rank: EvictionRank):
        self._rank = rank
        self._known: dict[int, CachedPage] = {}
        self._queued: dict[int, tuple[tuple[float | int, ...], int, int]] = {}
        self._heap: list[tuple[tuple[float | int, ...], int, int]] = []
        self._last_forgotten: CachedPage | None = None
        self._clock = 0
        self._inflation = 0.0

    def publish(self, page: int, depth: int, replaces: int | None = None) -> None:
        """The page entered the cache; one that replaces an equal page inherits its history."""
        past = self._last_forgotten
        known = CachedPage(page, depth)
        if past is not None and past.page == replaces:
            known.born, known.uses = past.born, past.uses
        self._known[page] = known

    def forget(self, page: int) -> None:
        """The page left the cache."""
        self._last_forgotten = self._known.pop(page)

    def add(self, page: int) -> None:
        self._clock += 1
        known = self._known[page]
        known.last_used, known.inflation = self._clock, self._inflation
        known.born = known.born or self._clock
        known.uses += 1
        entry = (self._rank.rank(known), self._clock, page)
        self._queued[page] = entry
        heapq.heappush(self._heap, entry)

    def remove(self, page: int) -> None:
        del self._queued[page]
        if len(self._heap) > 2 * len(self._queued) + 64:
            self._heap = list(self._queued.values())
            heapq.heapify(self._heap)

    def pop(self) -> int:
        while True:
            entry = heapq.heappop(self._heap)
            if self._queued.get(entry[2]) is entry:
                del self._queued[entry[2]]
                self._inflation = max(self._inflation, entry[0][0])
                return entry[2]


class FIFO:
    """The page that was cached first goes first, however often it was used since."""

    def rank(self, page: CachedPage) -> tuple[float | int, ...]:
        return (page.born,)


class LFU:
    """The page with the fewest uses goes first, among equals the least recently used."""

    def rank(self, page: CachedPage) -> tuple[float | int, ...]:
        return page.uses, page.last_used


class SLRU:
    """Pages used once go before pages used `protect` times, each group by least recent use."""

    def __init__(self, protect: int = 2):
        if protect < 2:
            raise ValueError(f"protect must be at least 2 uses, got {protect}")
        self.protect = protect

    def rank(self, page: CachedPage) -> tuple[float | int, ...]:
        return page.uses >= self.protect, page.last_used


class CostAware:
    """The page that is cheapest to compute again goes first; costs age (GreedyDual).

    Args:
      cost: of computing a page again, from its depth in pages; any unit.

    Source: Young, "On-line file caching", 1998.
    """

    def __init__(self, cost: Callable[[int], float] = lambda depth: 1.0 + depth):
        self.cost = cost

    def rank(self, page: CachedPage) -> tuple[float | int, ...]:
        return page.inflation + page.uses * self.cost(page.depth), page.last_used


@runtime_checkable
class VictimPolicy(Protocol):
    """Chooses who loses its pages when the running samples do not fit any more."""

    def choose(self, running: Sequence[Any]) -> Any:
        """One of the running samples, given in order of admission; there are at least two.

        A sample has `tokens`, `computed` and `preemptions`, and must not be changed.
        """
        ...


class LastAdmitted:
    """The sample that was admitted last: the oldest always finishes, so there is no livelock."""

    def choose(self, running: Sequence[Any]) -> Any:
        return running[-1]


class LeastComputed:
    """The sample with the fewest tokens in the cache: the least is computed again.

    The oldest sample is spared, so that one always finishes.
    """

    def choose(self, running: Sequence[Any]) -> Any:
        return min(reversed(running[1:]), key=lambda sample: sample.computed)


class MostPages:
    """The sample with the most tokens in the cache, which frees the most pages.

    The oldest sample is spared, so that one always finishes.
    """

    def choose(self, running: Sequence[Any]) -> Any:
        return max(reversed(running[1:]), key=lambda sample: sample.computed)
