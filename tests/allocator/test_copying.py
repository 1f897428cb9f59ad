"""A copy of an allocator is another allocator in the same state."""

from __future__ import annotations

import copy
import pickle  # noqa: TID251 (to see it refused)

import pytest

from paged_decode import BlockAllocator, PromptKey, ShardedAllocator
from paged_decode.policies import LFU, LRU

from .device import freeze
from .programs import Program


class Counted:
    """A rank of the user's, with a state of its own."""

    def __init__(self):
        self.asked = 0

    def rank(self, page):
        self.asked += 1
        return -page.depth, self.asked


KINDS = {
    "plain": lambda: {},
    "without a prefix cache": lambda: dict(prefix_cache=False),
    "a rank": lambda: dict(eviction=LFU()),
    "a rank with a state": lambda: dict(eviction=Counted()),
    "digests that collide": lambda: dict(digest=lambda key, payload: b""),
    "shards": lambda: dict(shards=2),
    "shards, a rank with a state": lambda: dict(shards=2, eviction=Counted()),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_calls_on_a_copy_give_the_same_and_leave_the_original_alone(kind):
    program = Program(2, **KINDS[kind]())  # over two groups of layers, one with a window
    program.go(20)
    twin, before = copy.deepcopy(program), program.state()
    assert twin.state() == before
    twin.go(20)
    assert program.state() == before and twin.state() != before
    program.check()
    program.go(20)
    assert program.state() == twin.state()


def make(kind: str) -> BlockAllocator | ShardedAllocator:
    if kind == "sharded":
        return ShardedAllocator(32, 4, num_shards=2, hash_key=b"k")
    return BlockAllocator(17, 4, hash_key=b"k", eviction={"ranked": LFU(), "lru": LRU()}[kind])


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy])
@pytest.mark.parametrize("kind", ["lru", "ranked", "sharded"])
def test_handles_pages_and_prefixes_of_the_original_are_good_in_a_copy(kind, how):
    allocator = make(kind)
    handle, raw = allocator.allocate(range(10), cache_salt="a"), allocator.allocate_pages(1)
    allocator.commit(handle, 10)
    allocator.fork(handle)
    key = PromptKey(range(10), cache_salt="a")
    twin, before = how(allocator), freeze(allocator)
    assert type(twin) is type(allocator) and freeze(twin) == before
    assert twin.match_prefix(key) == allocator.match_prefix(key) == 8
    assert twin.sequence(handle) == allocator.sequence(handle)

    twin.free(list(twin.handles))
    twin.free_pages(raw)
    twin.reset_prefix_cache()
    twin.check_invariants()
    assert freeze(allocator) == before
    assert twin.num_used == 0 and allocator.match_prefix(key) == 8
    allocator.check_invariants()


def test_rows_that_are_added_to_a_copy_show_in_every_column_of_it():
    twin = copy.deepcopy(BlockAllocator(64, 2))
    handles = [twin.allocate([i, i]) for i in range(20)]  # more than the table had rows
    twin.commit(handles, 2)
    assert [twin.sequence(handle).computed for handle in handles] == [2] * 20
    twin.check_invariants()


def test_what_is_copied_together_stays_together():
    allocator = ShardedAllocator(16, 4, num_shards=2)
    twin, view = copy.deepcopy((allocator, allocator.shards[0]))
    twin.allocate([1, 2, 3])
    assert view.num_used == 1 and allocator.num_used == 0
    assert view._guard is twin._guard


def test_an_allocator_says_that_it_is_not_pickled():
    for allocator in (make("lru"), make("sharded")):
        with pytest.raises(TypeError, match="cannot be pickled.*export_state.*copy.deepcopy"):
            pickle.dumps(allocator)
