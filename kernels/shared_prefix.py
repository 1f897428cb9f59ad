"""Which rows of a batch share the pages they begin with: found on the device, from the page tables.

```
page table   row 0   [7 3 9 | 4 1]      rows 0, 2 and 3 begin with the pages 7 3 9: a part of
             row 1   [5 8 2   6]        the plan reads these once for all of them, and each row
             row 2   [7 3 9 | 11]       has its own tail, behind the bar, to itself. Row 1 shares
             row 3   [7 3 9 | 10 12]    nothing.
```

Shapes are static, and nothing goes through the host: a program makes a plan once and hands it to
the attention of all of its layers and steps, as long as no row leaves the pages that it began with.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from .checks import AnyArray, check_axes, check_index, narrow
from .placement import Placement

__all__ = ["PLAN_AXES", "SharedPrefix", "shared_prefix_plan"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class SharedPrefix:
    """Which rows share a prefix, as `shared_prefix_plan` finds it: up to V parts of up to R rows.

    With a data axis V, too, is split over the shards, and rows count within their shard.

    Attributes:
      page_table: int32 `[V, P]`, the pages of each part.
      seq_lens: int32 `[V]`, tokens of each that its rows share; 0 where there is no such part.
      members: int32 `[V, R]`, its rows; B for nobody.
      place: int32 `[B]`, where each row is in `members`, counted through; V * R: it is nowhere.
      starts: int32 `[B]`, the first token of each row's own tail; 0 if it shares nothing.
    """

    page_table: Any
    seq_lens: Any
    members: Any
    place: Any
    starts: Any


PLAN_AXES = dict(page_table="B, P", seq_lens="B", members="B, R", place="B", starts="B")
"""How the arrays of a plan are split on a mesh: parts are, as rows are."""


def shared_prefix_plan(
    page_table: Int[AnyArray, "B P"],
    seq_lens: Int[AnyArray, " B"],
    *,
    page_size: int,
    members: int = 16,
    parts: int | None = None,
    min_tokens: int = 512,
    placement: Placement | None = None,
) -> SharedPrefix:
    """Find the rows that begin with the same pages; all of it is an XLA program on the device.

    Each row joins those with which the most reading is saved: a long prefix of few rows, or a short
    one of many, but one of them. Only whole pages in front of the newest token count, so every row
    keeps a tail. The plan holds for these rows as long as the pages of their prefixes stay in their
    columns and lengths do not fall: through all the steps of a program that only appends.

    Args:
      page_table: int32 `[B, P]`.
      seq_lens: int32 `[B]`, tokens of each row, the newest one included; 0 for a row that shares
        nothing.
      page_size: S, tokens in a page.
      members: R, rows that read a prefix together at most, and no more than B; of more, every R
        do. With the G query heads of a KV head they fill a tile of queries: kernels take
        R * G = 64 at once, so a part of more is cut.
      parts: V, how many there are at most; those that save most are taken, and the rows of the
        others read alone. None: a quarter of B.
      min_tokens: a part that saves reading fewer tokens than these is not formed.
      placement: of the pool; with a data axis page ids are those of each row's shard, and V is
        counted for each.

    Raises:
      TypeError: tables or lengths that are not of int32 or int64.
      ValueError: shapes that disagree, or sizes below 1 (`members` below 2).

    Examples:
      >>> import jax.numpy as jnp
      >>> table = jnp.array([[7, 3, 9, 4], [5, 8, 2, 6], [7, 3, 9, 1], [7, 3, 9, 10]])
      >>> plan = shared_prefix_plan(table, jnp.array([14, 16, 13, 15]), page_size=4, min_tokens=1)
      >>> plan.seq_lens.tolist(), plan.starts.tolist()
      ([12], [12, 0, 12, 12])
    """
    check_index("page_table", page_table)
    check_index("seq_lens", seq_lens)
    check_axes("page_table", page_table, "B, P")
    check_axes("seq_lens", seq_lens, "B", B=page_table.shape[0])
    for name, size, least in (
        ("page_size", page_size, 1),
        ("members", members, 2),
        ("parts", 1 if parts is None else parts, 1),
        ("min_tokens", min_tokens, 1),
    ):
        if isinstance(size, bool) or not isinstance(size, int) or size < least:
            raise ValueError(f"{name} must be an int >= {least}; got {size!r}")
    if placement is not None:
        placement.check(page_table.shape[0])
    return _plan(page_table, seq_lens, page_size, members, parts, min_tokens, placement)


@partial(jax.jit, static_argnums=(2, 3, 4, 5, 6))
@partial(jax.named_call, name="paged_decode.shared_prefix_plan")
def _plan(
    page_table: Array,
    seq_lens: Array,
    page_size: int,
    members: int,
    parts: int | None,
    min_tokens: int,
    placement: Placement | None,
) -> SharedPrefix:
    def local(table: Array, lens: Array) -> tuple[Array, ...]:
        rows = max(table.shape[0], 1)
        most = max(rows // 4, 1) if parts is None else parts
        table = narrow(table, jnp.iinfo(jnp.int32).max)
        lens = narrow(lens, table.shape[1] * page_size + 1)
        pages, together = _groups(table, (lens - 1) // page_size)
        return _parts(table, pages, together, page_size, min(members, rows), most, min_tokens)

    if placement is None or page_table.shape[0] == 0:
        return SharedPrefix(*local(page_table, seq_lens))
    found = placement.run(local, ("B, P", "B"), PLAN_AXES.values(), page_table, seq_lens)
    return SharedPrefix(*found)


def _groups(table: Int[Array, "B P"], whole: Int[Array, " B"]) -> tuple[Array, Array]:
    """Of each row, how many pages it shares, of the first `whole` ones; and with whom, `[B, B]`.

    Rows that have the same first d pages are a class, and classes of larger d lie within those of
    smaller ones. A row of a class of n reads d (1 - 1/n) pages less in it than alone. It takes the
    class where that is most, and of equal ones that of the largest d, as its companions do.
    """
    columns = table.shape[1]
    column = jnp.arange(columns, dtype=jnp.int32)
    differ = jnp.where(table[:, None] != table, column, columns)
    whole = jnp.clip(whole, 0, columns)
    common = jnp.min(differ, axis=2, initial=columns)
    common = jnp.minimum(common, jnp.minimum(whole[:, None], whole))
    number = jnp.sum(common[:, None] >= common[:, :, None], axis=2, dtype=jnp.float32)
    saved = common.astype(jnp.float32) * (1 - 1 / number)
    best = jnp.max(saved, axis=1, keepdims=True, initial=0)
    pages = jnp.max(jnp.where((saved == best) & (best > 0), common, 0), axis=1, initial=0)
    alike = (common >= pages[:, None]) & (pages == pages[:, None]) & (pages > 0)
    return pages, alike


def _parts(
    table: Int[Array, "B P"],
    pages: Int[Array, " B"],
    together: Array,
    page_size: int,
    members: int,
    parts: int,
    min_tokens: int,
) -> tuple[Array, ...]:
    """The arrays of the plan: each group in parts of at most `members` rows, and of these the
    `parts` that save most."""
    rows = table.shape[0]
    row = jnp.arange(rows, dtype=jnp.int32)
    rank = jnp.sum(together & (row < row[:, None]), axis=1, dtype=jnp.int32)
    which = rank // members
    mine = together & (which == which[:, None])
    count = jnp.sum(mine, axis=1, dtype=jnp.int32)
    tokens = pages * page_size
    saved = (count - 1).astype(jnp.float32) * tokens.astype(jnp.float32)
    first = (rank % members == 0) & (saved >= min_tokens)
    most, leader = lax.top_k(jnp.where(first, saved, 0), min(parts, rows))
    part = jnp.arange(len(leader), dtype=jnp.int32)
    exists = most > 0

    number = jnp.full(rows, parts, jnp.int32)
    number = number.at[leader].set(jnp.where(exists, part, parts))
    # The first row of mine is the one that leads it; of nobody's, `mine` has none.
    number = number[jnp.argmax(mine, axis=1)] if rows else number
    inside = jnp.any(mine, axis=1) & (number < parts)
    nowhere = len(leader) * members
    place = jnp.where(inside, number * members + rank % members, nowhere)
    seats = jnp.full(nowhere, rows, jnp.int32).at[place].set(row, mode="drop")
    return (
        table[leader],
        jnp.where(exists, tokens[leader], 0),
        seats.reshape(-1, members),
        place,
        jnp.where(inside, tokens, 0),
    )
