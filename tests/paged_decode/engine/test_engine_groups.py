"""The engine over layers that differ: a window gives its pages back while requests run."""

from __future__ import annotations

from functools import cache, partial

import numpy as np
import pytest

from paged_decode import CacheLayout, PageSpec, SamplingParams
from paged_decode.allocator.windows import most_pages
from paged_decode.engine.events import gather
from paged_decode.faults import poison_free_pages
from paged_decode.policies import MustFit
from paged_decode.replicas import ReplicaCheck
from paged_decode.tiers import HostTier

from ..tiny import DIM, KV_HEADS, dense_greedy, dense_logits, make_engine, preempt, prompts

WINDOW, SIZE, ROWS, CHUNK, STEPS = 6, 4, 4, 8, 4
BOUND = most_pages(WINDOW, max(2 * CHUNK, 2 * STEPS), SIZE)  # two chunks of a prompt in a visit
WINDOWS = (WINDOW, None)
P = prompts(9, seed=5, low=2, high=60)
dense = cache(partial(dense_greedy, windows=WINDOWS))


def layout(full: int = 90, windowed: int = ROWS * BOUND + 1, size: int = SIZE) -> CacheLayout:
    kinds = dict(num_kv_heads=KV_HEADS, head_dim=DIM)
    return CacheLayout(
        size,
        (
            PageSpec((1,), num_pages=full, **kinds),
            PageSpec((0,), num_pages=windowed, window=WINDOW, **kinds),
        ),
    )


def engine_of(*, full: int = 90, windowed: int = ROWS * BOUND + 1, **options):
    return make_engine(layout=layout(full, windowed), **options)


def answers(engine, lengths, *, poison: bool = False, forced: int = 0) -> dict:
    """Tokens of every prompt; `poison` puts NaN into every free page between steps."""
    ids = [
        engine.submit(p, SamplingParams(max_new_tokens=n)) for p, n in zip(P, lengths, strict=True)
    ]
    events, visit = [], 0
    while not engine.idle:
        if poison:
            engine.runner.exchange(lambda cache: poison_free_pages(cache, engine.allocator))
        events += engine.step()
        visit += 1
        if forced and visit % forced == 0:
            preempt(engine)
        engine.allocator.check_invariants()
        assert visit < 500
    found = {c.request_id: c.tokens for c in gather(events)}
    return {i: found[request] for i, request in enumerate(ids)}


def expected(lengths) -> dict:
    return {i: dense(tuple(p), n) for i, (p, n) in enumerate(zip(P, lengths, strict=True))}


LENGTHS = [3, 40, 17, 25, 9, 1, 30, 12, 22]


def test_a_window_pool_of_the_bound_serves_all_rows_without_a_preemption():
    engine = engine_of(policies=dict(check=ReplicaCheck()))
    engine.warmup()
    programs = engine.stats.programs
    assert answers(engine, LENGTHS, poison=True) == expected(LENGTHS)
    assert engine.stats.preemptions == 0 and engine.stats.programs == programs
    stats = engine.allocator.stats(1)
    assert stats.peak_used <= ROWS * BOUND and stats.used == 0
    assert engine.allocator.stats(0).peak_used > 2 * ROWS * BOUND  # the other group keeps all


@pytest.mark.parametrize(
    ("windowed", "admission"),
    [
        *((BOUND + 1, None), (2 * BOUND, MustFit())),
        pytest.param(2 * BOUND, None, marks=pytest.mark.long),
    ],
)
def test_where_window_pages_are_short_requests_wait_or_give_way_and_get_the_same_tokens(
    windowed, admission
):
    engine = engine_of(windowed=windowed, policies=dict(admission=admission))
    assert answers(engine, LENGTHS, poison=True) == expected(LENGTHS)
    assert engine.allocator.stats(1).used == 0


def test_short_of_pages_of_either_group_or_preempted_at_will_tokens_are_the_same():
    engine = engine_of(full=30, windowed=2 * BOUND, max_sequence_tokens=116)
    assert answers(engine, LENGTHS, poison=True, forced=9) == expected(LENGTHS)
    assert engine.stats.preemptions > 3


@pytest.mark.parametrize("stacked", [False, pytest.param(True, marks=pytest.mark.long)])
def test_what_gave_way_comes_back_from_the_tier_in_every_group(stacked):
    """Windows without the pages that they had passed."""
    tier = HostTier(500, buckets=(1, 4))
    engine = engine_of(policies=dict(tier=tier), prefix_cache=False, stacked=stacked)
    assert answers(engine, LENGTHS, poison=True, forced=3) == expected(LENGTHS)
    tier.check_invariants()
    stats = engine.stats
    assert stats.preemptions == stats.swaps > 5 and stats.swapped_in_pages > 20
    assert stats.recomputed_tokens < 80


def test_prompts_with_a_common_beginning_are_found_in_both_groups():
    engine = engine_of(windowed=3 * ROWS * BOUND)
    system, ends = prompts(1, seed=8, low=40, high=40)[0], prompts(6, seed=9, low=3, high=20)
    turns = [[*system, *end] for end in ends]
    for _ in range(2):  # the second time with the answers, as in a chat
        done = engine.generate(turns, SamplingParams(max_new_tokens=9))
        assert [c.tokens for c in done] == [dense(tuple(turn), 9) for turn in turns]
        engine.runner.exchange(lambda cache: poison_free_pages(cache, engine.allocator))
        turns = [[*turn, *c.tokens, 7, 8] for turn, c in zip(turns, done, strict=True)]
    stats = engine.stats
    asked = sum(len(turn) - 11 for turn in turns)
    assert stats.prefix_hit_tokens > 0.75 * asked
    engine.allocator.check_invariants()


def test_samples_and_forks_share_a_window_and_go_their_own_ways():
    engine = engine_of()
    sampled = SamplingParams(max_new_tokens=20, temperature=1.0, seed=3)
    request = engine.submit(P[1], sampled, n=3)
    events = [*engine.step()]
    while sum(event.request_id == request for event in events) < 18:
        events += engine.step()
    fork = engine.fork(request, SamplingParams(max_new_tokens=60), sample=1)
    while not engine.idle:
        events += engine.step()
        engine.allocator.check_invariants()
    done = {(c.request_id, c.sample): c.tokens for c in gather(events)}
    for sample in range(3):
        alone = engine_of()
        again = alone.generate(
            [P[1]], SamplingParams(max_new_tokens=20, temperature=1.0, seed=3 + sample)
        )
        assert done[request, sample] == again[0].tokens
    before = 60 - len(done[fork, 0])
    text = [*P[1], *done[request, 1][:before]]
    assert done[fork, 0] == dense(tuple(text), 60 - before)
    assert engine.allocator.stats(1).used == 0


def test_what_the_pool_of_a_window_can_never_hold_is_refused_when_the_engine_is_made():
    with pytest.raises(ValueError, match=f"group 1 needs {BOUND} usable pages .* got {BOUND - 1}"):
        engine_of(windowed=BOUND)
    engine_of(windowed=BOUND, prefill_rows=1)


def test_pages_held_by_others_in_a_window_end_a_request_that_is_alone_and_say_so():
    engine = engine_of(windowed=2 * BOUND)
    other = engine.allocator.allocate(range(SIZE * (BOUND + 2)))
    engine.submit(P[1], SamplingParams(max_new_tokens=40))
    end = list(engine.stream())[-1]
    assert end.finish_reason == "capacity" and "of group 1" in end.detail
    engine.allocator.free(other)
    (done,) = engine.generate([P[1]], SamplingParams(max_new_tokens=40))
    assert done.tokens == dense(tuple(P[1]), 40)


def test_logits_in_a_window_are_those_of_a_dense_model():
    engine = engine_of(top_logits=3)
    (done,) = engine.generate([P[1]], SamplingParams(max_new_tokens=12))
    text = [*P[1], *done.tokens]
    for i, tops in enumerate(done.top_logits):
        want = dense_logits(text[: len(P[1]) + i], windows=WINDOWS)
        np.testing.assert_allclose([x for _, x in tops], np.sort(want)[::-1][:3], atol=1e-4)


def test_prompts_that_begin_alike_share_pages_in_every_group_and_get_the_same_tokens():
    engine, start = engine_of(), P[1][:24]
    texts = [[*start, *P[i][:9]] for i in (2, 4, 5, 6)]
    for number, text in enumerate(texts * 2):
        before = engine.stats.prefix_hit_tokens
        (done,) = engine.generate([text], SamplingParams(max_new_tokens=9))
        assert done.tokens == dense(tuple(text), 9)
        engine.allocator.check_invariants()
        assert (engine.stats.prefix_hit_tokens - before >= 24) == (number > 0)
    together = engine.generate(texts, SamplingParams(max_new_tokens=9))
    assert [done.tokens for done in together] == [dense(tuple(text), 9) for text in texts]


def test_a_fork_begins_where_events_end_though_a_window_has_gone_on(tmp_path):
    """Tokens that were read but not told are behind it; the window has given back what it needs."""
    late = 0
    for length in (1, 5, 8, 13):
        for visits in (2, 3):
            engine = engine_of()
            prompt, told = P[0][:length], []
            request = engine.submit(prompt, SamplingParams(max_new_tokens=30))
            for _ in range(visits):
                told += engine.step()
            engine.save(tmp_path / "s")  # reads the visit in flight
            if not told:
                continue
            fork = engine.fork(request, SamplingParams(max_new_tokens=30))
            late += engine.num_waiting
            rest = gather(e for e in list(engine.stream()) if e.request_id == fork)
            assert rest[0].tokens == dense(tuple(prompt), 30)[len(told) :]
            assert engine.allocator.num_used == 0
    assert late
