"""The cache as a pytree: what it refuses, what it copies, what it writes."""

from __future__ import annotations

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paged_decode import (
    BlockAllocator,
    CacheLayout,
    DecodeBatch,
    KVCache,
    PageCopies,
    PageSpec,
    one_token_batch,
    save_snapshot,
)
from paged_decode.kernels import append_kv, paged_attention

from ..devices import first_devices
from . import tiny

SIZES = dict(num_layers=2, num_pages=6, num_kv_heads=2, page_size=4, head_dim=8)


def filled(**changes) -> KVCache:
    cache = KVCache.create(**SIZES | changes)
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda a: jnp.asarray(rng.standard_normal(a.shape), a.dtype), cache)


@pytest.mark.parametrize(
    "name, value",
    [
        ("num_layers", 0),
        ("num_pages", 1),
        ("num_kv_heads", -1),
        ("page_size", 12),
        ("page_size", 4.0),
        ("head_dim", True),
        ("num_pages", 2**30),  # slots would not fit int32
    ],
)
def test_sizes_that_make_no_cache_are_refused_by_name(unchecked, name, value):
    error = ValueError if type(value) is int else TypeError
    with pytest.raises(error, match=name):
        KVCache.create(**SIZES | {name: value})


def test_a_cache_and_a_batch_pass_through_jit_and_tree_map():
    cache = filled()
    batch = DecodeBatch.of(*(np.zeros(s, np.int32) for s in ((3, 2), (3,), (3, 1), (3, 1))))
    back, seen = jax.jit(lambda c, b: (c, b))(cache, batch)
    assert isinstance(back, KVCache) and isinstance(seen, DecodeBatch)
    assert jax.tree.map(jnp.shape, seen) == jax.tree.map(np.shape, batch)
    jax.tree.map(lambda _: object(), cache)  # unflattening must not validate


def test_repr_tells_sizes_and_bytes():
    text = repr(KVCache.create(**SIZES))
    assert text == "KVCache(2 layers, 6 pages of 4 tokens, 2 heads of 8, float32, 0.0 MiB)"


def test_copies_reach_every_layer_and_read_before_they_write():
    cache = filled()
    before = [np.array(a) for a in (*cache.k_pages, *cache.v_pages)]  # a view would hold the buffer
    pairs = PageCopies(np.array([1, 2, 1], np.int32), np.array([2, 3, 5], np.int32))
    after = cache.copy_pages(pairs)
    for old, new in zip(before, (*after.k_pages, *after.v_pages), strict=True):
        np.testing.assert_array_equal(new, old[[0, 1, 1, 2, 4, 1]])
    assert cache.is_deleted and not after.is_deleted


def test_no_copies_return_the_cache_itself():
    cache = filled()
    none = np.zeros(0, np.int32)
    assert cache.copy_pages(PageCopies(none, none)) is cache


def test_a_stacked_pool_scans_over_layers_in_place_and_equals_per_layer_arrays():
    """L layers in one array as a scan carry: no layer is sliced out, and nothing is copied."""
    layers, pages, rng = 4, 512, np.random.default_rng(1)
    cache = KVCache.create(**SIZES | dict(num_layers=layers, num_pages=pages))
    allocator = BlockAllocator(pages, 4)
    rows = [allocator.allocate(rng.integers(0, 9, n)) for n in (5, 9)]
    batch = allocator.batch(rows, [0, 0], [5, 9], tokens_per_row=9)
    q, k, v = (
        jnp.asarray(rng.standard_normal((layers, 2, 9, h, 8)), jnp.float32) for h in (4, 2, 2)
    )

    def scanned(pools, q, k, v, batch):
        def layer(pools, x):
            index, q, k, v = x
            pools = append_kv(*pools, k, v, batch.slots, layer=index)
            out = paged_attention(q, *pools, batch.page_table, batch.seq_lens, layer=index)
            return pools, out

        return jax.lax.scan(layer, pools, (jnp.arange(layers, dtype=jnp.int32), q, k, v))

    pools = tuple(jnp.zeros((layers, pages, 2, 4, 8)) for _ in range(2))
    program = jax.jit(scanned, donate_argnums=0).lower(pools, q, k, v, batch).compile()
    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes >= sum(p.nbytes for p in pools)
    assert memory.temp_size_in_bytes < pools[0].nbytes / 4
    _, got = program(pools, q, k, v, batch)
    for layer in range(layers):
        cache = cache.append(layer, k[layer], v[layer], batch.slots)
        want = cache.attend(layer, q[layer], batch)
        np.testing.assert_allclose(got[layer], want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("columns", [1, 3])
def test_append_and_attend_equals_append_then_attend_where_rows_bring_fewer_tokens(columns):
    allocator = BlockAllocator(num_pages=6, page_size=4)
    rows = [allocator.allocate(range(n)) for n in (5, 2)]
    begin = [5 - columns, 3 - columns]  # the second row brings one token less than columns
    batch = allocator.batch(rows, begin, [5, 2], tokens_per_row=columns, columns=2)
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, columns, h, 8)).astype(np.float32) for h in (4, 2, 2))
    apart = filled().append(1, k, v, batch.slots)
    want = apart.attend(1, q, batch, return_lse=True)
    got, cache = filled().append_and_attend(1, q, k, v, batch, return_lse=True)
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[1:], b[1:]), cache, apart)


@pytest.mark.parametrize("layer", [-1, 2, np.int64(-2), 2**40])
def test_a_layer_outside_the_cache_is_refused_and_changes_nothing(unchecked, layer):
    cache, batch = filled(), BlockAllocator(6, 4)
    batch = batch.batch([batch.allocate([1])], 0, 1)
    q, k = jnp.zeros((1, 1, 4, 8)), jnp.zeros((1, 1, 2, 8))
    for call in (
        lambda: cache.append(layer, k, k, batch.slots),
        lambda: cache.attend(layer, q, batch),
        lambda: cache.append_and_attend(layer, q, k, k, batch),
    ):
        with pytest.raises(ValueError, match=r"layer must be in 0 .. 1; got"):
            call()
    assert not cache.is_deleted


def test_a_layer_is_a_number_that_is_known_while_tracing(unchecked):
    cache, k = filled(), jnp.zeros((1, 2, 8))
    for layer in (True, 1.0, None, jnp.zeros(2, jnp.int32)):
        with pytest.raises(TypeError, match="layer must be a Python int, because layers are"):
            cache.append(layer, k, k, np.array([4], np.int32))
    with pytest.raises(TypeError, match="made with stacked=True"):
        jax.jit(lambda i: cache.append(i, k, k, np.array([4], np.int32)))(1)
    cache.append(np.int64(1), k, k, np.array([4], np.int32))


def test_a_cache_that_was_given_away_is_named(tmp_path):
    cache, k = filled(), jnp.zeros((1, 2, 8))
    cache.append(0, k, k, np.array([4], np.int32))
    with pytest.raises(RuntimeError, match="k_pages was deleted: .* use the array that this call"):
        cache.append(0, k, k, np.array([4], np.int32))
    with pytest.raises(RuntimeError, match="k_pages was deleted"):
        cache.copy_pages(PageCopies(np.array([1], np.int32), np.array([2], np.int32)))
    with pytest.raises(RuntimeError, match="kv/k_pages/0 was deleted"):
        save_snapshot(tmp_path / "file", cache, BlockAllocator(6, 4))


def test_a_copied_cache_has_pages_of_its_own():
    cache, k = filled(), jnp.zeros((1, 2, 8))
    twin = copy.deepcopy(cache)
    jax.tree.map(np.testing.assert_array_equal, twin, cache)
    cache.append(0, k, k, np.array([4], np.int32))  # gives the pages of the first away
    assert cache.is_deleted and not twin.is_deleted


def test_sizes_are_those_that_all_layers_share_and_else_the_groups_are_named():
    cache = KVCache.create(
        num_layers=2, num_pages=3, num_kv_heads=2, page_size=4, head_dim=8, dtype=jnp.float16
    )
    assert (cache.num_kv_heads, cache.head_dim, cache.dtype) == (2, 8, np.float16)
    books = PageSpec(layers=(), num_kv_heads=1, head_dim=1, num_pages=3)
    one = PageSpec(layers=(0,), num_kv_heads=2, head_dim=8, num_pages=3, window=4)
    two = PageSpec(layers=(1,), num_kv_heads=2, head_dim=16, num_pages=3, window=8)
    layout = CacheLayout(4, (books, one, two))
    for stacked in (False, True):
        cache = KVCache.create(layout=layout, stacked=stacked)
        assert (cache.num_kv_heads, cache.dtype) == (2, np.float32)
        with pytest.raises(ValueError, match=r"head_dim: 8 in group 1, 16 in group 2; see"):
            _ = cache.head_dim


def test_copies_of_heads_on_a_mesh_are_not_counted():
    mesh = jax.make_mesh((4,), ("heads",), devices=first_devices(4))
    sizes = dict(num_layers=1, num_pages=3, page_size=4, head_dim=8)
    for heads in (2, 8):
        cache = KVCache.create(**sizes, num_kv_heads=heads, mesh=mesh, head_axis="heads")
        assert cache.num_kv_heads == heads


def test_a_loop_of_ones_own_reads_shared_prefixes_once_and_gets_the_same_tokens():
    """Forks of a prompt, three steps in one program, with the plan of its beginning."""
    (prompt,) = tiny.prompts(1, seed=4, low=30, high=30)
    found = []
    for shares in (False, True):
        cache = KVCache.create(
            num_layers=tiny.LAYERS, num_pages=40, num_kv_heads=tiny.KV_HEADS, page_size=4,
            head_dim=tiny.DIM,
        )  # fmt: skip
        allocator = BlockAllocator(40, 4)
        parent = allocator.allocate(prompt[:-1])
        batch = allocator.batch([parent], [0], [29], tokens_per_row=29)
        _, cache = tiny.model(tiny.PARAMS, cache, batch.tokens, batch)
        cache, forks = cache.fork(allocator, parent, 3)
        handles = [parent, *forks]
        cache, batch = cache.reserve(allocator, handles, 3)

        def program(cache, batch, shares=shares):
            if shares:
                batch = cache.share_prefixes(batch, min_tokens=1)
            tokens, out = jnp.full(4, prompt[-1], jnp.int32) + jnp.arange(4, dtype=jnp.int32), []
            for step in range(3):
                lens = jnp.full(4, len(prompt) + step, jnp.int32)
                now = one_token_batch(batch, tokens, lens)
                logits, cache = tiny.model(tiny.PARAMS, cache, now.tokens, now)
                tokens = jnp.argmax(logits, axis=-1).astype(jnp.int32)
                out.append(tokens)
            shared = batch.groups[0].shared
            return jnp.stack(out), None if shared is None else shared.seq_lens

        found.append(jax.jit(program)(cache, batch))
    (alone, _), (together, shared) = found
    assert together.tolist() == alone.tolist() and shared.max() == 28
