"""Turn what a caller passed into checked integers, or say which argument is wrong and why."""

import operator
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, SupportsIndex, TypeAlias

import numpy as np

__all__ = ["Ints"]

Ints: TypeAlias = SupportsIndex | Sequence[Any] | np.ndarray
"""What a caller may pass for integers: one, a sequence (nested for more axes), or an array."""

_MAX_TOKEN = np.iinfo(np.int32).max


def as_int(name: str, value: SupportsIndex) -> int:
    """One Python int, of whatever kind of integer; a bool or a float is a TypeError."""
    try:
        if not _is_bool(value):
            return operator.index(value)
    except TypeError:  # no integer, or an array of several
        pass
    raise TypeError(f"{name} must be an integer, got {value!r} of type {type(value).__name__}")


def as_count(name: str, value: SupportsIndex, minimum: int = 0, maximum: int | None = None) -> int:
    """One Python int of at least `minimum`, and at most `maximum` if there is one."""
    count = as_int(name, value)
    if maximum is not None and not minimum <= count <= maximum:
        raise ValueError(f"{name} must be from {minimum} to {maximum}, got {count}")
    if count < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {count}")
    return count


def as_counts(
    name: str, values: Iterable[SupportsIndex], minimum: int = 0, maximum: int | None = None
) -> tuple[int, ...]:
    """Python ints of a list, a set, a generator or an array of one axis, each as `as_count`."""
    text = isinstance(values, str | bytes | bytearray | Mapping)
    if text or not isinstance(values, Iterable) or getattr(values, "ndim", 1) != 1:
        raise TypeError(
            f"{name} must be a sequence of integers, such as [5] or (), "
            f"got {values!r} of type {type(values).__name__}"
        )
    return tuple(as_count(name, value, minimum, maximum) for value in values)


def as_ints(name: str, value: Ints) -> np.ndarray:
    """An int64 array of any shape; floats and bools are a TypeError, never rounded.

    No dtype is given to NumPy at first, because `np.asarray([1.5], np.int64)` is silently 1.
    """
    if type(value) is np.ndarray and value.dtype == np.int64:
        return value  # the hot path
    anything: Any = value
    try:
        if hasattr(value, "__index__") and not (_is_bool(value) or hasattr(value, "dtype")):
            anything = operator.index(anything)
        array = np.asarray(anything)
    except ValueError as error:
        raise ValueError(f"{name} must be an integer array without ragged rows: {error}") from None
    if array.dtype.kind not in "iu":
        _refuse_type(name, value, array)
    if array.dtype == np.uint64 and array.size and array.max() > np.iinfo(np.int64).max:
        raise ValueError(f"{name} holds {array.max()}, which does not fit 64 bits with a sign")
    array = array.astype(np.int64, copy=False)
    if array.ndim and not hasattr(value, "dtype") and _hides_bool(value, array):
        raise TypeError(f"{name} must be integers, got a bool among them; convert it first")
    return array


def as_tokens(name: str, value: Ints) -> np.ndarray:
    """A new int32 array of token ids, each 0 or more."""
    hot = type(value) is np.ndarray and value.dtype == np.int32
    array: np.ndarray = value if hot else as_ints(name, value)  # type: ignore[assignment]
    size = array.view(np.uint32 if hot else np.uint64)  # a negative one looks huge
    if array.size and size.flat[size.argmax()] > _MAX_TOKEN:  # faster than `max`
        bad = array[(array < 0) | (array > _MAX_TOKEN)].flat[0]
        raise ValueError(f"{name} must be token ids from 0 to {_MAX_TOKEN}, got {bad}")
    return array.astype(np.int32)


def as_prompt(name: str, value: Ints) -> np.ndarray:
    """A new int32 array `[T]` of token ids, T >= 1."""
    prompt = as_tokens(name, value)
    if prompt.ndim != 1 or prompt.size == 0:
        raise ValueError(f"{name} must have shape [T] with T >= 1, got shape {list(prompt.shape)}")
    return prompt


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


def as_kept(value: Ints, shards: int, groups: int) -> list[list[int]]:
    """Pages to be left of every shard, in every group, from one number, `[R]` or `[R, G]`."""
    array = as_ints("keep_free", value)
    if array.ndim == 0 and array >= 0:
        return [[-(-int(array) // shards)] * groups] * shards
    if array.ndim and array.shape not in ((shards,), (shards, groups)):
        raise ValueError(
            f"keep_free must be one integer or have shape [R] = [{shards}] or [R, G] = "
            f"[{shards}, {groups}], got shape {list(array.shape)}"
        )
    if array.size and array.min() < 0:
        raise ValueError(f"keep_free must be 0 or more, got {array.min()}")
    array = array[:, None] if array.ndim == 1 else array
    return np.broadcast_to(array, (shards, groups)).tolist()


def as_appended(
    handle: np.ndarray, tokens: Ints, counts: Ints | None
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens `[B, k]`, and how many of them each row takes `[B]`."""
    token = as_step_tokens(tokens, handle.shape, "k")
    width = token.shape[-1]
    count = as_rows("counts", width if counts is None else counts, handle.size)
    if count.size and count.max() > width:
        raise ValueError(f"counts must be at most k = {width}, got {count.max()}")
    return token.reshape(handle.size, width), count


def _refuse_type(name: str, value: Ints, array: np.ndarray) -> None:
    if array.size == 0 and not hasattr(value, "dtype"):
        return  # an empty list has no element type: NumPy calls it float64
    if array.dtype.kind in "fO":  # so NumPy calls integers of more than 64 bits
        items = list(np.asarray(value, object).flat)
        if all(isinstance(item, int) for item in items) and any(_is_huge(item) for item in items):
            raise ValueError(f"{name} holds an integer that does not fit 64 bits")
    if array.ndim == 0 and not hasattr(value, "dtype"):
        kind = type(value).__name__
        raise TypeError(f"{name} must be an integer, a list or an array of them, got a {kind}")
    raise TypeError(
        f"{name} must be integers, got dtype {array.dtype}; convert it first, "
        "for instance with .astype(np.int64)"
    )


def _is_huge(value: int) -> bool:
    return not -(2**63) <= value < 2**63


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool) or getattr(value, "dtype", None) == np.bool_


def _hides_bool(value: Any, array: np.ndarray) -> bool:
    """Whether a sequence has a bool in it, which NumPy made 0 or 1 in `array`.

    To look at every item takes as long as NumPy took: of many, those are looked at that are 0 or 1.
    """
    if array.size >= 64:
        suspect = array.view(np.uint64) <= 1  # a negative one looks huge
        if not np.count_nonzero(suspect):
            return False
        if array.ndim == 1:
            value = [value[i] for i in suspect.nonzero()[0].tolist()]
            if all(type(item) is int for item in value):
                return False
    return _holds_bool(value)


def _holds_bool(value: Any) -> bool:
    """Whether it is a bool, an array of them, or a sequence with one in it at any depth."""
    if not isinstance(value, Sequence) or isinstance(value, memoryview):
        return _is_bool(value)
    kinds = {*map(type, value)}
    if kinds == {int}:
        return False
    if kinds and kinds <= {list, tuple}:
        return _holds_bool([*chain.from_iterable(value)])
    if all(issubclass(kind, int | np.integer) and kind is not bool for kind in kinds):
        return False
    return any(map(_holds_bool, value))
