"""Pages of 8 bits as pages of 16 for many queries, interpreted."""

from dataclasses import replace
from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest

from paged_decode.kernels import reference
from paged_decode.kernels.eight_bits import dequantise, quantise
from paged_decode.kernels.record import AttentionCall
from paged_decode.kernels.triton import launch

from .interpret import INSTALLED, _launch

pytestmark = pytest.mark.skipif(not INSTALLED, reason="triton has no wheel for this platform")
LENS, STARTS, TOKENS, WINDOW = (40, 0, 17, 64, 9), (0, 0, 5, 33, 0), 8, 20


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    from paged_decode.kernels.triton import widen

    monkeypatch.setattr(launch, "launch", partial(_launch, order=1))
    monkeypatch.setattr(widen, "BLOCK", 256)


def a_call(pages, window=None):
    rng = np.random.default_rng(0)
    rows, columns, size, heads, dim = len(LENS), 8, 8, 2, 80
    count = rows * columns + 1
    k, v = (
        quantise(jnp.asarray(x, jnp.float32), pages)
        for x in rng.normal(size=(2, 2, count, heads, size, dim))
    )
    table = rng.permutation(np.arange(1, count)).reshape(rows, columns).astype(np.int32)
    table[1, 3] = count  # nobody looks there
    return AttentionCall(
        q=jnp.asarray(rng.normal(size=(rows, TOKENS, 2 * heads, dim)), jnp.bfloat16),
        k_pages=k[0],
        v_pages=v[0],
        layer=jnp.int32(1),
        page_table=jnp.asarray(table),
        seq_lens=jnp.array(LENS, jnp.int32),
        starts=jnp.array(STARTS, jnp.int32),
        sink=None,
        scale=0.3,
        window=window,
        soft_cap=None,
        platform="gpu",
        k_scales=k[1],
        v_scales=v[1],
    )


@pytest.mark.parametrize(("pages", "window"), [("int8", None), ("float8_e4m3fn", WINDOW)])
def test_what_a_query_may_see_is_its_number_times_its_scale_rounded_once(pages, window):
    from paged_decode.kernels.triton.widen import widened

    call = a_call(pages, window)
    made = widened(call)
    assert made.k_scales is None and made.v_scales is None
    size, table = call.page_size, np.asarray(call.page_table)
    for row, (length, start) in enumerate(zip(LENS, STARTS, strict=True)):
        first = max(start, 0 if window is None else length - TOKENS - window + 1)
        for token in range(max(first, 0), length):
            page, own = table[row, token // size], np.asarray(made.page_table)[row, token // size]
            for pool in ("k", "v"):
                numbers = getattr(call, f"{pool}_pages")[1, page, :, token % size]
                scales = getattr(call, f"{pool}_scales")[1, page, :, token % size]
                want = dequantise(numbers, scales).astype(jnp.bfloat16)
                got = getattr(made, f"{pool}_pages")[0, own, :, token % size]
                np.testing.assert_array_equal(got, want)


def test_a_page_that_there_is_not_stays_one_and_its_row_is_no_number():
    from paged_decode.kernels.triton.widen import widened

    call = a_call("int8")
    table = call.page_table.at[0, 2].set(10**6).at[3, 0].set(-7)
    made = widened(replace(call, page_table=table))
    assert made.page_table[0, 2] == -1 and made.page_table[3, 0] == -1
    out, _ = reference.attend(made)
    assert np.isnan(out[0]).all() and np.isnan(out[3]).all() and not np.isnan(out[2]).any()
