"""The real engine, allocator and host tier on a virtual clock: only the device is a model."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np

from .._engine_config import EngineConfig
from .._engine_scheduling import protected
from .._requests import Sample
from ..allocator import BlockAllocator
from ..cache import KVCache, PageCopies
from ..engine import Engine
from ..policies import AdmissionPolicy, PreemptionPolicy, VictimPolicy, Watermark
from ..sampling import SamplingParams
from ..tiers import HostTier
from .costs import CostModel, Program
from .report import Record, Report, UsageLog, summarize
from .workload import Request

__all__ = ["simulate"]

_GENERATED = 2**30  # ids of generated tokens, which no prompt has


@dataclass(slots=True)
class _ModelledCopies:
    """A `PageMover` that takes time only; what leaves the device does so beside other programs."""

    engine: Any
    free_seconds: float = 0.0  # when the link out is idle again

    def take(self, cache: Any, pages: np.ndarray) -> float:
        seconds = self.engine.costs.seconds(Program("store", len(pages), 1, 0, 0))
        self.free_seconds = max(self.free_seconds, self.engine.now) + seconds
        return self.free_seconds

    def finish(self, copy: float) -> None:
        self.engine.now = max(self.engine.now, copy)

    def put(self, cache: Any, rested: Any, pages: np.ndarray) -> Any:
        self.engine._spend(Program("load", len(pages), 1, 0, 0))
        return cache


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
        **policies: Any,
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
        super().__init__(_no_model, None, shapes, allocator, config, **policies)
        self.now, self.costs = 0.0, costs
        if self.tier is not None:
            self.tier.mover = _ModelledCopies(self)
        self.records: dict[int, Record] = {}
        self._step_seconds = 0.0
        self._blocked: tuple[Sample, int, int] | None = None

    def accept(self, request: Request) -> None:
        """Queue a request; like `submit`, with the prompt in four bytes per token."""
        record = Record(
            self._next_id,
            request.arrival_seconds,
            request.prompt_tokens,
            samples=request.samples,
            finished=True,  # until a sample ends early
        )
        self.records[self._next_id] = record
        self._next_id += 1
        if request.prompt_tokens + 1 > self.max_sequence_tokens:
            record.end_seconds = max(self.now, request.arrival_seconds)
            record.finished = False
            return
        tokens: Any = array("i", request.prompt().tobytes())
        params = SamplingParams(max_new_tokens=request.output_tokens)
        sample = Sample(
            record.request_id, 0, len(tokens), tokens, params, None, None, priority=request.priority
        )
        for index in range(1, request.samples):
            sibling = replace(sample, index=index, tokens=tokens[:], siblings=[])
            sample.siblings.append(sibling)
        self._waiting.append(sample)

    def _admit(self) -> None:
        """As in the engine, but a sample that cannot fit is not tried again in vain.

        With other policies than a watermark, what could not be let in may be later all the same.
        """
        free = self.allocator.num_free + self.allocator.num_evictable
        head = self._waiting[0] if self._waiting else None
        if self._blocked and self._blocked[0] is head:
            if free <= self._blocked[1] and len(self._running) >= self._blocked[2]:
                return
        super()._admit()
        self._blocked = None
        steady = isinstance(self._admission, Watermark) and all(s.decoding for s in self._running)
        if self._waiting and steady and not protected(self, self._waiting[0]):
            free = self.allocator.num_free + self.allocator.num_evictable
            self._blocked = (self._waiting[0], free, len(self._running))

    def _admitted(self, sample: Sample) -> None:
        self.records[sample.request_id].note_admission(sample)

    def _launch_prefill(
        self, rows: list[Sample], begin: list[int], end: list[int], chunk: int
    ) -> None:
        tokens, context = sum(end) - sum(begin), sum(begin)
        self._spend(Program("prefill", self.config.prefill_rows, chunk, tokens, context))
        self._note_program(self.config.prefill_rows, chunk)

    def _run_copies(self, copies: PageCopies) -> None:
        if len(copies.src):
            self._spend(Program("copy", len(copies.src), 1, 0, 0))

    def _launch_decode(self, rows: list[Sample], budget: list[int]) -> Any:
        size = self._bucket(self.config.row_buckets, len(rows))
        # A row of n tokens reads n, n + 1, ... of them in its steps.
        context = sum(
            b * len(s.tokens) + b * (b - 1) // 2 for s, b in zip(rows, budget, strict=True)
        )
        steps = max(budget)
        program = Program("decode", size, steps, sum(budget), context)
        self._step_seconds = self._spend(program) / steps
        self._note_program(size, 0)
        return SimpleNamespace(counts=budget)

    def _book(self, rows: list[Sample], out: Any) -> None:
        counts, most = out.counts, max(out.counts)
        handles = [s.handle for s in rows]
        texts = [_generated(s) for s in rows]
        written = np.array(texts, np.int32)[:, None].repeat(most, axis=1)
        written[:, 0] = [s.tokens[-1] for s in rows]
        self.allocator.append(handles, written, counts)
        start = self.now - self._step_seconds * most
        for sample, count, text in zip(rows, counts, texts, strict=True):
            record = self.records[sample.request_id]
            if record.first_seconds is None:
                record.first_seconds = start + self._step_seconds
            sample.tokens.extend([text] * count)
            sample.computed += count
            record.output_tokens += count
        self.allocator.commit(handles, [s.computed for s in rows])
        self.stats.decode_tokens += sum(counts)
        for sample, count in zip(rows, counts, strict=True):
            left = sample.left
            if left == 0 or len(sample.tokens) >= self.max_sequence_tokens:
                self._drop(sample)
                self.note_end(sample.request_id, start + count * self._step_seconds, left)

    def note_end(self, request_id: int, seconds: float, missing: int) -> None:
        """A sample has ended, so many tokens before its length."""
        record = self.records[request_id]
        record.end_seconds = max(seconds, record.end_seconds or 0.0)
        record.finished = record.finished and not missing

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
    tier: HostTier | None = None,
    preemption: PreemptionPolicy | None = None,
    admission: AdmissionPolicy | None = None,
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
      tier: host memory, as the engine takes it; its copies become modelled ones.
      preemption, admission: as the engine takes them.
      queue_rows: requests that wait in the engine, per row of it; the engine may take those out
        of order whose prefix is not being computed just then.
    """
    engine = _SimulatedEngine(
        allocator,
        config or EngineConfig(),
        costs,
        victim=victim,
        tier=tier,
        preemption=preemption,
        admission=admission,
    )
    coming = iter(requests)
    upcoming = next(coming, None)
    usage = UsageLog(allocator)
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
        for event in engine.step():  # only samples that outgrew the pool have events here
            engine.note_end(event.request_id, engine.now, 1)
        usage.note(engine.now)
    return summarize(list(engine.records.values()), engine.stats, allocator, usage, engine.now)


def _generated(sample: Sample) -> int:
    """A token for the text of this sample alone."""
    return _GENERATED + (sample.request_id * 64 + sample.index) % _GENERATED


def _no_model(*_: Any) -> Any:
    raise RuntimeError("a simulation runs no model")
