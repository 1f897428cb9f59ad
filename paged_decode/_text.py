"""Text that a file or a caller chose, made fit for a terminal, a log or a message."""

from __future__ import annotations

import os
import reprlib
from typing import Any

__all__ = ["printable", "shown"]

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
