"""Who gives way under memory pressure, how, and who is let in.

Four questions, each asked of one object: which cached page is evicted (`EvictionRank`), which
sample loses its pages (`VictimPolicy`), whether they are copied to the host tier or computed again
(`PreemptionPolicy`), and how many pages stay free when a sample is admitted (`AdmissionPolicy`).

Each policy is an object with one method, so one of your own takes a few lines:

```
class ShallowLast:                       # keep what most prompts can share
    def rank(self, page):
        return -page.depth, page.last_used

allocator = BlockAllocator(1024, 16, eviction=ShallowLast())
```
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, SupportsIndex, runtime_checkable

from .allocator import LRU, CachedPage, EvictionRank
from .allocator.arguments import as_count
from .allocator.eviction import Rank

__all__ = [
    "FIFO",
    "LFU",
    "LRU",
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
    "Recompute",
    "Swap",
    "VictimPolicy",
    "Watermark",
]


class FIFO:
    """The page that was cached first goes first, however often it was used since."""

    def rank(self, page: CachedPage) -> Rank:
        return (page.born,)


class LFU:
    """The page with the fewest uses goes first, among equals the least recently used."""

    def rank(self, page: CachedPage) -> Rank:
        return page.uses, page.last_used


class SLRU:
    """Pages used once go before pages used `protect` times, each group by least recent use."""

    def __init__(self, protect: SupportsIndex = 2):
        self.protect = as_count("protect", protect, 2)

    def rank(self, page: CachedPage) -> Rank:
        return page.uses >= self.protect, page.last_used


class CostAware:
    """The page that is cheapest to compute again goes first; costs age (GreedyDual).

    Args:
      cost: of computing a page again, from its depth in pages; any unit.

    Source: Young, "On-line file caching", 1998.
    """

    def __init__(self, cost: Callable[[int], float] = lambda depth: 1.0 + depth):
        self.cost = cost

    def rank(self, page: CachedPage) -> Rank:
        return page.inflation + page.uses * self.cost(page.depth), page.last_used


class Priority:
    """The page of the lowest priority goes first, among equals the least recently used."""

    def rank(self, page: CachedPage) -> Rank:
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
