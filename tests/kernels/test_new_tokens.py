"""Which of the T new tokens of a row are its own, and which of those each of them sees."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from .oracle import LSE_TOLERANCE, NAMES, TOLERANCE, Case, Inputs, build, check, expected, same_bits
from .oracle import seen as seen_by

pytestmark = pytest.mark.parametrize("backend", NAMES)

LENS, OWN = (0, 3, 9, 16, 5, 14), (0, 2, 3, 5, 0, 4)

CASES = {
    "own queries": dict(query_lens=OWN),
    "own queries in a window": dict(
        query_lens=OWN, starts=(0, 1, 2, 13, 0, 0), options=dict(sliding_window=4)
    ),
    "a mask": dict(tail_mask=0.5),
    "a mask in a window": dict(tail_mask=0.7, options=dict(sliding_window=3)),
    "all at once": dict(
        query_lens=OWN, tail_mask=0.6, starts=(0, 0, 3, 2, 5, 11), sinks=(6, 2),
        options=dict(scale=0.7, sliding_window=5, soft_cap=1.5),
    ),
}  # fmt: skip
ONE = {
    "own query": dict(query_lens=(0, 1, 1, 0, 1, 1)),
    "a mask": dict(tail_mask=0.5, options=dict(sliding_window=3)),
}


@pytest.mark.parametrize("name", CASES)
def test_own_queries_and_masks_match_the_oracle(backend, name):
    check(backend, Case(LENS, tokens=5, **CASES[name]))


@pytest.mark.parametrize("name", ONE)
def test_with_one_query_a_row_they_say_the_same(backend, name):
    check(backend, Case(LENS, **ONE[name]))


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.long)])
def test_several_tiles_with_padding_in_front_match_the_oracle(backend, dtype):
    own, tails = (30, 7, 0, 33), dict(tokens=33, dtype=dtype, sinks=(8, 1))
    check(backend, Case((60, 20, 41, 64), 2, 4, 64, 8, 8, query_lens=own, **tails))
    mask = dict(tail_mask=0.4, options=dict(sliding_window=20))
    check(backend, Case((60, 20, 41, 64), 2, 4, 64, 8, 8, query_lens=own, **tails, **mask))


@pytest.mark.parametrize("name", CASES)
def test_poison_in_what_no_query_sees_changes_no_bit(backend, name):
    case = Case(LENS, tokens=5, **CASES[name])
    clean = build(case).call(backend)
    for fill in (np.nan, np.inf):
        inputs = build(case, fill=fill)
        starts, lens = inputs.options.get("starts", np.zeros(len(LENS), int)), [5] * len(LENS)
        for row, length in enumerate(LENS):
            seen = {int(i) for t in range(5) for i in seen_by(inputs, row, t)}
            inputs.poison(row, set(range(length)) - {i for i in seen if i >= starts[row]}, fill)
            inputs.q[row, : 5 - min(inputs.options.get("query_lens", lens)[row], length)] = fill
        same_bits(inputs.call(backend), clean)


# A tree of drafts over a prefix of 6 tokens, as the parent of each node.
#
#   prefix - 0 - 1 - 3        the branches 0 1 3, 0 1 4, 0 2 5 6 share what they share
#             \    \ 4
#              2 - 5 - 6
PREFIX, PARENTS = 6, (-1, 0, 0, 1, 1, 2, 5)


def path(node: int) -> list[int]:
    return [] if node < 0 else [*path(PARENTS[node]), node]


@pytest.mark.parametrize("own", [7, 5], ids=["whole", "padded"])
@pytest.mark.parametrize("window", [None, 4, 3])
def test_a_branch_of_a_tree_is_the_branch_alone(backend, window, own):
    nodes, pad = range(own), 7 - own  # a smaller tree has padding in front
    mask = np.zeros((1, 7, 7), bool)
    for node in nodes:
        mask[0, pad + node, [pad + u for u in path(node)]] = True
    options = {} if window is None else dict(sliding_window=window)
    case = Case((PREFIX + own,), tokens=7, tail_mask=mask, query_lens=(own,), options=options)
    inputs = build(case)
    out, lse = inputs.call(backend)
    for leaf in set(nodes) - {PARENTS[node] for node in nodes}:
        branch = path(leaf)
        places = [*range(PREFIX), *(PREFIX + node for node in branch)]
        want, want_lse = expected(row_of(inputs, places, [pad + node for node in branch], options))
        got = [pad + node for node in branch]
        np.testing.assert_allclose(out[:, got], want, *TOLERANCE["float32"])
        np.testing.assert_allclose(lse[:, got], want_lse, *LSE_TOLERANCE)


def row_of(inputs: Inputs, places: list[int], queries: list[int], options: dict) -> Inputs:
    """A plain row of some tokens and queries of the only row of `inputs`, on pages of one token."""
    pages = []
    for pool in (inputs.k_pages, inputs.v_pages):
        tokens = pool[inputs.page_table[0]].swapaxes(1, 2).reshape(-1, *pool.shape[1::2])
        pages.append(tokens[places][:, :, None])
    table, length = np.arange(len(places))[None], np.array([len(places)])
    return Inputs(inputs.q[:, queries], *pages, table, length, options)


def test_padding_gives_zeros_in_a_broken_row_too(backend):
    inputs = build(Case((16, 16, 9), 2, 8, tokens=5, query_lens=(2, 0, 5)))
    inputs.page_table[:2, 1] = len(inputs.k_pages)
    call = jax.jit(lambda table: replace(inputs, page_table=table).call_traced(backend))
    out, lse = map(np.asarray, call(jnp.asarray(inputs.page_table)))
    padding = np.array([[1, 1, 1, 0, 0], [1] * 5, [0] * 5], bool)
    assert (out[padding] == 0).all() and (lse[padding] == -np.inf).all()
    assert np.isnan(out[0, 3:]).all() and np.isfinite(out[2]).all()


def test_they_may_be_mapped_over_and_traced(backend):
    case = Case((9, 16, 5), tokens=4, query_lens=(4, 1, 3), tail_mask=0.5)
    inputs = build(case)
    own, mask = inputs.options.pop("query_lens"), inputs.options.pop("tail_mask")

    def call(own, mask):
        options = inputs.options | dict(query_lens=own, tail_mask=mask)
        return replace(inputs, options=options).call_traced(backend)

    out, lse = jax.vmap(call)(jnp.stack([own, own * 0 + 9]), jnp.stack([mask, mask | True]))
    plain = build(replace(case, query_lens=None, tail_mask=None))
    for got, want in (((out[0], lse[0]), build(case)), ((out[1], lse[1]), plain)):
        for a, b in zip(got, expected(want), strict=True):
            np.testing.assert_allclose(a, b, *LSE_TOLERANCE)
