"""Snapshots of layers that differ: format version 2, and what of a file fits which cache."""

from __future__ import annotations

from dataclasses import replace

import jax
import numpy as np
import pytest

from paged_decode import (
    CacheLayout,
    KVCache,
    OutOfPages,
    PageSpec,
    SnapshotMismatch,
    compact_snapshot,
    load_snapshot,
    save_snapshot,
    verify_snapshot,
)

from ...devices import first_devices
from ..test_groups import Loop
from .grouped import (
    LAYOUTS,
    SIZE,
    TWO,
    Life,
    allocator_of,
    cache_of,
    content,
    lived,
    with_pages,
)
from .small import assert_same_content


def on_device(layout: CacheLayout, seed: int = 7):
    return jax.tree.map(jax.numpy.asarray, cache_of(layout, seed))


def assert_same(life: Life, cache, allocator, handles) -> None:
    """Lengths, places and bits of every sequence."""
    allocator.check_invariants()
    for old, new in zip(life.handles, handles, strict=True):
        assert_same_content(
            content(cache, allocator, new), content(life.cache, life.allocator, old)
        )
        a, b = life.allocator.sequence(old), allocator.sequence(new)
        assert (a.length, a.computed, a.cached) == (b.length, b.computed, b.cached)
        assert [g.first for g in a.groups] == [g.first for g in b.groups]
        assert life.allocator.tokens(old).tolist() == allocator.tokens(new).tolist()


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_group_returns_bit_for_bit_into_pools_of_other_sizes(tmp_path, name, seed):
    layout, sizes = LAYOUTS[name], [(90, 70, 80), (60, 61, 62), (150, 52, 49)][seed % 3]
    life = lived(layout, seed)
    for handle in life.handles:
        life.allocator.trim([handle])
    saved = save_snapshot(tmp_path / "a", life.cache, life.allocator)
    other = with_pages(layout, *sizes[: len(layout.groups)])
    allocator = allocator_of(other)
    restored = load_snapshot(tmp_path / "a", on_device(other), allocator)
    assert_same(life, restored.cache, allocator, restored.handles)
    assert (restored.pages_loaded, restored.pages_dropped) == (saved.num_pages, 0)
    again = save_snapshot(tmp_path / "b", restored.cache, allocator)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() and again.id == saved.id
    allocator.free(list(restored.handles))
    for group in range(len(layout.groups)):
        assert allocator.stats(group).used == 0


def test_a_pool_too_small_for_the_sequences_of_a_group_is_refused_and_unchanged(tmp_path):
    life = lived(TWO, seed=1)
    save_snapshot(tmp_path / "s", life.cache, life.allocator)
    state, _ = life.allocator.export_state()
    needed = [state.num_owned, state.groups[0].num_owned]
    for group in (0, 1):
        counts = [60, 40]
        counts[group] = needed[group]  # one of which is the null page
        layout = with_pages(TWO, *counts)
        cache, allocator = on_device(layout), allocator_of(layout)
        with pytest.raises(OutOfPages) as caught:
            load_snapshot(tmp_path / "s", cache, allocator)
        assert (caught.value.group, caught.value.needed) == (group, needed[group])
        assert not cache.is_deleted and allocator.stats(0).used == allocator.stats(1).used == 0
        allocator.check_invariants()


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_delta_of_groups_folds_to_the_bytes_of_a_whole_snapshot(tmp_path, name):
    life, parent = lived(LAYOUTS[name], seed=3), None
    written = []
    for turn in range(8):
        parent = save_snapshot(tmp_path / f"{turn}", life.cache, life.allocator, parent=parent)
        written.append(parent.written_pages / parent.num_pages)
        save_snapshot(tmp_path / "whole", life.cache, life.allocator)
        assert verify_snapshot(tmp_path / f"{turn}").own_pages == parent.written_pages
        compact_snapshot(tmp_path / f"{turn}", tmp_path / "folded")
        assert (tmp_path / "folded").read_bytes() == (tmp_path / "whole").read_bytes()
        for _ in range(2):
            life.turn()
    assert written[0] == 1 and min(written) < 0.5


def test_a_loaded_snapshot_of_groups_can_be_a_parent_unless_its_groups_were_others(tmp_path):
    life = lived(TWO, seed=4)
    save_snapshot(tmp_path / "a", life.cache, life.allocator)
    allocator = allocator_of(TWO)
    restored = load_snapshot(tmp_path / "a", on_device(TWO), allocator)
    delta = save_snapshot(tmp_path / "b", restored.cache, allocator, parent=restored.snapshot)
    assert delta.written_pages < delta.num_pages / 2
    narrow = cut(TWO, window=3)
    allocator = allocator_of(narrow)
    restored = load_snapshot(tmp_path / "b", on_device(narrow), allocator)
    with pytest.raises(ValueError, match="the parent, has other groups of layers"):
        save_snapshot(tmp_path / "c", restored.cache, allocator, parent=restored.snapshot)


def cut(layout: CacheLayout, *, window: int, group: int = 1) -> CacheLayout:
    """The same layers, one group with another window."""
    groups = list(layout.groups)
    groups[group] = replace(groups[group], window=window)
    return CacheLayout(layout.page_size, tuple(groups))


KIND = dict(num_kv_heads=2, head_dim=2, num_pages=80)
PLAIN = CacheLayout(SIZE, (PageSpec((0, 1, 2, 3), **KIND),))
SPLITS = {
    "full and a window": [((1, 3), None), ((0, 2), 6)],
    "a ledger and two windows": [((), None), ((0, 3), 5), ((1, 2), 1)],
    "two full ones": [((2,), None), ((0, 1, 3), None)],
}


def split_into(name: str) -> CacheLayout:
    groups = [PageSpec(layers, window=window, **KIND) for layers, window in SPLITS[name]]
    return CacheLayout(SIZE, tuple(groups))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", SPLITS)
def test_one_full_group_is_split_and_cut_to_the_windows_that_are_here(tmp_path, name, seed):
    """A file of version 1: the columns that a window still sees, and all bits in them."""
    life, layout = lived(PLAIN, seed), split_into(name)
    save_snapshot(tmp_path / "s", life.cache, life.allocator)
    allocator = allocator_of(layout)
    restored = load_snapshot(tmp_path / "s", on_device(layout), allocator)
    allocator.check_invariants()
    for old, new in zip(life.handles, restored.handles, strict=True):
        was, info = life.allocator.sequence(old), allocator.sequence(new)
        assert (was.length, was.computed) == (info.length, info.computed)
        for held, (_, window) in zip(info.groups, allocator.pools, strict=True):
            passed = 0 if window is None else max(0, info.computed - window + 1) // SIZE
            assert held.first == passed
            assert (held.first + len(held.pages)) * SIZE >= info.computed
        wanted = content(life.cache, life.allocator, old)
        found = content(restored.cache, allocator, new)
        assert_same_content(
            found, [w[len(w) - len(f) :] for w, f in zip(wanted, found, strict=True)]
        )
    for handle in restored.handles:  # and they go on
        allocator.prepare([handle], allocator.sequence(handle).length + 3)
        allocator.commit([handle], allocator.sequence(handle).length)
        allocator.check_invariants()


@pytest.mark.parametrize("seed", range(3))
def test_a_window_is_cut_to_a_narrower_one(tmp_path, seed):
    life, layout = lived(TWO, seed), cut(TWO, window=2)
    save_snapshot(tmp_path / "s", life.cache, life.allocator)
    allocator = allocator_of(layout)
    restored = load_snapshot(tmp_path / "s", on_device(layout), allocator)
    allocator.check_invariants()
    for old, new in zip(life.handles, restored.handles, strict=True):
        info = allocator.sequence(new)
        assert info.groups[1].first == max(0, info.computed - 1) // SIZE
        wanted = content(life.cache, life.allocator, old)
        found = content(restored.cache, allocator, new)
        assert_same_content(
            found, [w[len(w) - len(f) :] for w, f in zip(wanted, found, strict=True)]
        )


def regrouped(*groups) -> CacheLayout:
    """The layers of the file that has windows of 6, in other groups."""
    return CacheLayout(SIZE, tuple(PageSpec(layers, window=w, **KIND) for layers, w in groups))


REFUSED = {
    "a wider window": ([((1, 3), None), ((0, 2), 7)], "layers 0, 2 see a window of 6 .* of 7"),
    "all tokens": (
        [((1, 3), None), ((0, 2), None)],
        "layers 0, 2 see a window of 6 .*, all tokens",
    ),
    "merged": ([((0, 1, 2, 3), None)], r"layers 0, 1, 2, 3, one .* in groups \[0, 1\]"),
    "merged windows": ([((1,), None), ((0, 2, 3), 6)], r"layers 0, 2, 3, one .* groups \[0, 1\]"),
    "another first group": ([((0, 2), None), ((1, 3), None)], r"layers 0, 2, one .* groups \[1\]"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_window_gave_back_is_not_there_for_a_wider_one(tmp_path, name):
    life = lived(split_into("full and a window"), seed=1)
    save_snapshot(tmp_path / "s", life.cache, life.allocator)
    groups, text = REFUSED[name]
    layout = regrouped(*groups)
    cache, allocator = on_device(layout), allocator_of(layout)
    with pytest.raises(SnapshotMismatch, match=text):
        load_snapshot(tmp_path / "s", cache, allocator)
    assert not cache.is_deleted and allocator.num_used == 0


def test_a_private_sequence_is_saved_without_pages_of_its_windows(tmp_path):
    life = lived(TWO, seed=5)
    life.allocator.new_weights(b"next")
    save_snapshot(tmp_path / "s", life.cache, life.allocator)
    allocator = allocator_of(TWO)
    allocator.new_weights(b"next")
    restored = load_snapshot(tmp_path / "s", on_device(TWO), allocator)
    allocator.check_invariants()
    for old, new in zip(life.handles, restored.handles, strict=True):
        info = allocator.sequence(new)
        assert info.computed == 0 and info.groups[1] == (0, ())
        assert allocator.tokens(new).tolist() == life.allocator.tokens(old).tolist()


def test_what_is_taken_as_private_or_under_another_salt_keeps_its_bits(tmp_path):
    life = lived(TWO, seed=6)
    save_snapshot(tmp_path / "s", life.cache, life.allocator)
    for options in (dict(prefix_cache=False), dict(cache_salt="mine")):
        allocator = allocator_of(TWO)
        restored = load_snapshot(tmp_path / "s", on_device(TWO), allocator, **options)
        assert_same(life, restored.cache, allocator, restored.handles)


def test_a_cache_and_an_allocator_of_other_groups_are_not_saved(tmp_path):
    with pytest.raises(ValueError, match="has 2 groups of layers, the cache 1"):
        save_snapshot(tmp_path / "s", {"k": np.zeros((60, 3))}, allocator_of(TWO))
    with pytest.raises(ValueError, match="has 1 groups of layers, the cache 2"):
        save_snapshot(tmp_path / "s", cache_of(TWO), allocator_of(PLAIN))
    with pytest.raises(ValueError, match="N = 41 pages"):
        save_snapshot(tmp_path / "s", cache_of(TWO), allocator_of(with_pages(TWO, 60, 41)))
    assert not (tmp_path / "s").exists()


def cached(layout: CacheLayout, **options) -> Life:
    """Ten prompts that begin alike, one after the other, of which the last one lives on."""
    life = Life(layout, **options)
    for i in range(10):
        life.prefill([*range(13), *[20 + i] * 9])
        if i < 9:
            life.allocator.free(life.handles.pop())
    return life


def hits(allocator) -> list[int]:
    return [allocator.match_prefix([*range(13), *[20 + i] * 9]) for i in range(10)]


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_is_found_and_the_order_of_eviction_return_in_every_group(tmp_path, name):
    layout = with_pages(LAYOUTS[name], *(80,) * len(LAYOUTS[name].groups))
    life = cached(layout)
    save_snapshot(tmp_path / "s", life.cache, life.allocator)
    other = allocator_of(layout)
    restored = load_snapshot(tmp_path / "s", on_device(layout), other)
    assert hits(other) == hits(life.allocator) and set(hits(other)) == {20}
    assert restored.pages_dropped == 0
    for allocator in (life.allocator, other):
        pools = range(len(layout.groups))
        allocator.free(allocator.handles)
        for group in pools:  # evict page by page
            held = allocator.allocate_pages(allocator.stats(group).free, group=group)
            assert len(held)
    while life.allocator.stats(1).evictable:
        for allocator in (life.allocator, other):
            allocator.allocate_pages(1, group=1)
            allocator.check_invariants()
        assert hits(other) == hits(life.allocator)


@pytest.mark.parametrize("group", [0, 1])
def test_cached_pages_that_have_no_room_in_a_group_are_left_out_first_come_first(tmp_path, group):
    layout = with_pages(TWO, 80, 80)
    life = cached(layout)
    saved = save_snapshot(tmp_path / "s", life.cache, life.allocator)
    state, _ = life.allocator.export_state()
    owned = (state.num_owned, state.groups[0].num_owned)
    for room in (owned[group], owned[group] + 3, owned[group] + 9, 70):
        counts = [80, 80]
        counts[group] = room + 1
        small = with_pages(TWO, *counts)
        allocator = allocator_of(small)
        restored = load_snapshot(tmp_path / "s", on_device(small), allocator)
        assert_same(life, restored.cache, allocator, restored.handles)
        assert restored.pages_loaded + restored.pages_dropped == saved.num_pages
        found = hits(allocator)
        assert found[:9] == sorted(found[:9])  # the newest stay
        assert (set(found) == {20}) == (room == 70)


def test_hits_after_a_restore_read_the_bits_that_were_saved(tmp_path):
    layout = with_pages(TWO, 80, 80)
    life = cached(layout)
    save_snapshot(tmp_path / "s", life.cache, life.allocator)
    other = allocator_of(layout)
    restored = load_snapshot(tmp_path / "s", on_device(layout), other)
    for i in range(10):
        text = [*range(13), *[20 + i] * 9]
        old, new = life.allocator.allocate(text), other.allocate(text)
        assert life.allocator.sequence(old).computed == other.sequence(new).computed == 20
        assert_same_content(
            content(restored.cache, other, new), content(life.cache, life.allocator, old)
        )


def test_of_a_full_group_cut_to_a_window_the_ends_of_what_can_be_found_stay(tmp_path):
    """The file is of version 1; every prompt is found to its end, with few pages of the window."""
    plain = CacheLayout(SIZE, (replace(PLAIN.groups[0], num_pages=150),))
    life, layout = cached(plain), split_into("full and a window")
    save_snapshot(tmp_path / "s", life.cache, life.allocator)
    allocator = allocator_of(layout)
    restored = load_snapshot(tmp_path / "s", on_device(layout), allocator)
    allocator.check_invariants()
    assert hits(allocator) == hits(life.allocator) == [20] * 10
    stats = allocator.stats(1)
    assert stats.used == 2 and stats.evictable <= 2 * 10
    handle = allocator.allocate([*range(13), *[20] * 9])
    old = life.allocator.allocate([*range(13), *[20] * 9])
    found = content(restored.cache, allocator, handle)
    wanted = content(life.cache, life.allocator, old)
    assert [len(f) for f in found] == [8, 20, 8, 20] * 2
    assert_same_content(found, [w[len(w) - len(f) :] for w, f in zip(wanted, found, strict=True)])


def test_salts_of_a_file_become_one_and_what_they_have_in_common_is_found_once(tmp_path):
    layout = with_pages(TWO, 80, 80)
    life = Life(layout)
    for salt in "ab":
        handle = life.allocator.allocate([*range(13), ord(salt)], cache_salt=salt)
        life.compute(handle, 14)
        life.allocator.free(handle)
    save_snapshot(tmp_path / "s", life.cache, life.allocator)
    allocator = allocator_of(layout)
    load_snapshot(tmp_path / "s", on_device(layout), allocator, cache_salt="c")
    allocator.check_invariants()
    assert allocator.match_prefix([*range(13), 9], cache_salt="c") == 12
    assert allocator.match_prefix([*range(13), 9], cache_salt="a") == 0
    assert [allocator.stats(group).evictable for group in (0, 1)] == [3, 3]


def test_without_a_prefix_cache_there_only_the_pages_of_sequences_are_taken(tmp_path):
    life = cached(with_pages(TWO, 80, 80))
    save_snapshot(tmp_path / "s", life.cache, life.allocator)
    for options in (dict(into=dict(prefix_cache=False)), dict(prefix_cache=False, into={})):
        allocator = allocator_of(TWO, **options.pop("into"))
        restored = load_snapshot(tmp_path / "s", on_device(TWO), allocator, **options)
        assert_same(life, restored.cache, allocator, restored.handles)
        assert [allocator.stats(group).evictable for group in (0, 1)] == [0, 0]
        assert restored.pages_loaded == 6 + 2


def test_a_stack_for_each_group_and_an_array_for_each_layer_are_one_format(tmp_path):
    for layout in LAYOUTS.values():
        life = lived(layout, seed=9)
        save_snapshot(tmp_path / "tuple", life.cache, life.allocator)
        allocator = allocator_of(layout)
        stacked = KVCache.create(layout=layout, stacked=True)
        restored = load_snapshot(tmp_path / "tuple", stacked, allocator)
        save_snapshot(tmp_path / "stack", restored.cache, allocator)
        assert (tmp_path / "stack").read_bytes() == (tmp_path / "tuple").read_bytes()
        again = allocator_of(layout)
        back = load_snapshot(tmp_path / "stack", on_device(layout), again)
        assert_same(life, back.cache, again, back.handles)


def test_heads_of_groups_over_a_mesh_are_saved_once_and_restored_on_one_device(tmp_path):
    """Two heads over four devices, and four: the first have two copies each."""
    mesh = jax.make_mesh((4,), ("heads",), devices=first_devices(4))
    kinds = dict(head_dim=2, num_pages=40)
    layout = CacheLayout(
        SIZE,
        (
            PageSpec((1,), num_kv_heads=4, **kinds),
            PageSpec((0,), num_kv_heads=2, window=6, **kinds),
        ),
    )
    life = lived(layout, seed=2)
    save_snapshot(tmp_path / "one", life.cache, life.allocator)
    allocator = allocator_of(layout)
    spread = KVCache.create(layout=layout, mesh=mesh, head_axis="heads")
    restored = load_snapshot(tmp_path / "one", spread, allocator)
    assert [a.shape[1] for a in restored.cache.k_pages] == [4, 4]
    save_snapshot(tmp_path / "four", restored.cache, allocator)
    assert (tmp_path / "four").read_bytes() == (tmp_path / "one").read_bytes()


@pytest.mark.parametrize("pools", [pytest.param((64, 32), marks=pytest.mark.long), (40, 20)])
def test_steps_after_a_restore_read_nothing_but_what_was_saved(tmp_path, pools):
    """NaN in every page that is free; the attention of every step is bit for bit the same."""
    loop, rng = Loop(poison=False, backend=None), np.random.default_rng(3)
    texts = [rng.integers(0, 50, n).tolist() for n in (30, 11)]
    handles = [loop.allocator.allocate(text, chunk=16) for text in texts]
    loop.prefill(handles, [16, 11], 16)
    loop.prefill(handles[:1], [30], 16)
    handles += loop.allocator.fork(handles[0], commit=True)
    loop.advance(handles, [1, 2, 3])
    loop.allocator.commit(handles, [31, 12, 31])
    save_snapshot(tmp_path / "s", loop.cache, loop.allocator, handles=handles)
    other = Loop(poison=True, backend=None)
    layout = with_pages(loop.cache.layout, *pools)
    other.cache, other.allocator = KVCache.create(layout=layout), allocator_of(layout)
    restored = load_snapshot(tmp_path / "s", other.cache, other.allocator)
    other.cache, seen = restored.cache, len(loop.seen)
    for tokens in rng.integers(0, 50, (4, 3)).tolist():
        loop.advance(handles, tokens)
        other.advance(list(restored.handles), tokens)
    assert len(other.seen) == len(loop.seen) - seen == 4 * 3 * 2
    for one, two in zip(loop.seen[seen:], other.seen, strict=True):
        np.testing.assert_array_equal(one, two)
