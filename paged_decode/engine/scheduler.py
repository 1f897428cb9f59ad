"""Who runs, on which pages, and who gives them up. Host only: no array of a device comes here.

```
            add                      plan_prefill                    plan_decode
  caller ---------> waiting --admit--> running: prefilling, decoding --last steps--> ending
                     ^  ^ |                       |      |                             |
                     |  | +-- aside <-- a prefix  |      +--- book: has ended ---------+--> gone
                     |  +---- (comes back) -------+
                     +---- preempted -------------+
```

A plan knows what `book` was told, and of the visit in flight only how many tokens it was launched
for. A row that did not stop has got exactly those; one that did is dead on the device, which knows.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..allocator import Handle
from ..errors import OutOfPages
from .config import EngineConfig, EngineStats
from .journal import Journal, Outcome, Outcomes, outcomes_of
from .limits import Limits
from .pins import Pins
from .plans import Growth, decode_plan, filled_masks, growing
from .prefilling import Chunks, Prefilling, scored_by
from .queue import WaitingQueue
from .records import Decode, Prefill, Result, Ticket
from .renewal import Renews
from .requests import Sample
from .room import Allocator, Room
from .sampling import Broken
from .scores import Scores
from .seats import Seats
from .swapping import Swapping
from .text import Texts

__all__ = ["NeedsTruth", "Scheduler"]


class NeedsTruth(Exception):
    """There is no plan before all visits in flight are booked; nothing has changed."""


class Scheduler(Renews):
    """The queues of an engine, and the plans that follow: the same calls give the same plans.

    Whatever is raised in a call, `reset` makes it whole.

    Args:
      allocator: the pool; sequences and pages of others in it are left alone.
      config: shapes and limits.
      outcomes: where tokens and endings go.
      stats: what to count in.
      room: the policies.
      limit: tokens that a sequence may have.
      swapping: the host tier, if there is one.
      texts: what reads the text of samples, if there is something.
      clock: seconds, for `max_wait`, `timeout` and the figures of samples.

    Attributes:
      waiting: who has no pages; running: who has a row, in order of admission; ending: whose last
        tokens are in flight, and who needs no row any more.
      pins: prefixes that keep their pages.
      limits: who has to begin or to end by when; `expire` when `limits.passed`.
      on_admitted: called with a sample that has got pages, for whoever watches.
      on_release: called before pages of who is gone are freed.
    """

    def __init__(
        self,
        allocator: Allocator,
        config: EngineConfig,
        outcomes: Outcomes,
        stats: EngineStats,
        room: Room,
        *,
        limit: int,
        swapping: Swapping | None = None,
        texts: Texts | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.allocator, self.config, self.stats, self.room = allocator, config, stats, room
        self.limit, self.swapping, self.clock = limit, swapping, clock
        self.on_admitted: Callable[[Sample], object] | None = None
        self.on_release: Callable[[], object] | None = None
        self._journal = Journal(outcomes, texts, clock)
        self.living = self._journal.living
        self.waiting = WaitingQueue(allocator.page_size, config.priority_ageing)
        self.limits, self.pins = Limits(clock), Pins(allocator, room)
        self._visits = itertools.count()
        self._opening: frozenset[Any] | None = None  # live handles before one more is opened
        self._clear()

    def _clear(self) -> None:
        """Nobody runs."""
        self._seats = Seats(self.allocator.num_shards, self.config.max_rows)
        self.ending: list[Sample] = []
        self.flights = 0
        self._leaving: list[Any] = []  # handles to be freed
        self._scored: list[tuple[Scores, int]] = []  # by programs before the next of decode
        self._prefilling = Prefilling(self.allocator, self.config)

    # ---- what comes and what goes

    @property
    def running(self) -> list[Sample]:
        """Who has a row, in order of admission."""
        return self._seats.running

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not (self.living or self._leaving or self.pins.busy)

    def add(self, first: Sample) -> None:
        """A new request: its first sample, with the others as its siblings."""
        if first.request_id in self.living:
            return  # an interrupt came after the first time
        first.begin(self.clock())
        for sample in (first, *first.siblings):
            sample.bound(self.limit)
        first.place = 0
        self.waiting.welcome([first])
        self.living[first.request_id] = samples = [first, *first.siblings]
        self.waiting.put(first)
        self.limits.watch(samples)

    def cancel(self, request_id: int) -> None:
        """End what has not ended of a request; pages that programs still use are safe by order."""
        samples = self.living.get(request_id, [])
        self._conclude([Outcome(s, len(s.tokens), (), "cancelled") for s in samples])

    def pin(self, sample: Sample) -> None:
        """Let a prefix be computed, and keep its pages."""
        if sample.request_id in self.pins.samples:
            return
        sample.bound(self.limit)
        sample.place = 0
        self.waiting.welcome([sample])
        self.pins.samples[sample.request_id] = sample
        self.waiting.put(sample)

    def unpin(self, number: int) -> None:
        """Give it up, and its pages."""
        if (sample := self.pins.samples.get(number)) is not None:
            self._leave(sample)
            self.pins.forget(number)

    def expire(self) -> None:
        """End samples whose time is over, as `cancel` does."""
        over = self.limits.take()
        self._conclude([Outcome(s, len(s.tokens), (), reason) for s, reason in over])
        self.release()

    def release(self) -> None:
        """Free the pages of who is gone; if a user's rank raises, the next time."""
        if self._leaving:
            if self.on_release is not None:
                self.on_release()
            self.allocator.free(self._leaving)
            self._leaving = []

    def reset(self) -> None:
        """Make whole what was cut off: nobody keeps a page, whoever has not ended waits.

        Done again, if it was cut off itself. What was booked stays booked: tokens are entered by
        a journal, which is written in one assignment and replayed here.
        """
        self._journal.replay()
        samples = [s for group in self.living.values() for s in group if not s.ended]
        samples += self.pins.samples.values()
        known = (*samples, *self.running, *self.ending)
        own = {s.handle for s in known if s.handle is not None} | set(self._leaving)
        live = self.allocator.handles
        if self._opening is not None:
            own |= set(live) - self._opening
        self._leaving = [handle for handle in live if handle in own]
        self.release()
        self._opening = None
        self._clear()
        self.waiting.clear()
        self.pins.clear()
        anew: dict[int, Scores] = {}  # of prompts that nobody was told of, by what was known
        for sample in samples:
            sample.leave_pages()
            sample.slot, sample.siblings = None, []
            if sample.scores is not None and not sample.generated:
                sample.scores = anew.setdefault(id(sample.scores), Scores(sample.prompt_len))
            self.waiting.put(sample)
        self.limits.renew(samples)

    # ---- admission

    def _admit(self, enough: Callable[[], bool] = lambda: False) -> None:
        """Take waiting samples in order while rows and pages last, until there are enough."""
        seats, closed = self._seats, self._prefilling.closed
        while (sample := self.waiting.head) and not (closed or seats.full or enough()):
            if self.waiting.is_blocked(self.room.available(), len(self.running)):
                return
            digests = self.digests_of(sample)
            if self.waiting.set_aside(sample, digests):
                continue
            try:
                self._open(sample)
            except OutOfPages as error:
                if not self._refused(sample, error):
                    return
                continue
            self.waiting.take(sample)
            self._seat(sample, digests, sample.computed)
            if self.on_admitted is not None:
                self.on_admitted(sample)
            if sample.decoding:
                self._fork_siblings(sample)

    def digests_of(self, sample: Sample) -> list[bytes]:
        """Of the full pages that prefill computes."""
        if not self.allocator.prefix_cache:
            return []
        return self.allocator.page_digests(sample.key, num_tokens=len(sample.tokens) - 1)

    def _open(self, sample: Sample) -> None:
        """Give the sample pages for all its tokens but the newest."""
        keep = [self.room.keep_free(sample, self._seats.on(i)) for i in self._seats.shards]
        sample.asked = bool(self.running)
        self._opening = frozenset(self.allocator.handles)
        try:
            chunk = self.config.prefill_chunk
            handle = self.allocator.allocate(sample.key, keep_free=keep, chunk=chunk)
        except OutOfPages:
            self._opening = None  # what others open from here on is not ours
            raise
        self.allocator.truncate(handle, len(sample.tokens) - 1)
        sample.handle, sample.computed = handle, self.allocator.sequence(handle).computed
        self._opening = None
        for each in (sample, *sample.siblings):
            each.admit_by = math.inf
        if self.swapping is not None:
            self.stats.swapped_in_pages += self.swapping.load(handle)
            sample.computed = self.allocator.sequence(handle).computed
        if sample.preemptions == 0:
            self.stats.prefix_hit_tokens += sample.computed
        self.stats.note_usage(self.allocator.num_used)

    def _seat(self, sample: Sample, digests: list[bytes], cached: int | None = None) -> None:
        sample.admit(self.clock(), cached)
        if sample.pinned and sample.decoding:
            return  # all of it was found: it needs no row
        self._seats.sit(sample, self.room.shard_of(sample))
        if not sample.decoding:
            self._prefilling.samples.append(sample)
            self.waiting.begin(sample, digests)

    def _refused(self, sample: Sample, error: OutOfPages) -> bool:
        """There are not enough pages: whether the sample was ended, for there never will be."""
        if self.running or self.ending or self.flights or self.room.passes(error):
            if not self._prefilling.any:  # which may publish what it waits for
                self.waiting.block(sample, self.room.available(), len(self.running))
            return False
        if sample.pinned:
            self.waiting.take(sample)
            self.pins.put_off(sample)
            return True
        detail = self.room.shortage(error, pinned=self.pins.pages)
        ended = (sample, *sample.siblings)
        self._conclude([Outcome(s, len(s.tokens), (), "capacity", detail=detail) for s in ended])
        return True

    # ---- prefill

    def plan_prefill(self) -> Prefill | None:
        """Admit who fits, and choose the chunks of this visit's next program; None: it has no more.

        Who is not to be in it is admitted later, while the device works.

        Raises:
          NeedsTruth: as `plan_decode`.
        """
        prefilling = self._prefilling
        for pin in self.pins.back():
            self.waiting.put(pin)
        if self.swapping is not None and not prefilling.under_way:
            self.swapping.settle()
        self._admit(lambda: prefilling.has_rows)
        while prefilling.samples:
            found = prefilling.next_chunks()
            if isinstance(found, Chunks):
                self.stats.note_usage(self.allocator.num_used)
                return found.plan(*self._seats.enter(self.allocator, found.taken.tables))
            if found is None or prefilling.under_way or growing(self.running):
                break  # those that grow end, and give pages back
            if self.flights:
                raise NeedsTruth
            prefilling.closed = True
            if not self._make_way(self._seats.shard_of(prefilling.samples[0]), found):
                break
        self._admit()
        prefilling.end_visit()
        return None

    def prefilled(self, plans: Sequence[Prefill]) -> None:
        """The visit's programs are launched: whoever reads what they write comes after them."""
        ends = self._prefilling.turn(plans)
        self._scored += scored_by(plans)
        self.stats.prefill_tokens += sum(end - sample.computed for sample, end in ends)
        again = (min(end, sample.known) - sample.computed for sample, end in ends)
        self.stats.recomputed_tokens += sum(max(0, count) for count in again)
        self.allocator.commit([s.handle for s, _ in ends], [end for _, end in ends])
        for sample, end in ends:
            sample.computed = end
        for sample, _ in ends:
            self.waiting.progress(sample, over=sample.decoding)
            if sample.decoding and sample.pinned:
                self._seats.leave([sample])
            elif sample.decoding:
                self._fork_siblings(sample)

    # ---- growth

    def plan_decode(self) -> Decode | None:
        """Find pages for the next steps, preempting who must be, and plan them.

        Raises:
          NeedsTruth: pages are short, and what is in flight may have ended rows; or a mask has to
            know the token in flight.
        """
        masks: dict[Sample, np.ndarray] = {}
        if self.config.token_masks:
            if self.flights and any(s.constraint and s.in_flight for s in self.running):
                raise NeedsTruth
            masks = self._masks()
        if not (rows := growing(self.running)):
            return None
        grown = Growth.tried(rows, self.config.decode_steps, self.allocator)
        if isinstance(grown, OutOfPages):
            if self.flights:
                raise NeedsTruth
            parts = [self._squeeze(shard) for shard in self._seats.shards]
            grown = Growth.total([part for part in parts if part], len(self.allocator.pools))
        self.stats.note_usage(self.allocator.num_used)
        if not grown.rows:
            return None
        enter, tables = self._seats.enter(self.allocator, grown.taken.tables)
        scored, self._scored = tuple(self._scored), []
        told = masks, scored, self.version
        plan = decode_plan(next(self._visits), grown, enter, tables, *told)
        self.flights += 1
        if over := grown.fly():  # they give rows to others, though their tokens are still to come
            self.ending += over
            self._seats.leave(over)
        return plan

    def _masks(self) -> dict[Sample, np.ndarray]:
        """What may come next in rows that have a mask; whose mask fails has ended."""
        found, failed = filled_masks(growing(self.running), self.config.mask_words)
        if failed:
            self._conclude(
                [Outcome(s, len(s.tokens), (), "mask_failed", detail=why) for s, why in failed]
            )
            self.release()
        return found

    def _squeeze(self, shard: int) -> Growth | None:
        """The same for one shard that may be short: fewer steps, then fewer rows."""
        while rows := growing(self._seats.on(shard)):
            steps = self.config.decode_steps
            while isinstance(grown := Growth.tried(rows, steps, self.allocator), OutOfPages):
                if (steps := steps // 2) == 0:
                    break
            if isinstance(grown, Growth):
                return grown
            if not self._make_way(shard, grown):
                break
        return None

    def _make_way(self, shard: int, error: OutOfPages) -> bool:
        """Take the pages of one sample, or end one that is alone; whether the shard is short.

        A failure that was injected, or that passes, is nobody's: it is tried again in the next
        visit.
        """
        here = self._seats.on(shard)
        if self.room.passes(error, shard):
            return False
        if len(here) > 1:
            self.preempt(self.room.victim(here))
            return True
        if (last := here[0]).pinned:
            self._leave(last)
            self.release()
            self.pins.put_off(last)
            return True
        detail = self.room.shortage(error, shard, pinned=self.pins.pages)
        self._conclude([Outcome(last, len(last.tokens), (), "capacity", detail=detail)])
        self.release()
        return True

    # ---- preemption

    def preempt(self, sample: Sample) -> None:
        """Take a sample's pages; it waits where it was, and comes back with its tokens."""
        self._store(sample)
        self._leave(sample)
        sample.preemptions += 1
        self.stats.preemptions += 1
        self.waiting.put(sample)
        self.release()

    def _store(self, sample: Sample) -> None:
        """Begin to copy the pages of a sample to the host tier, if they are to go there."""
        if self.swapping is not None and sample.computed and self.room.swaps(sample):
            stored = self.swapping.store(sample.handle)
            self.stats.swaps += stored > 0
            self.stats.swapped_out_pages += stored

    # ---- what came out

    def book(self, ticket: Ticket, result: Result) -> None:
        """Enter what a visit wrote and generated.

        The token that a row with invalid logits had read is not entered: what the device wrote for
        it and before may be NaN, so none of its pages stays cached. What a row got that has ended
        meanwhile is dropped.
        """
        plan = ticket.plan
        for (scores, begin), found in zip(plan.scored, result.scores, strict=True):
            scores.put(begin, found)
        if any(sample.ended for sample in plan.samples):
            kept = [i for i, sample in enumerate(plan.samples) if not sample.ended]
            plan, result = plan.only(kept), result.only(kept)
        handles = np.array([s.handle for s in plan.samples], np.int64)
        newest = np.array([s.tokens[-1] for s in plan.samples], np.int32)
        written = np.concatenate([newest[None], result.tokens[:-1]]).T
        outcomes, counts = outcomes_of(plan, result, self._journal.texts)
        self.flights -= 1
        self._conclude(outcomes)
        self.stats.decode_tokens += int(counts.sum())
        self.stats.draft_tokens += 0 if result.drafted is None else int(result.drafted.sum())
        if not handles.size:
            return
        self.allocator.append(handles, written, counts)
        try:
            computed = [len(s.tokens) - 1 for s in plan.samples]
            self.allocator.commit(handles, np.array(computed, np.int64))
        finally:  # whatever a digest of the user's raises
            for handle in map(Handle, handles[result.broken == Broken.MODEL].tolist()):
                self.allocator.withdraw([handle])
                if self.swapping is not None:
                    self.swapping.forget(handle)
        if (result.broken == Broken.MODEL).any():
            for pin in self.pins.lost():
                self._leave(pin)
                self.waiting.put(pin)
        self.release()

    def drop(self, ticket: Ticket) -> None:
        """A visit of which all rows have ended is not read."""
        self.flights -= 1
        self.release()

    def _conclude(self, outcomes: Sequence[Outcome]) -> None:
        """Enter what has become of samples; who has ended leaves."""
        self._journal.enter(outcomes)
        for sample in [o.sample for o in outcomes if o.reason is not None]:
            self._leave(sample)

    def _leave(self, sample: Sample) -> None:
        """Take a sample out of wherever it is; `release` frees its pages."""
        if sample.handle is None:
            self.waiting.take(sample)
            return
        self._leaving.append(sample.handle)
        sample.leave_pages()
        if sample.slot is not None:
            self._seats.leave([sample])
        elif not sample.pinned:
            self.ending.remove(sample)
        if self._prefilling.leave(sample):
            self.waiting.progress(sample, over=True)
