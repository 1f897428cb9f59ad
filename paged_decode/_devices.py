"""Arrays on devices: where they lie, and their numbers as bits.

Copies through page-locked memory run at the rate of the link and beside the device's programs;
`np.asarray` and `copy_to_host_async` of an array on a GPU wait for the device and take ten times as
long (`benchmarks/tier.py`). Arrays of a few MiB are too small: Python takes as long as the copy.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

__all__ = ["bits", "pinned_sharding", "put_beside", "tied", "unbits"]


def pinned_sharding(array: Any) -> Any:
    """Where the array would lie in page-locked memory; None where that is nothing special."""
    device = next(iter(array.devices()))
    if device.platform == "cpu":
        return None
    if "pinned_host" not in {memory.kind for memory in device.addressable_memories()}:
        return None
    return array.sharding.with_memory_kind("pinned_host")


def tied(cache: Any) -> Any:
    """The same arrays in place, but committed to their devices; donates them if they were not.

    What was copied to a device from the host is committed, and so is a cache into which it is
    written. JAX compiles every program anew for it, unless it was committed before.
    """
    leaves, tree = jax.tree.flatten(cache)
    if all(leaf.committed for leaf in leaves):
        return cache
    shardings = [leaf.sharding for leaf in leaves]
    place = jax.jit(_same, donate_argnums=0, out_shardings=shardings)
    return jax.tree.unflatten(tree, place(leaves))


def _same(leaves: list[Any]) -> list[Any]:
    return leaves


def bits(array: Any) -> Any:
    """Small floats as integers: a CPU widens them on the way, which quietens a signalling NaN.

    Others stay as they are, because XLA for CPU copies the whole pool for the change of type.
    """
    if array.dtype.itemsize >= 4 or jnp.issubdtype(array.dtype, jnp.integer):
        return array
    return lax.bitcast_convert_type(array, jnp.dtype(f"uint{8 * array.dtype.itemsize}"))


def unbits(array: Any, dtype: Any) -> Any:
    """What `bits` was made of."""
    return array if array.dtype == dtype else lax.bitcast_convert_type(array, dtype)


def put_beside(array: Any, tree: Any) -> Any:
    """Host arrays of a tree on the devices of `array`, whole on each of them: an explicit transfer.

    They are committed where `array` is, so that no program is compiled twice.
    """
    sharding = array.sharding
    if isinstance(sharding, NamedSharding):
        return jax.device_put(tree, NamedSharding(sharding.mesh, PartitionSpec()))
    return jax.device_put(tree, sharding if array.committed else None)
