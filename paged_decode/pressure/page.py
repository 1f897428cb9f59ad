"""One self-contained HTML page for a set of runs, and its plots as PNGs."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .._optional import needs
from ._charts import charts

__all__ = ["write_page"]

_STYLE = (
    "body{font:15px system-ui;max-width:76rem;margin:2rem auto;padding:0 1rem}"
    "img{width:49%;margin:.25%}img.wide{width:99%}code{overflow-wrap:anywhere}"
    "table{border-collapse:collapse;display:block;overflow-x:auto;margin-bottom:1rem}"
    "td,th{padding:.2rem .6rem;text-align:right;border-bottom:1px solid #ddd}"
    "th:first-child,td:first-child{text-align:left}.bad{color:#b00020;font-weight:600}"
)


def write_page(
    folder: str | Path,
    runs: Sequence[Mapping[str, Any]],
    command: str,
    notes: Sequence[str] = (),
) -> Path:
    """Write `report.html` and one PNG per plot, and return the page's path.

    Args:
      folder: it is there already.
      runs: at least one; the figures of each, with `pages`, `policy` and `goodput` added. What has
        more than one value, such as `lifetimes` and `timeline`, is drawn and not in the tables.
      command: what to type to get the page again.
      notes: lines to put in front, such as what did not fit.

    Raises:
      MissingExtra: matplotlib is not installed.
    """
    folder, pictures = Path(folder), []
    with needs("pressure"):
        drawn = charts(runs)
    for name, (title, png) in drawn.items():
        (folder / f"{name}.png").write_bytes(png)
        data = base64.b64encode(png).decode()
        wide = " class=wide" if name == "lifetimes" and len(runs) > 1 else ""
        alt = html.escape(title)
        pictures.append(f'<img{wide} alt="{alt}" src="data:image/png;base64,{data}">')
    if "lifetimes" not in drawn:
        pictures.append("<p>No page was given up, so there are no lifetimes to show.</p>")
    page = folder / "report.html"
    page.write_text(
        "<!doctype html><html lang=en><meta charset=utf-8>"
        f"<title>Memory pressure</title><style>{_STYLE}</style>"
        f"<h1>Memory pressure</h1><p><code>{html.escape(command)}</code></p>"
        + "".join(f"<p class=bad>{html.escape(note)}</p>" for note in notes)
        + _tables(runs, "".join(pictures)),
        "utf-8",
    )
    return page


def _tables(runs: Sequence[Mapping[str, Any]], pictures: str) -> str:
    """What all runs have in common, the pictures, and what tells the runs apart."""
    plain = [n for n in runs[0] if not isinstance(runs[0][n], list | tuple | Mapping)]
    same = [n for n in plain if all(run.get(n) == runs[0][n] for run in runs)]
    told = plain if len(runs) == 1 else [n for n in plain if n not in same]
    about = [n for n in same if isinstance(runs[0][n], str)] if len(runs) == 1 else same
    common = [(name, _show(runs[0][name])) for name in about]
    if len(runs) == 1:  # upright: it has a column alone
        rows = [(name, _show(runs[0][name])) for name in told if name not in about]
        return _table(common) + pictures + _table([("figure", "value"), *rows])
    head = tuple(told)
    lines = [tuple(_show(run.get(name)) for name in told) for run in runs]
    title = "<h2>The same in all runs</h2>"
    return f"{pictures}<h2>Runs</h2>{_table([head, *lines])}{title}{_table(common)}"


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    cells = ("".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows)
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in cells) + "</table>"


def _show(value: Any) -> str:
    if value is None:
        return "none"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
