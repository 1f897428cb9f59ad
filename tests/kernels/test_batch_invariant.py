"""Bits of a row that follow from nothing but the row and the shapes of the call."""

from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from paged_decode.kernels import append_and_attend, paged_attention
from paged_decode.kernels.cards import Card
from paged_decode.kernels.pallas_gpu.call import shape_refusal
from paged_decode.kernels.record import AttentionCall
from paged_decode.kernels.triton.config import SPLIT_TOKENS, DecodeConfig, choose_config
from paged_decode.kernels.triton.plan import Plan

from .oracle import NAMES, Case, Inputs, build, check, same_bits
from .triton.interpret import INSTALLED
from .triton.interpret import NAME as INTERPRETED

needs_triton = pytest.mark.skipif(not INSTALLED, reason="triton has no wheel for this platform")
SPLIT = f"{INTERPRETED}-split"  # whose tiles cut even these rows into several programs
every_backend = pytest.mark.parametrize(
    "backend", [*NAMES, pytest.param(SPLIT, marks=needs_triton)]
)
ALONE: dict[str, Any] = dict(batch_invariant=True)
LENS = (70, 3, 33, 0, 128, 64, 17, 1)
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "options": dict(
        starts=(0, 1, 9, 0, 40, 3, 0, 0), sinks=(6, 2),
        options=dict(sliding_window=50, soft_cap=1.5),
    ),
    "bfloat16": dict(dtype="bfloat16"),
}  # fmt: skip


def case_of(kind: str) -> Case:
    own = KINDS[kind]
    return replace(
        Case(LENS, columns=32, **{k: v for k, v in own.items() if k != "options"}),
        options=own.get("options", {}) | ALONE,
    )


def reordered(inputs: Inputs, order: np.ndarray) -> Inputs:
    rows = ("starts", "query_lens")
    options = {name: x[order] if name in rows else x for name, x in inputs.options.items()}
    return replace(
        inputs, q=inputs.q[order], page_table=inputs.page_table[order],
        seq_lens=inputs.seq_lens[order], options=options,
    )  # fmt: skip


@every_backend
@pytest.mark.parametrize(
    "kind", [pytest.param("plain", marks=pytest.mark.long), "options", "bfloat16"]
)
def test_a_row_has_the_same_bits_wherever_it_is_and_whoever_is_beside_it(backend, kind):
    inputs = build(case_of(kind))
    out, lse = inputs.call(backend)
    order = np.random.default_rng(0).permutation(8)
    moved, moved_lse = reordered(inputs, order).call(backend)
    same_bits((moved, moved_lse), (out[order], lse[order]))
    inputs.seq_lens = np.where(np.arange(8) == 0, inputs.seq_lens, 0).astype(np.int32)
    alone, alone_lse = inputs.call(backend)
    same_bits((alone[0], alone_lse[0]), (out[0], lse[0]))


@every_backend
def test_values_match_the_oracle(backend):
    check(backend, case_of("plain"))


@every_backend
def test_tokens_of_one_sequence_in_rows_of_their_own_have_the_bits_of_steps(backend):
    """A chunk of four tokens at once, one of two and two steps: all are written before one is
    read, and padding is written nowhere."""
    case = Case((21,), kv_heads=2, group=2, columns=8)
    start, rng = build(case), np.random.default_rng(1)
    q = rng.standard_normal((4, case.heads, case.dim)).astype(np.float32)
    k, v = rng.standard_normal((2, 4, case.kv_heads, case.dim)).astype(np.float32)

    def run(*parts: int):
        pools, found, done = [jnp.array(start.k_pages), jnp.array(start.v_pages)], [], 0
        for part in parts:
            at = slice(done, done + part)
            rows = [np.concatenate([x[at], np.zeros((4 - part, *x.shape[1:]), x.dtype)])
                    for x in (q, k, v)]  # fmt: skip
            lens = np.zeros(4, np.int32)
            lens[:part] = 18 + np.arange(done, done + part)
            table = start.page_table.repeat(4, axis=0)
            out, *pools = append_and_attend(
                *pools, *map(jnp.asarray, (*rows, table, lens)), implementation=backend, **ALONE
            )
            found.append(out[:part])
            done += part
        return np.concatenate(found), *pools

    whole = run(4)
    same_bits(run(1, 1, 1, 1), whole)
    same_bits(run(2, 2), whole)


@pytest.mark.parametrize("rows, capacity", [(1, 512), (64, 4096), (256, 32768), (300, 131072)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_programs_of_a_row_on_a_gpu_follow_from_its_own_tiles(rows, capacity, dtype):
    call = AttentionCall.of_sizes(
        rows=rows, kv_heads=8, group=4, dim=128, page_size=16, columns=capacity // 16,
        dtype=jnp.dtype(dtype), batch_invariant=True,
    )  # fmt: skip
    card = Card(generation=90, processors=132)
    config = choose_config(call, card)
    assert isinstance(config, DecodeConfig)
    plan = Plan.of(call, card)
    constants, full = plan.constants, -(-capacity // config.tokens)
    assert config.min_tiles * config.tokens == SPLIT_TOKENS and config.eighths == 4
    if not constants["SPLIT"]:
        return  # nothing is cut: that follows from shapes
    rng, parts = np.random.default_rng(0), {}
    for live in (1, rows // 2, rows):
        tiles = rng.integers(0, full + 1, max(live, 1))
        tiles[0] = full
        total = int(tiles.sum()) * call.kv_heads
        for aim in (constants["EVEN_ITEMS"], constants["RAGGED_ITEMS"]):
            # What work.py computes: no batch has so much work that a program gets more tiles.
            assert max(-(-total // aim), constants["MIN_TILES"]) == config.min_tiles
        assert constants["LEAST"] >= constants["EVEN_ITEMS"]
        for each in tiles:
            cuts = max((int(each) * 8 + 4 * config.min_tiles - 1) // (8 * config.min_tiles), 1)
            parts.setdefault(int(each), set()).add(cuts)
        places = sum(max((int(t) * 8 + 4 * config.min_tiles - 1) // (8 * config.min_tiles), 1)
                     for t in tiles) + rows - len(tiles)  # fmt: skip
        assert places * call.kv_heads <= plan.grid
    assert all(len(each) == 1 for each in parts.values())


def test_what_cannot_keep_it_is_refused_by_name():
    inputs = build(Case((9, 7), tokens=2, options=dict(ALONE)))
    with pytest.raises(NotImplementedError, match=r"batch_invariant serves one query a row, T = 1"):
        inputs.call("xla")
    inputs = build(Case((9, 7)))
    args = (inputs.q, inputs.k_pages, inputs.v_pages, inputs.page_table, inputs.seq_lens)
    one = paged_attention(*args, **ALONE)
    same_bits(
        paged_attention(*(a[:, None] if a is inputs.q else a for a in args), **ALONE)[:, 0], one
    )
    hopper = AttentionCall.of_sizes(
        rows=2, kv_heads=2, group=4, dim=128, page_size=16, columns=4, batch_invariant=True
    )
    assert "a row's bits follow from the others" in (shape_refusal(hopper) or "")


def test_it_is_a_bool(unchecked):
    inputs = build(Case((9, 7), options=dict(batch_invariant=1)))
    with pytest.raises(TypeError, match="batch_invariant must be a bool; got int"):
        inputs.call("xla")
