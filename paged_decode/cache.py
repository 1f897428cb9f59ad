"""The KV cache: page arrays of every layer, as one pytree that travels through `jit`."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, Float, Int

from .allocator import DecodeBatch, PageCopies
from .kernels import Placement, append_and_attend, append_kv, copy_pages, paged_attention
from .kernels.checks import AnyArray, check_live
from .kernels.placement import Axis
from .sharding import Spread, split_batch, split_copies

__all__ = ["DecodeBatch", "KVCache", "PageCopies"]

# The class lives with the allocator, which never imports jax; here it becomes a pytree.
jax.tree_util.register_dataclass(
    DecodeBatch, data_fields=["page_table", "seq_lens", "positions", "slots"], meta_fields=[]
)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class KVCache:
    """Pages of keys and values, one array per layer: N pages of S tokens for Hk heads of D.

    One array per layer, donated, is the layout in which XLA writes new tokens in place on CPU,
    GPU and TPU. Pass the cache through your jitted step with `donate_argnums` and use what comes
    back; the one passed in is gone. Page 0 is the null page: padding is written to it, and
    nothing is ever read from it.

    Attributes:
      k_pages: L arrays `[N, Hk, S, D]`.
      v_pages: L arrays `[N, Hk, S, D]`.
      placement: how they lie on a mesh, or None: on one device.

    Example:
      >>> cache = KVCache.create(
      ...     num_layers=2, num_pages=9, num_kv_heads=3, page_size=16, head_dim=64)
      >>> cache
      KVCache(2 layers, 9 pages of 16 tokens, 3 heads of 64, float32, 0.4 MiB)
    """

    k_pages: tuple[Any, ...]
    v_pages: tuple[Any, ...]
    placement: Placement | None = field(default=None, metadata=dict(static=True))

    @classmethod
    def create(
        cls,
        *,
        num_layers: int,
        num_pages: int,
        num_kv_heads: int,
        page_size: int,
        head_dim: int,
        dtype: Any = jnp.float32,
        mesh: Mesh | AbstractMesh | None = None,
        head_axis: Axis = None,
        data_axis: Axis = None,
    ) -> KVCache:
        """Make an empty cache; `num_pages` counts the null page.

        With a mesh, KV heads are split over its axis `head_axis`. If there are r times as many
        devices as heads, r devices hold each head: the arrays then have r * Hk heads, and `append`
        copies every new head r times. Over `data_axis` of R devices, rows and pages are split:
        each shard has `num_pages / R` pages, the first of which is its null page, and the ids that
        the device sees are local to it (`split`). Other axes of the mesh hold copies.

        Raises:
          ValueError: a size is not a positive integer, there are fewer than 2 pages,
            page_size is no power of two, or heads or pages cannot be split so.
        """
        sizes = dict(
            num_layers=num_layers,
            num_pages=num_pages,
            num_kv_heads=num_kv_heads,
            page_size=page_size,
            head_dim=head_dim,
        )
        for name, size in sizes.items():
            if isinstance(size, bool) or not isinstance(size, int | np.integer) or size < 1:
                raise ValueError(f"{name} must be a positive integer, got {size!r}")
        if num_pages < 2:
            raise ValueError(
                f"num_pages must be at least 2 (page 0 is the null page), got {num_pages}"
            )
        if page_size & (page_size - 1):
            raise ValueError(f"page_size must be a power of two, got {page_size}")
        if (mesh is None) != (head_axis is None and data_axis is None):
            raise ValueError(
                f"mesh and head_axis or data_axis go together; got {mesh}, {head_axis!r} and "
                f"{data_axis!r}"
            )
        placement, where = None, None
        if mesh is not None:
            placement = Placement.create(
                mesh,
                num_kv_heads=num_kv_heads,
                num_pages=num_pages,
                head_axis=head_axis,
                data_axis=data_axis,
            )
            num_kv_heads *= placement.kv_copies
            where = placement.sharding("N, Hk, S, D")
        shape = (num_pages, num_kv_heads, page_size, head_dim)
        pages = tuple(jnp.zeros(shape, dtype, device=where) for _ in range(2 * num_layers))
        return cls(pages[:num_layers], pages[num_layers:], placement)

    @property
    def num_layers(self) -> int:
        """L."""
        return len(self.k_pages)

    @property
    def num_pages(self) -> int:
        """N, the null page included."""
        return self.k_pages[0].shape[0]

    @property
    def page_size(self) -> int:
        """S, in tokens."""
        return self.k_pages[0].shape[2]

    @property
    def page_bytes(self) -> int:
        """Bytes of one page over all layers, keys and values."""
        return sum(a.nbytes // a.shape[0] for a in (*self.k_pages, *self.v_pages))

    @property
    def is_deleted(self) -> bool:
        """Whether the arrays were given away by donation."""
        return any(getattr(a, "is_deleted", lambda: False)() for a in self.k_pages)

    def append(
        self,
        layer: int,
        k: Float[AnyArray, "B T Hk D"] | Float[AnyArray, "B Hk D"],
        v: Float[AnyArray, "B T Hk D"] | Float[AnyArray, "B Hk D"],
        slots: Int[AnyArray, "B T"] | Int[AnyArray, " B"],
    ) -> KVCache:
        """Write new keys and values of one layer to their slots; in place under donation."""
        layer = self._known(layer)
        pools = self.k_pages[layer], self.v_pages[layer]
        new = self._with_copies(k), self._with_copies(v)
        pools = append_kv(*pools, *new, slots, placement=self.placement)
        return self._with_layer(layer, *pools)

    def attend(self, layer: int, q: AnyArray, batch: DecodeBatch, **options: Any) -> Any:
        """`paged_attention` of `q` over one layer, through the batch's page table."""
        layer = self._known(layer)
        return paged_attention(
            q,
            self.k_pages[layer],
            self.v_pages[layer],
            batch.page_table,
            batch.seq_lens,
            placement=self.placement,
            **options,
        )

    def append_and_attend(
        self, layer: int, q: AnyArray, k: AnyArray, v: AnyArray, batch: DecodeBatch, **options: Any
    ) -> tuple[Any, KVCache]:
        """`append` of the batch's new tokens, then `attend`: one launch on a GPU where T = 1.

        Args:
          layer: which layer, `0 .. L-1`.
          q: `[B, T, Hq, D]`.
          k: `[B, T, Hk, D]`.
          v: `[B, T, Hk, D]`.
          batch: whose slots say which of the T tokens of a row are new.
          options: those of `paged_attention`.

        Returns:
          `(out, cache)`, where out is `(out, lse)` with `return_lse`.
        """
        layer = self._known(layer)
        *out, k_pages, v_pages = append_and_attend(
            q,
            self._with_copies(k),
            self._with_copies(v),
            self.k_pages[layer],
            self.v_pages[layer],
            batch.page_table,
            batch.seq_lens,
            slots=batch.slots,
            placement=self.placement,
            **options,
        )
        return (out[0] if len(out) == 1 else tuple(out)), self._with_layer(layer, k_pages, v_pages)

    def _known(self, layer: int) -> int:
        """The number of a layer of ours; to a tuple, -1 would be the last one."""
        try:
            index = None if isinstance(layer, bool | np.bool_ | Tracer) else operator.index(layer)
        except TypeError:
            index = None
        if index is None:
            raise TypeError(
                f"layer must be a Python int, because layers are a tuple; got {layer!r}: unroll "
                "them, or scan over one stacked pool with append_and_attend(..., layer=layer)"
            )
        if not 0 <= index < self.num_layers:
            raise ValueError(f"layer must be in 0 .. {self.num_layers - 1}; got {index}")
        return index

    def _with_copies(self, new: AnyArray) -> AnyArray:
        """New keys or values with every head as often as the mesh holds it."""
        copies = self.placement.kv_copies if self.placement else 1
        if copies == 1 or copies * new.shape[-2] != self.k_pages[0].shape[1]:  # heads are local
            return new
        return jnp.repeat(jnp.asarray(new), copies, axis=-2)

    def _with_layer(self, layer: int, k_pages: Array, v_pages: Array) -> KVCache:
        return replace(
            self,
            k_pages=(*self.k_pages[:layer], k_pages, *self.k_pages[layer + 1 :]),
            v_pages=(*self.v_pages[:layer], v_pages, *self.v_pages[layer + 1 :]),
        )

    @property
    def data_shards(self) -> int:
        """R, into how many parts rows and pages are split."""
        return self.placement.data_shards if self.placement else 1

    def split(self, batch: DecodeBatch, sizes: Sequence[int]) -> tuple[DecodeBatch, Spread]:
        """The batch as the device takes it, and where its rows lie; see `split_batch`.

        Without a data axis it is the batch itself.
        """
        if self.data_shards == 1:
            rows = len(batch.seq_lens)
            return batch, Spread(None, rows, rows)
        return split_batch(
            batch,
            shards=self.data_shards,
            pages_per_shard=self.num_pages // self.data_shards,
            page_size=self.page_size,
            sizes=tuple(sizes),
        )

    def copy_pages(self, copies: PageCopies) -> KVCache:
        """Carry out copy-on-write; donates the cache. Without copies it is returned as it is.

        The number of copies is padded to a power of two (with null page onto null page), so that
        few programs are compiled.
        """
        if len(copies.src) == 0:
            return self
        check_live("k_pages", self.k_pages[0])
        if (shards := self.data_shards) > 1:
            pages = self.num_pages // shards
            return _copy_pages(self, *split_copies(copies, shards=shards, pages_per_shard=pages))
        width = 1 << (len(copies.src) - 1).bit_length()
        src, dst = (np.zeros(width, np.int32) for _ in range(2))
        src[: len(copies.src)], dst[: len(copies.dst)] = copies.src, copies.dst
        return _copy_pages(self, src, dst)

    def __repr__(self) -> str:
        first = self.k_pages[0]
        if not hasattr(first, "nbytes"):  # inside a transformation
            return f"KVCache({self.num_layers} layers)"
        pages, heads, page_size, head_dim = first.shape
        mib = self.page_bytes * pages / 2**20
        return (
            f"KVCache({self.num_layers} layers, {pages} pages of {page_size} tokens, "
            f"{heads} heads of {head_dim}, {first.dtype}, {mib:.1f} MiB)"
        )


@partial(jax.jit, donate_argnums=0)
def _copy_pages(cache: KVCache, src: Int[Array, " C"], dst: Int[Array, " C"]) -> KVCache:
    pairs = [
        copy_pages(k, v, src, dst, placement=cache.placement)
        for k, v in zip(cache.k_pages, cache.v_pages, strict=True)
    ]
    return replace(cache, k_pages=tuple(k for k, _ in pairs), v_pages=tuple(v for _, v in pairs))
