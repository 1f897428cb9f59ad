"""Pages of 8 bits: numbers, and one float32 scale for each token and KV head of them.

```
k of a token and head   [ 0.3, -1.9, 0.8, ... ]         absmax = 1.9
scale                   1.9 / 127 (int8), 1.9 / 448 (float8_e4m3fn)
numbers                 the nearest to k / scale that the dtype has
```
A scale follows from its token alone: nothing needs calibration, and no row depends on another one.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num

__all__ = ["LARGEST", "dequantise", "is_eight_bits", "quantise"]

LARGEST = {np.dtype(jnp.int8): 127.0, np.dtype(jnp.float8_e4m3fn): 448.0}
"""The largest number of each dtype that pages may have with scales."""
LEAST = 2.0**-100
"""A token whose numbers are smaller has a scale as if one were this large: a scale is never 0."""


def is_eight_bits(dtype: Any) -> bool:
    """Whether pages of this dtype have scales."""
    return np.dtype(dtype) in LARGEST


def quantise(
    x: Float[Array, "*rows D"], dtype: Any, scales: Float[Array, "*rows"] | None = None
) -> tuple[Num[Array, "*rows D"], Float[Array, "*rows"]]:
    """Numbers of that dtype and their float32 scales; with `scales`, by these.

    A token with NaN or infinity has a scale that is no number either, so it stays loud.
    """
    largest = LARGEST[np.dtype(dtype)]
    x = x.astype(jnp.float32)
    top = jnp.maximum(jnp.max(jnp.abs(x), axis=-1), jnp.float32(LEAST))
    if scales is None:
        scales = top * jnp.float32(1 / largest)
    else:
        scales = jnp.where(top < jnp.inf, scales, jnp.nan)
    parts = jnp.clip(x * (1 / scales)[..., None], -largest, largest)
    parts = jnp.where(jnp.isnan(parts), 0, parts)
    if np.dtype(dtype) == jnp.int8:
        parts = jnp.round(parts)
    return parts.astype(dtype), scales


def dequantise(
    numbers: Num[Array, "*rows D"], scales: Float[Array, "*rows"] | None = None
) -> Float[Array, "*rows D"]:
    """Keys or values in float32; without scales the numbers are them."""
    wide = numbers.astype(jnp.float32)
    return wide if scales is None else wide * scales[..., None]
