"""The Hopper kernel for T > 1: values, masks, padding, poison, broken rows, order, races.

As in `test_kernel.py`, the contract in shapes that the matrix unit takes; interpreted, or on a GPU.
"""

import jax
import numpy as np
import pytest

from paged_decode.kernels.pallas_gpu import work

from ..oracle import Case, build, check, same_bits
from .interpret import NAME
from .test_kernel import FAULTS, KERNEL, ON_CARD, check_broken, check_repeats, only_interpreted
from .test_kernel import pytestmark as pytestmark

CASES = {
    "less than a unit": Case((130, 3, 0), 1, 2, 64, 16, 9, tokens=5, dtype="bfloat16"),
    "whole units": Case((200,), 1, 2, 64, 64, 4, tokens=128, dtype="bfloat16"),
    "an odd group, two tiles of one head": Case((150, 20), 2, 3, 64, 32, 5, 70, "float16"),
    "keys in several tiles, D 128": Case((300,), 1, 2, 128, 128, 3, tokens=3, dtype="bfloat16"),
    "D 256": Case((70,), 1, 2, 256, 8, 9, tokens=66, dtype="float16"),
    "window, starts, cap and sinks": Case(
        (300, 0, 70, 9),
        1,
        2,
        64,
        32,
        10,
        tokens=68,
        dtype="float16",
        starts=(0, 0, 66, 9),
        sinks=(2, 2),
        options=dict(sliding_window=77, soft_cap=2.0, scale=0.4),
    ),
    "padding in front": Case(
        (200, 90, 3, 60),
        1,
        2,
        64,
        32,
        7,
        130,
        "float16",
        query_lens=(130, 70, 0, 1),
        options=dict(sliding_window=40),
    ),
    "a scale below zero": Case((90,), 1, 2, 64, 32, 3, 2, "float16", options=dict(scale=-0.2)),
    "a scale of zero": Case((90,), 1, 1, 64, 32, 3, 2, "float16", options=dict(scale=0.0)),
}
LARGE = {
    "a long prompt": Case((3000,), 8, 4, 128, 16, 188, tokens=3000, dtype="bfloat16"),
    "short chunks in a wide program": Case(
        (2000, 700, 65, 9), 8, 4, 128, 16, 125, 512, "bfloat16", query_lens=(512, 100, 65, 0)
    ),
    "chunks on a prefix": Case((4000, 700, 65), 8, 4, 128, 64, 63, 512, "bfloat16"),
    "600 rows, in the order they come": Case((90,) * 600, 1, 2, 64, 32, 3, 2, "float16"),
    "an odd group, windows": Case(
        (900, 2000), 2, 5, 64, 8, 250, 300, "float16", options=dict(sliding_window=200)
    ),
    "D 256, a cap": Case((800,), 2, 2, 256, 32, 25, 400, "bfloat16", options=dict(soft_cap=30.0)),
}


@pytest.mark.parametrize("name", CASES)
def test_every_case_matches_the_oracle(name):
    check(KERNEL, CASES[name])


@pytest.mark.skipif(not ON_CARD, reason="needs a Hopper GPU: the interpreter would take minutes")
@pytest.mark.parametrize("name", LARGE)
def test_large_cases_match_the_oracle_and_repeat_to_the_bit(name):
    check_repeats(LARGE[name])


@pytest.mark.parametrize("fill", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["window, starts, cap and sinks", "padding in front"])
def test_poison_and_page_order_change_no_bit(fill, name):
    case = CASES[name]
    same_bits(build(case, fill=fill, order=3).call(KERNEL), build(case).call(KERNEL))


@only_interpreted
def test_the_order_of_rows_changes_no_bit(monkeypatch):
    inputs = build(Case((9, 300, 70, 2, 160), 1, 2, 64, 32, 10, tokens=2, dtype="float16"))
    want = inputs.call(NAME)
    monkeypatch.setattr(work, "_ROUND", 3)  # too many rows to sort
    jax.clear_caches()
    same_bits(inputs.call(NAME), want)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_row_that_breaks_the_contract_is_nan_and_the_others_keep_their_bits(fault):
    check_broken(Case((140, 40), 1, 2, 64, 16, 9, tokens=2, dtype="float16"), fault)


@only_interpreted
def test_warpgroups_do_not_race(capfd):
    check(f"{NAME}-races", Case((150,), 1, 2, 64, 32, 5, tokens=2, dtype="float16"))
    assert "RACE" not in capfd.readouterr().out
