"""Numbers that a caller, an option or a line of a trace gave, checked; all raise ValueError."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from typing import Any

import numpy as np

from .._text import shown

__all__ = ["as_number", "as_whole", "as_wholes"]


def as_whole(name: str, value: Any, least: int = 0, most: int = 2**31 - 1) -> int:
    """A Python int in [least, most], of any integer type; a bool, a float or a text is refused."""
    if not isinstance(value, bool | np.bool_):
        try:
            whole = operator.index(value)
        except TypeError:  # no integer
            pass
        else:
            if least <= whole <= most:
                return whole
    raise ValueError(f"{name} must be an integer from {least} to {most}, got {shown(value)}")


def as_wholes(name: str, values: Any, least: int = 0, most: int = 2**31 - 1) -> tuple[int, ...]:
    """The same for one or more of them, in a sequence that is no text."""
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        raise ValueError(f"{name} must be a sequence of integers, got {shown(values)}")
    whole = tuple(values)
    if not whole:
        raise ValueError(f"{name} must have at least one integer, got none")
    if {*map(type, whole)} == {int} and least <= min(whole) and max(whole) <= most:
        return whole  # the many ids of a trace
    return tuple(as_whole(f"each of {name}", value, least, most) for value in whole)


def as_number(name: str, value: Any, *, zero: bool = False, most: float = math.inf) -> float:
    """A finite float above 0, or from 0 on with `zero`; a bool, a text, NaN, inf are refused."""
    text = isinstance(value, bool | np.bool_ | str | bytes)
    try:
        number = math.nan if text else float(value)
    except (TypeError, ValueError, OverflowError):  # no number, or one of too many digits
        number = math.nan
    if math.isfinite(number) and (number > 0 or (zero and number == 0)) and number <= most:
        return number
    wanted = "of 0 or more" if zero else "above 0"
    limit = "" if most == math.inf else f" and at most {most:g}"
    raise ValueError(f"{name} must be a finite number {wanted}{limit}, got {shown(value)}")
