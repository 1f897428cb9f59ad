"""From rows of the sequence table to the padded arrays of a step."""

from typing import SupportsIndex

import numpy as np

from .arguments import as_count
from .batch import DecodeBatch
from .errors import PageTableError
from .pool import PagePool
from .sequences import SequenceTable

__all__: list[str] = []

_MAX_ENTRIES = 2**28


def slots_of(
    table: SequenceTable, page_size: int, row: np.ndarray, position: np.ndarray
) -> np.ndarray:
    """Where positions of rows (two arrays of one shape) lie in the pool."""
    return table.page_table[row, position // page_size] * page_size + position % page_size


def empty_page_table(
    rows: SupportsIndex | None,
    columns: SupportsIndex | None,
    held: np.ndarray,
    num_pages: int,
    num_tokens: int = 1,
) -> np.ndarray:
    """Zeros for the page table of rows that hold `held` pages, and show up to `num_pages`.

    It is made before anything changes, so that a size which cannot be had fails here.
    """
    least_rows = len(held)
    num_rows = least_rows if rows is None else as_count("rows", rows)
    if num_rows < least_rows:
        raise ValueError(f"rows must be at least B = {least_rows}, got {num_rows}")
    if columns is None:
        columns = 1 << (max(int(held.max(initial=0)), num_pages, 1) - 1).bit_length()
    num_columns = as_count("columns", columns, 1)
    if num_columns < num_pages:
        raise ValueError(
            f"columns must be at least {num_pages}, the pages of the longest row, got {num_columns}"
        )
    if num_rows * max(num_columns, num_tokens) > _MAX_ENTRIES:
        raise ValueError(
            f"rows * columns and rows * tokens_per_row must be at most {_MAX_ENTRIES}, got "
            f"{num_rows} rows, {num_columns} columns and {num_tokens} tokens"
        )
    return np.zeros((num_rows, num_columns), np.int32)


def frame_rows(
    page_table: np.ndarray,
    table: SequenceTable,
    row: np.ndarray,
    seq_lens: np.ndarray,
    positions: np.ndarray,
    slots: np.ndarray,
) -> DecodeBatch:
    """Fill the empty page table and make arrays as long as it; what is behind B rows stays 0."""
    num_rows, num_columns = page_table.shape
    width = min(num_columns, table.page_table.shape[1])
    page_table[: len(row), :width] = table.page_table.take(row, axis=0)[:, :width]
    return DecodeBatch(
        page_table=page_table,
        seq_lens=_padded(seq_lens, num_rows),
        positions=_padded(positions, num_rows),
        slots=_padded(slots, num_rows),
    )


def _padded(array: np.ndarray, num_rows: int) -> np.ndarray:
    """A new int32 array of so many rows, 0 behind those that `array` has."""
    if len(array) == num_rows:
        return array.astype(np.int32)
    out = np.zeros((num_rows, *array.shape[1:]), np.int32)
    out[: len(array)] = array
    return out


def frame_span(
    page_table: np.ndarray,
    table: SequenceTable,
    page_size: int,
    row: np.ndarray,
    begin: np.ndarray,
    end: np.ndarray,
    num_tokens: int,
) -> DecodeBatch:
    """Describe positions begin to end - 1 of each row, right-aligned in T columns."""
    positions = end[:, None] - num_tokens + np.arange(num_tokens)
    valid = positions >= begin[:, None]
    at = np.broadcast_to(row[:, None], valid.shape)[valid]
    written = slots_of(table, page_size, at, positions[valid])
    _check_one_writer(table, at, written)
    slots = np.zeros(positions.shape, np.int64)
    slots[valid] = written
    return frame_rows(page_table, table, row, end, np.maximum(positions, 0), slots)


def check_span(
    pool: PagePool,
    table: SequenceTable,
    row: np.ndarray,
    begin: np.ndarray,
    end: np.ndarray,
    num_tokens: int,
) -> None:
    """Whether the rows may be written from begin to end - 1."""
    page_size = pool.page_size
    capacity = table.num_pages[row] * page_size
    rules = (
        (begin < table.computed[row], "begin must be at least the computed tokens"),
        (begin > end, "begin must be at most end"),
        (end > capacity, "end must be at most the capacity (reserve first)"),
        (end - begin > num_tokens, f"end - begin must be at most tokens_per_row = {num_tokens}"),
    )
    for broken, rule in rules:
        if broken.any():
            b = int(broken.argmax())
            raise ValueError(
                f"{rule}, got begin {begin[b]} and end {end[b]} in row {b}, a sequence of "
                f"{table.length[row[b]]} tokens, {table.computed[row[b]]} computed, and capacity "
                f"{capacity[b]}"
            )
    length = table.length[row]
    # The page of the first position past the length; the null page (refs 1) if there is none.
    tail = table.page_table[row, length // page_size]
    guarded = (end > length) & ((pool.refs[tail] != 1) | pool.cache.published[tail])
    if guarded.any():
        b = int(guarded.argmax())
        raise PageTableError(
            f"row {b} would write past its length {length[b]} on page {tail[b]}, which other "
            "sequences or the prefix cache rely on; call reserve and carry out its copies first"
        )


def _check_one_writer(table: SequenceTable, row: np.ndarray, slots: np.ndarray) -> None:
    order = slots.argsort(kind="stable")
    twins = (np.diff(slots[order]) == 0).nonzero()[0]
    if twins.size:
        first, second = row[order[twins[0]]], row[order[twins[0] + 1]]
        raise PageTableError(
            f"sequences {table.handle(int(first))} and {table.handle(int(second))} would both "
            f"write slot {slots[order[twins[0]]]} in one step: they share that page; compute one "
            "of them, then commit both"
        )
