"""MLA in its absorbed form: one latent for each token is keys and values of all heads."""

import jax
import jax.numpy as jnp
import numpy as np

from paged_decode import BlockAllocator, KVCache
from paged_decode.kernels import append_kv, paged_attention

HEADS, RANK, ROPE, DIM = 4, 16, 8, 12  # DeepSeek-V3: 128, 512, 64, 128
WIDTH, SCALE = RANK + ROPE, (DIM + ROPE) ** -0.5  # the default scale would be that of the latent


def absorbed(up_k, q):
    """q [B, T, Hq, DIM + ROPE] -> [B, T, Hq, WIDTH], which meets the latent itself."""
    return jnp.concatenate([jnp.einsum("bthd,rhd->bthr", q[..., :DIM], up_k), q[..., DIM:]], -1)


def in_a_cache(cache, up_k, up_v, q, latent, batch):
    """latent [B, T, WIDTH] is one KV head; a KVCache, as engines take it, has it twice."""
    new = latent[:, :, None]
    out, cache = cache.append_and_attend(0, absorbed(up_k, q), new, new, batch, scale=SCALE)
    return cache, jnp.einsum("bthr,rhd->bthd", out[..., :RANK], up_v)


def in_one_array(pages, up_k, up_v, q, latent, batch):
    """Keys and values are the same pages; the second write has no reader and is dropped."""
    pages, _ = append_kv(pages, pages, latent[:, :, None], latent[:, :, None], batch.slots)
    seen = pages, pages, batch.page_table, batch.seq_lens
    out = paged_attention(absorbed(up_k, q), *seen, scale=SCALE)
    return pages, jnp.einsum("bthr,rhd->bthd", out[..., :RANK], up_v)  # pyright: ignore


def plain(up_k, up_v, q, latent):
    """One row, without pages: every head has keys and values of its own."""
    k, v = (np.einsum("tr,rhd->thd", latent[:, :RANK], up) for up in (up_k, up_v))
    k = np.concatenate([k, np.repeat(latent[:, None, RANK:], HEADS, axis=1)], -1)
    weights = np.exp(np.einsum("thd,shd->hts", q, k) * SCALE) * np.tri(len(q))
    return np.einsum("hts,shd->thd", weights / weights.sum(-1, keepdims=True), v)


def main():
    rng, lengths = np.random.default_rng(0), [9, 6]
    shapes = *2 * [(RANK, HEADS, DIM)], (2, 9, HEADS, DIM + ROPE), (2, 9, WIDTH)
    up_k, up_v, q, latent = (rng.standard_normal(shape, np.float32) / 2 for shape in shapes)
    allocator = BlockAllocator(num_pages=9, page_size=4)
    handles = [allocator.allocate(range(length)) for length in lengths]
    batch = allocator.batch(handles, 0, lengths, tokens_per_row=9)
    cache = KVCache.create(num_layers=1, num_pages=9, num_kv_heads=1, page_size=4, head_dim=WIDTH)
    for step, pool in (in_a_cache, cache), (in_one_array, jnp.zeros_like(cache.k_pages[0])):
        _, out = jax.jit(step, donate_argnums=0)(pool, up_k, up_v, q, latent, batch)
        for row, n in enumerate(lengths):
            want = plain(up_k, up_v, q[row, -n:], latent[row, -n:])
            np.testing.assert_allclose(out[row, -n:], want, atol=1e-5)
        print(step.__name__, "equals heads of their own")


if __name__ == "__main__":
    main()
