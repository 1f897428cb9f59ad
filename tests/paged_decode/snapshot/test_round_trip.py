"""What was saved is what is restored, bit for bit, wherever there is room."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from paged_decode import (
    OutOfPages,
    SnapshotMismatch,
    export_sequence,
    import_sequence,
    inspect_snapshot,
    load_snapshot,
    save_snapshot,
    save_snapshot_async,
    verify_snapshot,
)
from paged_decode.snapshot._in import _has_room

from ...devices import first_devices
from .small import (
    DIM,
    HEADS,
    LAYERS,
    PAGE,
    assert_same_content,
    bits,
    busy,
    content,
    make_allocator,
    make_cache,
    random_bits,
)

DTYPES = ["float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int8"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_pages", [15, 24, 60])
def test_every_dtype_returns_bit_for_bit_into_any_pool_that_is_large_enough(
    tmp_path, dtype, num_pages
):
    dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
    cache, allocator, handles = busy(dtype=dtype)
    saved = [content(cache, allocator, h) for h in handles]
    save_snapshot(tmp_path / "s", cache, allocator)
    there, other = make_cache(num_pages, dtype, seed=9), make_allocator(num_pages)
    restored = load_snapshot(tmp_path / "s", there, other)
    other.check_invariants()
    assert len(restored.handles) == len(handles)
    for old, new, was in zip(handles, restored.handles, saved, strict=True):
        assert_same_content(content(restored.cache, other, new), was)
        a, b = allocator.sequence(old), other.sequence(new)
        assert (a.length, a.computed, a.cached, a.cache_salt) == (
            b.length,
            b.computed,
            b.cached,
            b.cache_salt,
        )
        assert allocator.tokens(old).tolist() == other.tokens(new).tolist()
    assert other.stats().shared == allocator.stats().shared == 3


def test_a_fragmented_pool_with_tenants_keeps_every_byte_of_theirs(tmp_path):
    cache, allocator, _ = busy()
    save_snapshot(tmp_path / "s", cache, allocator)
    there, other = make_cache(40, seed=5), make_allocator(40)
    held = [other.allocate([100 + i] * 5) for i in range(9)]
    other.free(held[::2])
    tenants = held[1::2]
    before = [content(there, other, h) for h in tenants]
    restored = load_snapshot(tmp_path / "s", there, other)
    other.check_invariants()
    for handle, was in zip(tenants, before, strict=True):
        assert_same_content(content(restored.cache, other, handle), was)
    pages = {p for h in restored.handles for p in other.sequence(h).pages}
    assert not pages & {p for h in tenants for p in other.sequence(h).pages}


def test_prefix_hits_and_order_of_eviction_return(tmp_path):
    cache, allocator, handles = busy()
    allocator.trim(handles)  # reserved pages are not saved
    save_snapshot(tmp_path / "s", cache, allocator)
    other = make_allocator(24)
    load_snapshot(tmp_path / "s", make_cache(24), other)
    prompts = (
        ([1, 2, 3, 4, 5, 6, 7, 8, 0], None, 8),
        ([50, 51, 52, 53, 0], None, 4),
        ([60, 61, 62, 63, 64, 65, 66, 67, 0], None, 8),
        ([1, 2, 3, 4, 0], b"x", 4),
        ([1, 2, 3, 4, 0], "x", 0),
    )
    while allocator.num_free or allocator.num_evictable:
        for tokens, salt, _ in prompts:
            assert allocator.match_prefix(tokens, cache_salt=salt) == other.match_prefix(
                tokens, cache_salt=salt
            )
        allocator.allocate_pages(1), other.allocate_pages(1)
        assert (allocator.num_free, allocator.num_evictable) == (
            other.num_free,
            other.num_evictable,
        )
    fresh = make_allocator(24)
    load_snapshot(tmp_path / "s", make_cache(24), fresh)
    for tokens, salt, hit in prompts:
        assert fresh.match_prefix(tokens, cache_salt=salt) == hit


def test_save_restore_save_gives_the_same_bytes(tmp_path):
    cache, allocator, _ = busy()
    save_snapshot(tmp_path / "a", cache, allocator, metadata={"turn": 3})
    other = make_allocator(50)
    restored = load_snapshot(tmp_path / "a", make_cache(50, seed=4), other)
    save_snapshot(tmp_path / "b", restored.cache, other, metadata=restored.metadata)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_only_used_pages_are_written_shared_ones_once_and_nothing_of_old_prompts(tmp_path):
    cache, allocator, (a, b, c, _, _) = busy()
    save_snapshot(tmp_path / "s", cache, allocator, handles=[a, c], cached=False)
    info = inspect_snapshot(tmp_path / "s")
    assert (info.num_pages, info.sequences, info.tokens, info.cached_pages) == (3, 2, 20, 0)
    data = (tmp_path / "s").read_bytes()
    for leaf in jax.tree.leaves(cache):
        page = np.array(leaf)[allocator.sequence(a).pages[2]]
        assert page[0, :2].tobytes() in data
        assert page[0, 2:].tobytes() not in data
        assert np.array(leaf)[allocator.sequence(b).pages[0], 0, 0].tobytes() not in data


@pytest.mark.parametrize("length", [0, 1, PAGE - 1, PAGE, PAGE + 1])
def test_lengths_around_a_page_and_an_empty_cache(tmp_path, length):
    cache, allocator = make_cache(9), make_allocator(9)
    handles = [allocator.allocate(range(1, length + 1))] if length else []
    was = [content(cache, allocator, h) for h in handles]
    save_snapshot(tmp_path / "s", cache, allocator)
    other = make_allocator(9)
    restored = load_snapshot(tmp_path / "s", make_cache(9, seed=3), other)
    other.check_invariants()
    assert restored.pages_loaded == -(-length // PAGE)
    for handle, expected in zip(restored.handles, was, strict=True):
        assert_same_content(content(restored.cache, other, handle), expected)


def test_one_sequence_moves_between_two_allocators_that_run(tmp_path):
    cache, allocator, (a, *_) = busy()
    was = content(cache, allocator, a)
    export_sequence(tmp_path / "s", cache, allocator, a)
    there, other, residents = busy(40)
    others = [content(there, other, h) for h in residents]
    restored = import_sequence(tmp_path / "s", there, other)
    there, handle = restored.cache, restored.handle
    other.check_invariants()
    assert_same_content(content(there, other, handle), was)
    for resident, expected in zip(residents, others, strict=True):
        assert_same_content(content(there, other, resident), expected)
    save_snapshot(tmp_path / "all", cache, allocator)
    with pytest.raises(SnapshotMismatch, match="5 sequences"):
        import_sequence(tmp_path / "all", there, other)


def test_a_stack_of_layers_and_a_tuple_of_layers_are_one_format(tmp_path):
    cache, allocator, handles = busy()
    was = [content(cache, allocator, h) for h in handles]
    save_snapshot(tmp_path / "tuple", cache, allocator)
    empty = {n: jnp.zeros((LAYERS, 30, HEADS, PAGE, DIM)) for n in ("k_pages", "v_pages")}
    other = make_allocator(30)
    stacked = load_snapshot(tmp_path / "tuple", empty, other)
    save_snapshot(tmp_path / "stack", stacked.cache, other)
    assert (tmp_path / "stack").read_bytes() == (tmp_path / "tuple").read_bytes()
    last = make_allocator(30)
    back = load_snapshot(tmp_path / "stack", make_cache(30), last)
    for handle, expected in zip(back.handles, was, strict=True):
        assert_same_content(content(back.cache, last, handle), expected)


def test_int8_pages_with_their_scales_return_bit_for_bit(tmp_path):
    def pools(num_pages, seed):
        return {
            "k": jnp.asarray(random_bits((num_pages, HEADS, PAGE, DIM), np.int8, seed)),
            "k_scale": jnp.asarray(random_bits((num_pages, HEADS, PAGE), np.float32, seed)),
            "zero": jnp.asarray(random_bits((num_pages, HEADS), ml_dtypes.bfloat16, seed)),
        }

    cache, allocator = pools(9, 0), make_allocator(9)
    handle = allocator.allocate(range(6))
    pages = list(allocator.sequence(handle).pages)
    was = {name: bits(a)[pages] for name, a in cache.items()}
    save_snapshot(tmp_path / "s", cache, allocator)
    other = make_allocator(30)
    other.allocate_pages(4)
    restored = load_snapshot(tmp_path / "s", pools(30, 7), other)
    pages = list(other.sequence(restored.handles[0]).pages)
    for name, expected in was.items():
        got = bits(restored.cache[name])[pages]
        if expected.ndim > 2:  # slots behind the six tokens are zero
            expected[1, :, 2:] = 0
        np.testing.assert_array_equal(got, expected)


def page_locked(array):
    """Where a CPU has page-locked memory: in the host's."""
    return array.sharding.with_memory_kind("pinned_host")


@pytest.mark.parametrize("locked", [True, False], ids=["page-locked memory", "none of it left"])
@pytest.mark.parametrize("where", ["tuple", "stack", "two devices"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_way_from_an_accelerator_gives_the_same_bytes(
    tmp_path, monkeypatch, dtype, where, locked
):
    """Several batches of several chunks; the host's memory is where a CPU has page-locked one."""
    dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
    cache, allocator, _ = busy(dtype=dtype)
    if where == "stack":
        cache = {n: jnp.stack(getattr(cache, n)) for n in ("k_pages", "v_pages")}
    if where == "two devices":
        mesh = jax.make_mesh((2,), ("heads",), devices=first_devices(2))
        heads = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "heads"))
        cache = jax.tree.map(lambda a: jax.device_put(a, heads), cache)
    monkeypatch.setattr("paged_decode.snapshot._format.CHUNK_BYTES", 2 * HEADS * PAGE * DIM)
    save_snapshot(tmp_path / "plain", cache, allocator)
    sent = []

    def pinned(array):
        sent.append(array)
        return page_locked(array)

    put = jax.device_put

    def refused(array, where):
        if getattr(where, "memory_kind", None) == "pinned_host":
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED")
        return put(array, where)

    if not locked:
        monkeypatch.setattr(jax, "device_put", refused)
    monkeypatch.setattr("paged_decode.snapshot._out.pinned_sharding", pinned)
    save_snapshot(tmp_path / "sent", cache, allocator)
    save_snapshot_async(tmp_path / "behind", cache, allocator).result(60)
    assert sent
    for name in ("sent", "behind"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "plain").read_bytes()


@pytest.mark.parametrize("where", ["tuple", "stack"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_without_room_beside_the_pool_pages_arrive_in_batches(tmp_path, monkeypatch, dtype, where):
    dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
    cache, allocator, _ = busy(dtype=dtype)
    monkeypatch.setattr("paged_decode.snapshot._format.CHUNK_BYTES", cache.page_bytes)
    save_snapshot(tmp_path / "a", cache, allocator)
    there, other = make_cache(40, dtype, seed=5), make_allocator(40)
    if where == "stack":
        there = {n: jnp.stack(getattr(there, n)) for n in ("k_pages", "v_pages")}
    arrived, put = [], jax.device_put

    def watched(array, device):
        arrived.append(len(array))
        return put(array, device)

    monkeypatch.setattr("paged_decode.snapshot._in.BATCH_CHUNKS", 1)
    monkeypatch.setattr("paged_decode.snapshot._in._has_room", lambda device, nbytes: False)
    monkeypatch.setattr(jax, "device_put", watched)
    restored = load_snapshot(tmp_path / "a", there, other)
    monkeypatch.setattr(jax, "device_put", put)
    batch = 2 if where == "stack" else 4
    assert set(arrived) == {batch} and len(arrived) > 2 * LAYERS
    assert restored.pages_loaded % 4  # the last batch repeats some
    other.check_invariants()
    save_snapshot(tmp_path / "b", restored.cache, other)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize(
    ("stats", "room"),
    [
        (None, True),
        ({}, True),
        ({"bytes_limit": 1000, "bytes_in_use": 200}, True),
        ({"bytes_limit": 1000, "bytes_in_use": 201}, False),
    ],
)
def test_an_eighth_of_what_is_free_is_left_when_all_pages_are_brought_at_once(stats, room):
    class Device:
        def memory_stats(self):
            return stats

    assert _has_room(Device(), 700) is room


def test_a_pool_too_small_for_the_sequences_is_refused_and_unchanged(tmp_path):
    cache, allocator, _ = busy()
    save_snapshot(tmp_path / "s", cache, allocator)
    there, other = make_cache(6), make_allocator(6)
    with pytest.raises(OutOfPages) as caught:
        load_snapshot(tmp_path / "s", there, other)
    assert (caught.value.needed, caught.value.free) == (6, 5)
    assert other.num_free == 5 and not there.is_deleted


def test_a_pool_too_small_for_the_cached_pages_leaves_out_the_first_to_be_evicted(tmp_path):
    cache, allocator, _ = busy()
    save_snapshot(tmp_path / "s", cache, allocator)
    other = make_allocator(9)  # 6 pages of sequences, 3 cached ones
    restored = load_snapshot(tmp_path / "s", make_cache(9), other)
    other.check_invariants()
    assert (restored.pages_loaded, restored.pages_dropped) == (8, 1)
    assert other.match_prefix([50, 51, 52, 53, 0]) == 0
    assert other.match_prefix([60, 61, 62, 63, 64, 65, 66, 67, 0]) == 8
    plain = make_allocator(9, prefix_cache=False)
    assert load_snapshot(tmp_path / "s", make_cache(9), plain).pages_loaded == 6
    plain.check_invariants()


def test_cached_pages_are_left_out_under_whatever_salts(tmp_path):
    cache, allocator = make_cache(24), make_allocator(24)
    for salt in "abcd":
        allocator.allocate([1], cache_salt=salt)
    for salt in "ef":
        cold = allocator.allocate([1, 2, 3, 4], cache_salt=salt)
        allocator.commit(cold, 4)
        allocator.free(cold)
    save_snapshot(tmp_path / "s", cache, allocator)
    for usable, dropped in ((6, 0), (5, 1), (4, 2)):
        other = make_allocator(usable + 1)
        restored = load_snapshot(tmp_path / "s", make_cache(usable + 1), other)
        other.check_invariants()
        assert (restored.pages_loaded, restored.pages_dropped) == (usable, dropped)
        hits = [other.match_prefix([1, 2, 3, 4, 0], cache_salt=salt) for salt in "ef"]
        assert hits == [4 * (dropped < 1), 4 * (dropped < 2)]


def test_metadata_is_that_of_the_call(tmp_path):
    cache, allocator, _ = busy()
    metadata = {"turn": 1}

    def progress(done, total):
        metadata["turn"], metadata["more"] = 2, "x" * 1000

    pending = save_snapshot_async(
        tmp_path / "s", cache, allocator, metadata=metadata, progress=progress
    )
    pending.result(60)
    assert len(metadata) == 2 and inspect_snapshot(tmp_path / "s").metadata == {"turn": 1}


@pytest.mark.parametrize(
    ("tree", "error", "text"),
    [
        ({}, ValueError, "no arrays"),
        ({"k": 1.0}, TypeError, "no array but float"),
        ({"a/b": 0, "a": {"b": 0}}, ValueError, "same path"),
        ({"x" * 253: 0}, ValueError, "may have 255 bytes"),
        ({"k": (24, 24, 4)}, ValueError, "either of its first two axes"),
        ({"k": (3, 4)}, ValueError, "expected"),
    ],
    ids=["empty", "float", "one path twice", "long path", "two axes of N", "no axis of N"],
)
def test_a_tree_that_cannot_be_read_again_is_not_saved(tmp_path, tree, error, text):
    def array(leaf):
        if isinstance(leaf, float):
            return leaf
        return jnp.zeros(leaf or (24, HEADS, PAGE, DIM))

    tree = jax.tree.map(array, tree, is_leaf=lambda leaf: isinstance(leaf, tuple))
    with pytest.raises(error, match=text):
        save_snapshot(tmp_path / "s", tree, make_allocator(24))
    with pytest.raises(ValueError, match="4096 keys"):
        metadata = {str(i): i for i in range(4097)}
        save_snapshot(tmp_path / "s", make_cache(24), make_allocator(24), metadata=metadata)
    assert not (tmp_path / "s").exists()


def test_all_differences_are_listed_at_once(tmp_path):
    cache, allocator, _ = busy()
    save_snapshot(tmp_path / "s", cache, allocator)
    there = make_cache(9, np.float16, dim=5)
    there = type(there)(there.k_pages[:1], there.v_pages[:1])
    other = make_allocator(9, fingerprint=b"other weights")
    with pytest.raises(SnapshotMismatch) as caught:
        load_snapshot(tmp_path / "s", there, other)
    text = str(caught.value)
    for part in ("only in the file", "[2, 4, 3] of float32", "[2, 4, 5] of float16", "fingerprint"):
        assert part in text
    assert not there.is_deleted and other.num_free == 8


def test_a_foreign_fingerprint_is_taken_only_when_it_is_named(tmp_path):
    cache, allocator, _ = busy(fingerprint=b"llama")
    save_snapshot(tmp_path / "s", cache, allocator)
    for accept in (None, b"", b"other"):
        with pytest.raises(SnapshotMismatch, match="fingerprint is b'llama' in the file, b'qwen'"):
            load_snapshot(
                tmp_path / "s",
                make_cache(24),
                make_allocator(24, fingerprint=b"qwen"),
                accept_fingerprint=accept,
            )
    other = make_allocator(24, fingerprint=b"qwen")
    load_snapshot(tmp_path / "s", make_cache(24), other, accept_fingerprint=b"llama")
    other.check_invariants()


@pytest.mark.parametrize("locked", [False, True], ids=["", "page-locked memory"])
def test_saving_behind_the_loop_saves_the_state_of_that_moment(tmp_path, monkeypatch, locked):
    if locked:
        monkeypatch.setattr("paged_decode.snapshot._out.pinned_sharding", page_locked)
    cache, allocator, handles = busy()
    was = [content(cache, allocator, h) for h in handles]
    save_snapshot(tmp_path / "now", cache, allocator)
    pending = save_snapshot_async(tmp_path / "behind", cache, allocator)
    jax.jit(lambda c: jax.tree.map(jnp.zeros_like, c), donate_argnums=0)(cache)
    allocator.free(handles)
    assert pending.result(60).num_pages == 9
    assert pending.done()
    assert (tmp_path / "behind").read_bytes() == (tmp_path / "now").read_bytes()
    other = make_allocator(24)
    restored = load_snapshot(tmp_path / "behind", make_cache(24), other)
    for handle, expected in zip(restored.handles, was, strict=True):
        assert_same_content(content(restored.cache, other, handle), expected)


def test_metadata_and_figures_are_read_without_pages(tmp_path, unchecked):
    cache, allocator, _ = busy(fingerprint=b"f")
    told = {"model": "tiny", "turn": 7, "score": 0.5, "done": False, "none": None}
    seen = []
    saved = save_snapshot(
        tmp_path / "s", cache, allocator, metadata=told, progress=lambda *p: seen.append(p)
    )
    info = verify_snapshot(tmp_path / "s")
    assert info.metadata == told and info.id == saved.id and info.fingerprint == b"f"
    assert (info.sequences, info.tokens, info.num_pages, info.cached_pages) == (5, 28, 9, 3)
    assert info.file_bytes == (tmp_path / "s").stat().st_size
    assert seen == sorted(seen) and seen[-1][0] <= seen[-1][1] == info.file_bytes
    for bad in ({"a": []}, {1: "a"}, {"a": 2**63}, ["a"], {"a": b"x"}):
        with pytest.raises((ValueError, TypeError), match="metadata"):
            save_snapshot(tmp_path / "s", cache, allocator, metadata=bad)
    assert verify_snapshot(tmp_path / "s").id == saved.id


def test_a_cache_that_is_not_paged_like_its_allocator_is_refused(tmp_path):
    with pytest.raises(ValueError, match="N = 9 pages"):
        save_snapshot(tmp_path / "s", make_cache(8), make_allocator(9))
    assert not (tmp_path / "s").exists()
