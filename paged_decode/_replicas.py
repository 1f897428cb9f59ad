"""Several processes, each with its own allocator: proof that all of them say the same."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from jax.experimental import multihost_utils

from .allocator import BlockAllocator, DecodeBatch
from .allocator.arguments import as_count
from .errors import PagedDecodeError

__all__ = ["ReplicaMismatch", "ReplicatedAllocator"]


class ReplicaMismatch(PagedDecodeError):
    """The allocators of several processes have made different page tables: do not go on.

    `digests` holds what every process has, in order of the processes.
    """

    def __init__(self, step: int, digests: tuple[str, ...]):
        self.step, self.digests = step, digests
        super().__init__(
            f"the processes' page tables differ at batch {step}: digests {', '.join(digests)}; "
            "every process must make the same calls with the same arguments in the same order"
        )

    def __reduce__(self):
        return type(self), (self.step, self.digests)


class ReplicatedAllocator(BlockAllocator):
    """A `BlockAllocator` that every process of a `jax.distributed` program has one of.

    The same calls give the same page ids, so replicas that are driven alike agree without
    talking. A digest of every batch proves it: each `every` batches the processes compare theirs
    before the batch is handed out, so with `every=1` no step runs on tables that differ.

    Args:
      num_pages: as in `BlockAllocator`, whose other options may follow.
      page_size: as there.
      every: batches between two comparisons. One costs an exchange of 16 bytes.

    Raises (from `batch`, `advance` and `extend`):
      ReplicaMismatch: on every process, when the tables differ.

    Example:
      >>> allocator = ReplicatedAllocator(9, 4, every=8)
      >>> allocator.batch([allocator.allocate([5, 6, 7])], 0, 3, tokens_per_row=4).seq_lens
      array([3], dtype=int32)
    """

    def __init__(self, num_pages: Any, page_size: Any, *, every: int = 1, **options: Any):
        super().__init__(num_pages, page_size, **options)
        self._every = as_count("every", every, 1)
        self._seen = hashlib.blake2b(digest_size=16)
        self._batches = 0

    def batch(self, *args: Any, **options: Any) -> DecodeBatch:
        """As `BlockAllocator.batch`, compared over the processes."""
        batch = super().batch(*args, **options)
        self._compare(batch)
        return batch

    def advance(self, *args: Any, **options: Any) -> Any:
        """As `BlockAllocator.advance`, compared over the processes."""
        batch, copies = super().advance(*args, **options)
        self._compare(batch)
        return batch, copies

    def extend(self, *args: Any, **options: Any) -> Any:
        """As `BlockAllocator.extend`, compared over the processes."""
        batch, copies = super().extend(*args, **options)
        self._compare(batch)
        return batch, copies

    def _compare(self, batch: DecodeBatch) -> None:
        groups = (array for group in batch.groups for array in (group.page_table, group.slots))
        for array in (batch.tokens, batch.seq_lens, batch.positions, *groups):
            self._seen.update(repr(array.shape).encode() + array.tobytes())
        self._batches += 1
        if self._batches % self._every:
            return
        own = np.frombuffer(self._seen.digest(), np.int32)
        every = np.asarray(multihost_utils.process_allgather(own)).reshape(-1, len(own))
        if (every != own).any():
            raise ReplicaMismatch(self._batches, tuple(row.tobytes().hex() for row in every))
