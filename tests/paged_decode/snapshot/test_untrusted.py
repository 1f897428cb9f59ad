"""A file of a stranger in an allocator that serves others: under a salt of its own, or private."""

from __future__ import annotations

import numpy as np
import pytest

from paged_decode import (
    BlockAllocator,
    PageTableError,
    SamplingParams,
    export_sequence,
    import_sequence,
    load_snapshot,
    save_snapshot,
)
from paged_decode.snapshot import AS_SAVED
from paged_decode.tiers import HostTier

from ..tiny import dense_greedy, make_engine, preempt
from . import independent_reader
from .forge import build
from .small import assert_same_content, busy, content, make_allocator, make_cache

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]
SALTS = ["mine", b"mine", "", b"", None]
PREFIXES = (
    ([1, 2, 3, 4, 5, 6, 7, 8, 0], 8),
    ([50, 51, 52, 53, 0], 4),
    ([60, 61, 62, 63, 64, 65, 66, 67, 0], 8),
)


@pytest.fixture
def poisoned(tmp_path):
    """An engine's file whose pages hold other keys and values than the model computes."""
    engine = make_engine()
    engine.submit(PROMPT, SamplingParams(max_new_tokens=40))
    engine.step(), engine.step()
    engine.save(tmp_path / "s")
    fields, arrays, _ = independent_reader.read(tmp_path / "s")
    arrays |= {n: -3 * a for n, a in arrays.items() if n.startswith("kv/")}
    (tmp_path / "s").write_bytes(build(fields, arrays))
    return tmp_path / "s"


def answers(engine, **options) -> tuple[int, ...]:
    """What another user of the engine is told."""
    (done,) = engine.generate([PROMPT], SamplingParams(max_new_tokens=6), **options)
    return done.tokens


def test_a_file_that_is_taken_as_it_is_answers_whoever_begins_with_its_tokens(poisoned):
    engine = make_engine()
    engine.restore(poisoned)
    assert answers(engine) != dense_greedy(PROMPT, 6)


@pytest.mark.parametrize("terms", [{"cache_salt": "stranger"}, {"prefix_cache": False}])
def test_on_other_terms_nobody_is_answered_from_its_pages(poisoned, terms):
    engine = make_engine()
    engine.restore(poisoned, **terms)
    before = answers(engine)  # while the stranger's request decodes
    list(engine.stream())  # and when it has ended
    assert before == answers(engine) == dense_greedy(PROMPT, 6)
    assert answers(engine, cache_salt="other") == dense_greedy(PROMPT, 6)
    engine.allocator.check_invariants()


def test_without_prefix_cache_forks_and_preempted_requests_of_the_file_poison_nobody(poisoned):
    engine = make_engine(policies={"tier": HostTier(64)})
    (request,) = engine.restore(poisoned, prefix_cache=False).values()
    engine.fork(request, SamplingParams(max_new_tokens=40))
    engine.step()
    preempt(engine, 0)
    assert engine.tier.num_pages == 0 and engine.stats.swaps == 0
    for _ in range(4):
        engine.step()
    assert answers(engine) == dense_greedy(PROMPT, 6)
    list(engine.stream())
    assert answers(engine) == dense_greedy(PROMPT, 6)
    engine.allocator.check_invariants()


def test_what_the_engine_computes_itself_under_a_salt_of_the_callers_is_found_there(tmp_path):
    engine = make_engine()
    engine.submit(PROMPT, SamplingParams(max_new_tokens=20), cache_salt="theirs", n=2)
    engine.submit([7] * 9, SamplingParams(max_new_tokens=20))
    engine.step()
    engine.save(tmp_path / "s")
    other = make_engine()
    other.restore(tmp_path / "s", cache_salt="mine")
    assert {s.cache_salt for s in (*other.scheduler.running, *other.scheduler.waiting)} == {"mine"}
    assert {s.cache_salt for first in other.scheduler.running for s in first.siblings} <= {"mine"}
    tokens = {}
    for event in list(other.stream()):
        tokens.setdefault((event.request_id, event.sample), []).append(event.token)
    assert tuple(tokens[0, 1]) == dense_greedy(PROMPT, 20)[-len(tokens[0, 1]) :]
    for prompt in (PROMPT, [7] * 9):
        assert other.allocator.match_prefix(prompt, cache_salt="mine") == 8
        assert other.allocator.match_prefix(prompt, cache_salt="theirs") == 0
        assert other.allocator.match_prefix(prompt) == 0


@pytest.mark.parametrize("salt", SALTS, ids=repr)
def test_all_of_a_file_comes_under_the_salt_of_the_call_and_nothing_under_others(tmp_path, salt):
    cache, allocator, handles = busy()
    was = [content(cache, allocator, h) for h in handles]
    save_snapshot(tmp_path / "s", cache, allocator)
    other = make_allocator(24)
    restored = load_snapshot(tmp_path / "s", make_cache(24), other, cache_salt=salt)
    other.check_invariants()
    for handle, expected in zip(restored.handles, was, strict=True):
        assert_same_content(content(restored.cache, other, handle), expected)
        assert (other.sequence(handle).cache_salt, other.sequence(handle).private) == (salt, False)
    for tokens, found in PREFIXES:
        assert other.match_prefix(tokens, cache_salt=salt) == found
        for another in (*SALTS, "tenant", b"x"):
            if another != salt:
                assert other.match_prefix(tokens, cache_salt=another) == 0
    save_snapshot(tmp_path / "again", restored.cache, other)
    last = make_allocator(24)
    load_snapshot(tmp_path / "again", make_cache(24), last)
    assert last.match_prefix(PREFIXES[0][0], cache_salt=salt) == 8


def test_of_two_pages_of_one_prefix_the_first_stays_and_what_followed_the_other_follows_it(
    tmp_path,
):
    cache, allocator = make_cache(24), make_allocator(24)
    for tokens, salt in (([1] * 4, "a"), ([1] * 4 + [2] * 4, "b"), ([1] * 4 + [3] * 4, "c")):
        handle = allocator.allocate(tokens, cache_salt=salt)
        allocator.commit(handle, len(tokens))
        allocator.free(handle)
    kept = allocator.allocate([1] * 4 + [2] * 4, cache_salt="d")
    allocator.commit(kept, 8)
    save_snapshot(tmp_path / "s", cache, allocator)
    other = make_allocator(24)
    restored = load_snapshot(tmp_path / "s", make_cache(24, seed=9), other, cache_salt="x")
    other.check_invariants()
    assert (restored.pages_loaded, restored.pages_dropped) == (5, 2)
    for tail in (2, 3):
        prompt = [1] * 4 + [tail] * 4
        assert other.match_prefix([*prompt, 0], cache_salt="x") == 8
        handle = other.allocate([*prompt, 0], cache_salt="x")
        page = other.sequence(handle).pages[0]
        first = np.array(restored.cache.k_pages[0])[page]
        want = {tuple(np.array(cache.k_pages[0])[p].ravel().view(np.uint32)) for p in range(24)}
        assert tuple(first.ravel().view(np.uint32)) in want
    assert other.tokens(restored.handles[0]).tolist() == [1] * 4 + [2] * 4


def random_life(rng, salts):
    """Sequences of few different tokens, forks, cut and freed ones; and all prompts there were."""
    allocator, handles, prompts = make_allocator(60), [], []
    for _ in range(int(rng.integers(1, 9))):
        prompts.append(rng.integers(0, 2, int(rng.integers(1, 14))).tolist())
        handle = allocator.allocate(prompts[-1], cache_salt=salts[int(rng.integers(len(salts)))])
        allocator.commit(handle, int(rng.integers(len(prompts[-1]) + 1)))
        handles += [handle, *allocator.fork(handle, int(rng.integers(2)))]
    for handle in rng.permutation(handles)[: len(handles) // 2].tolist():
        if rng.integers(2):
            allocator.truncate(handle, int(rng.integers(allocator.sequence(handle).length + 1)))
        else:
            allocator.free(handle)
            handles.remove(handle)
    return allocator, handles, prompts


@pytest.mark.parametrize("num_pages", [60, 0], ids=["room for all", "room for sequences"])
def test_merging_random_salts_keeps_every_sequence_and_every_prefix(tmp_path, num_pages):
    rng, cache = np.random.default_rng(0), make_cache(60)
    salts = [None, "a", b"a", "b"]
    for _ in range(40):
        allocator, handles, prompts = random_life(rng, salts)
        save_snapshot(tmp_path / "s", cache, allocator, handles=handles)
        pages = num_pages or max(2, allocator.export_state(handles)[0].num_owned + 2)
        other = make_allocator(pages)
        into = make_cache(pages), other
        restored = load_snapshot(tmp_path / "s", *into, cache_salt="x")
        other.check_invariants()
        for old, new in zip(handles, restored.handles, strict=True):
            assert allocator.tokens(old).tolist() == other.tokens(new).tolist()
            assert_same_content(content(restored.cache, other, new), content(cache, allocator, old))
        for prompt in prompts if num_pages else ():
            found = max(allocator.match_prefix([*prompt, 0], cache_salt=s) for s in salts)
            assert other.match_prefix([*prompt, 0], cache_salt="x") >= found
        save_snapshot(tmp_path / "again", restored.cache, other)
        last = make_allocator(60)
        load_snapshot(tmp_path / "again", make_cache(60), last)
        last.check_invariants()


def grow(allocator, handle, count: int) -> None:
    for token in range(count):
        allocator.advance([handle], [token])
    allocator.commit(handle, allocator.sequence(handle).length)


def test_a_private_sequence_never_publishes_nor_do_its_forks_and_it_is_exported_to_compute(
    tmp_path,
):
    cache, allocator, handles = busy()
    was = [content(cache, allocator, h) for h in handles]
    save_snapshot(tmp_path / "s", cache, allocator)
    other = make_allocator(40)
    restored = load_snapshot(tmp_path / "s", make_cache(40), other, prefix_cache=False)
    assert restored.pages_dropped == 3 and other.num_evictable == 0
    for old, new, expected in zip(handles, restored.handles, was, strict=True):
        assert_same_content(content(restored.cache, other, new), expected)
        a, b = allocator.sequence(old), other.sequence(new)
        assert (a.computed, a.cache_salt) == (b.computed, b.cache_salt)
        assert b.private and not a.private
    children = other.fork(restored.handles[0], 2)
    for handle in (*restored.handles, *children):
        grow(other, handle, 9)
        assert other.sequence(handle).private
        other.check_invariants()
    other.truncate(children[0], 5)
    grow(other, children[0], 6)
    other.check_invariants()
    everyone = [other.tokens(h).tolist() for h in (*restored.handles, *children)]
    for tokens in everyone:
        assert all(
            other.match_prefix([*tokens, 0], cache_salt=s) == 0 for s in (None, "tenant", b"x")
        )
    state, _ = other.export_state()
    assert not state.computed.any() and len(state.entry_pages) == 0
    save_snapshot(tmp_path / "again", restored.cache, other)
    last = make_allocator(60)
    again = load_snapshot(tmp_path / "again", make_cache(60), last)
    assert [last.tokens(h).tolist() for h in again.handles] == everyone
    assert not any(last.sequence(h).computed or last.sequence(h).private for h in again.handles)
    other.free([*restored.handles, *children])
    assert (other.num_evictable, other.num_used) == (0, 0)
    other.check_invariants()


def test_a_row_that_is_used_again_is_not_private(tmp_path):
    cache, allocator, (a, *_) = busy()
    export_sequence(tmp_path / "s", cache, allocator, a)
    other = make_allocator(24)
    options = dict(cache_salt="x", prefix_cache=False)
    handle = import_sequence(tmp_path / "s", make_cache(24), other, **options).handle
    assert (other.sequence(handle).cache_salt, other.sequence(handle).private) == ("x", True)
    other.free(handle)
    handle = other.allocate([1, 2, 3, 4, 5], cache_salt="x")
    other.commit(handle, 5)
    assert other.match_prefix([1, 2, 3, 4, 5], cache_salt="x") == 4
    other.check_invariants()


def test_the_host_tier_keeps_nothing_of_a_private_sequence_and_gives_it_nothing(tmp_path):
    cache, allocator = make_cache(24), make_allocator(24)
    handle = allocator.allocate([1, 2, 3, 4, 5, 6])
    allocator.commit(handle, 6)
    tier = HostTier(16)
    assert tier.store(cache, allocator, handle) == 2
    tier.settle()
    save_snapshot(tmp_path / "s", cache, allocator)
    fields, arrays, _ = independent_reader.read(tmp_path / "s")
    arrays = arrays | {"sequence/computed": np.zeros(1, np.int64)}
    (tmp_path / "s").write_bytes(build(fields, arrays))
    other = make_allocator(24)
    restored = import_sequence(tmp_path / "s", make_cache(24), other, prefix_cache=False)
    cache, private = restored.cache, restored.handle
    assert tier.load(cache, other, private) is cache
    assert other.sequence(private).computed == 0
    other.commit(private, 6)
    fresh = HostTier(16)
    assert fresh.store(cache, other, private) == 0
    fresh.settle()
    fresh.check_invariants()
    assert fresh.num_pages == 0


def test_terms_that_are_none_are_refused_before_the_file_is_opened(tmp_path):
    into = make_cache(9), make_allocator(9)
    for error, terms in (
        (TypeError, {"cache_salt": 5}),
        (ValueError, {"cache_salt": "\ud800"}),
        (TypeError, {"prefix_cache": None}),
    ):
        with pytest.raises(error, match="cache_salt|prefix_cache"):
            load_snapshot(tmp_path / "none", *into, **terms)
        with pytest.raises(error, match="cache_salt|prefix_cache"):
            import_sequence(tmp_path / "none", *into, **terms)
        with pytest.raises(error, match="cache_salt|prefix_cache"):
            make_engine().restore(tmp_path / "none", **terms)
    with pytest.raises(FileNotFoundError):
        load_snapshot(tmp_path / "none", *into, cache_salt=AS_SAVED, prefix_cache=True)


def test_cached_pages_cannot_come_with_private_sequences():
    _, allocator, _ = busy()
    state, _ = allocator.export_state()
    other = BlockAllocator(24, 4)
    pages = other.allocate_pages(state.num_pages)
    with pytest.raises((ValueError, PageTableError), match="cached pages cannot be private"):
        other.import_state(state, pages, private=True)
    other.free_pages(pages)
    other.check_invariants()
