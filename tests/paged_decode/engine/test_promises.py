"""Promises of the engine, each with the smallest input that shows it."""

from __future__ import annotations

import copy
import gc
import pickle  # noqa: TID251 (to see it refused)
import weakref
from dataclasses import replace
from itertools import count

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paged_decode import BlockAllocator, EngineConfig, SamplingParams, ShardedAllocator
from paged_decode.engine import EngineStats
from paged_decode.engine.loop import Loop
from paged_decode.engine.records import Result, Ticket
from paged_decode.engine.requests import Sample
from paged_decode.engine.room import Room
from paged_decode.engine.scheduler import Scheduler
from paged_decode.faults import FaultPlan, Faults
from paged_decode.policies import Watermark
from paged_decode.tiers import HostTier

from ..tiny import Wrapped, dense_greedy, fail_decode, make_engine, model, preempt, prompts, texts

GREEDY = SamplingParams(max_new_tokens=12)
P = prompts(6, seed=21, low=3, high=20)


def greedy(tokens: int, **options) -> SamplingParams:
    return SamplingParams(max_new_tokens=tokens, **options)


def run(engine, visits: int = 400) -> list:
    """All events, in so many visits at most."""
    events = []
    for _ in range(visits):
        if engine.idle:
            engine.allocator.check_invariants()
            return events
        events += engine.step()
    pytest.fail("the engine does not come to an end")


# ---- ends


@pytest.mark.parametrize("n", [1, 2])
def test_a_prompt_for_which_the_pool_never_has_room_ends_at_capacity_and_says_why(n):
    engine = make_engine(9)
    held = engine.allocator.allocate_pages(5)
    before = engine.submit(P[0][:3], greedy(4))
    large = engine.submit(list(range(20)), n=n)
    after = engine.submit([4, 5], greedy(4))
    events = run(engine)
    ends = [e for e in events if e.request_id == large]
    assert [(e.sample, e.token, e.finish_reason) for e in ends] == [
        (i, None, "capacity") for i in range(n)
    ]
    assert all("5 are held by number (allocate_pages)" in e.detail for e in ends)
    done = texts(events)
    assert done[before, 0] == dense_greedy(P[0][:3], 4)
    assert done[after, 0] == dense_greedy([4, 5], 4)
    engine.allocator.free_pages(held)
    assert engine.allocator.num_used == 0


def test_cancel_of_what_has_ended_unseen_is_left_as_it_is_and_of_what_was_seen_refused():
    engine = make_engine(decode_steps=8)

    def cancel(event):
        if event.index == 2:
            engine.cancel(event.request_id)

    request = engine.submit(P[0], greedy(5), on_token=cancel)
    events = run(engine)
    assert [e.index for e in events] == list(range(5))
    assert texts(events)[request, 0] == dense_greedy(P[0], 5)
    assert events[-1].finish_reason == "length"
    with pytest.raises(KeyError, match="not in the engine"):
        engine.cancel(request)


# ---- streams and generate


def test_leaving_a_stream_early_loses_no_event():
    engine = make_engine()
    ids = [engine.submit(p, GREEDY) for p in P[:3]]
    events = []
    while not engine.idle:
        for event in engine.stream():
            events.append(event)
            break
    assert texts(events) == {(i, 0): dense_greedy(p, 12) for i, p in zip(ids, P, strict=False)}
    assert len(events) == 36


@pytest.mark.parametrize("how", ["callback", "decode", "collect"])
def test_generate_left_by_an_exception_leaves_nothing_of_its_own(how):
    engine, error = make_engine(), RuntimeError("other") if how == "callback" else KeyboardInterrupt

    def fail(event):
        if how == "callback" and event.index == 5:
            raise error

    other = engine.submit(P[0], GREEDY, on_token=fail)
    runner = engine.loop.runner
    if how == "decode":
        fail_decode(engine, {1}, error())
    if how == "collect":
        calls = count()

        def collect(ticket):
            if next(calls) == 1:
                raise error
            return runner.collect(ticket)

        engine.loop.runner = Wrapped(runner, collect=collect)
    with pytest.raises(RuntimeError if how == "callback" else KeyboardInterrupt):
        engine.generate(P[1:5], greedy(40), n=2)
    engine.loop.runner = runner
    events = run(engine)
    assert {e.request_id for e in events} == {other}
    want = dense_greedy(P[0], 12)
    got = texts(events)[other, 0]
    assert got == (want[: len(got)] if how == "callback" else want)
    before = engine.stats.decode_tokens
    assert engine.generate([P[5]], GREEDY)[0].tokens == dense_greedy(P[5], 12)
    assert engine.stats.decode_tokens - before == 12
    assert engine.idle and engine.allocator.num_used == 0


def test_generate_leaves_the_events_of_requests_before_it_to_others():
    engine = make_engine()
    first, second = (engine.submit(p, greedy(tokens)) for p, tokens in ((P[0], 6), (P[1], 40)))
    events = []
    while not events:
        events = engine.step()
    assert engine.generate([P[2]], GREEDY)[0].tokens == dense_greedy(P[2], 12)
    events += run(engine)
    want = {(first, 0): dense_greedy(P[0], 6), (second, 0): dense_greedy(P[1], 40)}
    assert texts(events) == want
    for request in (first, second):
        mine = [e.index for e in events if e.request_id == request]
        assert mine == list(range(len(mine)))


# ---- max_preemptions=0


def test_what_must_fit_is_bounded_by_the_longest_sequence():
    engine = make_engine(16, max_sequence_tokens=20, max_preemptions=0)
    at_once = []
    engine.scheduler.on_admitted = lambda _: at_once.append(len(engine.scheduler.running))
    for start in range(5):
        engine.submit([start, 7, 8], greedy(10**6))
    events = run(engine)
    assert max(at_once) == 3  # 15 pages, 5 for 20 tokens
    assert {len(t) for t in texts(events).values()} == {17}
    assert engine.stats.preemptions == 0


def test_samples_that_may_not_be_preempted_get_the_tokens_of_a_dense_forward():
    engine = make_engine(16, max_preemptions=0)
    done = engine.generate(P, GREEDY, n=3)
    assert [c.tokens for c in done] == [dense_greedy(p, 12) for p in P for _ in range(3)]


# ---- shards, without a model


class Counting:
    """A runner that computes nothing: every token is 1. Keeps the decode plans."""

    is_lost = False

    def __init__(self):
        self.plans = []

    def prefill(self, plan):
        return None

    def decode(self, plan):
        self.plans.append(plan)
        return Ticket(plan, None)

    def launched(self, out):
        pass

    def wait(self, out):
        pass

    def collect(self, ticket):
        budgets = ticket.plan.budgets
        tokens = np.ones((int(budgets.max()), len(budgets)), np.int32)
        return Result(tokens, budgets, np.zeros(len(budgets), bool))

    def restart(self, *, lost):
        pass


class Ends:
    """Which samples have ended, and why."""

    def __init__(self):
        self.of = {}

    def put(self, serial, outcomes):
        self.of |= {o.sample.request_id: o.reason for o in outcomes if o.reason}


def host_engine(allocator, **config):
    """Scheduler and loop, with nothing of a device."""
    config = EngineConfig(**dict(max_rows=4, decode_steps=8, prefill_chunk=64) | config)
    stats, ends, runner = EngineStats(), Ends(), Counting()
    limit = allocator.sequence_pages * allocator.page_size
    scheduler = Scheduler(allocator, config, ends, stats, Room(allocator, config), limit=limit)
    return scheduler, Loop(scheduler, runner, stats), runner, ends


def test_a_short_shard_takes_pages_and_steps_from_its_own_rows_alone():
    allocator = ShardedAllocator(64, 4, num_shards=2, hash_key=b"test")
    scheduler, loop, runner, ends = host_engine(allocator)
    outside = allocator.allocate([50])
    short = allocator.shard_of(outside)
    for i in range(4):
        tokens = list(range(10 * i, 10 * i + 6))
        scheduler.add(Sample(i, 0, 6, tokens, greedy(34), None))
    loop.visit()
    shards = {s.request_id: allocator.shard_of(s.handle) for s in scheduler.running}
    assert sorted(shards.values()) == [0, 0, 1, 1]
    free = allocator.shards[short].num_free
    allocator.prepare([outside], [1 + 4 * (free - 6)])  # six pages are left there
    victims, take = [], scheduler.preempt
    scheduler.preempt = lambda sample: (victims.append(shards[sample.request_id]), take(sample))
    begin = len(runner.plans)
    short_of_steps = False
    while not scheduler.idle or loop.in_flight:
        loop.visit()
        assert len(runner.plans) < 100
        for plan in runner.plans[begin:]:
            for slot, budget, length in zip(plan.slots, plan.budgets, plan.context, strict=True):
                full = budget == min(8, 40 - length)
                assert full or slot // 4 == short
                short_of_steps |= not full
        begin = len(runner.plans)
        shards |= {s.request_id: allocator.shard_of(s.handle) for s in scheduler.running}
    assert victims and set(victims) == {short} and short_of_steps
    assert set(ends.of) == set(range(4))
    allocator.free([outside])
    assert allocator.num_used == 0


def test_forks_that_may_not_be_preempted_are_not():
    """Five pages; each of three samples comes to two of its own."""
    scheduler, loop, _, ends = host_engine(
        BlockAllocator(6, 4, hash_key=b"test"), max_preemptions=0, decode_steps=4
    )
    first = Sample(0, 0, 4, [2, 3, 4, 5], greedy(4), None)
    first.siblings = [first.spawn(0, i, greedy(4)) for i in (1, 2)]
    scheduler.add(first)
    for _ in range(20):
        loop.visit()
    assert scheduler.idle and ends.of == {0: "length"}
    assert scheduler.stats.preemptions == 0


# ---- what is kept alive


def test_weights_that_a_model_closes_over_are_freed_with_it():
    weights = jnp.zeros((1, 61))
    gone = weakref.ref(weights)

    def closing(params, cache, tokens, batch, weights=weights):
        logits, cache = model(params, cache, tokens, batch)
        return logits + weights, cache

    engine = make_engine(fn=closing)
    assert engine.generate([P[0]], greedy(3))[0].tokens == dense_greedy(P[0], 3)
    del engine, closing, weights
    gc.collect()
    assert gone() is None


# ---- faults


@pytest.mark.parametrize("number", range(6))
def test_a_lone_request_outlives_any_allocation_that_fails(number):
    engine = make_engine(decode_steps=1)
    faults = Faults(FaultPlan(allocations=frozenset({number})))
    faults.install(engine)
    request = engine.submit(P[0][:3], greedy(24))
    assert texts(run(engine)) == {(request, 0): dense_greedy(P[0][:3], 24)}
    assert faults.log == [("allocation", number)]


def test_forced_preemption_lets_a_prompt_of_three_chunks_finish():
    engine = make_engine(prefix_cache=False, prefill_rows=1, max_preemptions=3)
    faults = Faults(FaultPlan(preempt_every=2))
    faults.install(engine)
    prompt = list(range(21))
    request = engine.submit(prompt, GREEDY)
    (sample,) = engine.scheduler.living[request]
    assert texts(run(engine)) == {(request, 0): dense_greedy(prompt, 12)}
    assert 1 <= sample.preemptions <= 3
    assert len(faults.log) == sample.preemptions == engine.stats.preemptions


def test_a_plan_in_which_everything_fails_is_refused():
    for name in ("allocation_rate", "copy_rate"):
        with pytest.raises(ValueError, match=f"{name} must be in"):
            FaultPlan(**{name: 1.0})


# ---- forks


def test_fork_names_a_sample_and_tells_its_own_callback():
    engine, told, asked = make_engine(), [], []
    warm = greedy(12, temperature=1.0, seed=3)
    parent = engine.submit(P[0], warm, n=2, on_token=asked.append)
    events = []
    while not events:
        events = engine.step()
    with pytest.raises(ValueError, match="say which one"):
        engine.fork(parent, GREEDY)
    with pytest.raises(KeyError, match="sample 2"):
        engine.fork(parent, GREEDY, sample=2)
    child = engine.fork(parent, GREEDY, sample=1, on_token=told.append)
    seen = [e.token for e in events if e.sample == 1]
    assert seen != [e.token for e in events if e.sample == 0]
    engine.fork(parent, GREEDY, sample=0)
    with pytest.raises(ValueError, match="all 4 rows are taken"):
        engine.fork(parent, GREEDY, sample=1)
    events += run(engine)
    assert told == [e for e in events if e.request_id == child]
    assert asked == [e for e in events if e.request_id == parent]
    want = dense_greedy([*P[0], *seen], 12 - len(seen))
    assert texts(events)[child, 0] == want


# ---- visits in flight change nothing


def life(seed: int, *, straight: bool = False, **config) -> list:
    """What a random program gets, step by step."""
    rng = np.random.default_rng(seed)
    engine = make_engine(16, top_logits=2, **config)
    engine.runner.straight = straight
    ids, log = [], []

    def call(function, *args, **options):
        try:
            log.append(function(*args, **options))
        except (KeyError, ValueError) as error:
            log.append(repr(error))
            return
        if log[-1] is not None:
            ids.append(log[-1])

    def callback(event):
        log.append(event)
        if event.index == 3 and event.request_id % 3 == 0:
            engine.cancel(event.request_id)
        if event.index == 2 and event.request_id % 4 == 1 and len(ids) < 14:
            ids.append(engine.submit(P[event.request_id % len(P)], greedy(5), on_token=callback))

    for _ in range(25):
        move, pick = rng.integers(0, 7), int(rng.integers(len(P)))
        hot = dict(temperature=float(move % 2), top_p=0.9 if pick == 0 else 1.0)
        params = greedy(int(rng.integers(1, 16)), seed=pick, **hot)
        if move < 3:
            call(engine.submit, P[pick], params, n=int(move) + 1, on_token=callback)
        elif move == 3 and ids:
            call(engine.cancel, ids[int(rng.integers(len(ids)))])
        elif move == 4 and ids:
            call(engine.fork, ids[-1], greedy(20, temperature=1.0), sample=0, on_token=callback)
        log.append(engine.step())
    events = run(engine)
    return [*log, events, engine.stats.preemptions]


@pytest.mark.parametrize(
    "seeds, other",
    [(range(10, 12), dict(collect_at_once=True)), (range(10, 12), dict(straight=True))]
    + [
        pytest.param(range(i, i + 5), other, marks=pytest.mark.long)
        for i in (0, 5)
        for other in (dict(collect_at_once=True), dict(straight=True))
    ],
    ids=str,
)
def test_neither_collecting_at_once_nor_what_programs_decide_changes_an_event(seeds, other):
    preemptions = 0
    for seed in seeds:
        plain, waiting = life(seed), life(seed, **other)
        flat = [
            [e for part in parts for e in (part if isinstance(part, list) else [])]
            for parts in (plain, waiting)
        ]
        assert flat[0] == flat[1], seed
        assert plain == waiting, seed
        preemptions += plain[-1]
    assert preemptions


def test_a_launch_that_fails_is_told_though_nobody_reads_its_visit(tmp_path):
    """The only request ends by a stop token while the next visit is on its way."""
    full = dense_greedy(P[0], 12)
    engine, launches = make_engine(), count()
    run_decode = engine.runner._run_decode

    def fail(program, message):
        if next(launches) == 1:
            for array in engine.runner._cache.k_pages:
                array.delete()
            raise RuntimeError("device")
        return run_decode(program, message)

    engine.runner._run_decode = fail
    stop = full.index(full[2])
    request = engine.submit(P[0], greedy(12, stop_tokens=(full[2],)))
    with pytest.raises(RuntimeError, match="device"):
        run(engine)
    events = run(engine)
    assert texts(events)[request, 0] == full[: stop + 1]
    engine.save(tmp_path / "file")
    assert engine.generate([P[1]], greedy(3))[0].tokens == dense_greedy(P[1], 3)


# ---- prefill takes turns


def test_rows_that_decode_get_tokens_in_every_visit_while_long_prompts_take_turns():
    engine = make_engine(prefill_rows=1, prefill_tokens=8)
    plans, runner = [], engine.loop.runner
    engine.loop.runner = Wrapped(
        runner, prefill=lambda plan: plans.append(plan) or runner.prefill(plan)
    )
    short = [engine.submit([i], greedy(60)) for i in (1, 2)]
    engine.step()
    long = [engine.submit([i] * 41, greedy(4)) for i in (3, 4)]
    served, visits = [], 0
    while len(served) < 10:
        plans.clear()
        events = engine.step()
        visits += 1
        assert visits < 15
        (plan,) = plans
        assert len(plan.chunks) == 1
        served += [sample.request_id for sample in plan.samples]
        got = [e.request_id for e in events if e.token is not None]
        assert all(got.count(request) == 4 for request in short)
    assert served == long * 5
    run(engine)


@pytest.mark.parametrize("asked", ["page_digests", "allocate", "match_prefix"])
def test_what_waits_for_a_prefix_costs_nothing_while_it_is_computed(asked):
    def calls(waiting: int) -> list[int]:
        allocator = BlockAllocator(400, 4, hash_key=b"test")
        scheduler, loop, _, _ = host_engine(allocator, prefill_chunk=8)
        counted, real = count(), getattr(allocator, asked)
        prefix = list(range(64))
        for i in range(waiting):
            scheduler.add(Sample(i, 0, 66, [*prefix, 100 + i, 7], greedy(4), None))

        def counting(*args, **options):
            next(counted)
            return real(*args, **options)

        setattr(allocator, asked, counting)
        out = []
        while not scheduler.running or scheduler.running[0].computed < 64:
            before = next(counted)
            loop.visit()
            out.append(next(counted) - before - 1)
        return out

    few, many = calls(20), calls(400)
    assert len(few) == len(many) == 8
    assert few[1:] == many[1:]  # in the first visit each is looked at once


# ---- warm-up


@pytest.mark.parametrize("tier", [False, True])
def test_after_warmup_no_transfer_is_implicit(tier):
    policies = dict(tier=HostTier(64) if tier else None, admission=Watermark(0))
    engine = make_engine(16, policies=policies)
    engine.warmup()
    jax.config.update("jax_transfer_guard", "disallow")  # of every thread
    try:
        params = greedy(12, temperature=0.9, top_k=9, top_p=0.9, stop_tokens=(3, 50))
        parent = engine.submit(P[0], greedy(30))
        events = []
        while not events:
            events = engine.step()
        child = engine.fork(parent, params)
        events += engine.step()
        preempt(engine)
        done = engine.generate([*P, P[1], [*P[1], 5, 6, 7, 8, 9]], params, n=2)
        events += run(engine)
    finally:
        jax.config.update("jax_transfer_guard", "allow")
    assert len(done) == 16 and (child, 0) in texts(events)
    assert texts(events)[parent, 0] == dense_greedy(P[0], 30)
    assert engine.stats.preemptions and engine.stats.prefix_hit_tokens
    assert bool(engine.stats.swaps) == tier


def test_a_decode_visit_sends_what_changed_in_one_message_or_two_and_reads_one_array(monkeypatch):
    """The rows and their budgets; what changed in tables and rows, where that did; the tokens."""
    engine = make_engine(page_size=16, num_pages=24)
    sent, read, put, get = [], [], jax.device_put, jax.device_get
    for prompt in P[:3]:
        engine.submit(prompt, greedy(60))
    for _ in range(4):
        engine.step()
    monkeypatch.setattr(jax, "device_put", lambda *args: sent.append(args) or put(*args))
    monkeypatch.setattr(jax, "device_get", lambda *args: read.append(args) or get(*args))
    each = []
    for _ in range(8):
        engine.step()
        engine.cache  # noqa: B018 - waits for the launch
        each.append((len(sent), len(read)))
        sent.clear(), read.clear()
    assert {got for _, got in each} == {1}
    assert sorted({told for told, _ in each}) == [1, 2]  # a page holds the tokens of four visits


@pytest.mark.parametrize("straight", [False, pytest.param(True, marks=pytest.mark.long)])
def test_warmup_says_how_far_it_is_and_compiles_everything(compiled, straight):
    engine = make_engine(20, row_buckets=(1, 4), chunk_buckets=(4, 8))
    engine.runner.straight = straight
    told = []
    engine.warmup(progress=lambda *each: told.append(each))
    assert told == [(i + 1, len(told)) for i in range(len(told))]
    decoding = 4 if straight else 1  # programs for each number of rows
    assert len(told) == 3 + 2 + 2 * decoding  # three messages, two chunks, two numbers of rows
    compiled.clear()
    each = [replace(GREEDY, temperature=i % 3 / 2, top_k=i % 2) for i in range(len(P))]
    engine.generate(P, each, n=2)
    engine.generate(P, GREEDY, n=2)
    assert engine.stats.preemptions and compiled == []


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, pickle.dumps])
def test_an_engine_says_that_it_is_not_copied(how):
    with pytest.raises(TypeError, match="Engine cannot be copied or pickled: save it"):
        how(make_engine())
