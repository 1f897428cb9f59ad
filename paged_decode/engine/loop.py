"""One visit of the host: read what is two visits old, schedule, launch, read what is one old.

```
visit      0            1               2               3
host     plan launch | plan launch read | plan launch read | ...
                           read of  0          read of 1
device          [ visit 0          ][ visit 1          ][ visit 2 ...
```
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any, Protocol, TypeVar, runtime_checkable

from .config import EngineStats
from .records import Decode, Prefill, Result, Runner, Ticket
from .scheduler import NeedsTruth

__all__ = ["Loop", "Plans"]

T = TypeVar("T")


@runtime_checkable
class Plans(Protocol):
    """The scheduler, as a loop uses it."""

    def plan_prefill(self) -> Prefill | None: ...
    def prefilled(self, plans: Sequence[Prefill]) -> None: ...
    def plan_decode(self) -> Decode | None: ...
    def book(self, ticket: Ticket, result: Result) -> None: ...
    def drop(self, ticket: Ticket) -> None: ...
    def release(self) -> None: ...
    def reset(self) -> None: ...


class Loop:
    """Drives a scheduler and a runner; what is cut off anywhere is made whole by the next call.

    Args:
      scheduler: who says what is to be done.
      runner: who does it.
      stats: visits and their time are counted in it.
      wait: wait for every visit before the next step of the host (`EngineConfig.collect_at_once`).
      forget_prefixes: empties the prefix cache, where the runner has lost its pages.
    """

    def __init__(
        self,
        scheduler: Plans,
        runner: Runner,
        stats: EngineStats,
        *,
        wait: bool = False,
        forget_prefixes: Callable[[], None] = lambda: None,
    ):
        self.scheduler, self.runner, self.stats = scheduler, runner, stats
        self._wait, self._forget_prefixes = wait, forget_prefixes
        self._open: deque[Ticket] = deque()
        self._prefilled: Any = None  # the last visit, if it did nothing but prefill
        self._lost = False
        self._call: FrameType | None = None  # what changes the scheduler, or was torn in doing so

    @property
    def in_flight(self) -> int:
        """Visits that are launched and not booked."""
        return len(self._open)

    def visit(self) -> None:
        """One turn. If a program or a user's object raises, no request is lost."""
        start = time.perf_counter()
        self.mend()
        if len(self._open) > 1:  # an interrupt came between launching and reading
            self._book_one()
        launched = self._launch()
        while len(self._open) > launched:
            self._book_one()
        if self._open and self._is_over(self._open[0]):
            self._drop_one()
        self.stats.visits += 1
        self.stats.visit_seconds += time.perf_counter() - start

    def collect(self) -> None:
        """Book every visit in flight: afterwards all is known."""
        self.mend()
        while self._open:
            self._book_one()

    @property
    def torn(self) -> bool:
        """Whether a change is under way, or was cut off."""
        return self._call is not None

    def _is_within(self) -> bool:
        """Whether the caller was called within a change: a policy, a rank or a digest was."""
        frame: FrameType | None = None if self._call is None else sys._getframe()
        while frame is not None and frame is not self._call:
            frame = frame.f_back
        return frame is not None

    def change(self, call: Callable[[], object]) -> None:
        """Change the scheduler otherwise; if it is cut off, `mend` makes it whole."""
        self.mend()
        self._call = sys._getframe()
        call()
        self._call = None

    def discard(self) -> None:
        """Give up what is in flight and the pages of every row; requests compute theirs again."""
        self.mend()
        self._call = sys._getframe()
        self._mend()

    def mend(self) -> None:
        """Make whole what an interrupt or an error has cut off: rows compute their pages again."""
        if self._call is None:
            return
        if self._is_within():
            raise RuntimeError(
                "a policy, an eviction rank or a digest must not call the engine that asks it"
            )
        self._mend()

    def _mend(self) -> None:
        self._lost = self._lost or self.runner.is_lost  # when all that was queued is launched
        self._open.clear()
        self._prefilled = None
        self.scheduler.reset()
        if self._lost:
            self._forget_prefixes()
        self.runner.restart(lost=self._lost)
        self._lost, self._call = False, None

    def _launch(self) -> bool:
        """Plan and launch a visit; whether a decode program runs."""
        self._call = sys._getframe()
        self.scheduler.release()
        over, launched = None, []
        while (prefill := self._planned(self.scheduler.plan_prefill)) is not None:
            over = self.runner.prefill(prefill)
            launched.append(prefill)
        if launched:
            self.scheduler.prefilled(launched)
        plan = self._planned(self.scheduler.plan_decode)
        if plan is not None:
            self._open.append(self.runner.decode(plan))
        self._call = None
        self._throttle(over if plan is None else None)
        return plan is not None

    def _throttle(self, over: Any) -> None:
        """Visits that only prefill are not read: the host runs one ahead of the device, no more."""
        if self._wait and (over is not None or self._open):
            self._waited(self.runner.wait, self._open[-1].out if over is None else over)
        elif over is not None and self._prefilled is not None:
            self._waited(self.runner.wait, self._prefilled)
        self._prefilled = over

    def _planned(self, plan: Callable[[], T]) -> T:
        """A plan; where it needs the truth, such as when pages are short, after all is known."""
        try:
            return plan()
        except NeedsTruth:
            while self._open:
                self._book_one()
            return plan()

    def _book_one(self) -> None:
        """Read the oldest visit in flight and enter what came out."""
        ticket, within = self._open[0], self._call
        result = self._waited(self.runner.collect, ticket)
        self._call = within or sys._getframe()
        self.scheduler.book(ticket, result)
        self._open.popleft()
        self._call = within

    def _drop_one(self) -> None:
        """Nobody waits for what the visit in flight makes, which may take all of its steps."""
        ticket = self._open[0]
        self._waited(self.runner.launched, ticket.out)
        self._call = sys._getframe()
        self.scheduler.drop(ticket)
        self._open.popleft()
        self._call = None

    @staticmethod
    def _is_over(ticket: Ticket) -> bool:
        """Whether the visit was launched for rows that have all ended by now, and nothing else."""
        return not ticket.plan.scored and all(sample.ended for sample in ticket.plan.samples)

    def _waited(self, call: Callable[[Any], Any], what: Any) -> Any:
        start = time.perf_counter()
        try:
            return call(what)
        except Exception:  # a program failed: what came after it worked on the same cache
            self._lost, self._call = True, sys._getframe()
            raise
        finally:
            self.stats.wait_seconds += time.perf_counter() - start
