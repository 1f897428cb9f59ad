"""Arrays of the user's own in a snapshot, besides keys, values and bookkeeping."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from .._text import shown
from ..kernels.checks import check_live
from ._format import EXTRA_DTYPES, MAX_DIMENSION, MAX_EXTRA_AXES
from ._names import EXTRA, is_extra_name

__all__ = ["extra_arrays"]


def extra_arrays(extra: Mapping[str, Any] | None, *, copy: bool) -> dict[str, np.ndarray]:
    """They on the host, under their names in the file; with `copy`, nobody else has them.

    Raises:
      TypeError: `extra` maps no names to arrays.
      ValueError: a name or a shape that the format does not have.
      NotImplementedError: a dtype that it does not have, or an array over several processes.
      RuntimeError: an array was donated.
    """
    if extra is None:
        return {}
    if not isinstance(extra, Mapping):
        raise TypeError(f"extra must map names to arrays, got {type(extra).__name__}")
    dtypes = {name: _checked(name, value) for name, value in extra.items()}
    # One call for all, so that their ways from a device overlap; what is sharded is put together.
    there = jax.device_get(list(extra.values()))
    return {
        EXTRA + name: np.array(value, dtype, order="C", copy=copy or None)
        for (name, dtype), value in zip(dtypes.items(), there, strict=True)
    }


def _checked(name: Any, value: Any) -> np.dtype:
    """The dtype that the file has for the array."""
    if not isinstance(name, str):
        raise TypeError(f"names in extra must be str, got {shown(name)}")
    if not is_extra_name(EXTRA + name):
        raise ValueError(
            f"extra {shown(name)}: a name is 1 to 249 bytes of Unicode without / \\ : and NUL, "
            "and not '.' or '..'"
        )
    title = f"extra {shown(name)}"
    check_live(title, value)
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{title} is a masked array; pass its data and its mask, or filled()")
    if not isinstance(value, np.ndarray | np.generic | jax.Array):
        kind = type(value).__name__
        raise TypeError(f"{title} is no array but {kind}; use np.asarray, or metadata for numbers")
    if jnp.issubdtype(value.dtype, jax.dtypes.extended):
        raise TypeError(f"{title} has dtype {value.dtype}: pass what jax.random.key_data gives")
    dtype = EXTRA_DTYPES.get(value.dtype.name)
    if dtype is None:
        raise NotImplementedError(f"{title}: snapshots do not hold {value.dtype}")
    if value.ndim > MAX_EXTRA_AXES or max(value.shape, default=0) > MAX_DIMENSION:
        raise ValueError(
            f"{title} has shape {shown(value.shape)}; it may have {MAX_EXTRA_AXES} axes of "
            f"{MAX_DIMENSION} each: reshape it"
        )
    if isinstance(value, jax.Array):
        _require_here(title, value)
    return dtype


def _require_here(title: str, array: jax.Array) -> None:
    """Refuse what this process does not have all of."""
    if isinstance(array, Tracer):
        raise TypeError(f"{title} is traced: save between steps, outside of jit")
    if not (array.is_fully_addressable or array.is_fully_replicated):
        raise NotImplementedError(
            f"{title} is spread over several processes; gather it to one of them first"
        )
