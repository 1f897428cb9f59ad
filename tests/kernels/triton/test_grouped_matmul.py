"""The kernel of `grouped_matmul`: interpreted, and compiled for cards that are not here."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest

from ..test_grouped_matmul import CASES, arrays, check
from .compiled import CARDS, needs, recorded
from .interpret import INSTALLED, as_on_a_gpu

pytestmark = pytest.mark.skipif(not INSTALLED, reason="triton has no wheel for this platform")


@pytest.fixture
def launched(monkeypatch):
    as_on_a_gpu(monkeypatch)


@pytest.mark.parametrize("case", CASES)
def test_every_row_is_multiplied_with_its_own_matrix(launched, case):
    check(*arrays(case))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_numbers_are_summed_in_float32(launched, dtype):
    check(*arrays("several tiles of each", dtype, width=130, columns=144))


def test_columns_of_several_bands_are_all_there(launched, monkeypatch):
    from paged_decode.kernels.triton import grouped_matmul

    monkeypatch.setattr(grouped_matmul, "BAND", 2)
    check(*arrays("a matrix for most", columns=330))


@pytest.mark.parametrize("card", ["sm_80", "sm_89", "sm_90", "sm_100"])
@pytest.mark.parametrize("rows", [8, 2560, 8192, 32768])
def test_it_compiles_without_spills(card, rows):
    from paged_decode.kernels.triton import grouped_matmul

    for dtype in ("bfloat16", "float32") if rows == 8 else ("bfloat16",):
        size = jnp.dtype(dtype).itemsize
        tiling = grouped_matmul.choose_tiling(rows, 128, size, CARDS[card])
        shapes = [
            jax.ShapeDtypeStruct((rows // 8, 2048), dtype),
            jax.ShapeDtypeStruct((128, 2048, 1536), dtype),
            jax.ShapeDtypeStruct((rows,), jnp.int32),
            jax.ShapeDtypeStruct((128,), jnp.int32),
        ]
        made = recorded(partial(grouped_matmul.multiply, tiling=tiling), *shapes)
        need = needs(made, CARDS[card])
        assert need.stack_bytes == 0
        assert need.shared_bytes <= CARDS[card].block_bytes
