"""What a cache is made of: the page arrays of all layers, their sizes and where they lie."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ..allocator import CacheLayout
from ..kernels import Placement
from ..kernels.annotations import Layer
from ..kernels.checks import AnyArray
from ..kernels.record import POOLS
from .pools import Place, alike, place_of

__all__ = ["PageArrays"]

T = TypeVar("T")
if TYPE_CHECKING:
    Leaf: TypeAlias = Array
else:
    Leaf = Any  # a transformation of the pytree may put shapes, shardings or None there


@dataclass(frozen=True, slots=True)
class PageArrays:
    """The arrays of a `KVCache`, which says what they are; by themselves they compute nothing."""

    k_pages: tuple[Leaf, ...]
    v_pages: tuple[Leaf, ...]
    placement: Placement | None = field(default=None, metadata=dict(static=True))
    layout: CacheLayout | None = field(default=None, metadata=dict(static=True))
    stacked: bool = field(default=False, metadata=dict(static=True))
    k_scales: tuple[Leaf | None, ...] = ()
    v_scales: tuple[Leaf | None, ...] = ()

    def pools_of(self, leaf: int) -> dict[str, Leaf]:
        """By name, the pages of keys and values at one place in their tuples, and their scales if
        they have some."""
        named = {name: getattr(self, name) for name in POOLS}
        found = {name: leaves[leaf] for name, leaves in named.items() if leaves}
        return {name: pool for name, pool in found.items() if pool is not None}

    @property
    def num_layers(self) -> int:
        """L."""
        return len(self.k_pages) if self.layout is None else self.layout.num_layers

    @property
    def num_pages(self) -> int:
        """N, the null page included; of the first group of layers."""
        return self.pools[0][0]

    @property
    def pools(self) -> tuple[tuple[int, int | None], ...]:
        """Pages and window of every group of layers."""
        if self.layout is None:
            return ((self.k_pages[0].shape[-4], None),)
        return self.layout.pools

    def group_of(self, layer: int) -> int:
        """The number of a layer's group."""
        return 0 if self.layout is None else self.layout.group_of[layer]

    def kv_copies(self, layer: int) -> int:
        """How many devices of the mesh hold each KV head of a layer."""
        return self._copies(self.group_of(layer))

    def _copies(self, group: int) -> int:
        if self.placement is None or self.layout is None:
            return self.placement.kv_copies if self.placement else 1
        return self.placement.copies_of(self.layout.groups[group].num_kv_heads)

    @property
    def page_size(self) -> int:
        """S, in tokens."""
        return self.k_pages[0].shape[-2]

    @property
    def num_kv_heads(self) -> int:
        """Hk, without the copies that a mesh holds; like `head_dim`, what all layers have.

        Raises:
          ValueError: layers differ; ask `layout.groups` for those of each group.
        """

        def heads(group: int, pages: Leaf) -> int:
            return max(pages.shape[-3] // self._copies(group), 1)  # 1: local in a `shard_map`

        return self._alike("num_kv_heads", heads)

    @property
    def head_dim(self) -> int:
        """D, of all layers; ValueError if they differ, as in `num_kv_heads`."""
        return self._alike("head_dim", lambda _, pages: pages.shape[-1])

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the pages of all layers; ValueError if they differ, as in `num_kv_heads`."""
        return self._alike("dtype", lambda _, pages: np.dtype(pages.dtype))

    def _alike(self, name: str, of: Callable[[int, Leaf], T]) -> T:
        groups = [i for i, layers in enumerate(self._groups) if layers]
        return alike(name, {i: of(i, self.k_pages[self.leaves_of(i)[0]]) for i in groups})

    @property
    def page_bytes(self) -> int:
        """Bytes of one page over all layers, keys, values and scales; of groups, of one page of
        each."""
        each = map(self.pools_of, range(len(self.k_pages)))
        return sum(
            pool.nbytes // pools["k_pages"].shape[-4] for pools in each for pool in pools.values()
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all pages and their scales."""
        each = map(self.pools_of, range(len(self.k_pages)))
        return sum(pool.nbytes for pools in each for pool in pools.values())

    @property
    def is_deleted(self) -> bool:
        """Whether the arrays were given away by donation."""
        return any(getattr(a, "is_deleted", lambda: False)() for a in self.k_pages)

    def _place(self, layer: Layer, group: int | None) -> Place:
        return place_of(layer, group, self._groups, stacked=self.stacked)

    @property
    def _groups(self) -> list[Sequence[int]]:
        """The layers of each."""
        if self.layout is None:
            return [range(self.num_layers)]
        return [group.layers for group in self.layout.groups]

    def _with_copies(self, at: Place, new: AnyArray, axis: int = -2) -> AnyArray:
        """New keys or values with every head as often as the mesh holds it."""
        copies, heads = self._copies(at.group), self.k_pages[at.leaf].shape[-3]
        if copies == 1 or copies * new.shape[axis] != heads:  # heads are local
            return new
        return jnp.repeat(jnp.asarray(new), copies, axis=axis)

    def leaves_of(self, group: int) -> tuple[int, ...]:
        """Which of `k_pages` and `v_pages` are of one group of layers."""
        if self.stacked:
            return (group,)
        return (
            tuple(range(self.num_layers))
            if self.layout is None
            else self.layout.groups[group].layers
        )

    @property
    def data_shards(self) -> int:
        """R, into how many parts rows and pages are split."""
        return self.placement.data_shards if self.placement else 1

    def __repr__(self) -> str:
        if not hasattr(self.k_pages[0], "nbytes"):  # inside a transformation
            return f"KVCache({self.num_layers} layers)"
        mib = f"{self.nbytes / 2**20:.1f} MiB"
        if self.layout is not None:
            each = ", ".join(
                f"{len(group.layers)} layers with {group.num_pages} pages"
                + (f" for windows of {group.window}" if group.window else "")
                for group in self.layout.groups
            )
            return f"KVCache({each}; pages of {self.page_size} tokens, {mib})"
        pages, heads, page_size, head_dim = self.k_pages[0].shape
        return (
            f"KVCache({self.num_layers} layers, {pages} pages of {page_size} tokens, "
            f"{heads} heads of {head_dim}, {self.k_pages[0].dtype}, {mib})"
        )
