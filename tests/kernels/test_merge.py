"""Parts over disjoint tokens merge to the whole, sinks included once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paged_decode.kernels import merge_attention

from .oracle import NAMES, Case, build, same_bits

CLOSE = dict(rtol=1e-5, atol=2e-6)


def parts(backend, sinks):
    """`(whole, tokens 0..5, the tokens from 6 on)`, for the newest query of every row."""
    whole, early, late = (build(Case((16, 9, 7))) for _ in range(3))
    whole.options["sinks"] = sinks
    early.seq_lens = np.full(3, 6, np.int32)
    late.options["starts"] = np.full(3, 6, np.int32)
    return whole.call(backend), early.call(backend), late.call(backend)


@pytest.mark.parametrize("backend", NAMES)
@pytest.mark.parametrize("sinks", [None, (3,), (2, 2), (6, 1)], ids=str)
def test_disjoint_parts_merge_to_the_whole(backend, sinks):
    sinks = None if sinks is None else np.linspace(-1, 2, np.prod(sinks)).reshape(sinks)
    sinks = None if sinks is None else sinks.astype(np.float32)
    (out, lse), *pieces = parts(backend, sinks)
    outs, lses = (jnp.stack(arrays) for arrays in zip(*pieces, strict=True))
    got, got_lse = merge_attention(outs, lses, sinks=sinks)
    np.testing.assert_allclose(got, out, **CLOSE)
    np.testing.assert_allclose(got_lse, lse, **CLOSE)


def test_merging_is_associative():
    rng = np.random.default_rng(0)
    outs = rng.standard_normal((3, 2, 4, 8)).astype(np.float32)
    lses = rng.standard_normal((3, 2, 4)).astype(np.float32)
    two, two_lse = merge_attention(outs[:2], lses[:2])
    got = merge_attention(jnp.stack([two, outs[2]]), jnp.stack([two_lse, lses[2]]))
    for a, b in zip(got, merge_attention(outs, lses), strict=True):
        np.testing.assert_allclose(a, b, **CLOSE)


def test_an_empty_part_adds_nothing_whatever_it_holds():
    rng = np.random.default_rng(0)
    out, lse = rng.standard_normal((2, 4, 8)), rng.standard_normal((2, 4))
    outs = jnp.asarray(np.stack([out, np.full_like(out, np.nan)]), jnp.float32)
    lses = jnp.asarray(np.stack([lse, np.full_like(lse, -np.inf)]), jnp.float32)
    same_bits(merge_attention(outs, lses), (outs[0], lses[0]))


@pytest.mark.parametrize("sinks", [None, np.ones(1, np.float32)])
def test_parts_that_all_saw_nothing_merge_to_nothing(sinks):
    outs, lses = jnp.zeros((2, 3, 4, 8)), jnp.full((2, 3, 4), -jnp.inf)
    out, lse = merge_attention(outs, lses, sinks=sinks)
    assert (out == 0).all() and (lse == -np.inf).all()


def test_the_dtype_of_the_parts_is_kept():
    out, lse = jax.jit(merge_attention)(jnp.ones((2, 4, 8), jnp.bfloat16), jnp.zeros((2, 4)))
    assert out.dtype == jnp.bfloat16 and lse.dtype == jnp.float32


@pytest.mark.parametrize(
    "outs,lses,sinks,error,message",
    [
        (
            (2, 4, 8),
            (2, 3),
            None,
            ValueError,
            r"outs must be \[K, ..., Hq, D\] and lses \[K, ..., Hq\]",
        ),
        ((0, 4, 8), (0, 4), None, ValueError, r"K >= 1"),
        (
            (2, 4, 8),
            (2, 4),
            (3, 1),
            ValueError,
            r"sinks must be .* with Hq = 4; got shape \(3, 1\)",
        ),
    ],
)
def test_shapes_that_disagree_are_named(unchecked, outs, lses, sinks, error, message):
    sinks = None if sinks is None else jnp.zeros(sinks)
    with pytest.raises(error, match=message):
        merge_attention(jnp.zeros(outs), jnp.zeros(lses), sinks=sinks)


def test_integer_parts_are_refused(unchecked):
    with pytest.raises(TypeError, match="outs must be a floating-point array"):
        merge_attention(jnp.zeros((2, 4, 8), jnp.int32), jnp.zeros((2, 4)))
