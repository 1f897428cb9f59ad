"""Bad arguments and hostile use: a clear error that names the argument, and nothing changed."""

from __future__ import annotations

import pickle  # noqa: TID251  (errors cross process boundaries; nothing is loaded from outside)
import threading

import numpy as np
import pytest

from paged_decode.allocator import (
    LRU,
    BlockAllocator,
    CorruptState,
    EvictionRank,
    OutOfPages,
    SequenceTooLong,
    StaleHandle,
)

from .device import freeze
from .test_scenarios import S, computed, counts, make, pages, refuses

pytestmark = pytest.mark.usefixtures("unchecked")


def test_one_page_too_many_tells_what_is_there():
    error = refuses(allocator := make(3), OutOfPages, allocator.allocate_pages, 4)
    assert (error.needed, error.free, error.evictable, error.group) == (4, 3, 0, 0)
    assert "needed 4 pages, but only 3 are free" in str(error)
    assert allocator.allocate_pages(0) == []
    refuses(allocator, ValueError, allocator.allocate_pages, -1)


STALE = {
    "never made": lambda a, h: 7 << 32,
    "zero": lambda a, h: 0,
    "negative": lambda a, h: -1,
    "its complement": lambda a, h: ~h,
    "row beyond the table": lambda a, h: h + 1000,
    "next generation": lambda a, h: h + (1 << 32),
    "huge": lambda a, h: 2**63 - 1,
    "beyond 64 bits": lambda a, h: 2**70,
    "unsigned": lambda a, h: 2**63,
    "of a freed row": lambda a, h: _freed(a, h),
}


def _freed(allocator: BlockAllocator, handle: int) -> int:
    (child,) = allocator.fork(handle)
    allocator.free(child)
    return child


CALLS = {
    "append": lambda a, h: a.append([h], [[1]]),
    "advance": lambda a, h: a.advance([h], [1]),
    "reserve": lambda a, h: a.reserve([h], 1),
    "trim": lambda a, h: a.trim([h]),
    "batch": lambda a, h: a.batch([h], 0, 1),
    "commit": lambda a, h: a.commit([h], 1),
    "fork": lambda a, h: a.fork(h),
    "truncate": lambda a, h: a.truncate(h, 1),
    "free": lambda a, h: a.free(h),
    "free many": lambda a, h: a.free([h]),
    "sequence": lambda a, h: a.sequence(h),
    "tokens": lambda a, h: a.tokens(h),
}


@pytest.mark.parametrize("stale", STALE)
@pytest.mark.parametrize("call", CALLS)
def test_a_handle_that_is_not_live_is_refused_everywhere(call, stale):
    allocator = make()
    bad = STALE[stale](allocator, allocator.allocate([1, 2]))
    refuses(allocator, StaleHandle, CALLS[call], allocator, bad)


@pytest.mark.parametrize("bad", [1.0, "1", None, True, [1.5], [True], np.float32(1)])
@pytest.mark.parametrize("call", CALLS)
def test_a_handle_is_an_integer(call, bad):
    allocator = make()
    allocator.allocate([1, 2])
    error = refuses(allocator, (TypeError, ValueError), CALLS[call], allocator, bad)
    assert not isinstance(error, ValueError) or isinstance(bad, list)  # [[1.5]]: wrong shape


def test_a_stale_handle_among_live_ones_frees_nothing():
    allocator = make()
    a, b = (allocator.allocate(range(5)) for _ in range(2))
    allocator.free(b)
    refuses(allocator, StaleHandle, allocator.free, [a, b])
    refuses(allocator, StaleHandle, allocator.advance, [a, b], [1, 2])


def test_a_freed_handle_stays_stale_when_its_row_is_used_again():
    allocator = make()
    dead: list[int] = []
    for _ in range(100):
        handle = allocator.allocate([1])
        assert handle not in dead
        for old in dead[-3:]:
            refuses(allocator, StaleHandle, allocator.free, old)
        allocator.free(handle)
        dead.append(handle)
    assert len({handle & 0xFFFF_FFFF for handle in dead}) == 1  # all of them had one row


@pytest.mark.parametrize(
    "call", ["append", "advance", "reserve", "trim", "batch", "commit", "free"]
)
def test_a_sequence_named_twice_in_a_call_is_refused(call):
    allocator = make()
    a, b = (allocator.allocate([1, 2]) for _ in range(2))
    rest = dict(
        append=([[1]] * 3,), advance=([1] * 3,), reserve=(1,), batch=(0, 1), commit=(1,)
    ).get(call, ())
    error = refuses(allocator, ValueError, getattr(allocator, call), [a, b, a], *rest)
    assert f"handles must name each sequence once, got {a}" in str(error)


def test_forks_diverge_with_one_copy_and_counts_return_to_zero():
    allocator = make(prefix_cache=False)
    parent = allocator.allocate(range(6))
    (child,) = allocator.fork(parent)
    total = 0
    for token in range(4):
        _, copies = allocator.advance([parent, child], [token, token + 50])
        total += len(copies.src)
    assert total == 1
    allocator.free(parent)
    assert allocator.tokens(child).tolist() == [*range(6), 50, 51, 52, 53]
    allocator.free(child)
    assert counts(allocator) == (8, 0, 0)


@pytest.mark.parametrize(
    "num_pages, page_size, name",
    [
        (0, 4, "num_pages"),
        (1, 4, "num_pages"),
        (-3, 4, "num_pages"),
        (2**31, 16, "num_pages"),
        (2**27 + 1, 16, "num_pages"),
        (9, 0, "page_size"),
        (9, 3, "page_size"),
        (9, -4, "page_size"),
    ],
)
def test_an_impossible_pool_is_refused(num_pages, page_size, name):
    with pytest.raises(ValueError, match=name):
        BlockAllocator(num_pages, page_size)


@pytest.mark.parametrize("bad", [4.0, "4", None, True])
def test_sizes_of_a_pool_are_integers(bad):
    with pytest.raises(TypeError, match="num_pages must be"):
        BlockAllocator(bad, 4)
    with pytest.raises(TypeError, match="page_size must be"):
        BlockAllocator(9, bad)


@pytest.mark.parametrize(
    "option, error",
    [
        (dict(hash_key="text"), TypeError),
        (dict(hash_key=b"x" * 65), ValueError),
        (dict(fingerprint="text"), TypeError),
        (dict(eviction=object()), TypeError),
    ],
)
def test_a_bad_option_is_named(option, error):
    with pytest.raises(error, match=next(iter(option))):
        BlockAllocator(9, 4, **option)


def test_the_smallest_pool_works():
    allocator = make(1, page_size=1)
    handle = computed(allocator, [5])
    refuses(allocator, SequenceTooLong, allocator.advance, [handle], [6])
    (child,) = allocator.fork(handle)
    allocator.free([handle, child])
    assert counts(allocator) == (0, 1, 0)
    assert allocator.match_prefix([5]) == 0 and allocator.match_prefix([5, 6]) == 1
    refuses(allocator, SequenceTooLong, allocator.allocate, [5, 6])
    allocator.allocate([7])


def test_a_pool_whose_slots_use_all_31_bits_works():
    """Page ids over 65,535, and slots close to 2**31"""
    allocator = BlockAllocator(2**21, 1024, prefix_cache=False)
    allocator.allocate_pages(2**21 - 2)
    handle = allocator.allocate([1] * 1023)
    batch, _ = allocator.advance([handle], [2])
    assert batch.slots.tolist() == [[2**31 - 1]]
    assert batch.page_table.dtype == batch.slots.dtype == np.int32


def test_a_referenced_page_is_never_evicted():
    allocator = make(4)
    held = computed(allocator, range(2 * S))
    pinned = allocator.allocate_pages(2)
    refuses(allocator, OutOfPages, allocator.allocate, [9])
    (child,) = allocator.fork(held)
    refuses(allocator, OutOfPages, allocator.advance, [child], [9])
    allocator.free_pages(pinned)
    allocator.free([held, child])
    assert counts(allocator) == (2, 2, 0)
    assert len(allocator.allocate_pages(4)) == 4
    assert allocator.stats().evictions == 2


def test_int32_and_int64_tokens_are_the_same_tokens():
    allocator = make()
    kinds = [np.int8, np.uint8, np.int32, np.int64, np.uint64, ">i4", "<i8"]
    assert len({tuple(allocator.page_digests(np.arange(9, dtype=k))) for k in kinds}) == 1
    computed(allocator, np.arange(9, dtype=np.int32))
    assert allocator.match_prefix(np.arange(9, dtype=np.int64)) == 2 * S
    strided = np.arange(18, dtype=np.int64).repeat(2)[::2][:9]
    assert allocator.match_prefix(strided) == 2 * S


def test_a_constant_digest_shares_nothing_wrongly():
    allocator = make(16, digest=lambda key, payload: b"")
    for tokens in ([1] * 8, [2] * 8, [1, 1, 1, 1, 2, 2, 2, 2], [2, 2, 2, 2, 1, 1, 1, 1]):
        for salt in (None, "", "a", b"a"):
            handle = allocator.allocate([*tokens, 0], cache_salt=salt)
            assert allocator.sequence(handle).cached == 0
            allocator.commit([handle], 9)
            allocator.check_invariants()
            allocator.free(handle)


def test_many_threads_leave_the_bookkeeping_whole():
    allocator, failures = make(64), []

    def work(seed: int) -> None:
        rng, live = np.random.default_rng(seed), []
        try:
            for _ in range(60):
                try:
                    live.append(computed(allocator, rng.integers(0, 2, 9)))
                    allocator.advance(live, [1] * len(live))
                except OutOfPages:
                    pass
                if len(live) > 3:
                    allocator.free([live.pop(0), live.pop(0)])
            allocator.free(live)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    allocator.check_invariants()
    assert allocator.num_used == 0


@pytest.mark.parametrize(
    "bad, error",
    [
        ([], ValueError),
        ([[1]], ValueError),
        (5, ValueError),
        ([[1], [1, 2]], ValueError),
        ([-1], ValueError),
        ([2**31], ValueError),
        ([2**63], ValueError),
        ([2**70], ValueError),
        ([1.0], TypeError),
        (np.zeros(0), TypeError),
        (["a"], TypeError),
        ("abc", TypeError),
        (None, TypeError),
        ([True], TypeError),
        ([None], TypeError),
    ],
)
@pytest.mark.parametrize("call", ["allocate", "match_prefix", "page_digests"])
def test_a_prompt_is_a_row_of_token_ids(call, bad, error):
    allocator = make()
    assert "tokens" in str(refuses(allocator, error, getattr(allocator, call), bad))


def test_the_largest_token_id_is_kept():
    allocator = make()
    handle = computed(allocator, [2**31 - 1] * 5)
    assert allocator.tokens(handle).tolist() == [2**31 - 1] * 5
    assert allocator.match_prefix([2**31 - 1] * 5) == S


@pytest.mark.parametrize("salt", [1, 1.5, ["a"], bytearray(b"a"), ("a",)])
def test_a_salt_is_text_bytes_or_none(salt):
    allocator = make()
    assert "cache_salt" in str(
        refuses(allocator, TypeError, allocator.allocate, [1], cache_salt=salt)
    )
    refuses(allocator, TypeError, allocator.match_prefix, [1], cache_salt=salt)


def test_a_salt_with_a_lone_surrogate_is_refused():
    allocator = make()
    refuses(allocator, ValueError, allocator.allocate, [1], cache_salt="\ud800")


@pytest.mark.parametrize("salt", ["\0", "x" * 2**20, b"\xff" * 100, "é"])
def test_any_text_is_a_salt(salt):
    allocator = make()
    handle = computed(allocator, range(5), cache_salt=salt)
    assert allocator.sequence(handle).cache_salt == salt
    assert allocator.match_prefix(range(5), cache_salt=salt) == S
    assert allocator.match_prefix(range(5), cache_salt=salt + salt[:1]) == 0


@pytest.mark.parametrize(
    "tokens, counts, error, name",
    [
        ([1, 2], None, ValueError, "tokens"),
        ([[1]], None, ValueError, "tokens"),
        ([[1], [2], [3]], None, ValueError, "tokens"),
        ([[1], [2.5]], None, TypeError, "tokens"),
        ([[1], [-2]], None, ValueError, "tokens"),
        ([[1], [2]], [1], ValueError, "counts"),
        ([[1], [2]], [1, 2], ValueError, "counts"),
        ([[1], [2]], [1, -1], ValueError, "counts"),
        ([[1], [2]], [1, 1.0], TypeError, "counts"),
        ([[1], [2]], [2**63 - 1, 0], ValueError, "counts"),
    ],
)
def test_append_checks_its_arguments(tokens, counts, error, name):
    allocator = make()
    handles = [allocator.allocate([1]) for _ in range(2)]
    assert name in str(refuses(allocator, error, allocator.append, handles, tokens, counts))


@pytest.mark.parametrize(
    "tokens, options, name",
    [
        ([1], {}, "tokens"),
        ([[1], [2]], {}, "tokens"),
        ([1, -1], {}, "tokens"),
        ([1, 2], dict(pad_to=1), "pad_to"),
        ([1, 2], dict(columns=1), "columns"),
        ([1, 2], dict(columns=0), "columns"),
        ([1, 2], dict(pad_to=-1), "pad_to"),
    ],
)
def test_advance_checks_its_arguments_before_it_changes_anything(tokens, options, name):
    allocator = make()
    handles = [allocator.allocate(range(S)) for _ in range(2)]
    error = refuses(allocator, ValueError, allocator.advance, handles, tokens, **options)
    assert name in str(error)


@pytest.mark.parametrize(
    "begin, end, width, name",
    [
        (0, 5, 8, "begin must be at least the computed"),
        (5, 4, 8, "begin must be at most end"),
        (4, 9, 8, "end must be at most the capacity"),
        (4, 7, 2, "tokens_per_row"),
        (-1, 4, 8, "begin"),
        ([4, 4], 5, 8, "begin"),
        (4, 5, 0, "tokens_per_row"),
        (4, 2**62, 8, "capacity"),
    ],
)
def test_batch_checks_its_arguments(begin, end, width, name):
    allocator = make()
    handle = allocator.allocate(range(7))
    allocator.commit([handle], 4)
    call = allocator.batch
    error = refuses(allocator, ValueError, call, [handle], begin, end, tokens_per_row=width)
    assert name in str(error)


@pytest.mark.parametrize("computed", [8, [8], -1, [1, 1], 2**62])
def test_commit_is_at_most_the_length(computed):
    allocator = make()
    handle = allocator.allocate(range(7))
    assert "computed" in str(refuses(allocator, ValueError, allocator.commit, [handle], computed))


def test_commit_of_one_bad_row_commits_none():
    allocator = make()
    a, b = (allocator.allocate(range(7)) for _ in range(2))
    refuses(allocator, ValueError, allocator.commit, [a, b], [7, 8])


def test_commit_of_less_than_before_changes_nothing():
    allocator = make()
    handle = computed(allocator, range(7))
    before = freeze(allocator)
    allocator.commit([handle], 3)
    assert freeze(allocator) == before


def test_a_digest_that_fails_changes_nothing():
    calls = []

    def digest(key: bytes, payload: bytes) -> bytes:
        calls.append(payload)
        if len(calls) > 3:
            raise RuntimeError("no more")
        return bytes([len(calls)])

    allocator = make(digest=digest)
    handle = allocator.allocate(range(12))
    assert len(calls) > 0
    calls[:] = [b""] * 2
    refuses(allocator, RuntimeError, allocator.commit, [handle], 12)
    calls[:] = [b""] * 3
    refuses(allocator, RuntimeError, allocator.allocate, range(12))


class Newest:
    def rank(self, page):
        return -page.last_used


def test_an_eviction_rank_can_be_replaced():
    allocator = make(4, eviction=Newest())
    assert isinstance(Newest(), EvictionRank)
    first, second = computed(allocator, range(2 * S)), computed(allocator, range(50, 58))
    last = pages(allocator, second)[0]
    allocator.free([first, second])
    assert allocator.allocate_pages(1) == [last]
    allocator.check_invariants()


class Broken:
    """Answers wrongly at its k-th call."""

    def __init__(self, wrong, at: int) -> None:
        self.wrong, self.at, self.calls = wrong, at, 0

    def rank(self, page):
        self.calls += 1
        if self.calls != self.at:
            return page.last_used
        if isinstance(self.wrong, Exception):
            raise self.wrong
        return self.wrong


@pytest.mark.parametrize(
    "wrong, error",
    [(RuntimeError("mine"), RuntimeError), (None, TypeError), ((), TypeError)]
    + [(bad, TypeError) for bad in ("1", (1, "a"), float("nan"), (0, np.float32("nan")), [1])],
)
@pytest.mark.parametrize("at", [1, 2, 4])
def test_an_eviction_rank_that_fails_changes_nothing(wrong, error, at):
    allocator = make(8, eviction=Broken(wrong, at))
    first, second = computed(allocator, range(2 * S)), computed(allocator, range(50, 58))
    message = str(refuses(allocator, error, allocator.free, [first, second]))
    assert "mine" in message or "rank must return a number" in message
    allocator.free([first, second])
    assert counts(allocator) == (4, 4, 0)


class Meddler:
    """Wants to change what it is asked about."""

    def rank(self, page):
        self.seen = self.allocator.stats().sequences  # to read is fine
        self.allocator.allocate_pages(1)
        return 0


def test_an_eviction_rank_must_not_change_the_allocator():
    allocator = make(8, eviction=(rank := Meddler()))
    rank.allocator = allocator
    handle = computed(allocator, range(2 * S))
    assert "must not change" in str(refuses(allocator, RuntimeError, allocator.free, [handle]))
    assert rank.seen == 1


@pytest.mark.parametrize("eviction", [object(), LRU, "lru", 7, type("Old", (), {"pop": min})()])
def test_what_is_no_eviction_rank_is_refused(eviction):
    with pytest.raises(TypeError, match="rank"):
        make(4, eviction=eviction)


def test_errors_survive_a_process_boundary():
    for error in (OutOfPages(3, 1, 1, group=2), CorruptState(["a", "b"]), StaleHandle("x")):
        again = pickle.loads(pickle.dumps(error))  # noqa: S301
        assert type(again) is type(error) and str(again) == str(error)
        assert vars(again) == vars(error)
