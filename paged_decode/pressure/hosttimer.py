"""What the host of an engine does in its visits, and how long it takes."""

from __future__ import annotations

import time
from typing import Any

from ..engine import Engine
from ..engine.loop import Plans
from ..engine.records import Decode, Prefill, Result, Runner, Ticket

__all__ = ["HostTimer"]


class HostTimer:
    """Stands between an engine's loop and its parts, and notes the host's time between them.

    Attributes:
      points: sizes and seconds of "prefill", "decode" and "read", as `HostCosts` names them. Time
        in which the host waits for the device is left out.
    """

    def __init__(self, engine: Engine):
        self._loop = engine.loop
        self._parts = engine.loop.scheduler, engine.loop.runner
        self.clear()
        engine.loop.scheduler = _Plans(self._parts[0], self)
        engine.loop.runner = _Runner(self._parts[1], self)

    def remove(self) -> None:
        """The loop has its own parts again."""
        self._loop.scheduler, self._loop.runner = self._parts

    def clear(self) -> None:
        """Forget all points."""
        self.points: dict[str, list[tuple[int, float]]] = {"prefill": [], "decode": [], "read": []}
        self._mark = time.perf_counter()
        self._read: int | None = None  # tokens of the visit that was read last

    def begin(self) -> None:
        """A visit begins: what was done since one was read belongs to that."""
        if self._read is not None:
            self.note("read", self._read)
        self._read, self._mark = None, time.perf_counter()

    def note(self, work: str, size: int) -> None:
        """The host did this since the last mark."""
        now = time.perf_counter()
        self.points[work].append((size, now - self._mark))
        self._mark = now

    def waited(self, tokens: int) -> None:
        """The host waited until now, and goes on to read so many tokens."""
        if self._read is not None:  # two visits were read at once
            tokens += self._read
        self._read, self._mark = tokens, time.perf_counter()


class _Plans:
    """A scheduler whose visits are noted as they begin."""

    def __init__(self, plans: Plans, timer: HostTimer):
        self._plans, self._timer = plans, timer
        self.plan_prefill, self.prefilled = plans.plan_prefill, plans.prefilled
        self.plan_decode, self.drop, self.reset = plans.plan_decode, plans.drop, plans.reset
        self.book = plans.book

    def release(self) -> None:
        self._timer.begin()
        self._plans.release()


class _Runner:
    """A runner that notes when the host is done with a plan, and when it has waited."""

    def __init__(self, runner: Runner, timer: HostTimer):
        self._runner, self._timer = runner, timer
        self.launched, self.wait, self.restart = runner.launched, runner.wait, runner.restart

    @property
    def is_lost(self) -> bool:
        return self._runner.is_lost

    def prefill(self, plan: Prefill) -> Any:
        out = self._runner.prefill(plan)
        self._timer.note("prefill", sum(len(chunk.tokens) for chunk in plan.chunks))
        return out

    def decode(self, plan: Decode) -> Ticket:
        ticket = self._runner.decode(plan)
        self._timer.note("decode", len(plan.slots))
        return ticket

    def collect(self, ticket: Ticket) -> Result:
        self._runner.wait(ticket.out)
        self._timer.waited(int(ticket.plan.budgets.sum()))
        return self._runner.collect(ticket)
