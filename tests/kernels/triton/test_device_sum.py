"""The kernel of `DeviceSum`: interpreted by processes that share memory, and compiled."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from paged_decode.kernels.device_sum import WAIT, _empty, _head

from .cards import Cards
from .compiled import CARDS as HARDWARE
from .compiled import Launched, needs
from .interpret import INSTALLED

pytestmark = pytest.mark.skipif(not INSTALLED, reason="triton has no wheel for this platform")
PLACES = 3


def _constants(
    cards: int, rows: int, width: int, dtype: Any = np.float32, **more: Any
) -> dict[str, Any]:
    block = 1 << (width - 1).bit_length()
    sizes = dict(ROWS=rows, WIDTH=width, BLOCK=block, CARDS=cards, PLACES=PLACES, HEAD=_head(rows))
    sizes |= dict(BITS=8 * jnp.dtype(dtype).itemsize, EMPTY=_empty(dtype))
    return sizes | dict(RESIDUAL=1, NORM=1, WAIT=10_000_000) | more


@pytest.fixture(scope="module")
def two():
    cards = Cards(2)
    yield cards
    cards.close()


def _parts(cards: int, rows: int, width: int, dtype: Any) -> np.ndarray:
    parts = np.random.default_rng(0).normal(size=(cards, rows, width)).astype(dtype)
    parts[0, 0, :3], parts[1, 0, :3] = (-0.0, 0.0, -0.0), (-0.0, -0.0, 1.0)
    return parts


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_every_card_gets_the_bits_of_the_sum_in_every_launch_though_one_is_late(two, dtype):
    rows, width, eps = 2, 48, 1e-3
    parts = _parts(2, rows, width, dtype)
    residual = np.random.default_rng(1).normal(size=(rows, width)).astype(dtype)
    weight = np.linspace(0.5, 2, width).astype(np.float32)
    told = dict(residual=residual, weight=weight, eps=eps)
    launches = [told | dict(late=i % 3, times=i % 4 - 1) for i in range(7)]
    outs, ends = two.run(parts, launches, _constants(2, rows + 1, width, dtype))
    for launch, mine, others in zip(launches, *outs, strict=True):
        np.testing.assert_array_equal(mine.view(np.uint8), others.view(np.uint8))
        total = (parts * launch["times"]).astype(np.float32).sum(0).astype(dtype)
        x = (residual.astype(np.float32) + total.astype(np.float32)).astype(dtype)
        np.testing.assert_array_equal(mine[0].astype(np.float32), x.astype(np.float32))
        wide = x.astype(np.float32)
        scale = 1 / np.sqrt((wide * wide).mean(-1, keepdims=True) + eps)
        want = wide * scale * weight.astype(np.float32)
        tolerance = 1e-5 if dtype == np.float32 else 1e-2
        np.testing.assert_allclose(mine[1].astype(np.float32), want, rtol=tolerance)
    for end in ends:  # the counters of rows that nobody has stay
        np.testing.assert_array_equal(end[: 4 * (rows + 1)].view(np.int32), [7, 7, 0])


def test_three_cards_add_in_the_same_order():
    cards = Cards(3)
    try:
        parts = np.array([[[1e8, 1.0]], [[1.0, 2.0]], [[-1e8, 3.0]]], np.float32)
        told = dict(residual=parts[0], weight=parts[0, 0], eps=0.0)
        outs, _ = cards.run(parts, [told] * 2, _constants(3, 1, 2, RESIDUAL=0, NORM=0))
    finally:
        cards.close()
    want = [(parts[0] + parts[1]) + parts[2]] * 2
    for found in outs:
        np.testing.assert_array_equal([each[0] for each in found], want)


def test_a_card_that_never_comes_ends_in_nan_then_and_later(two):
    parts = _parts(2, 1, 16, np.float32)
    told = dict(residual=parts[0], weight=parts[0, 0], eps=0.0)
    constants = _constants(2, 1, 16, WAIT=3)
    (found,), ends = two.run(parts, [told] * 2, constants, absent=(1,))
    assert np.isnan(found).all()
    assert ends[0][:4].view(np.int32) == -1


@pytest.mark.parametrize("card", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize(("width", "cards"), [(4096, 2), (8192, 8), (2880, 2)])
def test_it_compiles_without_spills_and_moves_whole_vectors(card, width, cards):
    from paged_decode.kernels.triton.device_sum import device_sum_kernel

    constants = _constants(cards, 128, width, jnp.bfloat16, WAIT=WAIT)
    pointers = ("bfloat16", "int32", "bfloat16", "float32", "float", "bfloat16", "bfloat16")
    warps = min(max(constants["BLOCK"] // 512, 1), 16)
    launch = Launched(device_sum_kernel, pointers, warps, 1, constants, None)
    found = needs(launch, HARDWARE[card])
    assert found.stack_bytes == 0
    assert "st.global.wt.v4.b32" in found.listing and "ld.volatile.global.v4.b32" in found.listing
