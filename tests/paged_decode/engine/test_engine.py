"""The engine against a dense forward, under pressure, and when others misbehave."""

from __future__ import annotations

import numpy as np
import pytest

from paged_decode import (
    BlockAllocator,
    EngineConfig,
    OutOfPages,
    SamplingParams,
    SequenceTooLong,
)
from paged_decode.allocator.prefix import blake2b_digest
from paged_decode.engine.events import gather
from paged_decode.policies import SLRU, Watermark
from paged_decode.tiers import HostTier

from ...allocator.test_machine import Boom, Fuse
from ..tiny import (
    MAX_LEN,
    dense_greedy,
    dense_logits,
    fail_decode,
    make_engine,
    model,
    prompts,
)

GREEDY = SamplingParams(max_new_tokens=12)


def tokens_of(completions) -> list[tuple[int, ...]]:
    return [c.tokens for c in completions]


def assert_empty(engine) -> None:
    assert engine.idle
    engine.allocator.check_invariants()
    assert engine.allocator.num_used == 0


@pytest.fixture(scope="module")
def expected() -> dict[tuple[int, ...], tuple[int, ...]]:
    return {tuple(p): dense_greedy(p, 12) for p in prompts(9)}


@pytest.mark.parametrize(
    "page_size, num_pages",
    [(1, 400), *(pytest.param(*each, marks=pytest.mark.long) for each in ((4, 100), (32, 20)))],
)
def test_greedy_tokens_equal_a_dense_forward_at_every_page_size(expected, page_size, num_pages):
    engine = make_engine(num_pages, page_size)
    assert tokens_of(engine.generate(expected, GREEDY)) == list(expected.values())
    assert_empty(engine)


def test_tokens_under_memory_pressure_equal_those_with_ample_memory(expected):
    engine = make_engine(num_pages=16, page_size=4)
    assert tokens_of(engine.generate(expected, GREEDY)) == list(expected.values())
    assert engine.stats.preemptions > 0
    assert engine.stats.recomputed_tokens > 0
    assert_empty(engine)


def test_prefix_cache_changes_the_work_but_no_token():
    shared = prompts(1, seed=5, low=24, high=24)[0]
    batch = [shared + tail for tail in prompts(5, seed=6, low=1, high=6)]
    want = [dense_greedy(p, 12) for p in batch]
    cold = make_engine(prefix_cache=False)
    warm = make_engine()
    assert tokens_of(cold.generate(batch, GREEDY)) == want
    assert tokens_of(warm.generate(batch, GREEDY)) == want
    assert cold.stats.prefix_hit_tokens == 0
    assert warm.stats.prefix_hit_tokens == 4 * 24  # the first computes, even in one submission
    assert warm.stats.prefill_tokens < cold.stats.prefill_tokens
    assert_empty(warm)


def test_samples_of_one_prompt_share_its_pages_and_equal_single_requests():
    (prompt,) = prompts(1, seed=3, low=18, high=18)
    params = SamplingParams(max_new_tokens=10, temperature=1.0, seed=40)
    engine = make_engine()
    forked = engine.generate([prompt], params, n=4)
    assert engine.stats.prefill_tokens == 17
    assert len(set(tokens_of(forked))) > 1
    for i, completion in enumerate(forked):
        alone = make_engine().generate(
            [prompt], SamplingParams(max_new_tokens=10, temperature=1.0, seed=40 + i)
        )
        assert completion.tokens == alone[0].tokens
    assert_empty(engine)


def test_more_samples_than_rows_wait_for_a_row():
    (prompt,) = prompts(1, seed=3, low=9, high=9)
    engine = make_engine()
    done = engine.generate([prompt], GREEDY, n=7)
    assert tokens_of(done) == [dense_greedy(prompt, 12)] * 7
    assert [c.sample for c in done] == list(range(7))
    assert_empty(engine)


def test_a_fork_in_mid_answer_goes_on_from_the_tokens_so_far():
    (prompt,) = prompts(1, seed=8, low=10, high=10)
    engine = make_engine()
    parent = engine.submit(prompt, GREEDY)
    events = engine.step()
    while not events:
        events = engine.step()
    seen = len(events)
    child = engine.fork(parent, GREEDY)
    events += engine.stream()
    want = dense_greedy(prompt, 12)
    assert tuple(e.token for e in events if e.request_id == parent) == want
    assert tuple(e.token for e in events if e.request_id == child) == want[seen:]
    assert_empty(engine)


def test_events_stream_in_order_and_the_last_one_carries_the_reason():
    engine = make_engine()
    ids = [engine.submit(p, GREEDY) for p in prompts(5)]
    streams = {i: [] for i in ids}
    for event in engine.stream():
        streams[event.request_id].append(event)
    for events in streams.values():
        assert [e.index for e in events] == list(range(12))
        assert [e.finish_reason for e in events] == [None] * 11 + ["length"]


def test_a_stop_token_ends_the_request_and_is_kept():
    (prompt,) = prompts(1, seed=9, low=6, high=6)
    free = dense_greedy(prompt, 12)
    stop = free[5]
    engine = make_engine()
    (done,) = engine.generate([prompt], SamplingParams(max_new_tokens=12, stop_tokens=(stop,)))
    assert done.tokens == free[: free.index(stop) + 1]
    assert done.finish_reason == "stop"
    assert_empty(engine)


def test_top_logits_are_those_of_the_dense_forward():
    (prompt,) = prompts(1, seed=10, low=13, high=13)
    (done,) = make_engine(top_logits=5).generate([prompt], GREEDY)
    want = dense_logits(prompt)
    order = np.argsort(-want)[:5]
    assert [i for i, _ in done.top_logits[0]] == order.tolist()
    np.testing.assert_allclose([x for _, x in done.top_logits[0]], want[order], atol=1e-4)
    assert len(done.top_logits) == 12


def test_a_prompt_that_can_never_fit_is_refused_at_submit_and_the_longest_that_fits_runs():
    engine = make_engine(num_pages=4, page_size=4)  # 12 tokens at most
    with pytest.raises(SequenceTooLong, match="12"):
        engine.submit([1] * 12)
    (done,) = engine.generate([[1] * 11], GREEDY)
    assert (len(done.tokens), done.finish_reason) == (1, "capacity")
    assert_empty(engine)


def test_a_sequence_that_outgrows_the_pool_ends_at_capacity_without_livelock():
    engine = make_engine(num_pages=6, page_size=4, prefix_cache=False)
    done = engine.generate([[3, 1], [4, 1, 5]], SamplingParams(max_new_tokens=200))
    assert [c.finish_reason for c in done] == ["capacity"] * 2
    for prompt, completion in zip([[3, 1], [4, 1, 5]], done, strict=True):
        assert len(prompt) + len(completion.tokens) == 20
        assert completion.tokens == dense_greedy(prompt, len(completion.tokens))
    assert_empty(engine)


def test_raw_pages_held_outside_end_a_request_at_capacity():
    engine = make_engine(num_pages=9, page_size=4)
    held = engine.allocator.allocate_pages(5)
    (done,) = engine.generate([[1, 2, 3]], SamplingParams(max_new_tokens=25))
    assert done.finish_reason == "capacity"
    assert done.tokens == dense_greedy([1, 2, 3], len(done.tokens))
    engine.allocator.free_pages(held)
    assert_empty(engine)


@pytest.mark.parametrize("visits", range(6))
def test_cancel_returns_every_page_in_every_state(visits):
    engine = make_engine(num_pages=16, page_size=4)
    ids = [engine.submit(p, GREEDY, n=2) for p in prompts(5, seed=12)]
    events = [event for _ in range(visits) for event in engine.step()]
    open_ids = {s.request_id for s in (*engine.scheduler.running, *engine.scheduler.waiting)}
    for i in open_ids:
        engine.cancel(i)
    events += engine.step()
    assert_empty(engine)
    for i in ids:
        last = {e.sample: e.finish_reason for e in events if e.request_id == i}
        assert set(last.values()) <= {"length", "cancelled"} and len(last) == 2
    with pytest.raises(KeyError, match="not in the engine"):
        engine.cancel(ids[0])


def test_a_callback_that_raises_ends_its_own_request_and_no_other(expected):
    (bad, want_bad), (good, want_good) = list(expected.items())[:2]
    seen = []

    def fail(event):
        if event.index == 2:
            raise RuntimeError("callback")

    engine = make_engine()
    bad_id = engine.submit(bad, GREEDY, on_token=fail)
    good_id = engine.submit(good, GREEDY, on_token=seen.append)
    events = []
    with pytest.raises(RuntimeError, match="callback"):
        while True:
            events += engine.step()
    engine.allocator.check_invariants()
    events += engine.stream()
    assert tuple(e.token for e in seen) == want_good
    assert [e for e in events if e.request_id == good_id] == seen
    bad_events = [e for e in events if e.request_id == bad_id]
    assert bad_events[-1].finish_reason == "cancelled"
    assert tuple(e.token for e in bad_events[:-1]) == want_bad[: len(bad_events) - 1]
    assert_empty(engine)


def test_a_callback_may_cancel_and_submit():
    engine = make_engine()
    first, second = prompts(2, seed=15)
    made = []

    def cancel_and_submit(event):
        if event.index == 1 and not made:
            engine.cancel(event.request_id)
            made.append(engine.submit(second, GREEDY))

    engine.submit(first, GREEDY, on_token=cancel_and_submit)
    events = list(engine.stream())
    assert tuple(e.token for e in events if e.request_id == made[0]) == dense_greedy(second, 12)
    assert_empty(engine)


def test_a_model_that_cannot_be_traced_leaves_the_engine_usable(expected):
    broken = [True]

    def sometimes(params, cache, tokens, batch):
        if broken[0]:
            raise RuntimeError("model")
        return model(params, cache, tokens, batch)

    engine = make_engine(fn=sometimes)
    for prompt in expected:
        engine.submit(prompt, GREEDY)
    for _ in range(3):
        with pytest.raises(RuntimeError, match="model"):
            engine.step()
        engine.allocator.check_invariants()
    broken[0] = False
    streams = {}
    for event in engine.stream():
        streams.setdefault(event.request_id, []).append(event.token)
    assert [tuple(streams[i]) for i in sorted(streams)] == list(expected.values())
    assert_empty(engine)


@pytest.mark.parametrize("at", [0, 1, 3, 5])
def test_a_program_that_dies_with_the_cache_loses_no_request(expected, at):
    engine = make_engine()
    streams = {engine.submit(p, GREEDY): [] for p in expected}
    fail_decode(engine, {at}, RuntimeError("device"), deleting=True)
    with pytest.raises(RuntimeError, match="device"):
        while True:
            for event in engine.step():
                streams[event.request_id].append(event.token)
    engine.allocator.check_invariants()
    for event in engine.stream():
        streams[event.request_id].append(event.token)
    assert [tuple(s) for s in streams.values()] == list(expected.values())
    assert_empty(engine)


def test_a_copy_that_fails_loses_no_request():
    (prompt,) = prompts(1, seed=3, low=11, high=11)
    engine = make_engine()
    streams = {}
    request = engine.submit(prompt, GREEDY, n=3)
    cache_type = type(engine.cache)
    original = cache_type.copy_pages

    def failing(self, copies):
        if any(len(each.src) for each in copies):
            raise RuntimeError("copy")
        return original(self, copies)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_type, "copy_pages", failing)
        with pytest.raises(RuntimeError, match="copy"):
            for _ in range(5):
                engine.step()
    engine.allocator.check_invariants()
    for event in engine.stream():
        streams.setdefault(event.sample, []).append(event.token)
    assert [tuple(streams[i]) for i in range(3)] == [dense_greedy(prompt, 12)] * 3
    assert request == 0
    assert_empty(engine)


def test_after_warmup_nothing_compiles(compiled):
    engine = make_engine(num_pages=24, row_buckets=(1, 4), chunk_buckets=(4, 8))
    engine.warmup()
    compiled.clear()
    for seed in range(3):
        engine.generate(prompts(6, seed=seed), GREEDY, n=2)
        engine.generate(prompts(1, seed=seed), SamplingParams(temperature=1.0, top_p=0.9))
    assert engine.stats.preemptions > 0
    assert compiled == []


def test_no_program_copies_the_pool():
    engine = make_engine(num_pages=8192, page_size=16, max_sequence_tokens=MAX_LEN)
    pool_bytes = engine.cache.page_bytes * 8192
    runner = engine.runner
    given = engine.cache, runner._state, runner._table, runner.params
    steps = dict(steps=engine.config.decode_steps, top=0)
    idle = runner._put(runner._pack.idle(4)), runner._put(runner._pack.prefill(8, (), 2))
    decoding = runner._programs.decode.lower(*given, idle[0], **steps)
    prefilling = runner._programs.prefill.lower(given[0], *given[2:], idle[1])
    for lowered in (decoding, prefilling):
        memory = lowered.compile().memory_analysis()
        assert memory.alias_size_in_bytes >= pool_bytes
        assert memory.temp_size_in_bytes < pool_bytes / 20


def test_different_salts_never_share_pages():
    (prompt,) = prompts(1, seed=3, low=20, high=20)
    engine = make_engine()
    for salt in (None, "", b"", "a", b"a"):
        engine.generate([prompt], GREEDY, cache_salt=salt)
    assert engine.stats.prefix_hit_tokens == 0
    engine.generate([prompt], GREEDY, cache_salt="a")
    assert engine.stats.prefix_hit_tokens == 16


def test_bad_requests_are_refused_and_queue_nothing(unchecked):
    engine = make_engine(vocab_size=61)
    for prompt, error in (
        ([], ValueError),
        ([[1, 2]], ValueError),
        ([1.5], TypeError),
        (["a"], TypeError),
        ([-1], ValueError),
        ([2**31], ValueError),
        ([61], ValueError),
        ([True, 2], TypeError),
        ({1, 2}, TypeError),
        ("12", TypeError),
    ):
        with pytest.raises(error, match="prompt"):
            engine.submit(prompt)
    for n, error in ((0, ValueError), (2**16 + 1, ValueError), (True, TypeError), (1.5, TypeError)):
        with pytest.raises(error, match="^n must be (from 1 to 65536|an integer), got"):
            engine.submit([1], n=n)
    with pytest.raises(TypeError, match="salt"):
        engine.submit([1], cache_salt=7)
    with pytest.raises(SequenceTooLong):
        engine.generate([[1, 2], [1] * 300])
    assert engine.idle
    with pytest.raises(KeyError):
        engine.fork(0, GREEDY)


def test_integers_of_every_kind_are_taken_and_bools_are_none(unchecked):
    sizes = dict(max_rows=4, decode_steps=2, prefill_chunk=8, prefill_rows=1, max_preemptions=3)
    sizes |= dict(top_logits=1, vocab_size=61, max_sequence_tokens=32)
    plain = EngineConfig(**sizes, row_buckets=(2, 4), chunk_buckets=(8,))
    config = EngineConfig(
        **{name: np.int64(value) for name, value in sizes.items()},
        row_buckets=np.array([4, 2]),
        chunk_buckets={np.uint8(8)},
    )
    assert config == plain
    assert {type(getattr(config, name)) for name in sizes} == {int}
    for name in (*sizes, "row_buckets", "chunk_buckets"):
        for bad in (True, 2.5, "2"):
            with pytest.raises(TypeError, match=f"{name} must be"):
                EngineConfig(**{name: bad})
    for policy, name in ((Watermark, "pages_per_sample"), (SLRU, "protect")):
        assert type(getattr(policy(np.int64(3)), name)) is int
        for bad in (True, 2.5):
            with pytest.raises(TypeError, match=f"{name} must be an integer"):
                policy(bad)
    engine = make_engine()
    first = engine.submit(np.array([1, 2], np.uint8), n=np.int64(2), priority=np.int32(-3))
    for call in (engine.cancel, lambda request: engine.fork(request, GREEDY)):
        for bad, error in ((True, TypeError), (0.0, TypeError), (-1, KeyError), (9, KeyError)):
            with pytest.raises(error):
                call(bad)
    with pytest.raises(TypeError, match="priority must be an integer"):
        engine.submit([1], priority=1.5)
    engine.cancel(np.int64(first))
    assert len(engine.step()) == 2
    assert_empty(engine)


@pytest.mark.parametrize(
    "field, value",
    [
        ("max_rows", 0),
        ("decode_steps", 2**31),
        ("max_sequence_tokens", 0),
        ("max_sequence_tokens", 1),
        ("top_logits", -1),
        ("vocab_size", 0),
        ("row_buckets", (0, 8)),
        ("row_buckets", (4,)),
        ("chunk_buckets", (-1, 128)),
    ],
)
def test_limits_out_of_range_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=field):
        EngineConfig(**{field: value})


def test_cache_and_allocator_must_agree():
    with pytest.raises(ValueError, match="max_sequence_tokens"):
        make_engine(num_pages=4, page_size=4, max_sequence_tokens=13)
    engine = make_engine(num_pages=8)
    other = make_engine(num_pages=9)
    with pytest.raises(ValueError, match="num_pages: 8 and 9"):
        type(engine)(model, {}, engine.cache, other.allocator)


def test_a_random_life_keeps_every_invariant_and_every_token():
    """Submit, fork, cancel and step at random in a pool that is always too small."""
    rng = np.random.default_rng(0)
    engine = make_engine(num_pages=13, page_size=4)
    prompt_of, streams, cancelled = {}, {}, set()
    pool = prompts(6, seed=21, high=20)
    dense = [dense_greedy(p, 12) for p in pool]
    for turn in range(90):
        move = rng.integers(0, 6)
        if move < 3 and turn < 75:
            pick = int(rng.integers(len(pool)))
            request = engine.submit(pool[pick], GREEDY, n=int(rng.integers(1, 3)))
            prompt_of[request] = pick
        elif move == 3 and engine.scheduler.running:
            request = engine.scheduler.running[
                int(rng.integers(len(engine.scheduler.running)))
            ].request_id
            engine.cancel(request)
            cancelled.add(request)
        for event in engine.step():
            streams.setdefault((event.request_id, event.sample), []).append(event)
        engine.allocator.check_invariants()
    for event in engine.stream():
        streams.setdefault((event.request_id, event.sample), []).append(event)
    assert engine.stats.preemptions > 0
    for (request, _), events in streams.items():
        got = tuple(e.token for e in events if e.token is not None)
        want = dense[prompt_of[request]]
        assert got == (want[: len(got)] if request in cancelled else want)
    assert {r for r, _ in streams} == set(prompt_of)
    assert_empty(engine)


def test_out_of_pages_is_never_seen_by_the_caller():
    engine = make_engine(num_pages=8, page_size=4)
    try:
        engine.generate(prompts(12, seed=30, high=20), GREEDY, n=2)
    except OutOfPages:
        pytest.fail("the engine must preempt or finish")
    assert_empty(engine)


def test_a_prompt_that_waits_is_digested_once():
    engine, calls = make_engine(max_rows=1, row_buckets=(1,)), []
    cache = engine.allocator._cache
    real = cache._digest
    cache._digest = lambda key, payload: calls.append(payload) or real(key, payload)
    shared, asked = list(range(12)), prompts(5, low=9, high=20)
    done = engine.generate([shared + p for p in asked], SamplingParams(max_new_tokens=9))
    assert [c.tokens for c in done] == [dense_greedy(shared + p, 9) for p in asked]
    pages = sum((len(shared + p) + 8) // 4 for p in asked)
    assert pages - 4 * 3 <= len(calls) <= pages + len(asked)  # and a root for each prompt


@pytest.mark.parametrize("kind", ["rank", "digest"])
@pytest.mark.parametrize("tier", [False, True])
def test_the_engine_goes_on_after_whatever_a_users_object_raises(kind, tier):
    """At its k-th call, for several k: the step raises it, and nothing is lost."""
    asked = prompts(5, seed=3, low=8, high=14)
    want = [dense_greedy(p, 10) for p in asked]
    for k in (1, 4, 9, 20):
        fuse = Fuse(blake2b_digest)
        options = dict(digest=fuse.digest) if kind == "digest" else dict(eviction=fuse)
        engine = make_engine(
            14,
            policies=dict(tier=HostTier(64) if tier else None, admission=Watermark(0)),
            allocator=BlockAllocator(14, 4, hash_key=b"test", **options),
        )
        for prompt in asked:
            engine.submit(prompt, SamplingParams(max_new_tokens=10))
        fuse.left, events, raised = k, [], 0
        while not engine.idle:
            try:
                events += engine.step()
            except Boom:
                raised += 1
                engine.allocator.check_invariants()
        fuse.left = 0
        assert [c.tokens for c in gather(events)] == want and raised <= 1
        assert engine.allocator.num_used == 0 and engine.stats.preemptions
        engine.allocator.check_invariants()


def test_what_is_no_sampling_params_or_callback_is_refused_before_it_is_queued(unchecked):
    engine = make_engine()
    for bad in (
        dict(sampling={"max_new_tokens": 3}),
        dict(sampling=SamplingParams),
        dict(on_token=5),
    ):
        with pytest.raises(TypeError, match=next(iter(bad))):
            engine.submit([1, 2], **bad)
    assert engine.idle
