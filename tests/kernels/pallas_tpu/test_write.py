"""The kernel that writes tokens into a pool equals a scatter, and copies nothing."""

from functools import partial
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paged_decode.kernels import append_kv
from paged_decode.kernels import write as library
from paged_decode.kernels.pallas_tpu import write as kernel
from paged_decode.kernels.pallas_tpu.write import serves, write_tokens
from paged_decode.kernels.record import POOLS
from paged_decode.kernels.write import as_stored

from ..oracle import same_bits

CASES = {
    "one token a page": (np.arange(12) * 16 + np.arange(12) % 16, 16, "float32"),
    "runs of a prompt": (np.arange(37, 90), 16, "bfloat16"),
    "two prompts in turns": (np.stack([np.arange(33, 52), np.arange(64, 83)], 1).ravel(), 8, "f4"),
    "padding, and slots outside": (np.array([0, 35, -1, 3, 10**6, 36, 0, 2**31 - 1]), 8, "float32"),
    "pages of one token": (np.array([5, 3, 17, 4]), 1, "float32"),
    "one token": (np.array([40]), 16, "bfloat16"),
    "int8, tiles of numbers and of scales": (
        np.array([*range(125, 133), 159, 160, 383, 255, 256, 300, 40]),
        128,
        "int8",
    ),
    "float8, padding": (np.array([0, 131, -1, 10**6, 132, 0, 390]), 128, "float8_e4m3fn"),
}


@pytest.mark.parametrize("name", CASES)
def test_tokens_go_to_their_slots_of_one_layer_and_nowhere_else(name):
    slots, size, dtype = CASES[name]
    rng = np.random.default_rng(0)
    shape = (2, 3, max(200 // size, 4), 2, size, 8)
    pools = [jnp.asarray(pool).astype(dtype) for pool in 9 * rng.standard_normal(shape)]
    k, v = (jnp.asarray(x).astype("float32") for x in rng.standard_normal((2, len(slots), 2, 8)))
    if size == 128:
        pools += [jnp.asarray(scales).astype("float32") for scales in rng.random(shape[:-1])]
    slots, layer = jnp.asarray(slots, jnp.int32), jnp.int32(1)
    assert serves(tuple(pools))
    got = write_tokens(tuple(pools), as_stored(tuple(pools), k, v), slots, layer, interpret=True)
    # Under jit, where slots outside the pool write nothing. Padding has no order.
    named = dict(zip(POOLS, pools, strict=False), k=k, v=v, slots=slots, layer=layer)
    want = jax.jit(append_kv, donate_argnums=())(**named)
    known = slice(1, None) if "padding" in name else slice(None)
    same_bits([pages[:, known] for pages in got], [pages[:, known] for pages in want])


def test_no_tokens_change_nothing():
    pages, new = jnp.ones((1, 2, 1, 8, 8)), jnp.ones((0, 1, 8))
    got = write_tokens((pages, pages), (new, new), jnp.zeros(0, jnp.int32), jnp.int32(0))
    same_bits(got, (pages, pages))


@pytest.mark.parametrize("platform", ["tpu", "cpu"])
def test_what_xla_would_copy_is_written_by_the_kernel(platform):
    """On a TPU, whether a pool of 8 bits is stacked or not, if its scales fill the lanes."""

    def taken(size, *stack):
        shape = (*stack, 4, 2, size, 8)
        pools = [jax.ShapeDtypeStruct(shape, jnp.int8)] * 2
        pools += [jax.ShapeDtypeStruct(shape[:-1], jnp.float32)] * 2
        new = jax.ShapeDtypeStruct((3, 2, 8), jnp.float32)
        slots, layer = jnp.arange(3, dtype=jnp.int32), jnp.int32(0) if stack else None
        write = partial(library.write_tokens, layer=layer, platform=platform)
        with mock.patch.object(kernel, "write_tokens", wraps=write_tokens) as spy:
            out = jax.eval_shape(write, tuple(pools), new, new, slots)
        assert [(x.shape, x.dtype) for x in out] == [(x.shape, x.dtype) for x in pools]
        return spy.called

    assert taken(128) == taken(128, 2) == (platform == "tpu")
    assert not taken(16) and not taken(16, 2)
