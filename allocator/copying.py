"""Keys and values that a copy brings to a sequence, instead of a program: pages held aside for it.

```
W 6, S 4, computed 9; a tier has what is needed of 30 tokens
column      1    2    .    6    7                   1    2    6    7
         [ own ][ own ]  [aside][aside]   ->                [ own ][ own ]
                          are filled          commit        computed 30
```

Only windows need that: other groups have pages for all tokens, and are filled where they lie.
"""

from collections.abc import Callable

import numpy as np

from .bookkeeping import Bookkeeping
from .groups import Aside, PageGroup
from .windows import first_column, require_room

__all__ = ["plan_cancel_copy", "plan_commit_copy", "plan_prepare_copy"]


def plan_prepare_copy(
    books: Bookkeeping, row: int, computed: int
) -> Callable[[], tuple[list[int], ...]]:
    """`BlockAllocator.prepare_copy`; what was held aside before goes back."""
    cancel = plan_cancel_copy(books, row)
    _require_computed(books, row, computed)
    counts = [
        group.pool.pages_for(computed) - _first(group, computed) if group.window else 0
        for group in books.groups
    ]
    for group, count in zip(books.groups, counts, strict=True):
        require_room(group, count)
        before = group.table.aside.get(row)
        group.pool.require(count - (0 if before is None else len(before.pages)))

    def apply() -> tuple[list[int], ...]:
        cancel()
        for group, count in zip(books.groups, counts, strict=True):
            group.table.aside[row] = Aside(computed, group.pool.take(count))
        held = ((group, group.table.aside[row].pages) for group in books.groups)
        return tuple(group.whole(pages).tolist() for group, pages in held)

    return apply


def plan_commit_copy(books: Bookkeeping, row: int) -> Callable[[], int]:
    """`BlockAllocator.commit_copy`."""
    rows, aside = books.rows, [group.table.aside.get(row) for group in books.groups]
    if aside[0] is None:
        raise ValueError("no pages are held aside for a copy: call prepare_copy first")
    computed = aside[0].computed
    _require_computed(books, row, computed)
    held = [group.table.pages(row).copy() for group in books.windows]
    published = books.plan_publication(np.array([row]), np.array([computed]))

    def apply() -> int:
        for group, pages in zip(books.windows, held, strict=True):
            table = group.table
            table.cut(row, int(table.first[row]))
            table.set(row, table.aside[row].pages, _first(group, computed))
            del table.aside[row]
            group.pool.pass_by(pages)
        for group in books.groups:
            group.table.aside.pop(row, None)
        published()
        rows.computed[row] = computed  # never more than there are entries for
        described = computed  # what was described behind that has no pages in a window any more
        if not held:
            described = max(computed, int(rows.described[row]))
        rows.describe(row, described)
        return computed

    return apply


def plan_cancel_copy(books: Bookkeeping, row: int) -> Callable[[], None]:
    """`BlockAllocator.cancel_copy`."""
    held = [(group, group.table.aside[row]) for group in books.groups if row in group.table.aside]
    plans = [(group, group.pool.plan_release(aside.pages)) for group, aside in held]

    def apply() -> None:
        for group, release in plans:
            group.table.aside.pop(row, None)
            group.pool.release(release)

    return apply


def _first(group: PageGroup, computed: int) -> int:
    return int(first_column(computed, group.window or 1, group.pool.page_size))


def _require_computed(books: Bookkeeping, row: int, computed: int) -> None:
    known, length = int(books.rows.computed[row]), int(books.rows.length[row])
    if not known <= computed <= length:
        raise ValueError(f"computed must be from {known} to {length}, got {computed}")
