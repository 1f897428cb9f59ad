"""The residual sum and the norm behind it: a program for each row."""

import jax
import triton
import triton.language as tl
from jaxtyping import Array

from . import launch
from .config import power

__all__ = ["add_and_norm", "add_norm_kernel"]


def add_and_norm(x: Array, part: Array, weight: Array, eps: float) -> tuple[Array, Array]:
    """`x + part` and its norm, of `[..., E]` and weight `[E]`."""
    width = x.shape[-1]
    block = power(width)
    total, normed = launch.looped(
        add_norm_kernel,
        (x, part, weight),
        [jax.ShapeDtypeStruct(x.shape, x.dtype)] * 2,
        grid=x.size // width,
        warps=min(max(block // 512, 1), 16),
        stages=1,
        name="add_norm",
        constants=dict(WIDTH=width, BLOCK=block, EPS=eps),
    )
    return total, normed


@triton.jit
def add_norm_kernel(
    x,
    part,
    weight,
    total,
    normed,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    EPS: tl.constexpr,
):
    """One row. Pointers: x, part, total and normed `[rows, WIDTH]` of one dtype; weight `[WIDTH]`
    of any."""
    column = tl.arange(0, BLOCK)
    mask = column < WIDTH
    at = tl.program_id(0).to(tl.int64) * WIDTH + column
    one = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    other = tl.load(part + at, mask=mask, other=0.0).to(tl.float32)
    by = tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
    rounded = (one + other).to(x.dtype.element_ty)
    tl.store(total + at, rounded, mask=mask)
    wide = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / WIDTH + EPS)
    tl.store(normed + at, (wide * scale * by).to(x.dtype.element_ty), mask=mask)
