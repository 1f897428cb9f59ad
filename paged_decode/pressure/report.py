"""What a run shows: one record per request, and the figures that follow from them."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..allocator import BlockAllocator, PageState
from ..engine import EngineStats

__all__ = ["LIFETIME_EDGES", "Record", "Report", "UsageLog", "summarize"]

LIFETIME_EDGES = tuple(2.0**i for i in range(-10, 15))
"""Seconds between the bins of a page's lifetime: 1 ms to 4.5 h by factors of two."""

_WASTE_EVERY = 32  # visits: the tail waste takes a look at every page


@dataclass(slots=True)
class Record:
    """One request; times in seconds from the start, None where it did not come so far.

    `finished` is whether it got all its tokens: a prompt that can never fit, or an output that
    outgrew the pool, has an end but did not finish.
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

    def note_admission(self, sample: Any) -> None:
        """One of its samples has got pages, for the first time or again."""
        if sample.preemptions == 0 and sample.index == 0:
            self.hit_tokens = sample.computed
        self.preemptions = max(self.preemptions, sample.preemptions)

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

    `figures` has times in seconds and rates per second; `recompute_tax` is the part of all
    computed tokens that was computed again; `utilisation` the mean part of the pool in use;
    `tail_waste` the mean part of the used pages' slots that held no token. `lifetimes` counts pages
    by how long their content stayed, from being taken to being freed or evicted: one number per
    bin, below the first, between two, and above the last of `LIFETIME_EDGES`. Pages are those
    of the first group of layers; figures of others end with the group's number: "evictions/1".
    """

    figures: dict[str, float]
    records: tuple[Record, ...]
    lifetimes: tuple[int, ...] = ()

    def goodput(self, ttft_seconds: float, per_token_seconds: float) -> float:
        """Finished requests per second that met both goals."""
        good = [
            r
            for r in self.records
            if r.finished
            and (r.ttft_seconds or 0.0) <= ttft_seconds
            and (r.per_token_seconds or 0.0) <= per_token_seconds
        ]
        return len(good) / self.figures["seconds"] if self.figures["seconds"] else 0.0

    def write(self, folder: str | Path) -> None:
        """Write `report.json` (figures) and `requests.csv` (records)."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        report = self.figures | {"lifetimes": list(self.lifetimes)}
        (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")
        with open(folder / "requests.csv", "w", newline="") as out:
            rows = [asdict(record) for record in self.records]
            writer = csv.DictWriter(out, list(rows[0]) if rows else ["request_id"])
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
        self._used = np.zeros(len(allocator.pools))
        self._visits = self._looks = 0
        self._waste = 0.0

    def note(self, now: float) -> None:
        """A visit has ended at this time, in seconds from the start."""
        allocator = self._allocator
        used = [allocator.num_used, *(allocator.stats(g).used for g in range(1, len(self._used)))]
        self._used += (now - self._now) * np.array(used)
        self._now = now
        if self._visits % _WASTE_EVERY == 0 and allocator.num_used:
            self._waste += allocator.stats().tail_waste
            self._looks += 1
        self._visits += 1
        states, stamps = allocator.page_states(), allocator.page_stamps()
        holds = (states != PageState.FREE) & (states != PageState.NULL)
        other = (stamps != self._stamps) | (holds != self._held)
        (changed,) = other.nonzero()
        ages = now - self._born[changed[self._held[changed]]]
        bins = np.searchsorted(LIFETIME_EDGES, ages)
        self._lifetimes += np.bincount(bins, minlength=len(self._lifetimes))
        self._born[changed] = now
        self._held, self._stamps = holds, stamps

    def utilisation(self, group: int = 0) -> float:
        """Mean part of the usable pages that had an owner, weighted by time."""
        usable = self._allocator.pools[group][0] - 1
        return float(self._used[group]) / self._now / usable if self._now else 0.0

    @property
    def tail_waste(self) -> float:
        """Mean part of the used pages' slots without a token, over every 32nd visit."""
        return self._waste / self._looks if self._looks else 0.0

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
) -> Report:
    """Make a report of what is over."""
    asked = sum(r.prompt_tokens for r in records)
    work = stats.prefill_tokens + stats.decode_tokens
    counted = allocator.stats()
    figures: dict[str, float] = {
        "seconds": seconds,
        "requests": len(records),
        "finished": sum(r.finished for r in records),
        "output_tokens_per_second": stats.decode_tokens / seconds if seconds else 0.0,
        "hit_rate": sum(r.hit_tokens for r in records) / asked if asked else 0.0,
        "recompute_tax": stats.recomputed_tokens / work if work else 0.0,
        "preemptions": stats.preemptions,
        "preemptions_max": max((r.preemptions for r in records), default=0),
        "preempted_requests": sum(r.preemptions > 0 for r in records),
        "swaps": stats.swaps,
        "swapped_out_pages": stats.swapped_out_pages,
        "swapped_in_pages": stats.swapped_in_pages,
        "evictions": counted.evictions,
        "copies": counted.copies,
        "utilisation": usage.utilisation(),
        "tail_waste": usage.tail_waste,
        "peak_used_pages": stats.peak_used_pages,
    }
    for group in range(1, len(allocator.pools)):
        of_group = allocator.stats(group)
        figures |= {
            f"evictions/{group}": of_group.evictions,
            f"copies/{group}": of_group.copies,
            f"utilisation/{group}": usage.utilisation(group),
            f"peak_used_pages/{group}": of_group.peak_used,
        }
    for name in ("ttft_seconds", "per_token_seconds"):
        values = [v for r in records if (v := getattr(r, name)) is not None]
        for percentile in (50, 90, 99):
            key = f"{name}_p{percentile}"
            figures[key] = float(np.percentile(values, percentile)) if values else float("nan")
    return Report(figures, tuple(records), usage.lifetimes)
