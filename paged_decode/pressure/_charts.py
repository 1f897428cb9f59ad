"""The pictures of a report, as PNGs; needs matplotlib, of the extra `pressure`."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from ._labels import DIMENSIONS, label, quantity, swept
from ._lines import OVER_SWEEP, Number, alike
from .report import LIFETIME_EDGES

__all__ = ["charts", "draw_lines"]

Points: TypeAlias = Sequence[tuple[Number, Number | None]]
"""Places and values of a line."""

_MARKERS = "os^vDPX<>p*h"
_KINDS = ("owned", "shared", "cached", "free")
_COLORS = ("tab:blue", "tab:purple", "tab:orange", "lightgrey")


def charts(runs: Sequence[Mapping[str, Any]]) -> dict[str, tuple[str, bytes]]:
    """By name of the file, without its ending: the title of a picture, and its bytes.

    One run is shown over its time, several over what was swept.
    """
    if len(runs) == 1:
        drawn = _over_time(runs[0])
    else:
        drawn = {
            name: (
                title,
                _picture(lambda axes, n=name, t=title, u=unit: _sweep(axes, runs, n, t, u)),
            )
            for name, title, unit in OVER_SWEEP
        }
    if any(sum(run.get("lifetimes") or ()) for run in runs):
        title = "Lifetimes of pages: from taken to freed or evicted"
        if len(runs) == 1:
            png = _picture(lambda axes: _lifetimes_of_one(axes, runs[0], title))
        else:
            height = 1.6 + 0.28 * len(runs)
            png = _picture(lambda axes: _lifetimes(axes, runs, title), height, 12.0)
        drawn["lifetimes"] = title, png
    return drawn


def _picture(draw: Callable[[Any], None], height: float = 4.0, width: float = 6.0) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    draw(figure.subplots())
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110)
    return out.getvalue()


# ---- several runs


def _sweep(axes: Any, runs: Sequence[Mapping[str, Any]], key: str, title: str, unit: str) -> None:
    """A line for every combination of what was swept, over the size that was; or bars."""
    names = swept(runs)
    over = next((name for name in ("pages", "link_bytes") if name in names), None)
    if over is None:
        _bars(axes, [label(run, names) for run in runs], [run[key] for run in runs], unit)
    else:
        names.remove(over)
        lines: dict[str, list[tuple[Number, Number | None]]] = {}
        for run in runs:
            lines.setdefault(label(run, names), []).append((run[over], run[key]))
        many = len(lines) > 4  # then the legend would hide them
        draw_lines(axes, lines, legend=not many)
        if many:
            axes.figure.set_figheight(4.2 + 0.085 * len(lines))
            axes.figure.legend(loc="outside lower center", fontsize="x-small", ncols=2)
        axes.set(xlabel=DIMENSIONS[over], ylabel=unit)
    axes.set_title(title, fontsize="medium")


def _bars(axes: Any, labels: Sequence[str], values: Sequence[Number | None], unit: str) -> None:
    places = range(len(values))
    bars = axes.barh(places, [value or 0 for value in values], color="tab:blue")
    texts = ["no value" if value is None else f"{value:.4g}" for value in values]
    axes.bar_label(bars, texts, padding=3, fontsize="small")
    axes.set_yticks(places, labels, fontsize="small")
    axes.invert_yaxis()
    axes.set(xlabel=unit, xlim=(0, 1.2 * max((v for v in values if v), default=1.0)))


def draw_lines(
    axes: Any,
    lines: Mapping[str, Points],
    *,
    legend: bool = True,
) -> None:
    """Lines over a logarithm, with ticks at the places tried and a legend if there are several.

    No line lies on the frame. Lines that coincide are one of stripes in all their colours.

    Args:
      lines: by label, points (place, value); None is left out.
      legend: whether to draw it.
    """
    known = {
        name: sorted((x, y) for x, y in points if y is not None) for name, points in lines.items()
    }
    top = max((y for points in known.values() for _, y in points), default=0.0) or 1.0
    shared = alike(list(known.values()), 0.01 * top)
    for number, ((name, points), (at, of)) in enumerate(zip(known.items(), shared, strict=True)):
        dashes = (3 * at, (3, 3 * (of - 1))) if of > 1 else ("-", "--", ":")[number // 10 % 3]
        axes.plot(
            [x for x, _ in points],
            [y for _, y in points],
            marker=_MARKERS[number % len(_MARKERS)],
            linestyle=dashes,
            linewidth=1.5 if of == 1 else 2.2,
            dash_capstyle="butt",
            markersize=4 + min(2.5 * (of - 1 - at), 8),  # one inside the other
            label=name,
        )
    if not any(known.values()):
        axes.text(0.5, 0.5, "no run has a value", transform=axes.transAxes, ha="center")
    places = sorted({x for points in lines.values() for x, _ in points})
    side = (places[-1] / places[0]) ** 0.05
    axes.set(xscale="log", xlim=(places[0] / side, places[-1] * side))
    axes.set_ylim(-0.04 * top, 1.08 * top)
    axes.set_xticks(places, [quantity(place) for place in places], fontsize="small", rotation=45)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    if legend and len(lines) > 1:
        axes.legend(fontsize="small", framealpha=0.7)


def _lifetimes(axes: Any, runs: Sequence[Mapping[str, Any]], title: str) -> None:
    """A row for every run, as dark as the part of its pages."""
    names, parts, labels = swept(runs), [], []
    for run in runs:
        counts = run.get("lifetimes") or (0,)
        total = sum(counts)
        parts.append([count / (total or 1) for count in counts])
        labels.append(label(run, names) + ("" if total else ": no page was given up"))
    bins = max(map(len, parts))
    parts = [[*part, *[0.0] * (bins - len(part))] for part in parts]
    held = [i for i in range(bins) if any(part[i] for part in parts)]
    picture = axes.imshow(parts, aspect="auto", cmap="Blues", vmin=0, interpolation="none")
    axes.figure.colorbar(picture, ax=axes, label="part of the run's pages", fraction=0.03)
    axes.set_yticks(range(len(runs)), labels, fontsize="small")
    first, last = max(0, held[0] - 1), min(bins - 1, held[-1] + 1)
    edges = range(first, min(last, len(LIFETIME_EDGES)))
    axes.set_xticks([e + 0.5 for e in edges], [_seconds(LIFETIME_EDGES[e]) for e in edges])
    axes.tick_params(axis="x", labelsize="small")
    axes.set_xlim(first - 0.5, last + 0.5)
    axes.set(xlabel="lifetime (the first and the last bin have all beyond)")
    axes.set_title(title, fontsize="medium")


# ---- one run


def _over_time(run: Mapping[str, Any]) -> dict[str, tuple[str, bytes]]:
    drawn = {}
    for name, title, draw in (
        ("pages", "Pages by kind", _pages),
        ("queue", "Samples that run and wait", _queue),
        ("preemptions", "Preemptions so far", _preemptions),
    ):
        drawn[name] = title, _picture(lambda axes, d=draw, t=title: _timed(axes, run, d, t))
    title = "Time to first token"
    drawn["ttft"] = title, _picture(lambda axes: _first_tokens(axes, run, title))
    return drawn


def _timed(
    axes: Any, run: Mapping[str, Any], draw: Callable[[Any, Mapping[str, Any]], None], title: str
) -> None:
    timeline = run.get("timeline") or {}
    if timeline.get("seconds"):
        draw(axes, timeline)
        first, last = timeline["seconds"][0], timeline["seconds"][-1]
        axes.set_xlim(first, last if last > first else first + 1.0)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(fontsize="small", framealpha=0.7)
    else:
        axes.text(0.5, 0.5, "nothing ran", transform=axes.transAxes, ha="center")
    axes.set(xlabel="seconds")
    axes.grid(alpha=0.3)
    axes.set_title(title, fontsize="medium")


def _pages(axes: Any, timeline: Mapping[str, Any]) -> None:
    kinds = [timeline[f"{kind}_pages"] for kind in _KINDS]
    names = ("of one sequence", "shared", "cached", "free")
    below = [0] * len(timeline["seconds"])
    for count, name, color in zip(kinds, names, _COLORS, strict=True):
        above = [a + b for a, b in zip(below, count, strict=True)]
        axes.fill_between(
            timeline["seconds"], below, above, step="post", label=name, color=color, linewidth=0
        )
        below = above
    axes.set(ylabel="pages", ylim=(0, 1.02 * max(1, sum(kind[0] for kind in kinds))))


def _queue(axes: Any, timeline: Mapping[str, Any]) -> None:
    for name, style in (("running", "-"), ("waiting", "--")):
        axes.step(timeline["seconds"], timeline[name], style, where="post", label=name)
    _above_frame(axes, max(*timeline["running"], *timeline["waiting"]), "samples")


def _preemptions(axes: Any, timeline: Mapping[str, Any]) -> None:
    axes.step(timeline["seconds"], timeline["preemptions"], where="post", color="tab:red")
    _above_frame(axes, max(timeline["preemptions"]), "preemptions")


def _first_tokens(axes: Any, run: Mapping[str, Any], title: str) -> None:
    """Which part of the requests had it by when; those that never had it are the rest."""
    times = run.get("ttft_quantiles") or ()
    if times:
        steps = len(times) - 1
        axes.plot(times, [100 * i / steps for i in range(len(times))], color="tab:green")
        axes.set_xlim(-0.02 * times[-1], 1.05 * times[-1] or 1.0)
    else:
        axes.text(0.5, 0.5, "no request got one", transform=axes.transAxes, ha="center")
    axes.set(xlabel="seconds from arrival", ylim=(-3, 103))
    axes.set_ylabel("percent of requests that got one")
    axes.grid(alpha=0.3)
    axes.set_title(title, fontsize="medium")


def _lifetimes_of_one(axes: Any, run: Mapping[str, Any], title: str) -> None:
    counts = run["lifetimes"]
    edges = LIFETIME_EDGES[0] / 2, *LIFETIME_EDGES, LIFETIME_EDGES[-1] * 2
    axes.stairs([count / sum(counts) for count in counts], edges, fill=True, alpha=0.7)
    axes.set(xscale="log", xlabel="seconds (the first and the last bin have all beyond)")
    held = [i for i, count in enumerate(counts) if count]
    axes.set_xlim(edges[held[0]] / 2, edges[held[-1] + 1] * 2)
    axes.set_ylabel("part of the pages given up")
    axes.grid(alpha=0.3)
    axes.set_title(title, fontsize="medium")


def _above_frame(axes: Any, most: Number, unit: str) -> None:
    axes.set(ylabel=unit, ylim=(-0.04 * (most or 1), 1.08 * (most or 1)))


def _seconds(value: Number) -> str:
    units = (("h", 3600.0), ("min", 60.0), ("s", 1.0), ("ms", 0.001))
    unit, size = next((each for each in units if value >= each[1]), units[-1])
    number = value / size
    return f"{number:.0f} {unit}" if number >= 10 else f"{number:.2g} {unit}"
