"""Which part of the weights a device has: its heads, its part of every feed-forward block.

Matrices that start a block are split by columns, those that end it by rows, so a block needs one
sum over the devices (Shoeybi et al., "Megatron-LM", 2019). The vocabulary is split too where it
divides. Every expert is split as the feed-forward block that it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from .config import ModelConfig

__all__ = ["AXIS", "DATA", "local_config", "param_specs", "split_params", "split_part"]

AXIS, DATA = "tensor", "data"


def local_config(config: ModelConfig, devices: int) -> ModelConfig:
    """The sizes that one device sees, with at least one KV head.

    Raises:
      ValueError: query heads, KV heads or the inner width cannot be split so.
    """
    heads, kv_heads, inner = config.num_heads, config.num_kv_heads, config.inner_width
    if heads % devices or inner % devices or (kv_heads % devices and devices % kv_heads):
        raise ValueError(
            f"{heads} query heads, {kv_heads} KV heads and an inner width of {inner} cannot be "
            f"split over {devices} devices: the first and the last must be multiples of it, and "
            "KV heads a multiple or a divisor"
        )
    return replace(
        config,
        num_heads=heads // devices,
        num_kv_heads=max(kv_heads // devices, 1),
        inner_width=inner // devices,
    )


def split_params(config: ModelConfig, params: dict[str, Any], mesh: Mesh) -> dict[str, Any]:
    """Put every device's part of the weights on it; what cannot be split is on all."""
    own = {name: array for name, array in params.items() if name != "layers"}
    layers = [split_part(config, layer, mesh) for layer in params["layers"]]
    return split_part(config, own, mesh) | dict(layers=layers)


def split_part(config: ModelConfig, part: dict[str, Any], mesh: Mesh) -> dict[str, Any]:
    """The same of one layer, or of what belongs to none; the host's arrays are read once.

    Columns are reordered so that one device's lie together: `[q0 k0 v0 | q1 k1 v1 | ...]`.
    """
    devices = mesh.shape[AXIS]
    local_config(config, devices)
    copies = max(devices // config.num_kv_heads, 1)
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim

    def qkv(matrix: Any) -> np.ndarray:
        parts = np.split(np.asarray(matrix), [q, q + kv], axis=-1)
        heads = [p.reshape(*p.shape[:-1], -1, config.head_dim) for p in parts]
        heads[1:] = [np.repeat(p, copies, axis=-2) for p in heads[1:]]
        return _interleave([p.reshape(*p.shape[:-2], -1) for p in heads], devices)

    def gate_up(matrix: Any) -> np.ndarray:
        return _interleave(np.split(np.asarray(matrix), 2, axis=-1), devices)

    orders = dict(qkv=qkv, qkv_bias=qkv, gate_up=gate_up, gate_up_bias=gate_up)
    specs = _specs(config, part, devices)
    return {
        name: jax.device_put(orders.get(name, lambda a: a)(a), NamedSharding(mesh, specs[name]))
        for name, a in part.items()
    }


def _interleave(parts: Sequence[np.ndarray], devices: int) -> np.ndarray:
    """Matrices side by side, each device's columns of all of them together."""
    pieces = [np.split(part, devices, axis=-1) for part in parts]
    return np.concatenate([p for own in zip(*pieces, strict=True) for p in own], axis=-1)


def param_specs(config: ModelConfig, params: dict[str, Any], devices: int) -> Any:
    """How `split_params` splits every array: a pytree like `params` of PartitionSpecs."""
    layers = [_specs(config, layer, devices) for layer in params["layers"]]
    own = {name: array for name, array in params.items() if name != "layers"}
    return _specs(config, own, devices) | dict(layers=layers)


def _specs(config: ModelConfig, part: dict[str, Any], devices: int) -> dict[str, PartitionSpec]:
    split = dict(qkv=-1, qkv_bias=-1, gate_up=-1, gate_up_bias=-1, out=-2, down=-2, sinks=-2)
    if config.vocab_size % devices == 0:
        split |= dict(embed=-1, head=-1)

    def spec(name: str, array: Any) -> PartitionSpec:
        axes: list[str | None] = [None] * array.ndim
        if name in split:
            axes[split[name]] = AXIS
        return PartitionSpec(*axes)

    return {name: spec(name, array) for name, array in part.items()}
