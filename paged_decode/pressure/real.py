"""A workload through a real engine and its model, in wall-clock time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

import jax
import numpy as np

from ..allocator import BlockAllocator
from ..engine import Engine, EngineConfig, EngineStats
from ..engine.events import TokenEvent
from ..engine.loop import Plans
from ..engine.params import SamplingParams
from ..engine.records import Decode, Prefill, Result, Runner, Ticket
from ..policies import SampleView
from ..tiers import CacheHolder, PageMover
from ._values import as_number, as_whole
from .costs import Program
from .programs import decode_program, prefill_program
from .report import TOO_LONG, Record, Report, UsageLog, summarize
from .workload import Request, in_order

__all__ = ["ProgramTimer", "run"]

_LONGEST_SLEEP = 3600.0  # seconds: a clock takes no more than some years at once


class ProgramTimer:
    """Notes every device program of an engine and how long it took, to calibrate `Measured`.

    The engine waits for every program then, so the times are those of one that collects at once.
    The host's time of a visit counts for the program that comes after it, and at the end of the
    visit for the last one, so that the times of a visit add up to it.

    Attributes:
      timings: programs and seconds, in order.
    """

    def __init__(self, engine: Engine):
        self.timings: list[tuple[Program, float]] = []
        self._mark = 0.0
        loop, tier = engine.loop, engine.tier
        loop.runner = _TimedRunner(loop.runner, engine.runner, engine.config, self)
        loop.scheduler = _TimedPlans(loop.scheduler, self)
        if tier is not None:
            tier.mover = _TimedMover(tier.mover, self)

    def begin(self) -> None:
        """A visit begins."""
        self._mark = time.perf_counter()

    def note(self, program: Program) -> None:
        """The program has just ended."""
        self.timings.append((program, self._elapsed()))

    def note_rest(self) -> None:
        """What was done since the last program belongs to it."""
        if self.timings:
            program, seconds = self.timings[-1]
            self.timings[-1] = program, seconds + self._elapsed()

    def _elapsed(self) -> float:
        now = time.perf_counter()
        seconds, self._mark = now - self._mark, now
        return seconds


class _TimedPlans:
    """A scheduler whose visits are noted as they begin and end."""

    def __init__(self, plans: Plans, timer: ProgramTimer):
        self._plans, self._timer = plans, timer
        self.plan_prefill, self.prefilled = plans.plan_prefill, plans.prefilled
        self.plan_decode, self.drop, self.reset = plans.plan_decode, plans.drop, plans.reset

    def release(self) -> None:
        self._timer.begin()
        self._plans.release()

    def book(self, ticket: Ticket, result: Result) -> None:
        self._plans.book(ticket, result)
        self._timer.note_rest()


class _TimedRunner:
    """A runner that waits for every program and notes it."""

    def __init__(
        self, runner: Runner, holder: CacheHolder, config: EngineConfig, timer: ProgramTimer
    ):
        self._runner, self._holder, self._config, self._timer = runner, holder, config, timer
        self.launched, self.wait = runner.launched, runner.wait
        self.collect, self.restart = runner.collect, runner.restart

    @property
    def is_lost(self) -> bool:
        return self._runner.is_lost

    def prefill(self, plan: Prefill) -> None:
        self._runner.prefill(plan)
        jax.block_until_ready(self._holder.cache)
        self._timer.note(prefill_program(plan, self._config))

    def decode(self, plan: Decode) -> Ticket:
        ticket = self._runner.decode(plan)
        self._runner.wait(ticket.out)
        if copied := sum(len(each.src) for each in plan.copies):  # with the program: one wait less
            self._timer.timings.append((Program("copy", copied, 1, 0, 0), 0.0))
        self._timer.note(decode_program(plan, self._config))
        return ticket


class _TimedMover:
    """Notes the copies of another mover; what leaves the device is noted as it is begun."""

    def __init__(self, mover: PageMover, timer: ProgramTimer):
        self._mover, self._timer = mover, timer

    def take(self, cache: Any, pages: np.ndarray) -> Any:
        copy = self._mover.take(cache, pages)
        self._timer.note(Program("store", len(pages), 1, 0, 0))
        return copy

    def finish(self, copy: Any) -> Any:
        return self._mover.finish(copy)

    def put(self, cache: Any, rested: Any, pages: np.ndarray) -> Any:
        cache = jax.block_until_ready(self._mover.put(cache, rested, pages))
        self._timer.note(Program("load", len(pages), 1, 0, 0))
        return cache


def run(
    engine: Engine,
    requests: Iterable[Request],
    *,
    vocab_size: int | None = None,
    time_scale: int | float = 1.0,
    queue_rows: int = 4,
    progress: Callable[[int], object] | None = None,
) -> Report:
    """Run a workload through an engine and its model; greedy, every answer to its full length.

    Warm the engine up before. Requests are handed over as in `simulate`.

    Args:
      engine: an idle one.
      requests: in order of arrival.
      vocab_size: prompts are text of ids below it; None is the engine's own.
      time_scale: seconds to wait per second between arrivals; 0 hands all over at once.
      queue_rows: as in `simulate`.
      progress: called with the number of requests that have ended.

    Raises:
      NotImplementedError: the pool is split over a data axis.
      ValueError: no vocab_size is known, or it is not 1 to the engine's; time_scale is no finite
        number of 0 or more, or queue_rows less than 1; the engine is not idle; requests are not in
        order of arrival. Whatever is raised while it runs, its requests are cancelled.
    """
    vocab = _vocabulary(engine, vocab_size)
    time_scale = as_number("time_scale", time_scale, zero=True)
    most_waiting = as_whole("queue_rows", queue_rows, 1) * engine.config.max_rows
    if not isinstance(engine.allocator, BlockAllocator):
        raise NotImplementedError("a run reports on one pool, not on one split over a data axis")
    if not engine.idle:
        raise ValueError("expected an idle engine, got one with requests: let them end first")
    with _watched(engine) as watch:
        usage, before = UsageLog(engine.allocator), replace(engine.stats)
        coming = in_order(requests)
        upcoming = next(coming, None)
        start = time.perf_counter()
        engine.scheduler.on_release = lambda: usage.held(time.perf_counter() - start)
        while upcoming is not None or not engine.idle:
            now = time.perf_counter() - start
            while (
                upcoming is not None
                and upcoming.arrival_seconds * time_scale <= now
                and engine.num_waiting < most_waiting
            ):
                watch.accept(upcoming, upcoming.arrival_seconds * time_scale, vocab)
                upcoming = next(coming, None)
            if engine.idle and upcoming is not None:
                wait = upcoming.arrival_seconds * time_scale - now
                time.sleep(min(max(0.0, wait), _LONGEST_SLEEP))
                usage.held(time.perf_counter() - start)
                continue
            ended = watch.note(engine.step(), time.perf_counter() - start)
            usage.note(time.perf_counter() - start, *watch.counts(before))
            if progress and ended:
                progress(ended)
        seconds = time.perf_counter() - start
    stats, limit = _since(before, engine.stats, usage), engine.max_sequence_tokens
    records = list(watch.records.values())
    return summarize(records, stats, engine.allocator, usage, seconds, limit)


def _vocabulary(engine: Engine, vocab_size: int | None) -> int:
    own = engine.config.vocab_size
    if vocab_size is None and own is None:
        raise ValueError("give vocab_size, here or in the engine's config")
    return as_whole("vocab_size", own if vocab_size is None else vocab_size, 1, own or 2**31 - 1)


def _since(before: EngineStats, now: EngineStats, usage: UsageLog) -> EngineStats:
    """What an engine has done since."""
    names = [each.name for each in fields(EngineStats)]
    stats = EngineStats(**{name: getattr(now, name) - getattr(before, name) for name in names})
    # The peak of an engine may be of an earlier run; then the one at the ends of visits.
    grown = now.peak_used_pages > before.peak_used_pages
    stats.peak_used_pages = now.peak_used_pages if grown else usage.counted()[2]
    return stats


@contextmanager
def _watched(engine: Engine) -> Iterator[_Watch]:
    """Watches the engine for the time of a run, which takes its requests with it if it fails."""
    watch, scheduler = _Watch(engine), engine.scheduler
    watched = scheduler.on_admitted, scheduler.on_release
    scheduler.on_admitted = watch.admitted
    try:
        yield watch
    except BaseException:
        engine._withdraw(watch.living())
        raise
    finally:
        scheduler.on_admitted, scheduler.on_release = watched


class _Watch:
    """Turns events into records, which have numbers of their own."""

    def __init__(self, engine: Engine):
        self.engine, self.records = engine, dict[int, Record]()
        self._open: dict[int, int] = {}  # by record: samples that have not ended
        self._numbers: dict[int, int] = {}  # by request: its record

    def living(self) -> set[int]:
        """Requests that have not ended."""
        return {request for request, number in self._numbers.items() if number in self._open}

    def counts(self, before: EngineStats) -> tuple[int, int, int]:
        """Samples that wait and that run, and preemptions since."""
        engine = self.engine
        preemptions = engine.stats.preemptions - before.preemptions
        return engine.num_waiting, len(engine.scheduler.running), preemptions

    def admitted(self, sample: SampleView) -> None:
        self.records[self._numbers[sample.request_id]].note_admission(sample)

    def accept(self, request: Request, arrival: float, vocab: int) -> None:
        engine, number, size = self.engine, len(self.records), request.prompt_tokens
        record = Record(number, arrival, size, samples=request.samples)
        self.records[number] = record
        if size + 1 > engine.max_sequence_tokens:
            record.note_end(TOO_LONG, arrival)
            return
        request_id = engine.submit(
            request.text(vocab).tolist(),
            SamplingParams(max_new_tokens=request.output_tokens),
            n=request.samples,
            priority=request.priority,
        )
        self._open[number] = request.samples
        self._numbers[request_id] = number

    def note(self, events: Iterable[TokenEvent], now: float) -> int:
        """Enter events of a step that has just ended; returns how many requests ended."""
        before = len(self._open)
        for event in events:
            number = self._numbers[event.request_id]
            record = self.records[number]
            if event.token is not None:
                record.output_tokens += 1
                record.first_seconds = now if record.first_seconds is None else record.first_seconds
            if event.finish_reason is not None:
                told = event.figures
                record.note_end(event.finish_reason, now, told.preemptions if told else 0)
                self._open[number] -= 1
                if self._open[number] == 0:
                    del self._open[number]
        return before - len(self._open)
