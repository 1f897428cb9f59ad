"""The residual sum of a decoder and the norm behind it, in one launch on a GPU.

XLA makes three kernels of them, which at a few rows take longer to begin than to run, and at many
read the sum again.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from . import dispatch
from .checks import AnyArray, check_axes, check_float, check_number, check_twins

__all__ = ["add_and_norm"]

WIDEST = 1 << 14  # numbers of a row that a program holds


def add_and_norm(
    x: Float[AnyArray, "*M E"],
    part: Float[AnyArray, "*M E"],
    weight: Float[AnyArray, " E"],
    eps: float,
) -> tuple[Float[Array, "*M E"], Float[Array, "*M E"]]:
    """`x + part`, and that divided by its root mean square, times weight.

    The mean is of float32 squares, to which eps is added. On NVIDIA GPUs, with the `cuda` extra,
    it is one launch of a Triton kernel, which XLA does not split: where arrays lie on several
    devices, call it inside a `shard_map`. Elsewhere, and where a derivative is taken, it is left to
    XLA.

    Args:
      x: the residual, of the dtype that both results have.
      part: what is added, of the same dtype.
      weight: of any floating-point dtype.
      eps: a Python float, 0 or more.

    Raises:
      TypeError: arrays that are not floating-point, or another eps.
      ValueError: shapes or dtypes that disagree, or an eps below 0 or not finite.

    Examples:
      >>> import jax.numpy as jnp
      >>> total, normed = add_and_norm(jnp.ones((1, 2)), jnp.array([[2.0, 3.0]]), jnp.ones(2), 0.0)
      >>> total.tolist(), [round(each, 3) for each in normed[0].tolist()]
      ([[3.0, 4.0]], [0.849, 1.131])
    """
    for name, array in (("x", x), ("part", part), ("weight", weight)):
        check_float(name, array)
    check_twins("part", part, "x", x)
    check_axes("weight", weight, "E", E=np.shape(x)[-1] if np.ndim(x) else 0)
    if (eps := check_number("eps", eps)) < 0:
        raise ValueError(f"eps must be 0 or more; got {eps}")
    return _added(eps, jnp.asarray(x), jnp.asarray(part), jnp.asarray(weight))


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _added(eps: float, x: Array, part: Array, weight: Array) -> tuple[Array, Array]:
    if x.size == 0 or not _launches(x):
        return _by_xla(eps, x, part, weight)
    from .triton.add_norm import add_and_norm as launched

    return launched(x, part, weight, eps)


@_added.defjvp
def _(eps: float, primals: Any, tangents: Any) -> Any:
    return jax.jvp(partial(_by_xla, eps), primals, tangents)


def _by_xla(eps: float, x: Array, part: Array, weight: Array) -> tuple[Array, Array]:
    total = x + part
    wide = total.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return total, (wide * scale * weight.astype(jnp.float32)).astype(x.dtype)


def _launches(x: Array) -> bool:
    return x.shape[-1] <= WIDEST and dispatch.launches(x.dtype)
