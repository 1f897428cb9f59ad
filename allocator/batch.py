"""What one step needs to know about its rows, as arrays."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

__all__ = ["DecodeBatch", "PageCopies"]


@dataclass(frozen=True, slots=True)
class DecodeBatch:
    """The page-table view of one step: B rows, P table columns, T query tokens per row.

    The allocator makes it of NumPy arrays; `paged_decode` registers it as a pytree, so it
    passes through `jit` as it is. Rows are right-aligned: column T-1 is always the row's newest
    token, and a row with fewer than T tokens has its padding in front.

    ```
    row of length 5, chunk of 3 in T = 4      position  [ 1  2  3  4 ]   (1 is padding)
                                              slot      [ 0  s2 s3 s4]   (0: the null page)
    ```

    Attributes:
      page_table: int32 `[B, P]`, page ids; unused entries are 0, the null page.
      seq_lens: int32 `[B]`, valid tokens including the newest one of this step; 0 pads the batch.
      positions: int32 `[B, T]`, place of each query token in its sequence, never negative.
      slots: int32 `[B, T]`, where its K and V go: page * page_size + offset; 0 for padding.
    """

    page_table: Any
    seq_lens: Any
    positions: Any
    slots: Any


class PageCopies(NamedTuple):
    """Pages to copy on the device before the next write, because a shared page will be written.

    Attributes:
      src: int32 `[C]`, page ids to read.
      dst: int32 `[C]`, page ids to fill; each is owned by one sequence.
    """

    src: np.ndarray
    dst: np.ndarray
