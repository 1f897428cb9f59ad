"""Engines on the example model, and what a visit of one took, for `engine.py`."""

from __future__ import annotations

import gzip
import json
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from _llama_shapes import LlamaShapes

from paged_decode import BlockAllocator, Engine, EngineConfig, KVCache, SamplingParams

__all__ = [
    "Visit",
    "Watch",
    "decode_until",
    "device_gaps",
    "device_spans",
    "drain",
    "make_engine",
    "middle",
    "plot",
    "prompts",
    "quantile",
    "submit",
]

PAGE = 16


@dataclass(frozen=True)
class Visit:
    """One `step`: its wall time, the part of it blocked for the device, when it ended, its events.

    `read` is how many tokens it delivered, `ended` how many samples.
    """

    seconds: float
    wait: float
    end: float
    events: Sequence[Any]

    @property
    def host(self) -> float:
        return self.seconds - self.wait

    @property
    def read(self) -> int:
        return sum(event.token is not None for event in self.events)

    @property
    def ended(self) -> int:
        return sum(event.finish_reason is not None for event in self.events)


@dataclass
class Watch:
    """Steps an engine and keeps every visit, and when each request's tokens came."""

    engine: Engine
    visits: list[Visit] = field(default_factory=list)
    delivered: dict[int, list[tuple[float, int]]] = field(default_factory=dict)

    def step(self) -> Visit:
        before, start = _stat(self.engine, "wait_seconds"), time.perf_counter()
        events = self.engine.step()
        end = time.perf_counter()
        visit = Visit(end - start, _stat(self.engine, "wait_seconds") - before, end, events)
        self.visits.append(visit)
        counts: dict[int, int] = {}
        for event in events:
            if event.token is not None:
                counts[event.request_id] = counts.get(event.request_id, 0) + 1
        for request, count in counts.items():
            self.delivered.setdefault(request, []).append((end, count))
        return visit

    def steps(self, count: int) -> list[Visit]:
        return [self.step() for _ in range(count)]

    def until(self, done: Callable[[], bool]) -> list[Visit]:
        """Step until it is so; an engine that has nothing left to do before is an error."""
        first = len(self.visits)
        while not done():
            if self.engine.idle:
                raise RuntimeError("the engine is idle, and what the benchmark waits for is not so")
            self.step()
        return self.visits[first:]


def _stat(engine: Engine, name: str) -> float:
    return getattr(engine.stats, name)


def make_engine(shapes: LlamaShapes, *, tokens: int, longest: int, **config: Any) -> Engine:
    """A compiled engine whose pool holds `tokens` in all and `longest` in one sequence."""
    c = shapes.config
    pages = 2 + -(-tokens // PAGE) + config["max_rows"]  # a page begun for every row
    cache = KVCache.create(
        num_layers=c.num_layers,
        num_pages=pages,
        num_kv_heads=c.num_kv_heads,
        page_size=PAGE,
        head_dim=c.head_dim,
        dtype=shapes.dtype,
    )
    config.setdefault("row_buckets", (config["max_rows"],))
    sizes = EngineConfig(max_sequence_tokens=longest, vocab_size=c.vocab_size, **config)
    engine = Engine(shapes.model, shapes.params, cache, BlockAllocator(pages, PAGE), sizes)
    engine.warmup()
    return engine


def prompts(shapes: LlamaShapes, lengths: Iterable[int], seed: int = 0) -> list[list[int]]:
    """Random ids, so that no two prompts begin alike."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, shapes.config.vocab_size, n).tolist() for n in lengths]


def submit(engine: Engine, prompt: list[int], new: int) -> int:
    return engine.submit(prompt, SamplingParams(max_new_tokens=new))


def decode_until(watch: Watch, ids: Iterable[int], settle: int) -> None:
    """Step until each of these has delivered a token, and `settle` visits more."""
    ids = set(ids)
    watch.until(lambda: ids <= watch.delivered.keys())
    watch.steps(settle)


def drain(engine: Engine, ids: Iterable[int]) -> None:
    """End requests that may have ended already, and step until nothing is left."""
    for request in ids:
        try:
            engine.cancel(request)
        except KeyError:
            pass
    while not engine.idle:
        engine.step()


def quantile(values: Iterable[float], part: float) -> float:
    return float(np.quantile(list(values), part))


def middle(visits: Iterable[Visit], what: str) -> float:
    """The median of `seconds`, `wait` or `host` over visits."""
    return statistics.median(getattr(visit, what) for visit in visits)


def device_spans(folder: str) -> list[tuple[float, float, str]]:
    """Begin, end and name of all that ran on a GPU, in microseconds, of a `jax.profiler` trace."""
    (path,) = Path(folder).glob("**/*.trace.json.gz")
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    names = {e["pid"]: e["args"]["name"] for e in events if e.get("name") == "process_name"}
    devices = {pid for pid, name in names.items() if "/device:GPU" in name}
    lines = [e for e in events if e.get("name") == "thread_name" and e["pid"] in devices]
    # Beside the streams there may be lines that say the same once more, by program or operation.
    streams = {(e["pid"], e["tid"]) for e in lines if "Stream" in e["args"]["name"]}
    spans = sorted(
        (e["ts"], e["ts"] + e["dur"], e["name"])
        for e in events
        if e.get("ph") == "X" and e["pid"] in devices
        if not streams or (e["pid"], e["tid"]) in streams
    )
    if not spans:
        raise RuntimeError(f"{path.name} has no events of a GPU, only {sorted(names.values())}")
    return spans


def device_gaps(folder: str, seconds: float) -> list[float]:
    """When an accelerator did nothing: seconds of every gap between its programs.

    Args:
      folder: of a trace by `jax.profiler`.
      seconds: of its end that are looked at.
    """
    gaps, end = [], float("inf")
    for begin, after, _ in device_spans(folder):
        if begin > end:
            gaps.append((begin * 1e-6, (begin - end) * 1e-6))
        end = after if end == float("inf") else max(end, after)
    return [gap for begin, gap in gaps if begin > end * 1e-6 - seconds]


def plot(records: list[dict[str, Any]], path: Path) -> None:
    """Latency over output tokens/s, one line for each max_rows; p99 is dashed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    records = [r for r in records if r["case"]["part"] == "arrivals"]
    if not records:
        return
    figure = Figure(figsize=(9.2, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    panels = {"first_token": "Time to first token", "per_token": "Time per token after the first"}
    for axes, (name, title) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        for color, rows in enumerate(sorted({r["case"]["max_rows"] for r in records})):
            mine = [r for r in records if r["case"]["max_rows"] == rows]
            for label, style in (("median", "-"), ("p99", "--")):
                line = [(r["tokens_per_s"], r[f"{name}_{label}_s"]) for r in mine]
                line = [(x, 1e3 * y) for x, y in line if y is not None]
                axes.plot(
                    *zip(*line, strict=True),
                    style,
                    color=f"C{color}",
                    marker="o",
                    markersize=3,
                    label=f"max_rows {rows}, {label}",
                )
        axes.set(title=title, xlabel="output tokens/s", ylabel="ms", yscale="log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3)
    figure.axes[1].legend(fontsize="small")
    figure.savefig(path, dpi=110)
