"""The arrays that go to the device."""

from __future__ import annotations

import numpy as np
import pytest

from paged_decode.allocator import OutOfPages, PageTableError

from .device import Device, contents, freeze, prefill
from .test_scenarios import S, computed, make, pages, refuses


def test_a_batch_is_the_page_table_view_of_its_rows():
    allocator = make()
    a, b = allocator.allocate(range(6)), allocator.allocate(range(3))
    batch = allocator.batch([b, a], [1, 3], [3, 6], tokens_per_row=4, pad_to=3, columns=3)
    (p,), (q, r) = pages(allocator, b), pages(allocator, a)
    assert batch.page_table.tolist() == [[p, 0, 0], [q, r, 0], [0, 0, 0]]
    assert batch.seq_lens.tolist() == [3, 6, 0]
    assert batch.positions.tolist() == [[0, 0, 1, 2], [2, 3, 4, 5], [0, 0, 0, 0]]
    slots = [[0, 0, p * S + 1, p * S + 2], [0, q * S + 3, r * S, r * S + 1], [0, 0, 0, 0]]
    assert batch.slots.tolist() == slots
    for array in (batch.page_table, batch.seq_lens, batch.positions, batch.slots):
        assert array.dtype == np.int32 and array.flags.c_contiguous and array.flags.owndata


def test_advance_is_append_and_then_batch():
    for seed in range(10):
        rng = np.random.default_rng(seed)
        one, two = make(64), make(64)
        for allocator in (one, two):
            rng = np.random.default_rng(seed)
            handles = [allocator.allocate(rng.integers(0, 9, n)) for n in rng.integers(1, 12, 5)]
            handles += allocator.fork(handles[0], 2)
        tokens = rng.integers(0, 9, len(handles))
        batch, copies = one.advance(handles, tokens, pad_to=8, columns=6)
        expected_copies = two.append(handles, tokens[:, None])
        lengths = [two.sequence(h).length for h in handles]
        expected = two.batch(handles, np.array(lengths) - 1, lengths, pad_to=8, columns=6)
        for name in ("page_table", "seq_lens", "positions", "slots"):
            assert np.array_equal(getattr(batch, name), getattr(expected, name)), name
        assert np.array_equal(copies.src, expected_copies.src)
        assert np.array_equal(copies.dst, expected_copies.dst)
        assert freeze(one) == freeze(two)


def test_the_arrays_are_the_callers_own():
    allocator = make()
    handle = allocator.allocate(range(5))
    for _ in range(4):
        batch, _ = allocator.advance([handle], [1], columns=8)
        expected = allocator.sequence(handle).pages
        for array in (batch.page_table, batch.seq_lens, batch.positions, batch.slots):
            array[:] = -7
        assert allocator.sequence(handle).pages == expected
        allocator.check_invariants()


@pytest.mark.parametrize("held, columns", [(1, 1), (2, 2), (3, 4), (5, 8)])
def test_the_default_width_is_a_power_of_two(held, columns):
    allocator = make()
    handle = allocator.allocate(range(held * S))
    assert allocator.batch([handle], 0, 1).page_table.shape == (1, columns)


def test_the_table_shows_reserved_pages_as_far_as_it_is_wide():
    allocator = make()
    handle = allocator.allocate(range(S))
    allocator.reserve([handle], 2 * S)
    assert allocator.batch([handle], 0, 1).page_table.tolist() == [[1, 2, 3, 0]]
    assert allocator.batch([handle], 0, 1, columns=1).page_table.tolist() == [[1]]


def test_one_handle_takes_arguments_without_the_batch_axis():
    allocator = make()
    handle = allocator.allocate([1])
    allocator.append(handle, [2, 3])
    batch, _ = allocator.advance(handle, 4)
    assert batch.seq_lens.tolist() == [4]
    allocator.commit(handle, 4)
    assert allocator.tokens(handle).tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("kind", [list, tuple, np.array])
def test_handles_come_as_any_sequence_of_integers(kind):
    allocator = make()
    handles = kind([allocator.allocate([1]) for _ in range(3)])
    allocator.advance(handles, kind([1, 2, 3]))
    allocator.free(handles)
    assert allocator.num_used == 0


def test_no_rows_are_a_batch_of_padding():
    allocator = make()
    before = freeze(allocator)
    batch, copies = allocator.advance([], [], pad_to=2, columns=3)
    assert batch.page_table.tolist() == [[0, 0, 0]] * 2 and batch.seq_lens.tolist() == [0, 0]
    assert len(copies.src) == 0 == allocator.trim([])
    allocator.append([], np.zeros((0, 3), int))
    allocator.reserve([], 5)
    allocator.commit([], [])
    allocator.batch([], [], [])
    allocator.free([])
    assert freeze(allocator) == before


def test_a_reservation_makes_later_appends_free():
    allocator = make()
    handles = [allocator.allocate(range(6)) for _ in range(2)]
    handles += allocator.fork(handles[0])
    copies = allocator.reserve(handles, [4, 0, 6])
    assert len(copies.src) == 1  # the child's tail; the parent writes in place
    used = allocator.num_used
    assert used == 2 + 1 + 2 + 3 - 1  # full page shared
    assert [allocator.sequence(h).length for h in handles] == [6, 6, 6]
    copies = allocator.append(handles, np.ones((3, 6), int), [4, 0, 6])
    assert len(copies.src) == 0 and allocator.num_used == used


def test_reserving_again_counts_what_is_reserved():
    allocator = make()
    handle = allocator.allocate(range(5))
    for count, used in [(3, 2), (4, 3), (2, 3), (0, 3), (8, 4)]:
        allocator.reserve([handle], count)
        assert allocator.num_used == used
    assert allocator.trim([handle]) == 2 and allocator.trim([handle]) == 0


def test_a_fork_ends_the_exclusive_tail_of_a_reservation():
    allocator = make()
    parent = allocator.allocate(range(6))
    allocator.reserve([parent], 2)
    (child,) = allocator.fork(parent)
    error = refuses(allocator, PageTableError, allocator.batch, [parent], 6, 7)
    assert "reserve" in str(error)
    copies = allocator.reserve([parent, child], 2)
    assert len(copies.src) == 1
    allocator.batch([parent, child], 6, 8, tokens_per_row=2)


def test_a_batch_past_the_length_on_a_published_page_is_refused():
    allocator = make()
    long = computed(allocator, range(2 * S))
    (short,) = allocator.fork(long)
    allocator.truncate(short, S + 1)
    allocator.free(long)
    refuses(allocator, PageTableError, allocator.batch, [short], S + 1, S + 2)
    allocator.reserve([short], 1)
    allocator.batch([short], S + 1, S + 2)


def test_two_rows_never_write_one_slot():
    allocator = make()
    device = Device(allocator)
    parent = allocator.allocate(range(6))
    (child,) = allocator.fork(parent)
    call = allocator.batch
    error = refuses(allocator, PageTableError, call, [parent, child], 0, 6, tokens_per_row=6)
    assert "would both write slot" in str(error)
    prefill(allocator, device, parent)  # compute one, commit both
    allocator.commit([child], 6)
    assert device.read(allocator, child) == contents(list(range(6)), None)


def test_out_of_pages_in_the_middle_of_a_mixed_call_changes_nothing():
    allocator = make(6)
    parent = computed(allocator, range(6))
    family = [parent, *allocator.fork(parent, 2)]
    lonely = allocator.allocate(range(S))
    tail = allocator.allocate_pages(2)
    assert allocator.num_free == 1
    error = refuses(allocator, OutOfPages, allocator.advance, [*family, lonely], [1, 2, 3, 4])
    assert (error.needed, error.free) == (3, 1)
    allocator.free_pages(tail)
    _, copies = allocator.advance([*family, lonely], [1, 2, 3, 4])
    assert len(copies.src) == 2 and allocator.num_free == 0


def test_copies_never_read_a_page_that_the_same_call_writes():
    allocator = make(40)
    roots = [allocator.allocate(range(n)) for n in (5, 6, 7)]
    family = [*roots, *(child for root in roots for child in allocator.fork(root, 3))]
    _, copies = allocator.advance(family, range(len(family)))
    assert not set(copies.src.tolist()) & set(copies.dst.tolist())
    assert len(set(copies.dst.tolist())) == len(copies.dst) == 9


def test_states_and_statistics_tell_what_the_pages_do():
    allocator = make()
    allocator.free(computed(allocator, range(S)))
    a = computed(allocator, range(50, 56))
    allocator.fork(a)
    (pin,) = allocator.allocate_pages(1)
    states = allocator.page_states()
    assert states.dtype == np.uint8 and len(states) == allocator.num_pages
    assert np.bincount(states, minlength=5).tolist() == [4, 1, 1, 2, 1]
    stats = allocator.stats()
    assert (stats.free, stats.evictable, stats.used) == (4, 1, 3)
    assert (stats.shared, stats.raw, stats.published) == (2, 1, 2)
    assert (stats.sequences, stats.tokens, stats.stored_tokens) == (2, 12, 6)
    assert stats.tail_waste == 1 - 6 / 8 and stats.peak_used == 3
    allocator.allocate([*range(S), 9])
    stats = allocator.stats()
    assert (stats.prefix_query_tokens, stats.prefix_hit_tokens) == (S + 6 + S + 1, S)
    assert allocator.ref_count(pin) == 1 and allocator.ref_count(0) == 0
    assert (
        repr(allocator) == "BlockAllocator(8 usable pages of 4 tokens: 5 used, 0 evictable, 3 free)"
    )
