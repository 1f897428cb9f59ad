"""Writing the cache: new tokens into their slots, and whole pages onto others."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from . import dispatch
from .annotations import Layer, NewTokens, PageIds, Pages, Slots
from .arguments import check_layer, known_layer
from .checks import (
    check_axes,
    check_float,
    check_index,
    check_live,
    check_range,
    check_twins,
    narrow,
)
from .placement import Placement
from .write import write_tokens

__all__ = ["append_kv", "copy_pages"]


def append_kv(
    k_pages: Pages,
    v_pages: Pages,
    k: NewTokens,
    v: NewTokens,
    slots: Slots,
    *,
    layer: Layer | None = None,
    placement: Placement | None = None,
) -> tuple[Array, Array]:
    """Write new K and V into their slots; donates `k_pages` and `v_pages`.

    Inside `jit` it updates in place when the caller donates the pool; outside, the given arrays
    are consumed. Read from the arrays returned: reading the old ones forces a copy of the pool.

    Args:
      k_pages: `[N, Hk, S, D]`, or `[L, N, Hk, S, D]` with `layer`.
      v_pages: like `k_pages`.
      k: `[B, Hk, D]` with slots `[B]`, or `[B, T, Hk, D]` with slots `[B, T]`; converted to the
        dtype of the pages.
      v: like `k`.
      slots: int32, `page * S + offset`. Padding points into the null page, slots `0 .. S-1`. Slots
        outside the pool write nothing under `jit`. Two equal slots outside the null page are
        the caller's fault: which one stays is undefined.
      layer: which layer of a stacked pool, a Python int or an int32 scalar; it may be traced, and
        outside the pool nothing is written then.
      placement: how the pool lies on a mesh; with a data axis, slots are local to a row's shard.

    Returns:
      The updated `(k_pages, v_pages)`.

    Raises:
      TypeError: slots not of int32 or int64, or K and V not floating-point.
      ValueError: shapes that disagree, or concrete slots outside the pool. Nothing is written.
      NotImplementedError: integer pages, which would need scales.

    Examples:
      >>> import jax.numpy as jnp
      >>> pages = jnp.zeros((2, 1, 4, 1))
      >>> new, slots = jnp.ones((1, 1, 1)), jnp.array([6])
      >>> k, v = append_kv(pages, pages + 0, new, new, slots)
      >>> k[1, 0, :, 0].tolist()
      [0.0, 0.0, 1.0, 0.0]
    """
    _check_pools(k_pages, v_pages, "N, Hk, S, D" if layer is None else "L, N, Hk, S, D")
    if layer is not None:
        check_layer(layer, k_pages.shape[0])
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
    return _append(k_pages, v_pages, k, v, slots, layer, placement, platform)


@partial(jax.jit, donate_argnums=(0, 1), static_argnums=(6, 7))
@partial(jax.named_call, name="paged_decode.append")
def _append(
    k_pages: Array,
    v_pages: Array,
    k: Array,
    v: Array,
    slots: Array,
    layer: Array | None,
    placement: Placement | None,
    platform: str,
) -> tuple[Array, Array]:
    args = [k_pages, v_pages, k, v, slots]
    if layer is not None:
        layer, outside = known_layer(layer, k_pages.shape[0])
        args = [k_pages, v_pages, k, v, jnp.where(outside, -1, slots), layer]
    write = partial(write_tokens, platform=platform)
    if placement is None:
        return write(*args)
    pages = "N, Hk, S, D" if layer is None else "L, N, Hk, S, D"
    new, place = ("B, T, Hk, D", "B, T") if slots.ndim == 2 else ("B, Hk, D", "B")
    inputs = (pages, pages, new, new, place, "")[: len(args)]
    return placement.run(write, inputs, (pages, pages), *args)


def copy_pages(
    k_pages: Pages,
    v_pages: Pages,
    src: PageIds,
    dst: PageIds,
    *,
    placement: Placement | None = None,
) -> tuple[Array, Array]:
    """Copy whole pages, `dst[i] = src[i]`, in every layer; donates `k_pages` and `v_pages`.

    All pages are read before any is written, as copy-on-write of forks needs.

    Args:
      k_pages: `[N, Hk, S, D]` or `[L, N, Hk, S, D]`.
      v_pages: like `k_pages`.
      src: int32 `[C]`, page ids to read.
      dst: int32 `[C]`, page ids to fill; distinct, but for padding, which copies 0 to 0.
      placement: how the pool lies on a mesh; with a data axis of R shards, C is a multiple of R,
        each shard's part of `src` and `dst` is its own, and the ids are local to it.

    Returns:
      The updated `(k_pages, v_pages)`.

    Raises:
      TypeError: ids not of int32 or int64.
      ValueError: shapes that disagree, or concrete ids outside the pool. Nothing is written.

    Examples:
      >>> import jax.numpy as jnp
      >>> pages = jnp.arange(3.0).reshape(3, 1, 1, 1)
      >>> k, v = copy_pages(pages, pages + 0, jnp.array([1]), jnp.array([2]))
      >>> k.ravel().tolist()
      [0.0, 1.0, 1.0]
    """
    axes = "N, Hk, S, D" if len(np.shape(k_pages)) == 4 else "L, N, Hk, S, D"
    _check_pools(k_pages, v_pages, axes)
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
    return _copy(k_pages, v_pages, src, dst, placement)


@partial(jax.jit, donate_argnums=(0, 1), static_argnums=4)
@partial(jax.named_call, name="paged_decode.copy_pages")
def _copy(
    k_pages: Array, v_pages: Array, src: Array, dst: Array, placement: Placement | None
) -> tuple[Array, Array]:
    if placement is None:
        return _copy_local(k_pages, v_pages, src, dst)
    axes = "N, Hk, S, D" if k_pages.ndim == 4 else "L, N, Hk, S, D"
    inputs = (axes, axes, "B", "B")  # copies belong to shards as rows do
    return placement.run(_copy_local, inputs, (axes, axes), k_pages, v_pages, src, dst)


def _copy_local(k_pages: Array, v_pages: Array, src: Array, dst: Array) -> tuple[Array, Array]:
    src, dst = narrow(src, k_pages.shape[-4]), narrow(dst, k_pages.shape[-4])

    # Ids from outside read zeros and write nothing: JAX would clamp them to the last page, or
    # count negative ones from the end, and copy another sequence's tokens.
    def copy(pages: Array) -> Array:
        read = pages.at[..., src, :, :, :].get(mode="fill", wrap_negative_indices=False)
        return pages.at[..., dst, :, :, :].set(read, mode="drop", wrap_negative_indices=False)

    return copy(k_pages), copy(v_pages)


def _check_pools(k_pages: Any, v_pages: Any, axes: str) -> None:
    check_axes("k_pages", k_pages, axes)
    check_twins("v_pages", v_pages, "k_pages", k_pages)
    check_live("k_pages", k_pages)
    check_live("v_pages", v_pages)
    if not jnp.issubdtype(k_pages.dtype, jnp.floating):
        raise NotImplementedError(
            f"pages of dtype {k_pages.dtype} would need scales, which this operation does not take"
        )
