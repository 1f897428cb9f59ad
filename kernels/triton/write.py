"""New tokens into the pages, in place: one launch for K and V, where XLA makes a scatter of each.

XLA's scatter works out the place of every number by itself; here a program has some tokens' heads,
and moves whole vectors.
"""

import triton
import triton.language as tl
from jaxtyping import Array, Float, Int32

from ..annotations import FixedScales
from ..cards import compute_capability
from ..eight_bits import LARGEST
from . import launch
from .config import power
from .numbers import quantised

__all__ = ["WRITTEN", "serves", "write_kernel", "write_tokens"]

WRITTEN = ("k_written", "v_written", "k_scales_written", "v_scales_written")
"""What kernels that write call the pools as outputs."""
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
    k_scales,
    v_scales,
    k_fixed,
    v_fixed,
    k_written,
    v_written,
    k_scales_written,
    v_scales_written,
    VECTORS: tl.constexpr,
    SLOTS: tl.constexpr,
    PAGE: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    SCALED: tl.constexpr,
    FIXED: tl.constexpr,
    LARGEST: tl.constexpr,
):
    """Some of the VECTORS, tokens times KV heads, to their slots; those outside are left.

    Pointers: k, v `[tokens, KV_HEADS, D]`; slots `[tokens]`; layer `[]`; pages
    `[L, SLOTS / PAGE, KV_HEADS, PAGE, D]`; with SCALED, scales of the same axes but D, and pages of
    8 bits whose largest number is LARGEST; with FIXED `[KV_HEADS]` scales for all tokens.
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
    new_k = tl.load(k + come, mask=mask, other=0.0)
    new_v = tl.load(v + come, mask=mask, other=0.0)
    if SCALED:
        fixed = vector % KV_HEADS
        new_k, of_k = quantised(new_k, k_fixed + fixed, FIXED, LARGEST, k_pages.dtype.element_ty)
        new_v, of_v = quantised(new_v, v_fixed + fixed, FIXED, LARGEST, v_pages.dtype.element_ty)
        tl.store(k_scales + row, of_k, mask=real)
        tl.store(v_scales + row, of_v, mask=real)
    tl.store(k_pages + go, new_k, mask=mask)
    tl.store(v_pages + go, new_v, mask=mask)


def serves() -> bool:
    """Whether kernels of Triton can be launched here."""
    return compute_capability().replace(".", "").isdigit() and launch.problem() is None


def write_tokens(
    pools: tuple[Array, ...],
    k: Float[Array, "n Hk D"],
    v: Float[Array, "n Hk D"],
    slots: Int32[Array, "n"],
    layer: Int32[Array, ""],
    fixed_scales: FixedScales | None = None,
) -> tuple[Array, ...]:
    """The pools `[L, N, Hk, S, D]`, and perhaps their scales, with k and v in their slots of one
    layer; slots outside the pool write nothing.

    The layer is one of the pool's: the caller has made sure.
    """
    if slots.shape[0] == 0:
        return pools
    dtype, scaled = pools[0].dtype, len(pools) == 4
    _, pages, heads, size, dim = pools[0].shape
    vectors, block_d = slots.shape[0] * heads, power(dim)
    block = max(BLOCK // block_d, 1)
    if not scaled:
        k, v = k.astype(dtype), v.astype(dtype)
    scales = pools[2:] or (slots, slots)  # whatever stands there is not touched
    fixed = (slots, slots) if fixed_scales is None else fixed_scales
    written = launch.looped(
        write_kernel,
        (k, v, slots, layer, *pools[:2], *scales, *fixed),
        [],
        rewritten=WRITTEN[: len(pools)],
        aliases=(4, 5, 6, 7)[: len(pools)],
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
            SCALED=scaled,
            FIXED=fixed_scales is not None,
            LARGEST=LARGEST.get(dtype, 0.0),
            **dict.fromkeys(WRITTEN[len(pools) :], 0),
        ),
    )
    return tuple(written)
