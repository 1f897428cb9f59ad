"""Sequences that end because what they hold may be wrong: nobody finds their pages."""

from __future__ import annotations

from paged_decode.allocator import BlockAllocator, ShardedAllocator, StaleHandle

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


def moved(allocator, handles=None) -> BlockAllocator:
    """Another allocator with what that one exports."""
    state, where = allocator.export_state(handles)
    other = make()
    other.import_state(state, other.allocate_pages(len(where.pages)))
    other.check_invariants()
    return other


def test_export_and_import_do_not_undo_it():
    allocator = BlockAllocator(9, 2)
    handle = allocator.allocate([1, 2, 3])
    allocator.commit(handle, 3)
    allocator.withdraw(handle)
    state, where = allocator.export_state()
    assert state.computed.tolist() == [0]
    assert allocator.match_prefix([1, 2, 9]) == 0
    (copy,) = allocator.import_state(state, allocator.allocate_pages(len(where.pages)))
    assert allocator.match_prefix([1, 2, 9]) == 0
    assert allocator.tokens(copy).tolist() == [1, 2, 3]


def test_who_shares_withdrawn_pages_is_exported_without_them_too():
    allocator = make()
    stays = computed(allocator, range(9))
    end(allocator, *allocator.fork(stays))
    assert allocator.export_state()[0].computed.tolist() == [0]
    assert moved(allocator).match_prefix(range(9)) == 0
    allocator.append([stays], [[9, 10, 11]])
    allocator.commit([stays], 12)  # published again, as always
    assert allocator.export_state()[0].computed.tolist() == [12]


def test_an_equal_page_of_another_sequence_is_exported_as_it_is():
    allocator = make(12)
    first, second = allocator.allocate(range(9)), allocator.allocate(range(9))
    allocator.commit([first, second], 9)  # the pages of the first stand for both
    allocator.withdraw(first)
    state, _ = allocator.export_state([first, second])
    assert state.computed.tolist() == [0, 9]
    allocator.free(first)
    assert moved(allocator).match_prefix(range(9)) == 2 * S


def test_pages_that_are_taken_anew_are_withdrawn_no_more():
    allocator = make(3)
    end(allocator, computed(allocator, range(9)))
    computed(allocator, range(20, 29))
    assert allocator.export_state()[0].computed.tolist() == [9]
