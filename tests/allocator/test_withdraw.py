"""Sequences that end because what they hold may be wrong: nobody finds their pages."""

from __future__ import annotations

import pytest

from paged_decode.allocator import ShardedAllocator, StaleHandle

from .test_scenarios import S, computed, counts, make, pages, refuses


def test_withdrawn_pages_are_free_and_not_found():
    allocator = make()
    allocator.free(computed(allocator, range(9)), withdraw=True)
    assert allocator.match_prefix(range(9)) == 0
    assert counts(allocator) == (8, 0, 0)


def test_without_it_they_stay_cached():
    allocator = make()
    allocator.free(computed(allocator, range(9)))
    assert allocator.match_prefix(range(9)) == 2 * S


def test_a_page_found_in_the_cache_is_withdrawn_like_any_other():
    allocator = make()
    allocator.free(computed(allocator, range(9)))
    allocator.free([allocator.allocate(range(9))], withdraw=True)
    assert allocator.match_prefix(range(9)) == 0
    assert counts(allocator) == (8, 0, 0)


def test_another_owner_keeps_its_pages_and_publishes_them_with_the_next_one():
    allocator = make()
    stays = computed(allocator, range(9))
    held = pages(allocator, stays)
    (ends,) = allocator.fork(stays)
    allocator.free([ends], withdraw=True)
    assert pages(allocator, stays) == held
    assert allocator.match_prefix(range(9)) == 0
    counts(allocator)
    allocator.append([stays], [[9, 10, 11]])
    allocator.commit([stays], 12)
    assert allocator.match_prefix(range(13)) == 3 * S
    allocator.free(stays)
    assert counts(allocator) == (5, 3, 0)


def test_only_pages_that_the_sequence_holds_are_withdrawn():
    """The same tokens computed twice: the other one's pages are its own."""
    allocator = make(12)
    first, second = allocator.allocate(range(9)), allocator.allocate(range(9))
    allocator.commit([first, second], 9)
    allocator.free(second, withdraw=True)
    assert allocator.match_prefix(range(9)) == 2 * S
    allocator.free(first, withdraw=True)
    assert counts(allocator) == (12, 0, 0)


def test_a_stale_handle_among_them_withdraws_nothing():
    allocator = make()
    handle = computed(allocator, range(9))
    refuses(allocator, StaleHandle, allocator.free, [handle, 7 << 32], withdraw=True)
    assert allocator.match_prefix(range(9)) == 2 * S


@pytest.mark.parametrize("withdraw, found", [(True, 0), (False, 2 * S)])
def test_a_shard_withdraws_too(withdraw, found):
    allocator = ShardedAllocator(16, S, num_shards=2)
    handle = allocator.allocate(range(9))
    allocator.commit(handle, 9)
    allocator.free(handle, withdraw=withdraw)
    assert allocator.match_prefix(range(9)) == found
    allocator.check_invariants()
