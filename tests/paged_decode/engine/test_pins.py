"""Prefixes that keep their pages: whatever happens around them, they are found."""

from __future__ import annotations

import numpy as np
import pytest

from paged_decode import BlockAllocator, SamplingParams, SequenceTooLong, ShardedAllocator
from paged_decode.engine import EngineConfig
from paged_decode.engine.pins import new_pin

from ..tiny import PARAMS, dense_greedy, fail_decode, make_engine, make_params, preempt, prompts
from .test_engine_groups import WINDOWS, engine_of
from .test_promises import greedy

SYSTEM = prompts(1, seed=11, low=22, high=22)[0]  # five full pages of four, and two tokens
ASKED = prompts(6, seed=12, low=8, high=14)
FULL = 20


def hits(engine, salt=None) -> int:
    return engine.allocator.match_prefix([*SYSTEM, 1], cache_salt=salt)


def computed(engine, salt=None) -> int:
    """Pin, and step until there is nothing to do."""
    pin = engine.pin(SYSTEM, salt)
    assert list(engine.stream()) == [] and engine.idle
    assert hits(engine, salt) == FULL
    return pin


def whole(engine) -> None:
    """The engine answers as ever, and what its pins hold is found and no more is held."""
    done = engine.generate([[*SYSTEM, 3, 4], *ASKED], greedy(6))
    want = [dense_greedy(p, 6, engine.params) for p in ([*SYSTEM, 3, 4], *ASKED)]
    assert [c.tokens for c in done] == want
    assert hits(engine) == FULL and engine.allocator.num_used == engine.pinned_pages == 5
    engine.allocator.check_invariants()


def test_a_pin_is_computed_once_without_an_event_and_found_until_it_is_given_up():
    engine = make_engine()
    pin = computed(engine)
    assert engine.stats.prefill_tokens == FULL and engine.pinned_pages == 5
    assert not engine.scheduler.running and engine.num_waiting == 0
    whole(engine)
    assert engine.stats.prefix_hit_tokens >= FULL
    again = computed(engine)  # finds the pages, and shares them
    assert engine.pinned_pages == engine.gauges()["pages_pinned"] == 5 and again != pin
    engine.unpin(pin)
    assert hits(engine) == FULL and engine.pinned_pages == 5
    engine.unpin(again)
    assert engine.idle and engine.allocator.num_used == engine.pinned_pages == 0


def test_pins_survive_eviction_and_storms_of_preemption():
    engine = make_engine(22)
    computed(engine)
    for seed in range(3):
        many = prompts(5, seed=30 + seed, low=10, high=30)
        ids = [engine.submit(p, greedy(20)) for p in many]
        events = []
        for visit in range(300):
            events += engine.step()
            if visit % 2:
                preempt(engine)
            assert hits(engine) == FULL
            if engine.idle:
                break
        for request, prompt in zip(ids, many, strict=True):
            tokens = tuple(e.token for e in events if e.request_id == request)
            assert tokens == dense_greedy(prompt, 20)
    assert engine.stats.preemptions > 10
    whole(engine)


@pytest.mark.parametrize("visits", range(4))
def test_a_pin_is_given_up_in_every_state(visits):
    engine = make_engine(prefill_rows=1)
    first = engine.submit([*SYSTEM, 5], greedy(6))
    pin = engine.pin(SYSTEM)  # waits behind the request that computes its prefix
    events = []
    for _ in range(visits):
        events += engine.step()
    engine.unpin(pin)
    for call in (engine.unpin, engine.cancel):
        with pytest.raises(KeyError, match=f"{pin} is not in the engine"):
            call(pin)
    events += engine.stream()
    assert tuple(e.token for e in events) == dense_greedy([*SYSTEM, 5], 6)
    assert {e.request_id for e in events} == {first}
    assert engine.allocator.num_used == 0


def test_an_id_is_of_a_request_or_of_a_pin():
    engine = make_engine()
    pin, request = engine.pin(SYSTEM), engine.submit(ASKED[0], greedy(2))
    assert pin != request
    with pytest.raises(KeyError, match="request 0 is not"):
        engine.cancel(pin)
    with pytest.raises(KeyError, match="pin 1 is not"):
        engine.unpin(request)
    list(engine.stream())
    with pytest.raises(KeyError, match="request 0 is not decoding"):
        engine.fork(pin, greedy(2))
    engine.unpin(np.int64(pin))
    assert engine.allocator.num_used == 0


def test_new_weights_and_a_lost_cache_let_pins_be_computed_again():
    engine = make_engine()
    computed(engine)
    engine.params = make_params(seed=7)
    assert not engine.idle and hits(engine) == 0
    whole(engine)
    engine.params = PARAMS
    fail_decode(engine, {0}, RuntimeError("lost"), deleting=True)
    engine.submit(ASKED[0], greedy(4))
    with pytest.raises(RuntimeError, match="lost"):
        while True:
            engine.step()
    list(engine.stream())
    whole(engine)
    assert engine.stats.prefill_tokens >= 4 * FULL  # after each of the three


def test_an_interrupt_anywhere_keeps_the_pin():
    engine = make_engine(prefill_rows=1)
    engine.pin(SYSTEM)
    scheduler = engine.scheduler
    for part, name in ((scheduler._seats, "leave"), (scheduler, "_seat")):
        method = getattr(part, name)

        def torn(*args, method=method):
            method(*args)
            raise KeyboardInterrupt

        setattr(part, name, torn)
        with pytest.raises(KeyboardInterrupt):
            list(engine.stream())
        setattr(part, name, method)
        engine.loop.mend()
        assert engine.pinned_pages == 0 and len(scheduler.waiting) == 1
    list(engine.stream())
    whole(engine)


def test_a_pin_whose_pages_a_broken_row_shared_is_computed_again():
    engine = make_engine()
    computed(engine)
    broken = {name: a.copy() for name, a in PARAMS.items()}
    broken["head"][:] = np.nan
    engine.update_params(broken, keep_cached=True)
    (done,) = engine.generate([[*SYSTEM, 3, 4]], greedy(6))
    assert done.finish_reason == "invalid_logits"
    engine.update_params(PARAMS, keep_cached=True)
    list(engine.stream())
    whole(engine)


def test_what_does_not_fit_is_put_off_and_the_end_of_others_names_pins():
    engine = make_engine(12, max_sequence_tokens=44)
    held = computed(engine)  # five of eleven pages
    other = engine.pin(list(range(30)))
    assert list(engine.stream()) == [] and engine.idle and engine.pinned_pages == 5
    engine.submit(list(range(40)), greedy(3))
    (end,) = engine.stream()
    assert end.finish_reason == "capacity" and "5 by pins (unpin)" in end.detail
    (done,) = engine.generate([ASKED[2]], greedy(4))
    assert done.tokens == dense_greedy(ASKED[2], 4)
    engine.unpin(held)
    list(engine.stream())
    assert engine.idle and engine.pinned_pages == 7
    engine.unpin(other)
    assert engine.allocator.num_used == 0


def test_salts_keep_pins_apart():
    engine = make_engine()
    pin = computed(engine, "tenant")
    assert hits(engine) == 0 and hits(engine, "other") == 0
    engine.unpin(pin)


def test_over_windows_a_pin_is_found_as_prefixes_are():
    engine = engine_of()
    pin = computed(engine)
    full, windowed = engine.pinned_pages
    assert full == 5 and 0 < windowed <= 5
    before = engine.stats.prefix_hit_tokens
    done = engine.generate([[*SYSTEM, 3, 4], *ASKED], greedy(6))
    want = [dense_greedy(p, 6, windows=WINDOWS) for p in ([*SYSTEM, 3, 4], *ASKED)]
    assert [c.tokens for c in done] == want
    assert engine.stats.prefix_hit_tokens - before >= FULL
    engine.unpin(pin)
    assert engine.allocator.num_used == 0 and engine.pinned_pages == (0, 0)


def test_what_cannot_be_pinned_is_refused(unchecked):
    engine = make_engine(max_sequence_tokens=20)
    refusals = [
        (([1, 2, 3],), ValueError, "full pages of 4 tokens, got 3"),
        ((list(range(20)),), SequenceTooLong, "need 21 places, but a sequence can have 20"),
        (([],), ValueError, "prompt"),
        (([1] * 8, 3), TypeError, "cache_salt"),
    ]
    for args, error, text in refusals:
        with pytest.raises(error, match=text):
            engine.pin(*args)
    assert engine.idle and engine._calls.next_id == 0
    engine.pin(list(range(19)))
    with pytest.raises(ValueError, match="pin needs a prefix cache"):
        make_engine(prefix_cache=False).pin(SYSTEM)
    allocator = ShardedAllocator(64, 4, num_shards=2)
    with pytest.raises(NotImplementedError, match="pin: .* over a data axis"):
        new_pin(SYSTEM, None, allocator=allocator, config=EngineConfig(), limit=99)
    assert isinstance(BlockAllocator(8, 4).num_shards, int)


def test_what_comes_may_be_taken_in_by_another_thread_meanwhile():
    engine = make_engine()
    calls = engine._calls

    class Coming:
        pinned = False

        @property
        def request_id(self):  # looked at: the thread that steps has just taken one
            if len(calls._submitted) > 1:
                calls._submitted.popleft()
            return 5

    calls._submitted.extend([(Coming(), None)] * 3)
    calls.cancel(5)
    calls._submitted.clear()
    with pytest.raises(KeyError, match="request 7 is not"):
        calls.cancel(7)


# ---- snapshots


def test_pins_come_back_and_find_their_pages(tmp_path):
    engine = make_engine()
    pin = computed(engine, "s")
    engine.submit(ASKED[0], SamplingParams(max_new_tokens=8))
    engine.step()
    engine.save(tmp_path / "all")
    assert (tmp_path / "all").read_bytes()[8] == 4
    other = make_engine()
    other.submit(ASKED[1], greedy(2))
    ids = other.restore(tmp_path / "all")
    list(other.stream())
    assert other.pinned_pages == 5 and hits(other, "s") == FULL
    assert other.stats.prefill_tokens == len(ASKED[1]) - 1  # nothing of the file was computed again
    other.unpin(ids[pin])
    assert other.allocator.num_used == 0
    with pytest.raises(KeyError, match="requests .0. are not"):
        engine.save(tmp_path / "one", requests=[pin])
    engine.save(tmp_path / "one", requests=[1])
    assert (tmp_path / "one").read_bytes()[8] == 1
    alone = make_engine()
    alone.restore(tmp_path / "all", prefix_cache=False)
    list(alone.stream())
    assert hits(alone, "s") == FULL and alone.pinned_pages == 5
