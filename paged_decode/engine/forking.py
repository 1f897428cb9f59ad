"""Samples that go on from the pages of another one: the part of `Scheduler` for forks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from ..allocator import PageCopies
from ..allocator.merging import in_groups
from ..errors import OutOfPages, PageTableError
from .limits import Limits
from .queue import WaitingQueue
from .requests import Sample
from .room import Allocator, Room
from .seats import Seats

__all__ = ["Forks"]


class Forks(ABC):
    """What a scheduler does with samples that share a text."""

    allocator: Allocator
    room: Room
    living: dict[int, list[Sample]]
    waiting: WaitingQueue
    limits: Limits
    _seats: Seats
    _leaving: list[Any]
    _opening: frozenset[Any] | None

    @abstractmethod
    def release(self) -> None:
        """Free the pages of who is gone."""

    @abstractmethod
    def _seat(self, sample: Sample, digests: list[bytes], cached: int | None = None) -> None: ...

    def fork(self, parent: Sample, child: Sample) -> tuple[PageCopies, ...]:
        """Let a new sample go on from what is known of one that decodes; there is a free row.

        Returns the pages to copy at once, of each group. The child gets a copy of the last page
        now, because a visit in flight may be writing to it; without room for that, or where a
        window has given back what it would begin with, the child waits.
        """
        self.living[child.request_id] = [child]
        self.limits.watch([child])
        shard, length = self.room.shard_of(parent), len(child.tokens)
        here = self._seats.on(shard)
        if self.room.protected(child) and not self.room.has_fork(child, here, shard):
            self.waiting.put(child)
            return ()
        self._fork(child, parent)
        try:
            self.allocator.truncate(child.handle, length - 1)
            child.computed = length - 1
            prepared = in_groups(self.allocator.prepare([child.handle], length))
        except (OutOfPages, PageTableError):  # or a window has given back what it begins with
            self._leaving.append(child.handle)
            child.leave_pages()
            self.waiting.put(child)
            self.release()
            return ()
        self._seat(child, [])
        return tuple(each.copies for each in prepared)

    def _fork_siblings(self, sample: Sample) -> None:
        """The prompt is computed: let the other samples share it, or wait for a row or for room.

        Where the first was let in without a question, because nothing ran, it is put for each.
        """
        siblings, sample.siblings = sample.siblings, []
        for position, sibling in enumerate(siblings):
            shard = self._seats.shard_of(sample)
            here = self._seats.on(shard)
            fits = sample.asked or self.room.has_fork(sibling, here, shard, forked=position)
            if self._seats.full or not fits:
                for other in siblings[position:]:
                    other.known = sample.computed
                    self.waiting.put(other)
                return
            self._fork(sibling, sample)
            self._seat(sibling, [])

    def _fork(self, child: Sample, parent: Sample) -> None:
        """Give the child a fork of the parent's pages."""
        self._opening = frozenset(self.allocator.handles)
        (handle,) = self.allocator.fork(parent.handle)
        child.handle, child.computed, child.scores = handle, parent.computed, parent.scores
        self._opening = None
