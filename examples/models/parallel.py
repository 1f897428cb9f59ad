"""The model of `decoder.py` over several devices: each has its heads, its part of every layer.

A block needs one sum over the devices. Looking tokens up costs one more where the vocabulary is
split, and the logits stay split until they are sampled.
"""

from __future__ import annotations

import jax
from jax.sharding import AxisType, Mesh, PartitionSpec
from jaxtyping import Array

from paged_decode import DecodeBatch, DeviceSum, KVCache

from .checkpoint import Params
from .config import ModelConfig
from .decoder import Model, make_model
from .sharding import AXIS, DATA, local_config, param_specs, split_params

__all__ = ["AXIS", "DATA", "make_mesh", "make_parallel_model", "param_specs", "split_params"]


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


def make_parallel_model(
    config: ModelConfig,
    params: Params,
    mesh: Mesh,
    *,
    every_token: bool = False,
    sums: DeviceSum | None = None,
) -> Model:
    """Like `make_model`, for weights of `split_params` and a cache on the same mesh.

    The whole model runs inside one `shard_map`: in there heads are local, and the cache knows it.
    A cache that has a data axis splits the rows as well; every shard has all the
    weights.
    """
    devices = mesh.shape[AXIS]
    split_vocabulary = config.vocab_size % devices == 0
    local = make_model(
        local_config(config, devices),
        every_token=every_token,
        axis=AXIS,
        split_vocabulary=split_vocabulary,
        sums=sums,
    )
    specs = param_specs(config, params, devices)

    def model(
        params: Params, cache: KVCache, tokens: Array, batch: DecodeBatch
    ) -> tuple[Array, KVCache]:
        data = cache.placement.data_axis if cache.placement else None
        rows, pages = PartitionSpec(data), PartitionSpec(data, AXIS)
        vocabulary = AXIS if split_vocabulary else None
        logits = PartitionSpec(data, *(None,) * every_token, vocabulary)
        mapped = jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(specs, pages, rows, rows),
            out_specs=(logits, pages),
            check_vma=False,
        )
        return mapped(params, cache, tokens, batch)

    return model
