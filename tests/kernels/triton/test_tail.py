"""The kernel for T > 1, interpreted: tiles of queries, blocks of keys, parts and their merge.

Small tiles and blocks cut the rows of these cases every way; each variant runs its programs in an
order of its own.
"""

import numpy as np
import pytest

from ..oracle import Case, build, check, same_bits
from .interpret import INSTALLED, NAME

pytestmark = pytest.mark.skipif(not INSTALLED, reason="triton has no wheel for this platform")

SPLIT = f"{NAME}-split"

CASES = {
    "several tiles, short rows padded in front": Case((0, 5, 40, 75), 2, 3, 16, 16, 5, tokens=20),
    "one tile cut along its keys": Case((150,), 2, 2, 64, 16, 10, tokens=5),
    "a window within a block": Case(
        (75, 9), 1, 3, 16, 16, 5, tokens=20, options=dict(sliding_window=7)
    ),
    "a window over blocks, pages of 1": Case(
        (150, 60), 1, 2, 16, 1, 150, tokens=40, options=dict(sliding_window=50)
    ),
    "starts behind blocks": Case((100, 40, 90), 1, 2, 16, 16, 7, tokens=30, starts=(37, 0, 85)),
    "all options, float16": Case(
        (70, 0, 3, 140), 2, 5, 80, 16, 9, tokens=13, dtype="float16", starts=(0, 0, 2, 90),
        sinks=(10, 2), options=dict(sliding_window=60, soft_cap=2.0, scale=0.4),
    ),
    "ragged T over several tiles": Case(
        (75, 64, 40, 80, 9), 2, 3, 16, 16, 5, tokens=20, query_lens=(20, 3, 0, 11, 1),
        options=dict(sliding_window=30),
    ),
    "trees of drafts, all options, cut along their keys": Case(
        (150, 40, 7), 2, 4, 64, 16, 10, tokens=7, dtype="float16", query_lens=(7, 5, 3),
        tail_mask=0.5, starts=(70, 0, 2), sinks=(8, 2), options=dict(sliding_window=60),
    ),
    "a mask over several tiles and blocks": Case(
        (75, 50), 1, 2, 16, 8, 10, tokens=40, tail_mask=0.5
    ),
    "a scale below 0": Case((50, 20), 1, 2, 16, 16, 4, tokens=9, options=dict(scale=-0.7)),
    "one token of many heads, all options": Case(
        (70, 0, 3, 140), 2, 40, 32, 16, 9, dtype="bfloat16", starts=(0, 0, 2, 90), sinks=(80, 2),
        options=dict(sliding_window=60, soft_cap=2.0, scale=0.4),
    ),
    "bfloat16, a prompt from its first token": Case(
        (40, 33), 1, 4, 64, 8, 5, tokens=40, dtype="bfloat16"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_tiles_of_queries_match_the_oracle(name):
    check(SPLIT, CASES[name])


ORDERS = ["one tile cut along its keys", "ragged T over several tiles"]
ORDERS.append(pytest.param("all options, float16", marks=pytest.mark.long))


@pytest.mark.parametrize("name", ORDERS)
def test_no_bit_depends_on_which_program_comes_last(name):
    inputs = build(CASES[name])
    same_bits(inputs.call(f"{SPLIT}-other-order"), inputs.call(SPLIT))


def test_poison_and_page_order_change_no_bit():
    case = CASES["all options, float16"]
    clean = build(case).call(SPLIT)
    for fill in (np.nan, np.inf):
        same_bits(build(case, fill=fill, order=3).call(SPLIT), clean)
