"""Pages on their way from a file to the devices, whatever shape the cache has.

```
read: rows of every part on the host, all checksums compared   nothing was touched so far
  bring: what a device holds of a page, all pages or a batch of them
  compile: one program for all leaves that are alike
------- from here on the cache is given away -------
  insert: each device writes the pages to their new numbers, in place
  tie: the arrays of all devices are the leaf again
```
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np

from .._devices import bits, unbits
from ._out import BATCH_CHUNKS
from ._parts import Part

__all__ = ["prepare_insert"]

_Layer = tuple[np.ndarray, tuple[Any, ...]]
"""Pages of a layer on the host, and what of a page a device has."""


def prepare_insert(
    cache: Any, parts: list[Part], staged: list[np.ndarray]
) -> Callable[[list[list[int]]], Any]:
    """Bring staged pages `[M, ...]` of every part to the devices, and compile what places them.

    The function that comes back takes the M page ids of every group, writes the pages there and
    returns the cache; it donates the cache. All that can fail without the cache being touched fails
    here, unless a device has no room for all pages: then most are brought in batches later.
    """
    leaves, tree = jax.tree.flatten(cache)
    devices = _devices(leaves)
    fills = [fill for device in devices for fill in _compile(leaves, parts, staged, device)]

    def insert(pages: list[list[int]]) -> Any:
        ids = [np.array(each, np.int32) for each in pages]
        places = [fill.places(ids[fill.group]) for fill in fills]  # all, before one is given away
        with ThreadPoolExecutor(2) as threads:  # on a CPU a program runs in the calling thread
            filled = list(threads.map(_Fill.__call__, fills, places))
        if len(devices) == 1:
            return jax.tree.unflatten(tree, filled)
        return jax.tree.unflatten(
            tree,
            [
                jax.make_array_from_single_device_arrays(
                    leaf.shape, leaf.sharding, filled[at :: len(leaves)]
                )
                for at, leaf in enumerate(leaves)
            ],
        )

    return insert


def _devices(leaves: list[Any]) -> list[Any]:
    """The devices that hold every leaf, in one order."""
    first = leaves[0]
    if not isinstance(first, jax.Array):
        return [None]
    return [shard.device for shard in first.addressable_shards]


@dataclass(frozen=True, slots=True)
class _Fill:
    """Fills one leaf on one device with a batch of pages after the other.

    Attributes:
      local: the leaf there; group: whose pages it has.
      layers: its pages on the host, a layer each, with what the device has of a page.
      batches: equally many pages each, so that there is one program; the last may repeat some.
      ready: the pages of the first batch, if they are on the device.
    """

    program: Any
    local: Any
    group: int
    device: Any
    layers: list[_Layer]
    batches: list[slice]
    ready: list[Any] | None

    def places(self, ids: np.ndarray) -> list[Any]:
        """The page ids of every batch, on the device: no program takes them from the host."""
        return [jax.device_put(ids[rows], self.device) for rows in self.batches]

    def __call__(self, places: list[Any]) -> Any:
        leaf, values = self.local, self.ready
        for rows, ids in zip(self.batches, places, strict=True):
            if values is None:
                jax.block_until_ready(leaf)  # the batch before makes room for this one
                values = _bring(self.layers, rows, self.device)
            leaf, values = self.program(leaf, values, ids), None
        return leaf


def _bring(layers: list[_Layer], rows: slice, device: Any) -> list[Any]:
    return [jax.device_put(pages[(rows, *index)], device) for pages, index in layers]


def _compile(
    leaves: list[Any], parts: list[Part], staged: list[np.ndarray], device: Any
) -> list[_Fill]:
    """What fills each leaf on one device; leaves that are alike, as layers are, share a program."""
    shards = [_shard_on(leaf, device) for leaf in leaves]
    layers: list[list[_Layer]] = [[] for _ in leaves]
    in_order = sorted(zip(parts, staged, strict=True), key=lambda each: each[0].layer or 0)
    for part, pages in in_order:
        index = shards[part.leaf][0][1 if part.layer is None else 2 :]
        layers[part.leaf].append((pages, _of_page(index, part)))
    one = {part.leaf: part for part in parts}  # of its layers, which are alike
    counts = [len(each[0][0]) if each else 0 for each in layers]  # a stack may have no layers
    nbytes = sum(
        count * (local.nbytes // local.shape[one[at].layer is not None])
        for at, ((_, local), count) in enumerate(zip(shards, counts, strict=True))
        if count
    )
    at_once = _has_room(device, nbytes)
    programs: dict[Any, Any] = {}
    fills = []
    for at, ((_, local), count) in enumerate(zip(shards, counts, strict=True)):
        if not count:
            fills.append(_Fill(None, local, 0, device, [], [], None))
            continue
        part = one[at]
        batch = max(1, BATCH_CHUNKS * part.spec(0).chunk_rows // len(layers[at]))
        size = count if at_once else min(count, batch)
        stacked = part.layer is not None
        alike, ready = (local.shape, local.dtype, stacked, size), None
        if at_once or alike not in programs:
            ready = _bring(layers[at], slice(size), device)
        if alike not in programs:
            ids = np.zeros(size, np.int32)
            programs[alike] = _insert.lower(local, ready, ids, stacked=stacked).compile()
        begins = (min(begin, count - size) for begin in range(0, count, size))
        batches = [slice(begin, begin + size) for begin in begins]
        program = programs[alike]
        fills.append(_Fill(program, local, part.group, device, layers[at], batches, ready))
    return fills


def _of_page(index: tuple[Any, ...], part: Part) -> tuple[Any, ...]:
    """What of a saved page a device holds that has `index` of it with all copies of its heads."""
    if part.copies == 1:
        return index
    return np.arange(part.copies * part.shape[0])[index[0]] // part.copies, *index[1:]


def _has_room(device: Any, nbytes: int) -> bool:
    """Whether so many bytes fit the device, with an eighth of what is free left."""
    stats = None if device is None else device.memory_stats()  # None on a CPU
    if not stats or "bytes_limit" not in stats:
        return True
    return nbytes <= (stats["bytes_limit"] - stats["bytes_in_use"]) * 7 // 8


def _shard_on(leaf: Any, device: Any) -> tuple[tuple[slice, ...], Any]:
    if device is None:
        return (slice(None),) * leaf.ndim, leaf
    return next((s.index, s.data) for s in leaf.addressable_shards if s.device == device)


@partial(jax.jit, donate_argnums=0, static_argnames="stacked")
def _insert(leaf: Any, values: list[Any], ids: Any, *, stacked: bool) -> Any:
    """Bits are moved, never numbers."""
    out = bits(leaf)
    for layer, value in enumerate(values):
        at = out.at[layer, ids] if stacked else out.at[ids]
        out = at.set(bits(value), unique_indices=True, mode="promise_in_bounds")
    return unbits(out, leaf.dtype)
