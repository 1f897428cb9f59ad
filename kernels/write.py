"""Where new tokens are written outside a kernel that attends: in place under donation."""

from types import ModuleType

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int32, Num

from .checks import narrow

__all__ = ["write_tokens"]


def write_tokens(
    k_pages: Num[Array, "N Hk S D"] | Num[Array, "L N Hk S D"],
    v_pages: Num[Array, "N Hk S D"] | Num[Array, "L N Hk S D"],
    k: Float[Array, "*rows Hk D"],
    v: Float[Array, "*rows Hk D"],
    slots: Int[Array, "*rows"],
    layer: Int32[Array, ""] | None = None,
    *,
    platform: str,
) -> tuple[Array, Array]:
    """The pages with k and v in their slots, of `layer` if stacked; slots outside write nothing.

    The pages come with the axes that the caller's have. Through a view with one axis more or less
    XLA for CPU copies the whole pool where Hk, S or D is 1. XLA for TPU copies every stacked pool
    before it scatters; there a kernel writes it, as on GPU one does for K and V together.
    """
    pages, page_size = k_pages.shape[-4], k_pages.shape[-2]
    if platform == "tpu" and layer is not None:
        from .pallas_tpu import write

        if write.serves(k_pages):
            k, v, slots = _in_a_row(k, v, slots, pages * page_size)
            return write.write_tokens(k_pages, v_pages, k, v, slots, layer)
    if platform == "gpu" and (write := _triton_write()):
        k, v, slots = _in_a_row(k, v, slots, pages * page_size)
        shape = (-1, *k_pages.shape[-4:])
        stacked = (k_pages.reshape(shape), v_pages.reshape(shape))
        written = write.write_tokens(
            *stacked, k, v, slots, jnp.int32(0) if layer is None else layer
        )
        return written[0].reshape(k_pages.shape), written[1].reshape(k_pages.shape)
    if slots.size == 1:  # XLA makes a select over the whole pool of a scatter of one row
        outside = jnp.full_like(slots.reshape(1), pages * page_size)
        slots = jnp.concatenate([slots.reshape(1), outside])
        k, v = (jnp.repeat(new.reshape(1, *new.shape[-2:]), 2, axis=0) for new in (k, v))
    page, offset = narrow(slots // page_size, pages), narrow(slots % page_size, page_size)
    where = (page, slice(None), offset) if layer is None else (layer, page, slice(None), offset)

    def write_one(pages: Array, new: Array) -> Array:
        at = pages.at[where]
        return at.set(new.astype(pages.dtype), mode="drop", wrap_negative_indices=False)

    return write_one(k_pages, k), write_one(v_pages, v)


def _in_a_row(k: Array, v: Array, slots: Array, slot_end: int) -> tuple[Array, Array, Array]:
    """The tokens of all rows, one after the other."""
    k, v = (new.reshape(-1, *new.shape[-2:]) for new in (k, v))
    return k, v, narrow(slots.reshape(-1), slot_end)


def _triton_write() -> ModuleType | None:
    """The module with the kernel for GPUs, where it can be launched."""
    try:
        from .triton import write
    except ImportError:  # no triton
        return None
    return write if write.serves() else None
