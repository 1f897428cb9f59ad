"""Layers in a scan over one stacked pool: in your own loop, and the same function in the engine."""

import sys
from importlib import import_module

import jax.numpy as jnp
import numpy as np
from jax import lax

from paged_decode import BlockAllocator, CacheLayout, Engine, EngineConfig, KVCache, SamplingParams

loop = import_module("01_custom_loop")
LAYERS = 4
LAYOUT = CacheLayout.uniform(
    num_layers=LAYERS, num_pages=32, num_kv_heads=2, page_size=loop.PAGE, head_dim=loop.DIM
)


def model(params, cache, tokens, batch):
    """The weights of all layers are stacked `[L, ...]`, and so are the pages."""
    x = params["embed"][tokens] + params["place"][batch.positions]

    def layer(carry, given):
        (x, cache), (number, weights) = carry, given
        q, k, v = ((x @ weights[n]).reshape(*tokens.shape, -1, loop.DIM) for n in "qkv")
        seen, cache = cache.append_and_attend(number, q, k, v, batch, group=0)
        x = x + seen.reshape(*tokens.shape, -1) @ weights["o"]
        return (x, cache), None  # the cache goes along in the carry, never as xs

    given = jnp.arange(LAYERS), {n: params[n] for n in "qkvo"}
    (x, cache), _ = lax.scan(layer, (x, cache), given)
    return x[:, -1] @ params["out"], cache


def make():
    rng, sizes = np.random.default_rng(0), dict(embed=(loop.VOCAB, 64), place=(64, 64))
    sizes |= dict(out=(64, loop.VOCAB), q=(LAYERS, 64, 64), o=(LAYERS, 64, 64))
    sizes |= dict(k=(LAYERS, 64, 32), v=(LAYERS, 64, 32))
    params = {n: jnp.asarray(rng.standard_normal(s), jnp.float32) / 4 for n, s in sizes.items()}
    return params, KVCache.create(layout=LAYOUT, stacked=True), BlockAllocator(LAYOUT)


def main():
    params, cache, allocator = make()
    handle, prompt = allocator.allocate(loop.PROMPTS[0]), loop.PROMPTS[0]
    batch = allocator.batch([handle], 0, len(prompt), tokens_per_row=len(prompt), columns=8)
    for _ in range(12):
        chosen, cache = loop.step(model, params, cache, batch)
        cache, batch = cache.advance(allocator, [handle], np.asarray(chosen), columns=8)
    own = allocator.tokens(handle)[len(prompt) :].tolist()
    engine = Engine(model, *make(), EngineConfig(max_rows=2, max_sequence_tokens=64))
    (done,) = engine.generate([prompt], SamplingParams(max_new_tokens=12))
    print("own loop:", *own, "\nengine:  ", *done.tokens)
    sys.exit(None if own == list(done.tokens) else "the tokens differ")


if __name__ == "__main__":
    main()
