"""Loads that are given no cache and no allocator, and what a load says of its progress."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from paged_decode import (
    KVCache,
    OutOfPages,
    SnapshotMismatch,
    compact_snapshot,
    export_sequence,
    import_sequence,
    load_snapshot,
    save_snapshot,
    verify_snapshot,
)

from . import independent_reader
from .forge import build
from .grouped import LAYOUTS
from .small import assert_same_content, busy, content, make_allocator, make_cache
from .test_deltas import chain

GOLDEN = Path(__file__).parents[2] / "golden"


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn])
def test_without_a_cache_and_an_allocator_both_are_made_as_the_file_says(tmp_path, dtype):
    cache, allocator, handles = busy(dtype=dtype, fingerprint=b"llama")
    was = [content(cache, allocator, h) for h in handles]
    allocator.new_weights(b"step 7")
    saved = save_snapshot(tmp_path / "s", cache, allocator)
    restored = load_snapshot(tmp_path / "s")
    other = restored.allocator
    other.check_invariants()
    restored.cache.check_allocator(other)
    assert (other.fingerprint, other.weights) == (b"llama", b"step 7")
    assert other.num_pages == restored.cache.num_pages == saved.num_pages + 1
    for handle, expected in zip(restored.handles, was, strict=True):
        assert_same_content(content(restored.cache, other, handle), expected)
    save_snapshot(tmp_path / "again", restored.cache, other)
    assert (tmp_path / "again").read_bytes() == (tmp_path / "s").read_bytes()


@pytest.mark.parametrize("name", [*LAYOUTS, "delta"])
def test_the_pools_of_groups_are_made_as_the_file_says(name):
    path = GOLDEN / f"snapshot_v2_{name}.pgd"
    info = verify_snapshot(path)
    restored = load_snapshot(path)
    restored.allocator.check_invariants()
    assert restored.pages_loaded == info.num_pages and restored.pages_dropped == 0
    needed = [(max(2, group.num_pages + 1), group.window) for group in info.groups]
    assert list(restored.cache.pools) == list(restored.allocator.pools) == needed
    roomy = load_snapshot(path, num_pages=50)
    assert [pages for pages, _ in roomy.cache.pools] == [50] * len(info.groups)
    sizes = range(50, 50 + len(info.groups))
    each = load_snapshot(path, num_pages=sizes)
    assert [pages for pages, _ in each.allocator.pools] == list(sizes)
    with pytest.raises(ValueError, match="one for each of the"):
        load_snapshot(path, num_pages=[50] * (len(info.groups) + 1))


def test_new_pools_have_the_room_that_is_asked_for(tmp_path):
    cache, allocator, (a, *_) = busy()
    export_sequence(tmp_path / "s", cache, allocator, a)
    restored = import_sequence(tmp_path / "s", num_pages=9)
    pair = restored.cache.advance(restored.allocator, [restored.handle], [5])
    assert pair[0].num_pages == 9 and restored.allocator.num_free == 5
    with pytest.raises(OutOfPages):
        import_sequence(tmp_path / "s", num_pages=2)
    for wrong, error in ((1, ValueError), (0, ValueError), (2.5, TypeError), ("9", TypeError)):
        with pytest.raises(error, match="num_pages"):
            load_snapshot(tmp_path / "s", num_pages=wrong)


@pytest.mark.parametrize("load", [load_snapshot, import_sequence])
def test_a_cache_without_an_allocator_is_refused_and_the_other_way_round(tmp_path, load, unchecked):
    cache, allocator = make_cache(9), make_allocator(9)
    with pytest.raises(TypeError, match="there is cache, but no allocator: pass both"):
        load(tmp_path / "s", cache)
    with pytest.raises(TypeError, match="there is allocator, but no cache: pass both"):
        load(tmp_path / "s", allocator=allocator)
    with pytest.raises(TypeError, match="num_pages is of a pool that is made"):
        load(tmp_path / "s", cache, allocator, num_pages=9)
    allocator.allocate([1, 2])
    save_snapshot(tmp_path / "s", cache, allocator)
    with pytest.raises(TypeError, match="allocator must be a BlockAllocator, got KVCache"):
        load(tmp_path / "s", allocator, cache)
    assert allocator.num_free == 7 and not cache.is_deleted


def test_another_fingerprint_than_the_accepted_one_is_refused_by_new_pools_too(tmp_path):
    cache, allocator, _ = busy(fingerprint=b"llama")
    save_snapshot(tmp_path / "s", cache, allocator)
    assert load_snapshot(tmp_path / "s", accept_fingerprint=b"llama").pages_loaded
    with pytest.raises(SnapshotMismatch, match="the fingerprint is b'llama' in the file, b'qwen'"):
        load_snapshot(tmp_path / "s", accept_fingerprint=b"qwen")


def test_a_tree_that_is_no_kv_cache_needs_pools_of_ones_own(tmp_path):
    allocator = make_allocator(9)
    allocator.allocate([1, 2, 3])
    page = {"k": np.zeros((9, 2, 4, 3), "f4")}
    for cache in (page, KVCache((page["k"],), (np.zeros((9, 2, 4, 5), "f4"),))):
        save_snapshot(tmp_path / "s", cache, allocator)
        with pytest.raises(SnapshotMismatch, match="pass a cache and an allocator of your own"):
            load_snapshot(tmp_path / "s")


def test_new_pools_are_not_out_of_proportion_to_the_files(tmp_path):
    """A page of a parent that a delta names a thousand times; pages that no row shows."""
    cache, allocator = make_cache(3, dim=4096), make_allocator(3)
    handle = allocator.allocate([1, 1, 1, 1])
    allocator.commit(handle, 4)
    save_snapshot(tmp_path / "base", cache, allocator)
    fields, arrays, ident = independent_reader.read(tmp_path / "base")
    many = 1000
    kv = {n: a[:0] for n, a in arrays.items() if n.startswith("kv/")}
    delta = arrays | kv | {"pages/source": np.full(many, -1, np.int32)}
    delta |= {"sequence/pages": np.arange(many, dtype=np.int32)}
    delta |= {"page/tokens": np.ones((many, 4), np.int32), "sequence/cached": np.zeros(1, "i8")}
    delta |= {f"sequence/{n}": np.array([4 * many]) for n in ("length", "computed")}
    delta |= {f"entry/{n}": np.zeros(0, np.int32) for n in ("page", "parent", "evictable")}
    change = lambda f: f | {"parent": [ident, "base", 1], "pages": many}  # noqa: E731
    (tmp_path / "delta").write_bytes(build(fields, delta, change))
    verify_snapshot(tmp_path / "delta")
    with pytest.raises(SnapshotMismatch, match="far more than its files have"):
        load_snapshot(tmp_path / "delta")
    empty, nothing = make_cache(3), make_allocator(3)
    save_snapshot(tmp_path / "empty", empty, nothing)
    assert load_snapshot(tmp_path / "empty", num_pages=7).allocator.num_free == 6
    fields, arrays, _ = independent_reader.read(tmp_path / "empty")
    huge = {n: np.zeros((0, 2, 4, 2**31 - 1), "f4") for n in arrays if n.startswith("kv/")}
    (tmp_path / "huge").write_bytes(build(fields, arrays | huge))
    with pytest.raises(SnapshotMismatch, match="far more than its files have"):
        load_snapshot(tmp_path / "huge")


def test_progress_tells_of_all_bytes_and_ends_with_them(tmp_path):
    chain(tmp_path)
    for call in (verify_snapshot, load_snapshot, compact_snapshot):
        seen: list[tuple[int, int]] = []
        call(tmp_path / "2", progress=lambda done, total, seen=seen: seen.append((done, total)))
        assert seen and seen[-1][0] == seen[-1][1], call
        assert len({total for _, total in seen}) == 1
        assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_a_progress_that_raises_ends_the_load_and_nothing_has_changed(tmp_path):
    cache, allocator, _ = busy()
    save_snapshot(tmp_path / "s", cache, allocator)
    there, other, _ = busy(40)
    free = other.num_free

    def stop(done, total):
        raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        load_snapshot(tmp_path / "s", there, other, progress=stop)
    other.check_invariants()
    assert other.num_free == free and not there.is_deleted
