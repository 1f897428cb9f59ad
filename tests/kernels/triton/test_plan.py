"""What a launch of the Triton kernels may be, from its plan, and what a tiling may be."""

import pytest

from paged_decode.kernels.cards import Card
from paged_decode.kernels.record import AttentionCall
from paged_decode.kernels.triton.config import DecodeConfig, TailConfig
from paged_decode.kernels.triton.plan import Plan

SIZES = dict(rows=4, kv_heads=2, group=1, dim=64, page_size=16, columns=2**12)


def split(config, **sizes):
    """Whether rows are cut; where not, every row and tile has its one program."""
    call = AttentionCall.of_sizes(**SIZES | sizes)
    made = Plan.of(call, Card(), config)
    assert made.constants["SPLIT"] or made.grid == call.rows * call.kv_heads * call.tokens
    return made.constants["SPLIT"]


@pytest.mark.parametrize(
    "changed, sizes, fits",
    [
        ({}, {}, True),
        (dict(even=2**17 - 16), {}, True),
        (dict(even=2**17 - 8), {}, False),  # programs of a KV head up to 2**16
        (dict(ragged=2**17 - 8), {}, False),
        ({}, dict(rows=4096, columns=2**19), True),
        ({}, dict(rows=4096, columns=2**20), False),  # tiles of all rows and KV heads from 2**31 on
        ({}, dict(rows=4097), False),
    ],
)
def test_rows_are_split_only_where_the_packed_counts_of_a_program_fit(changed, sizes, fits):
    config = DecodeConfig(**dict(tokens=64, warps=4, stages=2, even=64, ragged=64) | changed)
    assert split(config, **sizes) is fits


@pytest.mark.parametrize(
    "aim, sizes, fits",
    [
        (64, {}, True),
        (2**17 - 2**9 - 2, {}, True),
        (2**17 - 2**9, {}, False),  # programs of a KV head up to 2**16
        (16, dict(rows=64, columns=2**20), True),
        (8, dict(rows=64, columns=2**20), False),  # a share of 2**30 blocks
        (64, dict(rows=65), False),  # more than 4096 tiles
    ],
)
def test_tiles_are_cut_only_where_the_packed_counts_of_a_program_fit(aim, sizes, fits):
    config = TailConfig(queries=16, tokens=16, warps=4, stages=2, aim=aim)
    assert split(config, **dict(tokens=64, group=16) | sizes) is fits


@pytest.mark.parametrize(
    "rows, filled, group, columns, sets",
    [
        (16, 4, 64, 512, 8),
        (16, 16, 64, 512, 2),
        (16, 132, 64, 512, 1),
        (16, 0, 64, 512, 8),  # a plan without parts
        (16, 4, 128, 512, 4),  # two tiles of queries
        (16, 4, 64, 9, 3),  # of 64 tokens
    ],
)
def test_sets_of_tokens_are_two_programs_a_multiprocessor_and_what_a_table_holds(
    rows, filled, group, columns, sets
):
    sizes = dict(rows=rows, group=group, columns=columns, dtype="bfloat16", kv_heads=8, dim=128)
    call = AttentionCall.of_sizes(**SIZES | sizes)
    card = Card(generation=90, processors=132)
    made, alone = Plan.of(call, card, filled=filled), Plan.of(call, card)
    assert alone.constants["SETS"] == 1 and alone.constants["SPLIT"]
    if sets == 1:
        assert made == alone
        return
    assert made.constants["SETS"] == sets and made.grid == rows * 8 * (group // 64) * sets
    assert not made.constants["SPLIT"] and made.counters == 0
    shapes = [shape for shape, _ in made.outputs]
    assert shapes[:2] == [(sets, *shape) for shape, _ in alone.outputs[:2]]
    assert shapes[2] == (1, 64, 128)  # nobody merges there


TILING = dict(tokens=64, warps=4, stages=2)


@pytest.mark.parametrize(
    "make, wrong, message",
    [
        (DecodeConfig, dict(tokens=48), "tokens must be a power of two, 16 or more.*tokens=48"),
        (DecodeConfig, dict(warps=3), "warps=3"),
        (DecodeConfig, dict(even=-1), "self.even=-1"),
        (DecodeConfig, dict(eighths=9), "self.eighths=9"),
        (TailConfig, dict(queries=8), "queries must be a power of two, 16 or more.*=8"),
        (TailConfig, dict(queries=16, registers=256), "self.registers=256"),
        (TailConfig, dict(queries=16, stages=0), "stages=0"),
    ],
)
def test_a_tiling_that_no_card_can_run_is_refused_by_name(make, wrong, message):
    with pytest.raises(ValueError, match=message):
        make(**TILING | wrong)
