"""Groups of layers that see a window: which pages they hold, give back, and still need."""

from __future__ import annotations

from collections import Counter
from itertools import product

import numpy as np
import pytest

from paged_decode.allocator import (
    BlockAllocator,
    CacheLayout,
    OutOfPages,
    PageSpec,
    PageTableError,
    SequenceTooLong,
    ShardedAllocator,
    StaleHandle,
)
from paged_decode.allocator.windows import first_column, most_pages

from .programs import Program, layout
from .test_interrupts import interrupted


def compute(allocator, handle, end: int, chunk: int) -> None:
    """As a prefill does: pages for a chunk, its program, commit, and the next."""
    done = allocator.sequence(handle).computed
    while done < end:
        done = min(done + chunk, end)
        allocator.prepare([handle], done)
        allocator.batch([handle], allocator.sequence(handle).computed, done, tokens_per_row=chunk)
        allocator.commit([handle], done)
        allocator.check_invariants()


VECTORS = [  # window, page size, computed, prepared; first, end, held, most, shortest truncation
    (1, 4, 3, 1, 0, 1, 1, 1, 0),
    (1, 4, 4, 1, 1, 2, 1, 1, 4),
    (1, 4, 7, 1, 1, 2, 1, 1, 4),
    (4, 4, 6, 1, 0, 2, 2, 2, 0),
    (4, 4, 7, 1, 1, 2, 1, 2, 7),
    (5, 4, 7, 1, 0, 2, 2, 2, 0),
    (5, 4, 8, 1, 1, 3, 2, 2, 8),
    (6, 4, 8, 1, 0, 3, 3, 3, 0),
    (6, 4, 9, 1, 1, 3, 2, 3, 9),
    (64, 4, 20, 1, 0, 6, 6, 17, 0),
    (3, 4, 13, 5, 2, 5, 3, 3, 10),
    (8, 4, 24, 16, 4, 10, 6, 7, 23),
    (512, 16, 526, 1, 0, 33, 33, 33, 0),
    (512, 16, 527, 1, 1, 33, 32, 33, 527),
    (512, 16, 2048, 16, 96, 129, 33, 34, 2047),
    (512, 16, 2048, 128, 96, 136, 40, 41, 2047),
    (512, 16, 2048, 512, 96, 160, 64, 65, 2047),
    (128, 64, 1000, 16, 13, 16, 3, 4, 959),
    (1, 1, 5, 1, 5, 6, 1, 1, 5),
    (2, 1, 5, 1, 4, 6, 2, 2, 5),
]


@pytest.mark.parametrize("vector", VECTORS, ids=str)
def test_a_window_holds_what_the_next_query_sees_and_what_is_prepared(vector):
    window, size, computed, ahead, first, end, held, most, shortest = vector
    allocator = BlockAllocator(layout(window, size))
    handle = allocator.allocate(range(computed), chunk=ahead)
    compute(allocator, handle, computed, ahead)
    allocator.reserve([handle], ahead)
    found = allocator.sequence(handle).groups[1]
    assert (found.first, found.first + len(found.pages), len(found.pages)) == (first, end, held)
    assert held <= most_pages(window, ahead, size) == most
    assert allocator.stats(1).peak_used <= most
    if shortest:
        with pytest.raises(PageTableError, match=f"cut to {shortest} tokens or more"):
            allocator.truncate([handle], shortest - 1)
    allocator.truncate([handle], shortest)
    allocator.check_invariants()
    assert allocator.sequence(handle).length == shortest


def test_the_bound_is_the_most_that_is_ever_held():
    for window, size, ahead in product(range(1, 14), (1, 2, 4, 8), range(12)):
        computed = np.arange(4 * (window + size + ahead))
        first = first_column(computed, window, size)
        held = -(-(computed + ahead) // size) - first
        assert held.max() == most_pages(window, ahead, size), (window, size, ahead)


def test_a_long_prompt_lives_off_the_pages_that_it_has_passed():
    size, window, chunk = 4, 8, 12
    allocator = BlockAllocator(layout(window, size, pages=1 + most_pages(window, chunk, size)))
    handle = allocator.allocate(range(400), chunk=chunk)
    compute(allocator, handle, 400, chunk)
    assert allocator.stats(1).peak_used <= most_pages(window, chunk, size)
    with pytest.raises(SequenceTooLong, match="in group 1, .* for a window of 8 tokens"):
        allocator.allocate(range(1, 401))
    with pytest.raises(OutOfPages) as caught:
        allocator.allocate(range(1, 401), chunk=20)
    assert caught.value.group == 1


def test_a_sequence_is_forked_when_its_window_has_pages_for_all_of_it():
    allocator = BlockAllocator(layout(6, 4))
    handle = allocator.allocate(range(20), chunk=4)
    with pytest.raises(PageTableError, match="compute it, then fork"):
        allocator.fork(handle)
    compute(allocator, handle, 19, 4)
    allocator.prepare([handle], 20)
    twin = allocator.fork(handle)[0]
    assert allocator.sequence(twin).groups == allocator.sequence(handle).groups
    _, copies = allocator.advance([handle, twin], [7, 8])
    assert [len(each.src) for each in copies] == [0, 0]  # position 20 begins a page
    allocator.check_invariants()


def test_a_shared_page_is_copied_for_new_tokens_that_are_computed_later():
    allocator = BlockAllocator(layout(18, 4))
    parent = allocator.allocate(range(9))
    (child,) = allocator.fork(parent)
    allocator.truncate([child], 1)
    copies = allocator.append([child], [[7, 8, 9]], chunk=1)  # a page up to where it is computed
    assert [len(each.src) for each in copies] == [1, 1]
    held = [allocator.sequence(handle).groups[1].pages for handle in (parent, child)]
    assert not set(held[0]) & set(held[1])


def test_what_has_no_pages_yet_is_neither_described_nor_committed():
    allocator = BlockAllocator(layout(6, 4))
    handle = allocator.allocate(range(20), chunk=8)
    for call in (
        lambda: allocator.commit([handle], 9),
        lambda: allocator.batch([handle], 0, 9, tokens_per_row=9),
    ):
        with pytest.raises(ValueError, match="prepare first"):
            call()
    allocator.append([handle], [[1, 2]], chunk=3)
    allocator.commit([handle], 8)
    with pytest.raises(ValueError, match="has them for 8 in group 1"):
        allocator.commit([handle], 22)
    allocator.check_invariants()


def test_a_second_group_that_sees_all_has_pages_for_all_tokens():
    one = dict(num_kv_heads=1, head_dim=8)
    groups = (PageSpec((0,), num_pages=40, **one), PageSpec((1,), num_pages=12, **one))
    allocator = BlockAllocator(CacheLayout(4, (*groups, PageSpec((2,), 1, 8, 30, window=6))))
    handle = allocator.allocate(range(21), chunk=4)
    assert [len(held.pages) for held in allocator.sequence(handle).groups] == [6, 6, 1]
    compute(allocator, handle, 21, 4)
    allocator.advance([handle, *allocator.fork(handle)], [1, 2])
    assert [allocator.stats(group).used for group in range(3)] == [7, 7, 3]
    with pytest.raises(SequenceTooLong, match="in group 1, whose pool has 11: create a larger"):
        allocator.append([handle], [list(range(40))], chunk=4)
    with pytest.raises(OutOfPages) as caught:
        allocator.allocate(range(1, 21), chunk=4)
    assert caught.value.group == 1
    allocator.check_invariants()


def test_groups_that_differ_in_what_they_are_made_of_are_refused():
    one = PageSpec(layers=(0,), num_kv_heads=1, head_dim=8, num_pages=9)
    window = PageSpec(layers=(0,), num_kv_heads=1, head_dim=8, num_pages=9, window=4)
    for groups, word in (
        ((), "first group"),
        ((window,), "first group"),
        ((one, one), "each once"),
        ((one, PageSpec((2,), 1, 8, 9)), "each once"),
    ):
        with pytest.raises(ValueError, match=word):
            CacheLayout(4, groups)
    with pytest.raises(ValueError, match="power of two"):
        CacheLayout(3, (one,))
    with pytest.raises(ValueError, match="window must be at least 1"):
        PageSpec((0,), 1, 8, 9, window=0)
    with pytest.raises(TypeError, match="page_size is part of the layout"):
        BlockAllocator(CacheLayout(4, (one,)), 4)


# ---- calls that are cut off


def crowded(shards: int):
    """Sequences at all stages of a window of 6 tokens: passed, shared, prepared, not computed."""
    sizes = layout(6, 4, pages=24 * shards, full=48 * shards)
    allocator = ShardedAllocator(sizes, num_shards=shards) if shards > 1 else BlockAllocator(sizes)
    one = allocator.allocate(range(30), chunk=8)
    compute(allocator, one, 30, 8)
    (two,) = allocator.fork(one)
    three = allocator.allocate(range(20), chunk=8)
    allocator.reserve([two], 3)
    return allocator, (one, two, three)


CALLS = {
    "allocate": lambda a, h: a.allocate(range(17), chunk=5),
    "append": lambda a, h: a.append([h[0], h[2]], [[1, 2, 3], [4, 5, 6]], chunk=8),
    "advance": lambda a, h: a.advance(h[:2], [1, 2], commit=True),
    "prepare": lambda a, h: a.prepare([h[1], h[2]], [40, 16]),
    "commit": lambda a, h: a.commit([h[2]], 8),
    "fork": lambda a, h: a.fork(h[0], 2),
    "truncate": lambda a, h: a.truncate(h[:2], 29),
    "trim": lambda a, h: a.trim(h[1]),
    "free": lambda a, h: a.free(h[:2]),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("shards", [1, 2])
def test_a_call_that_is_cut_off_anywhere_leaves_both_groups_consistent(name, shards):
    at, torn = 0, True
    while torn:
        allocator, handles = crowded(shards)
        torn = interrupted(lambda a=allocator, h=handles: CALLS[name](a, h), at)
        at += 5 * shards
        allocator.check_invariants()
        for handle in allocator.handles:
            info, text = allocator.sequence(handle), allocator.tokens(handle).tolist()
            assert len(text) == info.length and info.groups[1].first * 4 <= max(
                0, info.computed - 5
            )
        allocator.free(list(allocator.handles))
        assert allocator.stats(0).used == allocator.stats(1).used == 0
    assert at > 30


@pytest.mark.long
def test_what_a_copy_brought_is_the_window_s_at_once_or_the_sequence_begins_anew():
    at, torn = 0, True
    while torn:
        allocator = BlockAllocator(layout(6, 4))
        handle = allocator.allocate(range(30), chunk=8)
        compute(allocator, handle, 9, 8)

        def copied(allocator=allocator, handle=handle):
            before = allocator.sequence(handle).groups
            _, pages = allocator.prepare_copy(handle, 27)
            assert len(pages) == 2 and allocator.sequence(handle).groups == before
            assert allocator.commit_copy(handle) == 27
            assert allocator.sequence(handle).groups[1] == (5, tuple(pages))

        torn = interrupted(copied, at)
        at += 2
        allocator.check_invariants()
        info = allocator.sequence(handle)
        assert info.computed in ((0, 9, 27) if torn else (27,)) and len(info.groups[0].pages) == 8
        allocator.free(handle)
        assert allocator.stats(0).used == allocator.stats(1).used == 0
    assert at > 30


def test_a_copy_into_groups_that_see_all_needs_no_pages_aside_and_is_committed_alike():
    allocator = BlockAllocator(9, 4)
    handle = allocator.allocate(range(9))
    assert allocator.prepare_copy(handle, 8) == ([],) and allocator.num_used == 3
    assert allocator.commit_copy(handle) == 8
    allocator.check_invariants()
    allocator.free(handle)
    assert allocator.match_prefix(range(9)) == 8


def test_the_prefix_cache_is_reset_when_no_page_of_any_group_has_an_owner():
    allocator = BlockAllocator(layout(6, 4))
    pages = allocator.allocate_pages(1, group=1)
    assert not allocator.reset_prefix_cache()
    allocator.free_pages(pages, group=1)
    assert allocator.reset_prefix_cache()


def test_pages_held_aside_for_a_copy_go_back_with_the_copy_or_the_sequence():
    allocator = BlockAllocator(layout(6, 4, pages=5))
    handle = allocator.allocate(range(30), chunk=4)
    for end in (27, 30, 27):
        allocator.prepare_copy(handle, end)
        allocator.check_invariants()
        assert allocator.stats(1).used == 3
    for end in (-1, 31):
        with pytest.raises(ValueError, match="computed must be"):
            allocator.prepare_copy(handle, end)
    for drop in (allocator.cancel_copy, lambda h: allocator.truncate([h], 0), allocator.free):
        other = allocator.allocate(range(9), chunk=4) if drop != allocator.free else handle
        allocator.cancel_copy(handle)
        allocator.prepare_copy(other, 9)
        drop(other)
        with pytest.raises((ValueError, StaleHandle)):
            allocator.commit_copy(other)
        allocator.check_invariants()
        assert allocator.stats(1).used <= 2
        if other != handle:
            allocator.free(other)
    assert allocator.stats(0).used == allocator.stats(1).used == 0


# ---- random programs, with the device's memory beside


def test_random_programs_over_two_groups_see_their_own_tokens():
    total: Counter[str] = Counter()
    for seed in range(8):
        total += Program(seed, shards=1 + seed % 2, prefix_cache=False).run(150)
    assert min(total["refused"], total["passed"]) > 30 and total["hits"] == 0


@pytest.mark.long
@pytest.mark.parametrize("first", [100, 150, 200, 250])
def test_random_programs_of_100_000_calls(first):
    for seed in range(first, first + 50):
        Program(seed, shards=1 + seed % 2, prefix_cache=seed % 3 > 0).run(500)
