"""Who gives way under memory pressure, how, and who is let in.

Four questions, each asked of one object: which cached page is evicted (`EvictionRank`), which
sample loses its pages (`VictimPolicy`), whether they are copied to the host tier or computed again
(`PreemptionPolicy`), and how many pages stay free when a sample is admitted (`AdmissionPolicy`).

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
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, SupportsIndex, runtime_checkable

from .allocator.arguments import as_count

__all__ = [
    "FIFO",
    "LFU",
    "SLRU",
    "AdmissionPolicy",
    "CachedPage",
    "Cheaper",
    "CostAware",
    "EvictionRank",
    "LastAdmitted",
    "LeastComputed",
    "LowestPriority",
    "MostPages",
    "MustFit",
    "PreemptionPolicy",
    "Priority",
    "Ranked",
    "Recompute",
    "Swap",
    "VictimPolicy",
    "Watermark",
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
      priority: what `Ranked.prioritize` was told, else 0.
    """

    page: int
    depth: int
    born: int = 0
    last_used: int = 0
    uses: int = 0
    inflation: float = 0.0
    priority: int = 0


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
            known.born, known.uses, known.priority = past.born, past.uses, past.priority
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
        self._queue(known)

    def _queue(self, known: CachedPage) -> None:
        entry = (self._rank.rank(known), self._clock, known.page)
        self._queued[known.page] = entry
        heapq.heappush(self._heap, entry)

    def prioritize(self, pages: Iterable[int], priority: int) -> None:
        """Give cached pages a priority, for `Priority`; others are passed over.

        It lasts until the page leaves the cache.
        """
        for page in pages:
            known = self._known.get(page)
            if known is None:
                continue
            known.priority = priority
            if page in self._queued:
                self.remove(page)
                self._queue(known)

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

    def __iter__(self) -> Iterator[int]:
        """The pages in the order of eviction; snapshots keep it, `check_invariants` compares it."""
        return (page for _, _, page in sorted(self._queued.values()))

    def __len__(self) -> int:
        return len(self._queued)

    def __contains__(self, page: object) -> bool:
        return page in self._queued


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

    def __init__(self, protect: SupportsIndex = 2):
        self.protect = as_count("protect", protect, 2)

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


class Priority:
    """The page of the lowest priority goes first, among equals the least recently used."""

    def rank(self, page: CachedPage) -> tuple[float | int, ...]:
        return page.priority, page.last_used


@runtime_checkable
class VictimPolicy(Protocol):
    """Chooses who loses its pages when the running samples do not fit any more."""

    def choose(self, running: Sequence[Any]) -> Any:
        """One of these samples, given in order of admission; there are at least two.

        Samples that were preempted as often as the engine allows are not among them. A sample has
        `tokens`, `computed`, `preemptions` and `priority`, and must not be changed.
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


class LowestPriority:
    """The sample of the lowest priority, among equals the one that was admitted last."""

    def choose(self, running: Sequence[Any]) -> Any:
        return min(reversed(running), key=lambda sample: sample.priority)


@runtime_checkable
class PreemptionPolicy(Protocol):
    """Decides how a sample that gives way gets its keys and values back."""

    def swaps(self, sample: Any) -> bool:
        """Whether its pages go to the host tier; else its tokens are computed again.

        Asked of an engine with a tier, when a sample with computed tokens gives way.
        """
        ...


class Recompute:
    """Compute the tokens again."""

    def swaps(self, sample: Any) -> bool:
        return False


class Swap:
    """Copy the pages to the host tier and back."""

    def swaps(self, sample: Any) -> bool:
        return True


class Cheaper:
    """Whichever a cost model says takes less time.

    Args:
      costs: with `recompute_seconds(tokens)` and `swap_seconds(tokens)`, as
        `paged_decode.pressure.Roofline` has them.
    """

    def __init__(self, costs: Any):
        self.costs = costs

    def swaps(self, sample: Any) -> bool:
        tokens = sample.computed
        return self.costs.swap_seconds(tokens) < self.costs.recompute_seconds(tokens)


@runtime_checkable
class AdmissionPolicy(Protocol):
    """Decides how much room the running samples keep when another one is let in."""

    def keep_free(self, sample: Any, running: Sequence[Any], page_size: int) -> int:
        """Pages to be left when `sample` has those for its tokens; not asked if nothing runs."""
        ...


class Watermark:
    """So many pages per running sample, so that the admitted do not push each other out at once."""

    def __init__(self, pages_per_sample: SupportsIndex = 1):
        self.pages_per_sample = as_count("pages_per_sample", pages_per_sample)

    def keep_free(self, sample: Any, running: Sequence[Any], page_size: int) -> int:
        return self.pages_per_sample * len(running)


class MustFit:
    """All pages that it and the running samples can still grow to: no preemption, less overlap."""

    def keep_free(self, sample: Any, running: Sequence[Any], page_size: int) -> int:
        pages = 0
        for each in (*running, sample):
            held = len(each.tokens) - 1  # the newest token is written by the next step
            pages += -(-(held + each.left) // page_size) - -(-held // page_size)
            for sibling in each.siblings:  # shares the full pages, but not those to come
                pages += -(-(held + sibling.left) // page_size) - held // page_size
        return pages
