"""What a sample has beside its parameters: its turn, its limits, and whether it is a pin."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from ..engine.pins import PIN
from ..engine.requests import MOST_PRIORITY, Sample
from ._asked import OWN
from ._format import require

__all__ = [
    "own_of",
    "require_own",
    "require_pins",
    "require_places",
    "turn_and_limits",
]

_MAX_PLACE = 2**53


def own_of(samples: Sequence[Sample], now: float) -> Iterator[dict[str, Any]]:
    """What samples have beside their parameters. Places count from the first one's, and matter
    where some priority does."""
    ordered = any(s.priority for s in samples)
    first = min((s.place for s in samples), default=0)
    for sample in samples:
        yield {
            "masked": sample.constraint is not None,
            "max_wait": sample.admit_by - now,
            "pinned": sample.pinned,
            "place": sample.place - first if ordered else 0,
            "priority": sample.priority,
            "timeout": sample.end_by - now,
        }


def require_own(row: int, own: Mapping[str, Any]) -> None:
    """Raise SnapshotCorrupt unless the values are such that a writer writes."""
    title = f"what request {row} asks for"
    for name, value in own.items():
        require(value != OWN[name], f"{title}: {name} is at its default")
        if isinstance(value, float):
            one = math.isfinite(value) and (value != 0 or math.copysign(1, value) > 0)
            require(one, f"{title}: {name} is not finite, or -0")
    require(0 <= own.get("place", 0) <= _MAX_PLACE, f"{title}: place is not from 1 to 2**53")
    require(
        -MOST_PRIORITY - 1 <= own.get("priority", 0) <= MOST_PRIORITY,
        f"{title}: priority is not from -2**31 to 2**31 - 1",
    )


def require_places(samples: Sequence[Sample]) -> None:
    """Raise SnapshotCorrupt unless they count from the first, and are there for a reason."""
    places = [s.place for s in samples]
    require(not any(places) or any(s.priority for s in samples), "places, but no priorities")
    require(min(places, default=0) == 0, "places do not begin with 0")


def require_pins(
    samples: Sequence[Sample], running: Sequence[Sample], told: Collection[int], size: int
) -> None:
    """Raise SnapshotCorrupt unless every pin is one.

    Args:
      samples: all of them.
      running: those with pages.
      told: requests of events.
      size: tokens of a page.
    """
    pins = [s for s in samples if s.pinned]
    others = {s.request_id for s in samples if not s.pinned}.union(told)
    own, runs = {pin.request_id for pin in pins}, {id(s) for s in running}
    require(
        len(own) == len(pins) and others.isdisjoint(own),
        "a pin has the id of a request or of another pin",
    )
    for pin in pins:
        plain = pin.index, pin.priority, pin.admit_by, pin.end_by, pin.siblings, pin.sampling
        plain = *plain, pin.constraint
        full = len(pin.tokens) - 1
        require(
            plain == (0, 0, math.inf, math.inf, [], PIN, None) and id(pin) not in runs,
            f"pin {pin.request_id} runs, or is more than a prefix",
        )
        require(
            pin.prompt_len == full + 1 and full > 0 and full % size == 0 and pin.tokens[-1] == 0,
            f"pin {pin.request_id} is not of full pages and a token 0 behind them",
        )


def turn_and_limits(sample: Sample) -> tuple[int, int, float, float, bool, bool]:
    """What siblings have in common."""
    masked, limits = sample.constraint is not None, (sample.admit_by, sample.end_by)
    return sample.priority, sample.place, *limits, sample.pinned, masked
