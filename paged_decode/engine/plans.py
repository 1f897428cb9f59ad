"""From samples and what the allocator prepared for them to the records of a plan."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np

from ..allocator import PageCopies
from ..allocator.merging import in_groups
from ..requests import Sample
from .config import EngineConfig
from .records import Chunk, Decode, Enter, TableDelta
from .room import Allocator

__all__ = [
    "Growth",
    "choose_decoding",
    "decode_plan",
    "entries_of",
    "growing",
    "prefill_programs",
    "slot_of",
]

_NONE = np.empty(0, np.int32)


class Growth(NamedTuple):
    """Rows that may go on, how many tokens each may get, and what that took from the pool.

    `lengths` are their tokens at the first step; `slots`, `lengths` and `budgets` int64 `[n]`.
    """

    rows: list[Sample]
    slots: np.ndarray
    lengths: np.ndarray
    budgets: np.ndarray
    copies: PageCopies
    tables: TableDelta

    @classmethod
    def of(cls, rows: list[Sample], steps: int, allocator: Allocator) -> Growth:
        """Pages for up to so many steps of each row; all of them, or OutOfPages."""
        handles = np.array([sample.handle for sample in rows], np.int64)
        lengths = np.array([len(sample.tokens) + sample.in_flight for sample in rows], np.int64)
        budgets = np.minimum([sample.goal for sample in rows] - lengths, steps)
        (prepared,) = in_groups(allocator.prepare(handles, lengths - 1 + budgets))
        slots = np.array([slot_of(sample) for sample in rows], np.int64)
        places = slots[prepared.places].astype(np.int32)
        tables = TableDelta(places, prepared.columns.astype(np.int32), prepared.pages)
        return cls(rows, slots, lengths, budgets, prepared.copies, tables)

    @classmethod
    def total(cls, parts: Sequence[Growth]) -> Growth:
        """That of all shards."""
        none = cls([], _NONE, _NONE, _NONE, PageCopies(_NONE, _NONE), TableDelta(*[_NONE] * 3))
        rows, slots, lengths, budgets, copies, tables = zip(none, *parts, strict=True)
        return cls(
            list(chain.from_iterable(rows)),
            np.concatenate(slots),
            np.concatenate(lengths),
            np.concatenate(budgets),
            PageCopies(*map(np.concatenate, zip(*copies, strict=True))),
            TableDelta(*map(np.concatenate, zip(*tables, strict=True))),
        )


def slot_of(sample: Sample) -> int:
    """The row of a sample that has one."""
    if sample.slot is None:
        raise RuntimeError(f"sample {sample.index} of request {sample.request_id} has no row")
    return sample.slot


def growing(samples: Iterable[Sample]) -> list[Sample]:
    """Those that decode and can get more tokens than they were launched for."""
    rows = []
    for sample in samples:
        length = len(sample.tokens)
        if sample.computed == length - 1 and length + sample.in_flight < sample.goal:
            rows.append(sample)
    return rows


def prefill_programs(
    samples: Sequence[Sample], config: EngineConfig
) -> tuple[tuple[tuple[int, tuple[Chunk, ...]], ...], int]:
    """As many programs as the budget of tokens has room for, one at least; who comes first in
    `samples` is served first.

    Where there are fewer prompts than rows, a prompt has several rows, one behind the other: in
    every layer all rows write their keys and values before one is read.

    Returns:
      The programs, and how many of the samples are in them.
    """
    programs: list[tuple[int, tuple[Chunk, ...]]] = []
    budget = config.prefill_tokens
    for first in range(0, len(samples), config.prefill_rows):
        chunks = _chunks(samples[first : first + config.prefill_rows], config)
        widest = max(len(chunk.tokens) for chunk in chunks)
        width = next(size for size in config.chunk_buckets if size >= widest)
        if budget is not None:
            budget -= width * config.prefill_rows
            if budget < 0 and programs:
                return tuple(programs), first
        programs.append((width, chunks))
    return tuple(programs), len(samples)


def _chunks(samples: Sequence[Sample], config: EngineConfig) -> tuple[Chunk, ...]:
    turn = deque((sample, sample.computed) for sample in samples)
    chunks: list[Chunk] = []
    while turn and len(chunks) < config.prefill_rows:
        sample, begin = turn.popleft()
        last = len(sample.tokens) - 1
        end = min(begin + config.prefill_chunk, last)
        chunks.append(Chunk(slot_of(sample), begin, sample.tokens[begin:end]))
        if end < last:
            turn.append((sample, end))
    return tuple(chunks)


def entries_of(
    entering: Sequence[Sample], pages: Sequence[Sequence[int]], grown: TableDelta | None = None
) -> tuple[tuple[Enter, ...], tuple[TableDelta, ...]]:
    """Rows that begin, with whole tables, and what grew in those that the device knows."""
    if not entering:
        return (), (TableDelta(_NONE, _NONE, _NONE) if grown is None else grown,)
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
    slots, budgets = grown.slots.astype(np.int32), grown.budgets.astype(np.int32)
    rows = tuple(grown.rows)
    return Decode(number, grown.copies, tables, enter, slots, budgets, grown.lengths, rows)


def choose_decoding(samples: Iterable[Sample], request_id: int, index: int | None) -> Sample:
    """The sample of a request that is decoding; None: the only one.

    Raises:
      KeyError: there is none.
      ValueError: there are several, and it is not said which.
    """
    found = [s for s in samples if s.request_id == request_id and s.decoding]
    if index is None and len(found) > 1:
        raise ValueError(
            f"request {request_id} has {len(found)} samples that are decoding: say which one, "
            f"sample={found[0].index}"
        )
    for sample in found:
        if index in (None, sample.index):
            return sample
    which = "" if index is None else f"sample {index} of "
    raise KeyError(f"{which}request {request_id} is not decoding")
