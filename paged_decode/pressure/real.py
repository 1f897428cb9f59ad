"""A workload through a real engine and its model, on the clock of the wall."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from .._requests import Sample, TokenEvent
from ..allocator import BlockAllocator
from ..engine import Engine
from ..sampling import SamplingParams
from ..tiers import PageMover
from .costs import Program
from .report import Record, Report, UsageLog, summarize
from .workload import Request

__all__ = ["ProgramTimer", "run"]


class ProgramTimer:
    """Notes every device program of an engine and how long it took, to calibrate `Measured`.

    The host's time of a step counts for the program that comes after it, and at the end of the
    step for the last one, so that the times of a step add up to it.

    Attributes:
      timings: programs and seconds, in order.
    """

    def __init__(self, engine: Engine):
        self.timings: list[tuple[Program, float]] = []
        self._mark = 0.0
        self._engine = engine
        self._wrap("_launch_prefill", self._prefill_program)
        self._wrap("_launch_decode", self._decode_program)
        self._wrap("_run_copies", lambda copies: Program("copy", len(copies.src), 1, 0, 0))
        if engine.tier is not None:
            engine.tier.mover = _TimedMover(engine.tier.mover, self)
        step = engine.step

        def timed_step() -> list[TokenEvent]:
            self._mark = time.perf_counter()
            count = len(self.timings)
            events = step()
            if len(self.timings) > count:
                program, seconds = self.timings[-1]
                rest = time.perf_counter() - self._mark
                self.timings[-1] = program, seconds + rest
            return events

        engine.step = timed_step

    def note(self, program: Program) -> None:
        """The program has just ended."""
        now = time.perf_counter()
        self.timings.append((program, now - self._mark))
        self._mark = now

    def _wrap(self, name: str, describe: Callable[..., Program]) -> None:
        launch = getattr(self._engine, name)

        def timed(*args: Any) -> Any:
            program = describe(*args)
            out = launch(*args)
            if program.rows:
                self.note(program)
            return out

        setattr(self._engine, name, timed)

    def _prefill_program(
        self, rows: list[Sample], begin: list[int], end: list[int], chunk: int
    ) -> Program:
        size = self._engine.config.prefill_rows
        return Program("prefill", size, chunk, sum(end) - sum(begin), sum(begin))

    def _decode_program(self, rows: list[Sample], budget: list[int]) -> Program:
        size = self._engine._bucket(self._engine.config.row_buckets, len(rows))
        context = sum(b * len(s.tokens) for s, b in zip(rows, budget, strict=True))
        return Program("decode", size, max(budget), sum(budget), context)


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
      ValueError: no vocab_size is known.
      NotImplementedError: the pool is split over a data axis.
    """
    vocab = vocab_size or engine.config.vocab_size
    if vocab is None:
        raise ValueError("give vocab_size, here or in the engine's config")
    if not isinstance(engine.allocator, BlockAllocator):
        raise NotImplementedError("a run reports on one pool, not on one split over a data axis")
    watch = _Watch(engine)
    coming, usage = iter(requests), UsageLog(engine.allocator)
    upcoming = next(coming, None)
    start = time.perf_counter()
    while upcoming is not None or not engine.idle:
        now = time.perf_counter() - start
        while (
            upcoming is not None
            and upcoming.arrival_seconds * time_scale <= now
            and len(engine._waiting) < queue_rows * engine.config.max_rows
        ):
            watch.accept(upcoming, upcoming.arrival_seconds * time_scale, vocab)
            upcoming = next(coming, None)
        if engine.idle and upcoming is not None:
            time.sleep(max(0.0, upcoming.arrival_seconds * time_scale - now))
            continue
        ended = watch.note(engine.step(), time.perf_counter() - start)
        usage.note(time.perf_counter() - start)
        if progress and ended:
            progress(ended)
    seconds = time.perf_counter() - start
    return summarize(list(watch.records.values()), engine.stats, engine.allocator, usage, seconds)


class _Watch:
    """Turns events into records."""

    def __init__(self, engine: Engine):
        self.engine, self.records = engine, dict[int, Record]()
        self._open: dict[int, int] = {}
        engine._admitted = self._admitted

    def _admitted(self, sample: Sample) -> None:
        self.records[sample.request_id].note_admission(sample)

    def accept(self, request: Request, arrival: float, vocab: int) -> None:
        engine, size = self.engine, request.prompt_tokens
        key, fits = engine._next_id, size + 1 <= engine.max_sequence_tokens
        record = Record(key, arrival, size, samples=request.samples, finished=fits)
        self.records[key] = record
        if not fits:
            record.end_seconds = arrival
            engine._next_id += 1
            return
        self._open[key] = request.samples
        engine.submit(
            request.text(vocab).tolist(),
            SamplingParams(max_new_tokens=request.output_tokens),
            n=request.samples,
            priority=request.priority,
        )

    def note(self, events: list[TokenEvent], now: float) -> int:
        """Enter events of a step that has just ended; returns how many requests ended."""
        before = len(self._open)
        for event in events:
            record = self.records[event.request_id]
            if event.token is not None:
                record.output_tokens += 1
                record.first_seconds = now if record.first_seconds is None else record.first_seconds
            if event.finish_reason is not None:
                record.end_seconds = now
                record.finished = record.finished and event.finish_reason == "length"
                self._open[event.request_id] -= 1
                if self._open[event.request_id] == 0:
                    del self._open[event.request_id]
        return before - len(self._open)
