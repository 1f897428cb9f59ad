"""Who is preempted under memory pressure, how, and who is let in.

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
from typing import Any, NamedTuple, Protocol, SupportsIndex, TypeVar, runtime_checkable

from ._reuse import ReuseAware
from .allocator import LRU, CachedPage, EvictionRank
from .allocator.arguments import as_count, as_counts
from .allocator.eviction import Rank
from .allocator.windows import first_column, most_pages

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
    "GroupPages",
    "LastAdmitted",
    "LeastComputed",
    "LowestPriority",
    "MostPages",
    "MustFit",
    "PreemptionPolicy",
    "Priority",
    "Recompute",
    "ReuseAware",
    "SampleView",
    "Swap",
    "VictimPolicy",
    "Watermark",
    "ask_keep_free",
    "ask_swaps",
    "ask_victim",
    "require_policy",
]


class FIFO:
    """The page that was cached first goes first, however often it was used since."""

    def rank(self, page: CachedPage) -> Rank:
        """By `born`."""
        return (page.born,)


class LFU:
    """The page with the fewest uses goes first, among equals the least recently used."""

    def rank(self, page: CachedPage) -> Rank:
        """By `uses`, then by `last_used`."""
        return page.uses, page.last_used


class SLRU:
    """Pages used once go before pages used `protect` times, each group by least recent use."""

    def __init__(self, protect: SupportsIndex = 2):
        self.protect = as_count("protect", protect, 2)

    def rank(self, page: CachedPage) -> Rank:
        """By `uses >= protect`, then by `last_used`."""
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
        """By `inflation + uses * cost(depth)`, then by `last_used`."""
        return page.inflation + page.uses * self.cost(page.depth), page.last_used


class Priority:
    """The page of the lowest priority goes first, among equals the least recently used."""

    def rank(self, page: CachedPage) -> Rank:
        """By `priority`, then by `last_used`."""
        return page.priority, page.last_used


@runtime_checkable
class SampleView(Protocol):
    """What a policy sees of a sample; it must not be changed.

    Attributes:
      request_id, index: which sample of which request.
      tokens: prompt and generated tokens that were read, int each.
      computed: of them, from the first, those whose keys and values are in the cache.
      left: tokens that it can still get, by `max_new_tokens` and the longest sequence allowed.
      preemptions: how often it has lost its pages.
      priority: what `submit` was told.
      siblings: samples of the same prompt that will be forked from it.
    """

    @property
    def request_id(self) -> int:
        """Which request."""
        ...

    @property
    def index(self) -> int:
        """Which of its samples."""
        ...

    @property
    def tokens(self) -> Sequence[int]:
        """Prompt and generated tokens that were read."""
        ...

    @property
    def computed(self) -> int:
        """Leading tokens whose keys and values are in the cache."""
        ...

    @property
    def left(self) -> int:
        """Tokens that it can still get."""
        ...

    @property
    def preemptions(self) -> int:
        """How often it has lost its pages."""
        ...

    @property
    def priority(self) -> int:
        """What `submit` was told."""
        ...

    @property
    def siblings(self) -> Sequence[SampleView]:
        """Samples of the same prompt that will be forked from it."""
        ...


class GroupPages(NamedTuple):
    """What a policy sees of the pool of one group of layers.

    Attributes:
      page_size: tokens per page.
      usable: pages that there are.
      window: newest tokens that the layers see; None: all.
      chunk, ahead: of a window alone: tokens whose pages a sequence gets when it is admitted, and
        for how many tokens behind the computed ones it has pages at most.
    """

    page_size: int
    usable: int
    window: int | None = None
    chunk: int = 0
    ahead: int = 0

    def pages_for(self, num_tokens: int) -> int:
        """The most pages that one sequence holds at once until it has so many tokens."""
        pages = -(-num_tokens // self.page_size)
        if self.window is None:
            return pages
        return min(pages, most_pages(self.window, self.ahead, self.page_size))

    def least_held(self, computed: int, num_tokens: int) -> int:
        """Pages that a sequence of so many tokens has at least, admitted and so far computed."""
        if self.window is None:
            return self.pages_for(num_tokens)
        if not computed:
            return self.pages_for(min(self.chunk, num_tokens))
        first = int(first_column(computed, self.window, self.page_size))
        return -(-computed // self.page_size) - first


@runtime_checkable
class VictimPolicy(Protocol):
    """Chooses who loses its pages when the running samples do not fit any more."""

    def choose(self, running: Sequence[Any]) -> Any:
        """One of these samples (`SampleView`), given in order of admission, at least two.

        Samples that were preempted as often as the engine allows are not among them; over data
        shards, they are those of the shard that is short of pages.
        """
        ...


class LastAdmitted:
    """The sample that was admitted last: the oldest always finishes, so there is no livelock."""

    def choose(self, running: Sequence[Any]) -> Any:
        """The last of them."""
        return running[-1]


class LeastComputed:
    """The sample with the fewest tokens in the cache: the least is computed again.

    The oldest sample is spared, so that one always finishes.
    """

    def choose(self, running: Sequence[Any]) -> Any:
        """The one with the fewest computed tokens, the first one left out."""
        return min(reversed(running[1:]), key=lambda sample: sample.computed)


class MostPages:
    """The sample with the most tokens in the cache, which frees the most pages.

    The oldest sample is spared, so that one always finishes.
    """

    def choose(self, running: Sequence[Any]) -> Any:
        """The one with the most computed tokens, the first one left out."""
        return max(reversed(running[1:]), key=lambda sample: sample.computed)


class LowestPriority:
    """The sample of the lowest priority, among equals the one that was admitted last."""

    def choose(self, running: Sequence[Any]) -> Any:
        """The one with the lowest `priority`."""
        return min(reversed(running), key=lambda sample: sample.priority)


@runtime_checkable
class PreemptionPolicy(Protocol):
    """Decides how a preempted sample gets its keys and values back."""

    def swaps(self, sample: Any) -> bool:
        """Whether its pages go to the host tier; else its tokens are computed again.

        Asked of an engine with a tier, when a sample with computed tokens is preempted.
        """
        ...


class Recompute:
    """Compute the tokens again."""

    def swaps(self, sample: Any) -> bool:
        """Never."""
        return False


class Swap:
    """Copy the pages to the host tier and back."""

    def swaps(self, sample: Any) -> bool:
        """Always."""
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
        """Where `swap_seconds` of its computed tokens is less than `recompute_seconds`."""
        tokens = sample.computed
        return self.costs.swap_seconds(tokens) < self.costs.recompute_seconds(tokens)


@runtime_checkable
class AdmissionPolicy(Protocol):
    """Decides how much room the running samples keep when another one is let in."""

    def keep_free(
        self, sample: Any, running: Sequence[Any], groups: Sequence[GroupPages]
    ) -> int | Sequence[int]:
        """Pages to be left when `sample` has those for its tokens; not asked if nothing runs.

        Args:
          sample: a `SampleView`, as are those that run.
          running: in order of admission.
          groups: one for each group of layers.

        Returns:
          One number for each group, or one for all of them.
        """
        ...


class Watermark:
    """So many pages per running sample, so that the admitted do not push each other out at once.

    In a window no more than the sample can still take.
    """

    def __init__(self, pages_per_sample: SupportsIndex = 1):
        self.pages_per_sample = as_count("pages_per_sample", pages_per_sample)

    def keep_free(
        self, sample: Any, running: Sequence[Any], groups: Sequence[GroupPages]
    ) -> int | Sequence[int]:
        """`pages_per_sample` for each running sample; in a window, no more than it can take."""
        each = self.pages_per_sample
        return [
            each * len(running)
            if group.window is None
            else sum(min(each, _growth(sample, group)) for sample in running)
            for group in groups
        ]


class MustFit:
    """All pages that it and the running samples can still grow to: no preemption, less overlap."""

    def keep_free(
        self, sample: Any, running: Sequence[Any], groups: Sequence[GroupPages]
    ) -> int | Sequence[int]:
        """What all of them can still grow by."""
        return [sum(_growth(each, group) for each in (*running, sample)) for group in groups]


def _growth(sample: Any, group: GroupPages) -> int:
    """Pages that a sample can take beyond those of its tokens, and its siblings with it."""
    held = len(sample.tokens) - 1  # the newest token is written by the next step
    pages = group.pages_for(held + sample.left) - group.least_held(sample.computed, held)
    for sibling in sample.siblings:  # shares the full pages, but not those to come
        shared = held // group.page_size if group.window is None else 0
        pages += group.pages_for(held + sibling.left) - shared
    return pages


# ---- what an engine makes of the answers

T = TypeVar("T")


def require_policy(name: str, policy: T, protocol: type) -> T:
    """Refuse what is no object with the methods of that protocol."""
    if isinstance(policy, type) or not isinstance(policy, protocol):
        method = next(m for m in vars(protocol) if not m.startswith("_"))
        raise TypeError(
            f"{name} must be an object with a method {method}, a {protocol.__name__}; "
            f"got {policy!r}"
        )
    return policy


def ask_victim(policy: VictimPolicy, candidates: Sequence[T]) -> T:
    """Which of the samples gives up its pages."""
    chosen = policy.choose(candidates)
    if not any(chosen is each for each in candidates):
        raise TypeError(
            f"{type(policy).__name__}.choose must return one of the {len(candidates)} samples that "
            f"it was given, got {chosen!r}"
        )
    return chosen


def ask_keep_free(
    policy: AdmissionPolicy, sample: Any, running: Sequence[Any], groups: Sequence[GroupPages]
) -> tuple[int, ...]:
    """How many pages stay free in every group."""
    name = f"{type(policy).__name__}.keep_free must return a number of pages; it"
    kept: Any = policy.keep_free(sample, running, groups)
    if hasattr(kept, "__len__"):
        kept = as_counts(name, kept)
        if len(kept) != len(groups):
            raise ValueError(f"{name} returned {len(kept)} numbers for {len(groups)} groups")
        return kept
    return (as_count(name, kept),) * len(groups)


def ask_swaps(policy: PreemptionPolicy, sample: Any) -> bool:
    """Whether the pages of a sample go to the host tier."""
    swaps: Any = policy.swaps(sample)
    if not isinstance(swaps, bool) and type(swaps).__name__ != "bool_":
        raise TypeError(f"{type(policy).__name__}.swaps must return a bool, got {swaps!r}")
    return bool(swaps)
