"""What every table of `report.py` is made of: a stored result, a heading, lines."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from _result import RESULTS

__all__ = ["OURS", "head", "heading", "line", "load", "measured"]

OURS = "paged-decode"


def measured(name: str) -> bool:
    """Whether there is a result of this name: some wait for a card."""
    return (RESULTS / f"{name}.json").is_file()


def load(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def heading(title: str, result: dict[str, Any], packages: tuple[str, ...]) -> Iterator[str]:
    versions = result["versions"] | result["records"][-1].get("versions", {})
    used = ", ".join(f"{p} {versions[p]}" for p in packages if p in versions)
    made = f"{result['device']}; {used}; {result['date'][:10]}; `{result['command']}`"
    yield f"**{title}** ({made})\n\n"


def head(*columns: str) -> str:
    """The first two lines of a table."""
    return f"{line(*columns)}|{'---|' * len(columns)}\n"


def line(*cells: str) -> str:
    """One line of a table."""
    return f"| {' | '.join(cells)} |\n"
