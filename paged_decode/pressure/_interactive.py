"""Line charts of a sweep as SVG within a page: a point tells its run, and lines can be hidden.

The charts are there without the script, which only answers the pointer, the keyboard and the boxes.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ._labels import DIMENSIONS, MAIN_FIGURES, label, quantity, swept
from ._lines import OVER_SWEEP, alike

__all__ = ["STYLE", "interactive"]

STYLE = (
    ".plots svg{width:49%;min-width:22rem;margin:.25%;font-size:11px}.plots svg *{vector-effect:"
    "non-scaling-stroke}.grid{stroke:#ddd}.line polyline{fill:none;stroke-width:2}.hit{fill:"
    "transparent}.hot .dot{stroke:#000;stroke-width:2}tr.hot{background:#fff3c4}.off{display:none}"
    ".lines label{display:inline-block;margin-right:1rem}.lines i{display:inline-block;width:.8em;"
    "height:.8em;margin:0 .3em}#tip{position:fixed;display:none;background:#fff;border:1px solid "
    "#888;padding:.4rem .6rem;font-size:13px;white-space:pre;pointer-events:none;z-index:1}"
)
_SCRIPT = """\
const runs = JSON.parse(document.getElementById("runs").textContent);
const tip = document.getElementById("tip");
const same = point => document.querySelectorAll(`[data-run="${point.dataset.run}"]`);
function show(point) {
  const box = point.getBoundingClientRect();
  tip.textContent = runs[point.dataset.run];
  tip.style.display = "block";
  const left = Math.min(box.right + 8, innerWidth - tip.offsetWidth - 8);
  tip.style.left = `${Math.max(0, left)}px`;
  const top = box.top - tip.offsetHeight;
  tip.style.top = `${top < 0 ? box.bottom : top}px`;
  same(point).forEach(each => each.classList.add("hot"));
}
function hide(point) {
  tip.style.display = "none";
  same(point).forEach(each => each.classList.remove("hot"));
}
for (const point of document.querySelectorAll(".point")) {
  for (const name of ["pointerenter", "focus"]) point.addEventListener(name, () => show(point));
  for (const name of ["pointerleave", "blur"]) point.addEventListener(name, () => hide(point));
}
const boxes = [...document.querySelectorAll(".lines input")];
function toggle(box) {
  for (const line of document.querySelectorAll(`[data-line="${box.value}"]`))
    line.classList.toggle("off", !box.checked);
}
for (const box of boxes) box.addEventListener("change", () => toggle(box));
for (const button of document.querySelectorAll(".lines button"))
  button.addEventListener("click", () => boxes.forEach(box => {
    box.checked = button.value === "all";
    toggle(box);
  }));
"""
_COLORS = (
    *("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd"),
    *("#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf"),
)
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 480, 320, 56, 12, 28, 52  # of a chart


class _Point(NamedTuple):
    run: int
    x: float
    y: float


def interactive(runs: Sequence[Mapping[str, Any]]) -> str:
    """Charts, boxes and script for runs over a size that was swept; nothing if none was."""
    names = swept(runs)
    over = next((name for name in ("pages", "link_bytes") if name in names), None)
    if over is None:
        return ""
    names.remove(over)
    lines: dict[str, list[int]] = {}
    for number, run in enumerate(runs):
        lines.setdefault(label(run, names), []).append(number)
    drawn = [
        _chart(runs, list(lines.values()), over, key, title, unit)
        for key, title, unit in OVER_SWEEP
    ]
    texts = json.dumps([_told(run, [over, *names]) for run in runs]).replace("<", "\\u003c")
    return (
        f"{_boxes(list(lines))}<div class=plots>{''.join(drawn)}</div><div id=tip role=status>"
        f"</div><script id=runs type=application/json>{texts}</script><script>{_SCRIPT}</script>"
    )


def _told(run: Mapping[str, Any], names: Sequence[str]) -> str:
    """The lines that a point shows."""
    lines = [label(run, names)]
    for key, word in MAIN_FIGURES:
        value = run.get(key)
        lines.append(f"{word}: {'none' if value is None else f'{value:.4g}'}")
    return "\n".join(lines)


def _boxes(names: Sequence[str]) -> str:
    """One for every line, if there are several."""
    if len(names) < 2:
        return ""
    found = [
        f"<label><input type=checkbox checked value={number}><i style=background:{_color(number)}>"
        f"</i>{html.escape(name)}</label>"
        for number, name in enumerate(names)
    ]
    buttons = "".join(f"<button value={word}>{word}</button> " for word in ("all", "none"))
    return f"<p class=lines>{buttons}{''.join(found)}</p>"


def _color(number: int) -> str:
    return _COLORS[number % len(_COLORS)]


def _chart(
    runs: Sequence[Mapping[str, Any]],
    lines: Sequence[Sequence[int]],
    over: str,
    key: str,
    title: str,
    unit: str,
) -> str:
    places = sorted({float(run[over]) for run in runs})
    top = max((run[key] for run in runs if run.get(key) is not None), default=0.0) or 1.0
    low, high = math.log(places[0]), math.log(places[-1])

    def across(value: float) -> float:
        return _LEFT + 10 + (math.log(value) - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT - 20)

    def up(value: float) -> float:
        return _HEIGHT - _BOTTOM - value / (1.05 * top) * (_HEIGHT - _TOP - _BOTTOM)

    points = []
    for line in lines:
        known = [n for n in line if runs[n].get(key) is not None]
        each = [_Point(n, float(runs[n][over]), float(runs[n][key])) for n in known]
        points.append(sorted(each, key=lambda point: point.x))
    parts = [_axes(places, top, across, up, DIMENSIONS[over], unit)]
    shared = alike([[(p.x, p.y) for p in line] for line in points], 0.01 * top)
    for number, (line, (at, of)) in enumerate(zip(points, shared, strict=True)):
        path = " ".join(f"{across(p.x):.1f},{up(p.y):.1f}" for p in line)
        dash = f" stroke-dasharray='6 {6 * (of - 1)}' stroke-dashoffset={-6 * at}" if of > 1 else ""
        marks = "".join(
            f"<g class=point data-run={p.run} tabindex=0><circle class=hit cx={across(p.x):.1f} "
            f"cy={up(p.y):.1f} r=9 /><circle class=dot cx={across(p.x):.1f} cy={up(p.y):.1f} "
            f"r={3.5 + 1.5 * (of - 1 - at):g} fill={_color(number)} /></g>"
            for p in line
        )
        parts.append(
            f"<g class=line data-line={number}><polyline points='{path}' stroke={_color(number)}"
            f"{dash} />{marks}</g>"
        )
    if not any(points):
        parts.append(f"<text x={_WIDTH / 2:g} y={_HEIGHT / 2:g}>no run has a value</text>")
    word = html.escape(title)
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role=group aria-label="{word}">'
        f"<text x={_WIDTH / 2:g} y=16 text-anchor=middle font-size=13>{word}</text>"
        f"{''.join(parts)}</svg>"
    )


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _axes(places: Sequence[float], top: float, across: Any, up: Any, x: str, y: str) -> str:
    """Ticks at the places tried, and at five heights."""
    bottom, parts = _HEIGHT - _BOTTOM, []
    for place in places:
        at = f"{across(place):.1f}"
        parts.append(f"<line class=grid x1={at} x2={at} y1={_TOP} y2={bottom} />")
        turned = f"rotate(-40 {at} {bottom + 12})"
        parts.append(
            f'<text x={at} y={bottom + 12} text-anchor=end transform="{turned}">'
            f"{quantity(place)}</text>"
        )
    for i in range(5):
        value = top * i / 4
        at = f"{up(value):.1f}"
        parts.append(f"<line class=grid x1={_LEFT} x2={_WIDTH - _RIGHT} y1={at} y2={at} />")
        parts.append(f"<text x={_LEFT - 4} y={at} dy=4 text-anchor=end>{_number(value)}</text>")
    middle = (_TOP + bottom) / 2
    parts.append(
        f'<text x=12 y={middle:g} text-anchor=middle transform="rotate(-90 12 {middle:g})">'
        f"{html.escape(y)}</text>"
        f"<text x={(_LEFT + _WIDTH) / 2:g} y={_HEIGHT - 4} text-anchor=middle>{html.escape(x)}"
        "</text>"
    )
    return "".join(parts)
