"""Mixtures of experts: however many tokens there are, each is answered by the experts it chose."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import decoder

EXPERTS, CHOSEN, WIDTH, INNER = 6, 2, 12, 8
CONFIG = decoder.ModelConfig(
    vocab_size=8,
    num_layers=1,
    width=WIDTH,
    inner_width=INNER,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    max_positions=8,
    num_experts=EXPERTS,
    experts_per_token=CHOSEN,
)


def some_layer(rng: np.random.Generator, favourite: float) -> dict[str, np.ndarray]:
    """`favourite` is how much better the third expert's scores are than all others."""
    bias = np.zeros(EXPERTS)
    bias[2] = favourite
    return {
        "router": rng.standard_normal((WIDTH, EXPERTS)) / WIDTH**0.5,
        "router_bias": bias,
        "gate_up": rng.standard_normal((EXPERTS, WIDTH, 2 * INNER)) / WIDTH**0.5,
        "gate_up_bias": rng.standard_normal((EXPERTS, 2 * INNER)),
        "down": rng.standard_normal((EXPERTS, INNER, WIDTH)) / INNER**0.5,
        "down_bias": rng.standard_normal((EXPERTS, WIDTH)),
    }


def token_by_token(layer: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    """float64, one token and one expert after the other."""
    out = np.zeros_like(x)
    for row, token in enumerate(x):
        scores = token @ layer["router"] + layer["router_bias"]
        best = np.argsort(-scores, kind="stable")[:CHOSEN]
        weights = np.exp(scores[best] - scores[best].max())
        for expert, weight in zip(best, weights / weights.sum(), strict=True):
            gate, up = np.split(token @ layer["gate_up"][expert] + layer["gate_up_bias"][expert], 2)
            inner = gate / (1 + np.exp(-gate)) * up
            out[row] += weight * (inner @ layer["down"][expert] + layer["down_bias"][expert])
    return out


def mixed(layer: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    narrow = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), layer)
    mix = jax.jit(lambda layer, x: decoder._mix_experts(CONFIG, layer, x))
    return np.asarray(mix(narrow, jnp.asarray(x, jnp.float32)))


@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("favourite", [0.0, 50.0])
@pytest.mark.parametrize("tokens", [1, 2, 7, 40])
def test_every_token_is_answered_by_its_experts(tokens, favourite, biases):
    """Fewer choices than experts, and several tiles of one, also if all want the same expert."""
    rng = np.random.default_rng(tokens)
    layer, x = some_layer(rng, favourite), rng.standard_normal((tokens, WIDTH))
    if not biases:
        layer |= {name: np.zeros_like(layer[name]) for name in ("gate_up_bias", "down_bias")}
    want = token_by_token(layer, x)
    if not biases:
        del layer["gate_up_bias"], layer["down_bias"]
    np.testing.assert_allclose(mixed(layer, x), want, rtol=0, atol=2e-5)


def test_no_expert_that_nobody_chose_is_read_for_one_token():
    """NaN in all the others changes nothing."""
    rng = np.random.default_rng(1)
    layer, x = some_layer(rng, 0.0), rng.standard_normal((1, WIDTH))
    best = np.argsort(-(x[0] @ layer["router"]))[:CHOSEN]
    others = [expert for expert in range(EXPERTS) if expert not in best]
    want = mixed(layer, x)
    for name in ("gate_up", "gate_up_bias", "down", "down_bias"):
        layer[name][others] = np.nan
    np.testing.assert_array_equal(mixed(layer, x), want)
