"""Where new tokens are written without a kernel of ours: one scatter, in place under donation."""

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
    before it scatters; there a kernel writes it.
    """
    if platform == "tpu" and layer is not None:
        from .pallas_tpu import write

        if write.serves(k_pages):
            k, v = (new.reshape(-1, *new.shape[-2:]) for new in (k, v))
            slots = narrow(slots.reshape(-1), k_pages.shape[1] * k_pages.shape[3])
            return write.write_tokens(k_pages, v_pages, k, v, slots, layer)
    pages, page_size = k_pages.shape[-4], k_pages.shape[-2]
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
