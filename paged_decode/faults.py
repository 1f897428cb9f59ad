"""Faults for tests of whatever uses an engine: seeded, logged, and repeatable from the log.

```
faults = Faults(FaultPlan(seed=1, allocation_rate=0.1, copy_rate=0.2, preempt_every=5))
faults.install(engine)
...                                   # every request still gets the tokens that it would have got
again = Faults(faults.replay())       # the same faults at the same places, by number
```
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from .allocator import BlockAllocator, PageState, ShardedAllocator
from .cache import KVCache
from .engine import Engine
from .engine.records import Prefill
from .engine.scheduler import NeedsTruth, Scheduler
from .errors import OutOfPages
from .tiers import CopyFailed, CopyPending, PageMover

__all__ = ["FaultPlan", "Faults", "poison_free_pages"]


@dataclass(frozen=True, slots=True)
class FaultPlan:
    """Which faults happen. Calls are counted from 0, each kind for itself.

    Attributes:
      seed: of the rates below.
      allocation_rate: part of the allocations that fail with OutOfPages.
      copy_rate: part of the copies between device and host that fail with CopyFailed.
      allocations, copies: numbers of allocations and copies that fail in any case.
      preempt_every: visits of the engine between two forced preemptions, of samples that were not
        preempted too often; 0 forces none.
      delay_copies: visits for which a copy to the host stays in flight.
      poison: fill every free page with NaN before every visit.

    Raises:
      ValueError: a rate is not at least 0 and below 1: nothing would ever be done.
    """

    seed: int = 0
    allocation_rate: float = 0.0
    copy_rate: float = 0.0
    allocations: frozenset[int] = frozenset()
    copies: frozenset[int] = frozenset()
    preempt_every: int = 0
    delay_copies: int = 0
    poison: bool = False

    def __post_init__(self) -> None:
        for name in ("allocation_rate", "copy_rate"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")


class Faults:
    """Carries out a plan on one engine.

    Attributes:
      log: what failed or was forced, in order: ("allocation" | "copy" | "preemption", number).
    """

    def __init__(self, plan: FaultPlan):
        self.plan = plan
        self.log: list[tuple[str, int]] = []
        self._counts = {"allocation": 0, "copy": 0, "visit": 0}
        self._draws = {
            kind: np.random.default_rng([plan.seed, at])
            for at, kind in enumerate(("allocation", "copy"))
        }

    def replay(self) -> FaultPlan:
        """The plan in which what failed so far fails by number, and nothing by chance."""
        plan = self.plan
        failed: dict[str, set[int]] = {"allocation": set(), "copy": set(), "preemption": set()}
        for kind, number in self.log:
            failed[kind].add(number)
        return FaultPlan(
            allocations=frozenset(failed["allocation"]),
            copies=frozenset(failed["copy"]),
            preempt_every=plan.preempt_every,
            delay_copies=plan.delay_copies,
            poison=plan.poison,
        )

    def install(self, engine: Engine) -> None:
        """Put the faults into an engine, its allocator and its host tier; once per engine."""
        self.install_allocator(engine.allocator)
        if engine.tier is not None:
            engine.tier.mover = self.wrap_mover(engine.tier.mover)
        engine.loop.scheduler = _FaultyPlans(engine, self)

    def install_allocator(self, allocator: BlockAllocator | ShardedAllocator) -> None:
        """Let calls fail that take pages; what fails has changed nothing, as ever."""
        for books in allocator._shards:
            pool: Any = books.main.pool
            pool.require = self._faulty(pool.require)

    def _faulty(self, require: Callable[[int], None]) -> Callable[[int], None]:
        def faulty_require(needed: int) -> None:
            require(needed)
            if needed and self.fails("allocation"):
                raise OutOfPages(needed, 0, 0)

        return faulty_require

    def wrap_mover(self, mover: PageMover) -> PageMover:
        """A mover whose copies fail and are delayed as planned."""
        return _FaultyMover(mover, self)

    def fails(self, kind: str) -> bool:
        """Count one call of that kind ("allocation" or "copy"), and say whether it fails."""
        number = self._counts[kind]
        self._counts[kind] += 1
        allocation = kind == "allocation"
        rate = self.plan.allocation_rate if allocation else self.plan.copy_rate
        chosen = self.plan.allocations if allocation else self.plan.copies
        fails = bool(self._draws[kind].random() < rate) or number in chosen
        if fails:
            self.log.append((kind, number))
        return fails

    def before_visit(self, engine: Engine) -> None:
        """What is forced before a visit is planned; a preemption books what is in flight first."""
        number, plan = self._counts["visit"], self.plan
        forced = plan.preempt_every and number % plan.preempt_every == plan.preempt_every - 1
        if forced and engine.loop.in_flight:
            raise NeedsTruth
        self._counts["visit"] += 1
        if forced and _force_preemption(engine.scheduler):
            self.log.append(("preemption", number))
        if plan.poison:
            runner = engine.runner
            runner.cache = poison_free_pages(runner.cache, engine.allocator)


def _force_preemption(scheduler: Scheduler) -> bool:
    """Preempt whom the policy names, if there is one that may be; all visits are booked."""
    free = [s for s in scheduler.running if not scheduler.room.protected(s)]
    if free:
        scheduler.preempt(scheduler.room.victim(free))
    return bool(free)


class _FaultyPlans:
    """A scheduler before whose visits something is forced."""

    def __init__(self, engine: Engine, faults: Faults):
        self._engine, self._faults, self._plans = engine, faults, engine.loop.scheduler
        self.prefilled, self.plan_decode = self._plans.prefilled, self._plans.plan_decode
        self.book, self.drop = self._plans.book, self._plans.drop
        self.reset = self._plans.reset
        self._forced = False  # in this visit

    def release(self) -> None:
        self._forced = False
        self._plans.release()

    def plan_prefill(self) -> Prefill | None:
        if not self._forced:
            self._faults.before_visit(self._engine)
            self._forced = True
        return self._plans.plan_prefill()


@dataclass(slots=True)
class _Delayed:
    copy: Any
    visits: int


class _FaultyMover:
    """Fails and delays the copies of another mover."""

    def __init__(self, mover: PageMover, faults: Faults):
        self._mover, self._faults = mover, faults

    def take(self, cache: Any, pages: np.ndarray) -> Any:
        self._may_fail()
        return _Delayed(self._mover.take(cache, pages), self._faults.plan.delay_copies)

    def finish(self, copy: Any) -> Any:
        if copy.visits > 0:
            copy.visits -= 1
            raise CopyPending
        self._may_fail()
        return self._mover.finish(copy.copy)

    def put(self, cache: Any, rested: Any, pages: np.ndarray) -> Any:
        self._may_fail()
        return self._mover.put(cache, rested, pages)

    def _may_fail(self) -> None:
        if self._faults.fails("copy"):
            raise CopyFailed("a fault was planned here")


def poison_free_pages(cache: KVCache, allocator: BlockAllocator | ShardedAllocator) -> KVCache:
    """The cache with NaN in the null page and in every page that holds nothing.

    Whatever reads them shows it. Makes new arrays. A pool of integers is filled with their maximum,
    and its scales with NaN.
    """
    empty = PageState.FREE, PageState.NULL
    free = [
        np.flatnonzero(np.isin(allocator.page_states(group), empty))
        for group in range(len(allocator.pools))
    ]

    def poison(ids: np.ndarray, pages: Any) -> Any:
        floats = jnp.issubdtype(pages.dtype, jnp.floating)
        bad = jnp.nan if floats else jnp.iinfo(pages.dtype).max
        at = (slice(None),) * cache.stacked
        return pages.at[*at, ids].set(jnp.asarray(bad, pages.dtype))

    for group, ids in enumerate(free):
        for leaf in cache.leaves_of(group):
            pools = cache.pools_of(leaf).values()
            cache = cache.with_pools(leaf, [poison(ids, pool) for pool in pools])
    return cache
