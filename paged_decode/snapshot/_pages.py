"""Pages between the device and the host, whatever shape the cache has.

A cache is a pytree of arrays `[N, ...]` with a page per index of axis 0, or stacked `[L, N, ...]`.
Its parts are named by their place in the tree, so that a stack and a tuple of layers have the same
parts (`kv/k_pages/0` and so on), and one can be saved and the other restored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ._format import DTYPES, ArraySpec

__all__ = ["Part", "page_chunks", "parts_of", "prepare_insert"]

_RING = 4  # buffers of a chunk each: see `write_file`
_AHEAD = 3  # chunks on their way from an accelerator to the host


@dataclass(frozen=True, slots=True)
class Part:
    """One page array of the cache: a leaf, or one layer of a stacked leaf."""

    name: str
    leaf: int
    layer: int | None
    shape: tuple[int, ...]  # of one page
    dtype: str

    def spec(self, pages: int) -> ArraySpec:
        return ArraySpec(self.name, self.dtype, (pages, *self.shape))


def parts_of(cache: Any, num_pages: int) -> list[Part]:
    """The page arrays of a cache, in the order of its tree.

    Raises:
      ValueError: a leaf has no axis of `num_pages`, or it cannot be told which one it is.
      NotImplementedError: a dtype that the format does not have; pages that are not those of one
        pool with every head once.
    """
    placement = getattr(cache, "placement", None)
    if placement is not None and (placement.kv_copies > 1 or placement.data_shards > 1):
        raise NotImplementedError(
            "snapshots hold one pool with every KV head once; this cache has "
            f"{placement.kv_copies} copies of each head and {placement.data_shards} data shards: "
            "split it over a head_axis that divides the KV heads, and over no data_axis"
        )
    leaves, _ = jax.tree_util.tree_flatten_with_path(cache)
    parts: list[Part] = []
    for at, (path, leaf) in enumerate(leaves):
        name = "kv/" + jax.tree_util.keystr(path, simple=True, separator="/")
        dtype = str(np.dtype(leaf.dtype))
        shape: tuple[int, ...] = tuple(leaf.shape)
        if dtype not in DTYPES:
            raise NotImplementedError(f"{name}: snapshots do not hold {dtype}")
        stacked = len(shape) > 4 or shape[:1] != (num_pages,)
        if shape[int(stacked) : int(stacked) + 1] != (num_pages,):
            raise ValueError(
                f"{name} has shape {list(shape)}: expected [N, ...] or, stacked, [L, N, ...] with "
                f"the allocator's N = {num_pages} pages"
            )
        if stacked:
            parts += [Part(f"{name}/{i}", at, i, shape[2:], dtype) for i in range(leaf.shape[0])]
        else:
            parts.append(Part(name, at, None, shape[1:], dtype))
    return parts


def page_chunks(
    cache: Any, part: Part, pages: np.ndarray, filled: np.ndarray, page_size: int, *, copy: bool
) -> Iterator[np.ndarray]:
    """The pages `[M]` of one part in chunks of the format; slots from `filled` on are zero.

    Args:
      copy: make every chunk its own memory; else they lie in a ring of 4 buffers.
    """
    step = part.spec(0).chunk_rows
    pieces = _pieces(jax.tree.leaves(cache)[part.leaf], part.layer)
    buffers = [
        np.empty((min(step, len(pages)), *part.shape), DTYPES[part.dtype])
        for _ in range(0 if copy else min(_RING, -(-len(pages) // step)))
    ]
    taken = [(index, _take(local, pages, step)) for index, local in pieces]
    for turn, first in enumerate(range(0, len(pages), step)):
        count = min(step, len(pages) - first)
        out = (
            np.empty((count, *part.shape), DTYPES[part.dtype])
            if copy
            else buffers[turn % _RING][:count]
        )
        for index, chunks in taken:
            out[(slice(None), *index)] = next(chunks)[:count]
        _clear_tails(out, filled[first : first + count], page_size)
        yield out


def _pieces(leaf: Any, layer: int | None) -> list[tuple[tuple[slice, ...], Any]]:
    """`[N, ...]` arrays on one device each, and which part of a page they are."""
    if not isinstance(leaf, jax.Array):
        return [((), leaf if layer is None else leaf[layer])]
    if not leaf.is_fully_addressable:
        raise NotImplementedError(
            "the cache is spread over several processes; save a replica in each of them, or gather "
            "it to one first"
        )
    front = 0 if layer is None else 1
    pieces = []
    for shard in leaf.addressable_shards:
        if any(
            s.indices(n) != (0, n, 1)
            for s, n in zip(shard.index[: front + 1], leaf.shape, strict=False)
        ):
            raise NotImplementedError("pages or layers are split over devices; only heads may be")
        if shard.replica_id == 0:
            pieces.append((shard.index[front + 1 :], _Layer(shard.data, layer)))
    return pieces


@dataclass(frozen=True, slots=True)
class _Layer:
    """A layer of an array on one device; without a layer, all of it."""

    array: Any
    layer: int | None


def _take(local: Any, pages: np.ndarray, step: int) -> Iterator[np.ndarray]:
    """Chunks of `step` pages on the host; the last one may be longer than its pages."""
    if isinstance(local, _Layer) and local.array.device.platform != "cpu":
        yield from _take_from_device(local, pages, step)
        return
    if isinstance(local, _Layer):
        view = np.asarray(local.array)  # no copy on a CPU
        view = view if local.layer is None else view[local.layer]
    else:
        view = np.asarray(local)
    for first in range(0, len(pages), step):
        yield view[pages[first : first + step]]


def _take_from_device(local: _Layer, pages: np.ndarray, step: int) -> Iterator[np.ndarray]:
    """One program gathers a chunk; the copies of the next ones run behind it."""
    ahead: list[Any] = []
    for first in range(0, len(pages), step):
        ids = np.zeros(step, np.int32)
        ids[: len(pages) - first] = pages[first : first + step]
        chunk = _gather(local.array, ids, local.layer)
        chunk.copy_to_host_async()
        ahead.append(chunk)
        if len(ahead) > _AHEAD:
            yield np.asarray(ahead.pop(0))
    for chunk in ahead:
        yield np.asarray(chunk)


@jax.jit
def _gather(array: Any, ids: Any, layer: int | None) -> Any:
    return array[ids] if layer is None else array[layer, ids]


def _clear_tails(chunk: np.ndarray, filled: np.ndarray, page_size: int) -> None:
    """Zero what lies behind the tokens of a page `[Hk, S, ...]`: it may be of another prompt."""
    if chunk.ndim < 3 or chunk.shape[2] != page_size:
        return
    for row in np.flatnonzero(filled < page_size).tolist():
        chunk[row, :, filled[row] :] = np.zeros((), chunk.dtype)


# ---- back to the device


def prepare_insert(
    cache: Any, parts: list[Part], staged: list[np.ndarray]
) -> Callable[[list[int]], Any]:
    """Bring staged pages `[M, ...]` of every part to the devices, and compile what places them.

    The function that comes back takes the M page ids, writes the pages there and returns the
    cache; it donates the cache. All that can fail without the cache being touched fails here.
    """
    leaves, tree = jax.tree.flatten(cache)
    runs = [_compile(leaves, parts, staged, device) for device in _devices(leaves)]

    def insert(pages: list[int]) -> Any:
        ids = np.array(pages, np.int32)
        results = [program(local, values, ids) for program, local, values in runs]
        if len(runs) == 1:
            return jax.tree.unflatten(tree, results[0])
        filled = [
            jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, list(local))
            for leaf, local in zip(leaves, zip(*results, strict=True), strict=True)
        ]
        return jax.tree.unflatten(tree, filled)

    return insert


def _devices(leaves: list[Any]) -> list[Any]:
    """The devices that hold every leaf, in one order."""
    first = leaves[0]
    if not isinstance(first, jax.Array):
        return [None]
    return [shard.device for shard in first.addressable_shards]


def _compile(
    leaves: list[Any], parts: list[Part], staged: list[np.ndarray], device: Any
) -> tuple[Any, list[Any], list[Any]]:
    """The program that fills the leaves' shards on one device, those shards, and the pages."""
    shards = [_shard_on(leaf, device) for leaf in leaves]
    values = []
    for part, pages in zip(parts, staged, strict=True):
        index = shards[part.leaf][0][1 if part.layer is None else 2 :]
        mine = pages[(slice(None), *index)]
        values.append(jax.device_put(mine, device))
    local = [data for _, data in shards]
    places = tuple((part.leaf, part.layer) for part in parts)
    ids = np.zeros(len(staged[0]) if staged else 0, np.int32)
    return _insert.lower(local, values, ids, places=places).compile(), local, values


def _shard_on(leaf: Any, device: Any) -> tuple[tuple[slice, ...], Any]:
    if device is None:
        return (slice(None),) * leaf.ndim, leaf
    return next((s.index, s.data) for s in leaf.addressable_shards if s.device == device)


def _insert_impl(
    leaves: list[Any], values: list[Any], ids: Any, *, places: tuple[tuple[int, int | None], ...]
) -> list[Any]:
    """Bits are moved, never numbers."""
    out = [_bits(leaf) for leaf in leaves]
    for (leaf, layer), value in zip(places, values, strict=True):
        at = out[leaf].at[ids] if layer is None else out[leaf].at[layer, ids]
        out[leaf] = at.set(_bits(value), unique_indices=True, mode="promise_in_bounds")
    return [
        new if new.dtype == old.dtype else lax.bitcast_convert_type(new, old.dtype)
        for new, old in zip(out, leaves, strict=True)
    ]


def _bits(array: Any) -> Any:
    """Small floats as integers: a CPU widens them on the way, which quietens a signalling NaN.

    Others stay as they are, because XLA for CPU copies the whole pool for the change of type.
    """
    if array.dtype.itemsize >= 4 or jnp.issubdtype(array.dtype, jnp.integer):
        return array
    return lax.bitcast_convert_type(array, jnp.dtype(f"uint{8 * array.dtype.itemsize}"))


_insert = jax.jit(_insert_impl, donate_argnums=0, static_argnames="places")
