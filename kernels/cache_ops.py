"""Writing the cache: new tokens into their slots, and whole pages onto others."""

from __future__ import annotations

from functools import partial
from typing import Any, overload

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from . import dispatch
from .annotations import FixedScales, Layer, NewTokens, PageIds, Pages, Scales, Slots
from .arguments import check_fixed_scales, check_layer, check_scales, known_layer
from .checks import (
    check_axes,
    check_float,
    check_index,
    check_live,
    check_range,
    check_twins,
    narrow,
)
from .eight_bits import is_eight_bits
from .placement import Placement
from .write import Pools, write_tokens

__all__ = ["append_kv", "copy_pages"]


@overload
def append_kv(
    k_pages: Pages, v_pages: Pages, k: NewTokens, v: NewTokens, slots: Slots, *,
    k_scales: None = None, v_scales: None = None, fixed_scales: None = None,
    layer: Layer | None = None, placement: Placement | None = None,
) -> tuple[Array, Array]: ...  # fmt: skip
@overload
def append_kv(
    k_pages: Pages, v_pages: Pages, k: NewTokens, v: NewTokens, slots: Slots, *,
    k_scales: Scales | None = None, v_scales: Scales | None = None,
    fixed_scales: FixedScales | None = None,
    layer: Layer | None = None, placement: Placement | None = None,
) -> tuple[Array, ...]: ...  # fmt: skip
def append_kv(
    k_pages: Pages,
    v_pages: Pages,
    k: NewTokens,
    v: NewTokens,
    slots: Slots,
    *,
    k_scales: Scales | None = None,
    v_scales: Scales | None = None,
    fixed_scales: FixedScales | None = None,
    layer: Layer | None = None,
    placement: Placement | None = None,
) -> tuple[Array, ...]:
    """Write new K and V into their slots; donates the pages and their scales.

    Inside `jit` it updates in place when the caller donates the pool; outside, the given arrays
    are consumed. Read from the arrays returned: reading the old ones forces a copy of the pool.

    Args:
      k_pages: `[N, Hk, S, D]`, or `[L, N, Hk, S, D]` with `layer`; int8 and float8_e4m3fn with
        scales.
      v_pages: like `k_pages`.
      k: `[B, Hk, D]` with slots `[B]`, or `[B, T, Hk, D]` with slots `[B, T]`; converted to the
        dtype of the pages, or quantised to it.
      v: like `k`.
      slots: int32, `page * S + offset`. Padding points into the null page, slots `0 .. S-1`. Slots
        outside the pool write nothing under `jit`. Two equal slots outside the null page are
        the caller's fault: which one stays is undefined.
      k_scales: float32 `[N, Hk, S]`, or with L in front, of pages of 8 bits. A token's is its
        largest number over that of the dtype.
      v_scales: like `k_scales`.
      fixed_scales: two float32 `[Hk]`, of keys and of values: what has been calibrated, for all
        tokens, instead of what follows from each.
      layer: which layer of a stacked pool, a Python int or an int32 scalar; it may be traced, and
        outside the pool nothing is written then.
      placement: how the pool lies on a mesh; with a data axis, slots are local to a row's shard.

    Returns:
      The updated `(k_pages, v_pages)`, or `(k_pages, v_pages, k_scales, v_scales)`.

    Raises:
      TypeError: slots not of int32 or int64, or K and V not floating-point.
      ValueError: shapes that disagree, or concrete slots outside the pool. Nothing is written.
      NotImplementedError: pages of integers, or of 8 bits without scales.

    Examples:
      >>> import jax.numpy as jnp
      >>> pages = jnp.zeros((2, 1, 4, 1))
      >>> new, slots = jnp.ones((1, 1, 1)), jnp.array([6])
      >>> k, v = append_kv(pages, pages + 0, new, new, slots)
      >>> k[1, 0, :, 0].tolist()
      [0.0, 0.0, 1.0, 0.0]
    """
    pools = _checked_pools(k_pages, v_pages, k_scales, v_scales, stacked=layer is not None)
    if layer is not None:
        check_layer(layer, k_pages.shape[0])
    check_fixed_scales(fixed_scales, k_pages, k_scales)
    check_index("slots", slots)
    if len(slots.shape) not in (1, 2):
        raise ValueError(f"slots must be [B] or [B, T]; got shape {slots.shape}")
    axes = "B, T, Hk, D" if len(slots.shape) == 2 else "B, Hk, D"
    pages, heads, page_size, dim = k_pages.shape[-4:]
    sizes = dict(zip(("B", "T"), slots.shape, strict=False)) | {"Hk": heads, "D": dim}
    for name, new in (("k", k), ("v", v)):
        check_float(name, new)
        check_axes(name, new, axes, **sizes)
    if placement is not None:
        placement.check(slots.shape[0])
        pages //= placement.data_shards
    check_range("slots", slots, pages * page_size)
    platform = dispatch.default_platform(placement.platform if placement else None)
    return _append(pools, k, v, slots, layer, fixed_scales, placement, platform)


@partial(jax.jit, donate_argnums=0, static_argnums=(6, 7))
@partial(jax.named_call, name="paged_decode.append")
def _append(
    pools: Pools,
    k: Array,
    v: Array,
    slots: Array,
    layer: Array | None,
    fixed_scales: FixedScales | None,
    placement: Placement | None,
    platform: str,
) -> Pools:
    if layer is not None:
        layer, outside = known_layer(layer, pools[0].shape[0])
        slots = jnp.where(outside, -1, slots)
    rest = [each for each in (layer, *(fixed_scales or ())) if each is not None]

    def local(*args: Array) -> Pools:
        own, (k, v, slots, *rest) = args[: len(pools)], args[len(pools) :]
        at = rest.pop(0) if layer is not None else None
        fixed = (rest[0], rest[1]) if rest else None
        return write_tokens(own, k, v, slots, at, fixed_scales=fixed, platform=platform)

    args = (*pools, k, v, slots, *rest)
    if placement is None:
        return local(*args)
    axes = _axes(pools, stacked=layer is not None)
    new, place = ("B, T, Hk, D", "B, T") if slots.ndim == 2 else ("B, Hk, D", "B")
    inputs = (*axes, new, new, place, *(("",) if layer is not None else ()), "Hk", "Hk")
    return placement.run(local, inputs[: len(args)], axes, *args)


@overload
def copy_pages(
    k_pages: Pages, v_pages: Pages, src: PageIds, dst: PageIds, *,
    k_scales: None = None, v_scales: None = None, placement: Placement | None = None,
) -> tuple[Array, Array]: ...  # fmt: skip
@overload
def copy_pages(
    k_pages: Pages, v_pages: Pages, src: PageIds, dst: PageIds, *,
    k_scales: Scales | None = None, v_scales: Scales | None = None,
    placement: Placement | None = None,
) -> tuple[Array, ...]: ...  # fmt: skip
def copy_pages(
    k_pages: Pages,
    v_pages: Pages,
    src: PageIds,
    dst: PageIds,
    *,
    k_scales: Scales | None = None,
    v_scales: Scales | None = None,
    placement: Placement | None = None,
) -> tuple[Array, ...]:
    """Copy whole pages, `dst[i] = src[i]`, in every layer; donates the pages and their scales.

    All pages are read before any is written, as copy-on-write of forks needs.

    Args:
      k_pages: `[N, Hk, S, D]` or `[L, N, Hk, S, D]`.
      v_pages: like `k_pages`.
      src: int32 `[C]`, page ids to read.
      dst: int32 `[C]`, page ids to fill; distinct, but for padding, which copies 0 to 0.
      k_scales: float32, the axes of `k_pages` but D, of pages of 8 bits.
      v_scales: like `k_scales`.
      placement: how the pool lies on a mesh; with a data axis of R shards, C is a multiple of R,
        each shard's part of `src` and `dst` is its own, and the ids are local to it.

    Returns:
      The updated `(k_pages, v_pages)`, or `(k_pages, v_pages, k_scales, v_scales)`.

    Raises:
      TypeError: ids not of int32 or int64.
      ValueError: shapes that disagree, or concrete ids outside the pool. Nothing is written.
      NotImplementedError: pages of integers, or of 8 bits without scales.

    Examples:
      >>> import jax.numpy as jnp
      >>> pages = jnp.arange(3.0).reshape(3, 1, 1, 1)
      >>> k, v = copy_pages(pages, pages + 0, jnp.array([1]), jnp.array([2]))
      >>> k.ravel().tolist()
      [0.0, 1.0, 1.0]
    """
    stacked = len(np.shape(k_pages)) != 4
    pools = _checked_pools(k_pages, v_pages, k_scales, v_scales, stacked=stacked)
    check_index("src", src)
    check_axes("src", src, "C")
    check_index("dst", dst)
    check_axes("dst", dst, "C", C=src.shape[0])
    pages = k_pages.shape[-4]
    if placement is not None:
        placement.check(src.shape[0])
        pages //= placement.data_shards
    check_range("src", src, pages)
    check_range("dst", dst, pages)
    return _copy(pools, src, dst, placement)


@partial(jax.jit, donate_argnums=0, static_argnums=3)
@partial(jax.named_call, name="paged_decode.copy_pages")
def _copy(pools: Pools, src: Array, dst: Array, placement: Placement | None) -> Pools:
    stacked = pools[0].ndim == 5
    before = (slice(None),) * stacked

    # Ids from outside read zeros and write nothing: JAX would clamp them to the last page, or
    # count negative ones from the end, and copy another sequence's tokens.
    def local(*args: Array) -> Pools:
        *own, src, dst = args
        pages = own[0].shape[-4]
        src, dst = (*before, narrow(src, pages)), (*before, narrow(dst, pages))
        read = (pool.at[src].get(mode="fill", wrap_negative_indices=False) for pool in own)
        return tuple(
            pool.at[dst].set(copies, mode="drop", wrap_negative_indices=False)
            for pool, copies in zip(own, read, strict=True)
        )

    if placement is None:
        return local(*pools, src, dst)
    axes = _axes(pools, stacked=stacked)
    return placement.run(local, (*axes, "B", "B"), axes, *pools, src, dst)  # shards have copies


def _axes(pools: Pools, *, stacked: bool) -> tuple[str, ...]:
    """The names of the axes of each pool."""
    pages = "L, N, Hk, S, D" if stacked else "N, Hk, S, D"
    return (pages, pages, *(pages.removesuffix(", D") for _ in pools[2:]))


def _checked_pools(
    k_pages: Any, v_pages: Any, k_scales: Any, v_scales: Any, *, stacked: bool
) -> tuple[Any, ...]:
    check_axes("k_pages", k_pages, "L, N, Hk, S, D" if stacked else "N, Hk, S, D")
    check_twins("v_pages", v_pages, "k_pages", k_pages)
    check_live("k_pages", k_pages)
    check_live("v_pages", v_pages)
    check_scales(k_pages, k_scales, v_scales)
    if k_scales is not None:
        return k_pages, v_pages, k_scales, v_scales
    dtype = np.dtype(k_pages.dtype)
    if is_eight_bits(dtype):
        raise NotImplementedError(f"pages of dtype {dtype} need k_scales and v_scales")
    if dtype.itemsize == 1 or not jnp.issubdtype(dtype, jnp.floating):
        raise NotImplementedError(
            f"pages of dtype {dtype} are not served, only float32, bfloat16, float16, and int8 and "
            "float8_e4m3fn with scales"
        )
    return k_pages, v_pages
