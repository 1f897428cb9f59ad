"""Small caches with known bits, and what must be true of them."""

from __future__ import annotations

from contextlib import contextmanager
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from paged_decode import BlockAllocator, KVCache
from paged_decode.snapshot import _files

LAYERS, HEADS, PAGE, DIM = 2, 2, 4, 3


@contextmanager
def using(files):
    """Saves that are asked for here use these operations of files, whenever they write."""
    with mock.patch.object(_files, "DEFAULT", files):
        yield files


def random_bits(shape, dtype, seed: int = 0) -> np.ndarray:
    """Any bits at all: NaN with payloads, infinities, denormals."""
    dtype = np.dtype(dtype)
    size = int(np.prod(shape)) * dtype.itemsize
    return np.random.default_rng(seed).integers(0, 256, size, np.uint8).view(dtype).reshape(shape)


def make_cache(num_pages: int, dtype=np.float32, seed: int = 0, *, dim: int = DIM) -> KVCache:
    shape = (num_pages, HEADS, PAGE, dim)
    arrays = [jnp.asarray(random_bits(shape, dtype, seed + i)) for i in range(2 * LAYERS)]
    return KVCache(tuple(arrays[:LAYERS]), tuple(arrays[LAYERS:]))


def make_allocator(num_pages: int, **options) -> BlockAllocator:
    return BlockAllocator(num_pages, PAGE, hash_key=b"test", **options)


def bits(array) -> np.ndarray:
    array = np.array(array)
    return array.view(f"u{array.dtype.itemsize}")


def content(cache, allocator, handle) -> list[np.ndarray]:
    """The bits of every layer's keys and values of one sequence, `[length, Hk, D]` each."""
    info = allocator.sequence(handle)
    return [
        bits(leaf)[list(info.pages)]
        .swapaxes(1, 2)
        .reshape(-1, *bits(leaf).shape[1::2])[: info.length]
        for leaf in jax.tree.leaves(cache)
    ]


def assert_same_content(a, b) -> None:
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(x, y)


def busy(num_pages: int = 24, dtype=np.float32, **options):
    """Sequences, forks that share a partial page, salts, cached pages without owner, a hole."""
    cache, allocator = make_cache(num_pages, dtype), make_allocator(num_pages, **options)
    a = allocator.allocate([1, 2, 3, 4, 5, 6, 7, 8, 9, 10])
    gone = allocator.allocate([50, 51, 52, 53, 54])
    b = allocator.allocate([20, 21, 22], cache_salt="tenant")
    allocator.commit([a, gone, b], [10, 5, 3])
    (c,) = allocator.fork(a)
    d = allocator.allocate([1, 2, 3, 4, 77], cache_salt=b"x")
    allocator.commit(d, 4)
    cold = allocator.allocate([60, 61, 62, 63, 64, 65, 66, 67, 68])
    allocator.commit(cold, 9)
    allocator.free(gone)
    allocator.free(cold)
    empty = allocator.allocate([9])
    allocator.truncate(empty, 0)
    allocator.reserve([b], 9)
    allocator.check_invariants()
    return cache, allocator, (a, b, c, d, empty)
