"""The KV cache: page arrays of every layer, as one pytree that travels through `jit`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, SupportsIndex, TypeAlias, Unpack, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array

from ..allocator import (
    BlockAllocator,
    CacheLayout,
    DecodeBatch,
    GroupBatch,
    Handle,
    PageCopies,
    ShardedAllocator,
)
from ..allocator.arguments import Ints, as_rows
from ..allocator.rows import as_handles
from ..allocator.view import AllocatorView
from ..kernels import append_and_attend, append_kv, paged_attention, shared_prefix_plan
from ..kernels.annotations import AttentionOptions, FixedScales, Layer, NewTokens, Queries, Slots
from ..kernels.checks import check_live
from ..kernels.placement import Axis
from ..sharding import Spread, split_batch
from .arrays import PageArrays
from .batches import seen
from .copying import copied
from .matching import check_sizes, matching_group
from .pools import Place, empty_pages, layout_of

__all__ = ["KVCache"]

Allocator: TypeAlias = BlockAllocator | ShardedAllocator


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True, repr=False)
class KVCache(PageArrays):
    """Pages of keys and values, one array per layer: N pages of S tokens for Hk heads of D.

    One array per layer, donated, is the layout in which XLA writes new tokens in place on CPU,
    GPU and TPU. Pass the cache through your jitted step with `donate_argnums` and use what comes
    back; the one passed in is gone. Page 0 is the null page: padding is written to it, and
    nothing is ever read from it.

    Attributes:
      k_pages: L arrays `[N, Hk, S, D]`; stacked, one `[L, N, Hk, S, D]` for each group.
      v_pages: like `k_pages`.
      k_scales: of each of these with 8 bits, int8 or float8_e4m3fn, float32 of the same axes but D:
        what the numbers of each key are multiplied by. None of the others.
      v_scales: the same for values.
      placement: how they lie on a mesh, those of the first group; None: on one device.
      layout: which layers have pages of their own; None: all lie in one group, and see all tokens.
      stacked: whether the layers of a group are one array.

    Examples:
      >>> cache = KVCache.create(
      ...     num_layers=2, num_pages=9, num_kv_heads=3, page_size=16, head_dim=64)
      >>> cache
      KVCache(2 layers, 9 pages of 16 tokens, 3 heads of 64, float32, 0.4 MiB)
    """

    @classmethod
    def create(
        cls,
        *,
        layout: CacheLayout | None = None,
        num_layers: int | None = None,
        num_pages: int | None = None,
        num_kv_heads: int | None = None,
        page_size: int | None = None,
        head_dim: int | None = None,
        dtype: Any = jnp.float32,
        mesh: Mesh | AbstractMesh | None = None,
        head_axis: Axis = None,
        data_axis: Axis = None,
        stacked: bool = False,
    ) -> KVCache:
        """Make an empty cache of layers that are alike; `num_pages` counts the null page.

        Or of a `CacheLayout`, as the allocator is then: layers see the window of their group.
        With a mesh, KV heads are split over its axis `head_axis`. If there are r times as many
        devices as heads, r devices hold each head: the arrays then have r * Hk heads, and `append`
        copies every new head r times. Over `data_axis` of R devices, rows and pages are split:
        each shard has `num_pages / R` pages, the first of which is its null page, and the ids that
        the device sees are local to it (`split`). Other axes of the mesh hold copies.
        Stacked, the layers of each group are one array, for models that scan over them: with
        `group=` the methods take a layer within a group, which may be traced.

        Raises:
          TypeError: a size is not an integer, is missing, or is given beside a layout.
          ValueError: a size is less than 1, there are fewer than 2 pages or more than 2**31 slots,
            page_size is not a power of two, or heads or pages cannot be split so.
        """
        layout = layout_of(
            layout,
            dtype,
            num_layers=num_layers,
            num_pages=num_pages,
            num_kv_heads=num_kv_heads,
            page_size=page_size,
            head_dim=head_dim,
        )
        pools, placement = empty_pages(
            layout, stacked=stacked, mesh=mesh, head_axis=head_axis, data_axis=data_axis
        )
        kept = layout if stacked or len(layout.groups) > 1 else None
        return cls(**pools, placement=placement, layout=kept, stacked=stacked)

    def append(
        self,
        layer: Layer,
        k: NewTokens,
        v: NewTokens,
        batch: DecodeBatch | Slots,
        *,
        group: int | None = None,
        fixed_scales: FixedScales | None = None,
    ) -> KVCache:
        """Write the new keys and values of a batch, of one layer; in place under donation.

        An array of slots, as `append_kv` takes it, does too. `group` and `fixed_scales` as in
        `append_and_attend`.
        """
        at = self._place(layer, group)
        slots = self._batch(at, batch).slots if isinstance(batch, DecodeBatch) else batch
        written = append_kv(
            k=self._with_copies(at, k),
            v=self._with_copies(at, v),
            slots=slots,
            layer=at.layer,
            placement=self.placement,
            fixed_scales=self._fixed(at, fixed_scales),
            **self.pools_of(at.leaf),
        )
        return self.with_pools(at.leaf, written)

    @overload
    def attend(
        self, layer: Layer, q: Queries, batch: DecodeBatch, *, group: int | None = None,
        return_lse: Literal[False] = False, **options: Unpack[AttentionOptions],
    ) -> Array: ...  # fmt: skip
    @overload
    def attend(
        self, layer: Layer, q: Queries, batch: DecodeBatch, *, group: int | None = None,
        return_lse: Literal[True], **options: Unpack[AttentionOptions],
    ) -> tuple[Array, Array]: ...  # fmt: skip
    @overload
    def attend(
        self, layer: Layer, q: Queries, batch: DecodeBatch, *, group: int | None = None,
        return_lse: bool, **options: Unpack[AttentionOptions],
    ) -> Array | tuple[Array, Array]: ...  # fmt: skip
    def attend(
        self,
        layer: Layer,
        q: Queries,
        batch: DecodeBatch,
        *,
        group: int | None = None,
        return_lse: bool = False,
        **options: Unpack[AttentionOptions],
    ) -> Array | tuple[Array, Array]:
        """`paged_attention` of `q` over one layer, through the batch's page table.

        Arguments, options and result are those of `append_and_attend`, without the new tokens.
        """
        at = self._place(layer, group)
        own = self._batch(at, batch)
        return paged_attention(
            q=q,
            page_table=own.page_table,
            seq_lens=batch.seq_lens,
            layer=at.layer,
            placement=self.placement,
            return_lse=return_lse,
            **self.pools_of(at.leaf),
            **seen(batch, own, q, options),
        )

    @overload
    def append_and_attend(
        self, layer: Layer, q: Queries, k: NewTokens, v: NewTokens, batch: DecodeBatch, *,
        group: int | None = None, fixed_scales: FixedScales | None = None,
        return_lse: Literal[False] = False,
        **options: Unpack[AttentionOptions],
    ) -> tuple[Array, KVCache]: ...  # fmt: skip
    @overload
    def append_and_attend(
        self, layer: Layer, q: Queries, k: NewTokens, v: NewTokens, batch: DecodeBatch, *,
        group: int | None = None, fixed_scales: FixedScales | None = None,
        return_lse: Literal[True],
        **options: Unpack[AttentionOptions],
    ) -> tuple[tuple[Array, Array], KVCache]: ...  # fmt: skip
    @overload
    def append_and_attend(
        self, layer: Layer, q: Queries, k: NewTokens, v: NewTokens, batch: DecodeBatch, *,
        group: int | None = None, fixed_scales: FixedScales | None = None, return_lse: bool,
        **options: Unpack[AttentionOptions],
    ) -> tuple[Array | tuple[Array, Array], KVCache]: ...  # fmt: skip
    def append_and_attend(
        self,
        layer: Layer,
        q: Queries,
        k: NewTokens,
        v: NewTokens,
        batch: DecodeBatch,
        *,
        group: int | None = None,
        fixed_scales: FixedScales | None = None,
        return_lse: bool = False,
        **options: Unpack[AttentionOptions],
    ) -> tuple[Array | tuple[Array, Array], KVCache]:
        """`append` of the batch's new tokens, then `attend`: one launch on a GPU where T = 1.

        Args:
          layer: which layer, `0 .. L-1`; within `group` where that is named, and in a stacked cache
            perhaps traced then.
          q: `[B, T, Hq, D]`.
          k: `[B, T, Hk, D]`.
          v: `[B, T, Hk, D]`.
          batch: whose slots say which of the T tokens of a row are new.
          group: the number of the group of layers that `layer` counts in; None: in all of them.
          fixed_scales: for pages of 8 bits, two float32 `[Hk]`, of keys and of values: calibrated
            ones for all tokens; None: each token has its own.
          return_lse: also return the log of the softmax denominator, without sinks.
          options: starts, scale, sliding_window, soft_cap, sinks, query_lens, tail_mask, shared and
            implementation, as in `paged_attention`. Window and starts of a group of layers need
            not be passed, nor what `share_prefixes` has found.

        Returns:
          `(out, cache)`, where out is `(out, lse)` with `return_lse`.
        """
        at = self._place(layer, group)
        own = self._batch(at, batch)
        out, lse, *written = append_and_attend(
            q=q,
            k=self._with_copies(at, k),
            v=self._with_copies(at, v),
            page_table=own.page_table,
            seq_lens=batch.seq_lens,
            slots=own.slots,
            layer=at.layer,
            placement=self.placement,
            fixed_scales=self._fixed(at, fixed_scales),
            return_lse=True,
            **self.pools_of(at.leaf),
            **seen(batch, own, q, options),
        )
        return (out, lse) if return_lse else out, self.with_pools(at.leaf, written)

    def share_prefixes(
        self,
        batch: DecodeBatch,
        *,
        members: int = 16,
        parts: int | None = None,
        min_tokens: int = 512,
    ) -> DecodeBatch:
        """The batch with what its rows share, so that steps of one token read that once.

        `shared_prefix_plan` of every group of layers that see all tokens; those with a window have
        nothing to gain. Call it in the compiled program, before the loop over its steps: it holds
        for all batches that `one_token_batch` makes of this one. Attention with T > 1 does as
        before.

        Args:
          batch: its lengths are those of the first step or fewer; 0 for a row that shares nothing.
          members: as in `shared_prefix_plan`, like the others and what is raised.
          parts: as there.
          min_tokens: as there.
        """
        sizes = dict(members=members, parts=parts, min_tokens=min_tokens)

        def with_plan(number: int, group: GroupBatch) -> GroupBatch:
            own = matching_group(batch, number, self.pools, self.page_size, shards=self.data_shards)
            if own.window is not None or own.starts is not None:
                return group
            plan = shared_prefix_plan(
                own.page_table,
                batch.seq_lens,
                page_size=self.page_size,
                placement=self.placement,
                **sizes,  # type: ignore[arg-type]
            )
            return replace(group, shared=plan)

        return replace(batch, groups=tuple(with_plan(*each) for each in enumerate(batch.groups)))

    def with_pools(self, leaf: int, pools: Iterable[Array]) -> KVCache:
        """With others at one place, in the order of `pools_of`."""
        changed: dict[str, Any] = {}
        for name, pool in zip(self.pools_of(leaf), pools, strict=True):
            leaves = list(getattr(self, name))
            leaves[leaf] = pool
            changed[name] = tuple(leaves)
        return replace(self, **changed)

    def _fixed(self, at: Place, scales: FixedScales | None) -> Any:
        """With those of every head as often as the mesh holds it."""
        if not isinstance(scales, tuple):
            return scales
        k, v = (self._with_copies(at, each, axis=-1) for each in scales)
        return k, v

    def _batch(self, at: Place, batch: DecodeBatch) -> GroupBatch:
        shards = self.data_shards
        return matching_group(batch, at.group, self.pools, self.page_size, shards=shards)

    # ---- the allocator's calls, with copy-on-write carried out and what is computed committed

    def advance(
        self,
        allocator: Allocator,
        handles: Ints,
        tokens: Ints,
        *,
        pad_to: SupportsIndex | None = None,
        columns: SupportsIndex | None = None,
        commit: bool = True,
    ) -> tuple[KVCache, DecodeBatch]:
        """One more token for each sequence, and the step that computes it; donates the cache.

        `allocator.advance`, with copy-on-write carried out, and with what earlier batches described
        of these sequences committed: a batch that was handed out counts as computed when the next
        call comes.

        Args:
          allocator: of the pool of this cache.
          handles: B distinct handles.
          tokens: int `[B]`, the newest token of each.
          pad_to: rows of the batch; None is B.
          columns: width of the page table; None is the next power of two that serves.
          commit: False leaves `allocator.commit` to the caller, who takes batches that are
            computed later, or perhaps never.

        Raises:
          OutOfPages, SequenceTooLong, StaleHandle, ValueError: nothing has changed.
        """
        self.check_allocator(allocator)
        batch, copies = allocator.advance(
            handles, tokens, pad_to=pad_to, columns=columns, commit=commit
        )
        return self.copy_pages(copies), batch

    def extend(
        self,
        allocator: Allocator,
        handles: Ints,
        tokens: Ints,
        counts: Ints | None = None,
        *,
        pad_to: SupportsIndex | None = None,
        columns: SupportsIndex | None = None,
        commit: bool = True,
    ) -> tuple[KVCache, DecodeBatch]:
        """`advance` by up to k tokens each: `allocator.append`, and the step that computes them.

        Args:
          allocator: of the pool of this cache.
          handles: B distinct handles.
          tokens: int `[B, k]`; `[k]` for one handle.
          counts: int `[B]` or one for all, how many of its tokens each row takes; None is k. A row
            with fewer than k has its padding in front.
          pad_to: as in `advance`, like the others and what is raised.
          columns: as in `advance`.
          commit: as in `advance`.
        """
        self.check_allocator(allocator)
        batch, copies = allocator.extend(
            handles, tokens, counts, pad_to=pad_to, columns=columns, commit=commit
        )
        return self.copy_pages(copies), batch

    def reserve(
        self,
        allocator: Allocator,
        handles: Ints,
        num_tokens: Ints,
        *,
        pad_to: SupportsIndex | None = None,
        columns: SupportsIndex | None = None,
        commit: bool = True,
    ) -> tuple[KVCache, DecodeBatch]:
        """Pages for that many tokens past each length, and a batch of no token that shows them.

        For k steps on the device without the host: `one_token_batch` makes the batch of each step
        of it, and afterwards `allocator.append` and `allocator.commit` say what came out. Copies
        and commits as `advance`; donates the cache.

        Args:
          allocator: of the pool of this cache.
          handles: B distinct handles.
          num_tokens: int `[B]`, or one for all; 0 or more.
          pad_to: as in `advance`.
          columns: as in `advance`.
          commit: as in `advance`.

        Raises:
          OutOfPages, SequenceTooLong, StaleHandle, ValueError: nothing has changed.
        """
        self.check_allocator(allocator)
        handle = as_handles(handles)
        count = as_rows("num_tokens", num_tokens, handle.size)
        none = np.zeros((*handle.shape, 0), np.int32)
        batch, copies = allocator.extend(
            handle, none, reserve=count, pad_to=pad_to, columns=columns, commit=commit
        )
        return self.copy_pages(copies), batch

    def fork(
        self, allocator: Allocator, handle: SupportsIndex, n: SupportsIndex = 1
    ) -> tuple[KVCache, list[Handle]]:
        """`allocator.fork`, after a commit of what earlier batches described of the sequence.

        So the forks may grow at once, without computing what they share. Nothing is copied yet.
        """
        self.check_allocator(allocator)
        return self, allocator.fork(handle, n, commit=True)

    def check_sizes(self, allocator: Allocator) -> None:
        """Refuse an allocator of pages of another size, or of another number of them."""
        check_sizes(self.pools, self.page_size, allocator)

    def check_allocator(self, allocator: Allocator) -> None:
        """Refuse an allocator of another pool, or a cache that was donated; changes nothing."""
        if not isinstance(allocator, AllocatorView):
            raise TypeError(f"allocator must be one, got {type(allocator).__name__}")
        if isinstance(self.k_pages[0], Tracer):
            raise TypeError("an allocator is the host's: call this outside jit, once a step")
        self.check_sizes(allocator)
        if self.data_shards not in (1, allocator.num_shards):
            raise ValueError(
                f"cache and allocator differ in shards: {self.data_shards} and "
                f"{allocator.num_shards}; use a ShardedAllocator with as many"
            )
        for leaf in range(len(self.k_pages)):
            for name, pool in self.pools_of(leaf).items():
                check_live(name, pool)

    def split(self, batch: DecodeBatch, sizes: Sequence[int]) -> tuple[DecodeBatch, Spread]:
        """The batch as the device takes it, and where its rows lie; see `split_batch`. Without a
        data axis it is the batch itself."""
        matching_group(batch, 0, self.pools, self.page_size)
        if self.data_shards == 1:
            rows = len(batch.seq_lens)
            return batch, Spread(None, rows, rows)
        return split_batch(
            batch,
            shards=self.data_shards,
            pages_per_shard=[pages // self.data_shards for pages, _ in self.pools],
            page_size=self.page_size,
            sizes=tuple(sizes),
        )

    def copy_pages(self, copies: PageCopies | tuple[PageCopies, ...]) -> KVCache:
        """Carry out copy-on-write; donates the cache. Without copies it is returned as it is.

        The number of copies is padded to a power of two (with null page onto null page), so that
        few programs are compiled. Of several groups of layers, copies are one for each.
        """
        each = (copies,) if isinstance(copies, PageCopies) else copies
        if len(each) != len(self.pools):
            raise ValueError(f"copies are for {len(each)} groups, the cache has {len(self.pools)}")
        cache = self
        for number, part in enumerate(each):
            if len(part.src):
                cache = cache._copied(number, part)
        return cache

    def _copied(self, group: int, copies: PageCopies) -> KVCache:
        leaves, cache = self.leaves_of(group), self
        done = copied(
            tuple(self.pools_of(leaf) for leaf in leaves),
            copies,
            num_pages=self.pools[group][0],
            placement=self.placement,
        )
        for leaf, pools in zip(leaves, done, strict=True):
            cache = cache.with_pools(leaf, pools)
        return cache
