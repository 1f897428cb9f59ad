"""Curves of one run over its time, in a few hundred points however long it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

__all__ = ["COLUMNS", "Point", "Timeline"]

Point: TypeAlias = tuple[float | int, ...]
"""One value for each of `COLUMNS`."""

COLUMNS = (
    "seconds",
    "free_pages",
    "cached_pages",
    "owned_pages",
    "shared_pages",
    "waiting",
    "running",
    "preemptions",
)

_MOST_POINTS = 512


class Timeline:
    """Points at every visit of the host; when they are too many, at every second of those.

    So the points of a run of many visits are as far apart as 2, 4, 8, ... of them, and what is
    shorter than that may lie between two.
    """

    def __init__(self) -> None:
        self._points: list[Point] = []
        self._every, self._visits = 1, 0

    def note(self, point: Callable[[], Point]) -> None:
        """A visit has ended; `point` is asked if it is to be kept."""
        if self._visits % self._every == 0:
            self._points.append(point())
            if len(self._points) == _MOST_POINTS:
                del self._points[1::2]
                self._every *= 2
        self._visits += 1

    def columns(self, last: Point | None) -> Mapping[str, tuple[float | int, ...]]:
        """Values of each of `COLUMNS` in order of time, with a last point where there is none."""
        points = list(self._points)
        if last is not None and (not points or points[-1][0] < last[0]):
            points.append(last)
        columns = zip(*points, strict=True) if points else [()] * len(COLUMNS)
        return dict(zip(COLUMNS, columns, strict=True))
