"""Samples that have to begin, or to end, by some time."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Iterable

from .requests import Sample

__all__ = ["Limits"]

_FEW = 64  # entries that are kept though their samples may have ended


class Limits:
    """Who is watched, the next one first; where nobody is, nothing is asked or kept.

    Derived from `admit_by` and `end_by` of the samples: `renew` makes it whole.

    Args:
      clock: the time in seconds, from any beginning; it does not go back.
    """

    def __init__(self, clock: Callable[[], float]):
        if not callable(clock):
            raise TypeError(f"clock must be callable, got {type(clock).__name__}")
        self.clock = clock
        self._heap: list[tuple[float, int, Sample]] = []
        self._serials, self._most = itertools.count(), _FEW

    @property
    def now(self) -> float:
        """What time it is; 0 where nobody is watched."""
        return self.clock() if self._heap else 0.0

    @property
    def passed(self) -> bool:
        """Whether somebody's time may be over."""
        return bool(self._heap) and self._heap[0][0] <= self.clock()

    def watch(self, samples: Iterable[Sample]) -> None:
        """Samples that have come, with the instants that they have."""
        for sample in samples:
            for instant in (sample.admit_by, sample.end_by):
                if instant < math.inf:
                    heapq.heappush(self._heap, (instant, next(self._serials), sample))
        if len(self._heap) > self._most:
            self._sweep()

    def _sweep(self) -> None:
        """Forget who has ended or begun: at most half of what is kept is of those."""
        self._heap = [
            entry
            for entry in self._heap
            if not entry[2].ended and entry[0] in (entry[2].admit_by, entry[2].end_by)
        ]
        heapq.heapify(self._heap)
        self._most = 2 * len(self._heap) + _FEW

    def resume(self, samples: Iterable[Sample]) -> None:
        """Samples of another engine, whose instants are seconds from now on."""
        now = None
        for sample in samples:
            if min(sample.admit_by, sample.end_by) < math.inf:
                now = self.clock() if now is None else now
                sample.admit_by += now
                sample.end_by += now
                self.watch([sample])

    def renew(self, samples: Iterable[Sample]) -> None:
        """Watch these and no others."""
        self._heap = []
        self.watch(samples)

    def take(self) -> list[tuple[Sample, str]]:
        """Whose time is over, each once, and why it ends."""
        now, over = self.clock(), {}
        while self._heap and self._heap[0][0] <= now:
            sample = heapq.heappop(self._heap)[2]
            if not sample.ended and min(sample.admit_by, sample.end_by) <= now:
                waited = sample.admit_by < sample.end_by
                over[id(sample)] = sample, "waited_too_long" if waited else "timeout"
        return list(over.values())
