"""Absurd sizes, failing policies and forged state: refused by name, and nothing has changed."""

from __future__ import annotations

import pytest

from paged_decode.allocator import BlockAllocator, CorruptState

from .device import freeze

pytestmark = pytest.mark.usefixtures("unchecked")


def refused(allocator, errors, call):
    before = freeze(allocator)
    with pytest.raises(errors):
        call()
    assert freeze(allocator) == before
    allocator.check_invariants()


@pytest.mark.parametrize(
    "size", [{"pad_to": 10**12}, {"columns": 10**14}, {"pad_to": 10**30}, {"columns": 10**30}]
)
def test_advance_with_an_absurd_frame_changes_nothing(size):
    """The arrays are made before any sequence grows."""
    a = BlockAllocator(9, 4)
    h = a.allocate([1, 2, 3])
    refused(a, (ValueError, MemoryError), lambda: a.advance([h], [4], **size))


@pytest.mark.parametrize(
    "size", [{"pad_to": 10**30}, {"columns": 10**30}, {"tokens_per_row": 10**30}]
)
def test_batch_with_an_absurd_frame_is_a_value_error(size):
    a = BlockAllocator(9, 4)
    h = a.allocate([1, 2, 3])
    refused(a, ValueError, lambda: a.batch([h], 0, 1, **size))


def test_invariants_notice_that_a_cached_page_holds_other_tokens_than_its_digest_says():
    a = BlockAllocator(9, 2)
    h = a.allocate([1, 2, 3, 4])
    a.commit(h, 4)
    a.free(h)
    a._pool.tokens[1, 0] += 1
    with pytest.raises(CorruptState):
        a.check_invariants()


def test_a_colliding_first_page_is_replaced_and_adopts_no_children():
    """The digest here is the last token // 10: 1 and 2 collide, 13 does not."""
    a = BlockAllocator(9, 1, digest=lambda key, payload: bytes([payload[-4] // 10]))
    first, second = a.allocate([1, 50]), a.allocate([2, 13, 50])
    a.commit(first, 1)
    a.commit(second, 2)
    assert a.match_prefix([1, 13, 50]) == 0
    assert a.match_prefix([2, 13, 50]) == 2
    a.check_invariants()


def test_fork_refuses_an_absurd_number_before_it_grows_anything():
    allocator = BlockAllocator(9, 2)
    handle = allocator.allocate([1])
    refused(allocator, ValueError, lambda: allocator.fork(handle, 2**31))
