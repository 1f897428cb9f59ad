"""A cache whose layers differ: heads, dtypes, windows that give pages back."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paged_decode import BlockAllocator, CacheLayout, KVCache, PageSpec
from paged_decode.faults import poison_free_pages

WINDOW, SIZE, HEADS = 8, 4, 4
FULL = PageSpec(layers=(1,), num_kv_heads=1, head_dim=16, num_pages=64)
WINDOWED = PageSpec(
    layers=(0,), num_kv_heads=2, head_dim=8, num_pages=32, dtype=jnp.bfloat16, window=WINDOW
)
LAYOUT = CacheLayout(SIZE, (FULL, WINDOWED))
RNG = np.random.default_rng(0)
NUMBERS = {  # by layer: queries, keys, values of a token; of few bits
    layer: [
        np.round(4 * RNG.normal(size=(50, heads, LAYOUT.groups[LAYOUT.group_of[layer]].head_dim)))
        / 4
        for heads in (HEADS, kv, kv)
    ]
    for layer, kv in ((0, 2), (1, 1))
}


def numbers(layer, tokens, positions):
    """Of tokens in their places; bfloat16 holds them exactly."""
    turn = 1 + (positions % 7)[..., None, None] / 4
    return [jnp.asarray(table, jnp.float32)[tokens] * turn for table in NUMBERS[layer]]


@partial(jax.jit, donate_argnums=0, static_argnames="backend")
@jax.default_matmul_precision("highest")  # a GPU takes fewer bits of a float32 by default
def step(cache, batch, backend=None):
    """The attention of both layers to the batch's tokens; `[B, T, Hq, D]` of each."""
    outs = []
    for layer in range(2):
        q, k, v = numbers(layer, batch.tokens, batch.positions)
        dtype = cache.k_pages[layer].dtype
        k, v = k.astype(dtype), v.astype(dtype)
        out, cache = cache.append_and_attend(layer, q, k, v, batch, implementation=backend)
        outs.append(out)
    return cache, outs


def dense(text, layer):
    """The same for every position of a text."""
    tokens, positions = np.array(text), np.arange(len(text))
    q, k, v = (np.asarray(a, np.float64) for a in numbers(layer, tokens, positions))
    k, v = (np.repeat(a, HEADS // a.shape[1], axis=1) for a in (k, v))
    scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(q.shape[-1])
    back = positions[:, None] - positions
    seen = (back >= 0) & ((back < WINDOW) if layer == 0 else True)
    weights = np.where(seen, np.exp(scores - scores.max(axis=-1, keepdims=True)), 0)
    return np.einsum("hqk,khd->qhd", weights / weights.sum(axis=-1, keepdims=True), v)


class Loop:
    """A loop of one's own: what every query saw, beside the dense attention to its text."""

    def __init__(self, poison: bool, backend: str | None):
        self.cache = KVCache.create(layout=LAYOUT)
        self.allocator = BlockAllocator(LAYOUT)
        self.poison, self.backend, self.seen = poison, backend, []

    def run(self, batch, handles):
        if self.poison:
            self.cache = poison_free_pages(self.cache, self.allocator)
        self.cache, outs = step(self.cache, batch, backend=self.backend)
        for row, handle in enumerate(handles):
            text = self.allocator.tokens(handle)
            for layer, out in enumerate(outs):
                want = dense(text, layer)
                for t in np.flatnonzero(batch.groups[0].slots[row] >= SIZE):
                    got = np.asarray(out[row, t], np.float64)
                    np.testing.assert_allclose(got, want[batch.positions[row, t]], atol=2e-5)
                    self.seen.append(got)

    def prefill(self, handles, ends, width):
        infos = [self.allocator.sequence(h) for h in handles]
        done = self.allocator.prepare(handles, ends)
        self.cache = self.cache.copy_pages(tuple(each.copies for each in done))
        begins = [info.computed for info in infos]
        batch = self.allocator.batch(handles, begins, ends, tokens_per_row=width, columns=16)
        self.run(batch, handles)
        self.allocator.commit(handles, ends)

    def advance(self, handles, tokens):
        self.cache, batch = self.cache.advance(self.allocator, handles, tokens, columns=16)
        self.run(batch, handles)


def life(poison: bool, backend: str | None) -> list:
    """Prompts of several lengths, front padding with few new tokens, steps, drafts, forks."""
    loop, rng = Loop(poison, backend), np.random.default_rng(1)
    texts = [rng.integers(0, 50, n).tolist() for n in (50, 21)]
    a, b = (loop.allocator.allocate(text, chunk=16) for text in texts)
    loop.prefill([a, b], [16, 16], 16)
    loop.prefill([a, b], [32, 19], 16)  # 3 new tokens of b behind 13 of padding
    loop.prefill([a], [47], 16)
    loop.prefill([a, b], [50, 21], 16)
    for token in (5, 6, 7):
        loop.advance([a, b], [token, token + 20])
    (c,) = loop.allocator.fork(a, commit=True)
    loop.advance([a, b, c], [1, 2, 3])
    for handle in (a, c):  # five drafts of which two are right
        loop.cache, batch = loop.cache.extend(
            loop.allocator, [handle], [rng.integers(0, 50, 5).tolist()], columns=16
        )
        loop.run(batch, [handle])
        loop.allocator.truncate([handle], loop.allocator.sequence(handle).length - 3)
        loop.advance([handle], [9])
    assert [len(loop.allocator.sequence(h).groups[1].pages) for h in (a, b)] == [3, 3]
    assert loop.allocator.sequence(a).groups[1].first > 10
    loop.allocator.check_invariants()
    loop.allocator.free([a, b, c])
    assert loop.allocator.stats(0).used == loop.allocator.stats(1).used == 0
    return loop.seen


@pytest.mark.parametrize("backend", [None, pytest.param("reference", marks=pytest.mark.long)])
def test_what_a_window_gave_back_changes_no_bit_of_what_is_seen(backend):
    clean, poison = life(False, backend), life(True, backend)
    assert len(clean) == len(poison) > 100
    for one, other in zip(clean, poison, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_layer_sees_less_than_the_window_of_its_group_if_asked_and_never_more():
    cache, allocator = KVCache.create(layout=LAYOUT), BlockAllocator(LAYOUT)
    cache, batch = cache.advance(allocator, [allocator.allocate([1] * 20)], [2])
    q = jnp.ones((1, 1, HEADS, 8))
    whole, same, less = (
        cache.attend(0, q, batch, **options, return_lse=True)[1]
        for options in ({}, dict(sliding_window=None), dict(sliding_window=3))
    )
    assert (whole == same).all() and (less < whole).all()
    later = cache.attend(0, q, batch, starts=np.array([19], np.int32), return_lse=True)[1]
    assert (later < less).all()
    for wide in (WINDOW + 1, (WINDOW, 0)):
        with pytest.raises(ValueError, match="wider than the window of 8 tokens"):
            cache.attend(0, q, batch, sliding_window=wide)
    with pytest.raises(TypeError, match="say which, group="):
        stacked = KVCache.create(layout=LAYOUT, stacked=True)
        jax.eval_shape(lambda i: stacked.attend(i, q, batch), jnp.int32(0))


def test_cache_batch_and_allocator_are_of_one_layout():
    cache, plain = KVCache.create(layout=LAYOUT), BlockAllocator(64, SIZE)
    with pytest.raises(ValueError, match="make both of the same layout"):
        cache.check_allocator(plain)
    batch = plain.batch([plain.allocate([1, 2, 3])], 0, 3, tokens_per_row=4)
    with pytest.raises(ValueError, match="batch has 1 groups of layers, the cache 2"):
        cache.append(0, *2 * [jnp.zeros((1, 4, 2, 8))], batch)
    with pytest.raises(TypeError, match="give either it or them"):
        KVCache.create(layout=LAYOUT, num_pages=9)
    with pytest.raises(TypeError, match="head_dim must be given"):
        KVCache.create(num_layers=1, num_pages=9, num_kv_heads=1, page_size=4)
    assert [pages.dtype for pages in cache.k_pages] == [jnp.bfloat16, jnp.float32]
    assert cache.nbytes == 2 * (32 * 2 * 4 * 8 * 2 + 64 * 4 * 16 * 4)
    assert "1 layers with 32 pages for windows of 8" in repr(cache)


def test_a_step_over_two_groups_copies_no_pool():
    layout = CacheLayout(
        SIZE,
        (
            PageSpec((1,), num_kv_heads=1, head_dim=16, num_pages=4096),
            PageSpec((0,), num_kv_heads=2, head_dim=8, num_pages=2048, window=WINDOW),
        ),
    )
    cache, allocator = KVCache.create(layout=layout), BlockAllocator(layout)
    cache, batch = cache.advance(allocator, [allocator.allocate([1])], [2], columns=4)
    memory = step.lower(cache, batch).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= cache.nbytes
    assert memory.temp_size_in_bytes < cache.nbytes / 20


# ---- layers of a group in one array


def period(cache, batch, scale, layers, groups):
    """One block of a hybrid model: a layer with a window, then one that sees all."""
    outs = []
    for kind, layer, group in zip((0, 1), layers, groups, strict=True):
        q, k, v = (a * scale for a in numbers(kind, batch.tokens, batch.positions))
        out, cache = cache.append_and_attend(layer, q, k, v, batch, group=group)
        outs.append(out)
    return cache, outs


@partial(jax.jit, donate_argnums=0)
@jax.default_matmul_precision("highest")
def scanned(cache, batch):
    """Blocks in a scan: the layer is traced, and its group is not."""

    def body(cache, block):
        return period(cache, batch, 1 + block.astype(jnp.float32), (block, block), (1, 0))

    return jax.lax.scan(body, cache, jnp.arange(2))


@partial(jax.jit, donate_argnums=0)
@jax.default_matmul_precision("highest")
def unrolled(cache, batch):
    outs = []
    for block in range(2):
        layers = 2 * block, 2 * block + 1
        cache, out = period(cache, batch, 1.0 + block, layers, (None, None))
        outs.append(out)
    return cache, [jnp.stack(each) for each in zip(*outs, strict=True)]


def blocks(num_pages: int = 64) -> CacheLayout:
    full, window = (
        replace(spec, num_pages=num_pages, dtype="float32") for spec in (FULL, WINDOWED)
    )
    return CacheLayout(SIZE, (replace(full, layers=(1, 3)), replace(window, layers=(0, 2))))


def test_a_stack_of_each_group_holds_what_the_layers_hold_one_by_one():
    layout = blocks()
    caches = [KVCache.create(layout=layout, stacked=stacked) for stacked in (False, True)]
    assert [a.shape for a in caches[1].k_pages] == [(2, 64, 1, 4, 16), (2, 64, 2, 4, 8)]
    assert caches[0].nbytes == caches[1].nbytes and caches[0].page_bytes == caches[1].page_bytes
    allocator = BlockAllocator(layout)
    handle = allocator.allocate(range(3, 24), chunk=21)
    batch = allocator.batch([handle], 0, 21, tokens_per_row=24, columns=16)
    outs = [[], [], []]
    for turn in range(6):
        if turn:  # the first time it is a prompt
            allocator.commit([handle], allocator.sequence(handle).length)
            (twin,) = allocator.fork(handle)
            batch, copies = allocator.advance([handle, twin], [turn, 40 - turn], columns=16)
            caches = [cache.copy_pages(copies) for cache in caches]
            caches = [poison_free_pages(cache, allocator) for cache in caches]
        for i, (at, step) in enumerate(((0, unrolled), (1, unrolled), (1, scanned))):
            caches[at], out = step(caches[at], batch)
            outs[i].append(out)
        if turn:
            allocator.free(twin)
    for one, other, third in zip(*map(jax.tree.leaves, outs), strict=True):
        assert np.isfinite(one).all()
        np.testing.assert_allclose(one, other, atol=1e-5)
        np.testing.assert_allclose(one, third, atol=1e-5)


def test_a_scan_over_a_stack_copies_no_pool_and_an_unknown_layer_is_refused():
    layout = blocks(4096)
    cache, allocator = KVCache.create(layout=layout, stacked=True), BlockAllocator(layout)
    cache, batch = cache.advance(allocator, [allocator.allocate([1])], [2], columns=4)
    memory = scanned.lower(cache, batch).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= cache.nbytes
    assert memory.temp_size_in_bytes < cache.nbytes / 20
    new = [jnp.zeros((1, 1, 1, 16))] * 2
    plain = KVCache.create(layout=layout)
    with pytest.raises(TypeError, match="made with stacked=True"):
        jax.eval_shape(lambda i: plain.append(i, *new, batch, group=0), jnp.int32(0))
    for bad in (dict(layer=4), dict(layer=2, group=0), dict(layer=0, group=2)):
        with pytest.raises(ValueError, match="must be"):
            plain.append(bad.pop("layer"), *new, batch, **bad)
    with pytest.raises(ValueError):
        cache.append(2, *new, batch, group=0)
