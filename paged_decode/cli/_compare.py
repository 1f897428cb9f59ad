"""Figures of several runs side by side, in no more than the 80 columns of a terminal."""

from __future__ import annotations

import csv
import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .._text import printable, say
from ..pressure._case import CASE_FIELDS
from ..pressure._labels import label, swept

__all__ = ["print_runs", "read_runs", "write_csv"]

_WIDE = 80
_CELL = 16


def read_runs(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Every run of files that `run` or `sweep` wrote, with `report`, the file's name, in front.

    Raises:
      OSError: a file cannot be read.
      ValueError: it is no such file.
    """
    runs: list[dict[str, Any]] = []
    for path in paths:
        try:
            # NaN is none: figures of old reports have it where there is no value.
            content = json.loads(path.read_text("utf-8"), parse_constant=lambda _: None)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is no JSON: {error}") from None
        found = content if isinstance(content, list) else [content]
        if not found or any(not isinstance(run, dict) or "requests" not in run for run in found):
            raise ValueError(f"{path} is no report.json or sweep.json, but other JSON")
        runs += [{"report": str(path), **run} for run in found]
    return runs


def print_runs(runs: Sequence[dict[str, Any]]) -> list[str]:
    """Print them, the first one as it is and the others with their ratio; returns the figures."""
    names = [n for n in runs[0] if n != "report" and all(_is_plain(r.get(n, [])) for r in runs)]
    same = [n for n in names if n in CASE_FIELDS and all(r[n] == runs[0][n] for r in runs)]
    numbers = [n for n in names if n not in same and all(_is_number(run[n]) for run in runs)]
    texts = [n for n in ("card", "model") if n in names and len({r[n] for r in runs}) == 1]
    _print_legend(runs, [*same, *texts])
    width = max(map(len, numbers), default=0)
    step = max(1, (_WIDE - width) // (_CELL + 2))
    for begin in range(0, len(runs), step):
        block = range(begin, min(begin + step, len(runs)))
        say("")
        say(_line("", width, [f"[{at + 1}]" for at in block]))
        for name in numbers:
            first = runs[0][name]
            cells = [_cell(runs[at][name], first if at else None) for at in block]
            say(_line(name, width, cells))
    return names


def _print_legend(runs: Sequence[dict[str, Any]], same: Sequence[str]) -> None:
    """Which number is which run, and what all have in common."""
    dims = swept(runs)
    files = len({run["report"] for run in runs}) > 1
    for at, run in enumerate(runs):
        words = f"{label(run, dims)}" if dims else ""
        name = run["report"] if files or not dims else ""
        text = "  ".join(filter(None, (words, name)))
        say(f"[{at + 1}]  {printable(text, _WIDE - 8 - len(str(at)))}")
    words = (f"{name} {_text(runs[0][name])}" for name in same if runs[0][name] is not None)
    if text := "; ".join(words):
        for line in textwrap.wrap(printable(f"The same in all: {text}"), _WIDE):
            say(line)


def _line(name: str, width: int, cells: Sequence[str]) -> str:
    return f"{name:<{width}}" + "".join(f"  {cell:>{_CELL}}" for cell in cells)


def _cell(value: int | float | None, first: int | float | None) -> str:
    if value is None:
        return "none"
    text = str(value)
    if isinstance(value, float) or len(text) > 8:
        text = f"{value:.4g}"
    return f"{text} (x{_short(value / first)})" if first else text


def _short(ratio: int | float) -> str:
    return f"{ratio:.2f}" if ratio < 1000 else f"{ratio:.0e}"


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float)


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Figures of runs, those that have one value; nothing where there is none."""
    names = [name for name, value in rows[0].items() if _is_plain(value)]
    with open(path, "w", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, names, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
