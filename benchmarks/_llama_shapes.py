"""Random weights of the shapes of Llama-3.1-8B or Llama-3.2-1B, and the example model on them.

Time does not depend on what the weights say, so none are fetched. `small` is a model of a few
thousand weights in float32, with which the benchmarks run on a CPU in seconds.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Format, Layout
from jax.sharding import SingleDeviceSharding

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "examples")]
from models.config import ModelConfig, Rope  # noqa: E402
from models.decoder import make_model  # noqa: E402

__all__ = ["LARGE", "MEDIUM", "LlamaShapes", "llama_shapes"]

LARGE = ModelConfig(
    vocab_size=128256,
    num_layers=32,
    width=4096,
    inner_width=14336,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    max_positions=131072,
    rope=Rope(500000.0),
)
MEDIUM = replace(LARGE, num_layers=16, width=2048, inner_width=8192, head_dim=64)
SMALL = replace(
    LARGE,
    vocab_size=512,
    num_layers=2,
    width=32,
    inner_width=64,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
)


@dataclass(frozen=True)
class LlamaShapes:
    """A configuration, its weights, and the model that computes with them."""

    config: ModelConfig
    params: dict[str, Any]
    model: Callable[..., Any]
    dtype: Any

    @property
    def kv_bytes_per_token(self) -> int:
        c = self.config
        return 2 * c.num_layers * c.num_kv_heads * c.head_dim * jnp.dtype(self.dtype).itemsize

    @property
    def name(self) -> dict[str, Any]:
        """What a record says about the model."""
        c = self.config
        return {
            "weights": f"random, width {c.width}, vocabulary {c.vocab_size}",
            "layers": c.num_layers,
            "dtype": jnp.dtype(self.dtype).name,
        }


def llama_shapes(
    layers: int | None = None,
    *,
    small: bool = False,
    by_columns: bool = False,
    config: ModelConfig = LARGE,
) -> LlamaShapes:
    """Weights and model; `layers` makes it shallower, with all else as in `config`.

    With `by_columns` a matrix `[in, out]` lies in memory as checkpoints have it: out times in.
    """
    config = SMALL if small else config
    config = replace(config, num_layers=layers or config.num_layers)
    dtype = jnp.float32 if small else jnp.bfloat16
    return LlamaShapes(config, _params(config, dtype, by_columns), make_model(config), dtype)


def _params(config: ModelConfig, dtype: Any, by_columns: bool) -> dict[str, Any]:
    """Normal numbers of deviation 0.02, drawn on the device one matrix at a time."""
    key, drawn = jax.random.key(0), 0
    device = SingleDeviceSharding(jax.devices()[0])
    draw = jax.jit(
        lambda key, shape: jax.random.normal(key, shape, dtype) * jnp.asarray(0.02, dtype),
        static_argnums=1,
        out_shardings=Format(Layout((1, 0)), device) if by_columns else None,
    )

    def matrix(*shape: int) -> jax.Array:
        nonlocal drawn
        drawn += 1
        return draw(jax.random.fold_in(key, drawn), shape)

    width, inner = config.width, config.inner_width
    queries, keys = (n * config.head_dim for n in (config.num_heads, config.num_kv_heads))
    ones = jnp.ones(width, dtype)
    layers = [
        {
            "attention_norm": ones,
            "inner_norm": ones,
            "qkv": matrix(width, queries + 2 * keys),
            "out": matrix(queries, width),
            "gate_up": matrix(width, 2 * inner),
            "down": matrix(inner, width),
        }
        for _ in range(config.num_layers)
    ]
    return {
        "embed": matrix(width, config.vocab_size),
        "head": matrix(width, config.vocab_size),
        "norm": ones,
        "layers": layers,
    }
