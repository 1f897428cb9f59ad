"""Prefix hits over groups of layers: full entries, and the companions that windows need."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from paged_decode.allocator import (
    BlockAllocator,
    CacheLayout,
    OutOfPages,
    PageSpec,
    PageState,
    ShardedAllocator,
)
from paged_decode.allocator.prompt import as_key
from paged_decode.allocator.windows import most_pages
from paged_decode.policies import FIFO, LFU, SLRU, CostAware, Priority

from .programs import Device, Program, layout, longest_hit
from .test_interrupts import interrupted

ROOT = Path(__file__).parents[2]
S = 4


def books(allocator):
    (found,) = allocator._shards
    return found


def queue(allocator):
    """The order of eviction in the window's pool."""
    return books(allocator).others[0].pool.cache.eviction


def entries(allocator, tokens) -> list:
    """Those of the leading full pages of `tokens`."""
    return books(allocator).match(as_key(tokens, None)).entries


def have(allocator, tokens, group: int = 1) -> list[int]:
    """The columns of `tokens` that have companions."""
    pages = books(allocator).groups[group].pool.cache.pages
    return [at for at, entry in enumerate(entries(allocator, tokens)) if entry.serial in pages]


def keep_only(allocator, tokens, columns, group: int = 1) -> None:
    """Let these columns alone have companions."""
    for column, entry in enumerate(entries(allocator, tokens)):
        if column not in columns:
            books(allocator).groups[group].pool.drop(entry)
    allocator.check_invariants()


def compute(allocator, handle, end: int, chunk: int = 4) -> None:
    """As a prefill does: pages for a chunk, its program, commit, and the next."""
    done = allocator.sequence(handle).computed
    while done < end:
        done = min(done + chunk, end)
        allocator.prepare([handle], done)
        allocator.commit([handle], done)


def computed(allocator, tokens, chunk: int = 4) -> int:
    """A new sequence of them, computed to the end."""
    handle = allocator.allocate(tokens, chunk=chunk)
    compute(allocator, handle, len(tokens), chunk)
    return handle


def once(allocator, tokens, chunk: int = 4) -> int:
    """Compute them and free the sequence; returns how many tokens were found."""
    handle = computed(allocator, tokens, chunk)
    found = allocator.sequence(handle).cached
    allocator.free(handle)
    allocator.check_invariants()
    return found


def flush(allocator, group: int, but: int = 0) -> None:
    """Evict what a pool has cached, or all but so many pages."""
    pool = books(allocator).groups[group].pool
    if (count := pool.cache.num_evictable - but) > 0:
        pool._push(np.array(pool.cache.evict(count), np.int32))
    allocator.check_invariants()


# ---- the rule of hits


@pytest.mark.parametrize(
    "window, kept, served",
    [(6, {1, 2, 4}, 3), (5, {1, 2, 4}, 5), (1, set(), 5), (6, {0}, 1), (6, set(), 0)],
)
def test_a_hit_ends_where_every_window_has_what_its_next_query_sees(window, kept, served):
    allocator, text = BlockAllocator(layout(window, S)), list(range(21))
    once(allocator, text)
    keep_only(allocator, text, kept)
    assert len(entries(allocator, text)) == 5
    assert allocator.match_prefix(text) == longest_hit(allocator, text) == 4 * served
    handle = allocator.allocate(text, chunk=3)
    info, need = allocator.sequence(handle), -(-(window - 1) // S)
    assert (info.cached, info.computed) == (4 * served, 4 * served)
    assert info.groups[1].first == max(0, served - need)
    assert len(info.groups[1].pages) == min(need, served) + 1  # and one for 3 tokens behind them
    assert allocator.stats(1).prefix_hit_tokens == 4 * served
    compute(allocator, handle, 21, 3)


def test_a_second_group_that_sees_all_needs_every_column():
    one = dict(num_kv_heads=1, head_dim=8, num_pages=40)
    groups = (PageSpec((0,), **one), PageSpec((1,), **one), PageSpec((2,), window=6, **one))
    allocator, text = BlockAllocator(CacheLayout(S, groups)), list(range(25))
    once(allocator, text)
    assert allocator.match_prefix(text) == 24
    keep_only(allocator, text, {0, 1, 2, 4, 5}, group=1)
    assert allocator.match_prefix(text) == longest_hit(allocator, text) == 12
    assert once(allocator, text) == 12  # and heals what was missing
    assert allocator.match_prefix(text) == 24
    keep_only(allocator, text, {0, 1, 3, 4}, group=2)
    assert allocator.match_prefix(text) == longest_hit(allocator, text) == 20
    info = allocator.sequence(allocator.allocate(text))
    assert [(held.first, len(held.pages)) for held in info.groups] == [(0, 7), (0, 7), (3, 4)]
    allocator.check_invariants()


def test_what_is_found_counts_as_taken_where_nobody_has_it():
    window, text = 6, list(range(21))
    allocator = BlockAllocator(layout(window, S, pages=1 + 5))
    once(allocator, text)  # two cached pages before the last one, which is free
    keeper = computed(allocator, range(100, 108))
    assert allocator.stats(1).used == 2 and allocator.match_prefix(text) == 20
    with pytest.raises(OutOfPages) as caught:
        allocator.allocate([*text, *range(21, 40)], chunk=8)
    assert (caught.value.group, caught.value.needed) == (1, 2 + 2)
    allocator.check_invariants()
    assert allocator.match_prefix(text) == 20  # what is refused has changed nothing
    handle = allocator.allocate(text, chunk=4)
    assert allocator.sequence(handle).cached == 20 and allocator.stats(1).used == 5
    allocator.free([keeper, handle])


def test_a_sequence_goes_to_the_shard_that_serves_most_of_it():
    allocator = ShardedAllocator(layout(6, S, pages=80, full=200), num_shards=2)
    text = list(range(41))
    long = allocator.allocate(text, chunk=4)
    compute(allocator, long, 41)
    short = allocator.allocate(text[:21], chunk=4)
    assert allocator.shard_of(short) == allocator.shard_of(long)
    allocator.free([long, short])
    home = allocator._shards[0] if allocator.match_prefix(text) == 40 else None
    assert home is not None
    for entry in home.match(as_key(text, None)).entries:
        home.others[0].pool.drop(entry)
    assert allocator.match_prefix(text) == 0
    other = allocator.allocate(text, chunk=4)
    assert allocator.sequence(other).cached == 0
    allocator.check_invariants()


# ---- what is published, and what of it is forgotten


def test_an_entry_that_is_evicted_takes_its_companions_at_once():
    allocator, text = BlockAllocator(layout(6, S, full=30)), list(range(21))
    once(allocator, text)
    stats = allocator.stats(1)
    assert (stats.published, stats.evictable, stats.used) == (5, 5, 0)
    raw = allocator.allocate_pages(allocator.num_free + 2)  # the two deepest entries go
    assert (allocator.stats(1).published, allocator.match_prefix(text)) == (3, 12)
    assert have(allocator, text) == [0, 1, 2]
    allocator.free_pages(raw)
    allocator.reset_prefix_cache()
    assert allocator.stats(1).published == allocator.stats(1).evictable == 0
    allocator.check_invariants()


def test_an_evicted_companion_leaves_the_entry_which_heals_when_it_is_computed_again():
    allocator, text = BlockAllocator(layout(6, S)), list(range(21))
    once(allocator, text)
    flush(allocator, 1)
    assert (len(entries(allocator, text)), allocator.match_prefix(text)) == (5, 0)
    assert once(allocator, text) == 0
    assert have(allocator, text) == [0, 1, 2, 3, 4] and allocator.match_prefix(text) == 20


def test_of_two_that_compute_the_same_one_publishes():
    allocator, text = BlockAllocator(layout(6, S)), list(range(21))
    first, second = (allocator.allocate(text, chunk=4) for _ in range(2))
    for end in (4, 8, 12, 16, 20, 21):
        for handle in (first, second):
            allocator.prepare([handle], end)
        allocator.commit([first, second], end)
        allocator.check_invariants()
    assert allocator.stats(1).published == 5
    allocator.free(first)
    allocator.free(second)
    assert (allocator.stats(1).evictable, allocator.match_prefix(text)) == (5, 20)


def test_a_row_lives_on_when_the_entries_that_its_pages_go_with_are_evicted():
    """Its own pages of the first group are not those of the entries, which it found published."""
    allocator, text = BlockAllocator(layout(10, S, full=24)), list(range(21))
    once(allocator, text)
    flush(allocator, 1)
    handle = computed(allocator, text)
    held = allocator.sequence(handle).groups[1]
    assert [len(have(allocator, text)), allocator.stats(1).published] == [5, 5]
    raw = allocator.allocate_pages(allocator.num_free + allocator.num_evictable)
    assert allocator.stats(1).published == 0 and allocator.match_prefix(text) == 0
    assert allocator.sequence(handle).groups[1] == held
    allocator.check_invariants()
    allocator.free_pages(raw)
    allocator.append([handle], [[21, 22, 23]])
    allocator.commit([handle], 24)  # publishes its own pages, and what it holds of the window
    assert len(entries(allocator, range(30))) == 6
    assert have(allocator, range(30)) == [3, 4, 5]
    assert allocator.match_prefix(range(30)) == 24
    allocator.check_invariants()


def test_an_entry_that_takes_the_place_of_another_has_companions_of_its_own():
    """The same tokens behind a parent that was evicted and computed anew."""
    allocator, text = BlockAllocator(layout(6, S), eviction=FIFO()), list(range(13))
    once(allocator, text)
    first, second, third = entries(allocator, text)
    books(allocator).main.pool.unpublish(first.page)
    allocator.check_invariants()
    assert allocator.match_prefix(text) == 0 and allocator.stats(1).published == 2
    once(allocator, text)
    assert have(allocator, text) == [0, 1, 2] and allocator.stats(1).published == 3
    assert not {first.serial, second.serial, third.serial} & {
        entry.serial for entry in entries(allocator, text)
    }


def test_a_page_that_is_written_again_goes_with_no_entry():
    device, text = None, list(range(20))
    allocator = BlockAllocator(layout(10, S))
    device = Device(allocator)
    handle = allocator.allocate(text)
    device.run(allocator.batch([handle], 0, 20, tokens_per_row=20), [text])
    allocator.commit([handle], 20)
    (twin,) = allocator.fork(handle)
    allocator.truncate(handle, 18)  # into a page that the other one has, too: it stays
    assert have(allocator, [*text, 0]) == [0, 1, 2, 3, 4]
    allocator.free(twin)  # and its owner writes in place
    new = [*text[:18], 70, 71, 72]
    device.copy(allocator.append(handle, new[18:]))
    allocator.check_invariants()
    assert allocator.match_prefix([*text, 0]) == 16
    device.run(allocator.batch([handle], 18, 21, tokens_per_row=3), [new])
    allocator.commit([handle], 21)
    for prompt, found in ((new, 20), ([*text, 0], 16)):
        other = allocator.allocate(prompt)
        assert allocator.sequence(other).cached == found
        batch = allocator.batch([other], found, len(prompt), tokens_per_row=8)
        device.run(batch, [prompt])
        allocator.free(other)
    allocator.check_invariants()


def test_a_truncated_page_without_another_owner_leaves_both_groups():
    allocator, text = BlockAllocator(layout(10, S)), list(range(20))
    handle = computed(allocator, text)
    allocator.truncate(handle, 18)
    assert have(allocator, [*text, 0]) == [0, 1, 2, 3] and allocator.stats(1).published == 4
    allocator.check_invariants()


def test_forks_that_diverge_hang_pages_of_their_own_on_entries_of_their_own():
    allocator, text = BlockAllocator(layout(6, S)), list(range(10))
    handle = computed(allocator, text)
    (twin,) = allocator.fork(handle)
    allocator.append([handle, twin], [[20, 21, 22], [30, 31, 32]])
    allocator.commit([handle, twin], 13)
    allocator.check_invariants()
    allocator.free([handle, twin])
    assert allocator.stats(1).published == 4
    for middle in ([20, 21], [30, 31]):
        assert allocator.match_prefix([*text, *middle, 0]) == 12


def test_a_chunk_of_more_than_the_window_is_published_and_then_passed():
    allocator, text = BlockAllocator(layout(6, S)), list(range(41))
    handle = allocator.allocate(text, chunk=40)
    allocator.commit(handle, 40)
    stats = allocator.stats(1)
    assert (stats.used, stats.evictable, stats.published) == (2, 8, 10)
    assert allocator.match_prefix(text[:21]) == 20
    allocator.check_invariants()


def test_withdrawn_sequences_leave_no_companion_that_they_may_have_made():
    allocator, text = BlockAllocator(layout(6, S)), list(range(41))
    good = computed(allocator, text)
    flush(allocator, 1)  # what it passed
    bad = computed(allocator, text)  # finds nothing, and hangs its pages on the other's entries
    assert have(allocator, text) == list(range(10))
    allocator.withdraw(bad)
    assert have(allocator, text) == [] and len(entries(allocator, text)) == 10
    allocator.free([bad, good])
    allocator.check_invariants()
    assert allocator.stats(1).evictable == 0 and allocator.match_prefix(text) == 0


def test_new_weights_and_a_reset_leave_no_companion():
    allocator, text = BlockAllocator(layout(6, S)), list(range(41))
    once(allocator, text)
    handle = computed(allocator, text[:30])
    allocator.new_weights(b"next")
    assert allocator.stats(1).published == 0 and allocator.sequence(handle).private
    compute(allocator, handle, 30)
    allocator.append([handle], [range(8)])
    allocator.commit([handle], 38)
    assert allocator.stats(1).published == 0
    allocator.free(handle)
    once(allocator, text)
    assert allocator.reset_prefix_cache()
    assert allocator.stats(1).free == allocator.stats(1).usable
    allocator.check_invariants()


def test_without_a_prefix_cache_pages_that_were_passed_are_free():
    allocator = BlockAllocator(layout(6, S), prefix_cache=False)
    handle = computed(allocator, range(41))
    assert (allocator.stats(1).evictable, allocator.match_prefix(range(41))) == (0, 0)
    allocator.free(handle)
    assert allocator.stats(1).free == allocator.stats(1).usable


def test_a_copy_whose_other_owner_passes_the_page_in_the_same_call_loses_no_page():
    for cache in (False, True):
        allocator = BlockAllocator(layout(6, S), prefix_cache=cache)
        one = allocator.allocate(range(8))
        allocator.commit(one, 8)
        (two,) = allocator.fork(one)
        allocator.truncate(two, 6)
        allocator.append([one], [range(12)])
        allocator.batch([one], 8, 20, tokens_per_row=12)
        allocator.advance([one, two], [1, 2], commit=True)
        allocator.check_invariants()


# ---- the order of eviction


def turn(allocator, text: list[int], answer: list[int], chunk: int) -> int:
    """A prompt and its answer, as a chat has them; returns how many tokens were found."""
    handle = computed(allocator, text, chunk)
    found = allocator.sequence(handle).cached
    for token in answer:
        allocator.advance([handle], [token], commit=True)
    allocator.free(handle)  # the last token is not computed
    return found


def pool_of(window: int, chunk: int, tails: int, rank=None) -> BlockAllocator:
    """Room for one row at a time, and so many tails."""
    pages = 1 + most_pages(window, chunk, S) + tails * -(-(window - 1) // S)
    return BlockAllocator(layout(window, S, pages=pages, full=12_000), eviction=rank)


@pytest.mark.parametrize("window, rank", [(6, None), (8, SLRU()), (31, None), (31, LFU())])
def test_every_second_turn_of_eight_chats_hits_and_a_long_prompt_costs_one_tail(window, rank):
    rng, chunk = np.random.default_rng(window), 64
    allocator = pool_of(window, chunk, 8, rank)
    texts = [rng.integers(0, 1000, 10 * window).tolist() for _ in range(8)]
    for visit in range(3):
        missed = 0
        for text in texts:
            full = (len(text) - 1) // S if visit else 0  # of what was computed
            text += rng.integers(0, 1000, int(rng.integers(1, 2 * window))).tolist()
            answer = rng.integers(0, 1000, int(rng.integers(1, 2 * window))).tolist()
            missed += turn(allocator, text, answer, chunk) < 0.95 * full * S
            text += answer
        assert missed <= (visit == 2)
        allocator.check_invariants()
        if visit == 1:
            turn(allocator, rng.integers(0, 1000, 32_768).tolist(), [1], chunk)
    assert allocator.stats(1).evictions > 100


@pytest.mark.parametrize("rank", [None, LFU()])
def test_what_prompts_have_in_common_hits_from_its_third_use_however_far_it_lies_behind(rank):
    rng, window, chunk = np.random.default_rng(0), 30, 16
    allocator = pool_of(window, chunk, 3, rank)
    system = rng.integers(0, 1000, 200).tolist()
    found = []
    for _ in range(6):
        question, answer = rng.integers(0, 1000, (2, 200)).tolist()
        found.append(turn(allocator, system + question, answer[:40], chunk))
        turn(allocator, answer + question, [1], chunk)  # of another one, in between
    assert found == [0, 0, 200, 200, 200, 200]


def test_it_is_kept_from_the_second_use_where_that_finds_it_among_passed_pages():
    allocator, text = BlockAllocator(layout(6, S)), list(range(60))
    once(allocator, text)
    assert turn(allocator, [*text[:20], *range(100, 140)], [1], 4) == 20  # passed ones
    flush(allocator, 1, but=2 + 2 + 2)  # tails of two that ended, and the branch
    assert allocator.match_prefix([*text[:20], 7]) == 20
    assert allocator.match_prefix([*text, 7]) == 60


def test_passed_pages_go_before_tails_and_of_these_the_oldest_as_a_whole():
    allocator = BlockAllocator(layout(10, S))
    texts = [list(range(at, at + 25)) for at in (100, 200, 300)]
    for text in texts:
        once(allocator, text)  # three pages of a tail each, behind three that were passed
    order = queue(allocator).order()
    assert len(order) == 18 and all(map(queue(allocator).has_passed, order[:9]))
    assert not any(map(queue(allocator).has_passed, order[9:]))
    served = []
    for left in range(18, -1, -1):
        flush(allocator, 1, but=left)
        served.append([allocator.match_prefix(text) for text in texts])
    assert served[9] == [24, 24, 24]
    assert served[10:] == [[0, 24, 24]] * 3 + [[0, 0, 24]] * 3 + [[0, 0, 0]] * 3


def test_what_was_passed_since_the_last_page_began_belongs_to_the_tail():
    """Of 23 tokens the window of 6 needs two pages for the sixth column, and holds one of them."""
    allocator, text = BlockAllocator(layout(6, S)), list(range(23))
    handle = computed(allocator, text)
    assert allocator.sequence(handle).groups[1].first == 4
    twins = allocator.fork(handle, 2)
    allocator.free(twins)
    allocator.free(handle)
    flush(allocator, 1, but=2)
    assert have(allocator, text) == [3, 4] and allocator.match_prefix(text) == 20


def test_the_order_of_tails_stays_small_however_often_one_is_used():
    allocator, text = BlockAllocator(layout(6, S)), list(range(21))
    once(allocator, text)
    for _ in range(200):
        assert once(allocator, text) == 20
    assert len(queue(allocator)._heap) < 70


def test_forks_that_end_together_leave_one_tail():
    allocator, text = BlockAllocator(layout(6, S)), list(range(23))
    handle = computed(allocator, text)
    allocator.free([handle, *allocator.fork(handle, 2)])
    allocator.check_invariants()
    flush(allocator, 1, but=2)
    assert allocator.match_prefix(text) == 20


def test_a_rank_is_asked_of_a_tail_as_a_whole():
    class Asks(LFU):
        def rank(self, page):
            asked.append(page)
            return super().rank(page)

    asked: list = []
    allocator = BlockAllocator(layout(10, S), eviction=Asks())
    once(allocator, range(25))
    ours, theirs = asked[:6], asked[6:]
    assert [page.depth for page in ours] == [5, 4, 3, 2, 1, 0]
    assert [page.depth for page in theirs] == [5]


@pytest.mark.parametrize("rank", [Priority(), None])
def test_a_priority_of_full_pages_is_that_of_their_companions(rank):
    allocator = BlockAllocator(layout(10, S), eviction=rank)
    first, later = list(range(100, 125)), list(range(200, 225))
    handle = computed(allocator, first)
    allocator.prioritize(allocator.sequence(handle).pages, 5)
    allocator.free(handle)
    once(allocator, later)
    flush(allocator, 1, but=3)
    assert [allocator.match_prefix(text) for text in (first, later)] == (
        [24, 0] if rank else [0, 24]
    )
    if rank:
        pages = [entry.page for entry in entries(allocator, first)]
        once(allocator, later)
        allocator.prioritize(pages, -1)  # of what is cached already
        flush(allocator, 1, but=3)
        assert [allocator.match_prefix(text) for text in (first, later)] == [0, 24]


def test_a_rank_that_raises_changes_nothing_in_any_group():
    class Fuse(LFU):
        left = 0

        def rank(self, page):
            Fuse.left -= 1
            if Fuse.left == 0:
                raise ArithmeticError
            return super().rank(page)

    allocator, text = BlockAllocator(layout(10, S), eviction=Fuse()), list(range(25))
    once(allocator, text)
    once(allocator, [*text[:16], *range(50, 75)])
    handle = computed(allocator, [*text[:16], *range(80, 92)])

    def state():
        return allocator.stats(), allocator.stats(1), queue(allocator).order(), allocator.handles

    calls = (
        lambda: allocator.allocate([*text[:16], 1, 2, 3]),  # a branch
        lambda: allocator.prioritize(range(40), 3),
        lambda: allocator.free(handle),
    )
    for call in calls:
        before, tries = state(), 0
        while True:
            Fuse.left, tries = tries + 1, tries + 1
            try:
                call()
                break
            except ArithmeticError:
                assert state() == before
                allocator.check_invariants()
        Fuse.left = 0
        assert tries > 1


def test_states_and_counts_are_those_of_each_group():
    allocator = BlockAllocator(layout(6, S, pages=9))
    handle = computed(allocator, range(25))
    states = Counter(allocator.page_states(1).tolist())
    stats = allocator.stats(1)
    assert states[PageState.CACHED] == stats.evictable == 5
    assert states[PageState.OWNED] == stats.used == 2
    assert stats.published == 6 and stats.free == states[PageState.FREE] == 1
    allocator.free(handle)


# ---- calls that are cut off, and random programs


def crowded(shards: int):
    """Small pools, with all that companions can be in: held, passed, in tails and branches."""
    sizes = layout(6, S, pages=17 * shards, full=26 * shards)
    allocator = ShardedAllocator(sizes, num_shards=shards) if shards > 1 else BlockAllocator(sizes)
    device, prompts = Device(allocator), [list(range(at, at + 19)) for at in (0, 100)]
    prompts += [[*prompts[0][:9], *range(50, 60)], [*prompts[0][:9], *range(70, 80)]]

    def fill(handle, text) -> None:
        for begin in range(allocator.sequence(handle).computed, len(text), 8):
            end = min(begin + 8, len(text))
            device.copy([each.copies for each in allocator.prepare([handle], end)])
            device.run(allocator.batch([handle], begin, end, tokens_per_row=8), [text])
            allocator.commit([handle], end)

    live = []
    for text in prompts:
        handle = allocator.allocate(text, chunk=8)
        fill(handle, text)
        if len(live) < 2 and text is not prompts[0]:
            live.append(handle)
        else:
            allocator.free(handle)
    live.append(allocator.allocate([*prompts[1][:17], 1, 2, 3, 4, 5, 6], chunk=8))
    return allocator, device, prompts, live, fill


CALLS = {
    "allocate": lambda a, h: a.allocate([*range(9), *range(200, 230)], chunk=8),
    "advance": lambda a, h: a.advance(h[:2], [1, 2], commit=True),
    "prepare": lambda a, h: a.prepare(h, 32),
    "commit": lambda a, h: a.commit(h, [19, 19, 23]),
    "fork": lambda a, h: a.fork(h[0], 2),
    "truncate": lambda a, h: a.truncate(h[:2], 18),
    "free": lambda a, h: a.free(h),
    "withdraw": lambda a, h: a.withdraw(h[:2]),
    "allocate_pages": lambda a, h: a.allocate_pages(a.num_free + 3),
    "new_weights": lambda a, h: a.new_weights(b"next"),
    "prioritize": lambda a, h: a.prioritize(range(20), 3),
}


def cut_off(shards: int, step: int) -> None:
    """Every call, before each `step`th of its lines in turn."""
    for name, call in CALLS.items():
        at, torn = 0, True
        while torn:
            allocator, device, prompts, live, fill = crowded(shards)
            torn = interrupted(lambda a=allocator, h=live, call=call: call(a, h), at)
            try:
                go_on(allocator, prompts, fill)
            except Exception as error:
                raise SystemExit(f"{name}, cut off before line {at}: {error!r}") from error
            at += step
        assert at > 20, name


def go_on(allocator, prompts, fill) -> None:
    """All is consistent, and whatever is found holds the tokens that every query sees."""
    allocator.check_invariants()
    allocator.free(list(allocator.handles))
    allocator.check_invariants()
    assert allocator.stats(1).used == 0
    for text in prompts:
        expected = longest_hit(allocator, text)
        assert allocator.match_prefix(text) == expected
        if allocator.num_free + allocator.num_evictable > 8:
            handle = allocator.allocate(text, chunk=8)
            assert allocator.sequence(handle).cached == expected
            fill(handle, text)
            allocator.free(handle)


def in_a_process(*arguments: object) -> None:
    """With types checked at every call, as they are here, it would take ten times as long."""
    command = [sys.executable, "-m", __name__, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "shards, step",
    [(1, 11), *(pytest.param(*case, marks=pytest.mark.long) for case in [(1, 3), (2, 7)])],
)
def test_calls_that_are_cut_off_anywhere_leave_hits_that_are_true(shards, step):
    in_a_process("calls", shards, step)


@pytest.mark.parametrize("first", [0, pytest.param(20, marks=pytest.mark.long)])
def test_random_programs_find_what_the_rule_says_and_read_their_own_tokens(first):
    in_a_process("programs", first, first + 20)


def test_so_they_do_when_all_digests_collide_and_types_are_checked():
    for seed in range(2):
        Program(seed, digest=lambda key, payload: b"").run(50)


def programs(first: int, last: int) -> None:
    ranks = (None, LFU(), CostAware(), Priority(), FIFO())
    total: Counter[str] = Counter()
    for seed in range(first, last):
        rank = ranks[seed % 5]
        total += Program(seed, shards=1 + seed % 2, eviction=rank, hash_key=b"k").run(150)
    assert min(total[name] for name in ("refused", "passed", "hits", "evictions")) > 100


if __name__ == "__main__":
    {"calls": cut_off, "programs": programs}[sys.argv[1]](int(sys.argv[2]), int(sys.argv[3]))
