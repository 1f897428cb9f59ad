"""Pages of 8 bits in all that holds pages: engine, forks, groups, tiers, snapshots, meshes."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paged_decode import (
    BlockAllocator,
    CacheLayout,
    KVCache,
    PageSpec,
    SamplingParams,
    SnapshotMismatch,
    load_snapshot,
    save_snapshot,
)
from paged_decode.kernels.record import POOLS
from paged_decode.tiers import DeviceMover, HostTier

from ..devices import first_devices
from . import tiny
from .engine.test_engine_groups import BOUND, LENGTHS, ROWS, WINDOW, P, answers

DTYPES = ("int8", "float8_e4m3fn")
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


def mixed(dtype: str, full: int = 90) -> CacheLayout:
    """A layer of 8 bits that sees all, and one of float32 with a window."""
    kinds = dict(num_kv_heads=tiny.KV_HEADS, head_dim=tiny.DIM)
    return CacheLayout(
        4,
        (
            PageSpec((1,), num_pages=full, dtype=dtype, **kinds),
            PageSpec((0,), num_pages=ROWS * BOUND + 1, window=WINDOW, **kinds),
        ),
    )


def uniform(dtype: str, num_pages: int = 90) -> CacheLayout:
    return CacheLayout.uniform(
        num_layers=2,
        num_pages=num_pages,
        num_kv_heads=tiny.KV_HEADS,
        page_size=4,
        head_dim=tiny.DIM,
        dtype=dtype,
    )


LAYOUTS = {"all layers": uniform, "layers of two dtypes": mixed}


@cache
def alone(name: str, dtype: str) -> dict[int, tuple[int, ...]]:
    """Tokens of every prompt, one after the other, in an engine that has room for each."""
    engine = tiny.make_engine(layout=LAYOUTS[name](dtype, 60), prefix_cache=False)
    asked = [SamplingParams(max_new_tokens=n) for n in LENGTHS]
    done = [engine.generate([p], each) for p, each in zip(P, asked, strict=True)]
    assert engine.stats.preemptions == 0
    return {i: completion.tokens for i, (completion,) in enumerate(done)}


HELD = [(name, stacked, dtype) for name in LAYOUTS for stacked in (False, True) for dtype in DTYPES]
# Each value of each, and each of the others for CI.
FEW = ("all layers", True, "float8_e4m3fn"), ("layers of two dtypes", False, "int8")


@pytest.mark.parametrize(
    ("name", "stacked", "dtype"),
    [pytest.param(*each, marks=() if each in FEW else pytest.mark.long) for each in HELD],
)
def test_whatever_happens_to_a_sample_its_tokens_are_the_same(name, stacked, dtype):
    """Swapped to the host and back at will, over free pages full of NaN."""
    tier = HostTier(500, buckets=(1, 4))
    engine = tiny.make_engine(
        layout=LAYOUTS[name](dtype, 60),
        stacked=stacked,
        prefix_cache=False,
        policies=dict(tier=tier),
    )
    assert answers(engine, LENGTHS, poison=True, forced=3) == alone(name, dtype)
    assert engine.stats.swaps > 4 and engine.allocator.num_used == 0


@every_dtype
def test_the_tokens_are_nearly_those_of_pages_of_float32(dtype):
    same = total = 0
    for at, (prompt, count) in enumerate(zip(P, LENGTHS, strict=True)):
        found = alone("all layers", dtype)[at]
        for ours, theirs in zip(found, tiny.dense_greedy(prompt, count), strict=True):
            same, total = same + (ours == theirs), total + 1
            if ours != theirs:  # what follows is another text
                break
    assert same >= 0.9 * total > 100


@every_dtype
def test_forks_copy_numbers_and_scales_before_they_write(dtype):
    cache = KVCache.create(layout=uniform(dtype))
    allocator = BlockAllocator(uniform(dtype))
    rng = np.random.default_rng(0)

    def written(cache, batch, width):
        new = rng.standard_normal((2, 1, width, tiny.KV_HEADS, tiny.DIM)).astype(np.float32)
        for layer in range(2):
            cache = cache.append(layer, *new, batch)
        return cache

    first = allocator.allocate(range(6))
    cache = written(cache, allocator.batch([first], [0], [6], tokens_per_row=6), 6)
    allocator.commit([first], [6])
    cache, (second,) = cache.fork(allocator, first)
    before = taken(cache, allocator.sequence(first).pages)
    cache, batch = cache.advance(allocator, [second], [7])
    cache = written(cache, batch, 1)
    ours, theirs = (allocator.sequence(handle).pages for handle in (first, second))
    assert ours[0] == theirs[0] and ours[1] != theirs[1]
    after = taken(cache, ours)
    assert all(np.array_equal(after[name], before[name]) for name in before)
    copied = taken(cache, theirs)
    for name, pool in copied.items():  # the two tokens of the shared page, and one more
        np.testing.assert_array_equal(pool[:, 1, :, :2], before[name][:, 1, :, :2])
    assert (copied["k_scales"][:, 1, :, 2] > 0).all()


def taken(cache: KVCache, pages) -> dict[str, np.ndarray]:
    """The bits of these pages in every pool: `[L, pages, ...]`."""
    pools = [cache.pools_of(leaf) for leaf in range(len(cache.k_pages))]
    return {
        name: np.stack([np.asarray(each[name])[list(pages)] for each in pools]).view(
            np.int32 if "scales" in name else np.int8
        )
        for name in POOLS
    }


def filled(dtype: str, num_pages: int, **where) -> KVCache:
    """Random bits in every page."""
    rng = np.random.default_rng(num_pages)
    cache = KVCache.create(layout=uniform(dtype, num_pages), **where)
    return jax.tree.map(
        lambda a: jax.device_put(
            rng.integers(0, 120, a.shape, np.int8).astype(a.dtype), a.sharding
        ),
        cache,
    )


@every_dtype
def test_snapshots_keep_numbers_and_scales_to_the_last_bit(tmp_path, dtype):
    cache, allocator = filled(dtype, 20), BlockAllocator(uniform(dtype, 20))
    handle = allocator.allocate(range(10))
    allocator.commit([handle], [10])
    was = taken(cache, allocator.sequence(handle).pages)
    save_snapshot(tmp_path / "s", cache, allocator)
    mesh = jax.make_mesh((2,), ("heads",), devices=first_devices(2))
    for where in ({}, dict(mesh=mesh, head_axis="heads"), dict(stacked=True)):
        other = BlockAllocator(uniform(dtype, 30))
        other.allocate_pages(3)
        restored = load_snapshot(tmp_path / "s", filled(dtype, 30, **where), other)
        back, pages = restored.cache, other.sequence(restored.handle).pages
        if where == dict(stacked=True):
            back = replace(
                back, layout=None, stacked=False, **{n: tuple(getattr(back, n)[0]) for n in POOLS}
            )
        got = taken(back, pages)
        for name, bits in was.items():
            bits = bits.copy()
            bits[:, 2, :, 2:] = 0  # behind the tenth token
            np.testing.assert_array_equal(got[name], bits)
    fresh = load_snapshot(tmp_path / "s")
    fresh.cache.check_allocator(fresh.allocator)
    save_snapshot(tmp_path / "again", fresh.cache, fresh.allocator)
    assert (tmp_path / "again").read_bytes() == (tmp_path / "s").read_bytes()
    for wrong in {"int8", "float8_e4m3fn", "float32"} - {dtype}:
        layout = uniform(wrong, 30)
        with pytest.raises(SnapshotMismatch, match="k_pages/0|scales"):
            load_snapshot(tmp_path / "s", KVCache.create(layout=layout), BlockAllocator(layout))


@pytest.mark.parametrize("dtype", ["int8", pytest.param("float8_e4m3fn", marks=pytest.mark.long)])
def test_an_engine_goes_on_from_a_snapshot(tmp_path, dtype):
    engine, again = (tiny.make_engine(layout=mixed(dtype, 60)) for _ in range(2))
    ids = [
        engine.submit(p, SamplingParams(max_new_tokens=n)) for p, n in zip(P, LENGTHS, strict=True)
    ]
    before = [event for _ in range(3) for event in engine.step()]
    engine.save(tmp_path / "s")
    again.restore(tmp_path / "s")
    found = tiny.texts([*before, *again.stream()])
    assert {i: found[request, 0] for i, request in enumerate(ids)} == alone(
        "layers of two dtypes", dtype
    )


@every_dtype
def test_pages_rest_in_host_memory_with_their_scales(dtype):
    cache, mover = filled(dtype, 12), DeviceMover()
    ids = np.array([3, 7, 2, 0], np.int32)
    was = taken(cache, ids[:3])
    rested = mover.finish(mover.take(cache, ids))
    cache = mover.put(filled(dtype, 12), rested, np.array([5, 6, 9, 0], np.int32))
    got = taken(cache, (5, 6, 9))
    assert all(np.array_equal(got[name], was[name]) for name in was)


@every_dtype
@pytest.mark.parametrize("axes", ["heads", "more devices than heads", "rows"])
def test_on_a_mesh_the_numbers_are_those_of_one_device(dtype, axes):
    devices = 4 if axes == "more devices than heads" else 2
    name = "data_axis" if axes == "rows" else "head_axis"
    mesh = jax.make_mesh((devices,), ("x",), devices=first_devices(devices))
    cache = KVCache.create(layout=uniform(dtype, 20), mesh=mesh, **{name: "x"})
    plain = KVCache.create(layout=uniform(dtype, 20))
    rng = np.random.default_rng(1)
    q = rng.standard_normal((2, 1, tiny.HEADS, tiny.DIM)).astype(np.float32)
    k, v = rng.standard_normal((2, 2, 1, tiny.KV_HEADS, tiny.DIM)).astype(np.float32)
    allocator = BlockAllocator(uniform(dtype, 20))
    handles = [allocator.allocate([1, 2, 3]), allocator.allocate([4])]
    batch = allocator.batch(handles, [2, 0], [3, 1])
    there = batch
    if axes == "rows":  # each shard's pages have numbers of their own, and both rows use page 1
        own = batch.groups[0]
        ones = replace(
            own, num_pages=10, page_table=own.page_table * 0 + 1, slots=own.slots * 0 + [[6], [4]]
        )
        there = replace(batch, groups=(ones,))
    fixed = (np.array([0.02, 0.03], np.float32), np.array([0.01, 0.05], np.float32))
    for given in ({}, dict(fixed_scales=fixed)):
        step = jax.jit(lambda c, b, g=given: c.append_and_attend(1, q, k, v, b, **g))
        want, _ = step(plain, batch)
        got, after = step(cache, there)
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)
        assert after.k_scales[1].sharding == cache.k_scales[1].sharding


def test_layouts_of_other_dtypes_find_nothing_of_each_other():
    digests = {
        dtype: BlockAllocator(uniform(dtype), hash_key=b"k").page_digests(range(8), cache_salt=b"")
        for dtype in ("int8", "float8_e4m3fn", "float32", "bfloat16")
    }
    plain = BlockAllocator(90, 4, hash_key=b"k").page_digests(range(8), cache_salt=b"")
    assert digests["float32"] == digests["bfloat16"] == plain
    assert len({tuple(each) for each in digests.values()}) == 3


def test_the_same_bytes_hold_nearly_twice_the_tokens():
    sizes = dict(num_layers=3, num_pages=9, num_kv_heads=2, page_size=16, head_dim=128)
    small, large = (KVCache.create(**sizes, dtype=dtype) for dtype in (jnp.int8, jnp.bfloat16))
    assert large.page_bytes / small.page_bytes >= 1.93
    assert small.nbytes == 9 * small.page_bytes
    assert small.k_scales[2].shape == (9, 2, 16) and large.k_scales == (None,) * 3


def test_a_dtype_that_there_is_not_is_refused_with_those_there_are():
    with pytest.raises(TypeError, match="int8 or float8_e4m3fn; got 'fp8'"):
        KVCache.create(layout=uniform("fp8"))
