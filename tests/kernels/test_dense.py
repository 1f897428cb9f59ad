"""EasyDeL's dense decode call: the same contract, as a view of the cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paged_decode.kernels import decode_attention

from .oracle import NAMES, Inputs, expected, same_bits


def arrays(rows=3, tokens=40, kv_heads=2, heads=6, dim=16):
    rng = np.random.default_rng(0)
    query = rng.standard_normal((rows, 1, heads, dim)).astype(np.float32)
    key, value = rng.standard_normal((2, rows, tokens, kv_heads, dim)).astype(np.float32)
    return query, key, value


def oracle(query, key, value, starts, ends, **options):
    """The paged oracle on one page of S tokens per row."""
    rows = len(key)
    pages = (np.moveaxis(a, 1, 2) for a in (key, value))
    table = np.arange(rows, dtype=np.int32)[:, None]
    return expected(Inputs(query, *pages, table, ends, options | dict(starts=starts)))


@pytest.mark.parametrize("backend", NAMES)
@pytest.mark.parametrize("sinks", [None, (3,), (2, 4), (6, 1)], ids=str)
def test_every_argument_matches_the_oracle(backend, sinks):
    query, key, value = arrays()
    starts, ends = np.array([0, 7, 12], np.int32), np.array([40, 31, 12], np.int32)
    aux = None if sinks is None else np.linspace(-1, 2, np.prod(sinks), dtype=np.float32)
    aux = None if aux is None else aux.reshape(sinks)
    out, lse = decode_attention(
        query, key, value, starts, ends, softmax_scale=0.3, sliding_window=(9, 9),
        logits_soft_cap=2.0, softmax_aux=aux, return_lse=True, implementation=backend,
    )  # fmt: skip
    options = dict(scale=0.3, sliding_window=(9, 9), soft_cap=2.0)
    options |= {} if aux is None else dict(sinks=aux)
    want, want_lse = oracle(query, key, value, starts, ends, **options)
    np.testing.assert_allclose(out, want, rtol=2e-5, atol=4e-6)
    np.testing.assert_allclose(lse, want_lse, rtol=2e-5, atol=2e-5)
    assert (out[2] == 0).all() and (lse[2] == -np.inf).all()


def test_the_token_axis_of_the_query_may_be_left_out():
    query, key, value = arrays()
    starts, ends = np.zeros(3, np.int32), np.array([1, 31, 12], np.int32)
    out = decode_attention(query, key, value, starts, ends)
    same_bits(decode_attention(query[:, 0], key, value, starts, ends), out[:, 0])


def test_several_backends_may_be_named():
    query, key, value = arrays()
    starts, ends = np.zeros(3, np.int32), np.array([1, 31, 12], np.int32)
    named = decode_attention(query, key, value, starts, ends, implementation=["reference", "xla"])
    alone = decode_attention(query, key, value, starts, ends, implementation="reference")
    same_bits(named, alone)


def test_what_lies_outside_the_range_changes_no_bit():
    query, key, value = arrays()
    starts, ends = np.array([0, 7, 12], np.int32), np.array([40, 31, 12], np.int32)
    clean = decode_attention(query, key, value, starts, ends)
    for row in range(3):
        for cache in (key, value):
            cache[row, : starts[row]] = cache[row, ends[row] :] = np.nan
    same_bits(decode_attention(query, key, value, starts, ends), clean)


def test_the_cache_is_read_in_place():
    key = jax.ShapeDtypeStruct((2, 4096, 2, 64), jnp.float32)
    query, index = (
        jax.ShapeDtypeStruct((2, 6, 64), jnp.float32),
        jax.ShapeDtypeStruct((2,), "int32"),
    )
    compiled = jax.jit(decode_attention).lower(query, key, key, index, index).compile()
    cache_bytes = 2 * 4 * np.prod(key.shape)
    assert compiled.memory_analysis().temp_size_in_bytes < cache_bytes / 10
