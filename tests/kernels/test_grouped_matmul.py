"""Products of rows with one of several matrices each, against the product of every row alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from paged_decode import group_rows, grouped_matmul

# Rows, products of each, matrices, and how the matrices are chosen.
CASES = {
    "one row": (1, 4, 8, "even"),
    "fewer products than matrices": (3, 2, 40, "even"),
    "a matrix for most": (70, 2, 5, "skewed"),
    "one matrix": (19, 1, 1, "even"),
    "several tiles of each": (150, 4, 3, "even"),
    "two of many": (40, 1, 33, "two"),
}


def arrays(case: str, dtype: str = "float32", width: int = 24, columns: int = 40):
    rows, each, matrices, kind = CASES[case]
    rng, count = np.random.default_rng(3), rows * each
    matrix = rng.integers(0, matrices, count)
    if kind == "skewed":
        matrix[rng.random(count) < 0.8] = 3
    if kind == "two":
        matrix = rng.choice([2, matrices - 1], count)
    x = jnp.asarray(rng.normal(size=(rows, width)), dtype)
    return (
        x,
        jnp.asarray(rng.normal(size=(matrices, width, columns)), dtype),
        matrix.astype("int32"),
    )


def check(x, matrices, matrix) -> None:
    product = jax.jit(lambda x, m, of: grouped_matmul(x, m, group_rows(of, len(m))))
    got = product(x, matrices, matrix)
    wide, of = np.asarray(x, np.float64), np.asarray(matrices, np.float64)[matrix]
    want = np.einsum("rk,rkn->rn", wide.repeat(len(matrix) // len(x), 0), of)
    assert got.dtype == x.dtype
    tolerance = {4: 1e-5, 2: 2e-2}[x.dtype.itemsize]
    size = np.sqrt(x.shape[1])  # of a sum
    np.testing.assert_allclose(np.asarray(got, np.float64), want, tolerance, tolerance * size)


@pytest.mark.parametrize("case", CASES)
def test_every_row_is_multiplied_with_its_own_matrix(case):
    check(*arrays(case))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("case", ["one row", "several tiles of each"])
def test_numbers_of_every_dtype_are_summed_in_float32(case, dtype):
    check(*arrays(case, dtype, width=1000, columns=320))


@pytest.mark.parametrize("kind", [np.int32, np.int64])
def test_numbers_outside_are_clipped(kind):
    far = [-5, 9, 1] if kind == np.int32 else [-(2**32), 2**32, 1]
    rows = group_rows(np.array(far, kind), 3)
    assert rows.order.tolist() == [0, 2, 1]
    assert rows.ends.tolist() == [1, 2, 3]


def test_rows_may_be_split_over_devices():
    x, matrices, matrix = arrays("a matrix for most")
    mesh = jax.make_mesh((2,), ("rows",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    split, whole = PartitionSpec("rows"), PartitionSpec()

    def product(x, m, of):
        return grouped_matmul(x, m, group_rows(of, 5))

    mapped = jax.shard_map(product, mesh=mesh, in_specs=(split, whole, split), out_specs=split)
    got = jax.jit(mapped)(x, matrices, matrix)
    np.testing.assert_allclose(got, product(x, matrices, matrix), rtol=1e-5, atol=1e-5)


def test_no_products_and_no_columns_are_empty():
    none = group_rows(jnp.zeros(0, jnp.int32), 2)
    assert grouped_matmul(jnp.ones((3, 4)), jnp.ones((2, 4, 5)), none).shape == (0, 5)
    assert grouped_matmul(jnp.ones((0, 4)), jnp.ones((2, 4, 5)), none).shape == (0, 5)
    one = group_rows(jnp.zeros(1, jnp.int32), 2)
    assert grouped_matmul(jnp.ones((1, 4)), jnp.ones((2, 4, 0)), one).shape == (1, 0)


def test_a_batch_of_products_is_each_of_them():
    x, matrices, matrix = arrays("a matrix for most")
    rows = group_rows(matrix, 5)
    got = jax.vmap(lambda x: grouped_matmul(x, matrices, rows))(jnp.stack([x, 2 * x]))
    np.testing.assert_allclose(got[1], 2 * got[0], rtol=1e-6)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (dict(x=jnp.ones((2, 5))), ValueError, r"matrices must be \[G, K, N\] with K = 5"),
        (dict(x=jnp.ones((4, 3))), ValueError, "R = 6 products must be so many for each of M = 4"),
        (dict(x=jnp.ones((2, 3), jnp.int32)), TypeError, "x must be a floating-point array"),
        (dict(x=jnp.ones((2, 3), jnp.bfloat16)), TypeError, "one dtype; got bfloat16, float32"),
        (dict(matrices=jnp.ones((3, 3, 4))), ValueError, r"rows.ends must be \[G\] with G = 3"),
    ],
)
def test_what_does_not_fit_is_refused(unchecked, wrong, error, message):
    told = dict(x=jnp.ones((2, 3)), matrices=jnp.ones((2, 3, 4))) | wrong
    with pytest.raises(error, match=message):
        grouped_matmul(**told, rows=group_rows(jnp.zeros(6, jnp.int32), 2))


def test_rows_are_those_of_group_rows(unchecked):
    with pytest.raises(TypeError, match="rows must come from group_rows; got ndarray"):
        grouped_matmul(jnp.ones((2, 3)), jnp.ones((2, 3, 4)), np.zeros(2, np.int32))  # type: ignore


@pytest.mark.parametrize("matrices", [0, 2.0, True])
def test_a_number_of_matrices_is_an_int(unchecked, matrices):
    with pytest.raises(ValueError, match="matrices must be an int >= 1"):
        group_rows(jnp.zeros(6, jnp.int32), matrices)
