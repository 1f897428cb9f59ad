"""One self-contained HTML page for a set of runs, and its plots as PNGs."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .report import LIFETIME_EDGES

__all__ = ["write_page"]

_PLOTS = (
    ("output_tokens_per_second", "Output tokens per second"),
    ("goodput", "Requests per second within the goals"),
    ("hit_rate", "Prompt tokens found in the cache"),
    ("recompute_tax", "Computed tokens that were computed before"),
)


def write_page(folder: str | Path, runs: Sequence[Mapping[str, Any]], command: str) -> Path:
    """Write `report.html` and one PNG per plot, and return the page's path.

    Needs matplotlib, the `plots` extra.

    Args:
      runs: figures of each run, with `pages`, `policy` and `goodput` added.
      command: what to type to get the page again.
    """
    folder = Path(folder)
    pictures = []
    for key, title in _PLOTS:
        png = _plot(runs, key, title)
        (folder / f"{key}.png").write_bytes(png)
        data = base64.b64encode(png).decode()
        pictures.append(f'<img alt="{html.escape(title)}" src="data:image/png;base64,{data}">')
    if png := _plot_lifetimes(runs):
        (folder / "lifetimes.png").write_bytes(png)
        data = base64.b64encode(png).decode()
        pictures.append(f'<img alt="Lifetimes of pages" src="data:image/png;base64,{data}">')
    page = folder / "report.html"
    page.write_text(
        "<!doctype html><meta charset=utf-8><title>Memory pressure</title><style>"
        "body{font:15px system-ui;max-width:72rem;margin:2rem auto;padding:0 1rem}"
        "img{width:48%;margin:.5%}table{border-collapse:collapse;display:block;overflow-x:auto}"
        "td,th{padding:.2rem .6rem;text-align:right;border-bottom:1px solid #ddd}</style>"
        f"<h1>Memory pressure</h1><p><code>{html.escape(command)}</code></p>"
        + "".join(pictures)
        + _table(runs)
    )
    return page


def _plot_lifetimes(runs: Sequence[Mapping[str, Any]]) -> bytes | None:
    counted = [run for run in runs if sum(run.get("lifetimes") or ())]
    if not counted:
        return None
    figure, axes = _figure()
    for run in counted[:6]:  # more lines than that cannot be told apart
        parts = [count / sum(run["lifetimes"]) for count in run["lifetimes"]]
        label = f"{run['policy']}, {run['pages']} pages"
        axes.stairs(parts[1:-1], LIFETIME_EDGES, label=label)
    axes.set(
        xlabel="seconds from taken to freed or evicted", title="Lifetimes of pages", xscale="log"
    )
    return _finished(figure, axes)


def _plot(runs: Sequence[Mapping[str, Any]], key: str, title: str) -> bytes:
    figure, axes = _figure()
    for policy in dict.fromkeys(run["policy"] for run in runs):
        line = sorted((run["pages"], run[key]) for run in runs if run["policy"] == policy)
        axes.plot(*zip(*line, strict=True), marker="o", label=policy)
    axes.set(xlabel="usable pages", title=title, xscale="log", ylim=(0, None))
    return _finished(figure, axes)


def _figure() -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


def _finished(figure: Any, axes: Any) -> bytes:
    axes.grid(alpha=0.3)
    axes.legend()
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110)
    return out.getvalue()


def _table(runs: Sequence[Mapping[str, Any]]) -> str:
    names = [name for name in runs[0] if name != "lifetimes"]
    head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
    rows = "".join(
        "<tr>" + "".join(f"<td>{html.escape(_show(run[name]))}</td>" for name in names) + "</tr>"
        for run in runs
    )
    return f"<table><tr>{head}</tr>{rows}</table>"


def _show(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
