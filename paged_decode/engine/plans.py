"""From samples and what the allocator prepared for them to the records of a plan."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from ..allocator import HeldPages, PageCopies, Prepared
from ..allocator.merging import in_groups
from ..errors import OutOfPages
from .records import Decode, Enter, TableDelta
from .requests import Sample
from .room import Allocator
from .scores import Scores

__all__ = [
    "Growth",
    "Taken",
    "choose_decoding",
    "decode_plan",
    "entries_of",
    "filled_masks",
    "growing",
    "slot_of",
]

_NONE = np.empty(0, np.int32)


class Taken(NamedTuple):
    """What rows took from the pools: pages to copy, and entries of tables, of each group."""

    copies: tuple[PageCopies, ...]
    tables: tuple[TableDelta, ...]

    @classmethod
    def of(cls, slots: np.ndarray, done: Prepared | tuple[Prepared, ...]) -> Taken:
        """What `prepare` returned for the rows in these slots."""
        groups = in_groups(done)
        tables = [
            TableDelta(
                slots[each.places].astype(np.int32), each.columns.astype(np.int32), each.pages
            )
            for each in groups
        ]
        return cls(tuple(each.copies for each in groups), tuple(tables))

    @classmethod
    def total(cls, parts: Iterable[Taken], groups: int) -> Taken:
        """That of several calls, or of none, for so many groups."""
        none = cls(
            (PageCopies(_NONE, _NONE),) * groups, (TableDelta(_NONE, _NONE, _NONE),) * groups
        )
        copies, tables = zip(none, *parts, strict=True)
        return cls(
            tuple(PageCopies(*_joined(each)) for each in zip(*copies, strict=True)),
            tuple(TableDelta(*_joined(each)) for each in zip(*tables, strict=True)),
        )


def _joined(parts: Iterable[Sequence[np.ndarray]]) -> list[np.ndarray]:
    """Records of arrays, each field one behind the other."""
    return [np.concatenate(field) for field in zip(*parts, strict=True)]


class Growth(NamedTuple):
    """Rows that may go on, how many tokens each may get, and what that took from the pools.

    `lengths` are their tokens at the first step; `slots`, `lengths` and `budgets` int64 `[n]`.
    """

    rows: list[Sample]
    slots: np.ndarray
    lengths: np.ndarray
    budgets: np.ndarray
    taken: Taken

    @classmethod
    def of(cls, rows: list[Sample], steps: int, allocator: Allocator) -> Growth:
        """Pages for up to so many steps of each row; all of them, or OutOfPages."""
        handles = np.array([sample.handle for sample in rows], np.int64)
        lengths = np.array([len(sample.tokens) + sample.in_flight for sample in rows], np.int64)
        most = [sample.goal if sample.constraint is None else 1 for sample in rows]
        budgets = np.minimum([sample.goal for sample in rows] - lengths, np.minimum(most, steps))
        prepared = allocator.prepare(handles, lengths - 1 + budgets)
        slots = np.array([slot_of(sample) for sample in rows], np.int64)
        return cls(rows, slots, lengths, budgets, Taken.of(slots, prepared))

    @classmethod
    def tried(cls, rows: list[Sample], steps: int, allocator: Allocator) -> Growth | OutOfPages:
        """The same, or what is lacking."""
        try:
            return cls.of(rows, steps, allocator)
        except OutOfPages as error:
            return error

    @classmethod
    def total(cls, parts: Sequence[Growth], groups: int) -> Growth:
        """That of all shards; none has grown where there is none."""
        numbers = [(_NONE,) * 3, *((p.slots, p.lengths, p.budgets) for p in parts)]
        slots, lengths, budgets = _joined(numbers)
        rows, taken = chain.from_iterable(p.rows for p in parts), (p.taken for p in parts)
        return cls(list(rows), slots, lengths, budgets, Taken.total(taken, groups))

    def fly(self) -> list[Sample]:
        """Its steps are about to be launched; returns who needs no more of them."""
        over = []
        for sample, budget in zip(self.rows, self.budgets.tolist(), strict=True):
            sample.in_flight += budget
            if len(sample.tokens) + sample.in_flight == sample.goal:
                over.append(sample)
        return over


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


def entries_of(
    entering: Sequence[Sample],
    held: Sequence[Sequence[HeldPages]],
    grown: tuple[TableDelta, ...],
) -> tuple[tuple[Enter, ...], tuple[TableDelta, ...]]:
    """Rows that begin, with whole tables, and what grew in those that the device knows.

    `held` has of each of them its pages in every group.
    """
    if not entering:
        return (), grown
    slots = np.array([slot_of(sample) for sample in entering], np.int32)
    enter = tuple(
        Enter(slot, np.array(s.tokens, np.int32), s.generated, s.sampling, s.constraint is not None)
        for slot, s in zip(slots.tolist(), entering, strict=True)
    )
    groups = zip(grown, zip(*held, strict=True), strict=True)
    return enter, tuple(_entered(slots, pages, known) for known, pages in groups)


def _entered(slots: np.ndarray, held: Sequence[HeldPages], grown: TableDelta) -> TableDelta:
    """In one group: the whole tables of the rows in `slots`, and what grew in others."""
    spans = [range(each.first, each.first + len(each.pages)) for each in held]
    entered = (
        np.repeat(slots, [len(each.pages) for each in held]),
        np.array(list(chain.from_iterable(spans)), np.int32),
        np.array(list(chain.from_iterable(each.pages for each in held)), np.int32),
    )
    others = ~np.isin(grown.slots, slots)
    return TableDelta(
        *(np.concatenate([new, old[others]]) for new, old in zip(entered, grown, strict=True))
    )


def decode_plan(
    number: int,
    grown: Growth,
    enter: tuple[Enter, ...],
    tables: tuple[TableDelta, ...],
    masks: Mapping[Sample, np.ndarray] = MappingProxyType({}),
    scored: tuple[tuple[Scores, int], ...] = (),
    version: int = 0,
) -> Decode:
    """The steps of the rows that may go on, with the masks of those that have any, and what was
    scored before them; by weights of that version."""
    slots, budgets = grown.slots.astype(np.int32), grown.budgets.astype(np.int32)
    rows = tuple(grown.rows)
    bits = tuple((slot_of(sample), masks[sample]) for sample in rows if sample in masks)
    copies, lengths = grown.taken.copies, grown.lengths
    told = bits, scored, version
    return Decode(number, copies, tables, enter, slots, budgets, lengths, rows, *told)


def filled_masks(
    samples: Iterable[Sample], words: int
) -> tuple[dict[Sample, np.ndarray], list[tuple[Sample, str]]]:
    """The bits of those that have a mask, and whose mask has raised what."""
    found, failed = {}, []
    for sample in samples:
        if (constraint := sample.constraint) is not None:
            try:
                found[sample] = constraint.bits(sample.tokens[sample.prompt_len :], words)
            except Exception as error:  # of the user's object: it concerns that request alone
                failed.append((sample, f"{type(error).__name__}: {error}"))
    return found, failed


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
