"""Which arrays a cache consists of.

A cache is a pytree of arrays `[N, ...]` with a page per index of axis 0, or stacked `[L, N, ...]`.
Its parts are named by their place in the tree, so that a stack and a tuple of layers have the same
parts (`kv/k_pages/0` and so on), and one can be saved and the other restored. In which group of
layers a part is, is no part of its name: a group may be split when its snapshot is restored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from .._text import printable, shown
from ..allocator import BlockAllocator
from ..allocator.calls import AllocatorCalls
from ..cache import KVCache
from ..kernels.checks import check_live
from ._format import DTYPES, MAX_AXES, ArraySpec, layer_of
from ._names import MAX_NAME_BYTES, is_name

__all__ = ["Part", "parts_of"]


@dataclass(frozen=True, slots=True)
class Part:
    """One page array of the cache: a leaf, or one layer of a stacked leaf."""

    name: str
    leaf: int
    layer: int | None
    shape: tuple[int, ...]  # of one page, with every KV head once
    dtype: str
    copies: int  # of every KV head in the cache, one behind the other on axis 0 of a page
    group: int = 0  # of layers, whose pages it has

    def spec(self, pages: int) -> ArraySpec:
        return ArraySpec(self.name, self.dtype, (pages, *self.shape))


def parts_of(cache: Any, allocator: BlockAllocator) -> list[Part]:
    """The page arrays of a cache, in the order of its tree.

    Raises:
      ValueError: a leaf has no axis of N pages, or it cannot be told which one it is; names
        that the format does not have.
      TypeError: a leaf is no array, or the allocator is none.
      NotImplementedError: a dtype that the format does not have; pages that are not those of one
        pool.
    """
    if not isinstance(allocator, AllocatorCalls):
        kind = type(allocator).__name__
        raise TypeError(f"allocator must be a BlockAllocator, got {kind}: the cache comes first")
    placement = getattr(cache, "placement", None)
    if placement is not None and placement.data_shards > 1:
        raise NotImplementedError(
            f"snapshots hold one pool; this cache has {placement.data_shards} data shards with "
            "pages of their own: split it over no data_axis"
        )
    pools, layout = allocator.pools, getattr(cache, "layout", None)
    if len(pools) != (known := 1 if layout is None else len(layout.groups)):
        raise ValueError(
            f"the allocator has {len(pools)} groups of layers, the cache {known}: make both of the "
            "same layout (a tree that is no KVCache has one group)"
        )
    leaves, _ = jax.tree_util.tree_flatten_with_path(cache)
    if not leaves:
        raise ValueError("the cache has no arrays")
    parts: list[Part] = []
    for at, (path, leaf) in enumerate(leaves):
        parts += _parts_of_leaf(cache, path, at, leaf, pools)
    if layout is not None:  # as they come where each layer is an array
        parts.sort(key=lambda part: (part.name.rpartition("/")[0], layer_of(part.name)))
    _require_storable(parts)
    return parts


def _parts_of_leaf(
    cache: Any, path: tuple[Any, ...], at: int, leaf: Any, pools: Sequence[tuple[int, int | None]]
) -> list[Part]:
    name = "kv/" + jax.tree_util.keystr(path, simple=True, separator="/")
    check_live(name, leaf)
    if not hasattr(leaf, "dtype"):
        raise TypeError(f"{printable(name)} is no array but {type(leaf).__name__}")
    dtype = str(np.dtype(leaf.dtype))
    if dtype not in DTYPES:
        raise NotImplementedError(f"{printable(name)}: snapshots do not hold {dtype}")
    group, layers, copies = _place_of(cache, path)
    known = cache.stacked if isinstance(cache, KVCache) else None
    stacked = _is_stacked(name, tuple(leaf.shape), pools[group][0], known)
    page = tuple(leaf.shape[1 + int(stacked) :])
    if copies > 1:
        page = (page[0] // copies, *page[1:])
    if not stacked:
        return [Part(name, at, None, page, dtype, copies, group)]
    if layers is None:
        names = [f"{name}/{i}" for i in range(leaf.shape[0])]
    else:
        names = [f"{name.rpartition('/')[0]}/{layer}" for layer in layers]
    return [Part(each, at, i, page, dtype, copies, group) for i, each in enumerate(names)]


def _place_of(cache: Any, path: tuple[Any, ...]) -> tuple[int, Sequence[int] | None, int]:
    """The group of a leaf, its layers if they are known, and the copies of each KV head in it."""
    layout = getattr(cache, "layout", None)
    if layout is None:
        placement = getattr(cache, "placement", None)
        return 0, None, 1 if placement is None else placement.kv_copies
    at = path[-1].idx
    group = at if cache.stacked else cache.group_of(at)
    layers = layout.groups[group].layers if cache.stacked else (at,)
    return group, layers, cache.kv_copies(layers[0]) if layers else 1


def _is_stacked(name: str, shape: tuple[int, ...], num_pages: int, known: bool | None) -> bool:
    """Whether a leaf is `[L, N, ...]` and not `[N, ...]`; `known` where it cannot be in doubt."""
    # Pages of five axes would be a stack, even if it has as many layers as the pool has pages.
    stacked = len(shape) > 4 or shape[:1] != (num_pages,) if known is None else known
    if not stacked and shape[1:2] == shape[:1] and known is None:
        raise ValueError(
            f"{printable(name)} has shape {list(shape)}: either of its first two axes may be that "
            f"of the allocator's N = {num_pages} pages; give the pool another size"
        )
    if shape[int(stacked) : int(stacked) + 1] != (num_pages,):
        raise ValueError(
            f"{printable(name)} has shape {list(shape)}: expected [N, ...] or, stacked, "
            f"[L, N, ...] with the allocator's N = {num_pages} pages"
        )
    return stacked


def _require_storable(parts: list[Part]) -> None:
    names = [part.name for part in parts]
    if len(set(names)) < len(names):
        same = sorted(name for name in set(names) if names.count(name) > 1)
        raise ValueError(f"two arrays of the cache have the same path: {shown(same)}")
    for part in parts:
        if not is_name(part.name):
            raise ValueError(
                f"the path of an array may have {MAX_NAME_BYTES} bytes of Unicode: "
                f"{shown(part.name)}"
            )
        if 1 + len(part.shape) > MAX_AXES:
            raise ValueError(
                f"{printable(part.name)} has {len(part.shape)} axes in a page, the format has "
                f"{MAX_AXES - 1} at most"
            )
