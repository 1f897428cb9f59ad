"""Prompts that are being computed: whose turn it is, in which programs, on which pages."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np

from ..errors import OutOfPages
from .config import EngineConfig
from .plans import Taken, slot_of
from .records import Chunk, Enter, Prefill, TableDelta
from .requests import Sample
from .room import Allocator
from .scores import Scores

__all__ = ["Chunks", "Prefilling", "scored_by"]


class Chunks(NamedTuple):
    """What one program computes, for whom, and what that took from the pools of windows."""

    width: int
    chunks: tuple[Chunk, ...]
    samples: list[Sample]
    taken: Taken
    scored: bool

    def plan(self, enter: tuple[Enter, ...], tables: tuple[TableDelta, ...]) -> Prefill:
        """The plan, with the rows that begin and what changes in tables."""
        copies, own = self.taken.copies, (self.chunks, tuple(self.samples), self.scored)
        return Prefill(copies, tables, enter, self.width, *own)


class Prefilling:
    """Samples whose prompts are computed: in a visit, each has a turn as far as tokens last.

    Attributes:
      samples: who can still have a turn in this visit; whose is next comes first.
      under_way: whether this visit has a program.
      closed: whether nobody may join in this visit: somebody was preempted for who is here.
    """

    def __init__(self, allocator: Allocator, config: EngineConfig):
        self._allocator, self._config = allocator, config
        self.samples: list[Sample] = []
        self._short: list[Sample] = []  # who found no pages in this visit
        self._served: list[Sample] = []  # who has a turn in it
        self._nothing = Taken.total([], len(allocator.pools))
        self._windows = any(window is not None for _, window in allocator.pools)
        self.end_visit()

    def end_visit(self) -> None:
        """The next visit begins: everybody can have a turn again."""
        self.samples, self._short = self._short + self.samples, []
        self.under_way = self.closed = False
        self._budget = self._config.prefill_tokens

    @property
    def any(self) -> bool:
        """Whether there is a prompt to compute."""
        return bool(self.samples or self._short or self._served)

    @property
    def has_rows(self) -> bool:
        """Whether the next program has a prompt for each of its rows."""
        return len(self.samples) >= self._config.prefill_rows

    def leave(self, sample: Sample) -> bool:
        """A sample gives up its row; whether it was here."""
        here = sample in self.samples
        if here:
            self.samples.remove(sample)
        return here

    def next_chunks(self) -> Chunks | OutOfPages | None:
        """Take pages for the chunks of a program; if nobody can have any, what the first lacks.

        Where there are not enough for all, one chunk of each prompt that can have them, in turn.
        None: a visit has one program, and more as long as its tokens last.
        """
        scored = self.samples[0].unscored
        rows = 1 if scored else self._config.prefill_rows
        alike = [sample for sample in self.samples if sample.unscored == scored]
        samples = alike[:rows]
        chunks = self._chunks(samples, rows)
        width = self._width(chunks)
        if self.under_way and self._budget is not None and self._budget < width * rows:
            return None
        taken: Taken | OutOfPages = self._nothing
        if self._windows:  # other groups have had pages for the whole prompt from the start
            ends = _ends_of(chunks)
            taken = self._prepare(samples, [ends[slot_of(sample)] for sample in samples])
        if isinstance(taken, Taken):
            return self._given(Chunks(width, chunks, samples, taken, scored))
        able: list[tuple[Sample, Taken]] = []
        lacking: list[tuple[Sample, OutOfPages]] = []
        for sample in alike:
            one = self._prepare([sample], [self._end(sample, sample.computed)])
            if isinstance(one, OutOfPages):
                lacking.append((sample, one))
            else:
                able.append((sample, one))
                if len(able) == rows:
                    break
        if not able:
            return lacking[0][1]
        for sample, _ in lacking:
            self.samples.remove(sample)
            self._short.append(sample)
        samples = [sample for sample, _ in able]
        chunks = self._chunks(samples, 1)
        total = Taken.total((one for _, one in able), len(self._allocator.pools))
        return self._given(Chunks(self._width(chunks), chunks, samples, total, scored))

    def _given(self, found: Chunks) -> Chunks:
        """A program more of this visit."""
        for sample in found.samples:
            self.samples.remove(sample)
        self._served += found.samples
        self.under_way = True
        if self._budget is not None:
            self._budget -= found.width * (1 if found.scored else self._config.prefill_rows)
        return found

    def turn(self, plans: Sequence[Prefill]) -> list[tuple[Sample, int]]:
        """The plans are launched: their samples, and how many tokens each has computed now; who has
        more to compute goes behind the others."""
        ends = _ends_of([chunk for plan in plans for chunk in plan.chunks])
        served = [(sample, ends[slot_of(sample)]) for sample in self._served]
        self.samples += [sample for sample, end in served if end < len(sample.tokens) - 1]
        self._served = []
        return served

    def _chunks(self, samples: Sequence[Sample], most: int) -> tuple[Chunk, ...]:
        """The rows of a program; who comes first in `samples` is served first.

        Where there are fewer prompts than rows, a prompt has several rows, up to `most`, one behind
        the other: in every layer all rows write their keys and values before one is read.
        """
        turn = deque((sample, sample.computed) for sample in samples)
        chunks: list[Chunk] = []
        rows = min(self._config.prefill_rows, most * len(samples))
        while turn and len(chunks) < rows:
            sample, begin = turn.popleft()
            last, end = len(sample.tokens) - 1, self._end(sample, begin)
            targets = sample.tokens[begin + 1 : end + 1] if sample.unscored else ()
            chunks.append(Chunk(slot_of(sample), begin, sample.tokens[begin:end], targets))
            if end < last:
                turn.append((sample, end))
        return tuple(chunks)

    def _width(self, chunks: Sequence[Chunk]) -> int:
        if chunks[0].targets:
            return self._config.score_chunk
        widest = max(len(chunk.tokens) for chunk in chunks)
        return next(size for size in self._config.chunk_buckets if size >= widest)

    def _end(self, sample: Sample, begin: int) -> int:
        """That of a chunk that begins there."""
        config = self._config
        most = config.score_chunk if sample.unscored else config.prefill_chunk
        return min(begin + most, len(sample.tokens) - 1)

    def _prepare(self, samples: Sequence[Sample], ends: Sequence[int]) -> Taken | OutOfPages:
        """Pages for all positions of these rows below their `ends`; all of them or none."""
        try:
            done = self._allocator.prepare([sample.handle for sample in samples], ends)
        except OutOfPages as error:
            return error
        return Taken.of(np.array([slot_of(sample) for sample in samples], np.int64), done)


def scored_by(plans: Sequence[Prefill]) -> list[tuple[Scores, int]]:
    """Whose prompts these programs score, and from which position, in the order of the results."""
    scored = (zip(plan.samples, plan.chunks, strict=True) for plan in plans if plan.scored)
    pairs = chain.from_iterable(scored)
    return [(s.scores, chunk.begin) for s, chunk in pairs if s.scores is not None]


def _ends_of(chunks: Sequence[Chunk]) -> dict[int, int]:
    """Up to where each slot is computed by them."""
    return {chunk.slot: chunk.begin + len(chunk.tokens) for chunk in chunks}
