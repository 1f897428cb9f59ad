"""Who has a row on the device: a fixed slot from admission to the last visit."""

from __future__ import annotations

import heapq
from collections.abc import Iterable

from .plans import entries_of, slot_of
from .records import Enter, TableDelta
from .requests import Sample
from .room import Allocator

__all__ = ["Seats"]


class Seats:
    """Slots of every shard, the lowest taken first; `max_rows` of each, for all rows may be there.

    Attributes:
      running: who has one, in order of admission.
    """

    def __init__(self, shards: int, max_rows: int):
        self.running: list[Sample] = []
        self._max_rows = max_rows
        self._free = [list(range(i * max_rows, (i + 1) * max_rows)) for i in range(shards)]
        self._entering: list[Sample] = []  # whom the device does not know yet

    @property
    def full(self) -> bool:
        """Whether all rows are taken."""
        return len(self.running) >= self._max_rows

    @property
    def shards(self) -> range:
        """The shards, by number."""
        return range(len(self._free))

    def shard_of(self, sample: Sample) -> int:
        """Where a row is."""
        return slot_of(sample) // self._max_rows

    def on(self, shard: int) -> list[Sample]:
        """Who runs on a shard."""
        if len(self._free) == 1:
            return self.running
        return [s for s in self.running if self.shard_of(s) == shard]

    def sit(self, sample: Sample, shard: int) -> None:
        """Give the sample a row."""
        sample.slot = heapq.heappop(self._free[shard])
        self.running.append(sample)
        self._entering.append(sample)

    def leave(self, samples: Iterable[Sample]) -> None:
        """Give rows to others."""
        for sample in samples:
            heapq.heappush(self._free[self.shard_of(sample)], slot_of(sample))
            sample.slot = None
            if sample in self._entering:
                self._entering.remove(sample)
            self.running.remove(sample)

    def enter(
        self, allocator: Allocator, grown: tuple[TableDelta, ...]
    ) -> tuple[tuple[Enter, ...], tuple[TableDelta, ...]]:
        """What the device has yet to learn of rows and tables, beside what grew."""
        entering, self._entering = self._entering, []
        held = [allocator.sequence(sample.handle).groups for sample in entering]
        return entries_of(entering, held, grown)
