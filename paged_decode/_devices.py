"""Where arrays lie: in page-locked memory beside an accelerator, or tied to their devices.

Copies through page-locked memory run at the rate of the link and beside the device's programs;
`np.asarray` and `copy_to_host_async` of an array on a GPU wait for the device and take ten times as
long (`benchmarks/tier.py`). Arrays of a few MiB are too small: Python takes as long as the copy.
"""

from __future__ import annotations

from typing import Any

import jax

__all__ = ["pinned_sharding", "tied"]


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
    return jax.tree.unflatten(tree, _placed(tuple(leaf.sharding for leaf in leaves))(leaves))


def _placed(shardings: tuple[Any, ...]) -> Any:
    return jax.jit(_same, donate_argnums=0, out_shardings=list(shardings))


def _same(leaves: list[Any]) -> list[Any]:
    return leaves
