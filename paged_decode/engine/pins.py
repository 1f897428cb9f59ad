"""Prefixes that stay in the prefix cache: each is a sample that is computed and never decodes."""

from __future__ import annotations

from ..allocator.arguments import Ints
from ..allocator.prefix import salt_key
from ..errors import SequenceTooLong
from .config import EngineConfig
from .params import SamplingParams
from .requests import Sample, prompt_ids
from .room import Allocator, Room

__all__ = ["PIN", "Pins", "new_pin"]

PIN = SamplingParams(max_new_tokens=1)  # of every pin, which gets no token


def new_pin(
    tokens: Ints,
    cache_salt: str | bytes | None,
    *,
    allocator: Allocator,
    config: EngineConfig,
    limit: int,
) -> Sample:
    """The full pages of some tokens, and a token behind them that is never computed.

    Raises:
      NotImplementedError: the pool is split over a data axis.
      SequenceTooLong: the pages and one token are more than `limit`.
      TypeError, ValueError: an argument is not what it should be, or there is nothing to keep.
    """
    if allocator.num_shards > 1:
        raise NotImplementedError(
            "pin: a prefix of a pool that is split over a data axis would have to be computed by "
            "every shard, and a request finds what its own shard has"
        )
    if not allocator.prefix_cache:
        raise ValueError("pin needs a prefix cache: create the allocator with prefix_cache=True")
    ids, size = prompt_ids(tokens, config.vocab_size), allocator.page_size
    salt_key(cache_salt)
    if (full := len(ids) // size * size) == 0:
        raise ValueError(f"pin keeps full pages of {size} tokens, got {len(ids)} tokens")
    if full + 1 > limit:
        raise SequenceTooLong(
            f"{full} tokens of full pages and one more need {full + 1} places, but a sequence can "
            f"have {limit} (usable pages * page_size, or max_sequence_tokens)"
        )
    return Sample(-1, 0, full + 1, [*ids[:full], 0], PIN, cache_salt, pinned=True)


class Pins:
    """Pins by their ids. One that is computed keeps its pages and has no row.

    Where there is no room for one though nothing runs, it is put off until more pages can be had.

    Attributes:
      samples: all of them.
    """

    def __init__(self, allocator: Allocator, room: Room):
        self.samples: dict[int, Sample] = {}
        self._allocator, self._room = allocator, room
        self._put_off: dict[int, tuple[int, ...]] = {}  # what could be had then

    @property
    def busy(self) -> bool:
        """Whether one is yet to be computed, and can be."""
        return any(
            not pin.decoding and (number not in self._put_off or self._has_more(number))
            for number, pin in self.samples.items()
        )

    @property
    def pages(self) -> tuple[int, ...]:
        """How many pages of each group they hold."""
        own = [pin.handle for pin in self.samples.values() if pin.handle is not None]
        held = [self._allocator.sequence(handle).groups for handle in own]
        groups = range(len(self._allocator.pools))
        return tuple(len({page for each in held for page in each[g].pages}) for g in groups)

    def put_off(self, pin: Sample) -> None:
        """It has no pages, and there are not enough."""
        self._put_off[pin.request_id] = self._room.available()

    def _has_more(self, number: int) -> bool:
        before = self._put_off[number]
        return any(now > then for now, then in zip(self._room.available(), before, strict=True))

    def back(self) -> list[Sample]:
        """Who was put off, and may find room now."""
        numbers = [number for number in self._put_off if self._has_more(number)]
        for number in numbers:
            del self._put_off[number]
        return [self.samples[number] for number in numbers]

    def forget(self, number: int) -> None:
        """It is given up."""
        self._put_off.pop(number, None)
        self.samples.pop(number, None)

    def clear(self) -> None:
        """All of them wait."""
        self._put_off = {}

    def lost(self) -> list[Sample]:
        """Whose pages cannot be found any more: somebody who had them too may have broken them."""
        match = self._allocator.match_prefix
        held = [pin for pin in self.samples.values() if pin.decoding]
        return [pin for pin in held if match(pin.key) < len(pin.tokens) - 1]
