"""What the charts of a sweep have in common, as PNGs and in the page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

__all__ = ["OVER_SWEEP", "Known", "Number", "alike"]

Number: TypeAlias = int | float
Known: TypeAlias = Sequence[tuple[Number, Number]]

OVER_SWEEP = (
    ("output_tokens_per_second", "Output tokens per second", "tokens per second"),
    ("goodput", "Goodput: finished requests within both goals", "requests per second"),
    ("ttft_seconds_p90", "Time to first token, 90th percentile", "seconds"),
    ("hit_rate", "Prompt tokens found in the cache", "part of prompt tokens"),
    ("recompute_tax", "Tokens computed again", "part of computed tokens"),
)
"""Figures of a sweep, their titles and units."""


def alike(lines: Sequence[Known], near: Number) -> list[tuple[int, int]]:
    """Of each line: its place among those that go where it goes, and how many they are."""
    firsts: list[int] = []  # of each line, the first one that it follows
    for i, line in enumerate(lines):
        like = (j for j in range(i) if firsts[j] == j and _coincide(lines[j], line, near))
        firsts.append(next(like, i))
    return [(firsts[:i].count(first), firsts.count(first)) for i, first in enumerate(firsts)]


def _coincide(
    a: Known,
    b: Known,
    near: Number,
) -> bool:
    """Whether most of the way that both go is one way."""
    other = dict(b)
    close = [abs(y - other[x]) <= near for x, y in a if x in other]
    return bool(close) and sum(close) > 0.5 * len(close)
