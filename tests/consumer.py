"""What a user of the installed package writes, for `mypy --strict` and pyright; nothing runs it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, assert_type

import jax
import jax.numpy as jnp
import numpy as np

import paged_decode
from paged_decode import (
    AttentionOptions,
    BlockAllocator,
    CacheLayout,
    Completion,
    DecodeBatch,
    Engine,
    EngineConfig,
    Handle,
    KVCache,
    Model,
    OutOfPages,
    PageSpec,
    PendingSnapshot,
    SamplingParams,
    Snapshot,
    TokenEvent,
    append_and_attend,
    merge_attention,
    paged_attention,
    save_snapshot,
    save_snapshot_async,
)
from paged_decode.allocator import AllocatorStats, CachedPage, SequenceInfo
from paged_decode.errors import CorruptState
from paged_decode.policies import LRU, EvictionRank, Swap, VictimPolicy
from paged_decode.tiers import HostTier

assert_type(paged_decode.__version__, str)


def model(
    params: Any, cache: KVCache, tokens: jax.Array, batch: DecodeBatch
) -> tuple[jax.Array, KVCache]:
    q = k = v = params[tokens]
    seen, cache = cache.append_and_attend(0, q, k, v, batch)
    return seen[:, -1], cache


the_model: Model = model


def attention(q: jax.Array, pages: jax.Array, table: jax.Array, lens: jax.Array) -> jax.Array:
    out = paged_attention(q, pages, pages, table, lens, sliding_window=8)
    assert_type(out, jax.Array)
    both = paged_attention(q, pages, pages, table, lens, return_lse=True)
    assert_type(both, tuple[jax.Array, jax.Array])
    merged, lse = merge_attention(jnp.stack([both[0], out]), jnp.stack([both[1], both[1]]))
    assert_type(lse, jax.Array)
    return merged


def layers(cache: KVCache, q: jax.Array, batch: DecodeBatch, lse: bool) -> KVCache:
    options = AttentionOptions(scale=0.5, soft_cap=50.0, implementation="xla")
    assert_type(cache.attend(0, q, batch, **options), jax.Array)
    assert_type(cache.attend(0, q, batch, return_lse=True), tuple[jax.Array, jax.Array])
    both, cache = cache.append_and_attend(0, q, q, q, batch, return_lse=True, **options)
    assert_type(both, tuple[jax.Array, jax.Array])
    either, cache = cache.append_and_attend(0, q, q, q, batch, return_lse=lse)
    assert_type(either, jax.Array | tuple[jax.Array, jax.Array])
    pools = cache.k_pages[0], cache.v_pages[0]
    assert_type(pools, tuple[jax.Array, jax.Array])
    tables = batch.page_table, batch.groups[0].page_table, batch.seq_lens
    assert_type(tables, tuple[jax.Array, jax.Array, jax.Array])
    three = append_and_attend(*pools, q, q, q, *tables[1:], implementation=["a backend"])
    assert_type(three, tuple[jax.Array, jax.Array, jax.Array])
    assert_type((cache.head_dim, cache.num_kv_heads), tuple[int, int])
    return cache.append(0, q, q, batch)


class ShallowLast:
    def rank(self, page: CachedPage) -> tuple[int, int]:
        return -page.depth, page.last_used


class First:
    def choose(self, running: Any) -> Any:
        return running[0]


rank: EvictionRank = ShallowLast()
victim: VictimPolicy = First()


def bookkeeping() -> int:
    layout = CacheLayout(16, (PageSpec(layers=(0,), num_kv_heads=1, head_dim=8, num_pages=64),))
    allocator = BlockAllocator(64, 16, eviction=LRU())
    handle = allocator.allocate([1, 2, 3])
    assert_type(handle, Handle)
    info: SequenceInfo = allocator.sequence(handle)
    stats: AllocatorStats = allocator.stats()
    cache = KVCache.create(layout=layout)
    assert_type(cache, KVCache)
    cache, batch = cache.advance(allocator, [handle], np.asarray([4]))
    assert_type(batch, DecodeBatch)
    try:
        allocator.check_invariants()
    except (CorruptState, OutOfPages) as error:
        print(error)
    return info.length + stats.used


def serve(params: Any, cache: KVCache, allocator: BlockAllocator, path: Path) -> list[Completion]:
    engine = Engine(
        model,
        params,
        cache,
        allocator,
        EngineConfig(max_rows=4),
        victim=victim,
        tier=HostTier(8),
        preemption=Swap(),
    )
    sampling = SamplingParams(max_new_tokens=8)
    assert_type(engine.submit([1, 2], sampling, n=2), int)
    for event in engine.stream():
        assert_type(event, TokenEvent)
        assert_type(event.finish_reason, str | None)
    snapshot = engine.save(path)
    assert_type(snapshot, Snapshot)
    later: PendingSnapshot = save_snapshot_async(path, engine.cache, allocator)
    assert_type(later.result(), Snapshot)
    save_snapshot(path, engine.cache, allocator, parent=snapshot)
    return engine.generate([[1, 2]], sampling)
