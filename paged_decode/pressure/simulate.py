"""The real engine and allocator on a virtual clock: only the device is a model."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np

from .._engine_config import EngineConfig
from .._requests import Sample
from ..allocator import BlockAllocator
from ..cache import DecodeBatch, KVCache, PageCopies
from ..engine import Engine
from ..policies import VictimPolicy
from ..sampling import SamplingParams
from .costs import CostModel, Program
from .report import Record, Report, summarize
from .workload import Request

__all__ = ["simulate"]

_GENERATED = 2**30  # ids of generated tokens, which no prompt has


class _SimulatedEngine(Engine):
    """The engine with its device programs replaced by their modelled time.

    Everything that decides (admission, prefill order, reservation, preemption) is inherited.
    What is overridden are the device calls, and the entering of tokens, which here has no values
    to stream and is done for all rows at once.
    """

    def __init__(
        self,
        allocator: BlockAllocator,
        config: EngineConfig,
        costs: CostModel,
        victim: VictimPolicy | None,
    ):
        shapes = jax.eval_shape(
            lambda: KVCache.create(
                num_layers=1,
                num_pages=allocator.num_pages,
                num_kv_heads=1,
                page_size=allocator.page_size,
                head_dim=1,
            )
        )  # a pool without memory
        super().__init__(_no_model, None, shapes, allocator, config, victim=victim)
        self.now, self.costs = 0.0, costs
        self.records: dict[int, Record] = {}
        self._step_seconds = 0.0
        self._blocked: tuple[Sample, int, int] | None = None

    def accept(self, request: Request) -> None:
        """Queue a request; like `submit`, with the prompt in four bytes per token."""
        record = Record(self._next_id, request.arrival_seconds, request.prompt_tokens)
        self.records[self._next_id] = record
        self._next_id += 1
        if request.prompt_tokens + 1 > self.max_sequence_tokens:
            record.end_seconds = max(self.now, request.arrival_seconds)
            return
        tokens: Any = array("i", request.prompt().tobytes())
        params = SamplingParams(max_new_tokens=request.output_tokens)
        sample = Sample(record.request_id, 0, len(tokens), tokens, params, None, None)
        self._waiting.append(sample)

    def _admit(self) -> None:
        """As in the engine, but a sample that cannot fit is not tried again in vain."""
        free = self.allocator.num_free + self.allocator.num_evictable
        head = self._waiting[0] if self._waiting else None
        if self._blocked and self._blocked[0] is head:
            if free <= self._blocked[1] and len(self._running) >= self._blocked[2]:
                return
        before = len(self._running)
        super()._admit()
        for sample in self._running[before:]:
            self._note_admission(sample)
        self._blocked = None
        if self._waiting and not any(not s.decoding for s in self._running):
            free = self.allocator.num_free + self.allocator.num_evictable
            self._blocked = (self._waiting[0], free, len(self._running))

    def _note_admission(self, sample: Sample) -> None:
        record = self.records[sample.request_id]
        if sample.preemptions == 0:
            record.hit_tokens = sample.computed
        record.preemptions = sample.preemptions

    def _run_prefill(self, tokens: np.ndarray, batch: DecodeBatch) -> None:
        real = int((batch.slots != 0).sum())
        context = int(batch.seq_lens.sum()) - real
        rows, width = tokens.shape
        self._spend(Program("prefill", rows, width, real, context))
        self._note_program(rows, width)

    def _run_copies(self, copies: PageCopies) -> None:
        if len(copies.src):
            self._spend(Program("copy", len(copies.src), 1, 0, 0))

    def _run_decode(self, newest: Any, batch: Any, budget: np.ndarray, samplers: Any) -> Any:
        steps = int(budget.max())
        total = int(budget.sum())
        context = int((batch.seq_lens * budget).sum())
        self._step_seconds = self._spend(Program("decode", len(newest), steps, total, context))
        self._step_seconds /= steps
        self._note_program(len(newest), 0)
        return SimpleNamespace(counts=budget)

    def _book(self, rows: list[Sample], newest: np.ndarray, out: Any) -> None:
        counts = out.counts[: len(rows)].tolist()
        handles = [s.handle for s in rows]
        written = np.empty((len(rows), max(counts)), np.int32)
        for row, sample in enumerate(rows):
            written[row] = _GENERATED + sample.request_id % _GENERATED
            written[row, 0] = sample.tokens[-1]
        self.allocator.append(handles, written, counts)
        start = self.now - self._step_seconds * max(counts)
        for sample, count in zip(rows, counts, strict=True):
            record = self.records[sample.request_id]
            if not sample.generated and count:
                record.first_seconds = start + self._step_seconds
            token = _GENERATED + sample.request_id % _GENERATED
            sample.tokens.extend([token] * count)
            sample.computed = len(sample.tokens) - 1
            record.output_tokens = sample.generated
        self.allocator.commit(handles, [s.computed for s in rows])
        self.stats.decode_tokens += sum(counts)
        for sample, count in zip(rows, counts, strict=True):
            if sample.ending(self.max_sequence_tokens) is not None:
                record = self.records[sample.request_id]
                record.end_seconds = start + self._step_seconds * count
                record.finished = sample.left == 0
                self._drop(sample)

    def _spend(self, program: Program) -> float:
        seconds = self.costs.seconds(program)
        self.now += seconds
        return seconds


def simulate(
    requests: Iterable[Request],
    allocator: BlockAllocator,
    costs: CostModel,
    *,
    config: EngineConfig | None = None,
    victim: VictimPolicy | None = None,
    queue_rows: int = 4,
) -> Report:
    """Run a workload through the engine's own scheduling on a virtual clock.

    The same arguments give the same report. Outputs of two requests never count as equal text,
    though greedy outputs of equal prompts are. A request is handed to the engine when it has
    arrived and the queue there is short, so that prompts in memory grow with live requests and
    not with the workload; the order is that of arrival.

    Args:
      requests: in order of arrival; read as they are needed.
      allocator: a fresh one, with the policies to try.
      costs: what device programs take.
      config: shapes and limits of the engine.
      victim: who loses its pages when they run out.
      queue_rows: requests that wait in the engine, per row of it; the engine may take those out
        of order whose prefix is not being computed just then.
    """
    engine = _SimulatedEngine(allocator, config or EngineConfig(), costs, victim)
    coming = iter(requests)
    upcoming = next(coming, None)
    usage: list[tuple[float, int]] = []
    while upcoming is not None or not engine.idle:
        if engine.idle and upcoming is not None:
            engine.now = max(engine.now, upcoming.arrival_seconds)
        while (
            upcoming is not None
            and upcoming.arrival_seconds <= engine.now
            and len(engine._waiting) < queue_rows * engine.config.max_rows
        ):
            engine.accept(upcoming)
            upcoming = next(coming, None)
        before = engine.now
        for event in engine.step():  # only samples that outgrew the pool have events here
            engine.records[event.request_id].end_seconds = engine.now
        usage.append((engine.now - before, allocator.num_used))
    return summarize(list(engine.records.values()), engine.stats, allocator, usage, engine.now)


def _no_model(*_: Any) -> Any:
    raise RuntimeError("a simulation runs no model")
