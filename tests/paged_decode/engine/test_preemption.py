"""Samples that lose their pages: whatever happens to them, their tokens are the same."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from paged_decode import BlockAllocator, SamplingParams
from paged_decode.faults import FaultPlan, Faults
from paged_decode.policies import (
    Cheaper,
    LastAdmitted,
    LowestPriority,
    MustFit,
    Priority,
    Recompute,
    Watermark,
)
from paged_decode.pressure import Roofline
from paged_decode.tiers import DeviceMover, HostTier

from ..tiny import dense_greedy, fail_decode, make_engine, prompts

PAGES = 16  # of 4 tokens: two or three of the requests below fit at their full length
ASKED = prompts(7, seed=3, low=8, high=14)
PARAMS = SamplingParams(max_new_tokens=20)


@pytest.fixture(scope="module")
def expected():
    return [dense_greedy(prompt, 20) for prompt in ASKED]


class Oldest:
    """The worst victim: whoever is about to finish."""

    def choose(self, running):
        return running[0]


def tight(mover=None, capacity=64, **policies):
    tier = HostTier(capacity, buckets=(1, 4), mover=mover)
    return make_engine(PAGES, policies={"tier": tier} | policies)


def finished(engine):
    done = engine.generate(ASKED, PARAMS)
    engine.allocator.check_invariants()
    assert engine.idle and engine.allocator.num_used == 0
    if engine.tier is not None:
        engine.tier.settle()
        engine.tier.check_invariants()
    return [c.tokens for c in done]


@pytest.mark.parametrize("memory", ["numpy", "pinned_host"])
def test_swapped_samples_get_the_tokens_of_ample_memory_and_compute_nothing_twice(expected, memory):
    engine = tight(DeviceMover(memory))
    assert finished(engine) == expected
    assert engine.stats.swaps == engine.stats.preemptions > 0
    assert engine.stats.swapped_in_pages > 0
    assert engine.stats.recomputed_tokens == 0


@pytest.mark.parametrize("memory", ["pinned_host", pytest.param("numpy", marks=pytest.mark.long)])
def test_after_warmup_no_swap_compiles_anything(expected, memory, compiled):
    """Not the copies, and not the engine's programs on a cache that a copy has written."""
    jax.clear_caches()
    engine = tight(DeviceMover(memory))
    engine.warmup()
    compiled.clear()
    assert finished(engine) == expected
    assert engine.stats.swapped_in_pages > 0
    assert compiled == []


@pytest.mark.parametrize(
    "policies",
    [
        pytest.param(dict(preemption=Recompute()), id="recompute"),
        pytest.param(dict(capacity=3), id="small tier"),  # most is given up again
        pytest.param(dict(victim=Oldest()), id="oldest"),
        pytest.param(dict(victim=Oldest(), capacity=5), id="oldest, small tier"),
        pytest.param(dict(admission=Watermark(0)), id="no watermark"),
        pytest.param(dict(admission=MustFit()), id="must fit"),
    ],
)
def test_no_policy_changes_a_token(expected, policies):
    assert finished(tight(**policies)) == expected


def test_must_fit_never_preempts_and_a_watermark_of_nothing_does():
    careful, careless = tight(admission=MustFit()), tight(admission=Watermark(0))
    finished(careful)
    finished(careless)
    assert careful.stats.preemptions == 0 < careless.stats.preemptions


@pytest.mark.parametrize("keep", [0, 1, 2])
def test_admission_leaves_the_watermark_but_never_an_empty_engine_waiting(keep):
    engine = make_engine(PAGES, policies=dict(admission=Watermark(keep)))
    sizes = (4 * (PAGES - 1) - 1, 12, 12, 12)  # the first one fills the pool all alone
    for at, size in enumerate(sizes):
        engine.submit([at] * size, SamplingParams(max_new_tokens=1))
    admitted = []

    def note(sample):
        free = engine.allocator.num_free + engine.allocator.num_evictable
        admitted.append((len(engine.scheduler.running) - 1, free))

    engine.scheduler.on_admitted = note
    list(engine.stream())
    assert admitted[0] == (0, 0)
    assert len(admitted) == len(sizes)
    assert all(free >= keep * others for others, free in admitted)


@pytest.mark.parametrize("most", [0, 1, 2])
@pytest.mark.parametrize(
    "victim", [Oldest(), LastAdmitted(), LowestPriority()], ids=lambda v: type(v).__name__
)
def test_no_sample_is_preempted_more_often_than_allowed(expected, most, victim):
    engine = make_engine(PAGES, policies=dict(victim=victim), max_preemptions=most)
    seen = []
    engine.scheduler.on_admitted = lambda sample: seen.append(sample.preemptions)
    assert finished(engine) == expected
    assert max(seen) <= most and (max(seen) > 0) == (most > 0)


def test_the_lowest_priority_gives_way_and_the_highest_never_does():
    engine = tight(victim=LowestPriority())
    seen = []
    engine.scheduler.on_admitted = lambda s: s.preemptions and seen.append(s.priority)
    for at, prompt in enumerate(ASKED):
        engine.submit(prompt, PARAMS, priority=at % 3)
    list(engine.stream())
    assert seen and seen.count(2) == 0
    assert min(seen) == 0


def test_pages_of_high_priority_outlive_others():
    allocator = BlockAllocator(8, 2, eviction=Priority())
    prompts = [[token, token] for token in (1, 2, 3, 4)]
    handles = [allocator.allocate(prompt) for prompt in prompts]
    pages = [allocator.sequence(handle).pages[0] for handle in handles]
    allocator.commit(handles, 2)
    allocator.free(handles[:3])
    allocator.prioritize([pages[0], pages[3], 7], 2)  # cached, cached with an owner, free
    allocator.free(handles[3])
    allocator.allocate_pages(5)
    found = [allocator.match_prefix([*prompt, 9]) for prompt in prompts]
    assert found == [2, 0, 0, 2]
    allocator.prioritize([pages[0]], -1)
    allocator.allocate_pages(1)
    assert [allocator.match_prefix([*prompt, 9]) for prompt in prompts] == [0, 0, 0, 2]
    allocator.check_invariants()


def test_the_cheaper_way_changes_sides_where_the_cost_model_says():
    # 1 FLOP per token at 1 FLOP/s, two copies of 1 byte per token: equal at 2 bytes/s.
    def swaps(link_bytes):
        costs = Roofline(0.0, 1.0, 1.0, 1e9, 1.0, 0.0, link_bytes=link_bytes)
        return Cheaper(costs).swaps(SimpleNamespace(computed=1000))

    assert Roofline(0.0, 1.0, 1.0, 1e9, 1.0, 0.0).crossover_link_bytes(1000) == pytest.approx(2)
    assert [swaps(b) for b in (1.9, 2.1)] == [False, True]


def test_the_same_run_twice_is_the_same_to_the_page():
    runs = []
    for _ in range(2):
        engine = tight(capacity=6)
        pages = []
        for prompt in ASKED:
            engine.submit(prompt, PARAMS)
        while not engine.idle:
            engine.step()
            pages.append(
                [engine.allocator.sequence(s.handle).pages for s in engine.scheduler.running]
            )
        runs.append((pages, engine.stats.preemptions, engine.tier.stats))
    assert runs[0] == runs[1]


def test_a_sample_that_has_to_leave_does_not_drag_the_others_along(expected):
    # Its pages are on their way to the host, but free at once: one preemption makes room.
    engine = tight()
    Faults(FaultPlan(delay_copies=3)).install(engine)
    plain = make_engine(PAGES)
    assert finished(engine) == finished(plain) == expected
    assert engine.stats.preemptions <= plain.stats.preemptions + 1


@pytest.mark.parametrize("visits", range(1, 9))
def test_cancelling_in_every_state_returns_every_page(visits):
    engine = tight(capacity=8)
    ids = [engine.submit(prompt, PARAMS) for prompt in ASKED]
    for _ in range(visits):
        engine.step()
    for request in ids:
        if any(
            s.request_id == request for s in (*engine.scheduler.running, *engine.scheduler.waiting)
        ):
            engine.cancel(request)
    list(engine.stream())
    engine.allocator.check_invariants()
    engine.tier.settle()
    engine.tier.check_invariants()
    assert engine.allocator.num_used == 0


# ---- faults


@pytest.mark.parametrize("k", range(0, 30, 2))
def test_no_failed_allocation_or_copy_loses_a_token_or_a_page(expected, k):
    engine = tight(capacity=12)
    faults = Faults(FaultPlan(allocations=frozenset({k, k + 1}), copies=frozenset({k // 2})))
    faults.install(engine)
    assert finished(engine) == expected
    assert ("allocation", k) in faults.log


def test_faults_at_every_turn_with_poisoned_free_pages_change_no_token(expected):
    engine = tight(capacity=12)
    plan = FaultPlan(
        seed=5, allocation_rate=0.15, copy_rate=0.3, preempt_every=4, delay_copies=1, poison=True
    )
    faults = Faults(plan)
    faults.install(engine)
    assert finished(engine) == expected
    assert {kind for kind, _ in faults.log} == {"allocation", "copy", "preemption"}

    again = tight(capacity=12)
    repeated = Faults(faults.replay())
    repeated.install(again)
    assert finished(again) == expected
    assert repeated.log == faults.log


def test_faults_of_one_seed_are_the_same_and_of_another_are_not():
    def failed(seed):
        faults = Faults(FaultPlan(seed=seed, copy_rate=0.5))
        return [faults.fails("copy") for _ in range(64)]

    assert failed(1) == failed(1) != failed(2)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_callback_that_raises_or_an_interrupt_in_mid_step_leaves_no_page_behind(error):
    engine = tight()
    calls = []

    def on_token(event):
        calls.append(event)
        if len(calls) == 5:
            raise error

    for at, prompt in enumerate(ASKED):
        engine.submit(prompt, PARAMS, on_token=on_token if at == 1 else None)
    for _ in range(200):
        try:
            engine.step()
        except error:
            engine.allocator.check_invariants()
        if engine.idle:
            break
    assert engine.idle and engine.allocator.num_used == 0
    engine.allocator.check_invariants()


def test_an_interrupt_in_a_program_keeps_what_the_tier_holds(expected):
    engine = tight()
    for prompt in ASKED:
        engine.submit(prompt, PARAMS)
    events = []
    fail_decode(engine, {2, 7}, KeyboardInterrupt())
    while not engine.idle:
        try:
            events += engine.step()
        except KeyboardInterrupt:
            engine.allocator.check_invariants()
            engine.tier.check_invariants()
    tokens = [[e.token for e in events if e.request_id == i] for i in range(len(ASKED))]
    assert [tuple(t) for t in tokens] == expected


@pytest.mark.parametrize("salt", [3, "\ud800"])
def test_a_bad_salt_is_refused_at_the_edge(salt, unchecked):
    engine = tight()
    with pytest.raises((TypeError, ValueError), match="cache_salt"):
        engine.submit([1, 2], cache_salt=salt)
    assert engine.idle


def test_salts_of_every_kind_never_hit_each_other_on_the_host():
    engine = tight()
    salts = [None, "", b"", "a\0b", b"a\0b", "a", "x" * 2**20]
    prompt = (np.arange(12) % 7).tolist()
    for salt in salts:
        engine.generate([prompt], SamplingParams(max_new_tokens=2), cache_salt=salt)
        handle = engine.allocator.allocate(prompt, cache_salt=salt)
        engine.tier.store(engine.cache, engine.allocator, handle)
        engine.allocator.free(handle)
        engine.tier.settle()
    assert engine.tier.stats.stored == 2 * len(salts)
