"""Pages between a cache and host memory, in programs of a few fixed sizes."""

from __future__ import annotations

from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int

__all__ = ["CopyFailed", "CopyPending", "DeviceMover", "PageMover", "fits"]


class CopyFailed(RuntimeError):
    """A copy of pages did not happen; raise it in a `PageMover` of your own."""


class CopyPending(Exception):
    """A copy is not done yet; from `finish`, which is then asked again at the next `settle`."""


@runtime_checkable
class PageMover(Protocol):
    """Carries pages to the host and back. What a call returns is opaque to its caller."""

    def take(self, cache: Any, pages: np.ndarray) -> Any:
        """Begin to copy pages int32 `[n]` out; the cache may be written again at once."""
        ...

    def finish(self, copy: Any) -> Any:
        """Wait for a copy that `take` began; what comes back rests in host memory.

        May raise CopyPending instead of waiting.
        """
        ...

    def put(self, cache: Any, rested: Any, pages: np.ndarray) -> Any:
        """Write them to pages int32 `[n]`, 0 for those that are not wanted; donates the cache."""
        ...


class DeviceMover:
    """Copies between a `KVCache` (or any pytree of `[N, ...]` arrays) and the host.

    `take` gathers to a buffer of its own on the device, whose way to the host runs beside the
    programs that follow. The programs are one per number of pages, compiled once.

    Args:
      memory: "pinned_host" keeps pages in page-locked memory, from where they travel fastest;
        "numpy" in plain memory; None is the first where an accelerator has it.
    """

    def __init__(self, memory: str | None = None):
        if memory not in (None, "pinned_host", "numpy"):
            raise ValueError(f"memory must be 'pinned_host', 'numpy' or None, got {memory!r}")
        self.memory = memory

    def take(self, cache: Any, pages: np.ndarray) -> Any:
        leaves = jax.tree.leaves(cache)
        if not leaves[0].is_fully_addressable:
            raise NotImplementedError("a host tier serves a cache of one process, not of several")
        copies = _gather(leaves, pages)
        if self._pins(copies[0]):
            return [jax.device_put(c, c.sharding.with_memory_kind("pinned_host")) for c in copies]
        for each in copies:
            each.copy_to_host_async()
        return copies

    def finish(self, copy: Any) -> Any:
        jax.block_until_ready(copy)
        return copy if self._pins(copy[0]) else [np.asarray(each) for each in copy]

    def put(self, cache: Any, rested: Any, pages: np.ndarray) -> Any:
        leaves, tree = jax.tree.flatten(cache)
        rested = [jax.device_put(r, a.sharding) for r, a in zip(rested, leaves, strict=True)]
        return jax.tree.unflatten(tree, _scatter(leaves, rested, pages))

    def _pins(self, array: Any) -> bool:
        if self.memory is not None:
            return self.memory == "pinned_host"
        device = next(iter(array.devices()))
        kinds = {memory.kind for memory in device.addressable_memories()}
        return device.platform != "cpu" and "pinned_host" in kinds


def fits(cache: Any, pages: list[Any]) -> bool:
    """Whether pages `[n, ...]` are of the shapes and dtypes that the cache has."""
    ours = [(leaf.shape[1:], np.dtype(leaf.dtype)) for leaf in jax.tree.leaves(cache)]
    return ours == [(page.shape[1:], np.dtype(page.dtype)) for page in pages]


@jax.jit
def _gather(leaves: list[Array], pages: Int[Array, " C"]) -> list[Array]:
    return [leaf[pages] for leaf in leaves]


@partial(jax.jit, donate_argnums=0)
def _scatter(leaves: list[Array], new: list[Array], pages: Int[Array, " C"]) -> list[Array]:
    """Pages that are not wanted all go to the null page, which may hold anything."""
    return [
        _unbits(_bits(leaf).at[pages].set(_bits(value)), leaf.dtype)
        for leaf, value in zip(leaves, new, strict=True)
    ]


def _bits(array: Array) -> Array:
    """Small floats as integers: a CPU computes in wider ones, which would change some NaNs."""
    if array.dtype.itemsize >= 4 or jnp.issubdtype(array.dtype, jnp.integer):
        return array
    return lax.bitcast_convert_type(array, jnp.dtype(f"uint{8 * array.dtype.itemsize}"))


def _unbits(array: Array, dtype: Any) -> Array:
    return array if array.dtype == dtype else lax.bitcast_convert_type(array, dtype)
