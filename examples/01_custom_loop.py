"""Your own generation loop, without the engine: allocate, write, attend, free."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from paged_decode import BlockAllocator, KVCache

VOCAB, HEADS, KV_HEADS, DIM, PAGE = 256, 4, 2, 16, 4
PROMPTS = [[3, 1, 4, 1, 5], [9, 2, 6], [5, 3, 5, 8, 9, 7, 9, 3, 2]]


def toy_model(params, cache, tokens, batch):
    """One attention layer; put your own here. tokens [B, T] -> logits [B, V] of the last column."""
    x = params["embed"][tokens] + params["place"][batch.positions]
    q = (x @ params["q"]).reshape(*tokens.shape, HEADS, DIM)
    k, v = ((x @ params[name]).reshape(*tokens.shape, KV_HEADS, DIM) for name in "kv")
    seen, cache = cache.append_and_attend(0, q, k, v, batch)  # writes k and v, then reads
    return seen[:, -1].reshape(len(tokens), -1) @ params["out"], cache


@partial(jax.jit, static_argnums=0, donate_argnums=2)  # donated: the pages are updated in place
def step(model, params, cache, batch):
    logits, cache = model(params, cache, batch.tokens, batch)
    return jnp.argmax(logits, axis=-1).astype(jnp.int32), cache


def make():
    shapes = dict(embed=(VOCAB, 64), place=(64, 64), out=(64, VOCAB))
    shapes |= dict(q=(64, HEADS * DIM), k=(64, KV_HEADS * DIM), v=(64, KV_HEADS * DIM))
    keys = iter(jax.random.split(jax.random.key(0), len(shapes)))
    params = {name: jax.random.normal(next(keys), s) / 4 for name, s in shapes.items()}
    cache = KVCache.create(
        num_layers=1, num_pages=32, num_kv_heads=KV_HEADS, page_size=PAGE, head_dim=DIM
    )
    return params, cache, BlockAllocator(num_pages=32, page_size=PAGE)


def main():
    params, cache, allocator = make()
    for _ in range(2):  # the second time, the full pages of the prompts are found
        handles = [allocator.allocate(prompt) for prompt in PROMPTS]  # pages for every token
        found = [allocator.sequence(handle).cached for handle in handles]
        lengths = [len(prompt) for prompt in PROMPTS]  # rows are right-aligned, padding in front
        batch = allocator.batch(handles, found, lengths, tokens_per_row=max(lengths), columns=8)
        chosen, cache = step(toy_model, params, cache, batch)
        for _ in range(20):  # new pages as needed; what is computed can be found from here on
            cache, batch = cache.advance(allocator, handles, np.asarray(chosen), columns=8)
            chosen, cache = step(toy_model, params, cache, batch)
        for handle, hit in zip(handles, found, strict=True):
            print(f"{hit} tokens were cached:", *allocator.tokens(handle))
        allocator.free(handles)
    allocator.check_invariants()


if __name__ == "__main__":
    main()
