"""What became of requests, and what the engine is doing."""

from __future__ import annotations

import math

import pytest

from paged_decode import Figures, SamplingParams
from paged_decode.engine.events import gather

from ..tiny import make_engine, preempt, prompts
from .test_engine_groups import engine_of

P = prompts(6, seed=5, low=9, high=12)


class Clock:
    """Stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def timed(**options):
    clock, policies = Clock(), options.pop("policies", {})
    return make_engine(policies=dict(clock=clock) | policies, **options), clock


def steps(engine, clock, count: int = 999, seconds: float = 1.0) -> list:
    events = []
    while not engine.idle and count:
        clock.now += seconds
        events += engine.step()
        count -= 1
    return events


def greedy(count: int, **asked) -> SamplingParams:
    return SamplingParams(max_new_tokens=count, **asked)


def figures_of(events) -> dict[tuple[int, int], Figures]:
    found = {(c.request_id, c.sample): c.figures for c in gather(events)}
    assert all(found.values())
    return {key: figures for key, figures in found.items() if figures is not None}


def test_the_last_event_of_every_sample_has_its_figures_and_no_other():
    """The first visit admits and prefills, the second reads its tokens, two a visit."""
    engine, clock = timed(decode_steps=2)
    engine.submit(P[0], greedy(6, seed=2**32 - 1), n=2)
    clock.now += 0.5
    engine.submit(P[1], greedy(1))
    events = steps(engine, clock)
    assert all((e.figures is None) == (e.finish_reason is None) for e in events)
    size = len(P[0])
    assert figures_of(events) == {
        (0, 0): Figures(2**32 - 1, size, 0, 0, 1.5, 3.5, 2 / 5, 5.5),
        (0, 1): Figures(0, size, None, 0, 2.5, 3.5, 2 / 5, 5.5),  # it shares the first one's pages
        (1, 0): Figures(0, len(P[1]), 0, 0, 1.0, 3.0, None, 3.0),
    }
    (again,) = engine.generate([P[0]], greedy(1))
    assert again.figures is not None and again.figures.cached_tokens == (size - 1) // 4 * 4 > 0


def test_what_did_not_happen_is_none():
    engine, clock = timed()
    waits, runs = engine.submit(P[0], greedy(9)), engine.submit(P[1], greedy(9))
    engine.cancel(waits)
    clock.now += 2
    events = engine.step()
    engine.cancel(runs)
    clock.now += 1
    assert figures_of([*events, *steps(engine, clock, seconds=0)]) == {
        (waits, 0): Figures(0, len(P[0]), None, 0, None, None, None, 0.0),
        (runs, 0): Figures(0, len(P[1]), 0, 0, 2.0, None, None, 2.0),
    }


def test_preemptions_are_counted_and_the_first_admission_stays():
    engine, clock = timed(decode_steps=2)
    engine.submit(P[0], greedy(12))
    events = steps(engine, clock, 3)
    preempt(engine)
    (figures,) = figures_of([*events, *steps(engine, clock)]).values()
    assert (figures.preemptions, figures.queued_seconds, figures.cached_tokens) == (1, 1.0, 0)
    assert figures.token_seconds is not None and figures.first_token_seconds is not None
    later = figures.total_seconds - figures.first_token_seconds
    assert math.isclose(figures.token_seconds, later / 11)


def test_a_fork_and_a_restored_request_begin_when_they_come(tmp_path):
    engine, clock = timed(decode_steps=2)
    parent = engine.submit(P[0], greedy(10, temperature=1.0, seed=None))
    before = steps(engine, clock, 4)
    child = engine.fork(parent, greedy(10, seed=3))
    engine.save(tmp_path / "s")
    again, later = timed(decode_steps=2)
    later.now = 5.0
    again.restore(tmp_path / "s")
    drawn = engine.scheduler.running[0].sampling.seed
    for one, its_clock in ((engine, clock), (again, later)):
        found = figures_of([*before, *steps(one, its_clock)])
        ours = found[child, 0]
        assert (ours.seed, ours.cached_tokens, ours.queued_seconds) == (3, None, 0.0)
        assert found[parent, 0].seed == drawn
        assert ours.total_seconds == 3.0  # of ten tokens, up to two were read before
        assert (found[parent, 0].total_seconds > 4.0) == (one is engine)


def test_figures_of_events_that_were_not_returned_are_saved(tmp_path):
    engine, clock = timed()
    engine.submit(P[0], greedy(2))
    while not engine._outbox:
        clock.now += 1
        with engine._settled():
            engine.loop.visit()
    engine.save(tmp_path / "s")
    assert (tmp_path / "s").read_bytes()[8] == 4
    again = make_engine()
    again.restore(tmp_path / "s")
    assert figures_of(again.stream()) == figures_of(engine.stream()) != {}


def test_gauges_say_what_runs_and_how_fast():
    engine, clock = timed(decode_steps=2, max_rows=2, row_buckets=(2,))
    for prompt in P[:3]:
        engine.submit(prompt, greedy(20))
    assert engine.gauges()["requests_waiting"] == 3 and engine.gauges()["requests_running"] == 0
    steps(engine, clock, 4)
    got = engine.gauges()
    assert (got["requests_running"], got["requests_waiting"]) == (2, 1)
    assert got["pages_total"] == 63 == sum(got[f"pages_{n}"] for n in ("used", "cached", "free"))
    assert got["pages_used"] == engine.allocator.num_used > 0
    assert got["decode_tokens_per_second"] == engine.stats.decode_tokens / 4 > 0
    assert got["prefill_tokens_per_second"] == engine.stats.prefill_tokens / 4 > 0
    assert got["prefix_hit_rate"] == 0 == got["preemptions"]
    steps(engine, clock, 8)
    before = engine.stats.decode_tokens
    clock.now += 10
    assert engine.gauges()["decode_tokens_per_second"] == 0
    steps(engine, clock)
    done = engine.stats.decode_tokens - before
    assert 0 < engine.gauges()["decode_tokens_per_second"] == done / 10
    engine.generate([P[0]], greedy(1))
    assert 0 < engine.gauges()["prefix_hit_rate"] < 1


def test_gauges_of_groups_are_sums_and_those_of_each():
    got = engine_of().gauges()
    for name in ("total", "used", "cached", "free"):
        assert got[f"pages_{name}"] == sum(got[f"pages_{name}_group_{g}"] for g in (0, 1))
    assert "pages_total_group_2" not in got


def test_gauges_are_told_at_the_end_of_a_visit_every_so_many_seconds():
    told = []
    policies = dict(on_gauges=told.append, gauges_every=2.5)
    engine, clock = timed(decode_steps=1, policies=policies)
    engine.submit(P[0], greedy(7))
    counts = []
    while not engine.idle:
        steps(engine, clock, 1)
        counts.append(len(told))
    assert counts[:7] == [0, 0, 1, 1, 1, 2, 2]
    assert told[0].keys() == engine.gauges().keys()


def test_what_a_listener_of_gauges_raises_comes_out_of_step_and_no_event_is_lost():
    def complain(gauges):
        raise OSError("the log is full")

    policies = dict(on_gauges=complain, gauges_every=2.0)
    engine, clock = timed(decode_steps=1, policies=policies)
    engine.submit(P[0], greedy(7))
    events, errors = [], 0
    while not engine.idle:
        clock.now += 1
        try:
            events += engine.step()
        except OSError:
            errors += 1
    twin, _ = timed(decode_steps=1)
    twin.submit(P[0], greedy(7))
    assert errors >= 3 and [e.token for e in events] == [e.token for e in twin.stream()]


def test_what_cannot_be_told_is_refused(unchecked):
    for policies, error in (
        (dict(on_gauges=5), TypeError),
        (dict(gauges_every="1"), TypeError),
        (dict(gauges_every=math.nan), ValueError),
        (dict(gauges_every=-1), ValueError),
    ):
        with pytest.raises(error, match="gauges"):
            make_engine(policies=policies)
