"""The kernel that writes new tokens, interpreted: the same bytes as XLA's scatter."""

from functools import partial
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paged_decode.kernels import append_kv, write
from paged_decode.kernels.triton import launch
from paged_decode.kernels.triton import write as kernel

from ..oracle import same_bits
from .interpret import INSTALLED, _launch

pytestmark = pytest.mark.skipif(not INSTALLED, reason="triton has no wheel for this platform")
LAYERS, PAGES, SIZE = 2, 5, 8


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """GPU calls reach the kernel, and it is interpreted; in programs of few vectors."""
    monkeypatch.setattr(launch, "launch", partial(_launch, order=1))
    monkeypatch.setattr(launch, "problem", lambda: None)
    monkeypatch.setattr(kernel, "BLOCK", 256)


def _arrays(dim: int, heads: int, dtype: str, *tokens: int, stacked: bool):
    rng = np.random.default_rng(0)
    pool = (PAGES, heads, SIZE, dim)
    numbers = rng.normal(size=(2, LAYERS, *pool) if stacked else (2, *pool)) * 50
    pools = [jnp.asarray(each, dtype) for each in numbers]
    if jnp.dtype(dtype).itemsize == 1:
        pools += [jnp.asarray(each[..., 0], jnp.float32) for each in numbers]
    new = rng.normal(size=(2, *tokens, heads, dim)).astype(np.float32)
    new[0].reshape(-1)[[1, -1]] = np.nan, np.inf
    slots = rng.permutation(PAGES * SIZE)[: int(np.prod(tokens))].astype(np.int32)
    slots[1::4] = np.resize([-1, PAGES * SIZE, 2**31 - 1, -(2**31)], slots[1::4].shape)
    return tuple(pools), *map(jnp.asarray, new), jnp.asarray(slots.reshape(tokens))


@pytest.mark.parametrize(
    ("dim", "heads", "dtype", "tokens", "layer"),
    [
        (80, 3, "bfloat16", (9,), 1),
        (64, 1, "float32", (2, 7), None),
        (256, 2, "float16", (1,), None),
        (80, 3, "int8", (9,), 1),
        (64, 2, "float8_e4m3fn", (2, 7), None),
    ],
)
def test_it_writes_the_bytes_of_the_scatter_and_nothing_outside(dim, heads, dtype, tokens, layer):
    arrays = _arrays(dim, heads, dtype, *tokens, stacked=layer is not None)
    at = None if layer is None else jnp.int32(layer)
    fixed = (jnp.linspace(0.01, 0.03, heads), jnp.linspace(0.02, 0.001, heads))
    for scales in (None, fixed) if len(arrays[0]) == 4 else (None,):
        how = dict(fixed_scales=scales)
        want = jax.jit(partial(write.write_tokens, platform="cpu"))(*arrays, at, **how)
        got = jax.jit(partial(write.write_tokens, platform="gpu"))(*arrays, at, **how)
        same_bits(got, want)


def test_no_token_is_no_launch():
    pages = jnp.ones((PAGES, 1, SIZE, 16))
    none = jnp.zeros((0, 1, 16))
    with mock.patch.object(launch, "launch", side_effect=AssertionError("launched")):
        got = write.write_tokens(
            (pages, pages), none, none, jnp.zeros(0, jnp.int32), None, platform="gpu"
        )
    np.testing.assert_array_equal(got[0], pages)


def test_append_kv_takes_it_on_a_gpu(monkeypatch):
    from paged_decode.kernels import dispatch

    monkeypatch.setattr(dispatch, "default_platform", lambda platform=None: "gpu")
    pages, new = jnp.zeros((2, 1, SIZE, 24)), jnp.ones((3, 1, 24))
    slots = jnp.array([9, 0, 15], jnp.int32)
    with mock.patch.object(kernel, "write_tokens", wraps=kernel.write_tokens) as taken:
        k, _ = append_kv(pages, pages + 0, new, new, slots)
    assert taken.call_count == 1
    assert np.flatnonzero(np.asarray(k[:, 0, :, 0]).reshape(-1)).tolist() == [0, 9, 15]
