"""Cross-attention: each of T decoder queries is a row of its own over the pages of one encoding."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from paged_decode import BlockAllocator, KVCache

HEADS, KV_HEADS, DIM, T = 4, 2, 16, 3


@partial(jax.jit, donate_argnums=0)
def encode(cache, k, v, batch):
    """Once for each input: keys and values of its frames [B, F, Hk, D]."""
    return cache.append(0, k, v, batch)


@jax.jit  # nothing is written: the cache is read by every step, and given away by none
def cross(cache, q, which, batch):
    """q [R, T, Hq, D] sees all frames of the input `which[r]`, whatever the place of a query."""
    of_query = jnp.repeat(which, q.shape[1])
    rows = jax.tree.map(lambda leaf: leaf[of_query], batch)  # every leaf of a batch has rows first
    out = cache.attend(0, q.reshape(-1, *q.shape[2:]), rows)
    return out.reshape(q.shape)


def plain(q, k, v):
    """q [T, Hq, D] over k and v [F, Hk, D], without pages."""
    k, v = (np.repeat(each, HEADS // KV_HEADS, axis=1) for each in (k, v))
    weights = np.exp(np.einsum("thd,fhd->htf", q, k) * DIM**-0.5)
    return np.einsum("htf,fhd->thd", weights / weights.sum(-1, keepdims=True), v)


def main():
    rng, frames = np.random.default_rng(0), [11, 6]
    k, v = rng.standard_normal((2, len(frames), max(frames), KV_HEADS, DIM)).astype(np.float32)
    cache = KVCache.create(
        num_layers=1, num_pages=16, num_kv_heads=KV_HEADS, page_size=4, head_dim=DIM
    )
    # Frames are no tokens, so nothing may be found by them. The decoder has a cache of its own.
    allocator = BlockAllocator(num_pages=16, page_size=4, prefix_cache=False)
    inputs = [allocator.allocate([0] * count) for count in frames]
    batch = allocator.batch(inputs, 0, frames, tokens_per_row=max(frames))
    cache = encode(cache, k, v, batch)  # right-aligned, as every batch: padding is in front

    which = np.array([0, 0, 1])  # two beams over the first input share its pages
    q = rng.standard_normal((len(which), T, HEADS, DIM)).astype(np.float32)
    out = cross(cache, q, which, allocator.batch(inputs, frames, frames))
    for row, source in enumerate(which):
        own = slice(max(frames) - frames[source], None)
        want = plain(q[row], k[source, own], v[source, own])
        np.testing.assert_allclose(out[row], want, atol=1e-5)
        print(f"row {row}: {T} queries over {frames[source]} frames, as without pages")


if __name__ == "__main__":
    main()
