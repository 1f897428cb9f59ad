"""Rows and pages over a data axis: local ids on the device, one front on the host."""

from __future__ import annotations

import re
from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from paged_decode import (
    BlockAllocator,
    CacheLayout,
    DecodeBatch,
    Engine,
    EngineConfig,
    KVCache,
    OutOfPages,
    PageCopies,
    PageSpec,
    PageTableError,
    PromptLookup,
    SamplingParams,
    SequenceTooLong,
    ShardedAllocator,
    StaleHandle,
)
from paged_decode.sharding import split_batch

from ..devices import first_devices
from . import tiny
from .test_sharding import COLLECTIVES

SIZES = dict(num_layers=1, num_pages=16, num_kv_heads=2, page_size=4, head_dim=8)


KINDS = [(AxisType.Auto,) * 2, (AxisType.Explicit,) * 2]
MIXED = [(AxisType.Explicit, AxisType.Auto), (AxisType.Auto, AxisType.Explicit)]


def kind_id(kinds) -> str:
    return "-".join(kind.name for kind in kinds)


def make_mesh(data: int, heads: int, kinds=KINDS[0]):
    devices = first_devices(data * heads)
    return jax.make_mesh((data, heads), ("data", "tensor"), axis_types=kinds, devices=devices)


def make_cache(data: int, heads: int, kinds=KINDS[0], **sizes) -> KVCache:
    mesh = make_mesh(data, heads, kinds)
    return KVCache.create(**SIZES | sizes, mesh=mesh, head_axis="tensor", data_axis="data")


def step(cache, q, k, v, batch):
    out, cache = cache.append_and_attend(0, q, k, v, batch)
    return cache, out


@pytest.mark.parametrize("kinds", KINDS, ids=kind_id)
@pytest.mark.parametrize("data, heads", [(2, 1), (2, 2), (4, 2), (1, 2)])
def test_a_step_over_data_shards_equals_one_device(data, heads, kinds):
    rng = np.random.default_rng(0)
    lens = [5, 9, 2, 7]
    allocator = ShardedAllocator(32, 4, num_shards=data)
    handles = [allocator.allocate(rng.integers(0, 9, n)) for n in lens]
    batch = allocator.batch(handles, 0, lens, tokens_per_row=9, pad_to=6)
    q, k, v = (rng.standard_normal((6, 9, h, 8)).astype(np.float32) for h in (6, 2, 2))
    plain = KVCache.create(**SIZES | dict(num_pages=32))
    _, want = step(plain, q, k, v, batch)  # the whole pool's ids serve one device as they are
    cache = make_cache(data, heads, kinds, num_pages=32)
    local, spread = cache.split(batch, (1, 2, 4))
    program = jax.jit(step, donate_argnums=0).lower(cache, *spread.put((q, k, v)), local).compile()
    assert not re.findall(COLLECTIVES, program.as_text())
    _, got = program(cache, *spread.put((q, k, v)), local)
    np.testing.assert_allclose(spread.take(got)[:4], want[:4], rtol=1e-6, atol=1e-6)
    if data > 1:
        assert local.page_table.max() < 32 // data


@pytest.mark.parametrize(
    ("kinds", "within"),
    [
        *((KINDS[1], True), (MIXED[0], False)),
        *(
            pytest.param(*each, marks=pytest.mark.long)
            for each in ((KINDS[1], False), (MIXED[0], True))
        ),
    ],
)
def test_the_engine_runs_over_axes_of_every_kind(kinds, within):
    """`jax.make_mesh` makes Explicit ones, which are part of the type of every array.

    Within `set_mesh` the engine has a drafter, too.
    """
    fn, drafter = (tiny.every_token, PromptLookup(2)) if within else (tiny.model, None)
    cache = make_cache(2, 2, kinds, num_layers=tiny.LAYERS, num_pages=24, head_dim=tiny.DIM)
    allocator = ShardedAllocator(24, 4, num_shards=2)
    shapes = EngineConfig(max_rows=2, prefill_chunk=8, decode_steps=4, top_logits=2)
    params, prompts = jax.tree.map(jnp.asarray, tiny.PARAMS), tiny.prompts(3, low=8, high=12)
    with jax.set_mesh(cache.placement.mesh) if within else nullcontext():
        engine = Engine(fn, params, cache, allocator, shapes, drafter=drafter)
        done = engine.generate(prompts, SamplingParams(max_new_tokens=5))
        sampled = SamplingParams(max_new_tokens=5, temperature=1.0, top_k=4, top_p=0.9)
        again = engine.generate(prompts, sampled)
    assert [c.tokens for c in done] == [tiny.dense_greedy(p, 5) for p in prompts]
    assert all(len(c.tokens) == 5 for c in again) and engine.idle


@pytest.mark.parametrize(
    "data, heads, kinds", [pytest.param(2, 1, KINDS[0], marks=pytest.mark.long), (4, 2, KINDS[1])]
)
def test_the_engine_over_data_shards_gives_the_tokens_of_one_device(data, heads, kinds):
    """With forks, prefix hits and preemption, and no program is made after warm-up."""
    sizes = dict(num_layers=tiny.LAYERS, num_pages=12 * data, head_dim=tiny.DIM)
    cache = make_cache(data, heads, kinds, **sizes)
    allocator = ShardedAllocator(12 * data, 4, num_shards=data, hash_key=b"test")
    shapes = EngineConfig(max_rows=8, row_buckets=(2, 8), prefill_chunk=8, decode_steps=4)
    engine = Engine(tiny.model, jax.tree.map(jnp.asarray, tiny.PARAMS), cache, allocator, shapes)
    engine.warmup()
    programs = engine.stats.programs
    prompts = tiny.prompts(5, low=8, high=20)
    prompts.append(prompts[0])
    done = engine.generate(prompts, SamplingParams(max_new_tokens=10), n=3)
    for i, completion in enumerate(done):
        assert completion.tokens == tiny.dense_greedy(prompts[i // 3], 10)
    assert engine.stats.programs == programs
    assert engine.stats.prefix_hit_tokens and allocator.stats().copies
    assert all(shard.stats().peak_used for shard in allocator.shards)
    bad = next(t for t in range(tiny.VOCAB) if all(t not in c.tokens for c in done))
    fine = [p for p in prompts[:-1] if bad not in p][:3]
    engine.params = engine.params | dict(embed=engine.params["embed"].at[bad].set(jnp.nan))
    done = engine.generate([fine[0], [1, 2, bad], *fine[1:]], SamplingParams(max_new_tokens=10))
    assert [c.finish_reason for c in done] == ["length", "invalid_logits", "length", "length"]
    assert [c.tokens for c in done if c.tokens] == [tiny.dense_greedy(p, 10) for p in fine]
    assert engine.idle and allocator.num_used == 0
    allocator.check_invariants()


def test_groups_of_layers_over_a_mesh_give_the_tokens_of_one_device():
    """With forks, copies of pages, two shards of rows, and more devices than KV heads."""
    data, heads = 2, 4
    kinds = dict(num_kv_heads=tiny.KV_HEADS, head_dim=tiny.DIM)
    groups = (
        PageSpec((1,), num_pages=40 * data, **kinds),
        PageSpec((0,), num_pages=24 * data, window=6, **kinds),
    )
    layout = CacheLayout(4, groups)
    mesh = make_mesh(data, heads)
    cache = KVCache.create(layout=layout, mesh=mesh, data_axis="data", head_axis="tensor")
    allocator = ShardedAllocator(layout, num_shards=data)
    shapes = EngineConfig(max_rows=4, prefill_chunk=8, decode_steps=4)
    engine = Engine(tiny.model, jax.tree.map(jnp.asarray, tiny.PARAMS), cache, allocator, shapes)
    prompts = tiny.prompts(3, seed=4, low=8, high=40)
    done = engine.generate(prompts, SamplingParams(max_new_tokens=10), n=2)
    for i, completion in enumerate(done):
        assert completion.tokens == tiny.dense_greedy(prompts[i // 2], 10, windows=(6, None))
    assert allocator.stats(1).copies and allocator.stats(1).used == 0
    allocator.check_invariants()


def test_an_engine_on_a_mesh_leaves_the_devices_of_its_arrays_as_they_are():
    cache, allocator = make_cache(1, 2), BlockAllocator(16, 4)
    before = set(cache.k_pages[0].devices())
    for _ in range(3):
        Engine(tiny.model, tiny.PARAMS, cache, allocator, EngineConfig(max_rows=2))
    assert cache.k_pages[0].devices() == before and len(before) == 2


def test_ids_that_are_not_local_are_refused_on_the_host():
    good = dict(page_table=[[1, 2]], seq_lens=[5], positions=[[4]], slots=[[8]])
    where = dict(shards=2, pages_per_shard=8, page_size=4, sizes=(1,))

    def split(**changes):
        fields = {k: np.array(v, np.int32) for k, v in (good | changes).items()}
        return split_batch(DecodeBatch.of(**fields), **where)

    split()
    for wrong, words in (
        (dict(page_table=[[1, 9]]), "page 9 in row 0"),
        (dict(page_table=[[1, 8]]), "page 8 in row 0"),  # the null page of shard 1
        (dict(page_table=[[17, 18]]), "page 17"),
        (dict(page_table=[[-1, 0]]), "page -1"),
        (dict(slots=[[40]]), "slot 10"),
    ):
        with pytest.raises(PageTableError, match=words):
            split(**wrong)
    cache = make_cache(2, 1)
    with pytest.raises(PageTableError, match="different shards"):
        cache.copy_pages(PageCopies(np.array([1], np.int32), np.array([9], np.int32)))
    assert not cache.is_deleted


def test_eager_local_ids_beyond_a_shard_are_refused(unchecked):
    cache = make_cache(2, 1)
    table, lens = np.array([[1], [9]], np.int32), np.array([1, 1], np.int32)
    with pytest.raises(ValueError, match="N-1 = 7"):
        cache.attend(0, np.zeros((2, 2, 8), np.float32), DecodeBatch.of(table, lens, None, None))
    with pytest.raises(ValueError, match="B = 3 rows .* 2 shards"):
        cache.attend(0, np.zeros((3, 2, 8), np.float32), DecodeBatch.of(table, lens, None, None))


@pytest.mark.parametrize("kinds", KINDS, ids=kind_id)
def test_copies_go_to_their_shards(kinds):
    cache = make_cache(2, 1, kinds)
    rng = np.random.default_rng(0)
    cache = jax.tree.map(
        lambda a: jax.device_put(rng.standard_normal(a.shape).astype(np.float32), a.sharding), cache
    )
    before = np.array(cache.v_pages[0])
    copies = PageCopies(np.array([1, 9, 2], np.int32), np.array([3, 10, 4], np.int32))
    after = np.array(cache.copy_pages(copies).v_pages[0])
    want = before.copy()
    want[[3, 10, 4]] = before[[1, 9, 2]]
    np.testing.assert_array_equal(after, want)


def test_what_the_front_refuses_changes_no_shard():
    allocator = ShardedAllocator(8, 4, num_shards=2)  # 3 pages a shard
    a, b = allocator.allocate([1] * 8), allocator.allocate([2] * 12)
    assert [allocator.shard_of(h) for h in (a, b)] == [0, 1]
    state = lambda: [(s.num_free, s.num_used) for s in allocator.shards]  # noqa: E731
    before = state()
    for error, call in (
        (SequenceTooLong, lambda: allocator.reserve([a, b], 1)),
        (SequenceTooLong, lambda: allocator.append([a, b], [[3], [3]])),
        (SequenceTooLong, lambda: allocator.advance([a, b], [3, 3])),
        (ValueError, lambda: allocator.commit([a, b], [8, 13])),
        (StaleHandle, lambda: allocator.free([a, b + 2])),
        (ValueError, lambda: allocator.free([a, a])),
        (SequenceTooLong, lambda: allocator.allocate([1] * 13)),
        (OutOfPages, lambda: allocator.allocate([1] * 9)),
        (ValueError, lambda: allocator.batch([a, b], 0, [8, 12], tokens_per_row=12, pad_to=1)),
        (ValueError, lambda: allocator.advance([a], [1], columns=2)),
    ):
        with pytest.raises(error):
            call()
        assert state() == before and allocator.sequence(a).length == 8
    allocator.commit([a, b], [8, 12])
    batch, copies = allocator.advance([a], [3])
    assert batch.seq_lens.tolist() == [9] and len(copies.src) == 0
    stats = allocator.stats()
    assert (stats.used, stats.sequences, stats.stored_tokens) == (6, 2, 21)
    assert stats.tail_waste == 1 - 21 / 24 and len(allocator.page_states()) == 8
    allocator.free([a, b])
    assert allocator.num_used == 0 and allocator.match_prefix([2] * 12) == 8
    with pytest.raises(StaleHandle):
        allocator.tokens(a)
    allocator.check_invariants()


def test_the_front_has_every_call_of_a_block_allocator_but_what_copies_and_files_bring():
    public = {name for name in dir(BlockAllocator) if not name.startswith("_")}
    missing = public - {name for name in dir(ShardedAllocator(4, 4, num_shards=2))}
    assert missing == {
        *("export_state", "import_state", "page_stamps"),
        *("prepare_copy", "commit_copy", "cancel_copy"),
    }


def test_pages_by_number_come_from_all_shards_and_go_back_all_or_nothing():
    allocator = ShardedAllocator(12, 4, num_shards=3)  # 3 pages a shard
    handle = allocator.allocate([1] * 8)
    with pytest.raises(OutOfPages, match="8"):
        allocator.allocate_pages(8)
    assert allocator.num_used == 2
    pages = allocator.allocate_pages(5)
    assert sorted(pages) == [5, 6, 7, 9, 10] and allocator.num_free == 2
    assert [allocator.ref_count(page) for page in (5, 9, 11, 8, 0)] == [1, 1, 0, 0, 0]
    assert allocator.ref_count(allocator.sequence(handle).pages[0]) == 1
    with pytest.raises(ValueError, match="at most 11"):
        allocator.ref_count(12)
    for error, wrong in (
        (ValueError, [5, 12]),
        (ValueError, [5, -1]),
        (ValueError, [5, 9, 9]),
        (ValueError, [[5]]),
        (PageTableError, [5, 11]),
        (PageTableError, [5, 1]),  # of a sequence
    ):
        with pytest.raises(error):
            allocator.free_pages(wrong)
        assert allocator.num_used == 7
    allocator.free_pages([0, 4, *pages])  # null pages are padding
    assert allocator.num_used == 2 and allocator.handles == (handle,)
    allocator.check_invariants()


def test_shards_share_a_hash_key_and_one_eviction_rank():
    class Last:
        """Gives up the newest page."""

        def rank(self, page):
            return -page.last_used

    allocator = ShardedAllocator(8, 4, num_shards=2, eviction=Last())
    prompt = list(range(9))
    keys = [shard.page_digests(prompt) for shard in allocator.shards]
    assert keys[0] == keys[1] == allocator.page_digests(prompt) and len(keys[0]) == 2
    assert allocator.page_digests(prompt, cache_salt="x") != keys[0]
    assert allocator.can_ever_fit(12) and not allocator.can_ever_fit(13)
    handles = [allocator.allocate([token] * 4) for token in (1, 2, 3, 4)]
    shards = [allocator.shard_of(handle) for handle in handles]
    allocator.commit(handles, 4)
    allocator.free(handles)
    assert allocator.num_evictable == 4 and shards == [0, 1, 0, 1]
    allocator.allocate([9] * 8)  # the free page of shard 0, and a cached one
    assert [allocator.match_prefix([token] * 5) for token in (1, 2, 3, 4)] == [4, 4, 0, 4]


def test_pages_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="2 shards of 'data'"):
        make_cache(2, 1, num_pages=15)
    with pytest.raises(ValueError, match="2 shards"):
        ShardedAllocator(15, 4, num_shards=2)


def test_rows_of_length_0_may_stand_anywhere():
    """A row that computes nothing is not on the device; the others keep their place."""
    allocator = ShardedAllocator(32, 4, num_shards=2)
    handles = [allocator.allocate([i, 2, 3, 4, 5]) for i in range(4)]
    batch = allocator.batch(handles, 0, [5, 0, 5, 5], tokens_per_row=5, pad_to=6)
    local, spread = make_cache(2, 1, num_pages=32).split(batch, (2, 4))
    assert spread.total == 4 and sorted(local.seq_lens.tolist()) == [0, 5, 5, 5]
    assert spread.take(local.tokens)[:4, 0].tolist() == [0, 0, 2, 3]
    assert spread.put(batch.tokens).tolist() == local.tokens.tolist()
    assert spread.take(spread.put(batch.tokens)).tolist() == batch.tokens.tolist()


def test_an_allocator_of_other_shards_and_batches_that_are_not_split_are_refused():
    cache = make_cache(2, 1)
    for other in (BlockAllocator(16, 4), ShardedAllocator(16, 4, num_shards=4)):
        with pytest.raises(ValueError, match="differ in shards"):
            cache.advance(other, [other.allocate([1])], [2])
        with pytest.raises(ValueError, match="differ in shards"):
            Engine(tiny.model, tiny.PARAMS, cache, other)
    allocator = ShardedAllocator(16, 4, num_shards=2)
    batch = allocator.batch([allocator.allocate([1, 2])], 0, 2, tokens_per_row=2)
    q = np.zeros((1, 2, 2, 8), np.float32)
    with pytest.raises(ValueError, match="call split first"):
        cache.attend(0, q, batch)
    local, _ = cache.split(batch, (1,))
    for wrong in (local, BlockAllocator(8, 4).batch([], [], [])):
        with pytest.raises(ValueError, match="num_pages 8, but the cache has 16"):
            cache.split(wrong, (1,))
