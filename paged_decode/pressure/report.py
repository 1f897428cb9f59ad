"""What a run shows: one record per request, and the figures that follow from them."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from ..allocator import BlockAllocator, PageState
from ..engine import EngineStats
from ._values import as_number
from .timeline import Point, Timeline

__all__ = ["LIFETIME_EDGES", "TOO_LONG", "Record", "Report", "UsageLog", "as_json", "summarize"]

LIFETIME_EDGES = tuple(2.0**i for i in range(-10, 15))
"""Seconds between the bins of a page's lifetime: 1 ms to 4.5 h by factors of two."""

TOO_LONG = "too long"
"""The ending of a request whose prompt and one token can never fit."""

_EVERY_VISIT, _EVERY = 256, 32  # visits that all are looked at for tail waste; then every 32nd


def as_json(value: Any) -> str:
    """JSON with a line end; None is null, and a float that is not finite a ValueError."""
    return json.dumps(value, indent=1, allow_nan=False) + "\n"


@dataclass(slots=True)
class Record:
    """One request; times in seconds from the start, None if it never got there.

    `output_tokens` and `preemptions` are those of all its samples; `hit_tokens` are tokens of the
    prompt that were in the prefix cache when its first sample was admitted.
    `finished` is whether it got all its tokens. `ending` says how it ended: "length" with all of
    them; "too long" if the prompt and one token can never fit; "capacity" if the output outgrew the
    pool, or the longest sequence that the engine takes; "invalid_logits" if the model gave no
    numbers; None if it did not end.
    """

    request_id: int
    arrival_seconds: float
    prompt_tokens: int
    output_tokens: int = 0
    samples: int = 1
    hit_tokens: int = 0
    preemptions: int = 0
    first_seconds: float | None = None
    end_seconds: float | None = None
    finished: bool = False
    ending: str | None = None

    def note_admission(self, sample: Any) -> None:
        """One of its samples has got pages, for the first time or again."""
        if sample.preemptions == 0 and sample.index == 0:
            self.hit_tokens = sample.computed

    def note_end(self, reason: str, seconds: float, preemptions: int = 0) -> None:
        """One of its samples has ended, preempted so often; the request ends with the last, as the
        worst of them."""
        self.preemptions += preemptions
        self.end_seconds = max(seconds, self.end_seconds or 0.0)
        if self.ending in (None, "length"):
            self.ending = reason
        self.finished = self.ending == "length"

    @property
    def ttft_seconds(self) -> float | None:
        """From arrival to the first token."""
        return None if self.first_seconds is None else self.first_seconds - self.arrival_seconds

    @property
    def per_token_seconds(self) -> float | None:
        """Mean gap between its tokens after the first."""
        gaps = self.output_tokens / self.samples - 1
        if self.first_seconds is None or self.end_seconds is None or gaps <= 0:
            return None
        return (self.end_seconds - self.first_seconds) / gaps


@dataclass(frozen=True, slots=True)
class Report:
    """The figures of one run.

    `figures` has times in seconds and rates per second, and None where there is no value, as for
    the percentiles of what never came. `finished`, `too_long`, `outgrown` and `invalid_logits`
    count requests by how they ended (see `Record.ending`), and add up to `requests`;
    `max_sequence_tokens` is what they had to fit. `hit_rate` is the part of the prompt tokens of
    requests that fit which their first samples found in the prefix cache; `recompute_tax` is the
    part of all computed tokens that was computed again, by the sample that had lost it or by
    another one of its prompt; `utilisation` the mean part of the pool in use, over time;
    `tail_waste` the mean part of the used pages' slots that held no token when visits had been
    read, over the time that some were used. `lifetimes` counts pages by how long their content
    stayed, from being taken to being freed or evicted: one number per bin, below the first, between
    two, and above the last of `LIFETIME_EDGES`. Pages are those of the first group of layers;
    figures of others end with the group's number: "evictions/1".

    `timeline` has up to 512 points in order of time, as columns: `seconds`; pages that are free,
    cached (evictable), owned by one sequence, shared by several; samples that wait in the engine
    and that run; preemptions so far. It is the state at the end of a visit of the host.
    """

    figures: dict[str, float | None]
    records: tuple[Record, ...]
    lifetimes: tuple[int, ...] = ()
    timeline: Mapping[str, tuple[float | int, ...]] = field(default_factory=dict)

    @property
    def unfit(self) -> tuple[Record, ...]:
        """Requests that ended without all their tokens: they did not fit, or the model gave NaN."""
        return tuple(r for r in self.records if not r.finished)

    def goodput(self, ttft_seconds: float, per_token_seconds: float) -> float:
        """Finished requests per second that met both goals.

        Raises:
          ValueError: a goal is no finite number above 0.
        """
        ttft_seconds = as_number("ttft_seconds", ttft_seconds)
        per_token_seconds = as_number("per_token_seconds", per_token_seconds)
        good = [
            r
            for r in self.records
            if r.finished
            and (r.ttft_seconds or 0.0) <= ttft_seconds
            and (r.per_token_seconds or 0.0) <= per_token_seconds
        ]
        seconds = self.figures["seconds"]
        return len(good) / seconds if seconds else 0.0

    def ttft_quantiles(self) -> list[float]:
        """Seconds to the first token at 0%, 1%, ..., 100% of the requests that got one, or none."""
        values = [v for r in self.records if (v := r.ttft_seconds) is not None]
        return np.percentile(values, np.arange(101)).tolist() if values else []

    def write(self, folder: str | Path, about: Mapping[str, Any] | None = None) -> None:
        """Write `report.json` (figures, lifetimes, timeline) and `requests.csv` (records).

        Args:
          folder: made if it is not there.
          about: what was run, and figures of one's own, as JSON takes them: in front of the others.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        more = {"lifetimes": self.lifetimes, "timeline": self.timeline}
        (folder / "report.json").write_text(
            as_json({**(about or {}), **self.figures, **more}), "utf-8"
        )
        with open(folder / "requests.csv", "w", newline="", encoding="utf-8") as out:
            rows = [asdict(record) for record in self.records]
            writer = csv.DictWriter(out, [each.name for each in fields(Record)])
            writer.writeheader()
            writer.writerows(rows)


class UsageLog:
    """What the pool holds, summed up visit by visit, so that it does not grow with the workload."""

    def __init__(self, allocator: BlockAllocator):
        self._allocator, self._stamps = allocator, allocator.page_stamps()
        self._held = np.zeros(allocator.num_pages, bool)  # pages with content
        self._born = np.zeros(allocator.num_pages)  # when they got it
        self._lifetimes = np.zeros(len(LIFETIME_EDGES) + 1, np.int64)
        self._now = 0.0
        self._used = [0.0] * len(allocator.pools)  # pages times seconds
        self._peak = [0] * len(allocator.pools)
        self._before = [allocator.stats(group) for group in range(len(allocator.pools))]
        self._visits, self._due = 0, True
        self._waste = self._wasted = self._in_use = 0.0
        self._timeline, self._counts = Timeline(), (0, 0, 0)

    def held(self, now: float) -> None:
        """What is held now was held since the last call: it is about to change, or nothing ran."""
        passed, self._now = now - self._now, now
        others = (self._allocator.stats(g).used for g in range(1, len(self._used)))
        for group, used in enumerate((self._allocator.num_used, *others)):
            self._used[group] += passed * used
            self._peak[group] = max(self._peak[group], used)
        if passed > 0 and self._allocator.num_used:
            if self._due:  # it takes a look at every page
                self._waste, self._due = self._allocator.stats().tail_waste, False
            self._wasted += passed * self._waste
            self._in_use += passed

    def note(self, now: float, waiting: int = 0, running: int = 0, preemptions: int = 0) -> None:
        """A visit has ended at this time, in seconds from the start."""
        allocator = self._allocator
        self.held(now)
        self._visits += 1
        self._due = self._due or self._visits < _EVERY_VISIT or self._visits % _EVERY == 0
        states, stamps = allocator.page_states(), allocator.page_stamps()
        # Of plain ints numpy makes no wider numbers.
        holds = (states != int(PageState.FREE)) & (states != int(PageState.NULL))
        other = (stamps != self._stamps) | (holds != self._held)
        (changed,) = other.nonzero()
        ages = now - self._born[changed[self._held[changed]]]
        bins = np.searchsorted(LIFETIME_EDGES, ages)
        self._lifetimes += np.bincount(bins, minlength=len(self._lifetimes))
        self._born[changed] = now
        self._held, self._stamps = holds, stamps
        self._counts = waiting, running, preemptions
        self._timeline.note(lambda: self._point(states))

    def _point(self, states: np.ndarray) -> Point:
        kinds = PageState.FREE, PageState.CACHED, PageState.OWNED, PageState.SHARED
        counts = (int(np.count_nonzero(states == int(kind))) for kind in kinds)
        return (self._now, *counts, *self._counts)

    @property
    def timeline(self) -> Mapping[str, tuple[float | int, ...]]:
        """As `Report.timeline`."""
        return self._timeline.columns(self._point(self._allocator.page_states()))

    def counted(self, group: int = 0) -> tuple[int, int, int]:
        """Evictions, copies, and the most pages used at once, since the log began."""
        before, now = self._before[group], self._allocator.stats(group)
        # The allocator's own peak is exact, but may be older than the log; then: at visits' ends.
        peak = now.peak_used if now.peak_used > before.peak_used else self._peak[group]
        return now.evictions - before.evictions, now.copies - before.copies, peak

    def utilisation(self, group: int = 0) -> float:
        """Mean part of the usable pages that had an owner, weighted by time."""
        usable = self._allocator.pools[group][0] - 1
        return self._used[group] / self._now / usable if self._now else 0.0

    @property
    def tail_waste(self) -> float | None:
        """Mean part of the used pages' slots without a token, over the time that some were used."""
        return self._wasted / self._in_use if self._in_use else None

    @property
    def lifetimes(self) -> tuple[int, ...]:
        """Pages whose content is gone, per bin of `LIFETIME_EDGES`."""
        return tuple(self._lifetimes.tolist())


def summarize(
    records: Sequence[Record],
    stats: EngineStats,
    allocator: BlockAllocator,
    usage: UsageLog,
    seconds: float,
    limit: int,
) -> Report:
    """Make a report of what is over; `limit` is what a sequence may have of tokens."""
    fitting = [r for r in records if r.ending != TOO_LONG]
    asked = sum(r.prompt_tokens for r in fitting)
    work = stats.prefill_tokens + stats.decode_tokens
    evictions, copies, _ = usage.counted()
    finished = sum(r.finished for r in records)
    invalid = sum(r.ending == "invalid_logits" for r in records)
    figures: dict[str, float | None] = {
        "seconds": seconds,
        "requests": len(records),
        "finished": finished,
        "too_long": len(records) - len(fitting),
        "outgrown": len(fitting) - finished - invalid,
        "invalid_logits": invalid,
        "max_sequence_tokens": limit,
        "output_tokens_per_second": stats.decode_tokens / seconds if seconds else 0.0,
        "hit_rate": sum(r.hit_tokens for r in fitting) / asked if asked else None,
        "recompute_tax": stats.recomputed_tokens / work if work else None,
        "preemptions": stats.preemptions,
        "preemptions_max": max((r.preemptions for r in records), default=0),
        "preempted_requests": sum(r.preemptions > 0 for r in records),
        "swaps": stats.swaps,
        "swapped_out_pages": stats.swapped_out_pages,
        "swapped_in_pages": stats.swapped_in_pages,
        "evictions": evictions,
        "copies": copies,
        "utilisation": usage.utilisation(),
        "tail_waste": usage.tail_waste,
        "peak_used_pages": stats.peak_used_pages,
    }
    for group in range(1, len(allocator.pools)):
        evictions, copies, peak = usage.counted(group)
        figures |= {
            f"evictions/{group}": evictions,
            f"copies/{group}": copies,
            f"utilisation/{group}": usage.utilisation(group),
            f"peak_used_pages/{group}": peak,
        }
    for name in ("ttft_seconds", "per_token_seconds"):
        values = [v for r in records if (v := getattr(r, name)) is not None]
        for percentile in (50, 90, 99):
            key = f"{name}_p{percentile}"
            figures[key] = float(np.percentile(values, percentile)) if values else None
    return Report(figures, tuple(records), usage.lifetimes, usage.timeline)
