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
