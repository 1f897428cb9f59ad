"""What a window of the newest tokens needs of a sequence: which pages it holds, which go back.

A layer that sees W tokens reads positions p - W + 1 .. p for a query at p. The next query of a
sequence is at its first token that is not computed, so of c computed tokens it needs the last
W - 1. Pages of S tokens:

```
W 6, S 4, computed 9, prepared for one token more
column      0          1          2
         [ 0 1 2 3 ][ 4 5 6 7 ][ 8 9 . . ]
           given     ^ first token that a query at 9 sees
           back
```
"""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from .errors import PageTableError, SequenceTooLong
from .groups import PageGroup
from .rows import RowTable

__all__ = [
    "first_column",
    "most_pages",
    "no_change",
    "plan_pass",
    "require_held",
    "require_pages",
    "require_room",
    "shortest_truncation",
    "window_of",
]


def first_column(computed: Any, window: int, page_size: int) -> Any:
    """The first column that queries behind `computed` tokens see, one number or an array of them;
    those before it may go."""
    return np.maximum(computed - window + 1, 0) // page_size


def most_pages(window: int, tokens: int, page_size: int) -> int:
    """The most pages that a sequence holds at once: ceil((W + n - 2) / S) + 1.

    Args:
      window: W.
      tokens: n, for how many tokens behind the computed ones it has pages: 1 for a step, T for a
        tail, the chunk of a prefill, 2k where k steps are launched before the last k are read.
      page_size: S.
    """
    return -(-(window + tokens - 2) // page_size) + 1


def shortest_truncation(first: np.ndarray, window: int, page_size: int) -> np.ndarray:
    """The least length to which a sequence can be cut whose pages begin in column `first`."""
    return np.where(first > 0, first * page_size + window - 1, 0)


def plan_pass(group: PageGroup, row: np.ndarray, computed: np.ndarray) -> Callable[[], None]:
    """Plan to give back what no query behind the computed tokens `[B]` of rows `[B]` sees."""
    table, begin, size = group.table, group.table.first[row], group.pool.page_size
    end = np.minimum(first_column(computed, window_of(group), size), table.end[row])
    end = np.maximum(begin, end)
    count = end - begin
    if not np.count_nonzero(count):
        return no_change
    owner = np.repeat(row, count)
    column = np.arange(len(owner)) - np.repeat(count.cumsum() - count - begin, count)
    pages = table.ids[owner, column]

    def apply() -> None:
        table.first[row] = end  # before what lies there: a row holds nothing before its first page
        table.ids[owner, column] = 0
        group.pool.pass_by(pages)

    return apply


def no_change() -> None:
    """The plan of nothing."""


def require_room(group: PageGroup, needed: int) -> None:
    """Whether a pool can ever hold so many pages for one sequence at once.

    Raises:
      SequenceTooLong: it is too small.
    """
    pool = group.pool
    if needed > pool.usable:
        window, cure = "", ""
        if group.window is not None:
            window = f" for a window of {group.window} tokens"
            cure = "compute and commit fewer tokens at once (chunk=), or "
        raise SequenceTooLong(
            f"a sequence would have {needed} pages of {pool.page_size} tokens in group "
            f"{pool.number}, whose pool has {pool.usable}{window}: {cure}create a larger pool"
        )


def require_pages(
    groups: Iterable[PageGroup], rows: RowTable, row: np.ndarray, computed: np.ndarray
) -> None:
    """Whether every window has had pages for the `computed` tokens `[B]` of rows."""
    for group in groups:
        held = group.table.end[row] * group.pool.page_size
        if (short := computed > held).any():
            at = int(short.argmax())
            raise ValueError(
                f"computed must be at most what has pages, got {computed[at]}: sequence "
                f"{rows.name(int(row[at]))} has them for {held[at]} in group {group.pool.number}; "
                "prepare first"
            )


def require_held(
    groups: Iterable[PageGroup], rows: RowTable, row: np.ndarray, length: np.ndarray
) -> None:
    """Whether every window still has what rows cut to `length` `[B]` need."""
    for group in groups:
        pool, first = group.pool, group.table.first[row]
        least = shortest_truncation(first, window_of(group), pool.page_size)
        if (short := length < least).any():
            at = int(short.argmax())
            raise PageTableError(
                f"sequence {rows.name(int(row[at]))} can be cut to {least[at]} tokens or more, got "
                f"{length[at]}: group {pool.number} has given back what its window of "
                f"{group.window} tokens has passed; free it, and allocate the shorter tokens"
            )


def window_of(group: PageGroup) -> int:
    """That of a group which has one."""
    if group.window is None:
        raise ValueError(f"group {group.pool.number} sees all tokens")
    return group.window
