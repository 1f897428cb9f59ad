"""Every config of the Triton kernel, compiled for cards that are not here: what it needs of them.

The configs are those that `choose_config` gives for a sweep of shapes, so a new row of its table
is on trial without being named here.
"""

import itertools
import re
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import pytest

from paged_decode.kernels.record import AttentionCall

from .compiled import CARDS, Hardware, launched, needs, recorded
from .interpret import INSTALLED

pytestmark = pytest.mark.skipif(not INSTALLED, reason="triton has no wheel for this platform")

ITEMSIZE = {"bfloat16": 2, "float16": 2, "float32": 4}


def sweep(card: Hardware, group: int) -> dict[str, dict]:
    """One call for every tiling that the library can choose on `card`, by a name."""
    if not INSTALLED:
        return {}
    from paged_decode.kernels.triton.config import DecodeConfig, choose_config

    found: dict[str, dict] = {}
    for rows, kv_heads, dim, columns, dtype, starts in itertools.product(
        (1, 16, 64, 300),
        (8, 7),
        (64, 128, 256),
        (32, 256, 2**13),
        ("bfloat16", "float32"),
        (True, False),  # the first one wins: nearly every tiling is compiled with `starts`
    ):
        call = dict(rows=rows, kv_heads=kv_heads, group=group, dim=dim, page_size=16)
        call |= dict(columns=columns, dtype=dtype, starts=starts)
        config = choose_config(AttentionCall.of_sizes(**call), card)
        assert isinstance(config, DecodeConfig)
        tile = (config.tokens, config.warps, config.stages)
        name = f"{dtype} D{dim} G{group} tile {'x'.join(map(str, tile))} merge {config.merge}"
        found.setdefault(name, call)
    return found


# What is known to be wrong, by the id of its test; strict, so whoever cures it takes the line away.
KNOWN: dict[str, str] = {
    "sm_80 float32 D256 G16 tile 16x4x2 merge 32": "8 bytes of spills at 128 registers",
}


@pytest.fixture(autouse=True)
def known(request):
    case = getattr(request.node, "callspec", None)
    if case is not None and case.id in KNOWN:
        request.applymarker(pytest.mark.xfail(reason=KNOWN[case.id], strict=True))


def cases(cards, groups):
    return [
        pytest.param(card, call, id=f"{card} {name}")
        for card in cards
        for group in groups
        for name, call in sweep(CARDS[card], group).items()
    ]


def check_needs(card_name: str, call: dict) -> None:
    """No spills, shared memory that exists, registers for the programs that are to be resident."""
    card = CARDS[card_name]
    launch = launched(card, **call)
    need = needs(launch, card)
    assert need.stack_bytes == 0
    assert need.shared_bytes <= card.block_bytes
    aim = -(-launch.config.least // card.processors)
    fits = card.processor_bytes // max(need.shared_bytes, 1)
    threads = launch.warps * card.threads
    registers = -(-need.registers // 8) * 8  # they are given out in eights
    if card.backend == "cuda":
        assert aim <= fits and registers * threads * aim <= card.registers
        check_loads(need.listing, launch, call)


def check_loads(listing: str, launch, call: dict) -> None:
    """K and V come as asynchronous copies of 16 bytes, for each buffer and once in the loop."""
    dim = 1 << (call["dim"] - 1).bit_length()
    tile_bytes = 2 * launch.config.tokens * dim * ITEMSIZE[call["dtype"]]
    copies = tile_bytes // (16 * 32 * launch.warps) * launch.stages
    wide = re.findall(r"cp\.async\.c[ag]\.shared\.global \[[^]]*\], \[[^]]*\], 0x10", listing)
    assert len(wide) >= copies
    # The newest token is one row of each, which is a number for each thread.
    narrow = re.findall(r"ld\.global\S*\.[bu]16\b", listing)
    assert len(narrow) <= (2 if call.get("append") else 0)


@pytest.mark.parametrize("card,call", cases(["sm_90", "gfx942"], [4]))
def test_every_config_fits_its_card_without_spills(card, call):
    check_needs(card, call)


@pytest.mark.long
@pytest.mark.parametrize("card,call", cases(["sm_80", "sm_89", "sm_100"], [4]))
def test_every_config_fits_the_other_cards_without_spills(card, call):
    check_needs(card, call)


@pytest.mark.long
@pytest.mark.parametrize(
    "card,call",
    cases(["sm_80", "sm_89", "sm_90", "sm_100", "gfx942"], [1, 16]),
)
def test_every_config_fits_its_card_with_other_groups(card, call):
    check_needs(card, call)


BASE = dict(rows=64, kv_heads=8, group=4, dim=128, page_size=16, columns=256, dtype="bfloat16")


@pytest.mark.long
@pytest.mark.parametrize("card", ["sm_80", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize(
    "other",
    [
        dict(dim=80), dict(dim=96), dict(dtype="float16"), dict(page_size=1, columns=4096),
        dict(page_size=256, columns=16),
        dict(window=100), dict(soft_cap=30.0), dict(window=100, soft_cap=30.0, rows=1),
        dict(append=True), dict(append=True, rows=16, columns=64),
    ],
    ids=str,
)  # fmt: skip
def test_no_option_costs_spills_or_wide_loads(card, other):
    check_needs(card, BASE | other)


@pytest.mark.parametrize(
    ("card", "dtype"),
    [
        ("sm_90", "int8"),
        ("sm_90", "float8_e4m3fn"),
        *(
            pytest.param(card, dtype, marks=pytest.mark.long)
            for card, dtype in [
                ("sm_80", "int8"), ("sm_89", "int8"), ("sm_89", "float8_e4m3fn"),
                ("sm_100", "int8"), ("sm_100", "float8_e4m3fn"),
            ]
        ),
    ],
)  # fmt: skip
def test_pages_of_8_bits_spill_nothing_where_one_token_is_new(card, dtype):
    launch = launched(CARDS[card], append=True, **BASE | dict(dtype=dtype))
    need = needs(launch, CARDS[card])
    assert need.stack_bytes == 0 and need.shared_bytes <= CARDS[card].block_bytes
    # Single bytes would come out of shared memory one by one.
    assert "ld.shared.b8" not in need.listing and "ld.shared.u8" not in need.listing


@pytest.mark.parametrize("tokens", [1, 3])
def test_pages_of_8_bits_compile_for_the_smallest_heads(tokens):
    call = BASE | dict(dtype="int8", dim=16, rows=2, columns=4, tokens=tokens)
    assert needs(launched(CARDS["sm_90"], **call), CARDS["sm_90"]).stack_bytes <= 192


# One call for every tiling of T > 1; what a card without a table gets comes with the last three.
TAILS = {
    f"{dtype} D{dim} T={tokens}": dict(
        rows=rows, kv_heads=8, group=4, dim=dim, page_size=16, columns=256, dtype=dtype,
        tokens=tokens,
    )
    for dtype, dim, rows, tokens in [
        *itertools.product(["bfloat16"], [64, 128, 256], [16], [2, 8, 16, 512]),
        ("bfloat16", 128, 1, 512), ("float32", 128, 4, 8),
    ]
}  # fmt: skip
TAILS["bfloat16 D128 T=1 G=64"] = TAILS["bfloat16 D128 T=2"] | dict(tokens=1, group=64)
TAILS["bfloat16 D128, a part of 64"] = TAILS["bfloat16 D128 T=1 G=64"] | dict(filled=4)


def check_tail(card_name: str, call: dict) -> None:
    card = CARDS[card_name]
    launch = launched(card, **call)
    need = needs(launch, card)
    # A limit of registers is worth a few that spill: a second program on the multiprocessor.
    assert need.stack_bytes <= 192
    assert need.shared_bytes <= card.block_bytes
    if launch.config.registers and card.backend == "cuda":
        assert need.registers <= launch.config.registers
        assert 2 * need.shared_bytes <= card.processor_bytes


@pytest.mark.long
@pytest.mark.parametrize("name", ["bfloat16 D64 T=8", "bfloat16 D128 T=2", "bfloat16 D128 T=8"])
@pytest.mark.parametrize("card", ["sm_80", "sm_90", "sm_100"])
def test_a_tiling_of_drafts_fits_its_card_with_trees_in_windows_too(card, name):
    check_tail(card, TAILS[name] | dict(query_lens=True, tail_mask=True, window=100))


@pytest.mark.parametrize(
    "name", ["bfloat16 D128 T=8", "bfloat16 D128 T=512", "bfloat16 D128, a part of 64"]
)
def test_a_tiling_of_several_queries_fits_its_card(name):
    check_tail("sm_90", TAILS[name])


@pytest.mark.parametrize("card", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize("group, dim", [(4, 128), (32, 256)])
def test_a_join_of_as_many_sets_as_there_are_fits_every_card(card, group, dim):
    from paged_decode.kernels.triton import join
    from paged_decode.kernels.triton.plan import MOST_SETS

    def shape(*sizes: int, dtype: str = "bfloat16") -> Any:
        return jax.ShapeDtypeStruct(sizes, dtype)

    many, heads = 8 * 64, 8 * group
    parts = shape(MOST_SETS, 16, 1, many, dim), shape(MOST_SETS, 16, 1, many, dtype="float32")
    tails = shape(64, 1, heads, dim), shape(64, 1, heads, dtype="float32")
    own = shape(64, dtype="int32"), tails, shape(heads, dtype="float32")
    need = needs(recorded(partial(join.join, kv_heads=8), *parts, *own), CARDS[card])
    assert need.stack_bytes == 0


@pytest.mark.long
@pytest.mark.parametrize("name", TAILS)
@pytest.mark.parametrize("card", ["sm_80", "sm_89", "sm_90", "sm_100", "gfx942"])
def test_every_tiling_of_several_queries_fits_every_card(card, name):
    check_tail(card, TAILS[name])


def test_a_sweep_meets_every_row_of_the_table():
    from paged_decode.kernels.triton import config

    tiles = {
        (launch.config.tokens, launch.config.warps, launch.config.stages)
        for call in sweep(CARDS["sm_90"], 4).values()
        for launch in [launched(CARDS["sm_90"], **call)]
    }
    rows = config._DECODE.tilings.values()
    assert {(row.tokens, row.warps, row.stages) for row in rows} <= tiles


def test_a_tile_that_is_too_large_is_caught():
    card = CARDS["sm_90"]
    launch = launched(card, **BASE)
    squeezed = replace(launch, warps=1)
    assert needs(squeezed, card).stack_bytes > 0
