"""Layers of different heads and windows: each kind has its own pages, one handle has all."""

from importlib import import_module

import jax.numpy as jnp
import numpy as np

from paged_decode import BlockAllocator, CacheLayout, KVCache, PageSpec

loop = import_module("01_custom_loop")
FULL = PageSpec(layers=(1,), num_kv_heads=1, head_dim=32, num_pages=32)
LOCAL = PageSpec(layers=(0, 2), num_kv_heads=2, head_dim=16, num_pages=8, window=6)
LAYOUT = CacheLayout(loop.PAGE, (FULL, LOCAL))  # the first group must see all tokens
SPECS = [LAYOUT.groups[number] for number in LAYOUT.group_of]  # of each layer
HEADS = 4


def model(params, cache, tokens, batch):
    """The number of a layer says which group it is of, and so its page table and its window."""
    x = params["embed"][tokens] + params["place"][batch.positions]
    for layer, spec in enumerate(SPECS):
        q, k, v = (
            (x @ params[f"{name}{layer}"]).reshape(*tokens.shape, -1, spec.head_dim)
            for name in "qkv"
        )
        seen, cache = cache.append_and_attend(layer, q, k, v, batch)
        x = x + seen.reshape(*tokens.shape, -1) @ params[f"o{layer}"]
    return x[:, -1] @ params["out"], cache


def make_params():
    rng, shapes = np.random.default_rng(0), dict(embed=(loop.VOCAB, 64), place=(64, 64))
    shapes |= dict(out=(64, loop.VOCAB))
    for layer, spec in enumerate(SPECS):
        heads = dict(q=HEADS, k=spec.num_kv_heads, v=spec.num_kv_heads)
        shapes |= {f"{name}{layer}": (64, n * spec.head_dim) for name, n in heads.items()}
        shapes[f"o{layer}"] = (HEADS * spec.head_dim, 64)
    return {n: jnp.asarray(rng.standard_normal(s), jnp.float32) / 4 for n, s in shapes.items()}


def main():
    params = make_params()
    cache, allocator = KVCache.create(layout=LAYOUT), BlockAllocator(LAYOUT)
    prompt = loop.PROMPTS[2]
    handle = allocator.allocate(prompt)
    batch = allocator.batch([handle], 0, len(prompt), tokens_per_row=len(prompt), columns=16)
    chosen, cache = loop.step(model, params, cache, batch)
    for _ in range(40):  # commits, too: what a window has passed goes back to its pool
        cache, batch = cache.advance(allocator, [handle], np.asarray(chosen), columns=16)
        chosen, cache = loop.step(model, params, cache, batch)
    print(*allocator.tokens(handle))
    for spec, held in zip(LAYOUT.groups, allocator.sequence(handle).groups, strict=True):
        print(f"layers {spec.layers}, window {spec.window}: {len(held.pages)} pages")


if __name__ == "__main__":
    main()
