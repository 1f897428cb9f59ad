"""Sampling on the device against its definition."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paged_decode import SamplingParams
from paged_decode.engine import sampling
from paged_decode.engine.params import Kind
from paged_decode.engine.sampling import Broken, SamplingRows, _kept, log_probability, sample

draw = jax.jit(sample)
kept = jax.jit(_kept)
LOGITS = np.random.default_rng(0).standard_normal(24).astype(np.float32) * 2


def histogram(params: SamplingParams, count: int = 4096) -> np.ndarray:
    rows = SamplingRows.create([params] * count, range(count), count)
    chosen = draw(jnp.asarray(np.tile(LOGITS, (count, 1))), rows)
    return np.bincount(np.asarray(chosen), minlength=24) / count


def allowed(params: SamplingParams) -> np.ndarray:
    """The definition, one token after the other."""
    logits = LOGITS.astype(np.float64) / params.temperature
    order = np.argsort(-logits)
    order = order[: params.top_k or None]
    p = np.exp(logits[order] - logits[order].max())
    p /= p.sum()
    left = order[: int(np.searchsorted(np.cumsum(p), params.top_p)) + 1]
    out = np.zeros(24)
    out[left] = np.exp(logits[left])
    return out / out.sum()


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.5, seed=3),
        SamplingParams(temperature=1.0, top_k=3),
        SamplingParams(temperature=1.3, top_p=0.6),
        SamplingParams(temperature=2.0, top_k=8, top_p=0.7, seed=2**32 - 1),
    ],
)
def test_frequencies_are_those_of_the_definition(params):
    want, got = allowed(params), histogram(params)
    assert not got[want == 0].any()
    np.testing.assert_allclose(got, want, atol=4 * np.sqrt(0.25 / 4096))


@pytest.mark.parametrize("params", [{}, {"top_k": 1}, {"top_p": 1e-6}], ids=str)
def test_no_freedom_means_greedy(params):
    temperature = 1.0 if params else 0.0
    assert histogram(SamplingParams(temperature=temperature, **params), 64)[LOGITS.argmax()] == 1


def test_a_row_does_not_depend_on_its_neighbours():
    hot = SamplingParams(temperature=1.0, seed=11)
    others = [SamplingParams(), SamplingParams(temperature=3.0, top_k=2), replace(hot, seed=5)]
    alone = draw(LOGITS[None], SamplingRows.create([hot], [7], 1))
    for place in range(4):
        batch = [*others[:place], hot, *others[place:]]
        rows = SamplingRows.create(batch, [7] * 4, 4)
        assert draw(np.tile(LOGITS, (4, 1)), rows)[place] == alone[0]


def test_of_equal_logits_top_p_keeps_the_smallest_set_and_top_k_all():
    """16 equal logits were kept by a top_p of 0.001."""
    equal = np.zeros(16, np.float32)
    lower = np.array([0, 2, 1, 2, 1, 1, 0, 1], np.float32)
    for logits, params, want in (
        (equal, dict(top_p=0.001), {0}),
        (equal, dict(top_p=0.25), set(range(4))),
        (equal, dict(top_p=0.26), set(range(5))),
        (equal, dict(top_k=4), set(range(16))),
        (equal, dict(top_k=4, top_p=0.5), set(range(8))),
        (equal, dict(top_p=1 - 2**-24), set(range(16))),
        (equal, dict(top_p=1e-300), {0}),
        (lower, dict(top_k=3), {1, 2, 3, 4, 5, 7}),
        (lower, dict(top_k=2, top_p=0.5), {1}),
        (lower, dict(top_k=3, top_p=0.6), {1, 2, 3}),
        (lower, dict(top_k=2**31 - 1, top_p=1e-6), {1}),
    ):
        many = [SamplingParams(temperature=1.0, seed=i, **params) for i in range(256)]
        rows = SamplingRows.create(many, [0] * 256, 256)
        assert {*np.asarray(draw(np.tile(logits, (256, 1)), rows)).tolist()} == want, params


def definition(logits: np.ndarray, heat: float, top_k: int, top_p: float) -> np.ndarray:
    """Bool `[V]` in float64: the k likeliest with their equals, then the smallest set of these."""
    order = np.argsort(-logits, kind="stable")
    if top_k:
        order = order[logits[order] >= logits[order][min(top_k, len(order)) - 1]]
    p = np.exp((logits[order] - logits.max()) / heat)
    short = np.cumsum(p) - p < top_p * p.sum() * (1 - 1e-6)
    left = np.zeros(len(logits), bool)
    left[order[short if top_p < 1 else slice(None)]] = True
    return left


def test_what_top_k_and_top_p_leave_is_the_definition():
    rng, count, width = np.random.default_rng(3), 400, 40
    logits = rng.integers(-6, 6, (count, width)).astype(np.float32) / 2
    logits[rng.random((count, width)) < 0.2] = -np.inf
    logits[:, 0] = -3
    params = [
        SamplingParams(
            temperature=float(2.0 ** rng.integers(-4, 5)),
            top_k=int(rng.integers(0, 12)),
            top_p=float(rng.choice([1.0, rng.random(), 1e-3, 0.999])),
        )
        for _ in range(count)
    ]
    rows = SamplingRows.create(params, [0] * count, count)
    got = kept(logits, logits.max(-1, keepdims=True), rows.temperature[:, None], rows)
    for row, p in enumerate(params):
        want = definition(logits[row].astype(np.float64), p.temperature, p.top_k, p.top_p)
        masked = np.isneginf(logits[row])  # kept or not: never drawn
        assert (np.asarray(got)[row] == want)[~masked].all(), p


def test_a_row_that_keeps_all_loses_nothing_beside_one_that_does_not():
    """The sum of 7,000 probabilities came to 1 before the last of them, which were cut off."""
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((4, 7000)).astype(np.float32) * 3
    hot = SamplingParams(temperature=1.0)
    rows = SamplingRows.create(
        [hot, hot, replace(hot, top_k=7000), replace(hot, top_k=3)], [0] * 4, 4
    )
    got = kept(logits, logits.max(-1, keepdims=True), rows.temperature[:, None], rows)
    assert got.sum(-1).tolist() == [7000, 7000, 7000, 3]


def test_a_row_depends_on_its_own_seed_index_logits_and_params_alone():
    rng, count = np.random.default_rng(5), 96
    logits = rng.standard_normal((count, 300)).astype(np.float32) * 3
    logits[rng.random((count, 300)) < 0.1] = -np.inf
    logits[7] = np.nan  # a broken neighbour
    params = [
        SamplingParams(
            temperature=float(rng.choice([0.0, 1e-300, 0.3, 1.0, 5.0, 1e38])),
            top_k=int(rng.choice([0, 0, 1, 5, 400])),
            top_p=float(rng.choice([1.0, 1.0, 0.1, 0.9, 1e-300])),
            seed=int(rng.integers(2**32)),
        )
        for _ in range(count)
    ]
    index = rng.integers(0, 1000, count).tolist()
    whole = np.asarray(draw(logits, SamplingRows.create(params, index, count)))
    for row in range(count):
        alone = SamplingRows.create([params[row]], [index[row]], 1)
        assert draw(logits[row : row + 1], alone)[0] == whole[row], params[row]


@pytest.mark.parametrize("width", [300, 128256])
def test_no_bit_of_a_log_probability_follows_from_the_order_of_a_sum(width):
    """XLA sums in another order in every program; here the numbers lie in another order."""
    rng = np.random.default_rng(6)
    logits = rng.standard_normal((1, width)).astype(np.float32) * 2
    orders = [np.arange(width), np.arange(width)[::-1]] + [rng.permutation(width) for _ in "12345"]
    numbers = jax.jit(log_probability)
    found = [
        np.array(numbers(logits[:, order], np.argmax(order == 7)[None].astype(np.int32)))
        for order in orders
    ]
    exact = np.log(np.exp(logits.astype(np.float64)).sum())
    assert {each.tobytes() for each in found} == {found[0].tobytes()}
    assert np.allclose(found[0][:, 0], [logits[0, 7] - exact, exact], rtol=0, atol=4e-6)


def test_a_nan_among_the_logits_is_a_nan_of_every_log_probability():
    logits = np.zeros((3, 32000), np.float32)
    logits[1, 5] = np.nan
    found = np.array(jax.jit(log_probability)(logits, np.zeros(3, np.int32)))
    np.testing.assert_array_equal(np.isnan(found), [[False, True, False]] * 2)


INF, MAX = np.inf, float(np.finfo(np.float32).max)
ROWS = {  # logits, and what may be drawn
    "ordinary": ([1.0, 3.0, 2.0, -INF], {0, 1, 2}),
    "two at the top": ([3.0, -INF, 3.0, 2.0], {0, 2, 3}),
    "masked but one": ([-INF, -INF, -1e-3, -INF], {2}),
    "far below zero": ([-INF, -1e38, -MAX, -3e38], {1, 2, 3}),
    "at both ends": ([MAX, -MAX, -INF, MAX], {0, 1, 3}),
    "one forced": ([1e38, INF, -INF, 0.0], {1}),
    "two forced": ([INF, 0.0, INF, -INF], {0, 2}),
    "tiny": ([1e-45, -INF, 1e-40, 0.0], {0, 2, 3}),
}
HEATS = (1e-300, 1e-45, 1e-40, 1e-38, 1e-5, 1.0, 1e5, 1e37, 3e38, 1e39, 1e308)
LIMITS = ({}, {"top_k": 2}, {"top_p": 0.9}, {"top_k": 3, "top_p": 1e-300}, {"top_k": 9})


@pytest.mark.parametrize("case", ROWS)
def test_no_temperature_draws_a_masked_id(case):
    """1e-40 was flushed to zero and 1e39 rounded to infinity: both drew what they must not."""
    logits, allowed = ROWS[case]
    params = [
        SamplingParams(temperature=heat, seed=seed, **limits)
        for heat in HEATS
        for limits in LIMITS
        for seed in range(8)
    ]
    rows = SamplingRows.create(params, [0] * len(params), len(params))
    got = np.asarray(draw(np.tile(np.float32(logits), (len(params), 1)), rows))
    for p, token in zip(params, got.tolist(), strict=True):
        assert token in allowed, p
        if p.temperature < 1e-30 and case != "tiny":
            assert logits[token] == max(logits), p


def test_the_smallest_temperature_is_greedy_and_the_largest_uniform():
    logits = np.tile(np.array([1.0, -INF, 3.0, 2.9], np.float32), (4096, 1))
    for heat, want in ((1e-300, [0, 0, 1, 0]), (5e-324, [0, 0, 1, 0]), (1e308, [1, 0, 1, 1])):
        params = [SamplingParams(temperature=heat, seed=i) for i in range(4096)]
        got = np.asarray(draw(logits, SamplingRows.create(params, [0] * 4096, 4096)))
        got = np.bincount(got, minlength=4) / 4096
        np.testing.assert_allclose(got, np.array(want) / sum(want), atol=0.03)
        assert got[1] == 0


@pytest.mark.parametrize(
    "heat, logits", [(3e38, [1e38, -INF, -3e38, 0.0]), (2e-38, [3e-38, -INF, 0.0, 1.5e-38])]
)
def test_frequencies_are_right_at_both_ends_of_float32(heat, logits):
    params = [SamplingParams(temperature=heat, seed=i) for i in range(4096)]
    rows = SamplingRows.create(params, [0] * 4096, 4096)
    got = np.asarray(draw(np.tile(np.float32(logits), (4096, 1)), rows))
    want = np.exp((np.array(logits) - max(logits)) / heat)
    got = np.bincount(got, minlength=4) / 4096
    np.testing.assert_allclose(got, want / want.sum(), atol=0.03)


def test_a_huge_temperature_does_not_change_whom_top_k_keeps():
    """Divided by 1e38 all logits of a model are equal."""
    params = [SamplingParams(temperature=1e38, top_k=2, seed=i) for i in range(256)]
    rows = SamplingRows.create(params, [0] * 256, 256)
    got = {*np.asarray(draw(np.tile(LOGITS, (256, 1)), rows)).tolist()}
    assert got == {*np.argsort(-LOGITS)[:2].tolist()}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16], ids=str)
def test_a_row_without_a_choice_is_told_and_disturbs_no_other(dtype):
    good = LOGITS[:8]
    broken = {
        "a NaN": [*good[:5], np.nan, *good[6:]],
        "NaN beside +inf": [INF, np.nan, *good[2:]],
        "nothing but NaN": [np.nan] * 8,
        "nothing but -inf": [-INF] * 8,
    }
    fine = [good, [INF, *good[1:]], [*[-INF] * 7, -1.0], [-INF, INF, INF, *good[3:]]]
    batch = np.array([r for pair in zip(broken.values(), fine, strict=True) for r in pair])
    params = [
        SamplingParams(temperature=heat, **limits, seed=3)
        for heat in (0.0, 1e-300, 1.0, 1e39)
        for limits in ({}, {"top_k": 2}, {"top_p": 0.5})
    ]
    logits = jnp.asarray(np.tile(batch, (len(params), 1)), jnp.float32).astype(dtype)
    each = [p for p in params for _ in batch]
    rows = SamplingRows.create(each, [0] * len(each), len(each))
    drawn = jax.jit(sampling.draw)(logits, rows)
    tokens, invalid = np.asarray(drawn.tokens), np.asarray(drawn.broken) == Broken.MODEL
    assert (np.asarray(drawn.broken)[~invalid] == Broken.NO).all()
    assert (invalid == np.tile([True, False], len(invalid) // 2)).all()
    assert ((tokens >= 0) & (tokens < logits.shape[1])).all()  # an id, whatever it means
    assert (tokens == np.asarray(draw(logits, rows))).all()
    alone = jnp.where(invalid[:, None], jnp.zeros((), dtype), logits)
    assert (tokens == np.asarray(draw(alone, rows)))[~invalid].all()


@pytest.mark.parametrize("params", [{}, {"temperature": 0.7}, {"top_k": 5, "top_p": 0.9}], ids=str)
def test_only_narrow_rows_sort(params):
    """Greedy batches pay for an argmax, hot ones for noise: sorting is behind two conditions."""
    rows = SamplingRows.create([SamplingParams(**params)] * 2, [0, 0], 2)
    text = str(jax.make_jaxpr(sample)(np.zeros((2, 8), np.float32), rows))
    assert text.count(" sort[") == 1 and text.index(" cond[") < text.index(" sort[")


@pytest.mark.parametrize("most", [Kind.GREEDY, Kind.WHOLE, Kind.NARROW])
def test_who_knows_the_kinds_of_its_rows_gets_the_same_without_a_condition(most):
    each = [SamplingParams(), SamplingParams(temperature=0.7)]
    each += [SamplingParams(temperature=1.5, top_k=3), SamplingParams(temperature=0.9, top_p=0.8)]
    params = [replace(p, seed=i) for i, p in enumerate(each * 3) if p.kind <= most]
    rows = SamplingRows.create(params, range(len(params)), len(params))
    numbers = np.random.default_rng(3).normal(size=(len(params), 50)).astype(np.float32)
    numbers[2, 7] = np.nan
    knowing, asking = (jax.jit(partial(sampling.draw, most=kind)) for kind in (most, None))
    told = str(jax.make_jaxpr(knowing)(numbers, rows))
    assert "cond[" not in told and (" sort[" in told) == (most == Kind.NARROW)
    got, want = knowing(numbers, rows), asking(numbers, rows)
    np.testing.assert_array_equal(got[0], want[0])
    assert np.flatnonzero(got[1]).tolist() == np.flatnonzero(want[1]).tolist() == [2]


@pytest.mark.parametrize(
    "field, value, error",
    [
        ("max_new_tokens", 0, ValueError),
        ("max_new_tokens", 1.0, TypeError),
        ("temperature", -0.1, ValueError),
        ("temperature", float("nan"), ValueError),
        ("temperature", float("inf"), ValueError),
        ("temperature", 10**400, ValueError),
        ("temperature", True, TypeError),
        ("temperature", np.True_, TypeError),
        ("temperature", "1", TypeError),
        ("temperature", None, TypeError),
        ("temperature", 1j, TypeError),
        ("temperature", np.array([1.0]), TypeError),
        ("top_k", -1, ValueError),
        ("top_p", 0.0, ValueError),
        ("top_p", 1.1, ValueError),
        ("top_p", float("nan"), ValueError),
        ("top_p", True, TypeError),
        ("top_p", "0.5", TypeError),
        ("top_k", True, TypeError),
        ("top_k", 2**31, ValueError),
        ("seed", 2**32, ValueError),
        ("seed", True, TypeError),
        ("stop_tokens", (-1,), ValueError),
        ("stop_tokens", (2**31,), ValueError),
        ("stop_tokens", (2.7,), TypeError),
        ("stop_tokens", (True,), TypeError),
        ("stop_tokens", ("1",), TypeError),
        ("stop_tokens", "12", TypeError),
        ("stop_tokens", b"12", TypeError),
        ("stop_tokens", 5, TypeError),
        ("stop_tokens", np.int64(5), TypeError),
        ("stop_tokens", np.array([2.0]), TypeError),
        ("stop_tokens", np.array([[5]]), TypeError),
        ("stop_tokens", None, TypeError),
    ],
)
def test_parameters_out_of_range_are_refused_by_name(unchecked, field, value, error):
    with pytest.raises(error, match=field):
        SamplingParams(**{field: value})


def test_numbers_of_every_kind_are_kept_as_pythons(unchecked):
    params = SamplingParams(
        max_new_tokens=np.int64(5),
        temperature=np.float32(0.5),
        top_k=np.uint8(3),
        top_p=1,
        seed=np.uint32(7),
        stop_tokens=np.array([1, 2], np.uint16),
    )
    assert params == SamplingParams(5, 0.5, 3, 1.0, 7, (1, 2))
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "seed", "stop_tokens")
    kinds = [type(getattr(params, name)) for name in names]
    assert kinds == [int, float, int, float, int, tuple]
    assert all(type(t) is int for t in params.stop_tokens)
    for stops in ([1, 2], {1, 2}, iter((1, 2)), jnp.array([1, 2]), range(1, 3)):
        assert SamplingParams(stop_tokens=stops).stop_tokens == (1, 2)
    assert SamplingParams(temperature=jnp.float32(0.5), top_p=np.array(0.5)).top_p == 0.5
