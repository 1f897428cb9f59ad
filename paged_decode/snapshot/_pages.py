"""Pages between the device and the host, whatever shape the cache has.

A cache is a pytree of arrays `[N, ...]` with a page per index of axis 0, or stacked `[L, N, ...]`.
Its parts are named by their place in the tree, so that a stack and a tuple of layers have the same
parts (`kv/k_pages/0` and so on), and one can be saved and the other restored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
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
    shape: tuple[int, ...]  # of one page, with every KV head once
    dtype: str
    copies: int  # of every KV head in the cache, one behind the other on axis 0 of a page

    def spec(self, pages: int) -> ArraySpec:
        return ArraySpec(self.name, self.dtype, (pages, *self.shape))


def parts_of(cache: Any, num_pages: int) -> list[Part]:
    """The page arrays of a cache, in the order of its tree.

    Raises:
      ValueError: a leaf has no axis of `num_pages`, or it cannot be told which one it is.
      NotImplementedError: a dtype that the format does not have; pages that are not those of one
        pool.
    """
    placement = getattr(cache, "placement", None)
    if placement is not None and placement.data_shards > 1:
        raise NotImplementedError(
            f"snapshots hold one pool; this cache has {placement.data_shards} data shards with "
            "pages of their own: split it over no data_axis"
        )
    copies = 1 if placement is None else placement.kv_copies
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
        page = tuple(leaf.shape[1 + int(stacked) :])
        if copies > 1:
            page = (page[0] // copies, *page[1:])
        if stacked:
            names = [(f"{name}/{i}", i) for i in range(leaf.shape[0])]
            parts += [Part(n, at, layer, page, dtype, copies) for n, layer in names]
        else:
            parts.append(Part(name, at, None, page, dtype, copies))
    return parts


def page_chunks(
    cache: Any, part: Part, pages: np.ndarray, filled: np.ndarray, page_size: int, *, copy: bool
) -> Iterator[np.ndarray]:
    """The pages `[M]` of one part in chunks of the format; slots from `filled` on are zero.

    Args:
      copy: make every chunk its own memory; else they may lie in a ring of 4 buffers.
    """
    step = part.spec(0).chunk_rows
    shape, dtype = (min(step, len(pages)), *part.shape), DTYPES[part.dtype]
    ring = [
        np.empty(shape, dtype) for _ in range(0 if copy else min(_RING, -(-len(pages) // step)))
    ]
    pieces = _pieces(jax.tree.leaves(cache)[part.leaf], part)
    whole = len(pieces) == 1 and pieces[0][1] is None
    taken = [_take(local, pages, step, ring if whole else []) for _, _, local in pieces]
    for turn, first in enumerate(range(0, len(pages), step)):
        count = min(step, len(pages) - first)
        if whole:
            out = next(taken[0])[:count]
        else:
            out = np.empty((count, *part.shape), dtype) if copy else ring[turn % _RING][:count]
            for (index, heads, _), chunks in zip(pieces, taken, strict=True):
                chunk = next(chunks)[:count]
                out[(slice(None), *index)] = chunk if heads is None else chunk[:, heads]
        yield _without_tails(out, filled[first : first + count], page_size)


def _pieces(leaf: Any, part: Part) -> list[tuple[tuple[slice, ...], slice | None, Any]]:
    """`[N, ...]` arrays on one device each, which part of a page they are, and which of their heads
    to take: None for all, else the first copy of each."""
    layer = part.layer
    if not isinstance(leaf, jax.Array):
        return [((), None, leaf if layer is None else leaf[layer])]
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
        index, heads = shard.index[front + 1 :], None
        if part.copies > 1:
            begin, end, _ = index[0].indices(part.copies * part.shape[0])
            first, stop = -(-begin // part.copies), -(-end // part.copies)
            index = (slice(first, stop), *index[1:])
            heads = slice(first * part.copies - begin, None, part.copies)
            if first == stop:
                continue
        if shard.replica_id == 0:
            pieces.append((index, heads, _Layer(shard.data, layer)))
    return pieces


@dataclass(frozen=True, slots=True)
class _Layer:
    """A layer of an array on one device; without a layer, all of it."""

    array: Any
    layer: int | None


def _take(local: Any, pages: np.ndarray, step: int, ring: list[np.ndarray]) -> Iterator[np.ndarray]:
    """Chunks of `step` pages on the host: in the ring, or each in its own memory.

    The last one may be longer than its pages.
    """
    if isinstance(local, _Layer) and local.array.device.platform != "cpu":
        yield from _take_from_device(local, pages, step)
        return
    if isinstance(local, _Layer):
        view = np.asarray(local.array)  # no copy on a CPU
        view = view if local.layer is None else view[local.layer]
    else:
        view = np.asarray(local)
    for turn, first in enumerate(range(0, len(pages), step)):
        ids = pages[first : first + step]
        if ring and view.flags.c_contiguous:
            yield np.take(view, ids, axis=0, out=ring[turn % _RING][: len(ids)], mode="clip")
        else:
            yield view[ids]


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


def _without_tails(chunk: np.ndarray, filled: np.ndarray, page_size: int) -> np.ndarray:
    """Zero what lies behind the tokens of a page `[Hk, S, ...]`: it may be of another prompt."""
    if chunk.ndim < 3 or chunk.shape[2] != page_size:
        return chunk
    partial_pages = np.flatnonzero(filled < page_size).tolist()
    if partial_pages and not chunk.flags.writeable:  # as it came from the device
        chunk = chunk.copy()
    for row in partial_pages:
        chunk[row, :, filled[row] :] = np.zeros((), chunk.dtype)
    return chunk


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
        with ThreadPoolExecutor(2) as threads:  # on a CPU a program runs in the calling thread
            results = [list(threads.map(lambda job: job[0](*job[1:], ids), run)) for run in runs]
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
) -> list[tuple[Any, Any, list[Any]]]:
    """For each leaf the program that fills it on one device, its shard there, and its pages.

    Leaves that are alike, as all layers are, share one program.
    """
    shards = [_shard_on(leaf, device) for leaf in leaves]
    values: list[list[Any]] = [[] for _ in leaves]
    for part, pages in zip(parts, staged, strict=True):
        index = shards[part.leaf][0][1 if part.layer is None else 2 :]
        if part.copies > 1:
            heads = np.arange(part.copies * part.shape[0])[index[0]] // part.copies
            index = (heads, *index[1:])
        values[part.leaf].append(jax.device_put(pages[(slice(None), *index)], device))
    stacked = {part.leaf: part.layer is not None for part in parts}
    ids = np.zeros(len(staged[0]) if staged else 0, np.int32)
    programs: dict[Any, Any] = {}
    runs = []
    for at, ((_, local), pages) in enumerate(zip(shards, values, strict=True)):
        alike = (local.shape, local.dtype, stacked[at])
        if alike not in programs:
            lowered = _insert.lower(local, pages, ids, stacked=stacked[at])
            programs[alike] = lowered.compile()
        runs.append((programs[alike], local, pages))
    return runs


def _shard_on(leaf: Any, device: Any) -> tuple[tuple[slice, ...], Any]:
    if device is None:
        return (slice(None),) * leaf.ndim, leaf
    return next((s.index, s.data) for s in leaf.addressable_shards if s.device == device)


@partial(jax.jit, donate_argnums=0, static_argnames="stacked")
def _insert(leaf: Any, values: list[Any], ids: Any, *, stacked: bool) -> Any:
    """Bits are moved, never numbers."""
    out = _bits(leaf)
    for layer, value in enumerate(values):
        at = out.at[layer, ids] if stacked else out.at[ids]
        out = at.set(_bits(value), unique_indices=True, mode="promise_in_bounds")
    return out if out.dtype == leaf.dtype else lax.bitcast_convert_type(out, leaf.dtype)


def _bits(array: Any) -> Any:
    """Small floats as integers: a CPU widens them on the way, which quietens a signalling NaN.

    Others stay as they are, because XLA for CPU copies the whole pool for the change of type.
    """
    if array.dtype.itemsize >= 4 or jnp.issubdtype(array.dtype, jnp.integer):
        return array
    return lax.bitcast_convert_type(array, jnp.dtype(f"uint{8 * array.dtype.itemsize}"))
