"""The engine over a stacked cache: the model scans over its layers, and the tokens are the same."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paged_decode import (
    BlockAllocator,
    CacheLayout,
    Engine,
    EngineConfig,
    KVCache,
    PageSpec,
    SamplingParams,
)
from paged_decode.engine.events import gather
from paged_decode.faults import FaultPlan, Faults
from paged_decode.tiers import HostTier

from ...devices import first_devices
from ..tiny import DIM, HEADS, KV_HEADS, PARAMS, dense_greedy, fail_decode, make_params, prompts

WINDOW, PAGES, GREEDY = 6, 24, SamplingParams(max_new_tokens=12)
P = prompts(5, seed=21, low=3, high=20)
MORE = make_params(1)
PER_LAYER = PARAMS | {f"{name}{2 + i}": MORE[f"{name}{i}"] for name in "qkvo" for i in (0, 1)}
BLOCKS = {  # two blocks of two layers: [block, ...] of the first layers, and of the second ones
    f"{name}{at}": np.stack([PER_LAYER[f"{name}{at}"], PER_LAYER[f"{name}{at + 2}"]])
    for name in "qkvo"
    for at in (0, 1)
} | {name: PARAMS[name] for name in ("embed", "place", "head")}


def attend(cache, x, weights, at, layer, batch, group=None):
    q, k, v = (
        (x @ weights[f"{name}{at}"]).reshape(*x.shape[:2], heads, DIM)
        for name, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS))
    )
    seen, cache = cache.append_and_attend(layer, q, k, v, batch, group=group)
    return x + jnp.tanh(seen.reshape(*x.shape[:2], -1) @ weights[f"o{at}"]), cache


@jax.default_matmul_precision("highest")
def scanned(params, cache, tokens, batch):
    """Blocks in a scan, whose carry has the cache: a layer is traced, its group is not."""
    x = jnp.asarray(params["embed"])[tokens] + jnp.asarray(params["place"])[batch.positions]
    groups = len(batch.groups)

    def block(carry, given):
        (x, cache), (number, weights) = carry, given
        for at in (0, 1):  # of one group, it has all layers; of two, every second one
            layer, group = (2 * number + at, 0) if groups == 1 else (number, 1 - at)
            x, cache = attend(cache, x, weights, at, layer, batch, group)
        return (x, cache), None

    weights = {name: params[name] for name in params if name[-1] in "01"}
    (x, cache), _ = jax.lax.scan(block, (x, cache), (jnp.arange(2), weights))
    return x[:, -1] @ params["head"], cache


@jax.default_matmul_precision("highest")
def unrolled(params, cache, tokens, batch):
    x = jnp.asarray(params["embed"])[tokens] + jnp.asarray(params["place"])[batch.positions]
    for layer in range(4):
        x, cache = attend(cache, x, params, layer, layer, batch)
    return x[:, -1] @ params["head"], cache


def layout_of(groups: int, num_pages: int) -> CacheLayout:
    sizes = dict(num_kv_heads=KV_HEADS, head_dim=DIM, num_pages=num_pages)
    if groups == 1:
        return CacheLayout.uniform(num_layers=4, page_size=4, **sizes)
    full = PageSpec(layers=(1, 3), **sizes)
    return CacheLayout(4, (full, PageSpec(layers=(0, 2), window=WINDOW, **sizes)))


def engine_of(
    groups: int = 1, num_pages: int = PAGES, *, stacked: bool = True, where=None, **options
):
    layout = layout_of(groups, num_pages)
    model, params = (scanned, BLOCKS) if stacked else (unrolled, PER_LAYER)
    cache = KVCache.create(layout=layout, stacked=stacked, **where or {})
    shapes = dict(max_rows=4, row_buckets=(4,), prefill_chunk=8, prefill_rows=2, decode_steps=4)
    config = EngineConfig(**shapes, max_sequence_tokens=60)
    allocator = BlockAllocator(layout, hash_key=b"test")
    return Engine(model, params, cache, allocator, config, **options)


def expected(groups: int, prompt, count: int = 12):
    windows = (None,) * 4 if groups == 1 else (WINDOW, None) * 2
    return dense_greedy(prompt, count, PER_LAYER, windows)


@pytest.mark.parametrize("groups", [pytest.param(1, marks=pytest.mark.long), 2])
def test_short_of_pages_poisoned_and_swapped_out_rows_get_the_tokens_of_a_dense_model(groups):
    engine = engine_of(groups, tier=HostTier(64))
    Faults(FaultPlan(poison=True, preempt_every=4)).install(engine)
    done = engine.generate(P, GREEDY, n=2)  # two samples: pages are shared, and copied on write
    assert [each.tokens for each in done] == [expected(groups, p) for p in P for _ in range(2)]
    assert engine.stats.swaps and engine.stats.swapped_in_pages
    assert engine.allocator.num_used == 0 and engine.cache.stacked
    engine.allocator.check_invariants()


def test_a_program_that_dies_with_the_stack_loses_no_request():
    engine = engine_of()
    streams = {engine.submit(p, GREEDY): [] for p in P}
    fail_decode(engine, {1}, RuntimeError("device"), deleting=True)
    with pytest.raises(RuntimeError, match="device"):
        while True:
            for event in engine.step():
                streams[event.request_id].append(event.token)
    for event in engine.stream():
        streams[event.request_id].append(event.token)
    assert [tuple(each) for each in streams.values()] == [expected(1, p) for p in P]


@pytest.mark.long
def test_requests_in_flight_pass_from_a_stack_on_a_mesh_to_separate_layers_and_back(tmp_path):
    mesh = jax.make_mesh((2,), ("heads",), devices=first_devices(2))
    engines = [
        engine_of(2, where=dict(mesh=mesh, head_axis="heads")),
        engine_of(2, stacked=False),
        engine_of(2),
    ]
    assert engines[0].cache.k_pages[0].shape == (2, PAGES, KV_HEADS, 4, DIM)
    for prompt in P:
        engines[0].submit(prompt, SamplingParams(max_new_tokens=24))
    told = []
    for number, (engine, heir) in enumerate(zip(engines, engines[1:], strict=False)):
        told += [event for _ in range(3) for event in engine.step()]
        engine.save(tmp_path / str(number))
        heir.restore(tmp_path / str(number))
    told += engines[-1].stream()
    done = [each.tokens for each in sorted(gather(told), key=lambda each: each.request_id)]
    assert done == [expected(2, p, 24) for p in P]


def test_no_program_copies_the_stack_and_a_profile_names_its_parts():
    engine = engine_of(num_pages=4096)
    texts = {}
    for kind, size in dict(decode=(4, None), prefill=8).items():
        compiled = engine.runner._lowered(kind, size)[1].compile()
        memory, texts[kind] = compiled.memory_analysis(), compiled.as_text()
        assert memory.alias_size_in_bytes >= engine.cache.nbytes
        assert memory.temp_size_in_bytes < engine.cache.nbytes / 20
    found = {kind: set(re.findall(r"paged_decode\.\w+", text)) for kind, text in texts.items()}
    own = {"paged_decode.prefill", "paged_decode.decode", "paged_decode.sample"}
    assert found["prefill"] & own == {"paged_decode.prefill"}
    assert found["decode"] & own == {"paged_decode.decode", "paged_decode.sample"}
