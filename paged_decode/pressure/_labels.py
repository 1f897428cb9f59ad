"""What tells runs from each other, in words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

__all__ = ["DIMENSIONS", "MAIN_FIGURES", "label", "quantity", "swept"]

DIMENSIONS = {
    "eviction": "eviction",
    "victim": "victim",
    "preemption": "preemption",
    "admission": "admission",
    "link_bytes": "link to the host, bytes per second",
    "pages": "usable pages",
}
"""What a sweep goes over, in the order in which it does, and the words for it."""

MAIN_FIGURES = (
    ("finished", "finished"),
    ("output_tokens_per_second", "tokens/s"),
    ("goodput", "goodput"),
    ("ttft_seconds_p90", "ttft p90"),
    ("hit_rate", "hit rate"),
    ("recompute_tax", "tax"),
    ("preemptions", "preemptions"),
)
"""Figures for a terminal, and their names there."""


def swept(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Those of `DIMENSIONS` in which the runs are not all alike."""
    return [name for name in DIMENSIONS if len({run.get(name) for run in runs}) > 1]


def label(run: Mapping[str, Any], names: Iterable[str]) -> str:
    """Such as "eviction lfu, preemption swap, 512 pages"; "all" if there is nothing to tell."""
    words = []
    for name in names:
        value = run.get(name)
        if name == "pages":
            words.append(f"{value} pages")
        elif name == "link_bytes" and value is not None:
            words.append(f"link {quantity(value)}B/s")
        else:
            words.append(f"{name} {value}")
    return ", ".join(words) or "all"


def quantity(number: int | float) -> str:
    """Such as 512, 12,288, 50G."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if number >= size:
            return f"{number / size:.4g}{unit}"
    return f"{number:,.0f}" if number == int(number) else f"{number:.4g}"
