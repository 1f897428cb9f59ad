"""Logits that are the same to the bit however a token came to be computed."""

from __future__ import annotations

from typing import Any

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
    PromptLookup,
    SamplingParams,
    ShardedAllocator,
)
from paged_decode.engine.events import gather

from ...devices import first_devices
from .. import tiny
from ..tiny import preempt

# Wide enough that XLA rounds products of one row and of many otherwise.
VOCAB, WIDTH, HEADS, KV_HEADS, DIM, LAYERS = 97, 512, 8, 2, 64, 2
DRAWN = SamplingParams(max_new_tokens=16, temperature=1.0, seed=3, logprobs=0)
ROWS = 64  # of one token, in every program


def make_params() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = dict(embed=(VOCAB, WIDTH), head=(WIDTH, VOCAB))
    for i in range(LAYERS):
        shapes |= {f"{n}{i}": (WIDTH, KV_HEADS * DIM) for n in "kv"}
        shapes |= {f"q{i}": (WIDTH, HEADS * DIM), f"o{i}": (HEADS * DIM, WIDTH)}
        shapes |= {f"up{i}": (WIDTH, 3 * WIDTH), f"down{i}": (3 * WIDTH, WIDTH)}
    return {
        name: (rng.standard_normal(shape) / np.sqrt(shape[-2]) * 3).astype(np.float32)
        for name, shape in shapes.items()
    }


PARAMS = make_params()


def norm(x):
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)


def turned(x, positions):
    """Rotary embeddings."""
    pace = 10000.0 ** (-jnp.arange(DIM // 2, dtype=jnp.float32) / (DIM // 2))
    angle = positions[..., None, None].astype(jnp.float32) * pace
    a, b = jnp.split(x, 2, axis=-1)
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def every_token(params, cache, tokens, batch):
    x = params["embed"][tokens]
    for i in range(LAYERS):
        q, k, v = (
            (norm(x) @ params[f"{name}{i}"]).reshape(*tokens.shape, heads, DIM)
            for name, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS))
        )
        q, k = turned(q, batch.positions), turned(k, batch.positions)
        out, cache = cache.append_and_attend(i, q, k, v, batch)
        x = x + out.reshape(*tokens.shape, -1) @ params[f"o{i}"]
        x = x + jax.nn.silu(norm(x) @ params[f"up{i}"]) @ params[f"down{i}"]
    return norm(x) @ params["head"], cache


def model(params, cache, tokens, batch):
    logits, cache = every_token(params, cache, tokens, batch)
    return logits[:, -1], cache


def make(*, windows: bool = False, prefix_cache: bool = True, **config: Any) -> Engine:
    kinds: dict[str, Any] = dict(num_kv_heads=KV_HEADS, head_dim=DIM, num_pages=300)
    layout = CacheLayout.uniform(num_layers=LAYERS, page_size=4, **kinds)
    if windows:
        specs = PageSpec((1,), **kinds), PageSpec((0,), window=10, **kinds)
        layout = CacheLayout(4, specs)
    shapes: dict[str, Any] = dict(
        max_rows=8, prefill_chunk=ROWS, max_sequence_tokens=256, decode_steps=4
    )
    shapes |= dict(batch_invariant=True) | config
    allocator = BlockAllocator(layout, prefix_cache=prefix_cache, hash_key=b"test")
    score = every_token if shapes.get("score_chunk") else None
    cache, own = KVCache.create(layout=layout), EngineConfig(**shapes)
    return Engine(model, PARAMS, cache, allocator, own, score=score)


def bits(completion) -> tuple:
    return completion.tokens, np.array(completion.logprobs, np.float32).tobytes()


def some_prompts(count: int = 5) -> list[list[int]]:
    rng = np.random.default_rng(3)
    return [rng.integers(0, VOCAB, int(rng.integers(5, 100))).tolist() for _ in range(count)]


PROMPTS = some_prompts()


@pytest.fixture(scope="module")
def expected() -> list[tuple]:
    return [bits(each) for each in make().generate(PROMPTS, DRAWN)]


def test_a_request_alone_has_the_bits_that_it_has_among_others(expected):
    for prompt, want in zip(PROMPTS, expected, strict=True):
        assert bits(make().generate([prompt], DRAWN)[0]) == want


@pytest.mark.parametrize("shape", [(2, 32), (8, 8)], ids=str)
def test_a_prompt_in_chunks_of_any_width_has_the_bits_of_one_chunk(expected, shape):
    engine = make(prefill_rows=shape[0], prefill_chunk=shape[1])
    assert [bits(each) for each in engine.generate(PROMPTS, DRAWN)] == expected


def test_samples_that_lost_their_pages_and_compute_them_at_once_keep_their_bits(expected):
    engine = make(prefix_cache=False)
    ids, events = [engine.submit(prompt, DRAWN) for prompt in PROMPTS], []
    for visit in range(100):
        events += engine.step()
        if visit < 12 and visit % 2 == 0:
            preempt(engine)
            preempt(engine, 0)
    assert engine.idle and engine.stats.preemptions > 3 and engine.stats.recomputed_tokens > 100
    found = {each.request_id: bits(each) for each in gather(events)}
    assert [found[i] for i in ids] == expected


def turns(done) -> list[list[int]]:
    """The next prompts of conversations: what was said, and three tokens more."""
    return [[*prompt, *each.tokens, 1, 2, 3] for prompt, each in zip(PROMPTS, done, strict=True)]


@pytest.mark.parametrize(
    "windows",
    [
        pytest.param(False, marks=pytest.mark.long, id="full"),
        pytest.param(True, id="with a window"),
    ],
)
def test_answers_that_are_found_in_the_prefix_cache_have_the_bits_of_computed_ones(windows):
    engine = make(windows=windows)
    following = turns(engine.generate(PROMPTS, DRAWN))
    before = engine.stats.prefix_hit_tokens
    found = engine.generate(following, DRAWN)
    assert engine.stats.prefix_hit_tokens - before > 4 * sum(len(each) for each in following) / 5
    fresh = make(windows=windows, prefix_cache=False)
    assert list(map(bits, found)) == list(map(bits, fresh.generate(following, DRAWN)))


def test_log_probabilities_of_scoring_are_those_of_the_draw(expected):
    engine = make(score_chunk=32)
    texts = [[*prompt, *tokens] for prompt, (tokens, _) in zip(PROMPTS, expected, strict=True)]
    scored = engine.generate(texts, SamplingParams(max_new_tokens=1, prompt_logprobs=0))
    for each, (_, logprobs) in zip(scored, expected, strict=True):
        assert each.prompt_logprobs is not None
        last = np.array(each.prompt_logprobs.logprobs[-16:], np.float32)
        assert last.tobytes() == logprobs


@pytest.mark.long
def test_without_the_mode_the_same_requests_round_otherwise(expected):
    """What the tests above are worth: they fail without the mode."""
    engine = make(batch_invariant=False, score_chunk=32)
    done = engine.generate(PROMPTS, DRAWN)
    texts = [[*prompt, *each.tokens] for prompt, each in zip(PROMPTS, done, strict=True)]
    scored = engine.generate(texts, SamplingParams(max_new_tokens=1, prompt_logprobs=0))
    last = [each.prompt_logprobs.logprobs[-16:] for each in scored if each.prompt_logprobs]
    drawn = [each.logprobs for each in done]
    assert last != drawn
    np.testing.assert_allclose(last, drawn, rtol=1e-4, atol=1e-3)


def test_nothing_is_compiled_after_warmup(compiled):
    engine = make(score_chunk=8)
    engine.warmup()
    compiled.clear()
    engine.generate(PROMPTS, DRAWN)
    engine.generate(PROMPTS[:1], SamplingParams(max_new_tokens=2, prompt_logprobs=0))
    assert compiled == []


def test_shards_of_a_data_axis_have_rows_of_their_own():
    mesh = jax.make_mesh((2,), ("data",), devices=first_devices(2))
    sizes: dict[str, Any] = dict(
        num_layers=tiny.LAYERS, num_kv_heads=tiny.KV_HEADS, head_dim=tiny.DIM
    )
    cache = KVCache.create(**sizes, num_pages=80, page_size=4, mesh=mesh, data_axis="data")
    allocator = ShardedAllocator(80, 4, num_shards=2)
    config = EngineConfig(
        max_rows=3, prefill_chunk=8, decode_steps=4, max_sequence_tokens=80, batch_invariant=True
    )
    engine = Engine(tiny.model, tiny.PARAMS, cache, allocator, config)
    asked = tiny.prompts(7, seed=2)
    done = engine.generate(asked, SamplingParams(max_new_tokens=9))
    assert [each.tokens for each in done] == [tiny.dense_greedy(p, 9) for p in asked]


def test_what_cannot_keep_it_is_refused():
    with pytest.raises(ValueError, match="batch_invariant and shared_prefix exclude each other"):
        EngineConfig(batch_invariant=True, shared_prefix=512)
    with pytest.raises(ValueError, match=r"row_buckets must be \(8,\), got \(4, 8\)"):
        EngineConfig(batch_invariant=True, row_buckets=(4, 8))
    with pytest.raises(NotImplementedError, match="batch_invariant serves no drafter"):
        tiny.make_engine(
            batch_invariant=True, fn=tiny.every_token, policies=dict(drafter=PromptLookup(2))
        )
    assert EngineConfig(batch_invariant=True).row_buckets == (8,)
