"""Several processes that must all decide the same: proof that they do."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any, TypeVar

import numpy as np
from jax.experimental import multihost_utils

from .allocator.arguments import as_count
from .errors import ReplicaMismatch

__all__ = ["ReplicaCheck", "ReplicaMismatch"]

T = TypeVar("T")


class ReplicaCheck:
    """Compares what the processes of a `jax.distributed` program are about to run.

    The same calls give the same page ids, so allocators that are driven alike agree without
    talking. A digest of all that was checked so far proves it: every `every` calls the processes
    compare theirs before the call returns, so with `every=1` no step runs on batches that differ.
    `max_wait` and `timeout` go by the clock of each process: let one decide, and all `cancel`.

    Args:
      every: calls between two comparisons. One costs an exchange of 16 bytes.

    Examples:
      >>> from paged_decode import BlockAllocator
      >>> check, allocator = ReplicaCheck(every=8), BlockAllocator(9, 4)
      >>> batch = allocator.batch([allocator.allocate([5, 6, 7])], 0, 3, tokens_per_row=4)
      >>> check(batch).seq_lens
      array([3], dtype=int32)
    """

    def __init__(self, every: int = 1):
        self._every = as_count("every", every, 1)
        self._seen = hashlib.blake2b(digest_size=16)
        self._calls = 0

    def __call__(self, checked: T) -> T:
        """Return what was given, once it is known to be the same on every process.

        Args:
          checked: a `DecodeBatch`, `PageCopies`, or any tuples, lists and dataclasses of NumPy
            arrays, numbers, text, bytes and None. Shapes and dtypes count, and so does the sign
            of a zero.

        Raises:
          ReplicaMismatch: on every process, when one of them was given something else.
          TypeError: it holds something else, such as an array on a device.
        """
        for part in _parts(checked):
            self._seen.update(part)
        self._calls += 1
        if self._calls % self._every == 0:
            self._compare()
        return checked

    def _compare(self) -> None:
        own = np.frombuffer(self._seen.digest(), np.int32)
        every = np.asarray(multihost_utils.process_allgather(own)).reshape(-1, len(own))
        if (every != own).any():
            raise ReplicaMismatch(self._calls, tuple(row.tobytes().hex() for row in every))


def _parts(value: Any) -> list[bytes]:
    """The value as bytes, each piece behind its type and size: no two values give the same."""
    if isinstance(value, np.ndarray | np.generic) and not value.dtype.hasobject:
        return [f"{value.dtype}{value.shape}:".encode(), value.tobytes()]
    if value is None or isinstance(value, int | float | str | bytes):
        text = repr(value).encode()
        return [f"{type(value).__name__}({len(text)}):".encode(), text]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        inner = [getattr(value, field.name) for field in dataclasses.fields(value)]
    elif isinstance(value, tuple | list):
        inner = list(value)
    else:
        raise TypeError(
            "a ReplicaCheck takes tuples, lists and dataclasses of NumPy arrays and numbers, "
            f"got {type(value).__name__}"
        )
    parts = [f"{type(value).__name__}[{len(inner)}]:".encode()]
    for item in inner:
        parts += _parts(item)
    return parts
