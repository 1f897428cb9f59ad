"""Text for a terminal, a log or a message; what a file or a caller chose is made fit for it."""

from __future__ import annotations

import os
import reprlib
import sys
from collections.abc import Iterable
from typing import Any

__all__ = ["print_table", "printable", "say", "shown", "size_text"]

_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 80


def printable(text: str | os.PathLike[str], most: int = 4096) -> str:
    """The text with every character escaped that moves a cursor, hides, or turns what is around it.

    Controls, line ends, marks of direction and halves of characters become `\\n`, `\\x1b`,
    `\\u202e`; what is longer than `most` is cut in the middle. Plain text stays as it is.
    """
    whole = os.fspath(text)
    if len(whole) > most:
        half = (most - 3) // 2
        whole = f"{whole[:half]}...{whole[-half:]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in whole)


def shown(value: Any) -> str:
    """Any value as `repr` shows it, but short, and not deep."""
    return _short.repr(value)


def print_table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> None:
    """Print columns as wide as they must be, below a head."""
    rows = [head, *rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    for at, row in enumerate(rows):
        say("  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip())
        if at == 0:
            say("  ".join("-" * w for w in widths))


def say(line: str) -> None:
    """Print a line; what the terminal has no letters for is escaped."""
    encoding = sys.stdout.encoding or "utf-8"
    print(line.encode(encoding, "backslashreplace").decode(encoding))


def size_text(size: int | float) -> str:
    """Bytes, in the unit of 1024 that suits."""
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
