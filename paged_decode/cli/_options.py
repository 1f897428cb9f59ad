"""Options that are checked as they are read; what is wrong with one is a line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

from .._text import printable

__all__ = ["Parser", "count", "given", "number", "option", "power_of_two"]


class Parser(argparse.ArgumentParser):
    """A parser whose complaint is one line, and not the usage, too."""

    def __init__(self, *args: Any, **kwargs: Any):
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(*args, **kwargs)

    def error(self, message: str) -> NoReturn:
        """Exit with status 2."""
        print(f"{self.prog}: {printable(message)} (see --help)", file=sys.stderr)
        raise SystemExit(2)


def option(parser: Any, name: str, text: str, *, default: Any = None, **rest: Any) -> None:
    """Add an option whose help says its default."""
    if default is not None:
        values = default if isinstance(default, list) else [default]
        words = " ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in values)
        text = f"{text} (default: {words})" if text else f"default: {words}"
    parser.add_argument(name, default=default, help=text, **rest)


def count(least: int, most: int = 2**31 - 1) -> Callable[[str], int]:
    """The type of an option: a whole number of at least so much."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:  # no number, or one of too many digits
            value = None
        if value is None or not least <= value <= most:
            raise argparse.ArgumentTypeError(
                f"expected a whole number from {least} to {most}, got {text!r:.40}"
            )
        return value

    return read


def power_of_two(text: str) -> int:
    """The type of an option: 1, 2, 4, ..."""
    value = count(1)(text)
    if value & (value - 1):
        raise argparse.ArgumentTypeError(f"expected a power of two, got {value}")
    return value


def number(*, zero: bool = False) -> Callable[[str], float]:
    """The type of an option: a finite number above 0, or from 0 on."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if (0 < value < float("inf")) or (zero and value == 0):
            return value
        wanted = "of 0 or more" if zero else "above 0"
        raise argparse.ArgumentTypeError(f"expected a finite number {wanted}, got {text!r:.40}")

    return read


def given(args: argparse.Namespace, names: Iterable[str]) -> list[str]:
    """Those of the options, by the names of their attributes, that are not None."""
    return [f"--{name.replace('_', '-')}" for name in names if getattr(args, name) is not None]
