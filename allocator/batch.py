"""What one step needs to know about its rows, as arrays."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from .arguments import as_count
from .arrays import BatchArray

__all__ = ["DecodeBatch", "GroupBatch", "PageCopies", "Prepared"]


@dataclass(frozen=True, slots=True)
class GroupBatch:
    """Where the rows of a batch lie in the pool of one group of layers.

    Page size, pages and window are static: a cache compares them with its own while a step is
    traced.

    Attributes:
      page_table: int32 `[B, P]`, page ids; unused entries are 0, the null page.
      slots: int32 `[B, T]`, where K and V go: page * page_size + offset; 0 for padding.
      starts: int32 `[B]`, the first token that each row still holds; None: all are held.
      page_size: S of the pool; None in a batch made by hand: not compared.
      num_pages: N of the whole pool, N / R of a batch that was split; None as above.
      window: newest tokens that the layers see; None: all.
      shared: which rows begin with the same pages, as `KVCache.share_prefixes` finds it; None: not
        looked for.
    """

    page_table: BatchArray
    slots: BatchArray
    starts: BatchArray | None = None
    page_size: int | None = None
    num_pages: int | None = None
    window: int | None = None
    shared: Any = None


@dataclass(frozen=True, slots=True)
class DecodeBatch:
    """The page-table view of one step: B rows, P table columns, T query tokens per row.

    The allocator makes it of NumPy arrays; `paged_decode` registers it as a pytree, so it passes
    through `jit` as it is, and a type checker takes its arrays for those of JAX. Rows are
    right-aligned: column T-1 is always the row's newest token, and a row with fewer than T tokens
    has its padding in front.

    ```
    row of length 5, chunk of 3 in T = 4      position  [ 1  2  3  4 ]   (1 is padding)
                                              token     [ 0  t2 t3 t4]
                                              slot      [ 0  s2 s3 s4]   (0: the null page)
    ```

    Attributes:
      tokens: int32 `[B, T]`, 0 for padding and where the sequence has no token yet; None in a
        batch made by hand without them.
      seq_lens: int32 `[B]`, valid tokens including the newest one of this step; 0 pads the batch.
      positions: int32 `[B, T]`, place of each query token in its sequence, never negative.
      groups: one for each group of layers.
      query_lens: int32 `[B]`, how many of the T tokens are the row's own, the last ones; None: all,
        as in every batch of an allocator with T = 1. `KVCache` gives no work to the others.
      batch_invariant: whether attention is to give each row the same bits whatever else is in the
        batch (`paged_attention`); static.
    """

    tokens: BatchArray
    seq_lens: BatchArray
    positions: BatchArray
    groups: tuple[GroupBatch, ...]
    query_lens: BatchArray | None = None
    batch_invariant: bool = False

    @classmethod
    def of(
        cls,
        page_table: Any,
        seq_lens: Any,
        positions: Any,
        slots: Any,
        *,
        tokens: Any = None,
        starts: Any = None,
        query_lens: Any = None,
        page_size: int | None = None,
        num_pages: int | None = None,
        window: int | None = None,
    ) -> "DecodeBatch":
        """A batch of one group made by hand; arguments as the attributes here and of `GroupBatch`.

        Examples:
          >>> batch = DecodeBatch.of([[1, 2]], seq_lens=[6], positions=[[5]], slots=[[9]])
          >>> batch.slots
          [[9]]
        """
        if page_size is not None:
            page_size = as_count("page_size", page_size, 1)
        if num_pages is not None:
            num_pages = as_count("num_pages", num_pages, 1)
        group = GroupBatch(page_table, slots, starts, page_size, num_pages, window)
        return cls(tokens, seq_lens, positions, (group,), query_lens)

    @property
    def page_table(self) -> BatchArray:
        """Of the only group."""
        return self._only.page_table

    @property
    def slots(self) -> BatchArray:
        """Of the only group."""
        return self._only.slots

    @property
    def _only(self) -> GroupBatch:
        if len(self.groups) != 1:
            raise ValueError(
                f"the batch has {len(self.groups)} groups of layers; take one: batch.groups[...]"
            )
        return self.groups[0]


class PageCopies(NamedTuple):
    """Pages to copy on the device before the next write, because a shared page will be written.

    Attributes:
      src: int32 `[C]`, page ids to read.
      dst: int32 `[C]`, page ids to fill; each is owned by one sequence.
    """

    src: np.ndarray
    dst: np.ndarray


class Prepared(NamedTuple):
    """What `prepare` changed: entries of page tables, for who keeps them on a device.

    Attributes:
      copies: to carry out before anything is written to the new positions.
      places: int64 `[n]`, which of the handles of the call.
      columns: int64 `[n]`, of its page table.
      pages: int32 `[n]`, the page that is there now.
    """

    copies: PageCopies
    places: np.ndarray
    columns: np.ndarray
    pages: np.ndarray
