"""A cache whose device memory is given back for a while, and perhaps what was in it."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .._devices import pinned_sharding
from ..cache import KVCache

__all__ = ["Rested", "empty_like", "rest", "woken"]


class Rested(NamedTuple):
    """What is left of a cache.

    Attributes:
      cache: its arrays, deleted: they still say shapes and where they lay.
      held: in host memory what they held, each array as one in page-locked memory, or as the NumPy
        arrays of its shards in this process, with their devices; None: it is given up.
    """

    cache: KVCache
    held: list[Any] | None


def rest(cache: KVCache, *, copy: bool) -> Rested:
    """Copy what the arrays hold to the host, if that is wanted, and delete them."""
    leaves = jax.tree.leaves(cache)
    held = jax.block_until_ready([_copied(leaf) for leaf in leaves]) if copy else None
    for leaf in leaves:
        leaf.delete()
    return Rested(cache, held)


def woken(rested: Rested) -> KVCache:
    """The cache again, in new arrays that lie as those before: with zeros, or what it held."""
    cache, held = rested
    if held is None:
        return jax.block_until_ready(empty_like(cache))
    leaves, tree = jax.tree.flatten(cache)
    return jax.block_until_ready(tree.unflatten(map(_put, leaves, held)))


def empty_like(cache: KVCache) -> KVCache:
    """Zeros in the place of its arrays, which may be deleted."""
    return jax.tree.map(
        lambda a: jnp.zeros(a.shape, a.dtype, device=a.sharding if a.committed else None), cache
    )


def _copied(leaf: jax.Array) -> Any:
    if leaf.committed and (pinned := pinned_sharding(leaf)) is not None:
        return jax.device_put(leaf, pinned)
    return [(shard.device, np.array(shard.data)) for shard in leaf.addressable_shards]


def _put(leaf: jax.Array, held: Any) -> jax.Array:
    if isinstance(held, jax.Array):
        return jax.device_put(held, leaf.sharding)
    if not leaf.committed:
        ((_, whole),) = held
        return jax.device_put(whole)
    parts = [jax.device_put(part, device) for device, part in held]
    return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, parts)
