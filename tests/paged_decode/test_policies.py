"""Eviction ranks and victims."""

from types import SimpleNamespace

import numpy as np
import pytest

from paged_decode import BlockAllocator, CacheLayout, PageSpec, SamplingParams
from paged_decode.allocator.eviction import EvictionQueue
from paged_decode.policies import (
    FIFO,
    LFU,
    SLRU,
    CostAware,
    LastAdmitted,
    LeastComputed,
    MostPages,
)

from .tiny import dense_greedy, make_engine, prompts


class ByLastUse:
    def rank(self, page):
        return (page.last_used,)


def use(queue, page):
    queue.remove(page)
    queue.add(queue.plan([page]))


def filled(rank, pages=(3, 5, 7)):
    queue = EvictionQueue(rank)
    for depth, page in enumerate(pages):
        queue.publish(page, depth)
        queue.add(queue.plan([page]))
    return queue


def drained(queue, count=3):
    return [queue.pop() for _ in range(count)]


@pytest.mark.parametrize(
    "rank, order",
    [
        (FIFO(), [3, 5, 7]),
        (ByLastUse(), [7, 5, 3]),
        (LFU(), [7, 5, 3]),
        (SLRU(), [7, 5, 3]),
        (SLRU(protect=3), [7, 5, 3]),
        (CostAware(lambda depth: (6.0, 1.0, 9.0)[depth]), [5, 7, 3]),  # 3 * 6, 2 * 1, 1 * 9
        (CostAware(), [7, 3, 5]),  # 3 * 1, 2 * 2, 1 * 3
    ],
)
def test_each_rank_evicts_in_the_order_computed_by_hand(rank, order):
    queue = filled(rank)
    for page in (5, 3, 3):  # uses: page 3 three, page 5 two, page 7 one
        use(queue, page)
    assert (queue.order(), len(queue)) == (order, 3)
    assert drained(queue) == order


def test_a_rank_equal_to_lru_gives_the_page_ids_of_lru():
    allocators = [
        BlockAllocator(20, 2, hash_key=b"k"),
        BlockAllocator(20, 2, hash_key=b"k", eviction=ByLastUse()),
    ]
    rng = np.random.default_rng(0)
    for _ in range(700):
        prompt = np.repeat(rng.integers(0, 4, rng.integers(1, 9)), 2)
        seen = []
        for allocator in allocators:
            handle = allocator.allocate(prompt)
            seen.append(allocator.sequence(handle))
            allocator.commit(handle, len(prompt))
            allocator.free(handle)
        assert seen[0] == seen[1]
    assert allocators[1].stats().evictions > 100
    allocators[1].check_invariants()


def test_a_page_that_left_the_cache_starts_anew():
    queue = filled(LFU())
    use(queue, 3)
    queue.remove(3)
    queue.forget([3])
    queue.publish(3, 0)
    queue.add(queue.plan([3]))
    assert drained(queue) == [5, 7, 3]


def test_the_heap_stays_small_however_often_pages_are_used():
    queue = filled(LFU())
    for _ in range(10_000):
        use(queue, 3)
    assert len(queue._heap) <= 2 * 3 + 65


@pytest.mark.parametrize(
    "policy, place", [(LastAdmitted(), 3), (LeastComputed(), 2), (MostPages(), 1)]
)
def test_victims_are_those_of_the_rule_and_never_the_oldest(policy, place):
    running = [SimpleNamespace(computed=n) for n in (99, 8, 2, 5)]
    assert policy.choose(running) is running[place]
    running[0].computed = 0
    assert policy.choose(running) is running[place]


@pytest.mark.parametrize("victim", [LastAdmitted(), LeastComputed(), MostPages()])
def test_every_victim_policy_leaves_the_greedy_tokens_as_they_are(victim):
    engine = make_engine(num_pages=14)
    engine._victim = victim
    asked = prompts(6, seed=3, low=8, high=14)
    done = engine.generate(asked, SamplingParams(max_new_tokens=20))
    assert engine.stats.preemptions > 0
    assert [c.tokens for c in done] == [dense_greedy(p, 20) for p in asked]
    engine.allocator.check_invariants()
    assert engine.allocator.num_used == 0


def test_a_rank_sees_the_digest_of_what_a_page_holds_in_every_group_and_after_an_import():
    class Noted:
        def rank(self, page):
            asked.append(page)
            return page.last_used

    asked: list = []
    groups = (PageSpec((0,), 1, 4, 20), PageSpec((1,), 1, 4, 20, window=4))
    first, second = (
        BlockAllocator(CacheLayout(2, groups), hash_key=b"k", eviction=Noted()) for _ in range(2)
    )
    handle = first.allocate([1, 2, 3, 4, 5, 6, 7])
    first.commit(handle, 6)
    first.free(handle)
    digests = first.page_digests([1, 2, 3, 4, 5, 6, 7])
    wanted = [(2, digests[2]), (1, digests[1]), (0, digests[0]), (2, digests[2])]
    assert [(page.depth, page.digest) for page in asked] == wanted
    assert [page.group for page in asked] == [0, 0, 0, 1]
    state, _ = first.export_state()
    counts = [state.num_pages, *(group.num_pages for group in state.groups)]
    pages = [second.allocate_pages(count, group=i) for i, count in enumerate(counts)]
    asked.clear()
    second.import_state(state, pages)
    assert [(page.depth, page.digest) for page in asked] == wanted
    assert [page.group for page in asked] == [0, 0, 0, 1]
    assert first.eviction is not second.eviction
    assert isinstance(first.eviction, Noted)


def test_a_restored_cache_is_evicted_in_the_order_of_the_saved_one():
    def filled_allocator():
        allocator = BlockAllocator(20, 2, hash_key=b"k", eviction=LFU())
        return allocator

    old = filled_allocator()
    for start, times in ((0, 3), (10, 1), (20, 2)):
        for _ in range(times):
            handle = old.allocate([start, start + 1, start + 2, start + 3, start + 4])
            old.commit(handle, 4)
            old.free(handle)
    state, where = old.export_state()
    new = filled_allocator()
    pages = new.allocate_pages(state.num_pages)
    new.import_state(state, pages)
    new.check_invariants()
    moved = dict(zip(where.pages.tolist(), pages, strict=True))
    depths = [new._cache.eviction.known[page].depth for page in pages]
    assert sorted(depths) == [0, 0, 0, 1, 1, 1]
    assert [moved[p] for p in old._cache.eviction.order()] == new._cache.eviction.order()
