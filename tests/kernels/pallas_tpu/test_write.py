"""The kernel that writes tokens into a stacked pool equals a scatter, and copies nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paged_decode.kernels import append_kv
from paged_decode.kernels.pallas_tpu.write import write_tokens

from ..oracle import same_bits

CASES = {
    "one token a page": (np.arange(12) * 16 + np.arange(12) % 16, 16, "float32"),
    "runs of a prompt": (np.arange(37, 90), 16, "bfloat16"),
    "two prompts in turns": (np.stack([np.arange(33, 52), np.arange(64, 83)], 1).ravel(), 8, "f4"),
    "padding, and slots outside": (np.array([0, 35, -1, 3, 10**6, 36, 0, 2**31 - 1]), 8, "float32"),
    "pages of one token": (np.array([5, 3, 17, 4]), 1, "float32"),
    "one token": (np.array([40]), 16, "bfloat16"),
}


@pytest.mark.parametrize("name", CASES)
def test_tokens_go_to_their_slots_of_one_layer_and_nowhere_else(name):
    slots, size, dtype = CASES[name]
    rng = np.random.default_rng(0)
    pools = rng.standard_normal((2, 3, 200 // size, 2, size, 8))
    k_pages, v_pages = (jnp.asarray(pool).astype(dtype) for pool in pools)
    k, v = (jnp.asarray(x).astype(dtype) for x in rng.standard_normal((2, len(slots), 2, 8)))
    slots, layer = jnp.asarray(slots, jnp.int32), jnp.int32(1)
    got = write_tokens(k_pages, v_pages, k, v, slots, layer, interpret=True)
    # Under jit, where slots outside the pool write nothing. Padding has no order.
    want = jax.jit(append_kv, donate_argnums=())(k_pages, v_pages, k, v, slots, layer=layer)
    known = slice(1, None) if name.startswith("padding") else slice(None)
    same_bits([pages[:, known] for pages in got], [pages[:, known] for pages in want])


def test_no_tokens_change_nothing():
    pages, new = jnp.ones((1, 2, 1, 8, 8)), jnp.ones((0, 1, 8))
    got = write_tokens(pages, pages, new, new, jnp.zeros(0, jnp.int32), jnp.int32(0))
    same_bits(got, (pages, pages))
