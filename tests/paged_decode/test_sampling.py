"""Sampling on the device against its definition."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paged_decode import SamplingParams
from paged_decode.sampling import SamplingRows, sample

draw = jax.jit(sample)
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
    kept = order[: int(np.searchsorted(np.cumsum(p), params.top_p)) + 1]
    out = np.zeros(24)
    out[kept] = np.exp(logits[kept])
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


@pytest.mark.parametrize(
    "field, value, error",
    [
        ("max_new_tokens", 0, ValueError),
        ("max_new_tokens", 1.0, TypeError),
        ("temperature", -0.1, ValueError),
        ("temperature", float("nan"), ValueError),
        ("top_k", -1, ValueError),
        ("top_p", 0.0, ValueError),
        ("top_p", 1.1, ValueError),
        ("seed", 2**32, ValueError),
        ("seed", True, TypeError),
        ("stop_tokens", tuple(range(9)), ValueError),
        ("stop_tokens", (-1,), ValueError),
        ("stop_tokens", (2**31,), ValueError),
    ],
)
def test_parameters_out_of_range_are_refused_by_name(unchecked, field, value, error):
    with pytest.raises(error, match=field):
        SamplingParams(**{field: value})
