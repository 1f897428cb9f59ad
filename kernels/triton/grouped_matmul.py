"""Products of rows with one of several matrices each, in one launch.

```
tiles      [rows of matrix 0] [of 0] [of 2] [of 5] [of 5] [of 5]     by `order`, matrix by matrix
programs    c0 c1 c2 ...      c0 ...                                 columns of a tile together
```

Every program adds up how many tiles each matrix has and finds its own, so nothing is planned before
the launch, and what nobody asks for is never read. The grid is for the worst case; a program
without a tile ends at once. Programs that run at the same time share a matrix, or rows.
"""

from dataclasses import dataclass

import jax
import triton
import triton.language as tl
from jaxtyping import Array

from ..cards import Card
from ..grouped_matmul import rows_of_tile
from . import launch
from .config import BIG_SHARED_MEMORY, power

__all__ = ["Tiling", "choose_tiling", "grouped_matmul_kernel", "multiply"]


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a product is cut: rows and columns of a tile, numbers of a row at a time."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


# By the rows of a tile: python benchmarks/grouped_matmul.py --tilings
_TILINGS = {
    16: Tiling(rows=16, columns=128, depth=64, warps=4, stages=4),
    32: Tiling(rows=32, columns=128, depth=64, warps=4, stages=4),
    64: Tiling(rows=64, columns=256, depth=64, warps=8, stages=3),
    128: Tiling(rows=128, columns=256, depth=64, warps=8, stages=3),
}
BAND = 8  # tiles of columns that are together


def choose_tiling(rows: int, matrices: int, itemsize: int, card: Card) -> Tiling:
    """Of so many products with so many matrices of numbers of `itemsize` bytes."""
    size = rows_of_tile(rows, matrices)
    if itemsize == 4:  # exact float32 products do not use the matrix unit
        return Tiling(rows=min(size, 32), columns=64, depth=32, warps=4, stages=2)
    if card.generation not in BIG_SHARED_MEMORY:
        return Tiling(rows=min(size, 64), columns=64, depth=64, warps=4, stages=3)
    return _TILINGS[size]


def multiply(
    x: Array, matrices: Array, order: Array, ends: Array, tiling: Tiling | None = None
) -> Array:
    """`[R, N]`, of x `[M, K]`, matrices `[G, K, N]`, order int32 `[R]` and ends int32 `[G]`."""
    (count, width, columns), rows = matrices.shape, len(order)
    if tiling is None:
        tiling = choose_tiling(rows, count, x.dtype.itemsize, Card.here())
    tiles = -(-rows // tiling.rows) + min(count, rows)
    made = launch.looped(
        grouped_matmul_kernel,
        (x, matrices, order, ends),
        [jax.ShapeDtypeStruct((rows, columns), x.dtype)],
        grid=tiles * -(-columns // tiling.columns),
        warps=tiling.warps,
        stages=tiling.stages,
        name="grouped_matmul",
        constants=dict(
            MATRICES=count,
            BLOCK_G=power(count),
            ROWS=rows,
            EACH=rows // len(x),
            TILES=tiles,
            K=width,
            N=columns,
            M=tiling.rows,
            COLUMNS=tiling.columns,
            DEPTH=tiling.depth,
            BAND=BAND,
            EXACT=x.dtype.itemsize == 4,
        ),
    )
    return made[0]


@triton.jit
def grouped_matmul_kernel(
    x,
    matrices,
    order,
    ends,
    out,
    MATRICES: tl.constexpr,
    BLOCK_G: tl.constexpr,
    ROWS: tl.constexpr,
    EACH: tl.constexpr,
    TILES: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    BAND: tl.constexpr,
    EXACT: tl.constexpr,
):
    """COLUMNS columns of M rows of one matrix.

    Pointers: x `[ROWS / EACH, K]`, matrices `[MATRICES, K, N]` and out `[ROWS, N]` of one dtype;
    order int32 `[ROWS]`, ends int32 `[MATRICES]`.
    """
    WIDE: tl.constexpr = (N + COLUMNS - 1) // COLUMNS
    band = tl.program_id(0) // (TILES * BAND)
    inside = tl.program_id(0) - band * (TILES * BAND)
    width = tl.minimum(WIDE - band * BAND, BAND)
    tile = inside // width

    group = tl.arange(0, BLOCK_G)
    real = group < MATRICES
    end = tl.load(ends + group, mask=real, other=0)
    begin = tl.load(ends + group - 1, mask=real & (group > 0), other=0)
    tiles = tl.cdiv(end - begin, M)
    upto = tl.cumsum(tiles, 0)
    mine = tl.sum((real & (upto <= tile)).to(tl.int32), 0)
    if mine < MATRICES:
        here = group == mine
        last = tl.sum(tl.where(here, end, 0), 0)
        first = tl.sum(tl.where(here, begin - (upto - tiles) * M, 0), 0) + tile * M
        place = first + tl.arange(0, M)
        row = tl.load(order + place, mask=place < last, other=0).to(tl.int64)
        column = (band * BAND + inside % width) * COLUMNS + tl.arange(0, COLUMNS)
        deep = tl.arange(0, DEPTH)
        a_at = x + (row // EACH * K)[:, None] + deep[None, :]
        # Columns past the last are those of the front again, and are not stored.
        b_at = matrices + mine.to(tl.int64) * K * N + deep[:, None] * N + (column % N)[None, :]
        total = tl.zeros([M, COLUMNS], tl.float32)
        for left in tl.range(K, 0, -DEPTH):
            if K % DEPTH == 0:
                a = tl.load(a_at)
                b = tl.load(b_at)
            else:
                a = tl.load(a_at, mask=(deep < left)[None, :], other=0.0)
                b = tl.load(b_at, mask=(deep < left)[:, None], other=0.0)
            total = tl.dot(a, b, total, input_precision="ieee" if EXACT else "tf32")
            a_at += DEPTH
            b_at += DEPTH * N
        mask = (place < last)[:, None] & (column < N)[None, :]
        tl.store(out + row[:, None] * N + column[None, :], total.to(out.dtype.element_ty), mask)
