"""Whose turn it is: priorities, places of arrival, and how long anybody can be overtaken."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paged_decode import BlockAllocator, EngineConfig, SamplingParams
from paged_decode.engine.queue import WaitingQueue
from paged_decode.engine.requests import MOST_PLACES, Sample
from paged_decode.policies import LowestPriority

from ..tiny import dense_greedy, make_engine, preempt, prompts
from .test_promises import greedy, host_engine

ASKED = prompts(6, seed=4, low=6, high=9)


def sample(number: int, priority: int = 0, index: int = 0, length: int = 4) -> Sample:
    tokens = [60 - number % 50] * length
    return Sample(number, index, length, tokens, SamplingParams(), None, priority=priority)


def numbers(queue) -> list[int]:
    return [s.request_id for s in queue]


def admitted(scheduler, loop) -> list[tuple[int, int]]:
    """Run to the end; who got pages, in that order."""
    seen = []
    scheduler.on_admitted = lambda s: seen.append((s.request_id, s.index))
    for _ in range(500):
        loop.visit()
        if scheduler.idle:
            return seen
    raise AssertionError("it does not end")


# ---- the queue alone


@given(
    ageing=st.integers(1, 6),
    turns=st.lists(st.tuples(st.integers(-3, 3), st.integers(0, 2)), max_size=60),
)
def test_nobody_is_overtaken_by_more_than_ageing_allows(ageing, turns):
    """Arrivals of any priority, each followed by so many admissions."""
    queue, gone, come = WaitingQueue(4, ageing), [], []
    for number, (priority, taken) in enumerate(turns):
        new = sample(number, priority)
        queue.welcome([new])
        queue.put(new)
        come.append(new)
        for _ in range(taken):
            if (head := queue.head) is not None:
                queue.take(head)
                gone.append(head)
    gone += list(queue)
    assert sorted(s.request_id for s in gone) == list(range(len(turns)))
    at = {s.request_id: i for i, s in enumerate(gone)}
    for one in come:
        for later in come[one.request_id + 1 :]:
            if at[later.request_id] < at[one.request_id]:
                distance = later.request_id - one.request_id
                assert distance < ageing * (later.priority - one.priority)


@given(
    priorities=st.lists(st.integers(-2, 2), min_size=2, max_size=30),
    out=st.lists(st.integers(0, 29), max_size=20),
)
def test_who_comes_back_waits_where_it_was(priorities, out):
    queue = WaitingQueue(4, 3)
    samples = [sample(i, p) for i, p in enumerate(priorities)]
    queue.welcome(samples)
    for each in samples:
        queue.put(each)
    before = numbers(queue)
    for number in out:
        each = samples[number % len(samples)]
        queue.take(each)
        queue.put(each)
    assert numbers(queue) == before
    for each in samples[::2]:
        queue.take(each)
        queue.take(each)  # waits no longer: nothing happens
    assert numbers(queue) == [n for n in before if n % 2]


def test_equal_priorities_are_served_in_order_of_arrival():
    for priority in (0, 5):
        queue = WaitingQueue(4, 2)
        for number in (3, 1, 2):
            new = sample(number, priority)
            queue.welcome([new])
            queue.put(new)
        assert numbers(queue) == [3, 1, 2]


def test_a_request_overtakes_until_it_is_as_far_behind_as_ageing_says():
    """64 places for each priority: number 63 is before the first one, number 64 is not."""
    queue = WaitingQueue(4, EngineConfig().priority_ageing)
    for number in range(66):
        new = sample(number, int(number in (63, 65)))
        queue.welcome([new])
        queue.put(new)
    assert numbers(queue)[:4] == [63, 0, 1, 65]


def test_those_of_another_engine_keep_their_places_behind_those_that_are_here():
    queue = WaitingQueue(4, 10)
    here, more = [sample(0), sample(1, 1)], [sample(2), sample(3, 1), sample(4, 2)]
    queue.welcome(here)
    for each, place in zip(more, (0, 5, 12), strict=True):
        each.place = place
    queue.welcome(more)
    assert [s.place for s in (*here, *more)] == [0, 1, 2, 7, 14]
    last = sample(5)
    queue.welcome([last])
    assert last.place == 15
    far = [sample(6), sample(7), sample(8)]
    far[0].place = MOST_PLACES  # no counter runs over: who came before whom is what is kept
    queue.welcome(far)
    assert [s.place for s in far] == [18, 16, 17]


@pytest.mark.parametrize("value", [0, -1])
def test_ageing_is_at_least_one(value):
    with pytest.raises(ValueError, match="priority_ageing must be"):
        EngineConfig(priority_ageing=value)


# ---- in a scheduler


def test_higher_priorities_are_admitted_first_with_their_siblings():
    scheduler, loop, _, _ = host_engine(BlockAllocator(64, 4, hash_key=b"test"), max_rows=1)
    for number, priority in enumerate((0, 2, 1, 2, -1)):
        new = sample(number, priority)
        if number == 3:
            new.siblings = [new.spawn(number, 1, new.sampling)]
        scheduler.add(new)
    order = [(1, 0), (3, 0), (3, 1), (2, 0), (0, 0), (4, 0)]
    assert admitted(scheduler, loop) == order


def test_a_sample_that_is_preempted_for_another_does_not_take_its_pages_again():
    """A low priority gives way again and again, and is let in last; the bound holds."""
    allocator = BlockAllocator(8, 4, hash_key=b"test")
    scheduler, loop, _, ends = host_engine(
        allocator, max_rows=3, decode_steps=4, max_preemptions=2, priority_ageing=1
    )
    scheduler.room._victim = LowestPriority()
    for number in range(12):
        new = sample(number, number % 3)
        new.sampling = greedy(12)
        new.bound(28)
        scheduler.add(new)
    seen = admitted(scheduler, loop)
    assert ends.of == dict.fromkeys(range(12), "length")
    assert scheduler.stats.preemptions > 0
    assert all(seen.count((number, 0)) <= 3 for number in range(12))
    assert allocator.num_used == 0


def test_after_a_reset_everybody_has_its_turn_as_before():
    scheduler, loop, _, _ = host_engine(BlockAllocator(64, 4, hash_key=b"test"), max_rows=2)
    for number in range(6):
        scheduler.add(sample(number, number % 3))
    waiting = numbers(scheduler.waiting)
    loop.visit()
    assert [s.request_id for s in scheduler.running] == waiting[:2] == [2, 5]
    loop.discard()
    assert numbers(scheduler.waiting) == waiting


def test_a_request_whose_entry_was_cut_off_has_its_place_in_the_end():
    scheduler, loop, _, _ = host_engine(BlockAllocator(64, 4, hash_key=b"test"))
    scheduler.add(sample(0))
    new, put = sample(1), scheduler.waiting.put
    scheduler.waiting.put = lambda s: (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        loop.change(lambda: scheduler.add(new))
    scheduler.waiting.put = put
    loop.change(lambda: scheduler.add(new))
    assert numbers(scheduler.waiting) == [0, 1]


# ---- in an engine


def test_order_changes_no_token_and_forks_and_samples_have_the_place_of_their_request():
    engine = make_engine(18, max_rows=2, row_buckets=(2,), policies=dict(victim=LowestPriority()))
    ids = [
        engine.submit(prompt, greedy(10), priority=at % 3, n=2 if at == 3 else 1)
        for at, prompt in enumerate(ASKED)
    ]
    events, visits = [], 0
    while not engine.idle:
        events += engine.step()
        visits += 1
        if visits % 3 == 0:
            preempt(engine)
    tokens: dict = {}
    for event in events:
        if event.token is not None:
            tokens.setdefault((event.request_id, event.sample), []).append(event.token)
    assert len(tokens) == 7
    for (request, _), found in tokens.items():
        assert tuple(found) == dense_greedy(ASKED[ids.index(request)], 10)
    assert engine.allocator.num_used == 0


def test_a_fork_without_room_waits_at_the_place_of_its_parent():
    engine = make_engine()
    parent = engine.submit(ASKED[0], greedy(12), priority=3)
    while not engine.step():
        pass
    engine.submit(ASKED[1], greedy(12))
    (sample,) = engine.scheduler.living[parent]
    child = engine.fork(parent, greedy(20))
    (other,) = engine.scheduler.living[child]
    assert (other.place, other.priority) == (sample.place, 3) == (0, 3)
    preempt(engine)
    assert engine.scheduler.waiting.head is other


@pytest.mark.parametrize("value", [2**31, -(2**31) - 1])
def test_a_priority_that_no_file_holds_is_refused(value):
    engine = make_engine()
    with pytest.raises(ValueError, match="priority must be from -2147483648 to 2147483647"):
        engine.submit([1], priority=value)
    assert engine.submit([1], priority=np.int32(-(2**31))) == 0
