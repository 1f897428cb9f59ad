"""The Hopper kernel, interpreted: values, masks, cut rows, poison, races between its warpgroups.

The common suite is mostly float32 and small heads, which the matrix unit of Hopper does not take;
these cases are the contract once more in shapes that it does.
"""

import jax
import numpy as np
import pytest

from paged_decode.kernels import paged_attention

from ..oracle import Case, build, check, same_bits
from .interpret import NAME, PROBLEM

pytestmark = [
    pytest.mark.skipif(PROBLEM is not None, reason=str(PROBLEM)),
    # The interpreter multiplies in NumPy, also the rows of a product that nobody stores.
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]

MANY, RACES = f"{NAME}-many", f"{NAME}-races"

CASES = {
    "pages smaller than a tile": Case((130, 0, 1), 1, 4, 64, 16, 9, dtype="bfloat16"),
    "pages of a tile": Case((65, 64), 2, 8, 128, 64, 2, dtype="bfloat16"),
    "pages larger than a tile": Case((200, 3), 1, 3, 64, 128, 2, dtype="float16"),
    "pages of 8, a group of 12": Case((21,), 1, 12, 64, 8, 3, dtype="float16"),
    "window, starts, cap and sinks": Case(
        (150, 0, 70, 9),
        1,
        5,
        64,
        32,
        5,
        dtype="float16",
        starts=(0, 0, 66, 9),
        sinks=(5, 2),
        options=dict(sliding_window=77, soft_cap=2.0, scale=0.4),
    ),
    "more rows than are read at once": Case((9,) * 18, 1, 1, 64, 16, 1, dtype="bfloat16"),
}


@pytest.mark.parametrize("name", CASES)
def test_every_case_matches_the_oracle(name):
    check(NAME, CASES[name])


@pytest.mark.parametrize("name", ["pages of a tile", "window, starts, cap and sinks"])
def test_more_blocks_than_tiles_match_the_oracle(name):
    check(MANY, CASES[name])


@pytest.mark.parametrize("fill", [np.nan, np.inf])
def test_poison_and_page_order_change_no_bit(fill):
    case = CASES["window, starts, cap and sinks"]
    same_bits(build(case, fill=fill, order=3).call(NAME), build(case).call(NAME))


def test_the_number_of_blocks_changes_a_result_by_rounding_only():
    inputs = build(CASES["pages smaller than a tile"])
    (out, lse), (other, other_lse) = inputs.call(NAME), inputs.call(MANY)
    np.testing.assert_allclose(
        out.astype(np.float32), other.astype(np.float32), rtol=1e-2, atol=8e-3
    )
    np.testing.assert_allclose(lse, other_lse, rtol=1e-6)


@pytest.mark.parametrize("fault", ["page id -1", "page id N", "length past the table"])
def test_a_row_that_breaks_the_contract_is_nan_and_the_others_keep_their_bits(fault):
    inputs = build(Case((70, 40), 1, 2, 64, 16, 5, dtype="float16"))
    arrays = (inputs.q, inputs.k_pages, inputs.v_pages, inputs.page_table, inputs.seq_lens)
    # Values cannot be checked under `jit`.
    call = jax.jit(lambda *arrays: paged_attention(*arrays, return_lse=True, implementation=NAME))
    want, want_lse = call(*arrays)
    if "id" in fault:
        inputs.page_table[0, 1] = -1 if "-1" in fault else len(inputs.k_pages)
    else:
        inputs.seq_lens[0] = 81
    out, lse = call(*arrays)
    assert np.isnan(out[0]).all() and np.isnan(lse[0]).all()
    same_bits((out[1], lse[1]), (want[1], want_lse[1]))


def test_warpgroups_do_not_race(capfd):
    check(RACES, Case((200,), 1, 2, 64, 32, 7, dtype="float16"))
    assert "RACE" not in capfd.readouterr().out
