"""Sequences that end because what they hold may be wrong: nobody finds their pages."""

from __future__ import annotations

from paged_decode.allocator import ShardedAllocator, StaleHandle

from .test_scenarios import S, computed, counts, make, pages, refuses


def end(allocator, handle) -> None:
    allocator.withdraw(handle)
    allocator.free(handle)


def test_withdrawn_pages_are_free_and_not_found():
    allocator = make()
    end(allocator, computed(allocator, range(9)))
    assert allocator.match_prefix(range(9)) == 0
    assert counts(allocator) == (8, 0, 0)


def test_without_it_they_stay_cached():
    allocator = make()
    allocator.free(computed(allocator, range(9)))
    assert allocator.match_prefix(range(9)) == 2 * S


def test_a_page_found_in_the_cache_is_withdrawn_like_any_other():
    allocator = make()
    allocator.free(computed(allocator, range(9)))
    end(allocator, allocator.allocate(range(9)))
    assert allocator.match_prefix(range(9)) == 0
    assert counts(allocator) == (8, 0, 0)


def test_another_owner_keeps_its_pages_and_publishes_them_with_the_next_one():
    allocator = make()
    stays = computed(allocator, range(9))
    held = pages(allocator, stays)
    (ends,) = allocator.fork(stays)
    end(allocator, ends)
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
    end(allocator, second)
    assert allocator.match_prefix(range(9)) == 2 * S
    end(allocator, first)
    assert counts(allocator) == (12, 0, 0)


def test_a_stale_handle_among_them_withdraws_nothing():
    allocator = make()
    handle = computed(allocator, range(9))
    refuses(allocator, StaleHandle, allocator.withdraw, [handle, 7 << 32])
    assert allocator.match_prefix(range(9)) == 2 * S


def test_who_lives_on_publishes_its_pages_again_with_the_next_one():
    allocator = make()
    handle = computed(allocator, range(9))
    allocator.withdraw(handle)
    assert allocator.match_prefix(range(9)) == 0
    assert counts(allocator) == (5, 0, 3)
    allocator.append([handle], [[9, 10, 11]])
    allocator.commit([handle], 12)
    assert allocator.match_prefix(range(13)) == 3 * S


def test_a_shard_withdraws_too():
    allocator = ShardedAllocator(16, S, num_shards=2)
    handle = allocator.allocate(range(9))
    allocator.commit(handle, 9)
    end(allocator, handle)
    assert allocator.match_prefix(range(9)) == 0
    allocator.check_invariants()
