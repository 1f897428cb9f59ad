"""One self-contained HTML page for a set of runs, and its plots as PNGs.

Of a sweep the page has line charts that answer: a point tells its run, and lines can be hidden.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .._optional import needs
from ._charts import charts
from ._interactive import STYLE, interactive
from ._lines import OVER_SWEEP

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
    lines = interactive(runs) if len(runs) > 1 else ""
    over = {name for name, _, _ in OVER_SWEEP} if lines else set[str]()  # drawn in the page itself
    for name, (title, png) in drawn.items():
        (folder / f"{name}.png").write_bytes(png)
        if name in over:
            continue
        data = base64.b64encode(png).decode()
        wide = " class=wide" if name == "lifetimes" and len(runs) > 1 else ""
        alt = html.escape(title)
        pictures.append(f'<img{wide} alt="{alt}" src="data:image/png;base64,{data}">')
    if "lifetimes" not in drawn:
        pictures.append("<p>No page was given up, so there are no lifetimes to show.</p>")
    page = folder / "report.html"
    page.write_text(
        "<!doctype html><html lang=en><meta charset=utf-8>"
        f"<title>Memory pressure</title><style>{_STYLE}{STYLE}</style>"
        f"<h1>Memory pressure</h1><p><code>{html.escape(command)}</code></p>"
        + "".join(f"<p class=bad>{html.escape(note)}</p>" for note in notes)
        + _tables(runs, "".join([lines, *pictures])),
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
    told_apart = _table([head, *lines], numbered=True)
    return f"{pictures}<h2>Runs</h2>{told_apart}{title}{_table(common)}"


def _table(rows: Sequence[tuple[str, ...]], *, numbered: bool = False) -> str:
    """`numbered`: rows behind the first are runs, which points of charts refer to."""
    lines = []
    for number, row in enumerate(rows):
        cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in row)
        run = f" data-run={number - 1}" if numbered and number else ""
        lines.append(f"<tr{run}>{cells}</tr>")
    return f"<table>{''.join(lines)}</table>"


def _show(value: Any) -> str:
    if value is None:
        return "none"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
