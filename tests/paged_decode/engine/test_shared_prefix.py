"""Samples that share a prefix read it once: the tokens are those of samples that do not."""

from __future__ import annotations

from typing import Any
from unittest import mock

import jax
import numpy as np
import pytest

from paged_decode import (
    Engine,
    EngineConfig,
    KVCache,
    PromptLookup,
    SamplingParams,
    ShardedAllocator,
)
from paged_decode.cache import kv_cache
from paged_decode.cache.kv_cache import shared_prefix_plan

from ...devices import first_devices
from ..tiny import (
    DIM,
    KV_HEADS,
    LAYERS,
    PARAMS,
    dense_greedy,
    every_token,
    make_engine,
    model,
    preempt,
    prompts,
    texts,
)
from .test_engine_groups import dense, layout

LONG = prompts(3, seed=4, low=28, high=36)
DRAWN = SamplingParams(max_new_tokens=16, temperature=1.0, seed=3)


def made(**options: Any):
    """An engine that shares all that it can."""
    shapes: dict[str, Any] = dict(max_rows=16, row_buckets=(16,), num_pages=160, shared_prefix=1)
    return make_engine(**(shapes | options))


@pytest.fixture
def plans():
    """Tokens of every part of every plan that a device has made since."""
    found: list[np.ndarray] = []

    def watched(*args, **options):
        plan = shared_prefix_plan(*args, **options)
        jax.debug.callback(found.append, plan.seq_lens)
        return plan

    with mock.patch.object(kv_cache, "shared_prefix_plan", watched):
        yield found


def own_model():
    """A function whose programs nobody has compiled yet."""
    return lambda *args: model(*args)


def rollout(fn=model, **shapes: Any):
    """Four samples of three prompts each, some of which end early, and a fork in mid-answer."""
    engine = made(fn=fn, **shapes)
    short = SamplingParams(max_new_tokens=5, temperature=1.0, seed=8)
    ids = [engine.submit(prompt, DRAWN, n=4) for prompt in LONG[:2]]
    ids.append(engine.submit(LONG[2], short, n=4))
    events = []
    while not any(event.request_id == ids[0] for event in events):
        events += engine.step()
    engine.fork(ids[0], DRAWN, sample=0)
    events += engine.step()
    preempt(engine)
    preempt(engine, 0)
    events += engine.stream()
    engine.allocator.check_invariants()
    assert engine.idle and engine.allocator.num_used == 0
    return texts(events), engine


def test_tokens_are_those_of_rows_that_read_alone_through_forks_preemption_and_ends(plans):
    got, engine = rollout(own_model())
    jax.effects_barrier()
    assert engine.stats.preemptions == 2 and len(got) == 13
    assert max(int(each.max()) for each in plans) >= 24  # pages of 4 tokens
    want, _ = rollout(shared_prefix=0)
    assert got == want


def test_samples_of_one_prompt_get_the_tokens_of_a_dense_forward():
    engine = made()
    done = engine.generate(LONG[:2], SamplingParams(max_new_tokens=12), n=8)
    want = [dense_greedy(prompt, 12) for prompt in LONG[:2] for _ in range(8)]
    assert [each.tokens for each in done] == want


def test_requests_that_find_a_prefix_in_the_cache_share_it(plans):
    tails = prompts(6, seed=6, low=2, high=6)
    batch = [LONG[0] + tail for tail in tails]
    engine = made(fn=own_model())
    done = engine.generate(batch, SamplingParams(max_new_tokens=8))
    jax.effects_barrier()
    assert [each.tokens for each in done] == [dense_greedy(prompt, 8) for prompt in batch]
    assert max(int(each.max()) for each in plans) == len(LONG[0]) // 4 * 4


def test_a_prefix_that_saves_too_little_is_read_by_every_row(plans):
    engine = made(fn=own_model(), shared_prefix=10_000)
    done = engine.generate(LONG[:1], SamplingParams(max_new_tokens=8), n=8)
    jax.effects_barrier()
    assert done[7].tokens == dense_greedy(LONG[0], 8)
    assert plans and not any(each.any() for each in plans)


def test_nothing_is_compiled_after_warmup(compiled):
    engine = made(max_rows=8, row_buckets=(1, 8))
    engine.warmup()
    compiled.clear()
    engine.generate(LONG, DRAWN, n=4)
    engine.generate(LONG[:1], DRAWN)
    assert compiled == []


def test_layers_with_a_window_read_alone_and_the_others_together():
    engine = made(layout=layout(full=160, windowed=160))
    done = engine.generate(LONG[:2], SamplingParams(max_new_tokens=12), n=4)
    want = [dense(tuple(prompt), 12) for prompt in LONG[:2] for _ in range(4)]
    assert [each.tokens for each in done] == want


def test_over_a_mesh_samples_share_within_their_shard(plans):
    mesh = jax.make_mesh((2, 2), ("data", "heads"), devices=first_devices(4))
    sizes: dict[str, Any] = dict(num_layers=LAYERS, num_kv_heads=KV_HEADS, head_dim=DIM)
    placed: dict[str, Any] = dict(mesh=mesh, data_axis="data", head_axis="heads")
    cache = KVCache.create(**sizes, num_pages=160, page_size=4, **placed)
    allocator = ShardedAllocator(160, 4, num_shards=2)
    config = EngineConfig(
        max_rows=8, prefill_chunk=16, max_sequence_tokens=80, row_buckets=(8,), shared_prefix=1
    )
    engine = Engine(own_model(), PARAMS, cache, allocator, config)
    done = engine.generate(LONG, SamplingParams(max_new_tokens=9), n=4)
    jax.effects_barrier()
    assert [c.tokens for c in done] == [dense_greedy(p, 9) for p in LONG for _ in range(4)]
    assert max(int(each.max()) for each in plans) >= 24


def test_drafts_are_checked_as_without():
    def run(share: int):
        drafts = dict(drafter=PromptLookup(2))
        engine = made(fn=every_token, policies=drafts, shared_prefix=share)
        return [each.tokens for each in engine.generate(LONG, DRAWN, n=3)]

    assert run(1) == run(0)


def test_wrong_numbers_are_refused():
    with pytest.raises(ValueError, match="shared_prefix"):
        make_engine(shared_prefix=-1)
    with pytest.raises(TypeError, match="shared_prefix"):
        make_engine(shared_prefix=1.5)
