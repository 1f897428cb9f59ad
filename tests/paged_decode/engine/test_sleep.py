"""An engine that gives its memory back, and takes it again: nobody notices but the device."""

from __future__ import annotations

import asyncio
import gc
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paged_decode import (
    AsyncEngine,
    Engine,
    EngineConfig,
    KVCache,
    PagedDecodeError,
    SamplingParams,
    ShardedAllocator,
)
from paged_decode.tiers import HostTier

from .. import tiny
from ..tiny import PARAMS, dense_greedy, make_engine, make_params, prompts, texts

OTHER = make_params(seed=7)
GREEDY = SamplingParams(max_new_tokens=12)
DRAWN = SamplingParams(max_new_tokens=12, temperature=0.8, seed=5)
PROMPTS = prompts(4, low=9, high=20)


def pool_bytes() -> int:
    """Of the arrays of keys and values in the memory of all devices: those with 4 axes."""
    gc.collect()
    arrays = [a for a in jax.live_arrays() if a.ndim == 4]
    return sum(a.nbytes for a in arrays if a.sharding.memory_kind == "device")


def begun(engine) -> list:
    """Requests that run, that wait and that share pages; and what came of them so far."""
    for prompt in PROMPTS[:2]:
        engine.submit(prompt, GREEDY)
    for prompt in PROMPTS[2:]:
        engine.submit(prompt, DRAWN, n=2)
    events = []
    while len(events) < 8:
        events += engine.step()
    return events


@pytest.fixture(scope="module")
def engine():
    """One with nothing to compile."""
    engine = make_engine(decode_steps=2, num_pages=64, policies=dict(tier=HostTier(64)))
    engine.warmup()
    return engine


@pytest.fixture(scope="module")
def expected(engine) -> dict:
    got = texts([*begun(engine), *engine.stream()])
    first = min(request for request, _ in got)
    return {(request - first, sample): tokens for (request, sample), tokens in got.items()}


def check(engine, events, expected) -> None:
    got = texts(events)
    first = min(request for request, _ in got)
    assert {(r - first, sample): tokens for (r, sample), tokens in got.items()} == expected
    engine.allocator.check_invariants()
    assert engine.allocator.num_used == 0


@pytest.fixture
def pinned(monkeypatch):
    """As on an accelerator, whose page-locked memory a CPU has in name."""

    def sharding(array):
        return array.sharding.with_memory_kind("pinned_host")

    monkeypatch.setattr("paged_decode.engine.resting.pinned_sharding", sharding)


@pytest.mark.parametrize("pages", ["recompute", "host", "pinned"])
def test_requests_in_flight_get_the_same_tokens_and_the_memory_is_gone_meanwhile(
    engine, expected, compiled, pages, request
):
    if pages == "pinned":
        request.getfixturevalue("pinned")
        pages = "host"
    whole = pool_bytes()
    shapes = [(a.shape, a.sharding) for a in jax.tree.leaves(engine.cache)]
    events = begun(engine)
    prefilled = engine.stats.prefill_tokens
    engine.sleep(pages)
    assert engine.asleep
    assert pool_bytes() == whole - sum(leaf.nbytes for leaf in jax.tree.leaves(engine.cache))
    assert engine.cache.is_deleted
    engine.sleep()  # nothing: it is asleep
    engine.wake()
    engine.wake()
    assert not engine.asleep and pool_bytes() == whole
    assert [(a.shape, a.sharding) for a in jax.tree.leaves(engine.cache)] == shapes
    events += engine.stream()
    check(engine, events, expected)
    assert not compiled
    if pages == "host":  # only the prompts that had not begun
        assert engine.stats.prefill_tokens - prefilled <= sum(map(len, PROMPTS[2:]))


def test_what_comes_back_from_the_host_is_the_same_to_the_last_bit(engine):
    """Pages that nobody uses, too, and those that are NaN."""
    engine.generate(PROMPTS[:1], GREEDY)
    broken = tuple(array.at[-1].set(jnp.nan) for array in engine.cache.k_pages)
    engine.runner.cache = replace(engine.cache, k_pages=broken)
    before = [np.array(leaf) for leaf in jax.tree.leaves(engine.cache)]
    engine.sleep("host")
    engine.wake()
    after = [np.array(leaf) for leaf in jax.tree.leaves(engine.cache)]
    for a, b in zip(before, after, strict=True):
        assert a.tobytes() == b.tobytes()
    (again,) = engine.generate(PROMPTS[:1], GREEDY)  # the prefix cache is there as well
    assert again.figures.cached_tokens > 0 and again.tokens == dense_greedy(PROMPTS[0], 12)


def test_with_a_tier_requests_find_their_pages_there(engine, expected):
    engine.tier.clear()
    events = begun(engine)
    before = engine.stats.swapped_in_pages
    engine.sleep()
    assert engine.tier.num_pages > 0
    engine.wake()
    events += engine.stream()
    check(engine, events, expected)
    assert engine.stats.swapped_in_pages > before


@pytest.mark.parametrize("pages", ["recompute", "host"])
def test_what_comes_meanwhile_waits_and_what_needs_pages_says_so(engine, pages, tmp_path):
    request = engine.submit(PROMPTS[0], GREEDY)
    engine.step()
    engine.sleep(pages)
    late = engine.submit(PROMPTS[1], GREEDY)
    gone = engine.submit(PROMPTS[2], GREEDY)
    engine.cancel(gone)
    pin = engine.pin(list(range(8)))
    for call in (
        engine.step,
        engine.warmup,
        lambda: engine.generate(PROMPTS[:1], GREEDY),
        lambda: engine.fork(request, GREEDY),
        lambda: engine.save(tmp_path / "s"),
        lambda: engine.restore(tmp_path / "s"),
    ):
        with pytest.raises(RuntimeError, match=r"asleep: call wake\(\) first"):
            call()
    assert engine.gauges()["requests_waiting"] >= 1 and "Engine(" in repr(engine)
    engine.wake()
    got = texts(engine.stream())
    assert got == {
        (request, 0): dense_greedy(PROMPTS[0], 12),
        (late, 0): dense_greedy(PROMPTS[1], 12),
        (gone, 0): (),
    }
    engine.unpin(pin)
    engine.step()


@pytest.mark.parametrize("pages", ["recompute", "host"])
def test_a_trainer_changes_the_weights_while_the_engine_is_asleep(engine, pages, compiled):
    request = engine.submit(PROMPTS[0], GREEDY)
    events = []
    while len(events) < 2:
        events += engine.step()
    engine.sleep(pages)  # once before: the suite may have cleared what JAX itself had compiled
    engine.wake()
    compiled.clear()
    engine.sleep(pages)
    engine.update_params(OTHER)
    engine.wake()
    seen = [e for e in events if e.token is not None]
    events += engine.stream()
    assert not compiled
    (tokens,) = texts(events).values()
    old = [e.token for e in events if e.version == seen[0].version]
    assert {e.request_id for e in events} == {request} and len(old) >= len(seen)
    rest = dense_greedy([*PROMPTS[0], *old], 12 - len(old), OTHER)
    assert tokens == (*old, *rest)
    compiled.clear()  # of the dense model
    engine.sleep(pages)
    engine.update_params(PARAMS, in_flight="end")
    engine.wake()
    (done,) = engine.generate(PROMPTS[:1], GREEDY)
    assert not compiled
    assert done.tokens == dense_greedy(PROMPTS[0], 12)


def test_pages_of_others_are_not_lost(engine):
    handle = engine.allocator.allocate([1, 2, 3, 4, 5])
    request = engine.submit(PROMPTS[0], GREEDY)
    engine.step()
    with pytest.raises(PagedDecodeError, match='free them, or sleep\\("host"\\)'):
        engine.sleep()
    assert not engine.asleep
    engine.sleep("host")
    engine.wake()
    assert texts(engine.stream()) == {(request, 0): dense_greedy(PROMPTS[0], 12)}
    engine.allocator.free(handle)


@pytest.mark.parametrize("pages", ["recompute", "host"])
def test_without_memory_to_wake_the_engine_stays_asleep(engine, pages, monkeypatch):
    def fail(*_):
        raise MemoryError("none is left")

    engine.submit(PROMPTS[0], GREEDY)
    engine.step()
    engine.sleep(pages)
    with monkeypatch.context() as patch:
        patch.setattr(
            f"paged_decode.engine.resting.{dict(host='_put').get(pages, 'empty_like')}", fail
        )
        with pytest.raises(MemoryError, match="none is left"):
            engine.wake()
    assert engine.asleep
    engine.wake()
    assert list(texts(engine.stream()).values()) == [dense_greedy(PROMPTS[0], 12)]


def test_a_word_that_is_none_changes_nothing(engine, unchecked):
    with pytest.raises(ValueError, match="pages must be one of"):
        engine.sleep("disk")
    assert not engine.asleep


def test_tasks_are_told_that_the_engine_is_asleep(engine):
    async def ask() -> None:
        async with AsyncEngine(engine) as server:
            stream = server.submit(PROMPTS[0], GREEDY)
            with pytest.raises(RuntimeError, match="asleep"):
                async for _ in stream:
                    pass
            engine.wake()
            tokens = [event.token async for event in server.submit(PROMPTS[0], GREEDY)]
            assert tuple(tokens) == dense_greedy(PROMPTS[0], 12)

    engine.sleep()
    asyncio.run(asyncio.wait_for(ask(), 60))
    list(engine.stream())
    assert engine.idle


def test_on_a_mesh_every_shard_goes_and_comes_back(compiled, request):
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), devices=jax.devices()[:4])
    cache = KVCache.create(
        num_layers=tiny.LAYERS,
        num_kv_heads=tiny.KV_HEADS,
        head_dim=tiny.DIM,
        num_pages=32,
        page_size=4,
        mesh=mesh,
        head_axis="tensor",
        data_axis="data",
    )
    allocator = ShardedAllocator(32, 4, num_shards=2)
    config = EngineConfig(max_rows=2, row_buckets=(2,), prefill_chunk=8, decode_steps=2)
    before = pool_bytes()
    engine = Engine(tiny.model, jax.tree.map(jnp.asarray, PARAMS), cache, allocator, config)
    engine.warmup()
    own = sum(leaf.nbytes for leaf in jax.tree.leaves(engine.cache))
    compiled.clear()
    for pages in ("recompute", "host", "pinned"):
        if pages == "pinned":
            request.getfixturevalue("pinned")
            pages = "host"
        for prompt in PROMPTS[:3]:
            engine.submit(prompt, GREEDY)
        events = []
        while len(events) < 4:
            events += engine.step()
        shardings = [leaf.sharding for leaf in jax.tree.leaves(engine.cache)]
        engine.sleep(pages)
        assert pool_bytes() == before - own
        engine.wake()
        assert [leaf.sharding for leaf in jax.tree.leaves(engine.cache)] == shardings
        got = texts([*events, *engine.stream()])
        assert list(got.values()) == [dense_greedy(prompt, 12) for prompt in PROMPTS[:3]]
    for word in ("keep", "end"):
        engine.update_params(jax.tree.map(jnp.asarray, OTHER), in_flight=word)
    done = engine.generate(PROMPTS[:3], GREEDY)
    assert [each.tokens for each in done] == [dense_greedy(p, 12, OTHER) for p in PROMPTS[:3]]
    assert not compiled and engine.allocator.num_used == 0
