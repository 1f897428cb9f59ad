"""The residual sum with the norm behind it, by XLA and by the kernel."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from paged_decode import add_and_norm

from .triton.compiled import CARDS, Launched, needs
from .triton.interpret import INSTALLED, as_on_a_gpu

EPS = 1e-3


def arrays(dtype, *rows, width=48):
    rng = np.random.default_rng(0)
    x, part = (jnp.asarray(rng.normal(size=(*rows, width)) * 3, dtype) for _ in range(2))
    return x, part, jnp.asarray(rng.normal(size=width), jnp.float32)


def expected(x, part, weight):
    total = x + part
    wide = np.asarray(total, np.float64)
    scale = 1 / np.sqrt((wide * wide).mean(-1, keepdims=True) + EPS)
    return total, wide * scale * np.asarray(weight, np.float64)


def check(x, part, weight):
    total, normed = jax.jit(partial(add_and_norm, eps=EPS))(x, part, weight)
    want, norm = expected(x, part, weight)
    assert total.dtype == normed.dtype == x.dtype
    np.testing.assert_array_equal(np.asarray(total, np.float32), np.asarray(want, np.float32))
    tolerance = {4: 1e-5, 2: 1e-2}[x.dtype.itemsize]
    np.testing.assert_allclose(np.asarray(normed, np.float64), norm, rtol=tolerance, atol=1e-5)


@pytest.fixture
def launched(monkeypatch):
    if not INSTALLED:
        pytest.skip("triton has no wheel for this platform")
    as_on_a_gpu(monkeypatch)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_norm_is_of_the_sum(dtype):
    check(*arrays(dtype, 3, 2))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_kernel_gives_the_same(launched, dtype):
    check(*arrays(dtype, 3, 2))
    check(*arrays(dtype, 1, width=2880))


def test_it_has_a_derivative_where_the_kernel_serves_it(launched):
    x, part, weight = arrays("float32", 2)

    def loss(function, x, part, weight):
        total, normed = function(x, part, weight)
        return jnp.sum(total) + jnp.sum(jnp.sin(normed))

    def plain(x, part, weight):
        total = x + part
        scale = jax.lax.rsqrt(jnp.mean(total * total, axis=-1, keepdims=True) + EPS)
        return total, total * scale * weight

    ours = jax.grad(partial(loss, partial(add_and_norm, eps=EPS)), argnums=(0, 1, 2))
    want = jax.grad(partial(loss, plain), argnums=(0, 1, 2))(x, part, weight)
    for got, each in zip(ours(x, part, weight), want, strict=True):
        np.testing.assert_allclose(got, each, rtol=1e-4, atol=1e-5)


def test_a_derivative_is_taken_in_a_shard_map_too(launched):
    x, part, weight = arrays("float32", 4)
    mesh = jax.make_mesh((2,), ("rows",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    split, whole = PartitionSpec("rows"), PartitionSpec()
    mapped = jax.shard_map(
        partial(add_and_norm, eps=EPS), mesh=mesh, in_specs=(split, split, whole), out_specs=split
    )
    got = jax.jit(jax.grad(lambda x: jnp.sum(mapped(x, part, weight)[1])))(x)
    want = jax.grad(lambda x: jnp.sum(add_and_norm(x, part, weight, EPS)[1]))(x)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_a_batch_is_each_of_them(launched):
    x, part, weight = arrays("float32", 3, 2)
    total, normed = jax.vmap(partial(add_and_norm, eps=EPS), in_axes=(0, 0, None))(x, part, weight)
    np.testing.assert_allclose(normed, expected(x, part, weight)[1], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(total, x + part)


def test_no_rows_are_no_launch(launched):
    total, normed = add_and_norm(jnp.ones((0, 4)), jnp.ones((0, 4)), jnp.ones(4), EPS)
    assert total.shape == normed.shape == (0, 4)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (dict(part=jnp.ones((2, 5))), ValueError, "part must have the shape and dtype of x"),
        (dict(part=jnp.ones((2, 4), jnp.bfloat16)), ValueError, "part must have the shape and"),
        (dict(weight=jnp.ones(3)), ValueError, r"weight must be \[E\] with E = 4"),
        (dict(x=jnp.ones((2, 4), jnp.int32)), TypeError, "x must be a floating-point array"),
        (dict(eps=-1.0), ValueError, "eps must be 0 or more; got -1.0"),
        (dict(eps="1e-3"), TypeError, "eps must be a Python float; got str"),
    ],
)
def test_what_does_not_fit_is_refused(unchecked, wrong, error, message):
    told = dict(x=jnp.ones((2, 4)), part=jnp.ones((2, 4)), weight=jnp.ones(4)) | wrong
    with pytest.raises(error, match=message):
        add_and_norm(**dict(eps=EPS) | told)


@pytest.mark.skipif(not INSTALLED, reason="triton has no wheel for this platform")
@pytest.mark.parametrize("card", ["sm_80", "sm_90", "sm_100"])
def test_it_compiles_without_spills_and_moves_whole_vectors(card):
    from paged_decode.kernels.triton.add_norm import add_norm_kernel

    pointers = ("bfloat16", "bfloat16", "float32", "bfloat16", "bfloat16")
    constants = dict(WIDTH=4096, BLOCK=4096, EPS=EPS)
    need = needs(Launched(add_norm_kernel, pointers, 8, 1, constants, None), CARDS[card])
    assert need.stack_bytes == 0
    assert "ld.global.v4.b32" in need.listing and "st.global.v4.b32" in need.listing
