"""Argument checks shared by the public operations: the messages name the axes.

Shapes and dtypes are checked always; values only where they are concrete, because under `jit`
there is nothing to look at.
"""

import math
from numbers import Real
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Int, Int32

__all__ = [
    "AnyArray",
    "check_axes",
    "check_float",
    "check_index",
    "check_live",
    "check_number",
    "check_range",
    "check_twins",
    "concrete",
    "narrow",
]

AnyArray = Array | np.ndarray

INDEX_DTYPES = (np.dtype(np.int32), np.dtype(np.int64))


def check_axes(name: str, array: Any, axes: str, **sizes: int) -> None:
    """Raise ValueError unless `array` has the axes named in `axes`, e.g. "B, P", of these sizes."""
    names = [axis.strip() for axis in axes.split(",")]
    shape = np.shape(array)
    if len(shape) != len(names):
        raise ValueError(f"{name} must be [{axes}]; got shape {shape}")
    for axis, size in zip(names, shape, strict=True):
        if sizes.get(axis, size) != size:
            raise ValueError(
                f"{name} must be [{axes}] with {axis} = {sizes[axis]}; got shape {shape}"
            )


def check_index(name: str, array: Any) -> None:
    """Raise TypeError unless `array` is of dtype int32 or int64.

    Small unsigned lengths wrap, bools index as masks, and floats round: each is silent in JAX.
    """
    dtype = getattr(array, "dtype", None)
    if dtype is None or np.dtype(dtype) not in INDEX_DTYPES:
        came = type(array).__name__ if dtype is None else f"dtype {dtype}"
        raise TypeError(
            f"{name} must be an array of int32 or int64; got {came}: convert it with "
            "np.asarray(x, np.int32)"
        )


def check_float(name: str, array: Any) -> None:
    """Raise TypeError unless `array` is an array of a floating-point dtype."""
    dtype = getattr(array, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        came = type(array).__name__ if dtype is None else f"dtype {dtype}"
        raise TypeError(f"{name} must be a floating-point array; got {came}")


def check_twins(name: str, array: Any, twin_name: str, twin: Any) -> None:
    """Raise ValueError unless `array` has the shape and dtype of `twin`."""
    if array.shape != twin.shape or array.dtype != twin.dtype:
        raise ValueError(
            f"{name} must have the shape and dtype of {twin_name}, {twin.shape} {twin.dtype}; got "
            f"{array.shape} {array.dtype}"
        )


def check_live(name: str, array: Any) -> None:
    """Raise RuntimeError, as JAX does, if `array` was donated: the message says what to use."""
    if isinstance(array, jax.Array) and not isinstance(array, Tracer) and array.is_deleted():
        raise RuntimeError(
            f"{name} was deleted: it was donated to an earlier call; use the array that this call "
            "returned"
        )


def check_number(name: str, value: Any, *, positive: bool = False) -> float:
    """`value` as a finite Python float; it is compiled into the kernel, so it cannot be traced."""
    if isinstance(value, bool) or not isinstance(value, Real | np.number):
        raise TypeError(f"{name} must be a Python float; got {type(value).__name__}")
    number = float(value)
    if not math.isfinite(number) or (positive and number <= 0):
        raise ValueError(f"{name} must be finite{' and > 0' if positive else ''}; got {number}")
    return number


def concrete(array: Any) -> np.ndarray | None:
    """The values of `array` on the host, or None when it is traced or lies on other hosts."""
    if isinstance(array, Tracer):
        return None
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return None
    return np.asarray(array)


def check_range(name: str, ids: Any, end: int) -> None:
    """Raise ValueError unless `ids` are in `0 .. end-1`, where they are concrete."""
    values = concrete(ids)
    if values is not None and values.size and not (0 <= values.min() and values.max() < end):
        bad = values[(values < 0) | (values >= end)][0]
        raise ValueError(f"{name} must be in 0 .. {end - 1}; got {bad}")


def narrow(ids: Int[Array, "*axes"], end: int) -> Int32[Array, "*axes"]:
    """Traced ids as int32, where those that do not fit stay outside `0 .. end-1`.

    A cast keeps the low 32 bits, and so does JAX when it indexes with int64: another page's number.
    """
    if ids.dtype == jnp.int32:
        return ids
    return jnp.clip(ids, -1, min(end, jnp.iinfo(jnp.int32).max)).astype(jnp.int32)
