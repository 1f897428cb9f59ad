"""Going on with the requests of another engine: the part of `Scheduler` for snapshots."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence

from .forking import Forks
from .pins import Pins
from .requests import Sample

__all__ = ["TakesUp"]


class TakesUp(Forks):
    """What a scheduler does with samples that were somewhere else before."""

    limit: int
    clock: Callable[[], float]
    pins: Pins
    ending: list[Sample]

    @abstractmethod
    def digests_of(self, sample: Sample) -> list[bytes]:
        """Of the full pages that prefill computes."""

    @abstractmethod
    def preempt(self, sample: Sample) -> None:
        """Take a sample's pages."""

    def take_up(
        self,
        running: Sequence[Sample],
        waiting: Sequence[Sample],
        *,
        may_run: Callable[[Sample], bool],
    ) -> None:
        """Go on with the requests of another engine; no visit is in flight.

        Args:
          running: those that had a row, in order of admission. They get one as far as there are
            any and `may_run` says so; the others wait as if they had been preempted.
          waiting: those that had none, in order. Of both, `place` says who came there when, if
            it is not 0 of all; here they come behind those that are here.
          may_run: whether a sample has pages, and may compute them.
        """
        firsts = [*running, *waiting]
        self.waiting.welcome(firsts)
        self.limits.resume([each for first in firsts for each in (first, *first.siblings)])
        for first in firsts:
            first.begin(self.clock())
            for each in (first, *first.siblings):
                each.bound(self.limit)
                if each.pinned:
                    self.pins.samples[each.request_id] = each
                else:
                    self.living.setdefault(each.request_id, []).append(each)
        late = list(waiting)
        for sample in running:
            if may_run(sample) and not self._seats.full:
                private = self.allocator.sequence(sample.handle).private
                self._seat(sample, [] if private else self.digests_of(sample))
            else:
                late.append(sample)
        for sample in [s for s in running if s.decoding and s.slot is not None]:
            self._fork_siblings(sample)
        for sample in late:
            if sample.handle is None:
                self.waiting.put(sample)
            else:
                self.ending.append(sample)
                self.preempt(sample)
