"""Writing the newest tokens and attending in one operation equals doing one after the other."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paged_decode.kernels import append_and_attend

from ..selection import for_ci
from .oracle import (
    COMPILED,
    LSE_TOLERANCE,
    NAMES,
    TOLERANCE,
    Case,
    Inputs,
    build,
    expected,
    same_bits,
)

pytestmark = pytest.mark.parametrize("backend", NAMES)

CASES = {
    "one token": Case((0, 1, 15, 16, 17, 48), 2, 3, 64, 16, 3),
    "one token, bfloat16": Case((33, 0, 1, 64), 2, 4, 128, 16, 4, dtype="bfloat16"),
    "pages of one token": Case((5, 0, 1), 3, 1, 64, 1, 6),
    "options": Case(
        (0, 1, 15, 16, 17, 48),
        2,
        3,
        64,
        16,
        3,
        starts=(0, 1, 2, 0, 5, 9),
        sinks=(2,),
        options=dict(sliding_window=7, soft_cap=1.5, scale=0.3),
    ),
    "starts past the end": Case((3, 1, 16), 1, 2, 64, 16, 2, starts=(3, 1, 0)),
    "ragged T": Case((0, 2, 3, 17, 48), 2, 3, 64, 16, 3, tokens=3, query_lens=(0, 1, 3, 2, 0)),
    "one token of some rows": Case((1, 15, 33), 2, 3, 64, 16, 3, query_lens=(1, 0, 1)),
    "a tree in a window": Case(
        (3, 20, 17),
        2,
        3,
        64,
        16,
        3,
        tokens=3,
        query_lens=(3, 2, 3),
        tail_mask=0.6,
        options=dict(sliding_window=4),
    ),
    "three tokens": Case((0, 2, 3, 17, 48), 2, 3, 64, 16, 3, tokens=3),
}


def take_newest(inputs: Inputs) -> tuple[np.ndarray, np.ndarray, Inputs]:
    """k and v of the newest tokens, and the inputs with NaN in their slots."""
    q, lens = inputs.q, inputs.seq_lens
    tokens = q.shape[1] if q.ndim == 4 else 1
    heads, size, dim = inputs.k_pages.shape[1:]
    new = [np.zeros((len(q), tokens, heads, dim), inputs.k_pages.dtype) for _ in range(2)]
    pages = [inputs.k_pages.copy(), inputs.v_pages.copy()]
    own = inputs.options.get("query_lens", lens * 0 + tokens)
    for row, t in np.ndindex(len(q), tokens):
        if t < tokens - own[row]:
            for n in new:
                n[row, t] = 7  # it is written nowhere
        elif (position := int(lens[row]) - tokens + t) >= 0:
            at = (inputs.page_table[row, position // size], slice(None), position % size)
            for n, p in zip(new, pages, strict=True):
                n[row, t] = p[at]
                p[at] = np.nan
    k, v = (n if q.ndim == 4 else n[:, 0] for n in new)
    return k, v, Inputs(q, *pages, inputs.page_table, lens, inputs.options)


def run(backend, k, v, inputs: Inputs, **more):
    """All tokens are new, unless `slots` or `query_lens` say more."""
    pages = (jnp.array(inputs.k_pages), jnp.array(inputs.v_pages))
    more = dict(slots=None if "query_lens" in inputs.options else "all") | more
    return append_and_attend(
        *pages,
        inputs.q,
        k,
        v,
        inputs.page_table,
        inputs.seq_lens,
        return_lse=True,
        implementation=backend,
        **inputs.options,
        **more,
    )


# Where others are like them, or the tests of attention alone have the same rows.
FOR_CI = ("pages of one token", "starts past the end", "one token of some rows", "three tokens")


@pytest.mark.parametrize("name", for_ci(CASES, FOR_CI))
def test_it_attends_to_what_it_writes_and_changes_no_other_slot(backend, name):
    whole = build(CASES[name])
    k, v, hollow = take_newest(whole)
    out, lse, k_pages, v_pages = run(backend, k, v, hollow)
    want, want_lse = expected(whole)
    rtol, atol = TOLERANCE[CASES[name].dtype]
    np.testing.assert_allclose(np.asarray(out, np.float64), want, rtol=rtol, atol=atol)
    np.testing.assert_allclose(lse, want_lse, *LSE_TOLERANCE)
    same_bits((k_pages, v_pages), (whole.k_pages, whole.v_pages))


@pytest.mark.parametrize(
    "name", [pytest.param("one token", marks=pytest.mark.long), "options", "three tokens"]
)
def test_a_token_with_its_slot_in_the_null_page_is_not_new(backend, name):
    whole = build(CASES[name])
    k, v, hollow = take_newest(whole)
    rows, tokens = len(k), k.shape[1] if k.ndim == 4 else 1
    slots = np.full((rows, tokens), 16, np.int32)  # anything outside the null page
    slots[::2] = np.arange(16)[: len(slots[::2]), None]
    pages = [np.array(p) for p in (hollow.k_pages, hollow.v_pages)]
    for row in range(0, rows, 2):  # what these rows attend to must be there already
        for page in whole.page_table[row, : -(-int(whole.seq_lens[row]) // 16)]:
            pages[0][page], pages[1][page] = whole.k_pages[page], whole.v_pages[page]
    k[::2], v[::2] = 7, 7
    slots = slots if k.ndim == 4 else slots[:, 0]
    start = replace(hollow, k_pages=pages[0], v_pages=pages[1])
    out, lse, k_pages, v_pages = run(backend, k, v, start, slots=slots)
    want, want_lse = expected(whole)
    rtol, atol = TOLERANCE[CASES[name].dtype]
    np.testing.assert_allclose(np.asarray(out, np.float64), want, rtol=rtol, atol=atol)
    np.testing.assert_allclose(lse, want_lse, *LSE_TOLERANCE)
    same_bits((k_pages, v_pages), (whole.k_pages, whole.v_pages))


def test_one_layer_of_a_stacked_pool_is_written(backend):
    whole = build(CASES["one token"])
    k, v, hollow = take_newest(whole)
    stacked = Inputs(
        hollow.q,
        *(np.stack([p * 0, p, p * 0]) for p in (hollow.k_pages, hollow.v_pages)),
        *(hollow.page_table, hollow.seq_lens, hollow.options),
    )
    one = run(backend, k, v, hollow)
    many = run(backend, k, v, stacked, layer=1)
    same_bits(many[:2], one[:2])
    same_bits([p[1] for p in many[2:]], one[2:])
    same_bits([p[::2] for p in many[2:]], [p[::2] for p in (stacked.k_pages, stacked.v_pages)])


def test_a_row_that_breaks_the_contract_is_nan_and_writes_nothing(backend):
    whole = build(CASES["one token"])
    k, v, hollow = take_newest(whole)
    table, lens = hollow.page_table.copy(), hollow.seq_lens.copy()
    table[2, 0], table[4, 1], lens[5] = -1, len(hollow.k_pages), 49
    broken = Inputs(hollow.q, hollow.k_pages, hollow.v_pages, table, lens, hollow.options)
    # Traced values cannot be checked before.
    call = jax.jit(lambda t, n: run(backend, k, v, replace(broken, page_table=t, seq_lens=n)))
    out, _, k_pages, v_pages = call(table, lens)
    good = np.array([1, 3])
    assert np.isnan(np.asarray(out)[[2, 4, 5]]).all() and np.isfinite(np.asarray(out)[good]).all()
    left = np.isnan(np.asarray(k_pages)) != np.isnan(hollow.k_pages)
    written = {(int(p), int(s)) for p, _, s, _ in np.argwhere(left)}
    ends = [(int(table[row, (lens[row] - 1) // 16]), int(lens[row] - 1) % 16) for row in good]
    assert written == set(ends)
    assert np.isnan(np.asarray(v_pages)).sum() == np.isnan(np.asarray(k_pages)).sum()


@pytest.mark.parametrize("tokens", [None, 3], ids=["T=1", "T=3"])
def test_a_traced_layer_outside_the_pool_is_nan_and_writes_nothing(backend, tokens):
    whole = build(replace(CASES["one token"], tokens=tokens))
    k, v, hollow = take_newest(whole)
    stacked = Inputs(
        hollow.q,
        *(np.stack([np.nan_to_num(p)] * 2) for p in (hollow.k_pages, hollow.v_pages)),
        *(hollow.page_table, hollow.seq_lens, hollow.options),
    )
    with jax.enable_x64(True):
        call = jax.jit(lambda layer: run(backend, k, v, stacked, layer=layer))
        for layer in (-1, 2, 2**32 + 1):
            out, lse, *pages = call(np.int64(layer))
            assert np.isnan(out).all() and np.isnan(lse).all()
            same_bits(pages, (stacked.k_pages, stacked.v_pages))


def test_numbers_beyond_int32_write_nowhere(backend):
    whole = build(CASES["one token"])
    k, v, hollow = take_newest(whole)
    hollow = replace(
        hollow, **{n: np.nan_to_num(getattr(hollow, n)) for n in ("k_pages", "v_pages")}
    )
    table, lens = hollow.page_table.astype(np.int64), hollow.seq_lens.astype(np.int64)
    table[2] += 2**32
    lens[3] += 2**32
    lens[4], lens[5] = -(2**31), -(2**32) + 48
    with jax.enable_x64(True):
        call = jax.jit(lambda t, n: run(backend, k, v, replace(hollow, page_table=t, seq_lens=n)))
        out, _, *pages = call(table, lens)
    out = np.asarray(out)
    assert np.isnan(out[2:4]).all() and np.isfinite(out[:2]).all() and (out[4:] == 0).all()
    for got, old, new in zip(pages, (hollow.k_pages, hollow.v_pages), (k, v), strict=True):
        want = old.copy()
        want[hollow.page_table[1, 0], :, 0] = new[1]  # the only row that may write
        same_bits(got, want)


def test_several_tokens_without_slots_ask_which_of_them_are_new(unchecked, backend):
    whole = build(CASES["three tokens"])
    k, v, hollow = take_newest(whole)
    with pytest.raises(ValueError, match='slots must say which of the T = 3 tokens .* slots="all"'):
        run(backend, k, v, hollow, slots=None)
    with pytest.raises(ValueError, match='slots must be an array or "all"; got'):
        run(backend, k, v, hollow, slots="some")


def test_donated_pages_are_updated_in_place(backend):
    if backend not in COMPILED or backend == "reference":
        return  # it copies pages to read them
    whole = build(CASES["one token, bfloat16"])
    whole = replace(
        whole, **{n: getattr(whole, n).astype(np.float32) for n in ("q", "k_pages", "v_pages")}
    )
    k, v, hollow = take_newest(whole)
    pages = [np.tile(p, (200, 1, 1, 1)) for p in (hollow.k_pages, hollow.v_pages)]

    def step(kp, vp):
        out, kp, vp = append_and_attend(
            kp, vp, hollow.q, k, v, hollow.page_table, hollow.seq_lens, implementation=backend
        )
        return kp, vp, out

    memory = jax.jit(step, donate_argnums=(0, 1)).lower(*pages).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= 2 * pages[0].nbytes
    assert memory.temp_size_in_bytes < pages[0].nbytes / 4


def test_new_tokens_of_the_wrong_shape_are_refused(unchecked, backend):
    whole = build(CASES["one token"])
    k, v, hollow = take_newest(whole)
    with pytest.raises(ValueError, match="k must be \\[B, Hk, D\\]"):
        run(backend, k[:, :1], v, hollow)
    with pytest.raises(ValueError, match="v must be \\[B, Hk, D\\]"):
        run(backend, k, v[:-1], hollow)
    with pytest.raises(ValueError, match="slots must be \\[B\\]"):
        run(backend, k, v, hollow, slots=np.zeros((len(k), 1), np.int32))
