"""The best that an eviction could do: one that knows what will be asked for."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence

import numpy as np

from ..allocator import BlockAllocator, CachedPage
from ..engine.requests import Sample
from ..engine.room import Room

__all__ = ["Belady", "ForetoldRoom"]


class Belady:
    """The page whose next use lies furthest in the future goes first; for `hit_rate`, `simulate`.

    They tell it the whole workload, so it keeps that in memory, and serves one of their calls at a
    time. A request uses a page if its prompt covers it, the last token left out. Whoever uses a
    page uses all before it, so none stays longer than one without which it cannot be found.

    No eviction finds more blocks in `hit_rate`: prompts come one after another there, each block
    takes one page, and all of a prompt's are there when it ends. In `simulate` it is no bound, but
    what it is worth to know the order of arrival: evictions decide who is admitted when, several
    requests run at once, and a deep page takes more time to compute than its number says. What a
    sample generated counts as not used again, unless the sample was preempted or a later prompt
    repeats it; what tails of layers with a window are used for is known by their last page alone.

    Source: Belady, "A study of replacement algorithms for a virtual-storage computer", 1966.
    """

    def __init__(self) -> None:
        self._uses: dict[bytes, list[int]] | None = None
        self._begun = bytearray()
        self._first = 0  # all requests before it have begun
        self._away: dict[tuple[int, int], Sequence[bytes]] = {}  # by request and sample
        self._again: dict[bytes, list[int]] = {}  # the same by digest: requests

    def rank(self, page: CachedPage) -> tuple[int, int]:
        """By the number of the next request that uses it, the last one first, then by depth.

        Raises:
          RuntimeError: nobody has told it a workload.
        """
        if self._uses is None:
            raise RuntimeError("Belady has to know what will come: hit_rate and simulate tell it")
        return -self._next(page.digest), -page.depth

    def _next(self, digest: bytes) -> int:
        """The next request that uses the page; of one that none uses, how many there are."""
        begun, uses = self._begun, (self._uses or {}).get(digest, ())
        at = bisect_left(uses, self._first)
        while at < len(uses) and begun[uses[at]]:
            at += 1
        found = uses[at] if at < len(uses) else len(begun)
        return min(found, *self._again[digest]) if digest in self._again else found

    # ---- what it is told

    def learn(self, prompts: Iterable[np.ndarray], allocator: BlockAllocator) -> None:
        """Forget all, and get to know requests, numbered from 0, by their tokens int32 `[T]`."""
        uses, count = dict[bytes, list[int]](), 0
        for number, tokens in enumerate(prompts):
            for digest in allocator.page_digests(tokens, num_tokens=len(tokens) - 1):
                uses.setdefault(digest, []).append(number)
            count = number + 1
        self._uses = {digest: its for digest, its in uses.items() if len(its) > 1}
        self._begun, self._first, self._away, self._again = bytearray(count), 0, {}, {}

    def begin(self, number: int) -> None:
        """A request has the pages that it found, or never will."""
        self._begun[number] = True
        while self._first < len(self._begun) and self._begun[self._first]:
            self._first += 1

    def give_up(self, sample: Sample, digests: Sequence[bytes]) -> None:
        """A sample is about to lose its pages, and will look for these."""
        self._away[sample.request_id, sample.index] = digests
        for digest in digests:
            self._again.setdefault(digest, []).append(sample.request_id)

    def come_back(self, sample: Sample) -> None:
        """A sample has pages again, or never will; of one that lost none nothing changes."""
        for digest in self._away.pop((sample.request_id, sample.index), ()):
            self._again[digest].remove(sample.request_id)
            if not self._again[digest]:
                del self._again[digest]


class ForetoldRoom(Room):
    """The policies of an engine, of which `Belady` hears who is preempted."""

    belady: Belady

    def victim(self, candidates: Sequence[Sample]) -> Sample:
        """As `Room.victim`; it is preempted then."""
        sample = super().victim(candidates)
        tokens = len(sample.tokens) - 1
        self.belady.give_up(sample, self._allocator.page_digests(sample.key, num_tokens=tokens))
        return sample
