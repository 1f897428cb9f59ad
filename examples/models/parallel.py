"""The model of `decoder.py` over several devices: each has its heads, its part of every layer.

Matrices that start a block are split by columns, those that end it by rows, so a block needs one
sum over the devices (Shoeybi et al., "Megatron-LM", 2019). The vocabulary is split too where it
divides: looking tokens up costs one more sum, and the logits stay split until they are sampled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from paged_decode import DecodeBatch, KVCache

from .checkpoint import Params
from .config import ModelConfig
from .decoder import Model, make_model

__all__ = ["AXIS", "DATA", "make_mesh", "make_parallel_model", "param_specs", "split_params"]

AXIS, DATA = "tensor", "data"


def make_mesh(devices: int, *, data: int = 1) -> Mesh:
    """The first `data * devices` devices as axes (DATA, AXIS); ValueError if there are fewer."""
    devices = data * devices
    if not 1 <= devices <= len(jax.devices()):
        raise ValueError(
            f"{devices} devices were asked for, but JAX sees {len(jax.devices())}; on a CPU, set "
            f"the config option jax_num_cpu_devices to {devices} before the first use of a device"
        )
    return jax.make_mesh(
        (data, devices // data),
        (DATA, AXIS),
        axis_types=(AxisType.Auto,) * 2,
        devices=jax.devices()[:devices],
    )


def local_config(config: ModelConfig, devices: int) -> ModelConfig:
    """The sizes that one device sees, with at least one KV head.

    Raises:
      NotImplementedError: the model has experts.
      ValueError: query heads, KV heads or the inner width cannot be split so.
    """
    if config.num_experts:
        raise NotImplementedError("models with experts run on one device so far")
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


def split_params(config: ModelConfig, params: Params, mesh: Mesh) -> Params:
    """Put every device's part of the weights on it; what cannot be split is on all.

    Columns are reordered so that one device's lie together: `[q0 k0 v0 | q1 k1 v1 | ...]`.
    """
    devices = mesh.shape[AXIS]
    local_config(config, devices)
    copies = max(devices // config.num_kv_heads, 1)
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim

    def qkv(matrix: Any) -> np.ndarray:
        parts = np.split(np.asarray(matrix), [q, q + kv], axis=1)
        heads = [np.reshape(p, (len(p), -1, config.head_dim)) for p in parts]
        heads[1:] = [np.repeat(p, copies, axis=1) for p in heads[1:]]
        return _interleave([p.reshape(len(p), -1) for p in heads], devices)

    def layer(weights: Params) -> Params:
        gate_up = np.split(np.asarray(weights["gate_up"]), 2, axis=1)
        return weights | dict(qkv=qkv(weights["qkv"]), gate_up=_interleave(gate_up, devices))

    ordered = params | dict(layers=[layer(weights) for weights in params["layers"]])
    return jax.tree.map(
        lambda a, spec: jax.device_put(a, NamedSharding(mesh, spec)),
        ordered,
        param_specs(config, params, devices),
    )


def make_parallel_model(config: ModelConfig, params: Params, mesh: Mesh) -> Model:
    """Like `make_model`, for weights of `split_params` and a cache on the same mesh.

    The whole model runs inside one `shard_map`: in there heads are local, and the cache knows it.
    A cache that has a data axis splits the rows as well; every shard has all the
    weights.
    """
    devices = mesh.shape[AXIS]
    split_vocabulary = config.vocab_size % devices == 0
    local = make_model(local_config(config, devices), axis=AXIS, split_vocabulary=split_vocabulary)
    specs = param_specs(config, params, devices)

    def model(
        params: Params, cache: KVCache, tokens: Array, batch: DecodeBatch
    ) -> tuple[Array, KVCache]:
        data = cache.placement.data_axis if cache.placement else None
        rows, pages = PartitionSpec(data), PartitionSpec(data, AXIS)
        logits = PartitionSpec(data, AXIS if split_vocabulary else None)
        mapped = jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(specs, pages, rows, rows),
            out_specs=(logits, pages),
            check_vma=False,
        )
        return mapped(params, cache, tokens, batch)

    return model


def _interleave(parts: Sequence[np.ndarray], devices: int) -> np.ndarray:
    """Matrices side by side, each device's columns of all of them together."""
    pieces = [np.split(part, devices, axis=1) for part in parts]
    return np.concatenate([p for own in zip(*pieces, strict=True) for p in own], axis=1)


def param_specs(config: ModelConfig, params: Params, devices: int) -> Any:
    """How `split_params` splits every array: a pytree like `params` of PartitionSpecs."""
    columns, rows, whole = PartitionSpec(None, AXIS), PartitionSpec(AXIS, None), PartitionSpec()
    vocabulary = columns if config.vocab_size % devices == 0 else whole
    split = dict(qkv=columns, out=rows, gate_up=columns, down=rows)
    split |= dict(embed=vocabulary, head=vocabulary)

    def specs(arrays: Params) -> Params:
        return {name: split.get(name, whole) for name in arrays if name != "layers"}

    return specs(params) | dict(layers=[specs(layer) for layer in params["layers"]])
