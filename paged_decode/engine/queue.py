"""Samples that wait: in order, or set aside until another one has computed their prefix."""

from __future__ import annotations

import operator
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Sequence

from .requests import MOST_PLACES, Sample

__all__ = ["WaitingQueue"]


class WaitingQueue:
    """Samples by their turn: `place - ageing * priority`, then place, sample and request.

    The place is that of arrival, which counts requests, and a sample keeps it whatever becomes of
    it: who comes back was here before all who have yet to begin. So the turn of two samples never
    changes, and a sample is overtaken only by requests of higher priority that came less than
    `ageing` times the difference later: nobody starves.

    One whose prefix is being computed by another is set aside until then, and has its turn again
    afterwards.
    """

    def __init__(self, page_size: int, ageing: int) -> None:
        self._ageing = ageing
        self._ready: list[Sample] = []
        self._prefixes = _PrefixesInFlight(page_size)
        self._next = 0  # the place of who comes next
        self._blocked: tuple[Sample | None, tuple[int, ...], int] = (None, (), 0)

    def __len__(self) -> int:
        return len(self._ready) + len(self._prefixes)

    def __iter__(self) -> Iterator[Sample]:
        """In order."""
        return iter(sorted((*self._ready, *self._prefixes), key=self._turn))

    def _turn(self, sample: Sample) -> tuple[int, int, int, int]:
        place = sample.place
        return place - self._ageing * sample.priority, place, sample.index, sample.request_id

    @property
    def head(self) -> Sample | None:
        """Whose turn it is."""
        return self._ready[0] if self._ready else None

    def welcome(self, firsts: Sequence[Sample]) -> None:
        """Give samples that have just come their places, and their siblings with them.

        Those of another engine keep their places among each other; where they have none, or too
        large ones, they came in this order.
        """
        places = [sample.place for sample in firsts]
        if not any(places) or self._next + max(places) > MOST_PLACES:
            order = sorted(range(len(places)), key=places.__getitem__)
            for place, at in enumerate(order):
                places[at] = place
        first, self._next = self._next, self._next + max(places, default=-1) + 1
        for sample, place in zip(firsts, places, strict=True):
            for each in (sample, *sample.siblings):
                each.place = first + place

    def put(self, sample: Sample) -> None:
        """A sample that has a place waits."""
        insort(self._ready, sample, key=self._turn)

    def take(self, sample: Sample) -> None:
        """It waits no longer, if it did."""
        at = bisect_left(self._ready, self._turn(sample), key=self._turn)
        if at < len(self._ready) and self._ready[at] is sample:
            del self._ready[at]
        else:
            self._prefixes.forget(sample)

    def block(self, sample: Sample, available: tuple[int, ...], running: int) -> None:
        """The sample at the head did not fit, with so many pages of each group, and rows."""
        self._blocked = sample, available, running

    def is_blocked(self, available: tuple[int, ...], running: int) -> bool:
        """Whether the head did not fit, and nothing has got better: no page and no row came free.

        It is tried again at the latest when a row ends.
        """
        sample, pages, rows = self._blocked
        worse = 0 < running and running >= rows and all(map(operator.le, available, pages))
        return worse and sample is self.head

    def set_aside(self, sample: Sample, digests: list[bytes]) -> bool:
        """Whether another one is computing a prefix of it; then it is not ready."""
        if not self._prefixes.set_aside(sample, digests):
            return False
        self._ready.remove(sample)
        return True

    def begin(self, sample: Sample, digests: list[bytes]) -> None:
        """A sample is to compute its pages behind `computed`; `digests` are of all full ones."""
        self._prefixes.begin(sample, digests)

    def progress(self, sample: Sample, *, over: bool) -> None:
        """It has computed so much; `over`: and computes no more."""
        for other in self._prefixes.end(sample) if over else self._prefixes.progress(sample):
            self.put(other)

    def clear(self) -> None:
        """Nobody waits, nobody computes."""
        self._ready, self._blocked = [], (None, (), 0)
        self._prefixes.clear()


class _PrefixesInFlight:
    """Which full pages running prefills are about to publish, and who waits for which of them.

    A prompt is looked at once: then it is set aside under the sample that computes its prefix, and
    costs nothing until that sample has come past the page, or has lost its pages.
    """

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self._computing: dict[bytes, Sample] = {}  # digest: by whom; it is as deep in all
        self._digests: dict[int, list[bytes]] = {}  # id(sample): what it has put there
        # id(sample): by id, for which page who waits; and id(who waits): id(sample)
        self._aside: dict[int, dict[int, tuple[int, Sample]]] = {}
        self._behind: dict[int, int] = {}

    def __iter__(self) -> Iterator[Sample]:
        return (sample for aside in self._aside.values() for _, sample in aside.values())

    def __len__(self) -> int:
        return len(self._behind)

    def begin(self, sample: Sample, digests: list[bytes]) -> None:
        """The sample is to compute its pages behind `computed`; `digests` are of all full ones."""
        first = sample.computed // self._page_size
        by = self._computing.get
        own = [digest for digest in digests[first:] if by(digest, sample) is sample]
        self._digests[id(sample)] = own
        self._computing.update(dict.fromkeys(own, sample))

    def set_aside(self, sample: Sample, digests: list[bytes]) -> bool:
        """Whether another one is computing a prefix of it; then it waits here."""
        if not self._computing:
            return False
        if self._computing.keys().isdisjoint(digests):
            return False
        digest = next(filter(self._computing.__contains__, reversed(digests)))
        other, page = self._computing[digest], digests.index(digest)
        self._aside.setdefault(id(other), {})[id(sample)] = page, sample
        self._behind[id(sample)] = id(other)
        return True

    def progress(self, sample: Sample) -> list[Sample]:
        """Who need not wait for the sample any longer, now that it has computed so much."""
        full = sample.computed // self._page_size
        return self._go_on(sample, lambda page: page < full)

    def end(self, sample: Sample) -> list[Sample]:
        """The sample computes no more of its prompt; returns who waited for it."""
        for digest in self._digests.pop(id(sample), []):
            self._computing.pop(digest, None)
        return self._go_on(sample, lambda page: True)

    def _go_on(self, sample: Sample, there: Callable[[int], bool]) -> list[Sample]:
        """Who waits for such a page of the sample, and does so no longer."""
        found = [o for page, o in self._aside.get(id(sample), {}).values() if there(page)]
        for other in found:
            self.forget(other)
        return found

    def forget(self, sample: Sample) -> None:
        """The sample waits no longer."""
        if (other := self._behind.pop(id(sample), None)) is not None:
            del self._aside[other][id(sample)]
            if not self._aside[other]:
                del self._aside[other]

    def clear(self) -> None:
        """Nobody computes, nobody waits."""
        self._computing, self._digests, self._aside, self._behind = {}, {}, {}, {}
