"""Black-box scenarios of block allocators; the number of each is in its docstring."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from paged_decode.allocator import (
    BlockAllocator,
    OutOfPages,
    PageTableError,
    SequenceTooLong,
    StaleHandle,
)

from .device import Device, contents, freeze, prefill

S = 4


def make(usable: int = 8, page_size: int = S, **options) -> BlockAllocator:
    return BlockAllocator(usable + 1, page_size, hash_key=b"test", **options)


def computed(allocator: BlockAllocator, tokens, **options) -> int:
    """A sequence whose tokens are all committed."""
    handle = allocator.allocate(tokens, **options)
    allocator.commit([handle], len(tokens))
    return handle


def counts(allocator: BlockAllocator) -> tuple[int, int, int]:
    allocator.check_invariants()
    return allocator.num_free, allocator.num_evictable, allocator.num_used


def pages(allocator: BlockAllocator, handle: int) -> list[int]:
    return list(allocator.sequence(handle).pages)


def refuses(allocator: BlockAllocator, error: type[Exception], call, *args, **kwargs) -> Exception:
    """The call raises and nothing has changed."""
    before = freeze(allocator)
    with pytest.raises(error) as caught:
        call(*args, **kwargs)
    assert freeze(allocator) == before
    allocator.check_invariants()
    return caught.value


class TestPagesAndCounts:
    def test_a_fresh_pool_is_free_and_never_hands_out_the_null_page(self):
        allocator = make(5)
        assert counts(allocator) == (5, 0, 0)
        assert sorted(allocator.allocate_pages(5)) == [1, 2, 3, 4, 5]

    def test_raw_pages_are_distinct_and_have_one_owner(self):
        allocator = make(5)
        got = allocator.allocate_pages(3)
        assert len(set(got)) == 3 and 0 not in got
        assert [allocator.ref_count(page) for page in got] == [1, 1, 1]
        assert counts(allocator) == (2, 0, 3)

    def test_more_pages_than_free_and_evictable_change_nothing(self):
        allocator = make(4)
        allocator.free(computed(allocator, range(8)))
        assert counts(allocator) == (2, 2, 0)
        error = refuses(allocator, OutOfPages, allocator.allocate_pages, 5)
        assert (error.needed, error.free, error.evictable) == (5, 2, 2)

    def test_no_pages_are_an_empty_list(self):
        allocator = make(4)
        before = freeze(allocator)
        assert allocator.allocate_pages(0) == []
        allocator.free_pages([])
        assert freeze(allocator) == before

    @pytest.mark.parametrize("bad, error", [(-1, ValueError), (1.0, TypeError), (True, TypeError)])
    def test_a_number_of_pages_is_a_non_negative_int(self, unchecked, bad, error):
        allocator = make(4)
        assert "k must be" in str(refuses(allocator, error, allocator.allocate_pages, bad))

    @pytest.mark.parametrize("tokens", range(1, 4 * S + 1))
    @pytest.mark.parametrize("page_size", [1, 2, 4])
    def test_a_sequence_takes_the_pages_of_its_tokens(self, tokens, page_size):
        allocator = make(32, page_size)
        handle = allocator.allocate(range(tokens))
        assert len(pages(allocator, handle)) == -(-tokens // page_size)
        assert allocator.num_used == -(-tokens // page_size)

    def test_a_full_last_page_takes_one_more_only_for_the_next_token(self):
        allocator = make()
        handle = allocator.allocate(range(2 * S))
        assert allocator.num_used == 2
        allocator.append([handle], [[9]])
        assert allocator.num_used == 3

    def test_append_takes_a_page_per_boundary_crossed(self):
        allocator = make()
        handle = allocator.allocate([1])
        for count, used in [(2, 1), (1, 1), (1, 2), (3 + 2 * S, 4), (1, 5)]:
            allocator.append([handle], np.full((1, count), 7))
            assert counts(allocator) == (8 - used, 0, used)

    @pytest.mark.parametrize("call", ["append", "advance", "reserve"])
    def test_a_batch_whose_last_row_does_not_fit_changes_no_row(self, call):
        allocator = make(4)
        handles = [allocator.allocate(range(S)) for _ in range(3)]
        arguments = dict(append=np.ones((3, 1), int), advance=[1, 1, 1], reserve=1)[call]
        error = refuses(allocator, OutOfPages, getattr(allocator, call), handles, arguments)
        assert (error.needed, error.free, error.evictable) == (3, 1, 0)
        allocator.advance(handles[:1], [1])

    def test_all_pages_come_back_and_can_be_taken_again(self):
        allocator = make(8, prefix_cache=False)
        for _ in range(3):
            handles = [allocator.allocate(range(2 * S)) for _ in range(4)]
            assert counts(allocator) == (0, 0, 8)
            allocator.free(handles)
            assert counts(allocator) == (8, 0, 0)

    def test_a_sequence_is_freed_once(self):
        allocator = make()
        handle = allocator.allocate([1, 2])
        allocator.free(handle)
        refuses(allocator, StaleHandle, allocator.free, handle)

    def test_a_page_or_sequence_listed_twice_is_refused(self):
        allocator = make()
        first, second = allocator.allocate_pages(2)
        handle = allocator.allocate([1])
        refuses(allocator, ValueError, allocator.free_pages, [first, second, first])
        refuses(allocator, ValueError, allocator.free, [handle, handle])
        assert counts(allocator) == (5, 0, 3)

    def test_the_null_page_in_a_list_to_free_is_padding(self):
        allocator = make()
        got = allocator.allocate_pages(2)
        allocator.free_pages([0, *got, 0])
        assert counts(allocator) == (8, 0, 0)
        assert 0 not in allocator.allocate_pages(8)

    @pytest.mark.parametrize(
        "page, error", [(-1, ValueError), (9, ValueError), (2**40, ValueError), (3, PageTableError)]
    )
    def test_an_unknown_page_is_not_freed(self, page, error):
        allocator = make()
        first, *_ = allocator.allocate_pages(2)
        refuses(allocator, error, allocator.free_pages, [first, page])

    def test_a_page_of_a_sequence_is_not_freed_by_number(self):
        allocator = make()
        handle = allocator.allocate(range(9))
        refuses(allocator, PageTableError, allocator.free_pages, pages(allocator, handle)[:1])

    def test_a_raw_page_is_freed_once(self):
        allocator = make()
        got = allocator.allocate_pages(2)
        allocator.free_pages(got)
        refuses(allocator, PageTableError, allocator.free_pages, got)

    def test_the_free_counter_is_the_length_of_the_free_list_after_every_call(self):
        allocator, rng = make(12), np.random.default_rng(0)
        live: list[int] = []
        for _ in range(200):
            if live and rng.random() < 0.5:
                allocator.free(live.pop(rng.integers(len(live))))
            else:
                try:
                    live.append(computed(allocator, rng.integers(0, 2, rng.integers(1, 13))))
                except OutOfPages:
                    continue
            free = allocator._pool.free_pages.tolist()
            assert len(free) == len(set(free)) == allocator.num_free
            allocator.check_invariants()


class TestForks:
    def test_a_fork_at_a_page_boundary_shares_everything_and_takes_nothing(self):
        allocator = make()
        parent = allocator.allocate(range(2 * S))
        (child,) = allocator.fork(parent)
        assert pages(allocator, child) == pages(allocator, parent)
        assert [allocator.ref_count(page) for page in pages(allocator, parent)] == [2, 2]
        _, copies = allocator.advance([parent, child], [1, 2])
        assert len(copies.src) == 0
        assert counts(allocator) == (4, 0, 4)

    def test_a_fork_inside_a_page_shares_it_until_either_side_writes(self):
        allocator = make()
        parent = allocator.allocate(range(6))
        (child,) = allocator.fork(parent)
        assert counts(allocator) == (6, 0, 2)
        full, tail = pages(allocator, parent)
        _, copies = allocator.advance([child], [1])
        assert copies.src.tolist() == [tail]
        assert pages(allocator, parent) == [full, tail]
        assert pages(allocator, child) == [full, *copies.dst.tolist()]
        assert [allocator.ref_count(page) for page in (full, tail, *copies.dst)] == [2, 1, 1]
        _, copies = allocator.advance([parent], [2])  # the last owner: in place
        assert len(copies.src) == 0

    @pytest.mark.parametrize("writer", [0, 1])
    def test_what_one_fork_writes_the_other_never_reads(self, writer):
        allocator = make()
        device = Device(allocator)
        parent = allocator.allocate(range(6))
        prefill(allocator, device, parent)
        (child,) = allocator.fork(parent)
        pair = [parent, child]
        tokens = {parent: list(range(6)), child: list(range(6))}
        for turn in [writer, 1 - writer, writer, 1 - writer]:
            handle, token = pair[turn], 100 + turn
            batch, copies = allocator.advance([handle], [token])
            device.copy(copies)
            device.step(batch, [[token]], [None])
            tokens[handle].append(token)
            allocator.commit([handle], len(tokens[handle]))
            for each in pair:
                assert device.read(allocator, each) == contents(tokens[each], None)

    def test_a_fork_without_free_pages_succeeds_and_fails_later_without_a_leak(self):
        allocator = make(2)
        parent = allocator.allocate(range(6))
        (child,) = allocator.fork(parent)
        error = refuses(allocator, OutOfPages, allocator.advance, [child], [1])
        assert error.needed == 1
        allocator.free(parent)
        _, copies = allocator.advance([child], [1])
        assert len(copies.src) == 0
        allocator.free(child)
        assert counts(allocator) == (2, 0, 0)

    def test_the_only_owner_writes_in_place(self):
        allocator = make()
        parent = allocator.allocate(range(6))
        (child,) = allocator.fork(parent)
        held = pages(allocator, parent)
        allocator.free(parent)
        _, copies = allocator.advance([child], [1])
        assert len(copies.src) == 0 and pages(allocator, child) == held

    @pytest.mark.parametrize("first", [0, 1])
    def test_shared_pages_live_until_their_last_owner(self, first):
        allocator = make(prefix_cache=False)
        pair = [parent := allocator.allocate(range(6)), *allocator.fork(parent)]
        allocator.free(pair[first])
        assert counts(allocator) == (6, 0, 2)
        allocator.free(pair[1 - first])
        assert counts(allocator) == (8, 0, 0)

    @pytest.mark.parametrize("seed", range(5))
    def test_a_tree_of_forks_is_conserved_in_any_order_of_freeing(self, seed):
        allocator, rng = make(64), np.random.default_rng(seed)
        family = [allocator.allocate(range(6))]
        for _ in range(6):
            family += allocator.fork(int(rng.choice(family)), int(rng.integers(0, 4)))
            grown = [int(h) for h in rng.permutation(family)[:2]]
            allocator.advance(grown, rng.integers(0, 9, len(grown)))
            allocator.check_invariants()
        for handle in rng.permutation(family).tolist():
            allocator.free(handle)
            allocator.check_invariants()
        assert allocator.num_used == 0

    @pytest.mark.parametrize("writers, copied", [(1, 1), (2, 2), (3, 3), (4, 3)])
    def test_of_four_owners_writing_in_one_call_all_copy_but_the_last_owner(self, writers, copied):
        allocator = make(16)
        parent = allocator.allocate(range(6))
        family = [parent, *allocator.fork(parent, 3)]
        batch, copies = allocator.advance(family[:writers], range(writers))
        assert len(copies.src) == copied == allocator.stats().copies
        assert len(set(batch.slots.ravel().tolist())) == writers
        assert counts(allocator) == (14 - copied, 0, 2 + copied)

    def test_exactly_enough_pages_for_the_copies_are_enough(self):
        allocator = make(4)
        family = [parent := allocator.allocate(range(6)), *allocator.fork(parent, 2)]
        allocator.advance(family, [1, 2, 3])
        assert counts(allocator) == (0, 0, 4)

    def test_a_row_may_need_a_copy_and_new_pages_at_once(self):
        allocator = make(5)
        parent = allocator.allocate(range(6))
        (child,) = allocator.fork(parent)
        error = refuses(allocator, OutOfPages, allocator.append, [child], [[1] * 11])
        assert (error.needed, error.free) == (4, 3)
        copies = allocator.append([child], [[1] * 10])
        assert len(copies.src) == 1 and counts(allocator) == (0, 0, 5)
        assert allocator.tokens(child).tolist() == [*range(6), *[1] * 10]
        assert allocator.tokens(parent).tolist() == list(range(6))

    def test_reserved_pages_stay_with_the_parent(self):
        allocator = make()
        parent = allocator.allocate(range(6))
        allocator.reserve([parent], 6)
        (child,) = allocator.fork(parent)
        assert len(pages(allocator, parent)) == 3 and len(pages(allocator, child)) == 2
        assert allocator.trim([parent, child]) == 1
        allocator.free([parent, child])
        assert counts(allocator) == (8, 0, 0)

    def test_fork_inherits_salt_and_what_is_computed(self):
        allocator = make()
        parent = allocator.allocate(range(6), cache_salt="a")
        allocator.commit([parent], 5)
        (child,) = allocator.fork(parent)
        assert allocator.sequence(child) == allocator.sequence(parent)
        assert allocator.fork(parent, 0) == []


class TestPrefixCache:
    def test_a_shared_prefix_hits_exactly_its_full_pages(self):
        allocator = make()
        first = computed(allocator, [*range(3 * S), 50])
        second = allocator.allocate([*range(3 * S), 60, 61])
        info = allocator.sequence(second)
        assert info.cached == info.computed == 3 * S
        assert pages(allocator, second)[:3] == pages(allocator, first)[:3]
        assert [allocator.ref_count(page) for page in info.pages] == [2, 2, 2, 1]
        assert counts(allocator) == (3, 0, 5)

    def test_a_partial_page_is_not_published(self):
        allocator = make()
        computed(allocator, range(S + 3))
        assert allocator.match_prefix(range(S + 3)) == S
        assert allocator.match_prefix([*range(S + 3), 9, 9]) == S
        assert allocator.stats().published == 1

    @pytest.mark.parametrize("tokens, hit", [(1, 0), (S, 0), (S + 1, S), (2 * S, S), (9, 2 * S)])
    def test_at_least_one_token_is_left_to_compute(self, tokens, hit):
        allocator = make()
        computed(allocator, range(12))
        assert allocator.match_prefix(range(tokens)) == hit
        handle = allocator.allocate(range(tokens))
        assert allocator.sequence(handle).cached == hit < tokens

    def test_hits_on_cached_pages_revive_them_and_count_for_what_fits(self):
        allocator = make(4)
        allocator.free(computed(allocator, range(3 * S)))
        assert counts(allocator) == (1, 3, 0)
        handle = allocator.allocate([*range(2 * S), 9, *range(S)])  # 2 hits, 2 new
        assert allocator.sequence(handle).cached == 2 * S
        assert counts(allocator) == (0, 0, 4)

    def test_a_request_that_does_not_fit_beside_its_hits_leaves_them_untouched(self):
        allocator = make(4)
        computed(allocator, [7, 7])
        allocator.free(computed(allocator, range(2 * S)))
        assert counts(allocator) == (1, 2, 1)
        error = refuses(allocator, OutOfPages, allocator.allocate, range(4 * S))
        assert (error.needed, error.free, error.evictable) == (4, 1, 2)
        assert allocator.match_prefix(range(4 * S)) == 2 * S

    def test_unpublished_pages_go_first_then_the_least_recent_deep_before_shallow(self):
        allocator = make(5)
        old, new = computed(allocator, range(2 * S)), computed(allocator, range(50, 50 + 2 * S))
        old_pages, new_pages = pages(allocator, old), pages(allocator, new)
        allocator.free([old, new])
        assert counts(allocator) == (1, 4, 0)
        taken = [allocator.allocate_pages(1)[0] for _ in range(5)]
        assert taken[0] not in old_pages + new_pages
        assert taken[1:] == [*old_pages[::-1], *new_pages[::-1]]

    def test_a_hit_makes_a_page_recent(self):
        allocator = make(4)
        first, second = computed(allocator, range(S)), computed(allocator, range(50, 50 + S))
        (page,) = pages(allocator, first)
        allocator.free([first, second])
        allocator.free(allocator.allocate(range(S + 1)))  # hits the older one
        allocator.allocate_pages(3)
        assert allocator.match_prefix(range(S + 1)) == S
        assert allocator.allocate_pages(1) == [page]

    def test_a_page_is_not_evicted_for_the_request_that_hits_it(self):
        allocator = make(3)
        allocator.free(computed(allocator, range(S)))
        allocator.free(computed(allocator, range(50, 50 + 2 * S)))
        handle = allocator.allocate([*range(S), 9, 9, 9, 9, 9])  # the oldest cached page is a hit
        assert allocator.sequence(handle).cached == S
        assert len(set(pages(allocator, handle))) == 3
        assert counts(allocator) == (0, 0, 3)

    def test_a_reused_page_is_found_by_its_old_tokens_no_more(self):
        allocator = make(2)
        allocator.free(computed(allocator, range(2 * S)))
        handle = allocator.allocate([9] * (S + 1))
        assert allocator.match_prefix(range(2 * S)) == 0
        assert allocator.stats().published == 0
        allocator.commit([handle], S + 1)
        assert allocator.stats().published == 1

    def test_the_same_tokens_elsewhere_are_no_hit(self):
        allocator = make(16)
        a, b = list(range(S)), list(range(50, 50 + S))
        computed(allocator, a + b)
        assert allocator.match_prefix(b + [0]) == 0  # another position
        assert allocator.match_prefix(b + a + [0]) == 0  # another order
        computed(allocator, [9] * S)
        assert allocator.match_prefix([9] * S + b + [0]) == S  # another parent
        assert allocator.match_prefix(a + b + [0]) == 2 * S

    SALTS = [None, "", b"", "x", b"x", "None", b"\0", "\0", "sx", "bx"]

    @pytest.mark.parametrize("salt", SALTS, ids=repr)
    def test_only_an_equal_salt_hits(self, salt):
        allocator = make()
        computed(allocator, range(S + 1), cache_salt=salt)
        hits = {repr(s): allocator.match_prefix(range(S + 1), cache_salt=s) for s in self.SALTS}
        assert hits == {repr(s): S if s is salt else 0 for s in self.SALTS}

    def test_a_fingerprint_changes_every_digest(self):
        plain, tuned = make(), make(fingerprint=b"adapter")
        assert plain.page_digests(range(9)) != tuned.page_digests(range(9))
        assert make(fingerprint=b"ab").page_digests(range(4), cache_salt=b"") != make(
            fingerprint=b"a"
        ).page_digests(range(4), cache_salt=b"b")

    def test_two_sequences_may_compute_the_same_page(self):
        allocator = make()
        device = Device(allocator)
        pair = [allocator.allocate(range(2 * S + 1)) for _ in range(2)]
        for handle in pair:
            prefill(allocator, device, handle)
            allocator.check_invariants()
        assert allocator.stats().published == 2
        third = allocator.allocate(range(2 * S + 1))
        assert pages(allocator, third)[:2] == pages(allocator, pair[0])[:2]
        for handle in [*pair, third]:
            info = allocator.sequence(handle)
            assert device.read(allocator, handle) == contents(range(9), None)[: info.computed]
        allocator.free([*pair, third])
        assert allocator.num_used == 0

    def test_nothing_is_found_before_it_is_committed(self):
        allocator = make()
        first = allocator.allocate(range(2 * S + 1))
        assert allocator.match_prefix(range(2 * S + 1)) == 0
        allocator.commit([first], 2 * S - 1)
        assert allocator.match_prefix(range(2 * S + 1)) == S
        allocator.free(first)
        assert counts(allocator) == (7, 1, 0)  # what was not computed is not kept

    def test_tokens_appended_later_are_published_by_commit(self):
        allocator = make()
        handle = computed(allocator, [0])
        for token in range(1, 9):
            allocator.advance([handle], [token])
            assert allocator.match_prefix([*range(token + 1), 99]) == token // S * S
            allocator.commit([handle], [token + 1])
            assert allocator.match_prefix([*range(token + 1), 99]) == (token + 1) // S * S

    def test_colliding_digests_give_no_false_hit(self):
        allocator = make(16, digest=lambda key, payload: b"same")
        first = computed(allocator, [1] * S)
        assert allocator.match_prefix([1] * S + [0]) == S
        assert allocator.match_prefix([2] * S + [0]) == 0
        assert allocator.match_prefix([1] * S + [0], cache_salt="other") == 0
        assert allocator.match_prefix([1] * 2 * S + [0]) == S  # equal tokens, other position
        second = computed(allocator, [2] * S + [1] * S)  # the newest publication wins
        assert allocator.match_prefix([1] * S + [0]) == 0
        assert allocator.match_prefix([2] * S + [1] * S + [0]) == 0  # its parent is not findable
        allocator.check_invariants()
        allocator.free([first, second])
        assert counts(allocator) == (15, 1, 0)

    def test_reset_is_refused_while_a_page_has_an_owner(self):
        allocator = make()
        allocator.free(computed(allocator, range(9)))
        handle = allocator.allocate([1])
        before = freeze(allocator)
        assert allocator.reset_prefix_cache() is False and freeze(allocator) == before
        allocator.free(handle)
        assert allocator.reset_prefix_cache() is True
        assert counts(allocator) == (8, 0, 0) and allocator.match_prefix(range(9)) == 0
        (page,) = allocator.allocate_pages(1)
        assert allocator.reset_prefix_cache() is False
        allocator.free_pages([page])

    def test_a_cache_that_is_off_never_hits_and_never_digests_a_page(self):
        payloads = []

        def digest(key: bytes, payload: bytes) -> bytes:
            payloads.append(payload)
            return b""

        allocator = make(prefix_cache=False, digest=digest)
        assert allocator.prefix_cache is False
        handle = computed(allocator, range(9))
        allocator.advance([handle], [9])
        assert allocator.match_prefix(range(9)) == 0
        assert not [payload for payload in payloads if payload.startswith(b"p")]
        allocator.free(handle)
        assert counts(allocator) == (8, 0, 0)

    def test_a_hit_is_a_whole_number_of_pages(self):
        allocator = make()
        computed(allocator, range(12))
        for tokens in range(1, 12):
            assert allocator.match_prefix([*range(tokens), 99]) % S == 0

    def test_the_same_key_gives_the_same_digests_in_another_process(self):
        code = (
            "from paged_decode.allocator import BlockAllocator\n"
            "a = BlockAllocator(9, 4, hash_key=b'test')\n"
            "print([d.hex() for d in a.page_digests(range(9), cache_salt='é')])"
        )
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert out.stdout.strip() == repr(
            [d.hex() for d in make().page_digests(range(9), cache_salt="é")]
        )

    def test_without_a_key_digests_differ_between_allocators(self):
        first, second = BlockAllocator(9, 4), BlockAllocator(9, 4)
        assert first.page_digests(range(9)) != second.page_digests(range(9))

    @pytest.mark.parametrize("lost", [1, 2])
    def test_a_sequence_publishes_its_own_pages_where_its_twins_are_lost(self, lost):
        """Found pages are never unfindable because of who computed them first."""
        allocator = make(16)
        tokens = list(range(3 * S))
        first, second = allocator.allocate(tokens), allocator.allocate(tokens)
        allocator.commit([first], 2 * S)
        allocator.commit([second], 3 * S)  # its first two pages stay unpublished: first has twins
        allocator.truncate(first, lost * S - 1)  # one of the twins leaves the cache
        assert allocator.match_prefix([*tokens, 0]) == (lost - 1) * S
        (third,) = allocator.fork(second)
        for handle in (third, second):
            allocator.append([handle], [[70, 71, 72, 73]])
            allocator.commit([handle], 4 * S)
            assert allocator.match_prefix([*tokens, 70, 71, 72, 73, 0]) == 4 * S
            allocator.check_invariants()
        allocator.free([first, second, third])
        allocator.check_invariants()

    def test_a_fork_on_a_used_row_knows_which_of_its_entries_are_lost(self):
        """The row of the fork belonged to a sequence that had lost nothing."""
        allocator = make(16)
        tokens = list(range(2 * S))
        first, second = allocator.allocate(tokens), allocator.allocate(tokens)
        allocator.commit([first], S)
        allocator.commit([second], 2 * S)
        allocator.truncate(first, S - 1)
        allocator.free(computed(allocator, range(50, 50 + S)))
        (child,) = allocator.fork(second)
        allocator.append([child], [[70, 71, 72, 73]])
        allocator.commit([child], 3 * S)
        assert allocator.match_prefix([*tokens, 70, 71, 72, 73, 0]) == 3 * S

    def test_a_recomputed_parent_takes_the_place_of_the_stale_child(self):
        """The child's entry outlived its parent, and names a link that is gone."""
        allocator = make(8)
        long = computed(allocator, range(2 * S))
        (twin,) = allocator.fork(long)
        allocator.truncate(twin, S - 1)  # shares the first page, unfindable once it is alone
        allocator.free(long)
        allocator.advance([twin], [77])
        assert allocator.match_prefix([*range(2 * S), 0]) == 0
        again = computed(allocator, range(2 * S))
        assert allocator.match_prefix([*range(2 * S), 0]) == 2 * S
        allocator.check_invariants()
        allocator.free([twin, again])
        allocator.check_invariants()


class TestTruncation:
    def test_truncate_frees_whole_tail_pages(self):
        allocator = make()
        handle = allocator.allocate(range(3 * S))
        allocator.truncate(handle, S + 1)
        assert counts(allocator) == (6, 0, 2)
        allocator.truncate(handle, S)
        assert counts(allocator) == (7, 0, 1)
        assert allocator.tokens(handle).tolist() == list(range(S))

    def test_truncate_leaves_the_pages_of_others_alone(self):
        allocator = make()
        parent = computed(allocator, range(3 * S))
        (child,) = allocator.fork(parent)
        allocator.truncate(child, S + 1)
        assert [allocator.ref_count(page) for page in pages(allocator, parent)] == [2, 2, 1]
        assert allocator.match_prefix([*range(3 * S), 0]) == 3 * S
        _, copies = allocator.advance([child], [99])
        assert copies.src.tolist() == pages(allocator, parent)[1:2]
        assert allocator.tokens(parent).tolist() == list(range(3 * S))

    def test_a_page_that_becomes_partial_leaves_the_cache(self):
        allocator = make()
        handle = computed(allocator, range(2 * S))
        allocator.truncate(handle, S + 2)
        assert allocator.match_prefix([*range(2 * S), 0]) == S
        allocator.append([handle], [[90, 91]])
        allocator.commit([handle], 2 * S)
        assert allocator.match_prefix([*range(S + 2), 90, 91, 0]) == 2 * S
        assert allocator.match_prefix([*range(2 * S), 0]) == S

    def test_a_partial_page_kept_for_another_is_withdrawn_when_it_is_written(self):
        allocator = make()
        long = computed(allocator, range(2 * S))
        (short,) = allocator.fork(long)
        allocator.truncate(short, S + 2)
        allocator.free(long)
        assert allocator.match_prefix([*range(2 * S), 0]) == 2 * S  # still whole
        _, copies = allocator.advance([short], [90])
        assert len(copies.src) == 0
        assert allocator.match_prefix([*range(2 * S), 0]) == S

    def test_truncate_lowers_what_is_computed(self):
        allocator = make()
        handle = computed(allocator, range(9))
        allocator.truncate(handle, 5)
        assert allocator.sequence(handle).computed == 5
        allocator.append([handle], [[1, 1, 1]])
        assert allocator.sequence(handle).computed == 5
        allocator.check_invariants()

    def test_truncate_gives_reserved_pages_back(self):
        allocator = make()
        handle = allocator.allocate(range(5))
        allocator.reserve([handle], 20)
        allocator.truncate(handle, 5)
        assert counts(allocator) == (6, 0, 2)

    def test_a_sequence_without_tokens_lives_on(self):
        allocator = make()
        handle = computed(allocator, range(9), cache_salt="a")
        allocator.truncate(handle, 0)
        assert allocator.sequence(handle).capacity == 0 and allocator.num_used == 0
        batch, _ = allocator.advance([handle], [5])
        assert batch.seq_lens.tolist() == [1]
        allocator.append([handle], [[6, 7, 8]])
        allocator.commit([handle], 4)
        assert allocator.match_prefix([5, 6, 7, 8, 9], cache_salt="a") == S

    @pytest.mark.parametrize(
        "length, error", [(-1, ValueError), (10, ValueError), (1.0, TypeError)]
    )
    def test_truncate_only_shortens(self, unchecked, length, error):
        allocator = make()
        handle = allocator.allocate(range(9))
        assert "length must be" in str(
            refuses(allocator, error, allocator.truncate, handle, length)
        )


class TestWhatFits:
    @pytest.mark.parametrize("page_size", [1, 2, 4])
    def test_a_sequence_may_fill_the_pool_and_no_more(self, page_size):
        allocator = make(3, page_size)
        limit = 3 * page_size
        assert allocator.can_ever_fit(limit) and not allocator.can_ever_fit(limit + 1)
        assert allocator.can_ever_fit(0)
        error = refuses(allocator, SequenceTooLong, allocator.allocate, range(limit + 1))
        assert "create a larger pool" in str(error)
        handle = allocator.allocate(range(limit))
        refuses(allocator, SequenceTooLong, allocator.advance, [handle], [1])
        refuses(allocator, SequenceTooLong, allocator.reserve, [handle], 2**62)

    def test_a_watermark_is_left_free(self):
        allocator = make(4)
        refuses(allocator, OutOfPages, allocator.allocate, range(9), keep_free=2)
        allocator.allocate(range(9), keep_free=1)
        assert allocator.num_free == 1
