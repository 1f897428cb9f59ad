"""Products of rows with one of several matrices each, as the experts of a mixture are.

```
row             0  1  2  3  4  5        what is asked: the matrix of each row
matrix          2  0  2  1  0  2
order           1  4 | 3 | 0  2  5      rows, matrix by matrix
ends                 2   3         6
tiles          [1 4] [3] [0 2] [5]      of one matrix each: it is read once for all rows of a tile
```

Only matrices that have rows are read, and rows stay where they are: a tile gathers its own and
writes them back. `jax.lax.ragged_dot` asks for sorted rows, and on a GPU multiplies each with every
matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from . import dispatch
from .checks import AnyArray, check_axes, check_float, check_index

__all__ = ["GroupedRows", "group_rows", "grouped_matmul"]

FEWEST, MOST = 16, 128  # rows of a tile


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class GroupedRows:
    """Rows in the order of their matrices, as `group_rows` finds it; one does for many products.

    Attributes:
      order: int32 `[R]`, the rows of the first matrix, then those of the second.
      ends: int32 `[G]`, where in it the rows of each matrix end.
    """

    order: Any
    ends: Any


def group_rows(matrix: Int[AnyArray, " R"], matrices: int) -> GroupedRows:
    """Which rows each of so many matrices has.

    Args:
      matrix: int32 `[R]`, of each row, `0 .. matrices - 1`; what lies outside is clipped.
      matrices: G, how many there are.

    Raises:
      TypeError: numbers that are not of int32 or int64.
      ValueError: another shape, or fewer matrices than 1.

    Examples:
      >>> import jax.numpy as jnp
      >>> rows = group_rows(jnp.array([2, 0, 2, 1, 0, 2]), 3)
      >>> rows.order.tolist(), rows.ends.tolist()
      ([1, 4, 3, 0, 2, 5], [2, 3, 6])
    """
    check_index("matrix", matrix)
    check_axes("matrix", matrix, "R")
    if isinstance(matrices, bool) or not isinstance(matrices, int) or matrices < 1:
        raise ValueError(f"matrices must be an int >= 1; got {matrices!r}")
    if isinstance(matrix, np.ndarray):  # before JAX takes the low half of a large number
        matrix = np.clip(matrix, 0, matrices - 1)
    matrix = jnp.clip(jnp.asarray(matrix), 0, matrices - 1).astype(jnp.int32)
    number = jnp.arange(matrices, dtype=jnp.int32)
    ends = jnp.sum(matrix <= number[:, None], axis=1, dtype=jnp.int32)
    return GroupedRows(jnp.argsort(matrix, stable=True).astype(jnp.int32), ends)


def grouped_matmul(
    x: Float[AnyArray, "M K"], matrices: Float[AnyArray, "G K N"], rows: GroupedRows
) -> Float[Array, "R N"]:
    """Row i of the result is row `i // (R / M)` of x times the matrix of row i.

    Products are summed in float32. On NVIDIA GPUs, with the `cuda` extra, it is one launch of a
    Triton kernel for bfloat16, float16 and float32, which XLA does not split: where arrays lie on
    several devices, call it inside a `shard_map`. Elsewhere it is a loop over the tiles. It has no
    derivative.

    Args:
      x: `[M, K]`; each row has R / M products, one after the other in the result.
      matrices: `[G, K, N]` of the dtype of x.
      rows: of the R products, from `group_rows`.

    Raises:
      TypeError: arrays that are not floating-point, or of two dtypes; other rows.
      ValueError: shapes that disagree, or an R that M does not divide.

    Examples:
      Two experts for each token:

      >>> import jax.numpy as jnp
      >>> x, experts = jnp.array([[1.0, 2.0]]), jnp.stack([jnp.eye(2), 10 * jnp.eye(2)])
      >>> grouped_matmul(x, experts, group_rows(jnp.array([1, 0]), 2)).tolist()
      [[10.0, 20.0], [1.0, 2.0]]
    """
    check_float("x", x)
    check_float("matrices", matrices)
    check_axes("x", x, "M, K")
    check_axes("matrices", matrices, "G, K, N", K=x.shape[1])
    if not isinstance(rows, GroupedRows):
        raise TypeError(f"rows must come from group_rows; got {type(rows).__name__}")
    check_axes("rows.order", rows.order, "R")
    check_axes("rows.ends", rows.ends, "G", G=matrices.shape[0])
    if x.dtype != matrices.dtype:
        raise TypeError(f"x and matrices must be of one dtype; got {x.dtype}, {matrices.dtype}")
    if len(rows.order) % max(len(x), 1) or len(rows.order) > len(x) == 0:
        raise ValueError(
            f"R = {len(rows.order)} products must be so many for each of M = {len(x)} rows"
        )
    if 0 in (*rows.order.shape, *matrices.shape[1:]):
        return jnp.zeros((len(rows.order), matrices.shape[2]), x.dtype)
    if dispatch.launches(x.dtype):
        from .triton.grouped_matmul import multiply

        return multiply(jnp.asarray(x), jnp.asarray(matrices), rows.order, rows.ends)
    return _looped(jnp.asarray(x), jnp.asarray(matrices), rows)


def rows_of_tile(rows: int, matrices: int) -> int:
    """The power of two that holds the average number of rows of a matrix, and few more."""
    average = -(-rows // matrices)
    return min(max(1 << (average - 1).bit_length(), FEWEST), MOST)


def _looped(x: Array, matrices: Array, rows: GroupedRows) -> Array:
    """Tile by tile, as many as there are."""
    order, ends = jnp.asarray(rows.order), jnp.asarray(rows.ends)
    count, size, each = len(order), rows_of_tile(len(order), len(ends)), len(order) // len(x)
    begins = jnp.concatenate([jnp.zeros(1, jnp.int32), ends[:-1]])
    upto = jnp.cumsum(-(-(ends - begins) // size), dtype=jnp.int32)

    def add(tile: Array, out: Array) -> Array:
        group = jnp.sum(upto <= tile, dtype=jnp.int32)
        before = upto[group] - -(-(ends[group] - begins[group]) // size)
        place = begins[group] + (tile - before) * size + jnp.arange(size, dtype=jnp.int32)
        row = order.at[place].get(mode="clip")
        part = jnp.matmul(x[row // each], matrices[group], preferred_element_type=jnp.float32)
        row = jnp.where(place < ends[group], row, count)
        return out.at[row].set(part.astype(out.dtype), mode="drop")

    # In a `shard_map` the first tile makes the result differ between devices, as all later ones.
    first = add(jnp.int32(0), jnp.zeros((count, matrices.shape[2]), x.dtype))
    return lax.fori_loop(1, upto[-1], add, first)
