"""Turn what a caller passed into checked integers, or say which argument is wrong and why."""

import operator
from collections.abc import Sequence
from typing import Any, SupportsIndex, TypeAlias

import numpy as np

__all__ = ["Ints"]

Ints: TypeAlias = SupportsIndex | Sequence[Any] | np.ndarray
"""What a caller may pass for integers: one, a sequence (nested for more axes), or an array."""

_MAX_TOKEN = np.iinfo(np.int32).max


def as_count(name: str, value: SupportsIndex, minimum: int = 0) -> int:
    """One Python int of at least `minimum`; a bool or a float is a TypeError."""
    if isinstance(value, bool | np.bool_) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an integer, got {value!r} of type {type(value).__name__}")
    count = operator.index(value)
    if count < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {count}")
    return count


def as_ints(name: str, value: Ints) -> np.ndarray:
    """An int64 array of any shape; floats and bools are a TypeError, never rounded.

    No dtype is given to NumPy at first, because `np.asarray([1.5], np.int64)` is silently 1.
    """
    anything: Any = value
    try:
        array = np.asarray(anything)
    except ValueError as error:
        raise ValueError(f"{name} must be an integer array without ragged rows: {error}") from None
    if array.dtype == np.int64:
        return array
    if array.dtype.kind not in "iu":
        _refuse_type(name, value, array)
    if array.dtype == np.uint64 and array.size and array.max() > np.iinfo(np.int64).max:
        raise ValueError(f"{name} holds {array.max()}, which does not fit 64 bits with a sign")
    return array.astype(np.int64)


def as_tokens(name: str, value: Ints) -> np.ndarray:
    """A new int32 array of token ids, each 0 or more."""
    array = as_ints(name, value)
    if array.size and array.view(np.uint64).max() > _MAX_TOKEN:  # a negative one looks huge
        bad = array[(array < 0) | (array > _MAX_TOKEN)].flat[0]
        raise ValueError(f"{name} must be token ids from 0 to {_MAX_TOKEN}, got {bad}")
    return array.astype(np.int32)


def as_step_tokens(tokens: Ints, batch_shape: tuple[int, ...], *axes: str) -> np.ndarray:
    """Token ids with the shape of the handles, `[B]` or `[]`, and then the named axes."""
    array = as_tokens("tokens", tokens)
    num_batch_axes = len(batch_shape)
    if array.ndim != num_batch_axes + len(axes) or array.shape[:num_batch_axes] != batch_shape:
        wanted = ", ".join([*map(str, batch_shape), *axes])
        raise ValueError(
            f"tokens must have shape [{wanted}], one entry per handle, "
            f"got shape {list(array.shape)}"
        )
    return array


def as_rows(name: str, value: Ints, num_rows: int) -> np.ndarray:
    """An int64 array `[num_rows]` of numbers that are 0 or more; one number serves every row."""
    array = as_ints(name, value)
    if array.ndim == 0:
        array = np.full(num_rows, array)
    elif array.shape != (num_rows,):
        raise ValueError(
            f"{name} must be one integer or have shape [B] = [{num_rows}], one per handle, "
            f"got shape {list(array.shape)}"
        )
    if array.size and array.min() < 0:
        raise ValueError(f"{name} must be 0 or more, got {array.min()}")
    return array


def _refuse_type(name: str, value: Ints, array: np.ndarray) -> None:
    if array.size == 0 and not isinstance(value, np.ndarray | np.generic):
        return  # an empty list has no element type: NumPy calls it float64
    if array.dtype.kind == "O" and all(type(item) is int for item in array.flat):
        raise ValueError(f"{name} holds an integer that does not fit 64 bits")
    raise TypeError(
        f"{name} must be integers, got dtype {array.dtype}; convert it first, "
        "for instance with .astype(np.int64)"
    )
