"""`check_invariants` finds every kind of damage: one fault put in by hand per rule."""

from __future__ import annotations

import numpy as np
import pytest

from paged_decode.allocator import BlockAllocator, CorruptState
from paged_decode.allocator.prefix import CacheEntry

from .test_scenarios import computed, make


def busy() -> BlockAllocator:
    """Free, cached, owned, shared, raw and reserved pages at once, and a vacant row."""
    allocator = make(16)
    allocator.free(computed(allocator, range(8)))  # pages 1, 2 are cached
    a = computed(allocator, range(50, 56))  # 3, 4
    allocator.fork(a)
    b = allocator.allocate(range(60, 65))  # 5, 6
    allocator.reserve([b], 8)  # 7, 8
    allocator.allocate_pages(1)  # 9
    allocator.free(allocator.allocate([1]))
    allocator.check_invariants()
    return allocator


def damage(name: str):
    def register(function):
        DAMAGE[name] = function
        return function

    return register


DAMAGE: dict[str, object] = {}


@damage("are not the 16 usable ones")
def lost_page(a):
    a._pool.num_free -= 1


@damage("num_free is 17, outside 0..16")
def free_overflow(a):
    a._pool.num_free = 17


@damage("duplicates")
def twice_free(a):
    a._pool._free[0] = a._pool._free[1]


@damage("the null page or an id outside the pool")
def null_free(a):
    a._pool._free[0] = 0


@damage("both free and evictable")
def free_and_evictable(a):
    a._pool._free[0] = 1


@damage("have owners")
def free_and_owned(a):
    a._pool._free[0] = 3


@damage("free pages [1")
def free_and_published(a):
    a._pool._free[0] = 1


@damage("points outside the pool")
def wild_table(a):
    a._books.main.table.ids[0, 0] = 99


@damage("ref count 3 but 2 owners")
def high_count(a):
    a._pool.refs[3] = 3


@damage("ref count 1 but 2 owners")
def low_count(a):
    a._pool.refs[3] = 1


@damage("ref count -1 but 0 owners")
def negative_count(a):
    a._pool.refs[1] = -1


@damage("the null page is not raw")
def null_not_raw(a):
    a._pool.refs[0], a._pool.raw[0] = 0, False


@damage("raw pages [9] have more owners")
def raw_and_shared(a):
    a._pool.refs[9] = 2


@damage("is impossible")
def peak_forgotten(a):
    a._pool.peak_used = 0


@damage("name different pages")
def flag_lost(a):
    a._cache.published[1] = False


@damage("by page and the entries by digest differ")
def index_lost(a):
    a._cache.index.popitem()


@damage("not found by its digest")
def wrong_digest(a):
    entry = a._cache.by_page[1]
    a._cache.by_page[1] = CacheEntry(2, entry.digest, entry.parent, entry.serial)


@damage("one serial number")
def serial_twice(a):
    one, two = a._cache.by_page[1], a._cache.by_page[2]
    twin = CacheEntry(2, two.digest, two.parent, one.serial)
    a._cache.by_page[2] = a._cache.index[two.digest] = twin


@damage("a raw page is published")
def raw_and_published(a):
    a._cache.add(9, b"d", 1)


@damage("the evictable pages are not")
def evictable_lost(a):
    a._cache.eviction.remove(1)


@damage("not computed 9 <= length 6")
def too_much_computed(a):
    a._rows.computed[a._rows.live[0]] = 9


@damage("<= 2 pages")
def too_long(a):
    a._rows.length[a._rows.live[0]] = 9


@damage("leave no spare column")
def no_spare(a):
    a._books.main.table.end[a._rows.live[0]] = a._books.main.table.ids.shape[1]


@damage("a page twice, or the null page")
def hole(a):
    a._books.main.table.ids[a._rows.live[0], 0] = 0


@damage("is not 0 behind its pages")
def stale_tail(a):
    a._books.main.table.ids[a._rows.live[0], 5] = 3


@damage("a reserved page is shared or published")
def reserved_published(a):
    a._cache.add(7, b"d", 1)


@damage("holds a negative token")
def negative_token(a):
    a._pool.tokens[5, 0] = -1


@damage("1 entries for 0 full pages")
def long_chain(a):
    a._rows.computed[a._rows.live[0]] = 0


@damage("but holds other tokens")
def wrong_entry(a):
    row = a._rows.live[0]
    a._rows.chains[row][0] = a._cache.by_page[1]


@damage("a row is vacant twice")
def vacant_twice(a):
    a._rows.vacant.append(a._rows.vacant[0])


@damage("neither live nor vacant")
def row_lost(a):
    a._rows.vacant.pop()


@damage("a vacant row still holds pages")
def vacant_with_pages(a):
    a._books.main.table.end[a._rows.vacant[-1]] = 1


@damage("a vacant row still holds cache entries")
def vacant_with_chain(a):
    a._rows.chains[a._rows.vacant[-1]].append(a._cache.by_page[1])


@pytest.mark.parametrize("message", DAMAGE)
def test_damage_is_found_and_named(message):
    allocator = busy()
    DAMAGE[message](allocator)
    with pytest.raises(CorruptState) as caught:
        allocator.check_invariants()
    assert message in str(caught.value)
    assert caught.value.violations and all(isinstance(v, str) for v in caught.value.violations)


def test_one_error_lists_every_violation():
    allocator = busy()
    allocator._pool.refs[3] += 1
    allocator._pool.refs[4] += 1
    allocator._books.main.table.ids[allocator._rows.live[0], 7] = 3
    with pytest.raises(CorruptState) as caught:
        allocator.check_invariants()
    assert len(caught.value.violations) == 3


def test_a_check_changes_nothing():
    allocator = busy()
    before = np.array(allocator._pool.free_pages), allocator.stats()
    allocator.check_invariants()
    assert np.array_equal(before[0], allocator._pool.free_pages) and before[1] == allocator.stats()
