"""The bookkeeping of several groups as plain arrays: out of one allocator, and into another."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from paged_decode.allocator import (
    BlockAllocator,
    CacheLayout,
    GroupState,
    OutOfPages,
    PageSpec,
    PageTableError,
    check_state,
)
from paged_decode.allocator.prefix import blake2b_digest
from paged_decode.allocator.regrouping import regrouped

from .programs import Program, Refused, layout
from .test_calls import Fuse, at_every_call
from .test_companions import S, computed, once
from .test_faults import refuses
from .test_interrupts import interrupted


def lived(seed: int, moves: int = 150) -> Program:
    """A random program that is stopped in the middle."""
    program = Program(seed, hash_key=b"k")
    often = [program.allocate, program.prefill, program.prefill, program.step]
    seldom = [program.append, program.fork, program.truncate, program.free, program.end]
    for _ in range(moves):
        move = (often + often + seldom)[int(program.rng.integers(13))]
        try:
            if program.texts or move == program.allocate:
                move()
        except Refused:
            if len(program.texts) > 2:
                program.free()
    return program


def taken(allocator, state) -> list[list[int]]:
    """Raw pages of every group for a state."""
    counts = [state.num_pages, *(group.num_pages for group in state.groups)]
    return [allocator.allocate_pages(n, group=i) for i, n in enumerate(counts)]


def into(state, *, full: int = 4096, pages: int = 4096) -> tuple[BlockAllocator, list]:
    """An allocator of the state's windows, and the handles of its sequences there."""
    kinds = dict(num_kv_heads=1, head_dim=8)
    specs = [PageSpec((), num_pages=full, **kinds)]
    for layer, group in enumerate(state.groups):
        specs.append(PageSpec((layer,), num_pages=pages, window=group.window, **kinds))
    allocator = BlockAllocator(CacheLayout(state.page_size, tuple(specs)), hash_key=b"k")
    handles = allocator.import_state(state, taken(allocator, state))
    allocator.check_invariants()
    return allocator, handles


def arrays(state) -> list[list]:
    """Everything that a state says, to be compared."""
    names = ("lengths", "computed", "cached", "salts", "table", "entry_pages", "entry_parents")
    found = [getattr(state, name).tolist() for name in (*names, "evictable", "tokens")]
    for g in state.groups:
        found += [[g.window, g.num_pages, g.num_passed], g.first.tolist(), g.end.tolist()]
        found += [a.tolist() for a in (g.table, g.entries, g.entry_pages, g.evictable)]
    return found


def few_of(count: int) -> list[object]:
    """Seeds, all but ten of them for CI."""
    return [*range(10), *(pytest.param(s, marks=pytest.mark.long) for s in range(10, count))]


@pytest.mark.parametrize("seed", few_of(40))
def test_random_lives_go_on_in_another_allocator_with_the_same_hits(seed):
    program = lived(seed)
    old = program.allocator
    state, where = old.export_state()
    check_state(state)
    assert [len(where.pages), len(where.groups[0].pages)] == [
        state.num_pages,
        state.groups[0].num_pages,
    ]
    new, handles = into(state)
    again = new.export_state(handles)[0]
    if len(again.entry_pages) == len(state.entry_pages):  # else what was lost is published again
        assert arrays(again) == arrays(state)
    for number, after in enumerate(handles):
        info, its = new.sequence(after), state.groups[0]
        assert info.computed == state.computed[number]
        assert info.groups[1].first == its.first[number]
        assert len(info.groups[1].pages) == its.page_counts[number]
    for text in (*program.texts.values(), *program.starts):
        if text:
            assert new.match_prefix(text) >= old.match_prefix(text)
    new.free(handles)
    new.check_invariants()
    assert new.stats(0).used == new.stats(1).used == 0


@pytest.mark.parametrize("seed", few_of(30))
def test_what_is_left_of_a_state_keeps_every_rule(seed):
    """Without entries, under one salt, in less room, cut to narrower windows, in more groups."""
    state, _ = lived(seed).allocator.export_state()
    window, rng = state.groups[0].window, np.random.default_rng(seed)
    smaller = [state.without_entries(), state.under(b"sx")]
    for _ in range(4):
        smaller.append(state.fit(*rng.integers(0, [state.num_pages + 2, 30]).tolist()))
    narrow = [1, max(1, window // 2), window]
    smaller += [regrouped(state, [(1, each), (0, 5), (0, None)]) for each in narrow]
    for each, kept in smaller:
        check_state(each)
        counts = [each.num_pages, *(group.num_pages for group in each.groups)]
        assert [len(pages) for pages in kept] == counts
        if each.num_pages:
            allocator, handles = into(each)
            assert [allocator.tokens(h).tolist() for h in handles] == [
                tokens.tolist() for tokens in each.sequence_tokens()
            ]


def test_a_window_never_becomes_wider():
    state, _ = lived(1).allocator.export_state()
    for window in (None, state.groups[0].window + 1):
        with pytest.raises(ValueError, match="cannot become"):
            regrouped(state, [(1, window)])


def busy(**options) -> tuple[BlockAllocator, list[int]]:
    """A fork, a row in mid-prompt, cached tails and passed pages."""
    allocator = BlockAllocator(layout(6, S, pages=60, full=60), hash_key=b"k", **options)
    for first in (40, 60, 80):
        once(allocator, [*range(9), *range(first, first + 10)])
    live = [computed(allocator, range(17))]
    live += allocator.fork(live[0])
    live.append(allocator.allocate(range(100, 120), chunk=8))
    return allocator, live


def test_an_import_of_groups_comes_whole_or_not_at_all():
    old, live = busy()
    state, _ = old.export_state()
    fuse = Fuse(blake2b_digest)
    new = BlockAllocator(
        layout(6, S, pages=80, full=80), hash_key=b"k", digest=fuse.digest, eviction=fuse
    )
    once(new, [*range(9), *range(40, 50)])  # some of it is here already
    pages = taken(new, state)
    tries, handles = at_every_call(new, fuse, lambda: new.import_state(state, pages))
    assert tries > 5
    assert [new.tokens(h).tolist() for h in handles] == [old.tokens(h).tolist() for h in live]
    new.check_invariants()
    assert new.match_prefix([*range(9), *range(80, 90), 0]) == 16


@pytest.mark.parametrize("begin", [0, 7, 13])
def test_an_import_that_is_cut_off_anywhere_is_repaired(begin):
    old, _ = busy()
    state, _ = old.export_state()
    for at in range(begin, 10**6, 19):
        new = BlockAllocator(layout(6, S, pages=80, full=80), hash_key=b"k")
        mine = computed(new, range(10))
        pages = taken(new, state)
        torn = interrupted(lambda a=new, p=pages: a.import_state(state, p), at)
        new.check_invariants()
        others = [h for h in new.handles if h != mine]
        assert len(others) in (0, 3) and new.tokens(mine).tolist() == [*range(10)]
        for handle in others:
            assert new.sequence(handle).length in (17, 20)
        new.free(new.handles)
        new.check_invariants()
        if not torn:
            return


def test_pages_of_another_group_or_of_none_are_refused_whole():
    old, _ = busy()
    state, _ = old.export_state()
    new = BlockAllocator(layout(6, S, pages=80, full=80))
    pages = taken(new, state)
    for bad, error in (
        (pages[:1], ValueError),
        ([pages[0], pages[1][:-1]], ValueError),
        ([pages[0], [*pages[1][:-1], 79]], PageTableError),
        ([pages[0], [*pages[1][:-1], pages[1][0]]], ValueError),
        ([pages[0], [*pages[1][:-1], 80]], ValueError),
    ):
        refuses(new, error, new.import_state, state, bad)
    other = BlockAllocator(layout(7, S))
    refuses(other, PageTableError, other.import_state, state, taken(other, state))
    plain = BlockAllocator(80, S)
    got = plain.allocate_pages(state.num_pages)
    refuses(plain, PageTableError, plain.import_state, state, got)
    with pytest.raises(OutOfPages) as caught:
        new.allocate_pages(80, group=1)
    assert caught.value.group == 1


@pytest.mark.parametrize(
    "wrong",
    [
        dict(window=0),
        dict(window=6.0),
        dict(num_pages=2**40),
        dict(num_pages=1.0),
        dict(first=[0, 0, 0]),
        dict(first=np.zeros(3, np.uint64)),
        dict(table=np.zeros((3, 2), np.int32)),
        dict(num_passed=-1),
        dict(entries=np.array([0.5])),
    ],
    ids=lambda wrong: next(iter(wrong)),
)
@pytest.mark.usefixtures("unchecked")
def test_a_group_of_wrong_types_is_refused(wrong):
    state, _ = busy()[0].export_state()
    group: GroupState = replace(state.groups[0], **wrong)
    with pytest.raises(PageTableError):
        check_state(replace(state, groups=(group,)))


def test_stamps_of_a_group_change_when_a_page_is_taken_again():
    allocator, live = busy()
    _, where = allocator.export_state()
    pages, stamps = where.groups[0].pages, where.groups[0].stamps
    known = stamps >= 0
    assert known.any() and not known.all()  # a partial page may be written again
    assert (allocator.page_stamps(pages[known], group=1) == stamps[known]).all()
    allocator.free(live)
    allocator.reset_prefix_cache()
    allocator.allocate(range(200, 400), chunk=200)
    assert (allocator.page_stamps(pages, group=1) != stamps).any()
    assert len(allocator.page_stamps(group=1)) == 60
