"""The Hopper kernel: values, masks, cut rows, poison, races between its warpgroups.

The common suite is mostly float32 and small heads, which the matrix unit of Hopper does not take;
these cases are the contract once more in shapes that it does. They are interpreted; where JAX has
a GPU they run on it, with larger ones that would take the interpreter too long.
"""

import jax
import numpy as np
import pytest

from paged_decode.kernels import paged_attention
from paged_decode.kernels.pallas_gpu import work

from ..oracle import Case, build, check, same_bits
from .interpret import NAME, PROBLEM

ON_CARD = jax.default_backend() == "gpu"
pytestmark = [
    pytest.mark.skipif(PROBLEM is not None and not ON_CARD, reason=str(PROBLEM)),
    # The interpreter multiplies in NumPy, also the rows of a product that nobody stores.
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]

KERNEL = "pallas_gpu" if ON_CARD else NAME
only_interpreted = pytest.mark.skipif(ON_CARD, reason="about the interpreter's blocks")

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
}

FAULTS = ["page id -1", "page id N", "length past the table"]


def check_repeats(case: Case) -> None:
    """The case matches the oracle, and is the same to the bit however often it runs."""
    inputs = build(case)
    check(KERNEL, case)
    first = inputs.call(KERNEL)
    for _ in range(5):
        same_bits(inputs.call(KERNEL), first)


def check_broken(case: Case, fault: str) -> None:
    """Row 0 of two with one of FAULTS is NaN, and row 1 keeps its bits."""
    inputs = build(case)
    arrays = (inputs.q, inputs.k_pages, inputs.v_pages, inputs.page_table, inputs.seq_lens)
    # Values cannot be checked under `jit`.
    call = jax.jit(lambda *arrays: paged_attention(*arrays, return_lse=True, implementation=KERNEL))
    want, want_lse = call(*arrays)
    if "id" in fault:
        inputs.page_table[0, 1] = -1 if "-1" in fault else len(inputs.k_pages)
    else:
        inputs.seq_lens[0] = case.columns * case.page_size + 1
    out, lse = call(*arrays)
    assert np.isnan(out[0]).all() and np.isnan(lse[0]).all()
    same_bits((out[1], lse[1]), (want[1], want_lse[1]))


@pytest.mark.parametrize("name", CASES)
def test_every_case_matches_the_oracle(name):
    check(KERNEL, CASES[name])


def test_lengths_that_are_read_in_several_rounds_match_the_oracle(monkeypatch):
    monkeypatch.setattr(work, "_ROUND", 3)
    check(KERNEL, Case((9, 0, 70, 2, 5), 1, 1, 64, 32, 3, dtype="float16"))


def test_vmap_is_a_loop_over_launches():
    inputs = build(Case((9, 20), 1, 1, 64, 32, 1, dtype="float16"))
    rest = (inputs.k_pages, inputs.v_pages, inputs.page_table, inputs.seq_lens)
    queries = np.stack([inputs.q, 2 * inputs.q])
    got = jax.vmap(lambda q: paged_attention(q, *rest, implementation=KERNEL))(queries)
    want = [paged_attention(q, *rest, implementation=KERNEL) for q in queries]
    same_bits(list(got), want)


def _lens(rows: int, most: int) -> tuple[int, ...]:
    return tuple(map(int, np.random.default_rng(rows).integers(0, most, rows)))


LARGE = {
    "one row": Case((4096,), 8, 4, 128, 64, 64, dtype="bfloat16"),
    "64 ragged rows": Case(_lens(64, 3000), 8, 4, 128, 16, 188, dtype="bfloat16"),
    "300 ragged rows": Case(_lens(300, 500), 2, 8, 128, 64, 8, dtype="bfloat16"),
    "600 rows, in two rounds": Case(_lens(600, 300), 1, 8, 64, 32, 10, dtype="float16"),
    "one long row among short ones": Case((65,) * 40 + (9000,), 1, 8, 64, 8, 1125, dtype="float16"),
    "a group of 64": Case((2000, 100), 1, 64, 128, 32, 63, dtype="bfloat16"),
    "a group of 1, pages of 256": Case((777, 3000, 64), 4, 1, 128, 256, 12, dtype="float16"),
}


@pytest.mark.skipif(not ON_CARD, reason="needs a Hopper GPU: the interpreter would take minutes")
@pytest.mark.parametrize("name", LARGE)
def test_large_cases_match_the_oracle_and_repeat_to_the_bit(name):
    check_repeats(LARGE[name])


@only_interpreted
@pytest.mark.parametrize("name", ["pages of a tile", "window, starts, cap and sinks"])
def test_more_blocks_than_tiles_match_the_oracle(name):
    check(f"{NAME}-many", CASES[name])


@pytest.mark.parametrize("fill", [np.nan, np.inf])
def test_poison_and_page_order_change_no_bit(fill):
    case = CASES["window, starts, cap and sinks"]
    same_bits(build(case, fill=fill, order=3).call(KERNEL), build(case).call(KERNEL))


@only_interpreted
def test_the_number_of_blocks_changes_a_result_by_rounding_only():
    inputs = build(CASES["pages smaller than a tile"])
    (out, lse), (other, other_lse) = inputs.call(NAME), inputs.call(f"{NAME}-many")
    np.testing.assert_allclose(
        out.astype(np.float32), other.astype(np.float32), rtol=1e-2, atol=8e-3
    )
    np.testing.assert_allclose(lse, other_lse, rtol=1e-6)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_row_that_breaks_the_contract_is_nan_and_the_others_keep_their_bits(fault):
    check_broken(Case((70, 40), 1, 2, 64, 16, 5, dtype="float16"), fault)


@only_interpreted
def test_warpgroups_do_not_race(capfd):
    check(f"{NAME}-races", Case((200,), 1, 2, 64, 32, 7, dtype="float16"))
    assert "RACE" not in capfd.readouterr().out
