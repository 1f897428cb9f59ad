"""What a model returns is checked while it is traced; a slip would compile without a word."""

from __future__ import annotations

import jax.numpy as jnp
import pytest

from paged_decode import BlockAllocator, Engine, EngineConfig, KVCache, SamplingParams

from ..tiny import PARAMS, dense_greedy, make_engine, model

SLIPS = {
    "logits of every token": (
        lambda logits, before, cache: (logits[:, None], cache),
        ValueError,
        r"logits must be \[B, V\] with B = .*: return those of column T-1, logits\[:, -1\]",
    ),
    "logits of one row": (
        lambda logits, before, cache: (logits[0], cache),
        ValueError,
        r"logits must be \[B, V\] with B = .* got shape \(61,\)",
    ),
    "ids": (
        lambda logits, before, cache: (jnp.argmax(logits, -1, keepdims=True), cache),
        TypeError,
        "logits must be a floating-point array .* got dtype int32",
    ),
    "no logits": (
        lambda logits, before, cache: (None, cache),
        TypeError,
        "logits must be a floating-point array .* got NoneType",
    ),
    "logits alone": (
        lambda logits, before, cache: logits,
        TypeError,
        r"must return \(logits, cache\); got ",
    ),
    "the cache first": (
        lambda logits, before, cache: (cache, logits),
        TypeError,
        r"must return \(logits, cache\); got KVCache, ",
    ),
    "three things": (
        lambda logits, before, cache: (logits, cache, 1),
        TypeError,
        r"must return \(logits, cache\); got .*, KVCache, int",
    ),
    "the cache that it was given": (
        lambda logits, before, cache: (logits, before),
        ValueError,
        "returned the cache that it was given, without the new keys and values",
    ),
    "a cache of fewer layers": (
        lambda logits, before, cache: (logits, KVCache(cache.k_pages[:1], cache.v_pages[:1])),
        ValueError,
        "a cache of the shapes and dtypes that it was given",
    ),
}


@pytest.mark.parametrize("slip", SLIPS)
@pytest.mark.parametrize("prompt", [[5], [5, 6, 7]], ids=["decode", "prefill"])
def test_a_slip_is_named_and_the_engine_goes_on_with_a_sound_model(slip, prompt):
    spoil, error, words = SLIPS[slip]
    broken = [True]

    def fn(params, cache, tokens, batch):
        logits, after = model(params, cache, tokens, batch)
        return spoil(logits, cache, after) if broken else (logits, after)

    engine = make_engine(fn=fn)
    engine.submit(prompt, SamplingParams(max_new_tokens=3))
    with pytest.raises(error, match=words):
        engine.step()
    assert not engine.cache.is_deleted
    if slip != "logits of every token":
        return  # the rest compiles two programs
    broken.clear()
    assert tuple(e.token for e in engine.stream()) == dense_greedy(prompt, 3)


def test_an_engine_over_a_cache_that_was_given_away_is_refused():
    cache = KVCache.create(num_layers=1, num_pages=4, num_kv_heads=1, page_size=4, head_dim=8)
    k = jnp.zeros((1, 1, 8))
    cache.append(0, k, k, jnp.array([4]))
    with pytest.raises(ValueError, match="the cache was donated to an earlier call"):
        Engine(model, PARAMS, cache, BlockAllocator(4, 4), EngineConfig())
