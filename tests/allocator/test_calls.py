"""What the calls of a loop promise: which pages changed, what counts as computed, keys, shards."""

from __future__ import annotations

import itertools
import threading
from dataclasses import replace

import numpy as np
import pytest

from paged_decode.allocator import (
    BlockAllocator,
    OutOfPages,
    PageTableError,
    PromptKey,
    SequenceTooLong,
    ShardedAllocator,
    StaleHandle,
)
from paged_decode.allocator.prefix import blake2b_digest
from paged_decode.policies import LFU

from .device import freeze
from .test_machine import Boom, Fuse
from .test_scenarios import S, computed, counts, make, pages, refuses

KINDS = [
    lambda n, **options: BlockAllocator(n + 1, S, **options),
    lambda n, **options: ShardedAllocator(2 * n + 2, S, num_shards=2, **options),
]
both = pytest.mark.parametrize("new", KINDS, ids=["one", "two shards"])


# ---- pages


@both
@pytest.mark.parametrize("seed", range(3))
def test_a_table_kept_up_by_what_prepare_changed_is_the_table(new, seed):
    rng = np.random.default_rng(seed)
    allocator = new(150)
    handles = [allocator.allocate(rng.integers(0, 9, n)) for n in rng.integers(1, 12, 6)]
    handles += allocator.fork(handles[0], 2)
    kept = np.zeros((len(handles), 40), np.int32)
    for place, handle in enumerate(handles):
        kept[place, : len(pages(allocator, handle))] = pages(allocator, handle)
    for _ in range(6):
        order = rng.permutation(len(handles))
        chosen = [handles[i] for i in order]
        length = np.array([allocator.sequence(h).length for h in chosen])
        end = length + rng.integers(-2, 9, len(chosen))
        done = allocator.prepare(chosen, end.clip(0))
        kept[order[done.places], done.columns] = done.pages
        assert set(done.copies.dst) <= set(done.pages)
        for handle, row in zip(handles, kept, strict=True):
            held = pages(allocator, handle)
            assert row.tolist() == [*held, *[0] * (40 - len(held))]
        more = (end - length).clip(0)
        copies = allocator.append(chosen, np.ones((len(chosen), 9), int), more)
        assert len(copies.src) == 0  # everything was prepared
        allocator.check_invariants()


@both
def test_prepare_takes_all_pages_or_none(new):
    allocator = new(4)
    a, b, *others = (allocator.allocate([i] * 4) for i in range(4))
    refuses(allocator, OutOfPages, allocator.prepare, [a, b], [4, 16])
    allocator.free(others)
    refuses(allocator, SequenceTooLong, allocator.prepare, [a, b], [0, 17])
    refuses(allocator, ValueError, allocator.prepare, [a, b], [0, -1])
    done = allocator.prepare([a, b], [3, 8])  # of a, nothing
    assert done.places.tolist() == [1] and done.columns.tolist() == [1]
    assert pages(allocator, b)[1] == done.pages[0]


@both
def test_truncate_of_a_batch_is_one_after_the_other(new):
    results = []
    for together in (False, True):
        allocator = new(20)
        first = computed(allocator, range(11))
        handles = [first, *allocator.fork(first, 2), computed(allocator, range(50, 59))]
        allocator.reserve(handles[0], 9)
        lengths = [9, 0, 6, 9]
        if together:
            allocator.truncate(handles, lengths)
        else:
            for handle, length in zip(handles, lengths, strict=True):
                allocator.truncate(handle, length)
        allocator.check_invariants()
        infos = [allocator.sequence(handle) for handle in handles]
        results.append((infos, allocator.stats().used))
        assert [info.length for info in infos] == lengths
        refuses(allocator, ValueError, allocator.truncate, handles, [9, 0, 7, 9])
        refuses(allocator, StaleHandle, allocator.truncate, [*handles, 99], 0)
    assert results[0] == results[1]


# ---- batches


def test_a_batch_has_the_tokens_and_says_for_which_pool():
    allocator = make(20)
    a, b = allocator.allocate([5, 6, 7, 8, 9]), allocator.allocate([3])
    allocator.reserve([a, b], 4)
    batch = allocator.batch([b, a], 0, [3, 5], tokens_per_row=6, pad_to=3)
    assert batch.tokens.tolist() == [[0, 0, 0, 3, 0, 0], [0, 5, 6, 7, 8, 9], [0] * 6]
    assert [(g.page_size, g.num_pages, g.starts, g.window) for g in batch.groups] == [
        (S, 21, None, None)
    ]
    batch, _ = allocator.advance([a, b], [1, 2], pad_to=3)
    assert batch.tokens.tolist() == [[1], [2], [0]] and batch.tokens.dtype == np.int32


@both
@pytest.mark.parametrize("seed", range(3))
def test_extend_is_append_and_the_batch_of_the_new_tokens(new, seed):
    rng = np.random.default_rng(seed)
    one, two = new(60), new(60)
    prompts = [rng.integers(0, 9, n) for n in rng.integers(1, 12, 6)]
    handles = [one.allocate(p) for p in prompts]
    assert handles == [two.allocate(p) for p in prompts]
    handles += one.fork(handles[1])
    assert handles[-1:] == two.fork(handles[1])
    for step in range(4):
        length = np.array([one.sequence(h).length for h in handles])
        tokens, count = rng.integers(0, 9, (7, 5)), rng.integers(0, 6, 7)
        got, copies = one.extend(handles, tokens, count, reserve=step, pad_to=9, columns=20)
        want_copies = two.append(handles, tokens, count)
        two.reserve(handles, step)
        want = two.batch(handles, length, length + count, tokens_per_row=5, pad_to=9, columns=20)
        if step == 0:
            assert [c.tolist() for c in copies] == [c.tolist() for c in want_copies]
        np.testing.assert_array_equal(got.tokens, want.tokens)
        np.testing.assert_array_equal(got.seq_lens, want.seq_lens)
        np.testing.assert_array_equal(got.positions, want.positions)
        for handle, row in zip(handles, got.page_table, strict=False):
            held = pages(one, handle)
            assert row[: len(held)].tolist() == held
        one.check_invariants()


def test_extend_by_no_token_shows_the_reserved_pages():
    allocator = make()
    handle = allocator.allocate([1, 2, 3])
    batch, _ = allocator.extend(handle, [], reserve=6)
    assert batch.seq_lens.tolist() == [3] and batch.slots.tolist() == [[0]]
    assert batch.page_table[0, :3].tolist() == pages(allocator, handle)
    assert allocator.sequence(handle).length == 3


# ---- what counts as computed


def committed(allocator, handle) -> int:
    """What `advance(commit=True)` commits now, without its token."""
    allocator.advance([handle], [7], commit=True)
    found = allocator.sequence(handle).computed
    return found


@both
def test_what_batches_described_is_committed_and_nothing_else(new):
    allocator = new(40)
    prompt = list(range(10))
    described, chunk, gap, never = (allocator.allocate([i, *prompt]) for i in range(4))
    allocator.batch([described], 0, 11, tokens_per_row=11)
    allocator.batch([chunk], 0, 6, tokens_per_row=8)
    allocator.batch([gap], 2, 11, tokens_per_row=11)
    assert [committed(allocator, h) for h in (described, chunk, gap, never)] == [11, 6, 0, 0]
    assert allocator.match_prefix([0, *prompt]) == 8 and allocator.match_prefix([3, *prompt]) == 0
    # The newest token was described by `advance`, but what lies before it may be missing.
    assert [committed(allocator, h) for h in (described, chunk, gap, never)] == [12, 6, 0, 0]
    allocator.batch([chunk], 6, 13, tokens_per_row=8)
    allocator.append([described], [[1, 2]])  # not described
    assert [committed(allocator, h) for h in (described, chunk)] == [13, 13]
    allocator.commit([described], 16)  # who says so has computed it
    assert committed(allocator, described) == 16
    assert committed(allocator, described) == 17
    allocator.check_invariants()


def test_forks_inherit_what_was_described_and_truncation_forgets_it():
    allocator = make(40)
    handle = allocator.allocate(range(9))
    allocator.batch([handle], 0, 9, tokens_per_row=9)
    (child,) = allocator.fork(handle, commit=True)
    assert allocator.sequence(child).computed == 9
    allocator.append([child], [[1, 2, 3]])
    allocator.truncate([handle, child], [4, 11])
    assert committed(allocator, child) == 9
    allocator.append([handle], [[1, 2, 3]])
    assert committed(allocator, handle) == 4
    allocator.check_invariants()


def test_a_call_that_fails_commits_nothing():
    allocator = make(3)
    handle = allocator.allocate(range(12))
    allocator.batch([handle], 0, 12, tokens_per_row=12)
    refuses(allocator, SequenceTooLong, allocator.advance, [handle], [1], commit=True)
    refuses(allocator, ValueError, allocator.advance, [handle], [-1], commit=True)


# ---- keys


def counting(calls):
    def digest(key: bytes, payload: bytes) -> bytes:
        calls.append(payload)
        return blake2b_digest(key, payload)

    return digest


@both
def test_digests_of_a_key_are_computed_once(new):
    calls: list[bytes] = []
    allocator = new(40, hash_key=b"k", digest=counting(calls))
    first = computed(allocator, range(4 * S + 1))
    calls.clear()
    key = PromptKey(range(4 * S + 1))
    assert allocator.match_prefix(key) == 4 * S
    asked = len(calls)
    assert asked == 5  # the root, and four pages
    for _ in range(3):
        assert allocator.match_prefix(key) == 4 * S
    handle = allocator.allocate(key)
    assert allocator.sequence(handle).cached == 4 * S
    assert len(allocator.page_digests(key)) == 4
    assert allocator.sequence_digests(handle, 4 * S) == allocator.page_digests(key)
    assert len(calls) == asked
    allocator.new_weights()
    assert allocator.match_prefix(key) == 0 and len(calls) > asked
    allocator.free([first, handle])


def test_one_key_serves_allocators_that_differ():
    key = PromptKey(range(9))
    some = [BlockAllocator(9, size, hash_key=k) for size in (2, 4) for k in (b"a", b"b")]
    for allocator in some:
        computed(allocator, range(9))
    for _ in range(2):
        assert [a.match_prefix(key) for a in some] == [8, 8, 8, 8]
    assert len({tuple(a.page_digests(key)) for a in some}) == 4
    assert some[0].page_digests(key) == some[0].page_digests(range(9))


def test_a_key_is_what_it_was_made_of():
    tokens = np.arange(9)
    key = PromptKey(tokens, cache_salt="x")
    tokens[:] = 3
    allocator = make()
    handle = allocator.allocate(key)
    assert allocator.tokens(handle).tolist() == list(range(9)) and len(key) == 9
    assert allocator.sequence(handle).cache_salt == "x"
    with pytest.raises(ValueError, match="read-only"):
        key.tokens[0] = 1
    with pytest.raises(ValueError, match="part of a PromptKey"):
        allocator.match_prefix(key, cache_salt="y")
    for bad, error in (([], ValueError), ([1.5], TypeError), ([-1], ValueError)):
        with pytest.raises(error, match="tokens"):
            PromptKey(bad)
    with pytest.raises(ValueError, match="cache_salt"):
        PromptKey([1], cache_salt="\ud800")


# ---- shards


@pytest.mark.parametrize("seed", range(4))
def test_one_shard_gives_the_answers_of_a_plain_allocator(seed):
    rng = np.random.default_rng(seed)
    one = BlockAllocator(30, S, hash_key=b"k")
    two = ShardedAllocator(30, S, num_shards=1, hash_key=b"k")
    live: list[int] = []
    for _ in range(60):
        what, tokens = rng.integers(0, 5), rng.integers(0, 2, rng.integers(1, 9))
        some = [h for h in live if rng.random() < 0.5]
        calls = {
            0: lambda a, t=tokens: a.allocate(t),
            1: lambda a, s=some: [x.tolist() for x in a.append(s, np.ones((len(s), 2), int))],
            2: lambda a, s=some: [x.tolist() for x in a.advance(s, [1] * len(s))[1]],
            3: lambda a, s=some: a.commit(s, [a.sequence(h).length for h in s]),
            4: lambda a, s=some: a.free(s[:1]),
        }
        answers = []
        for allocator in (one, two):
            try:
                answers.append(calls[int(what)](allocator))
            except OutOfPages as error:
                answers.append(str(error))
        assert answers[0] == answers[1]
        if what == 0 and isinstance(answers[0], int):
            live.append(answers[0])
        if what == 4:
            live = [h for h in live if h not in some[:1]]
        assert one.stats() == two.stats() and freeze(one) == freeze(two)[0]
    two.check_invariants()


def test_shards_have_the_limits_of_a_plain_allocator():
    with pytest.raises(ValueError, match="slots fit int32"):
        ShardedAllocator(2**20, 2**12, num_shards=4)  # each shard alone would fit
    allocator = ShardedAllocator(16, S, num_shards=2)
    handle = allocator.allocate([1])
    for call, error in (
        (lambda: allocator.fork(handle, 2**31), ValueError),
        (lambda: allocator.fork([handle]), TypeError),
        (lambda: allocator.advance([handle], [1], pad_to=10**12), ValueError),
        (lambda: allocator.batch([handle], 0, 1, columns=10**14), ValueError),
        (lambda: allocator.new_weights(b""), ValueError),
        (lambda: allocator.free_pages([1, 1]), ValueError),
    ):
        with pytest.raises(error):
            call()
    batch, _ = allocator.advance([], [], pad_to=2, columns=3)
    assert batch.page_table.shape == (2, 3) and not batch.seq_lens.any()
    assert counts(allocator)[2] == 1


def test_messages_about_shards_speak_of_the_whole():
    allocator = ShardedAllocator(16, S, num_shards=2)
    a, b = allocator.allocate([1] * 5), allocator.allocate([2] * 5)
    assert allocator.shard_of(b) == 1
    with pytest.raises(ValueError, match="in row 1, a sequence of 5 tokens"):
        allocator.batch([a, b], [0, 0], [5, 99], tokens_per_row=99)
    with pytest.raises(StaleHandle, match=str(b + 2)):
        allocator.free([a, b + 2])
    with pytest.raises(Exception, match=r"pages \[10\] were not handed out"):
        allocator.free_pages([10])


# ---- what a user's objects raise, in calls that the random programs leave out


def at_every_call(allocator, fuse, call):
    """The answer, after the call has failed with the first, second, ... call of the fuse."""
    for k in itertools.count(1):
        before = freeze(allocator)
        fuse.left = k
        try:
            return k, call()
        except Boom:
            assert freeze(allocator) == before
            allocator.check_invariants()
        finally:
            fuse.left = 0


@both
def test_new_weights_and_resets_come_whole_or_not_at_all(new):
    fuse = Fuse(blake2b_digest)
    allocator = new(40, digest=fuse.digest, eviction=fuse, hash_key=b"k")
    held = [computed(allocator, range(9 + i)) for i in range(3)]
    empty = [allocator.allocate([i], cache_salt=str(i)) for i in range(3)]
    allocator.truncate(empty, 0)
    tries, _ = at_every_call(allocator, fuse, lambda: allocator.new_weights(b"x"))
    assert tries > 3 and allocator.generation == allocator.weights == b"x"
    assert [allocator.sequence(h).private for h in (*held, *empty)] == [True] * 3 + [False] * 3
    allocator.free(held)
    tries, done = at_every_call(allocator, fuse, lambda: allocator.reset_prefix_cache())
    assert tries > 3 and done and allocator.generation != b"x" and allocator.weights == b"x"


@pytest.mark.parametrize("cached", [True, False])
def test_an_import_comes_whole_or_not_at_all(cached):
    old = BlockAllocator(41, S, hash_key=b"k", eviction=LFU())
    live = [computed(old, range(9 + 4 * i)) for i in range(3)]
    live += old.fork(live[0])
    for i in range(4):
        old.free(computed(old, range(20 * i, 20 * i + 9)))
    state, _ = old.export_state(cached=cached)
    fuse = Fuse(blake2b_digest)
    new = BlockAllocator(41, S, hash_key=b"k", digest=fuse.digest, eviction=fuse)
    new.free(computed(new, range(9)))  # some of it is here already
    pages = new.allocate_pages(state.num_pages)
    tries, handles = at_every_call(new, fuse, lambda: new.import_state(state, pages))
    assert tries > 5 and [new.tokens(h).tolist() for h in handles] == [
        old.tokens(h).tolist() for h in live
    ]
    new.check_invariants()
    for handle, before in zip(handles, live, strict=True):
        assert new.sequence(handle).computed == old.sequence(before).computed
    assert new.match_prefix(range(20, 29)) == (8 if cached else 0)
    tries, _ = at_every_call(new, fuse, lambda: new.free(handles))
    assert tries > 1 and new.num_used == 0


def test_a_state_without_entries_has_no_token_behind_its_sequences():
    """The page was published to its end, and its last owner has it in part."""
    old = BlockAllocator(9, S)
    first = computed(old, range(8))
    (child,) = old.fork(first)
    old.truncate(child, 6)
    old.free(first)
    state, _ = old.export_state()
    for smaller in (state.without_entries()[0], state.fit(2)[0], state.under(b"sx")[0]):
        new = BlockAllocator(9, S)
        (handle,) = new.import_state(smaller, new.allocate_pages(smaller.num_pages))
        assert new.tokens(handle).tolist() == list(range(6))
        new.check_invariants()


@pytest.mark.parametrize(
    "wrong",
    [
        dict(tokens=np.array([[2**31, 2, 3, 0]])),
        dict(cached=np.array([[0]])),
        dict(salts=np.array([0.0])),
        dict(evictable=np.zeros(0, bool)),
        dict(lengths=[3]),
    ],
    ids=lambda wrong: next(iter(wrong)),
)
@pytest.mark.usefixtures("unchecked")
def test_a_state_of_wrong_types_is_refused_whole(wrong):
    old = BlockAllocator(9, S)
    old.allocate([1, 2, 3])
    state = replace(old.export_state()[0], **wrong)
    new = BlockAllocator(9, S)
    taken = new.allocate_pages(1)
    refuses(new, PageTableError, new.import_state, state, taken)


def test_a_digest_must_not_use_the_allocator_that_asks_it():
    called = []

    def digest(key: bytes, payload: bytes) -> bytes:
        if called:
            called.pop()(allocator)
        return blake2b_digest(key, payload)

    allocator = BlockAllocator(20, S, digest=digest)
    handle = allocator.allocate(range(12))
    for outer in (
        lambda: allocator.commit(handle, 8),
        lambda: allocator.sequence_digests(handle, 8),
        lambda: allocator.match_prefix(range(9)),
        lambda: allocator.page_digests(range(9)),
    ):
        for inner in (
            lambda a: a.truncate(handle, 0),
            lambda a: a.sequence_digests(handle, 8),
        ):
            called[:] = [inner]
            with pytest.raises(RuntimeError, match="must not change"):
                outer()
    assert allocator.sequence_digests(handle, 12) == allocator.page_digests(range(12))


def test_one_key_in_many_threads_gives_the_digests_of_its_tokens():
    tokens = np.arange(1600)
    allocators = [BlockAllocator(500, S, hash_key=b"k") for _ in range(2)]
    want, wrong = allocators[0].page_digests(tokens), []
    for _ in range(5):
        key = PromptKey(tokens)

        def ask(allocator, key=key):
            wrong.append(allocator.page_digests(key) != want)

        threads = [threading.Thread(target=ask, args=(a,)) for a in allocators * 2]
        [t.start() for t in threads]
        [t.join() for t in threads]
    assert wrong == [False] * 20
