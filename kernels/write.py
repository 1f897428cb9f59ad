"""Where new tokens are written outside a kernel that attends: in place under donation."""

from types import ModuleType
from typing import TypeAlias

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int32

from .annotations import FixedScales
from .checks import narrow
from .eight_bits import quantise

__all__ = ["Pools", "as_stored", "write_tokens"]

Pools: TypeAlias = tuple[Array, ...]
"""Pages of keys and of values, `[N, Hk, S, D]` or `[L, N, Hk, S, D]`; those of 8 bits with the
scales of keys and of values behind them, which have no D."""


def write_tokens(
    pools: Pools,
    k: Float[Array, "*rows Hk D"],
    v: Float[Array, "*rows Hk D"],
    slots: Int[Array, "*rows"],
    layer: Int32[Array, ""] | None = None,
    *,
    fixed_scales: FixedScales | None = None,
    platform: str,
) -> Pools:
    """The pools with k and v in their slots, of `layer` if stacked; slots outside write nothing.

    The pages come with the axes that the caller's have. Through a view with one axis more or less
    XLA for CPU copies the whole pool where Hk, S or D is 1. XLA for TPU copies every pool that is
    stacked or of 8 bits before it scatters; there a kernel writes it, as on GPU one does for K and
    V together.
    """
    pages, page_size = pools[0].shape[-4], pools[0].shape[-2]
    if platform == "gpu" and (write := _triton_write()):
        (k, v), where = _in_a_row((k, v), slots, pages * page_size)
        stacked, layer = _stacked(pools, layer)
        written = write.write_tokens(stacked, k, v, where, layer, fixed_scales)
        return tuple(new.reshape(old.shape) for new, old in zip(written, pools, strict=True))
    new = as_stored(pools, k, v, fixed_scales)
    if platform == "tpu" and (layer is not None or len(pools) == 4):
        from .pallas_tpu import write

        if write.serves(pools):
            new, where = _in_a_row(new, slots, pages * page_size)
            stacked, layer = _stacked(pools, layer)
            written = write.write_tokens(stacked, new, where, layer)
            return tuple(new.reshape(old.shape) for new, old in zip(written, pools, strict=True))
    if slots.size == 1:  # XLA makes a select over the whole pool of a scatter of one row
        outside = jnp.full_like(slots.reshape(1), pages * page_size)
        row, slots = slots.ndim, jnp.concatenate([slots.reshape(1), outside])
        new = tuple(jnp.repeat(each.reshape(1, *each.shape[row:]), 2, axis=0) for each in new)
    page, offset = narrow(slots // page_size, pages), narrow(slots % page_size, page_size)
    where = (page, slice(None), offset) if layer is None else (layer, page, slice(None), offset)
    return tuple(
        pool.at[where].set(each, mode="drop", wrap_negative_indices=False)
        for pool, each in zip(pools, new, strict=True)
    )


def as_stored(
    pools: Pools, k: Array, v: Array, fixed_scales: FixedScales | None = None
) -> tuple[Array, ...]:
    """The new tokens as each pool holds them."""
    if len(pools) == 2:
        return k.astype(pools[0].dtype), v.astype(pools[1].dtype)
    fixed = (None, None)
    if fixed_scales is not None:
        fixed = (jnp.broadcast_to(each, k.shape[:-1]) for each in fixed_scales)
    found = [quantise(each, pools[0].dtype, own) for each, own in zip((k, v), fixed, strict=True)]
    numbers, scales = zip(*found, strict=True)
    return *numbers, *scales


def _stacked(pools: Pools, layer: Int32[Array, ""] | None) -> tuple[Pools, Int32[Array, ""]]:
    """The pools with a layer axis, and the layer that is written."""
    if layer is None:
        return tuple(pool.reshape(1, *pool.shape) for pool in pools), jnp.int32(0)
    return pools, layer


def _in_a_row(
    new: tuple[Array, ...], slots: Array, slot_end: int
) -> tuple[tuple[Array, ...], Array]:
    """The tokens of all rows, one after the other, and their slots."""
    new = tuple(each.reshape(-1, *each.shape[slots.ndim :]) for each in new)
    return new, narrow(slots.reshape(-1), slot_end)


def _triton_write() -> ModuleType | None:
    """The module with the kernel for GPUs, where it can be launched."""
    try:
        from .triton import write
    except ImportError:  # no triton
        return None
    return write if write.serves() else None
