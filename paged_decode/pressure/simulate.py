"""The engine's own scheduler, allocator and tier in virtual time: only the device is a model.

The device works while the host plans, as in the engine: there is a clock for each.

```
host     plan launch | plan launch read | plan launch read | ...
                       |            ^ waits until visit 0 is over
device                 [ visit 0    ][ visit 1          ][ visit 2 ...
```
A token counts as there when the host has read its visit, with all others of that visit.
"""

from __future__ import annotations

import gc
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from .._text import shown
from ..allocator import BlockAllocator, CacheLayout, PageCopies, PageSpec
from ..cache import KVCache
from ..engine import EngineConfig, EngineStats
from ..engine.config import sequence_limit
from ..engine.journal import Outcome
from ..engine.loop import Loop
from ..engine.params import SamplingParams
from ..engine.records import Decode, Prefill, Result, Ticket
from ..engine.requests import Sample
from ..engine.room import Room
from ..engine.scheduler import Scheduler
from ..engine.swapping import TierSwapping
from ..policies import AdmissionPolicy, PreemptionPolicy, VictimPolicy
from ..tiers import HostTier
from ._values import as_number, as_whole
from .clairvoyant import Belady, ForetoldRoom
from .costs import CostModel, HostCosts, Program
from .programs import decode_program, prefill_program
from .report import TOO_LONG, Record, Report, UsageLog, summarize
from .workload import FIRST_GENERATED, Request, in_order

__all__ = ["simulate"]


@dataclass(slots=True)
class _Clock:
    """Two of them: the host's, and until when the device is busy with what it was given."""

    now: float = 0.0
    device: float = 0.0

    def run(self, seconds: float, launch: float = 0.0) -> float:
        """The device does so much more, after what it has to do; returns when that is over."""
        self.device = max(self.device, self.now + launch) + seconds
        return self.device

    def wait(self, until: float) -> None:
        """The host does nothing until then."""
        self.now = max(self.now, until)


class _ModelledCopies:
    """A `PageMover` that takes time only; what leaves the device does so beside other programs."""

    def __init__(self, clock: _Clock, costs: CostModel):
        self._clock, self._costs = clock, costs
        self._free_seconds = 0.0  # when the link out is idle again

    def take(self, cache: Any, pages: np.ndarray) -> float:
        seconds = _cost(self._costs, Program("store", len(pages), 1, 0, 0))
        begin = max(self._free_seconds, self._clock.device, self._clock.now)
        self._free_seconds = begin + seconds
        return self._free_seconds

    def finish(self, copy: float) -> None:
        self._clock.wait(copy)

    def put(self, cache: Any, rested: Any, pages: np.ndarray) -> Any:
        self._clock.run(_cost(self._costs, Program("load", len(pages), 1, 0, 0)))
        return cache


class _ModelledRunner:
    """A `Runner` whose programs take the time that a cost model says, and compute nothing.

    What it returns for a program is when that is over.
    """

    is_lost = False

    def __init__(
        self,
        cache: Any,
        config: EngineConfig,
        costs: CostModel,
        clock: _Clock,
        stats: EngineStats,
        windows: Sequence[int],
    ):
        self.cache, self._windows = cache, windows
        self.texts: list[int] = []  # of each request, the token that its first sample generates
        self._config, self._costs, self._clock, self._stats = config, costs, clock, stats
        self._shapes: set[tuple[int, int]] = set()
        self._host = costs if isinstance(costs, HostCosts) else None
        self._launch = self._host_cost("launch", 0)

    def exchange(self, change: Callable[[Any], Any]) -> None:
        self.cache = change(self.cache)

    def prefill(self, plan: Prefill) -> float:
        program = prefill_program(plan, self._config, self._windows)
        self.spend_host("prefill", program.tokens)
        self._copy(plan.copies)
        return self._run(program)

    def decode(self, plan: Decode) -> Ticket:
        self.spend_host("decode", len(plan.slots))
        self._copy(plan.copies)
        return Ticket(plan, self._run(decode_program(plan, self._config, self._windows)))

    def launched(self, out: float) -> None:
        """There is no launch."""

    def wait(self, out: float) -> None:
        self._clock.wait(out)

    def collect(self, ticket: Ticket) -> Result:
        plan = ticket.plan
        self._clock.wait(ticket.out)
        self.spend_host("read", int(plan.budgets.sum()))
        texts = np.array([self.texts[s.request_id] + s.index for s in plan.samples], np.int32)
        tokens = np.broadcast_to(texts, (int(plan.budgets.max()), len(texts)))
        return Result(tokens, plan.budgets, np.zeros(len(texts), bool))

    def restart(self, *, lost: bool) -> None:
        """Nothing is lost here."""

    def spend_host(self, work: str, size: int) -> None:
        """The host has something to do."""
        self._clock.now += self._host_cost(work, size)

    def _host_cost(self, work: str, size: int) -> float:
        if self._host is None:
            return 0.0
        return _time(self._host.host_seconds(work, size), f"{work} of {size}", "host_seconds")

    def _copy(self, copies: Sequence[PageCopies]) -> None:
        if count := sum(len(each.src) for each in copies):
            self._clock.run(_cost(self._costs, Program("copy", count, 1, 0, 0)), self._launch)

    def _run(self, program: Program) -> float:
        over = self._clock.run(_cost(self._costs, program), self._launch)
        self._shapes.add((program.rows, program.width if program.kind == "prefill" else 0))
        self._stats.programs = len(self._shapes)
        return over


class _Records:
    """What becomes of requests, in virtual time; tokens are counted, not kept as events."""

    def __init__(self, clock: _Clock, belady: Belady | None):
        self.records: dict[int, Record] = {}
        self._clock, self._belady = clock, belady

    def note_admission(self, sample: Sample) -> None:
        self.records[sample.request_id].note_admission(sample)
        if self._belady is not None:
            self._belady.begin(sample.request_id)
            self._belady.come_back(sample)

    def refuse(self, number: int) -> None:
        """The request can never fit."""
        record = self.records[number]
        record.note_end(TOO_LONG, max(self._clock.now, record.arrival_seconds))
        if self._belady is not None:
            self._belady.begin(number)

    def put(self, serial: int, outcomes: Sequence[Outcome]) -> None:
        for sample, _, tokens, reason, *_ in outcomes:
            record = self.records[sample.request_id]
            if tokens:
                if record.first_seconds is None:
                    record.first_seconds = self._clock.now
                record.output_tokens += len(tokens)
            if reason is not None:
                record.note_end(reason, self._clock.now, sample.preemptions)
                if self._belady is not None:  # it may have waited
                    self._belady.begin(sample.request_id)
                    self._belady.come_back(sample)


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
      requests: in order of arrival; read as they are needed, and all at once for `Belady`.
      allocator: a fresh one, with the policies to try.
      costs: what device programs take.
      config: shapes and limits of the engine.
      victim: who loses its pages when they run out.
      tier: host memory, as the engine takes it; its copies become modelled ones.
      preemption: as the engine takes it.
      admission: as the engine takes it.
      queue_rows: requests that wait in the engine, per row of it; the engine may take those out
        of order whose prefix is not being computed just then.

    Raises:
      NotImplementedError: the pool is split over a data axis.
      TypeError: costs, or a policy, is no object with the method that it needs.
      ValueError: the allocator has pages in use; queue_rows is less than 1; requests are not in
        order of arrival; the model says that a program takes a time that is none. What depends on
        the requests is found when their turn comes, and nothing is reported then.
    """
    if not isinstance(allocator, BlockAllocator):
        raise NotImplementedError("a simulation is of one pool, not of one split over a data axis")
    if allocator.num_used:
        raise ValueError(
            f"expected a fresh allocator, got one with {allocator.num_used} pages in use, which "
            "nobody would give back"
        )
    if not isinstance(costs, CostModel):
        raise TypeError(f"costs must have a method seconds(program), got {shown(costs)}")
    if not isinstance(tier, HostTier | None):
        raise TypeError(f"tier must be a HostTier, got {shown(tier)}")
    queue_rows = as_whole("queue_rows", queue_rows, 1)
    simulation = _Simulation(
        allocator,
        config or EngineConfig(),
        costs,
        tier=tier,
        victim=victim,
        preemption=preemption,
        admission=admission,
    )
    coming = in_order(requests)
    if simulation.belady is not None:
        known = list(coming)
        simulation.belady.learn((request.prompt() for request in known), allocator)
        coming = iter(known)
    with _few_collections():
        return simulation.run(coming, queue_rows)


@contextmanager
def _few_collections() -> Iterator[None]:
    """Let Python look for cycles less often: millions of pages come and go, and none is in one."""
    before = gc.get_threshold()
    gc.set_threshold(max(before[0], 20_000) if before[0] else 0, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


class _Simulation:
    """The parts of an engine, with a clock and a cost model where the device is."""

    def __init__(
        self,
        allocator: BlockAllocator,
        config: EngineConfig,
        costs: CostModel,
        *,
        tier: HostTier | None,
        **policies: Any,
    ):
        self.allocator, self.config, self.clock = allocator, config, _Clock()
        self.stats, self.limit = EngineStats(), sequence_limit(config, allocator)
        self._text = FIRST_GENERATED  # no two samples generate the same
        self.runner = _ModelledRunner(
            _pool_without_memory(allocator),
            config,
            costs,
            self.clock,
            self.stats,
            [window for _, window in allocator.pools if window is not None],
        )
        swapping = None
        if tier is not None:
            tier.mover = _ModelledCopies(self.clock, costs)
            swapping = TierSwapping(tier, allocator, self.runner)
        rank, room = allocator.eviction, Room(allocator, config, **policies)
        self.belady = rank if isinstance(rank, Belady) else None
        if self.belady is not None:
            room = ForetoldRoom(allocator, config, **policies)
            room.belady = self.belady
        self.records = _Records(self.clock, self.belady)
        self.scheduler = Scheduler(
            allocator,
            config,
            self.records,
            self.stats,
            room,
            limit=self.limit,
            swapping=swapping,
            clock=lambda: self.clock.now,
        )
        self.scheduler.on_admitted = self.records.note_admission
        self.loop = Loop(self.scheduler, self.runner, self.stats)

    def run(self, coming: Iterator[Request], queue_rows: int) -> Report:
        """Hand over what has arrived, visit after visit."""
        upcoming, usage = next(coming, None), UsageLog(self.allocator)
        self.scheduler.on_release = lambda: usage.held(self.clock.now)
        room = queue_rows * self.config.max_rows
        while upcoming is not None or not self.idle:
            if self.idle and upcoming is not None:
                self.clock.now = max(self.clock.now, upcoming.arrival_seconds)
                usage.held(self.clock.now)
            now = self.clock.now
            while (
                upcoming is not None
                and upcoming.arrival_seconds <= now
                and len(self.scheduler.waiting) < room
            ):
                self.accept(upcoming)
                upcoming = next(coming, None)
            self.loop.visit()
            waiting, running = len(self.scheduler.waiting), len(self.scheduler.running)
            usage.note(self.clock.now, waiting, running, self.stats.preemptions)
        records = list(self.records.records.values())
        seconds = self.clock.now
        return summarize(records, self.stats, self.allocator, usage, seconds, self.limit)

    @property
    def idle(self) -> bool:
        return self.scheduler.idle and not self.loop.in_flight

    def accept(self, request: Request) -> None:
        """Queue a request; like `submit`, with the prompt in four bytes per token."""
        number, size = len(self.records.records), request.prompt_tokens
        record = Record(number, request.arrival_seconds, size, samples=request.samples)
        self.records.records[number] = record
        self.runner.texts.append(self._text)
        self._text += request.samples
        if size + 1 > self.limit:
            self.records.refuse(number)
            return
        self.runner.spend_host("submit", size)
        tokens: Any = array("i", request.prompt().tobytes())
        sampling = SamplingParams(max_new_tokens=request.output_tokens)
        first = Sample(number, 0, size, tokens, sampling, None, priority=request.priority)
        first.siblings = [first.spawn(number, i, sampling) for i in range(1, request.samples)]
        self.scheduler.add(first)


def _cost(costs: CostModel, program: Program) -> float:
    """Seconds of a program."""
    return _time(costs.seconds(program), program, "seconds")


def _time(seconds: Any, of: object, method: str) -> float:
    """A time that a cost model has given; what is none would stop the clock for good."""
    if type(seconds) is float and 0 <= seconds < float("inf"):
        return seconds
    return as_number(f"the time of {of} by costs.{method}", seconds, zero=True)


def _pool_without_memory(allocator: BlockAllocator) -> KVCache:
    groups = (PageSpec((i,), 1, 1, n, window=w) for i, (n, w) in enumerate(allocator.pools))
    layout = CacheLayout(allocator.page_size, tuple(groups))
    return jax.eval_shape(lambda: KVCache.create(layout=layout))
