"""From samples and what the allocator prepared for them to the records of a plan."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from ..allocator import PageCopies, Prepared
from ..requests import Sample
from .records import Chunk, Decode, Enter, TableDelta

__all__ = ["Growth", "chunk_of", "decode_plan", "entries_of", "slot_of"]

_NONE = np.empty(0, np.int32)


class Growth(NamedTuple):
    """Rows that may go on, how many tokens each may get, and what that took from the pool."""

    rows: list[Sample]
    budgets: list[int]
    copies: PageCopies
    tables: TableDelta

    @classmethod
    def of(cls, rows: list[Sample], budgets: list[int], prepared: Prepared) -> Growth:
        slots = np.array([slot_of(sample) for sample in rows], np.int32)[prepared.places]
        tables = TableDelta(slots, prepared.columns.astype(np.int32), prepared.pages)
        return cls(rows, budgets, prepared.copies, tables)

    @classmethod
    def total(cls, parts: Iterable[Growth]) -> Growth:
        """That of all shards."""
        rows, budgets, copies, tables = [], [], [(_NONE, _NONE)], [(_NONE, _NONE, _NONE)]
        for part in parts:
            rows += part.rows
            budgets += part.budgets
            copies.append(part.copies)
            tables.append(part.tables)
        return cls(
            rows,
            budgets,
            PageCopies(*map(np.concatenate, zip(*copies, strict=True))),
            TableDelta(*map(np.concatenate, zip(*tables, strict=True))),
        )


def slot_of(sample: Sample) -> int:
    """The row of a sample that has one."""
    if sample.slot is None:
        raise RuntimeError(f"sample {sample.index} of request {sample.request_id} has no row")
    return sample.slot


def chunk_of(sample: Sample, size: int) -> Chunk:
    """The next so many tokens of its prompt, or as many as there are."""
    end = min(sample.computed + size, len(sample.tokens) - 1)
    return Chunk(slot_of(sample), sample.computed, sample.tokens[sample.computed : end])


def entries_of(
    entering: Sequence[Sample], pages: Sequence[Sequence[int]], grown: TableDelta | None = None
) -> tuple[tuple[Enter, ...], tuple[TableDelta, ...]]:
    """Rows that begin, with whole tables, and what grew in those that the device knows."""
    slots = [slot_of(sample) for sample in entering]
    counts = [len(each) for each in pages]
    parts = [
        TableDelta(
            np.repeat(np.array(slots, np.int32), counts),
            np.concatenate([_NONE, *(np.arange(count, dtype=np.int32) for count in counts)]),
            np.concatenate([_NONE, *(np.array(each, np.int32) for each in pages)]),
        )
    ]
    if grown is not None and grown.slots.size:
        known = ~np.isin(grown.slots, slots) if slots else slice(None)
        parts.append(TableDelta(*(array[known] for array in grown)))
    enter = tuple(
        Enter(slot, int(s.tokens[-1]), len(s.tokens), s.generated, s.sampling)
        for slot, s in zip(slots, entering, strict=True)
    )
    return enter, (TableDelta(*map(np.concatenate, zip(*parts, strict=True))),)


def decode_plan(
    number: int, grown: Growth, enter: tuple[Enter, ...], tables: tuple[TableDelta, ...]
) -> Decode:
    """The steps of the rows that may go on."""
    return Decode(
        number,
        grown.copies,
        tables,
        enter,
        np.array([slot_of(sample) for sample in grown.rows], np.int32),
        np.array(grown.budgets, np.int32),
        np.array([len(s.tokens) + s.in_flight for s in grown.rows], np.int64),
        tuple(grown.rows),
    )
