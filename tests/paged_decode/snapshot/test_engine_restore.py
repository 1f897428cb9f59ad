"""A restored engine goes on with exactly the tokens of the one that was not interrupted."""

from __future__ import annotations

import copy

import jax
import numpy as np
import pytest

from paged_decode import (
    BlockAllocator,
    Engine,
    KVCache,
    SamplingParams,
    SequenceTooLong,
    SnapshotMismatch,
    save_snapshot,
)

from ...devices import first_devices
from ..tiny import (
    DIM,
    KV_HEADS,
    LAYERS,
    PARAMS,
    dense_greedy,
    make_engine,
    model,
    prompts,
)

LONG = 64
SAMPLED = SamplingParams(max_new_tokens=LONG, temperature=1.0, top_p=0.9, top_k=20)


def crowd(engine):
    """Greedy and sampled requests, forks, samples of one prompt, a stop token; some must wait."""
    many = prompts(8, seed=4, low=5, high=30)
    for seed, prompt in enumerate(many[:5]):
        engine.submit(prompt, SamplingParams(max_new_tokens=LONG))
        engine.submit(prompt, SamplingParams(**params_of(SAMPLED), seed=seed), cache_salt="t")
    stop = dense_greedy(many[5], 9)[8]
    engine.submit(many[5], SamplingParams(max_new_tokens=LONG, stop_tokens=(stop, 3)))
    engine.submit(many[6], SamplingParams(**params_of(SAMPLED), seed=9), n=3)


def params_of(params) -> dict:
    return {n: getattr(params, n) for n in ("max_new_tokens", "temperature", "top_p", "top_k")}


def key(event):
    return event.request_id, event.sample, event.index, event.token, event.finish_reason


@pytest.mark.parametrize(
    "num_pages, visits",
    [
        *((24, 4), (120, 5)),
        *(pytest.param(*each, marks=pytest.mark.long) for each in ((24, 0), (24, 11), (120, 1))),
    ],
)
def test_tokens_after_a_restore_are_those_of_the_uninterrupted_run(tmp_path, num_pages, visits):
    whole, twin = (
        make_engine(num_pages, max_sequence_tokens=92),
        make_engine(num_pages, max_sequence_tokens=92),
    )
    crowd(whole), crowd(twin)
    for _ in range(visits):
        whole.step(), twin.step()
    if visits == 5:
        for engine in (whole, twin):
            engine.cancel(engine.scheduler.running[-1].request_id)
            engine.fork(next(s.request_id for s in engine.scheduler.running if s.decoding), SAMPLED)
            last = list(engine.scheduler.waiting)[-1]
            engine.cancel(last.request_id)  # its last event is not delivered yet
    whole.save(tmp_path / "s", metadata={"visits": visits})
    again = make_engine(num_pages, max_sequence_tokens=92)
    ids = again.restore(tmp_path / "s")
    assert all(old == new for old, new in ids.items())
    again.allocator.check_invariants()
    rest, uninterrupted = list(again.stream()), list(twin.stream())
    assert [key(e) for e in rest] == [key(e) for e in uninterrupted]
    assert [key(e) for e in whole.stream()] == [key(e) for e in rest]  # saving disturbed nothing
    assert len(rest) > 300 and again.allocator.num_used == 0


def test_an_engine_on_four_devices_goes_on_with_one(tmp_path):
    """The model has 2 KV heads: on the devices every head has a copy, in the file it has none."""
    mesh = jax.make_mesh((4,), ("heads",), devices=first_devices(4))
    one = make_engine()
    sizes = dict(num_layers=LAYERS, num_pages=64, num_kv_heads=KV_HEADS, page_size=4, head_dim=DIM)
    cache = KVCache.create(**sizes, mesh=mesh, head_axis="heads")
    many = Engine(model, PARAMS, cache, BlockAllocator(64, 4, hash_key=b"test"), one.config)
    asked = prompts(3, seed=8, low=5, high=12)
    for prompt in asked:
        many.submit(prompt, SamplingParams(max_new_tokens=20))
    told = [event for _ in range(3) for event in many.step()]
    assert 0 < len(told) < 60
    many.save(tmp_path / "s")
    one.restore(tmp_path / "s")
    told += one.stream()
    for request, prompt in enumerate(asked):
        tokens = tuple(e.token for e in told if e.request_id == request and e.token is not None)
        assert tokens == dense_greedy(prompt, 20)


def test_a_restore_into_a_warm_engine_compiles_only_what_places_the_pages(tmp_path, compiled):
    jax.clear_caches()
    whole, again = make_engine(), make_engine(80)
    for engine in (whole, again):
        engine.warmup()
    for prompt in prompts(3, seed=8, low=5, high=12):
        whole.submit(prompt, SamplingParams(max_new_tokens=20))
    whole.step()
    whole.save(tmp_path / "s")
    again.restore(tmp_path / "s")
    compiled.clear()
    list(again.stream())
    assert compiled == []


def test_logits_after_a_restore_are_equal_to_the_last_bit(tmp_path):
    options = dict(top_logits=4, max_sequence_tokens=92)
    whole, again = make_engine(120, **options), make_engine(140, **options)
    crowd(whole)
    for _ in range(6):
        whole.step()
    whole.save(tmp_path / "s")
    again.allocator.allocate_pages(17)
    again.restore(tmp_path / "s")
    a = {key(e): e.top_logits for e in again.stream()}
    b = {key(e): e.top_logits for e in whole.stream()}
    assert a == b and any(a.values())


def test_save_restore_save_of_an_engine_gives_the_same_bytes(tmp_path):
    engine = make_engine(24, max_sequence_tokens=92)
    crowd(engine)
    for _ in range(7):
        engine.step()
    engine.save(tmp_path / "a")
    again = make_engine(24, max_sequence_tokens=92)
    again.restore(tmp_path / "a")
    again.save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_saving_behind_the_loop_while_it_steps_on(tmp_path):
    engine, twin = (make_engine(24, max_sequence_tokens=92) for _ in range(2))
    crowd(engine), crowd(twin)
    for _ in range(4):
        engine.step(), twin.step()
    pending = engine.save_async(tmp_path / "s")
    for _ in range(3):
        engine.step()
    pending.result(60.0)
    again = make_engine(24, max_sequence_tokens=92)
    again.restore(tmp_path / "s")
    assert [key(e) for e in again.stream()] == [key(e) for e in twin.stream()]


def test_a_request_moves_between_two_running_engines(tmp_path):
    first, second, alone = make_engine(), make_engine(), make_engine()
    moving, staying = prompts(2, seed=8, low=9, high=20)
    params = SamplingParams(max_new_tokens=30, temperature=0.8, seed=5)
    want = alone.generate([moving], params)[0].tokens
    request = first.submit(moving, params)
    first.submit(staying, SamplingParams(max_new_tokens=30))
    second.submit(staying, SamplingParams(max_new_tokens=30))
    got = []
    while len(got) < 6:
        got += [e for e in first.step() if e.request_id == request]
    second.step()
    first.save(tmp_path / "one", requests=[request])
    first.cancel(request)
    ids = second.restore(tmp_path / "one")
    assert ids == {request: 1}
    second.allocator.check_invariants()
    streams = {0: [], 1: []}
    for event in second.stream():
        streams[event.request_id].append(event)
    moved = [e for e in got if e.token is not None] + streams[1]
    assert tuple(e.token for e in moved) == want
    assert [e.index for e in moved] == list(range(30))
    assert tuple(e.token for e in streams[0]) == dense_greedy(staying, 30)


def test_callbacks_are_given_anew_and_see_every_event_once(tmp_path):
    engine = make_engine()
    one, two = (engine.submit(p, SamplingParams(max_new_tokens=9)) for p in prompts(2, seed=3))
    before = engine.step() + engine.step()
    engine.cancel(two)
    engine.save(tmp_path / "s")
    again, seen = make_engine(), []
    again.restore(tmp_path / "s", on_token={one: seen.append, two: seen.append})
    events = list(again.stream())
    assert events == seen
    assert [e.index for e in before + events if e.request_id == one] == list(range(9))
    assert [e.finish_reason for e in events if e.request_id == two] == ["cancelled"]
    assert again.submit([1, 2]) == 2


def test_requests_without_a_row_wait_and_get_the_same_tokens(tmp_path):
    many = prompts(4, seed=11, low=5, high=12)
    engine = make_engine()
    for prompt in many:
        engine.submit(prompt, SamplingParams(max_new_tokens=12))
    events = engine.step() + engine.step()
    engine.save(tmp_path / "s")
    narrow = make_engine(max_rows=2, row_buckets=(2,))
    narrow.restore(tmp_path / "s")
    narrow.allocator.check_invariants()
    events += narrow.stream()
    for request, prompt in enumerate(many):
        got = tuple(e.token for e in events if e.request_id == request)
        assert got == dense_greedy(prompt, 12)


def test_what_does_not_fit_an_engine_changes_nothing(tmp_path):
    engine = make_engine()
    for prompt in prompts(3, seed=3, low=20, high=30):
        engine.submit(prompt, SamplingParams(max_new_tokens=12))
    engine.step(), engine.step()
    engine.save(tmp_path / "engine")
    save_snapshot(tmp_path / "plain", engine.cache, engine.allocator)
    cases = (
        ("engine", make_engine(max_sequence_tokens=8), SequenceTooLong, "max_sequence_tokens"),
        ("engine", make_engine(vocab_size=5), SnapshotMismatch, "vocab_size"),
        ("engine", make_engine(page_size=8, num_pages=30), SnapshotMismatch, "page_size"),
        ("plain", make_engine(), SnapshotMismatch, "no requests"),
    )
    for name, other, error, text in cases:
        other.submit([1, 2, 3], SamplingParams(max_new_tokens=5))
        if other.max_sequence_tokens > 8:
            other.step()
        other.loop.collect()
        tokens = copy.deepcopy([s.tokens for s in other.scheduler.running])
        before = tokens, other.allocator.num_free
        bits = [np.array(a).tobytes() for a in jax.tree.leaves(other.cache)]
        with pytest.raises(error, match=text):
            other.restore(tmp_path / name)
        assert before == ([s.tokens for s in other.scheduler.running], other.allocator.num_free)
        assert bits == [np.array(a).tobytes() for a in jax.tree.leaves(other.cache)]
        assert sum(e.token is not None for e in other.stream()) > 0
    with pytest.raises(KeyError, match="99"):
        engine.save(tmp_path / "none", requests=[99])
    assert not (tmp_path / "none").exists()


def test_requests_whose_pages_have_no_room_here_wait_and_compute_them_again(tmp_path):
    engine, many = make_engine(), prompts(3, seed=3, low=20, high=30)
    for prompt in many:
        engine.submit(prompt, SamplingParams(max_new_tokens=12))
    engine.step(), engine.step()
    engine.save(tmp_path / "s")
    other = make_engine(num_pages=12, max_sequence_tokens=44)
    other.submit([1, 2, 3], SamplingParams(max_new_tokens=5))
    ids = other.restore(tmp_path / "s")
    assert not other.scheduler.running and other.num_waiting == 4
    texts = {request: [] for request in ids.values()}
    for event in other.stream():
        texts.setdefault(event.request_id, []).append(event.token)
    assert [tuple(texts[ids[i]]) for i in range(3)] == [dense_greedy(p, 12) for p in many]


def test_a_fork_may_stop_at_a_token_that_it_began_with(tmp_path):
    engine = make_engine()
    first = engine.submit([5, 6, 7], SamplingParams(max_new_tokens=20))
    tokens = [e.token for _ in range(3) for e in engine.step()]
    stop = SamplingParams(max_new_tokens=20, stop_tokens=(tokens[0], tokens[-1]))
    engine.fork(first, stop)
    engine.save(tmp_path / "s")
    other = make_engine()
    other.restore(tmp_path / "s")
    assert list(map(key, other.stream())) == list(map(key, engine.stream()))


def test_requests_to_save_are_ids_and_no_bools(tmp_path, unchecked):
    engine = make_engine()
    for prompt in prompts(2):
        engine.submit(prompt, SAMPLED)
    for wrong in ([True], ["1"], [1.0]):
        with pytest.raises(TypeError, match="requests must be an integer"):
            engine.save(tmp_path / "saved", requests=wrong)
    assert not (tmp_path / "saved").exists()
    engine.save(tmp_path / "saved", requests=[np.int64(1)])
