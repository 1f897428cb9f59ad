"""From rows to the padded arrays of a step."""

from typing import NamedTuple, SupportsIndex

import numpy as np

from .arguments import as_count
from .batch import DecodeBatch, GroupBatch
from .errors import PageTableError
from .groups import PageGroup
from .rows import RowTable

__all__ = ["Frame", "check_span", "fill_span"]

_MAX_ENTRIES = 2**28  # 1 GiB of int32: a ValueError, before memory runs out
Groups = tuple[PageGroup, ...]


class Frame(NamedTuple):
    """The arrays of a batch: page tables and slots for every group, and what is common to all.

    It is made of padding before anything changes, so that a size which cannot be had fails then.
    Every shard fills in its rows; `at` are their places in the batch.
    """

    tokens: np.ndarray
    positions: np.ndarray
    seq_lens: np.ndarray
    groups: list[tuple[np.ndarray, np.ndarray, np.ndarray | None]]
    query_lens: np.ndarray | None

    @classmethod
    def empty(
        cls,
        groups: Groups,
        num_rows: int,
        num_tokens: int,
        pad_to: SupportsIndex | None,
        columns: SupportsIndex | None,
        *,
        held: int,
        needed: int,
    ) -> "Frame":
        """For rows that hold up to `held` pages and show up to `needed` of them."""
        padded = num_rows if pad_to is None else as_count("pad_to", pad_to)
        if padded < num_rows:
            raise ValueError(f"pad_to must be at least B = {num_rows} rows, got {padded}")
        if columns is None:
            columns = 1 << (max(held, needed, 1) - 1).bit_length()
        width = as_count("columns", columns, 1)
        if width < needed:
            raise ValueError(
                f"columns must be at least {needed}, the pages of the longest row, got {width}"
            )
        if padded * max(width, num_tokens) > _MAX_ENTRIES:
            raise ValueError(
                f"pad_to * columns and pad_to * tokens_per_row must be at most {_MAX_ENTRIES}, got "
                f"{padded} rows, {width} columns and {num_tokens} tokens"
            )
        shape, lens = (padded, num_tokens), np.zeros(padded, np.int32)
        tables = [
            (
                np.zeros((padded, width), np.int32),
                np.zeros(shape, np.int32),
                None if group.window is None else lens.copy(),
            )
            for group in groups
        ]
        own = lens.copy() if num_tokens > 1 else None
        return cls(np.zeros(shape, np.int32), np.zeros(shape, np.int32), lens, tables, own)

    def put(self, number: int, group: PageGroup, at: slice | np.ndarray, row: np.ndarray) -> None:
        """Fill in the rows of the page table of one group, and what they hold of it."""
        (page_table, _, starts), ids = self.groups[number], group.table.ids
        if starts is not None:
            starts[at] = group.table.first[row] * group.pool.page_size
        if isinstance(at, slice) and page_table.shape[1] == ids.shape[1] and not group.base:
            ids.take(row, axis=0, out=page_table[at], mode="clip")  # no copy in between
            return
        width = min(page_table.shape[1], ids.shape[1])
        page_table[at, :width] = group.whole(ids.take(row, axis=0)[:, :width])

    def batch(self, groups: Groups) -> DecodeBatch:
        """All rows are filled in."""
        framed = [
            GroupBatch(*arrays, group.pool.page_size, group.num_pages, group.window)
            for group, arrays in zip(groups, self.groups, strict=True)
        ]
        common = self.tokens, self.seq_lens, self.positions
        return DecodeBatch(*common, tuple(framed), self.query_lens)


def fill_span(
    frame: Frame,
    at: slice | np.ndarray,
    groups: Groups,
    rows: RowTable,
    row: np.ndarray,
    begin: np.ndarray,
    end: np.ndarray,
) -> None:
    """Fill in positions begin to end - 1 of each row, right-aligned in T columns."""
    width = frame.tokens.shape[1]
    positions = end[:, None] - width + np.arange(width)
    valid = positions >= begin[:, None]
    owner, written = np.broadcast_to(row[:, None], valid.shape)[valid], positions[valid]
    tokens = np.zeros(positions.shape, np.int32)
    for number, group in enumerate(groups):
        slots = np.zeros(positions.shape, np.int64)
        slots[valid] = local = group.slots(owner, written)
        _check_one_writer(group, rows, owner, local)
        if number == 0:
            known = group.pool.tokens.reshape(-1)[local]
            tokens[valid] = np.where(written < rows.length[owner], known, 0)
        frame.put(number, group, at, row)
        frame.groups[number][1][at] = group.whole(slots, group.pool.page_size)
    frame.tokens[at], frame.seq_lens[at], frame.positions[at] = tokens, end, positions.clip(0)
    if frame.query_lens is not None:
        frame.query_lens[at] = end - begin


def check_span(
    group: PageGroup,
    rows: RowTable,
    row: np.ndarray,
    begin: np.ndarray,
    end: np.ndarray,
    num_tokens: int,
    at: slice | np.ndarray,
) -> None:
    """Whether the rows, at these places of the call, may be written from begin to end - 1."""
    pool, table = group.pool, group.table
    capacity = table.end[row] * pool.page_size
    rules = (
        (begin < rows.computed[row], "begin must be at least the computed tokens"),
        (begin > end, "begin must be at most end"),
        (end > capacity, "end must be at most the capacity (prepare first)"),
        (end - begin > num_tokens, f"end - begin must be at most tokens_per_row = {num_tokens}"),
    )
    for broken, rule in rules:
        if broken.any():
            b = int(broken.argmax())
            raise ValueError(
                f"{rule}, got begin {begin[b]} and end {end[b]} in row {_place(at, b)}, a sequence "
                f"of {rows.length[row[b]]} tokens, {rows.computed[row[b]]} computed, and capacity "
                f"{capacity[b]}"
            )
    length = rows.length[row]
    # The page of the first position past the length; the null page (refs 1) if there is none.
    tail = table.ids[row, length // pool.page_size]
    guarded = (end > length) & ((pool.refs[tail] != 1) | pool.cache.published[tail])
    if guarded.any():
        b = int(guarded.argmax())
        raise PageTableError(
            f"row {_place(at, b)} would write past its length {length[b]} on page "
            f"{group.base + tail[b]}, which other sequences or the prefix cache rely on; call "
            "reserve and carry out its copies first"
        )


def _place(at: slice | np.ndarray, b: int) -> int:
    return b if isinstance(at, slice) else int(at[b])


def _check_one_writer(group: PageGroup, rows: RowTable, row: np.ndarray, slots: np.ndarray) -> None:
    order = slots.argsort(kind="stable")
    twins = (np.diff(slots[order]) == 0).nonzero()[0]
    if twins.size:
        first, second = row[order[twins[0]]], row[order[twins[0] + 1]]
        slot = slots[order[twins[0]]] + group.base * group.pool.page_size
        raise PageTableError(
            f"sequences {rows.name(int(first))} and {rows.name(int(second))} would both "
            f"write slot {slot} in one step: they share that page; compute one "
            "of them, then commit both"
        )
