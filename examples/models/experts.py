"""The gates of feed-forward blocks, and a mixture of them: the second half of a layer.

Axes: M tokens, E model width, I inner width, X experts, K of them for a token.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .config import ModelConfig

__all__ = ["gated", "mix_experts"]

_ALPHA, _LIMIT = 1.702, 7.0  # of gpt-oss's gate


def gated(kind: str, gate_up: Float[Array, "M 2I"]) -> Float[Array, "M I"]:
    """What a feed-forward block passes on: its gate, bent, times what lies beside it."""
    gate, up = jnp.split(gate_up, 2, axis=-1)
    if kind == "silu":
        return jax.nn.silu(gate) * up
    if kind == "gelu":
        return jax.nn.gelu(gate, approximate=True) * up
    gate, up = jnp.minimum(gate, _LIMIT), jnp.clip(up, -_LIMIT, _LIMIT)
    return gate * jax.nn.sigmoid(_ALPHA * gate) * (up + 1)


def mix_experts(
    config: ModelConfig, layer: dict[str, Any], x: Float[Array, "M E"]
) -> Float[Array, "M E"]:
    """The K experts with the best scores for each token, weighted by a softmax over these.

    Tokens are sorted by expert, so that each expert is one product of all tokens that chose it.
    """
    scores = x @ layer["router"] + layer["router_bias"]
    best, chosen = jax.lax.top_k(scores, config.experts_per_token)
    order = jnp.argsort(chosen.reshape(-1))
    expert = chosen.reshape(-1)[order]
    sizes = jnp.bincount(expert, length=config.num_experts).astype(jnp.int32)
    mine = x[order // config.experts_per_token]
    inner = jax.lax.ragged_dot(mine, layer["gate_up"], sizes) + layer["gate_up_bias"][expert]
    out = jax.lax.ragged_dot(gated(config.gate, inner), layer["down"], sizes)
    out = (out + layer["down_bias"][expert])[jnp.argsort(order)].reshape(*chosen.shape, -1)
    weight = jax.nn.softmax(best.astype(jnp.float32), axis=-1).astype(x.dtype)
    return jnp.einsum("mk,mke->me", weight, out)
