"""One suite for every backend: values, masks, and what must not change a bit."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from .oracle import NAMES, Case, attend, build, check, expected, same_bits

pytestmark = pytest.mark.parametrize("backend", NAMES)


def more(*values) -> object:
    """Values of parameters for CI alone."""
    return pytest.param(*values, marks=pytest.mark.long)


def edges(page_size: int, columns: int) -> tuple[int, ...]:
    """Lengths where things break: 0, 1, one around a page, the whole table."""
    capacity = page_size * columns
    return (0, 1, max(page_size - 1, 1), page_size, min(page_size + 1, capacity), capacity)


# group, kv_heads, head_dim, page_size, columns, dtype: every value of each axis appears.
SHAPES = [
    (1, 3, 64, 1, 9, "float32"),
    (3, 3, 80, 2, 5, "float32"),
    (4, 2, 96, 4, 5, "float32"),
    (5, 1, 128, 8, 5, "float32"),
    (7, 2, 64, 16, 5, "float32"),
    (8, 1, 256, 32, 3, "float32"),
    (16, 1, 64, 64, 3, "float32"),
    (3, 2, 64, 128, 3, "float32"),
    (1, 2, 64, 256, 2, "float32"),
    (3, 3, 64, 16, 9, "bfloat16"),
    (1, 2, 256, 8, 5, "bfloat16"),
    (7, 1, 80, 32, 3, "bfloat16"),
    (4, 2, 128, 16, 9, "float16"),
    (5, 2, 96, 2, 5, "float16"),
    (16, 1, 64, 1, 9, "float16"),
]


FOR_CI = SHAPES[0], SHAPES[9], SHAPES[12], SHAPES[13]  # the others have every value, too


@pytest.mark.parametrize(
    "group,kv_heads,dim,page_size,columns,dtype",
    [more(*each) if each in FOR_CI else each for each in SHAPES],
)
def test_every_shape_and_edge_length_matches_the_oracle(
    backend, group, kv_heads, dim, page_size, columns, dtype
):
    check(
        backend,
        Case(edges(page_size, columns), kv_heads, group, dim, page_size, columns, dtype=dtype),
    )


OPTIONS = {
    "plain": {},
    "scale": dict(options=dict(scale=0.7)),
    "window of 1 token": dict(options=dict(sliding_window=1)),
    "window of 5 tokens": dict(options=dict(sliding_window=5)),
    "window pair": dict(options=dict(sliding_window=(4, 3))),
    "window wider than the table": dict(options=dict(sliding_window=2**31 - 1)),
    "soft cap": dict(options=dict(soft_cap=1.5)),
    "starts": dict(starts=(0, 1, 2, 0, 5, 9)),
    "starts past the end": dict(starts=(3, 1, 3, 0, 16, 2**31 - 1)),
    "sinks of all heads": dict(sinks=(3,)),
    "sinks of a KV head": dict(sinks=(2, 4)),
    "sinks of a query head": dict(sinks=(6, 1)),
    "all at once": dict(
        options=dict(scale=0.7, sliding_window=6, soft_cap=1.5),
        starts=(0, 0, 1, 2, 3, 11),
        sinks=(6, 2),
    ),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_matches_the_oracle(backend, name):
    check(backend, Case(edges(4, 4), **OPTIONS[name]))


@pytest.mark.parametrize("name", ["all at once", *(more(n) for n in OPTIONS if n != "all at once")])
def test_every_option_of_several_queries_matches_the_oracle(backend, name):
    check(backend, Case(edges(4, 4), tokens=5, **OPTIONS[name]))


def test_a_window_counts_tokens_and_a_pair_counts_one_more(backend):
    lens = (16, 9, 3, 1, 0, 7)
    by_count = build(Case(lens, options=dict(sliding_window=5))).call(backend)
    by_pair = build(Case(lens, options=dict(sliding_window=(4, 0)))).call(backend)
    same_bits(by_count, by_pair)


def test_one_query_with_a_token_axis_is_the_same_query(backend):
    inputs = build(Case((16, 9, 0)))
    out, lse = inputs.call(backend)
    inputs.q = inputs.q[:, None]
    same_bits(inputs.call(backend), (out[:, None], lse[:, None]))


def test_long_rows_cross_many_chunks(backend):
    check(backend, Case((1500, 3, 700), 1, 3, 64, 16, 96, starts=(0, 1, 333)))


def test_a_chunk_of_prompt_attends_causally_to_a_cached_prefix(backend):
    check(backend, Case((40, 77, 32, 5), 2, 2, 64, 16, 6, tokens=32))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_pages_may_be_narrower_than_the_queries(backend, dtype):
    inputs = build(Case(edges(4, 4), dtype=dtype))
    inputs.q = inputs.q.astype(np.float32)
    out, _ = inputs.call(backend)
    assert out.dtype == np.float32
    np.testing.assert_allclose(out, expected(inputs)[0], rtol=2e-5, atol=4e-6)


# --- what must not change a bit ---------------------------------------------------------------

POISONED = [
    Case((0, 1, 3, 4, 5, 16)),
    Case((0, 1, 3, 4, 5, 16), tokens=5),
    Case(
        (0, 1, 6, 4, 5, 16),
        starts=(0, 0, 2, 3, 1, 6),
        sinks=(6, 1),
        options=dict(sliding_window=7, soft_cap=2.0),
    ),
    Case((0, 1, 3, 4, 5, 16), dtype="bfloat16"),
]


@pytest.mark.parametrize("case", POISONED, ids=["plain", "T=5", "options", "bfloat16"])
def test_poison_in_unused_slots_free_pages_and_the_null_page_changes_no_bit(backend, case):
    clean = build(case).call(backend)
    for fill in (np.nan, np.inf, -np.inf, 1e30):
        same_bits(build(case, fill=fill).call(backend), clean)


UNSEEN = {
    "starts": dict(starts=(5, 3, 13)),
    "a window": dict(options=dict(sliding_window=3)),
    "both": dict(starts=(2, 12, 0), options=dict(sliding_window=6)),
}


@pytest.mark.parametrize("tokens", [None, 3], ids=["one query", "T=3"])
@pytest.mark.parametrize("name", UNSEEN)
def test_poison_in_front_of_what_is_seen_changes_no_bit(backend, name, tokens):
    inputs = build(Case((9, 14, 16), tokens=tokens, **UNSEEN[name]))
    clean = inputs.call(backend)
    window = inputs.options.get("sliding_window", 16)
    for fill in (np.nan, np.inf, 1e30):
        for row, start in enumerate(inputs.options.get("starts", (0, 0, 0))):
            first = max(start, inputs.seq_lens[row] - (tokens or 1) - window + 1)
            inputs.poison(row, range(first), fill)
        same_bits(inputs.call(backend), clean)


def test_table_entries_past_a_rows_last_page_are_never_read(backend):
    inputs = build(Case((0, 1, 3, 4, 5, 12)), fill=np.nan)
    clean = inputs.call(backend)
    of_another_row = int(inputs.page_table[-1, 0])
    unused = np.arange(4) * 4 >= inputs.seq_lens[:, None]
    for garbage in (-1, len(inputs.k_pages), 2**31 - 1, -(2**31), of_another_row):
        inputs.page_table[unused] = garbage
        same_bits(inputs.call(backend), clean)


def test_the_ids_of_the_pages_change_no_bit(backend):
    case = Case((0, 1, 3, 4, 5, 16), tokens=2, options=dict(sliding_window=6))
    same_bits(build(case, order=1).call(backend), build(case, order=2).call(backend))


def test_the_same_call_gives_the_same_bits(backend):
    inputs = build(Case((7, 16, 2), tokens=3))
    same_bits(inputs.call(backend), inputs.call(backend))


def test_a_row_does_not_depend_on_its_neighbours_data(backend):
    inputs = build(Case((7, 16, 2)))
    out, lse = inputs.call(backend)
    inputs.k_pages[inputs.page_table[1]] = 9.0
    inputs.q[1] = 5.0
    other, other_lse = inputs.call(backend)
    same_bits((other[[0, 2]], other_lse[[0, 2]]), (out[[0, 2]], lse[[0, 2]]))


def test_wide_integers_say_the_same_as_int32(backend):
    inputs = build(Case((7, 16, 2), starts=(1, 2, 0)))
    narrow = inputs.call(backend)
    inputs.page_table = inputs.page_table.astype(np.int64)
    inputs.seq_lens = inputs.seq_lens.astype(np.int64)
    inputs.options["starts"] = inputs.options["starts"].astype(np.int64)
    same_bits(inputs.call(backend), narrow)


# --- empty things -----------------------------------------------------------------------------


@pytest.mark.parametrize("sinks", [None, (2,)], ids=["no sinks", "sinks"])
def test_a_query_that_sees_nothing_gives_zeros_and_minus_infinity(backend, sinks):
    out, lse = build(Case((0, 0, 2), tokens=4, sinks=sinks), fill=np.nan).call(backend)
    assert (out[:2] == 0).all() and (lse[:2] == -np.inf).all()
    assert (out[2, :2] == 0).all() and (lse[2, :2] == -np.inf).all()
    assert (out[2, 2:] != 0).all() and np.isfinite(lse[2, 2:]).all()


def test_a_batch_of_no_rows_gives_no_rows(backend):
    pages, table = jnp.zeros((2, 2, 4, 8)), np.zeros((0, 3), np.int32)
    out, lse = attend(backend, jnp.zeros((0, 4, 8)), pages, pages, table, np.zeros(0, np.int32))
    assert out.shape == (0, 4, 8) and lse.shape == (0, 4)


def test_huge_sinks_leave_nothing_and_sinks_of_minus_infinity_change_nothing(backend):
    inputs = build(Case((7, 16, 0)))
    plain = inputs.call(backend)
    inputs.options["sinks"] = np.full(1, -np.inf, np.float32)
    same_bits(inputs.call(backend), plain)
    inputs.options["sinks"] = np.full(1, 3e38, np.float32)
    out, lse = inputs.call(backend)
    assert (out == 0).all()
    same_bits(lse, plain[1])


# --- one stacked pool -------------------------------------------------------------------------


def test_a_layer_of_a_stack_is_the_pool_of_that_layer(backend):
    inputs = build(Case((7, 16, 2)), fill=np.nan)
    alone = inputs.call(backend)
    for name in ("k_pages", "v_pages"):
        pages = getattr(inputs, name)
        setattr(inputs, name, np.stack([pages * np.nan, pages, pages * np.nan]))
    for layer in (1, np.array(1, np.int32), np.array(1, np.int64)):
        inputs.options["layer"] = layer
        same_bits(inputs.call(backend), alone)


# --- cases of EasyDeL and ejkernel, with their tables and at their tightest tolerance -----------


@pytest.mark.parametrize(
    "page_size,options",
    [
        more(16, {}),
        more(32, dict(sliding_window=(128, 0))),
        more(16, dict(sliding_window=(256, 64))),
        more(32, dict(soft_cap=10.0)),
        (16, dict(sliding_window=(128, 64), soft_cap=20.0)),
    ],
    ids=["plain", "window", "wide window", "cap", "window and cap"],
)
def test_easydel_ragged_decode(backend, page_size, options):
    case = Case((350, 320), 2, 8, 64, page_size, 384 // page_size, starts=(0, 50), options=options)
    check(backend, case, (1e-4, 1e-5))


@pytest.mark.parametrize(
    "sinks,options",
    [
        ((4, 3), dict(sliding_window=(128, 16), soft_cap=25.0, scale=0.75)),
        more((3,), dict(scale=1.25)),
    ],
    ids=["per KV head", "shared"],
)
def test_easydel_sinks_with_more_tokens_than_a_block(backend, sinks, options):
    case = Case((200, 220), 4, 4, 64, 16, 16, starts=(10, 0), sinks=sinks, options=options)
    check(backend, case, (1e-4, 1e-5))


def test_easydel_a_length_that_is_no_multiple_of_anything(backend):
    check(backend, Case((407,), 4, 8, 64, 16, 26, starts=(5,)), (1e-4, 1e-5))


@pytest.mark.parametrize(
    "page_size,cap,lens",
    [more(1, 20.0, (3, 17, 23, 29)), more(8, 20.0, (3, 17, 23, 29)), (4, 3.0, (13, 7, 16, 0))],
)
def test_ejkernel_paged_decode_with_lse(backend, page_size, cap, lens):
    case = Case(lens, 2, 4, 64, page_size, 32 // page_size, options=dict(soft_cap=cap))
    check(backend, case)


@pytest.mark.parametrize(
    "table,lens,heads,kv_heads,options",
    [
        ([[7, 2, 9, 1], [5, 0, 8, 3]], [13, 7], 4, 2, {}),
        ([[3, 0, 4]], [10], 2, 1, dict(sliding_window=5, soft_cap=2.0)),
    ],
    ids=["two rows", "window and cap"],
)
def test_ejkernel_scrambled_tables_where_page_0_holds_data(
    backend, table, lens, heads, kv_heads, options
):
    inputs = build(Case(tuple(lens), kv_heads, heads // kv_heads, 64, 4, 4, dtype="float16"))
    rng = np.random.default_rng(1)
    pools = rng.standard_normal((2, 10, kv_heads, 4, 64)) * 0.1
    inputs.k_pages, inputs.v_pages = pools.astype(np.float16)
    inputs.page_table, inputs.options = np.array(table, np.int32), options
    out, _ = inputs.call(backend)
    np.testing.assert_allclose(out, expected(inputs)[0], rtol=2e-3, atol=1e-3)


def test_ejkernel_unified_decode(backend):
    case = Case((32, 33, 17, 48), 2, 4, 64, 16, 3, dtype="float16", sinks=(8, 1))
    case = replace(case, options=dict(sliding_window=32, soft_cap=20.0))
    check(backend, case)


@pytest.mark.parametrize("heads,kv_heads", [(8, 2), more(16, 4), more(32, 8)])
def test_ejkernel_tpu_shapes(backend, heads, kv_heads):
    case = Case((128, 300, 512), kv_heads, heads // kv_heads, 128, 128, 4, dtype="bfloat16")
    check(backend, case)


def test_where_their_backends_fail_window_cap_and_sinks_agree(backend):
    case = Case((300, 0, 77), 3, 6, 256, 16, 19, sinks=(3, 2), spare_pages=0)
    case = replace(case, options=dict(sliding_window=40, soft_cap=8.0))
    check(backend, case)
    check(backend, replace(case, lens=(16,), columns=1, kv_heads=8, sinks=(8, 1)))
