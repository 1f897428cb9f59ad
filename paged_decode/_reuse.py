"""An eviction that learns how soon pages of each kind are used again; see `ReuseAware`."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import SupportsIndex

import numpy as np

from .allocator import CachedPage
from .allocator.arguments import as_count

__all__ = ["ReuseAware"]

_BINS = 48  # of ages: below 1, 2, 4, ... retirements
_EDGES = 2.0 ** np.arange(_BINS)
_FIRST_FIT = 256  # pages ranked until the kinds differ
_FITS = 16  # of the time that is remembered, from one fit to the next
_FORGET = 8  # times the time that is remembered, until what was learnt counts half


class _Kind:
    """What was learnt of one kind: pages by their age when they were used again, or given up."""

    __slots__ = ("ages", "ended", "hits", "keep")

    def __init__(self):
        self.hits, self.ended, self.ages = [0.0] * _BINS, [0.0] * _BINS, [0.0] * _BINS
        self.keep = 0  # retirements for which a page of it is worth its place

    def end(self, age: int, *, hit: bool) -> None:
        at = age.bit_length()
        self.hits[at] += hit
        self.ended[at] += 1
        self.ages[at] += age


class ReuseAware:
    """Each kind of page is kept as long as its reuse is worth the place, and then goes first.

    It learns, for every kind, how many pages were used again after how long, also of pages that are
    no longer cached. A kind is kept for the time that gives the most hits less the price of the
    place; the price is the highest at which no place stays empty. A kind that is never used
    again goes at once; with one kind this is LRU, but for changes of the price. No page goes before
    one behind it that was released with it. One object serves one allocator, and snapshots do not
    have what it learnt. Time is counted in retirements, as in `CachedPage`. Tails of other groups
    of layers than the first go by least recent use.

    Args:
      kind: of a page, whose `uses` count from when it was first seen, even if it was evicted since;
        by default its priority and its uses, up to four. There should be few.
      remember: for how many retirements a page that was not used again is remembered; several times
        the pages of the pool.

    Sources: Wang et al., "KVCache Cache in the Wild", USENIX ATC 2025, who rank by the reuse
    probability of a request's class; Ferragut et al., "Optimizing TTL caches under heavy-tailed
    demands", SIGMETRICS 2016, for times to keep and their price.
    """

    def __init__(
        self,
        kind: Callable[[CachedPage], Hashable] = lambda page: (page.priority, min(page.uses, 4)),
        *,
        remember: SupportsIndex = 2**17,
    ):
        self.kind = kind
        self.remember = as_count("remember", remember, 1, 2 ** (_BINS - 2))
        self._kinds: dict[Hashable, _Kind] = {}
        # By age: when, of what kind, how many uses.
        self._seen: OrderedDict[bytes, tuple[int, _Kind, int]] = OrderedDict()
        self._begin = 0.0  # when what was learnt began, were it all learnt at one pace
        self._ranked, self._next_fit = 0, _FIRST_FIT
        self._pages = 0  # the largest id: so many there are
        self._last = (0, 0, 0)  # clock, depth and key of the page before

    def rank(self, page: CachedPage) -> tuple[int, int]:
        """By the time until which pages of its kind are worth their place, then by depth."""
        now = page.last_used
        if page.group:
            return now, -page.depth
        self._pages = max(self._pages, page.page)
        uses = page.uses
        if (before := self._seen.pop(page.digest, None)) is not None:
            before[1].end(max(0, now - before[0]), hit=True)
            uses = before[2] + 1
        name = self.kind(page._replace(uses=uses))
        if (kind := self._kinds.get(name)) is None:
            kind = self._kinds[name] = _Kind()
        self._seen[page.digest] = now, kind, uses
        self._forget(now)
        self._ranked += 1
        if self._ranked >= self._next_fit:
            self._fit(now)
        clock, depth, behind = self._last
        until = now + kind.keep
        if now == clock + 1 and page.depth == depth - 1:
            until = max(until, behind)
        self._last = now, page.depth, until
        return until, -page.depth

    def _forget(self, now: int) -> None:
        """Pages that were not used again for so long are taken for ones that never are."""
        while self._seen:
            digest, (when, kind, _) = next(iter(self._seen.items()))
            if now - when <= self.remember:
                return
            del self._seen[digest]
            kind.end(now - when, hit=False)

    def _fit(self, now: int) -> None:
        """Find the highest price at which no place is empty, and what each kind is kept for."""
        every = max(_FIRST_FIT, self.remember // _FITS)
        self._next_fit = self._ranked + min(self._ranked, every)
        kinds = list(self._kinds.values())
        number = {id(kind): i for i, kind in enumerate(kinds)}
        hits = np.array([kind.hits for kind in kinds]).cumsum(1)
        ended = np.array([kind.ended for kind in kinds])
        ages = np.array([kind.ages for kind in kinds])
        for when, kind, _ in self._seen.values():  # these were not used again until now
            at = (age := max(0, now - when)).bit_length()
            ended[number[id(kind)], at] += 1
            ages[number[id(kind)], at] += age
        # For how long pages were there, if none is kept longer than each edge.
        older = ended.sum(1, keepdims=True) - ended.cumsum(1)
        held = ages.cumsum(1) + _EDGES * older
        room = self._pages * max(1.0, now - self._begin)
        low, high = 2.0**-60, 1.0  # hits per page and retirement
        for _ in range(50):
            price = (low * high) ** 0.5
            if _kept(hits, held, price)[1] > room:
                low = price
            else:
                high = price
        at, _ = _kept(hits, held, low)  # no less than fits: the rest waits for the last place
        for kind, edge in zip(kinds, at.tolist(), strict=True):
            kind.keep = min(self.remember, int(_EDGES[edge])) if edge >= 0 else 0
        if now - self._begin > _FORGET * self.remember:
            self._begin += (now - self._begin) / 2
            for kind in kinds:
                for counts in (kind.hits, kind.ended, kind.ages):
                    counts[:] = [0.5 * count for count in counts]


def _kept(hits: np.ndarray, held: np.ndarray, price: float) -> tuple[np.ndarray, float]:
    """For every kind the edge of the most hits less what they cost, -1 if none is worth it; and how
    long pages are there in all then. Both arrays are float64 `[kinds, bins]`, up to each edge."""
    gain = hits - price * held
    at = gain.argmax(1)
    rows = np.arange(len(at))
    at = np.where(gain[rows, at] > 0, at, -1)
    return at, float(held[rows, at][at >= 0].sum())
