"""The eviction that learns how soon pages of each kind are used again."""

import numpy as np
import pytest

from paged_decode import BlockAllocator
from paged_decode.allocator import CachedPage
from paged_decode.policies import ReuseAware
from paged_decode.pressure import Belady, Request, hit_rate, prefix_tree


def classes(seed=0, count=400):
    """Of four prompts one is of 15 that come again and again, marked; the others come once."""
    rng = np.random.default_rng(seed)
    requests = []
    for number in range(count):
        again = rng.random() < 0.25
        first = 4 * int(rng.integers(15)) if again else 1000 + 4 * number
        blocks = tuple(range(first, first + 4))
        requests.append(Request(float(number), blocks, 4, 16, 1, priority=int(again)))
    return requests


def test_where_classes_differ_it_finds_most_of_what_can_be_found(unchecked):
    requests = classes()
    lru, best = hit_rate(requests, 50), hit_rate(requests, 50, Belady())
    marked = hit_rate(requests, 50, ReuseAware(lambda page: page.priority))
    assert lru < 0.3 * best
    assert 0.65 * best < marked <= best
    assert 2 * lru < hit_rate(requests, 50, ReuseAware()) < marked


def test_with_one_kind_it_is_as_good_as_lru(unchecked):
    requests = prefix_tree(200, 1.0, seed=2)
    alike = hit_rate(requests, 100, ReuseAware(lambda page: 0))
    assert alike == pytest.approx(hit_rate(requests, 100), abs=0.02)


def test_until_it_has_learnt_something_it_is_lru():
    requests = prefix_tree(20, 1.0, seed=2)[:14]
    assert hit_rate(requests, 60, ReuseAware()) == hit_rate(requests, 60)


def test_what_is_never_used_again_goes_at_once():
    rank, keys = ReuseAware(lambda page: page.priority, remember=1000), {}
    for now in range(1, 4000, 2):
        for priority, digest in ((0, b"%d" % now), (1, b"again%d" % (now % 30))):
            page = CachedPage(9, 0, 1, now + priority, 1, priority=priority, digest=digest)
            keys[priority] = rank.rank(page)[0] - now - priority
    assert keys[0] == 0 < keys[1]


def test_no_page_goes_before_those_behind_it_that_left_with_it():
    rank, order = ReuseAware(lambda page: page.depth % 3), []

    class Noted:
        def rank(self, page):
            key = rank.rank(page)
            order.append((page.last_used, page.depth, key))
            return key

    hit_rate(prefix_tree(120, 1.0, seed=4), 60, Noted())
    chains = [(a, b) for a, b in zip(order, order[1:], strict=False) if b[1] == a[1] - 1]
    assert len(chains) > 1000
    assert all(parent[2] > child[2] for child, parent in chains)


def test_what_it_remembers_is_bounded():
    rank = ReuseAware(remember=100)
    hit_rate(prefix_tree(40, 1.0, seed=4), 50, rank)
    assert len(rank._seen) <= 101


@pytest.mark.parametrize("remember", [0, -1, 2**60])
def test_a_time_to_remember_that_is_none_is_refused(remember):
    with pytest.raises(ValueError, match="remember must be"):
        ReuseAware(remember=remember)


def test_a_pool_that_is_used_by_it_keeps_its_invariants():
    allocator = BlockAllocator(40, 2, hash_key=b"k", eviction=ReuseAware(remember=300))
    rng = np.random.default_rng(0)
    for _ in range(150):
        prompt = np.repeat(rng.integers(0, 4, rng.integers(1, 9)), 2)
        handle = allocator.allocate(prompt)
        allocator.commit(handle, len(prompt))
        allocator.free(handle)
    allocator.check_invariants()


def test_tails_of_other_groups_go_by_least_recent_use_and_teach_it_nothing():
    rank = ReuseAware()
    assert rank.rank(CachedPage(3, 7, 1, 40, 1, digest=b"a", group=1)) == (40, -7)
    assert not rank._seen and not rank._kinds
