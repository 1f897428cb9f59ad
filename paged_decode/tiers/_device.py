"""Pages between a cache and host memory, in programs of a few fixed sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from .._devices import bits, pinned_sharding, put_beside, unbits
from ..errors import CopyFailed, CopyPending

__all__ = ["CacheHolder", "CopyFailed", "CopyPending", "DeviceMover", "PageMover", "fits"]


# Of layers that travel as one array. A loop on the device that asks the host whether to go on waits
# behind a whole one (`DeviceMover`), and of a few MiB Python takes as long as the copy does.
_ARRAY_BYTES = 1 << 24


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


@runtime_checkable
class CacheHolder(Protocol):
    """Whoever has the living cache."""

    @property
    def cache(self) -> Any:
        """The living one."""
        ...

    def exchange(self, change: Callable[[Any], Any]) -> None:
        """Let the cache be what `change` makes of it, in the order of the programs around it."""
        ...


class DeviceMover:
    """Copies between a `KVCache` (or any pytree of `[N, ...]` arrays) and the host.

    `take` gathers to a buffer of its own on the device, whose way to the host runs beside the
    programs that follow. The programs are one per number of pages, compiled once.

    Layers travel together, up to 16 MiB in one array. From an accelerator a thread sends the
    arrays, two at a time: a loop on the device that asks the host whether to go on waits in the
    same queue, then behind two arrays and not behind all of them.

    Args:
      memory: "pinned_host" keeps pages in page-locked memory, from where they travel fastest;
        "numpy" in plain memory; None is the first where an accelerator has it.
    """

    def __init__(self, memory: str | None = None):
        if memory not in (None, "pinned_host", "numpy"):
            raise ValueError(f"memory must be 'pinned_host', 'numpy' or None, got {memory!r}")
        self.memory = memory
        self._sender = ThreadPoolExecutor(1, "paged-decode-copies")

    def take(self, cache: Any, pages: np.ndarray) -> Any:
        """See `PageMover.take`; NotImplementedError for a cache of several processes."""
        leaves = jax.tree.leaves(cache)
        if not leaves[0].is_fully_addressable:
            raise NotImplementedError("a host tier serves a cache of one process, not of several")
        copies = _gather(leaves, put_beside(leaves[0], pages), axis=page_axis(cache))
        if self.memory == "pinned_host" or pinned_sharding(copies[0]) is not None:
            return self._sender.submit(_send, copies)
        return copies

    def finish(self, copy: Any) -> Any:
        """See `PageMover.finish`; it always waits."""
        if not isinstance(copy, Future):
            return [np.asarray(each) for each in jax.device_get(copy)]
        pinned = copy.result()
        return [np.array(each) for each in pinned] if self.memory == "numpy" else pinned

    def put(self, cache: Any, rested: Any, pages: np.ndarray) -> Any:
        """See `PageMover.put`."""
        leaves, tree = jax.tree.flatten(cache)
        axis = page_axis(cache)
        where = [leaves[group[0]].sharding for group in _groups(leaves, len(pages), axis)]
        new, ids = jax.device_put(rested, where), put_beside(leaves[0], pages)
        return jax.tree.unflatten(tree, _scatter(leaves, new, ids, axis=axis))


def page_axis(cache: Any) -> int:
    """Which axis of the arrays of a cache is that of the pages."""
    return int(getattr(cache, "stacked", False))


def fits(cache: Any, rested: list[Any], num_pages: int) -> bool:
    """Whether arrays are what a `DeviceMover` makes of so many pages of that cache."""
    leaves, axis, ours = jax.tree.leaves(cache), page_axis(cache), []
    for group in _groups(leaves, num_pages, axis):
        shape = list(leaves[group[0]].shape)
        shape[axis] = num_pages
        shape[0] *= len(group)
        ours.append((tuple(shape), np.dtype(leaves[group[0]].dtype)))
    return ours == [(each.shape, np.dtype(each.dtype)) for each in rested]


def _groups(leaves: Sequence[Any], num_pages: int, axis: int) -> list[list[int]]:
    """Which arrays of the cache travel together: neighbours that are alike, up to 16 MiB."""
    # By shapes alone, so that whoever puts pages back finds the groups in which they were taken.
    groups: list[list[int]] = []
    for at, leaf in enumerate(leaves):
        last = leaves[groups[-1][0]] if groups else None
        most = _ARRAY_BYTES * leaf.shape[axis] // max(1, num_pages * leaf.nbytes)
        alike = last is not None and (last.shape, last.dtype) == (leaf.shape, leaf.dtype)
        if alike and len(groups[-1]) < most:
            groups[-1].append(at)
        else:
            groups.append([at])
    return groups


def _send(copies: list[Array]) -> list[Array]:
    """Copy arrays to page-locked memory, two at a time."""
    sent: list[Array] = []
    for each in copies:
        sent.append(jax.device_put(each, each.sharding.with_memory_kind("pinned_host")))
        jax.block_until_ready(sent[-2:-1])
    return jax.block_until_ready(sent)


@partial(jax.jit, static_argnames="axis")
def _gather(leaves: list[Array], pages: Int[Array, " C"], *, axis: int) -> list[Array]:
    """One array `[G * C, ...]`, of stacks `[G * L, C, ...]`, for each group of G leaves."""
    at = (slice(None),) * axis
    return [
        unbits(
            jnp.concatenate([bits(leaves[i])[*at, pages] for i in group]), leaves[group[0]].dtype
        )
        for group in _groups(leaves, len(pages), axis)
    ]


@partial(jax.jit, donate_argnums=0, static_argnames="axis")
def _scatter(
    leaves: list[Array], new: list[Array], pages: Int[Array, " C"], *, axis: int
) -> list[Array]:
    """Pages that are not wanted all go to the null page, which may hold anything."""
    groups, at = _groups(leaves, len(pages), axis), (slice(None),) * axis
    values = [
        value
        for group, array in zip(groups, new, strict=True)
        for value in jnp.split(bits(array), len(group))
    ]
    return [
        unbits(bits(leaf).at[*at, pages].set(value), leaf.dtype)
        for leaf, value in zip(leaves, values, strict=True)
    ]
