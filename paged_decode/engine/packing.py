"""From the records of a plan to the int32 message that its program takes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from ..sharding import rank_within
from .config import EngineConfig
from .params import SamplingParams
from .records import Chunk, Decode, Enter
from .rows import RowSizes, detail_message, mask_messages

__all__ = ["Packing"]


class Packing(NamedTuple):
    """Shapes of messages; slots of all `shards`, `max_rows` of each, lie in one row of numbers.

    Padding names the slot behind the last one.
    """

    config: EngineConfig
    shards: int
    sizes: RowSizes

    @property
    def slots(self) -> int:
        """Of all shards."""
        return self.shards * self.config.max_rows

    def places(self, slots: np.ndarray, size: int) -> np.ndarray:
        """Where rows lie among those of a program, which has `size` of every shard."""
        if self.shards == 1:
            return np.arange(len(slots))
        shard = slots // self.config.max_rows
        return shard * size + rank_within(shard)

    def prefill(self, width: int, chunks: Sequence[Chunk], size: int) -> np.ndarray:
        """Slot, begin, end and tokens of so many rows of each shard, `[size, 3 + width]`."""
        out = np.zeros((self.shards * size, 3 + width), np.int32)
        out[:, 0] = self.slots
        slots = np.array([chunk.slot for chunk in chunks], np.int64)
        for place, chunk in zip(self.places(slots, size), chunks, strict=True):
            count = len(chunk.tokens)
            out[place, :3] = chunk.slot, chunk.begin, chunk.begin + count
            out[place, 3 + width - count :] = chunk.tokens
        return out

    def score(self, chunks: Sequence[Chunk]) -> np.ndarray:
        """The same of one row of each shard, and the tokens behind those."""
        width = self.config.score_chunk
        behind = [Chunk(each.slot, each.begin, each.targets) for each in chunks]
        parts = self.prefill(width, chunks, 1), self.prefill(width, behind, 1)[:, 3:]
        return np.concatenate(parts, axis=1)

    def decode(self, slots: np.ndarray, budgets: np.ndarray) -> tuple[int, np.ndarray, np.ndarray]:
        """The bucket, slots and budgets of its rows `[2, n]`, and where those of the plan are."""
        shard = slots // self.config.max_rows
        most = int(np.bincount(shard).max()) if len(slots) else self.config.max_rows
        size = next(size for size in self.config.row_buckets if size >= most)
        out = self.idle(size)
        places = self.places(slots, size)
        out[0, places], out[1, places] = slots, budgets
        return size, out, places

    def idle(self, size: int) -> np.ndarray:
        """The message of a decode program in which no row does anything."""
        out = np.zeros((2, self.shards * size), np.int32)
        out[0] = self.slots
        return out

    def detail(self, enter: Enter) -> np.ndarray:
        """What few rows have, of this one."""
        return detail_message(enter.slot, enter.tokens, enter.sampling, self.sizes)

    def no_detail(self) -> np.ndarray:
        """The same of nobody."""
        return self.detail(Enter(self.slots, np.empty(0, np.int32), 0, SamplingParams()))

    def masks(self, plan: Decode) -> Iterator[np.ndarray]:
        """The masks of a visit."""
        return mask_messages(plan.masks, self.slots, self.sizes.words)

    def no_mask(self) -> np.ndarray:
        """One of nobody."""
        nobody = self.slots, np.zeros(self.sizes.words, np.int32)
        return next(mask_messages([nobody], self.slots, self.sizes.words))
