"""What a run shows: one record per request, and the figures that follow from them."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from .._engine_config import EngineStats
from ..allocator import BlockAllocator

__all__ = ["Record", "Report", "summarize"]


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
    hit_tokens: int = 0
    preemptions: int = 0
    first_seconds: float | None = None
    end_seconds: float | None = None
    finished: bool = False

    @property
    def ttft_seconds(self) -> float | None:
        """From arrival to the first token."""
        return None if self.first_seconds is None else self.first_seconds - self.arrival_seconds

    @property
    def per_token_seconds(self) -> float | None:
        """Mean gap between its tokens after the first."""
        if self.first_seconds is None or self.end_seconds is None or self.output_tokens < 2:
            return None
        return (self.end_seconds - self.first_seconds) / (self.output_tokens - 1)


@dataclass(frozen=True, slots=True)
class Report:
    """The figures of one run.

    `figures` has times in seconds and rates per second; `recompute_tax` is the part of all
    computed tokens that was computed again; `utilisation` the mean part of the pool in use.
    """

    figures: dict[str, float]
    records: tuple[Record, ...]

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
        (folder / "report.json").write_text(json.dumps(self.figures, indent=1) + "\n")
        with open(folder / "requests.csv", "w", newline="") as out:
            rows = [asdict(record) for record in self.records]
            writer = csv.DictWriter(out, list(rows[0]) if rows else ["request_id"])
            writer.writeheader()
            writer.writerows(rows)


def summarize(
    records: Sequence[Record],
    stats: EngineStats,
    allocator: BlockAllocator,
    usage: Sequence[tuple[float, int]],
    seconds: float,
) -> Report:
    """Make a report; `usage` is pages in use, each with the seconds that it lasted."""
    asked = sum(r.prompt_tokens for r in records)
    work = stats.prefill_tokens + stats.decode_tokens
    lasted = sum(s for s, _ in usage)
    figures: dict[str, float] = {
        "seconds": seconds,
        "requests": len(records),
        "finished": sum(r.finished for r in records),
        "output_tokens_per_second": stats.decode_tokens / seconds if seconds else 0.0,
        "hit_rate": sum(r.hit_tokens for r in records) / asked if asked else 0.0,
        "recompute_tax": stats.recomputed_tokens / work if work else 0.0,
        "preemptions": stats.preemptions,
        "evictions": allocator.stats().evictions,
        "utilisation": sum(s * u for s, u in usage) / lasted / allocator.usable_pages
        if lasted
        else 0.0,
        "peak_used_pages": stats.peak_used_pages,
    }
    for name in ("ttft_seconds", "per_token_seconds"):
        values = [v for r in records if (v := getattr(r, name)) is not None]
        for percentile in (50, 90, 99):
            key = f"{name}_p{percentile}"
            figures[key] = float(np.percentile(values, percentile)) if values else float("nan")
    return Report(figures, tuple(records))
