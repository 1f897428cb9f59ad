"""A model over several devices: each has its heads, its part of every feed-forward block.

Matrices that start a block are split by columns, those that end it by rows, so a block needs one
sum over the devices (Shoeybi et al., "Megatron-LM", 2019). The vocabulary is split too where it
divides: looking tokens up costs one sum more, and the logits stay split until they are sampled.
Every expert is split as the feed-forward block that it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from paged_decode import DecodeBatch, KVCache

from .config import ModelConfig

__all__ = ["AXIS", "DATA", "local_config", "make_mesh", "mapped", "param_specs", "split_params"]

AXIS, DATA = "tensor", "data"


def make_mesh(devices: int, *, data: int = 1) -> Mesh:
    """The first `data * devices` devices as axes (DATA, AXIS); ValueError if there are fewer."""
    devices = data * devices
    if not 1 <= devices <= len(jax.devices()):
        raise ValueError(
            f"{devices} devices were asked for, but JAX sees {len(jax.devices())}; on a CPU, set "
            f"the config option jax_num_cpu_devices to {devices} before the first use of a device"
        )
    shape, kinds = (data, devices // data), (AxisType.Auto,) * 2
    return jax.make_mesh(shape, (DATA, AXIS), axis_types=kinds, devices=jax.devices()[:devices])


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


def split_params(config: ModelConfig, params: Any, mesh: Mesh) -> Any:
    """Put every device's part of the weights on it; what cannot be split is on all.

    Of a whole model, or of a part of one, such as a layer; the host's arrays are read once.
    Columns are reordered so that one device's lie together: `[q0 k0 v0 | q1 k1 v1 | ...]`. Biases
    at the end of a block, which the sum over the devices would add several times, lie on the first
    device, and zeros on the others.
    """
    devices = mesh.shape[AXIS]
    local_config(config, devices)
    copies = max(devices // config.num_kv_heads, 1)
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim

    def qkv(matrix: Any) -> np.ndarray:
        parts = np.split(np.asarray(matrix), [q, q + kv], axis=-1)
        heads = [p.reshape(*p.shape[:-1], -1, config.head_dim) for p in parts]
        if copies > 1:
            heads[1:] = [np.repeat(p, copies, axis=-2) for p in heads[1:]]
        return _interleave([p.reshape(*p.shape[:-2], -1) for p in heads], devices)

    def gate_up(matrix: Any) -> np.ndarray:
        return _interleave(np.split(np.asarray(matrix), 2, axis=-1), devices)

    def once(bias: Any) -> np.ndarray:
        whole = np.asarray(bias)
        return np.concatenate([whole, *[np.zeros_like(whole)] * (devices - 1)])

    orders = dict(qkv=qkv, qkv_bias=qkv, gate_up=gate_up, gate_up_bias=gate_up)
    orders |= dict(out_bias=once, down_bias=once)

    def put(path: Any, array: Any, spec: PartitionSpec) -> jax.Array:
        ours = orders.get(path[-1].key, lambda a: a)(array)
        return jax.device_put(ours, NamedSharding(mesh, spec))

    specs = param_specs(config, params, devices)
    return jax.tree.map_with_path(put, params, specs)


def _interleave(parts: Sequence[np.ndarray], devices: int) -> np.ndarray:
    """Matrices side by side, each device's columns of all of them together."""
    pieces = [np.split(part, devices, axis=-1) for part in parts]
    return np.concatenate([p for own in zip(*pieces, strict=True) for p in own], axis=-1)


def param_specs(config: ModelConfig, params: Any, devices: int) -> Any:
    """How `split_params` splits every array: a pytree like `params` of PartitionSpecs."""
    split = dict(qkv=-1, qkv_bias=-1, gate_up=-1, gate_up_bias=-1, out=-2, down=-2, sinks=-2)
    split |= dict(out_bias=0, down_bias=0)
    if config.vocab_size % devices == 0:
        split |= dict(embed=-1, head=-1)

    def spec(path: Any, array: Any) -> PartitionSpec:
        axes: list[str | None] = [None] * array.ndim
        if (name := path[-1].key) in split:
            axes[split[name]] = AXIS
        return PartitionSpec(*axes)

    return jax.tree.map_with_path(spec, params)


def mapped(local: Callable[..., Any], config: ModelConfig, mesh: Mesh, every_token: bool) -> Any:
    """The model of all devices, in one `shard_map`, of what one of them computes.

    In there heads are local, and the cache knows it. A cache that has a data axis splits the rows
    as well; every shard has all the weights.
    """
    devices = mesh.shape[AXIS]

    def model(
        params: Any, cache: KVCache, tokens: Array, batch: DecodeBatch
    ) -> tuple[Array, KVCache]:
        data = cache.placement.data_axis if cache.placement else None
        rows, pages = PartitionSpec(data), PartitionSpec(data, AXIS)
        vocabulary = AXIS if config.vocab_size % devices == 0 else None
        logits = PartitionSpec(data, *(None,) * every_token, vocabulary)
        spread = jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(param_specs(config, params, devices), pages, rows, rows),
            out_specs=(logits, pages),
            check_vma=False,
        )
        return spread(params, cache, tokens, batch)

    return model
