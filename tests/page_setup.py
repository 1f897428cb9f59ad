"""What the snippets of each page take as given: for page `a-b.md` the function `a_b`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from paged_decode import BlockAllocator, Engine, EngineConfig, KVCache, SamplingParams

# Pages whose snippets another test runs.
ELSEWHERE: dict[str, str] = {"embedding.md": "tests/examples/test_numbered.py"}

Names = dict[str, Any]
SIZES = dict(num_layers=1, num_pages=32, num_kv_heads=2, page_size=4, head_dim=8)
CONFIG = EngineConfig(max_rows=1, decode_steps=2, prefill_chunk=8, max_sequence_tokens=32)
PROMPT = [3, 1, 4, 1, 5]


def model(params, cache, tokens, batch):
    """One layer over whatever heads the cache has, and logits of 16 tokens."""
    heads, dim = cache.k_pages[0].shape[-3] // cache.kv_copies(0), cache.k_pages[0].shape[-1]
    x = jnp.broadcast_to(params[tokens][..., None, :1], (*tokens.shape, heads, dim))
    out, cache = cache.append_and_attend(0, x, x, x, batch)
    return params[tokens[:, -1]] + out[:, -1, 0, :1], cache


PARAMS = np.random.default_rng(0).normal(size=(16, 16)).astype(np.float32)


def pair() -> tuple[KVCache, BlockAllocator]:
    return KVCache.create(**SIZES), BlockAllocator(32, 4)


def engine() -> Names:
    return dict(model=model, params=PARAMS, prompt_ids=PROMPT, layer=0)


def training() -> Names:
    """And a train step that learns nothing."""
    cache, allocator = pair()

    def train(params, *_):
        return params * 0.99

    names = dict(policy=model, params=PARAMS, cache=cache, allocator=allocator, train=train)
    own = dict(Engine=Engine, EngineConfig=EngineConfig, SamplingParams=SamplingParams)
    return names | own | dict(prompts=[PROMPT, [2, 7]], fresh_pools=pair)


def allocator() -> Names:
    cache, allocator = pair()
    handles = [allocator.allocate(PROMPT), allocator.allocate([2, 7])]
    return dict(
        cache=cache,
        allocator=allocator,
        handles=handles,
        tokens=[8, 9],
        model=model,
        params=PARAMS,
    )


def attention() -> Names:
    cache, allocator = pair()
    batch, _ = allocator.extend([allocator.allocate([8])], [[1, 2, 3, 4, 5, 6]])
    return dict(
        cache=cache,
        batch=batch,
        layer=0,
        queries=jnp.ones((1, 6, 2, 8)),
        keys=jnp.ones((1, 6, 2, 8)),
        values=jnp.ones((1, 6, 2, 8)),
        tail_mask=jnp.tri(6, dtype=bool)[None],
        nodes=jnp.array([6]),
        k_pages=jnp.zeros((4, 2, 4, 8)),
        v_pages=jnp.zeros((4, 2, 4, 8)),
        k=jnp.ones((1, 2, 8)),
        v=jnp.ones((1, 2, 8)),
        q=jnp.ones((1, 2, 8)),
        slots=jnp.array([4]),
        page_table=jnp.array([[1]]),
        seq_lens=jnp.array([1]),
    )


def sharding() -> Names:
    def step(params, cache, batch):
        new = np.ones((*batch.tokens.shape, 8, 128), np.float32)
        return params[np.asarray(batch.tokens)[:, -1]], cache.append(0, new, new, batch)

    return dict(
        jax=jax,
        model=model,
        params=PARAMS,
        step=step,
        prompts=[PROMPT, [2, 7]],
        tokens=[8, 9],
    )


def snapshots() -> Names:
    """And a file of somebody else in the current folder."""
    from paged_decode import save_snapshot

    def new_engine() -> Engine:
        return Engine(model, PARAMS, *pair(), CONFIG)

    cache, allocator = pair()
    other_cache, other_allocator = pair()
    allocator.commit(allocator.allocate(PROMPT), len(PROMPT))
    save_snapshot("upload.pgd", cache, allocator)
    running = new_engine()
    running.submit(PROMPT, SamplingParams(max_new_tokens=4))
    return dict(
        jax=jax,
        np=np,
        cache=cache,
        allocator=allocator,
        other_cache=other_cache,
        other_allocator=other_allocator,
        engine=running,
        fresh=new_engine(),
        live_bytes=2**16,
    )


def pressure() -> Names:
    from paged_decode import Engine

    cache, allocator = pair()
    return dict(
        Engine=Engine,
        model=model,
        params=PARAMS,
        cache=cache,
        allocator=allocator,
        config=CONFIG,
        engine=Engine(model, PARAMS, *pair(), CONFIG),
    )
