"""Prompts that are being computed: whose turn it is, in which programs, on which pages."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..errors import OutOfPages
from .config import EngineConfig
from .plans import Taken, slot_of
from .records import Chunk, Prefill
from .requests import Sample
from .room import Allocator

__all__ = ["Chunks", "Prefilling"]

Programs = tuple[tuple[int, tuple[Chunk, ...]], ...]


class Chunks(NamedTuple):
    """What one visit computes, for whom, and what that took from the pools of windows."""

    programs: Programs
    samples: list[Sample]
    taken: Taken


class Prefilling:
    """Samples whose prompts are computed, in turn.

    Attributes:
      samples: whose turn is next comes first.
    """

    def __init__(self, allocator: Allocator, config: EngineConfig):
        self._allocator, self._config = allocator, config
        self.samples: list[Sample] = []
        self._nothing = Taken.total([], len(allocator.pools))
        self._windows = any(window is not None for _, window in allocator.pools)

    def next_chunks(self) -> Chunks | OutOfPages:
        """Take pages for the chunks of this visit; if nobody can have any, what the first lacks.

        Where there are not enough for all, one chunk of each prompt that can have them, in turn.
        """
        programs, served = _programs(self.samples, self._config, self._config.prefill_rows)
        samples, ends = self.samples[:served], _ends_of(programs)
        if not self._windows:  # other groups have had pages for the whole prompt from the start
            return Chunks(programs, samples, self._nothing)
        taken = self._prepare(samples, [ends[slot_of(sample)] for sample in samples])
        if isinstance(taken, Taken):
            return Chunks(programs, samples, taken)
        each = [self._prepare([sample], [self._end(sample)]) for sample in self.samples]
        able = [s for s, one in zip(self.samples, each, strict=True) if isinstance(one, Taken)]
        if isinstance(each[0], OutOfPages) and not able:
            return each[0]
        programs, served = _programs(able, self._config, 1)
        parts = (one for one in each if isinstance(one, Taken))
        return Chunks(programs, able[:served], Taken.total(parts, len(self._allocator.pools)))

    def turn(self, plan: Prefill) -> list[int]:
        """The plan is launched: how many tokens its samples have computed now, in their order;
        who has more to compute goes behind the others."""
        ends = _ends_of(plan.programs)
        computed = [ends[slot_of(sample)] for sample in plan.samples]
        rest = [sample for sample in self.samples if slot_of(sample) not in ends]
        pairs = zip(plan.samples, computed, strict=True)
        self.samples = rest + [s for s, end in pairs if end < len(s.tokens) - 1]
        return computed

    def _end(self, sample: Sample) -> int:
        """That of its next chunk."""
        return min(sample.computed + self._config.prefill_chunk, len(sample.tokens) - 1)

    def _prepare(self, samples: Sequence[Sample], ends: Sequence[int]) -> Taken | OutOfPages:
        """Pages for all positions of these rows below their `ends`; all of them or none."""
        try:
            done = self._allocator.prepare([sample.handle for sample in samples], ends)
        except OutOfPages as error:
            return error
        return Taken.of(np.array([slot_of(sample) for sample in samples], np.int64), done)


def _ends_of(programs: Programs) -> dict[int, int]:
    """Up to where each slot is computed by them."""
    chunks = (chunk for _, chunks in programs for chunk in chunks)
    return {chunk.slot: chunk.begin + len(chunk.tokens) for chunk in chunks}


def _programs(samples: Sequence[Sample], config: EngineConfig, chunks: int) -> tuple[Programs, int]:
    """As many programs as the budget of tokens has room for, one at least; who comes first in
    `samples` is served first.

    Where there are fewer prompts than rows, a prompt has several rows, up to `chunks`, one behind
    the other: in every layer all rows write their keys and values before one is read.

    Returns:
      The programs, and how many of the samples are in them.
    """
    programs: list[tuple[int, tuple[Chunk, ...]]] = []
    budget = config.prefill_tokens
    for first in range(0, len(samples), config.prefill_rows):
        part = _chunks(samples[first : first + config.prefill_rows], config, chunks)
        widest = max(len(chunk.tokens) for chunk in part)
        width = next(size for size in config.chunk_buckets if size >= widest)
        if budget is not None:
            budget -= width * config.prefill_rows
            if budget < 0 and programs:
                return tuple(programs), first
        programs.append((width, part))
    return tuple(programs), len(samples)


def _chunks(samples: Sequence[Sample], config: EngineConfig, most: int) -> tuple[Chunk, ...]:
    turn = deque((sample, sample.computed) for sample in samples)
    chunks: list[Chunk] = []
    rows = min(config.prefill_rows, most * len(samples))
    while turn and len(chunks) < rows:
        sample, begin = turn.popleft()
        last = len(sample.tokens) - 1
        end = min(begin + config.prefill_chunk, last)
        chunks.append(Chunk(slot_of(sample), begin, sample.tokens[begin:end]))
        if end < last:
            turn.append((sample, end))
    return tuple(chunks)
