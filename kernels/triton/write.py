"""New tokens into the pages, in place: one launch for K and V, where XLA makes a scatter of each.

XLA's scatter works out the place of every number by itself; here a program has some tokens' heads,
and moves whole vectors.
"""

import triton
import triton.language as tl
from jaxtyping import Array, Float, Int32

from ..cards import compute_capability
from . import launch
from .config import power

__all__ = ["serves", "write_kernel", "write_tokens"]

BLOCK = 8192  # numbers of K, and as many of V, that a program moves; a power of two
WARPS = 8


@triton.jit
def write_kernel(
    k,
    v,
    slots,
    layer,
    k_pages,
    v_pages,
    k_written,
    v_written,
    VECTORS: tl.constexpr,
    SLOTS: tl.constexpr,
    PAGE: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Some of the VECTORS, tokens times KV heads, to their slots; those outside are left.

    Pointers: k, v `[tokens, KV_HEADS, D]`; slots `[tokens]`; layer `[]`; pages
    `[L, SLOTS / PAGE, KV_HEADS, PAGE, D]`.
    """
    vector = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    real = vector < VECTORS
    slot = tl.load(slots + vector // KV_HEADS, mask=real, other=-1)
    real = real & (slot >= 0) & (slot < SLOTS)
    slot = tl.where(real, slot, 0)
    page = slot // PAGE + tl.load(layer) * (SLOTS // PAGE)
    row = (page.to(tl.int64) * KV_HEADS + vector % KV_HEADS) * PAGE + slot % PAGE
    dim = tl.arange(0, BLOCK_D)
    mask = real[:, None] & (dim < D)[None, :]
    come = vector.to(tl.int64)[:, None] * D + dim[None, :]
    go = row[:, None] * D + dim[None, :]
    tl.store(k_pages + go, tl.load(k + come, mask=mask), mask=mask)
    tl.store(v_pages + go, tl.load(v + come, mask=mask), mask=mask)


def serves() -> bool:
    """Whether kernels of Triton can be launched here."""
    return compute_capability().replace(".", "").isdigit() and launch.problem() is None


def write_tokens(
    k_pages: Float[Array, "L N Hk S D"],
    v_pages: Float[Array, "L N Hk S D"],
    k: Float[Array, "n Hk D"],
    v: Float[Array, "n Hk D"],
    slots: Int32[Array, "n"],
    layer: Int32[Array, ""],
) -> tuple[Array, Array]:
    """The pages with k and v in their slots of one layer; slots outside the pool write nothing.

    The layer is one of the pool's: the caller has made sure.
    """
    if slots.shape[0] == 0:
        return k_pages, v_pages
    _, pages, heads, size, dim = k_pages.shape
    vectors, block_d = slots.shape[0] * heads, power(dim)
    block = max(BLOCK // block_d, 1)
    k, v = (new.astype(k_pages.dtype) for new in (k, v))
    k_pages, v_pages = launch.looped(
        write_kernel,
        (k, v, slots, layer, k_pages, v_pages),
        [],
        rewritten=("k_written", "v_written"),
        aliases=(4, 5),
        grid=-(-vectors // block),
        warps=WARPS,
        stages=1,
        name="paged_write",
        constants=dict(
            VECTORS=vectors,
            SLOTS=pages * size,
            PAGE=size,
            KV_HEADS=heads,
            D=dim,
            BLOCK_D=block_d,
            BLOCK_V=block,
        ),
    )
    return k_pages, v_pages
