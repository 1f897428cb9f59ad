"""Which values of a parameter `make test` has, and which only CI."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest

__all__ = ["for_ci"]


def for_ci(values: Iterable[Any], left: Collection[Any]) -> list[Any]:
    """All values of a parameter; those that are `left` to CI are long."""
    return [pytest.param(v, marks=pytest.mark.long if v in left else ()) for v in values]
