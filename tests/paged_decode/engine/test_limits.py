"""Requests that have to begin, or to end, by some time."""

from __future__ import annotations

import math

import numpy as np
import pytest

from paged_decode import BlockAllocator, SamplingParams
from paged_decode.engine.limits import Limits
from paged_decode.engine.requests import Sample

from ...selection import for_ci
from ..tiny import dense_greedy, make_engine, preempt, prompts
from .test_promises import greedy, host_engine

SHARED = prompts(1, seed=8, low=21, high=21)[0]
OTHERS = prompts(3, seed=9, low=5, high=12)


class Clock:
    def __init__(self):
        self.now, self.asked = 0.0, 0

    def __call__(self) -> float:
        self.asked += 1
        return self.now


def timed(**config):
    clock = Clock()
    return make_engine(policies=dict(clock=clock), **config), clock


def sample(number: int, admit_by: float = math.inf, end_by: float = math.inf) -> Sample:
    params = SamplingParams(max_new_tokens=4)
    new = Sample(number, 0, 3, [number, 1, 2], params, None, admit_by=admit_by, end_by=end_by)
    return new


def texts(events) -> dict:
    out: dict = {}
    for event in events:
        tokens = out.setdefault((event.request_id, event.sample), [])
        tokens += [] if event.token is None else [event.token]
    return out


def reasons(events) -> dict:
    return {(e.request_id, e.sample): e.finish_reason for e in events if e.finish_reason}


# ---- the clock and the heap alone


def test_who_is_over_is_found_once_with_its_reason():
    clock = Clock()
    limits = Limits(clock)
    both, waits, ends = sample(0, 3.0, 5.0), sample(1, 2.0), sample(2, end_by=2.0)
    limits.watch([both, waits, ends, sample(3)])
    assert not limits.passed and limits.take() == []
    clock.now = 2.0
    assert limits.passed
    assert limits.take() == [(waits, "waited_too_long"), (ends, "timeout")]
    assert not limits.passed
    both.admit_by = math.inf  # it was admitted
    clock.now = 4.0
    assert limits.passed and limits.take() == []
    clock.now = 5.0
    assert limits.take() == [(both, "timeout")] and not limits.passed


def test_one_whose_times_are_all_over_ends_by_the_first():
    clock = Clock()
    limits, first, second = Limits(clock), sample(0, 1.0, 2.0), sample(1, 2.0, 2.0)
    limits.watch([first, second])
    clock.now = 9.0
    assert limits.take() == [(first, "waited_too_long"), (second, "timeout")]


def test_where_nobody_has_a_limit_nothing_is_kept_and_no_clock_is_asked_for_it():
    engine, _ = timed()
    engine.scheduler.limits.clock = clock = Clock()
    engine.generate(OTHERS, greedy(3))
    assert clock.asked == 0 and not engine.scheduler.limits._heap


def test_requests_that_have_ended_are_not_kept_until_their_time():
    limits = Limits(Clock())
    for number in range(2000):
        new = sample(number, end_by=1e9 + number)
        limits.watch([new])
        new.ended = number % 100 > 0
    assert len(limits._heap) <= 2 * 20 + 64


def test_ten_thousand_that_wait_are_ended_at_once_and_looked_at_only_then():
    scheduler, loop, _, ends = host_engine(BlockAllocator(64, 4, hash_key=b"test"), max_rows=1)
    clock = scheduler.limits.clock = Clock()
    for number in range(10_000):
        scheduler.add(sample(number, admit_by=5.0, end_by=50.0))
    loop.visit()
    clock.asked = 0
    assert not scheduler.limits.passed and clock.asked == 1
    clock.now = 6.0
    loop.change(scheduler.expire)
    assert len(scheduler.waiting) == 0 and len(scheduler.living) == 1
    assert list(ends.of.values()).count("waited_too_long") == 9_999


# ---- in an engine


@pytest.mark.parametrize("visits", for_ci(range(9), left=(1, 3, 5, 7)))
def test_a_timeout_ends_a_request_in_every_state_and_nobody_else_notices(visits):
    """Waiting, behind a prefix, prefilling, decoding, with a visit in flight, with siblings."""
    engine, clock = timed(num_pages=30)
    first = engine.submit(SHARED, greedy(9))
    over = engine.submit([*SHARED, 5], greedy(18), n=2, timeout=10)
    rest = [engine.submit(prompt, greedy(9)) for prompt in OTHERS]
    events, state = [], engine.scheduler.living
    for _ in range(visits):
        events += engine.step()
    lived = over in state
    clock.now = 10.0
    events += engine.stream()
    found, why = texts(events), reasons(events)
    for index in (0, 1):
        tokens = found[over, index]
        assert tuple(tokens) == dense_greedy([*SHARED, 5], 18)[: len(tokens)]
        assert why[over, index] == ("timeout" if lived else "length")
    assert tuple(found[first, 0]) == dense_greedy(SHARED, 9)
    for request, prompt in zip(rest, OTHERS, strict=True):
        assert tuple(found[request, 0]) == dense_greedy(prompt, 9)
    assert set(why.values()) == {"timeout", "length"} and engine.idle
    assert engine.allocator.num_used == 0
    engine.allocator.check_invariants()


def test_whoever_waits_for_the_prefix_of_one_that_ends_computes_it():
    engine, clock = timed(prefill_rows=1)
    engine.submit(SHARED, greedy(4), timeout=1)
    behind = engine.submit([*SHARED, 7], greedy(4))
    engine.step()
    assert len(engine.scheduler.waiting) == 1
    clock.now = 1.0
    events = list(engine.stream())
    assert tuple(texts(events)[behind, 0]) == dense_greedy([*SHARED, 7], 4)
    assert reasons(events) == {(0, 0): "timeout", (behind, 0): "length"}


def test_max_wait_ends_those_that_were_never_admitted_and_no_others():
    engine, clock = timed(max_rows=2, row_buckets=(2,))
    begun = engine.submit(OTHERS[0], greedy(12), n=3, max_wait=5)  # the third waits for a row
    events = [*engine.step()]
    late = engine.submit(OTHERS[1], greedy(6), n=2, max_wait=5)
    patient = engine.submit(OTHERS[2], greedy(6), max_wait=50, timeout=60.5)
    events += engine.step()
    preempt(engine)  # who comes back has been admitted
    clock.now = 5.0
    events += engine.stream()
    why = reasons(events)
    assert [why[begun, i] for i in range(3)] == ["length"] * 3
    assert [why[late, i] for i in range(2)] == ["waited_too_long"] * 2
    assert why[patient, 0] == "length" and engine.allocator.num_used == 0
    ended = [e for e in events if e.request_id == late]
    assert [(e.index, e.token) for e in ended] == [(0, None)] * 2


def test_generate_ends_and_a_fork_has_the_timeout_of_its_parent():
    engine, clock = timed()
    over = engine.submit(
        OTHERS[0], greedy(40), timeout=2, on_token=lambda e: setattr(clock, "now", 3.0)
    )
    done = engine.generate(OTHERS[1:], greedy(50), timeout=4)
    assert {c.finish_reason for c in done} == {"length"}
    assert reasons(engine.step()) == {(over, 0): "timeout"}
    clock.now = 0.0
    parent = engine.submit(OTHERS[0], greedy(40), timeout=2, max_wait=1)
    while not (events := engine.step()):
        pass
    child = engine.fork(parent, greedy(40))
    clock.now = 2.0
    events += engine.stream()
    assert reasons(events) == {(parent, 0): "timeout", (child, 0): "timeout"}


def test_limits_go_on_after_a_failure_and_an_interrupt():
    engine, clock = timed()
    request = engine.submit(OTHERS[0], greedy(30), timeout=7)
    engine.step()
    engine.loop.discard()
    conclude = engine.scheduler._conclude
    engine.scheduler._conclude = lambda outcomes: (_ for _ in ()).throw(KeyboardInterrupt)
    clock.now = 7.0
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    engine.scheduler._conclude = conclude
    assert reasons(list(engine.stream())) == {(request, 0): "timeout"}
    assert engine.allocator.num_used == 0


@pytest.mark.parametrize("name", ["max_wait", "timeout"])
def test_a_limit_that_is_no_time_is_refused_by_name(name, unchecked):
    engine, _ = timed()
    for value in (0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=f"{name} must be finite seconds above 0"):
            engine.submit([1], **{name: value})
    for value in (True, "1", [1.0]):
        with pytest.raises(TypeError, match=f"{name} must be a number"):
            engine.submit([1], **{name: value})
    assert engine.idle
    engine.submit([1], **{name: np.float32(2)})
    with pytest.raises(TypeError, match="clock must be callable, got float"):
        make_engine(policies=dict(clock=1.0))
