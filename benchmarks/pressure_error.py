"""How far simulations are from the engine: the same workloads through both, side by side.

    python benchmarks/pressure_error.py --traces DIR [--workloads azure mooncake burst ...]
    python benchmarks/pressure_error.py --traces DIR --small  # tiny shapes, a CPU, two minutes
    python benchmarks/pressure_error.py --plot                # docs/pressure_error.png

The model has Llama-3.1-8B's shapes and random bfloat16 weights. `calibrate` measures the engine's
programs first; then every workload runs in real time, and through `simulate` with what was
measured in the same process. DIR is that of `pressure.py`; of it azure_conv_2023.csv and
mooncake_conversation.jsonl are read, the first lines of which are enough.

- `azure`: conversations as they came; `mooncake`: those with up to 12,288 tokens of prompt;
- `burst`: prompts of log-normal lengths whose gaps have a squared coefficient of variation of 8;
- `rollouts`: prompts with 8 answers each, all at once, cut at 1,536 tokens. Each ends with 16
  tokens of its own, for the engine is greedy and would give all the same answer;
- `chats`: turns that repeat what was said, over shared system prompts.

Both sides have the same pool, which is too small for `mooncake` and `rollouts`.

The wall time of a workload is 15 to 27 s on one H100 or H200. With `--small` every program sleeps
as long as one of a card would take, more or less, so that the host has the cores for itself, as it
has them there: it checks the model of time and not the card's, and stores nothing.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import numpy as np
from _engine_runs import make_engine
from _llama_shapes import llama_shapes
from _result import RESULTS, write_result

from paged_decode import BlockAllocator, Engine
from paged_decode.pressure import (
    Request,
    chats,
    poisson,
    read_azure,
    read_mooncake,
    rollouts,
    run,
    simulate,
)
from paged_decode.pressure.calibrate import calibrate
from paged_decode.pressure.fitted import Fitted
from paged_decode.pressure.report import Report

BARS = {
    "output_tokens_per_second": 0.05,
    "ttft_seconds_p50": 0.07,
    "ttft_seconds_p99": 0.12,
    "per_token_seconds_p50": 0.07,
    "per_token_seconds_p99": 0.12,
}
"""How far a simulation may be from the engine, as a part of what that did."""
ALSO = ("seconds", "preemptions", "hit_rate", "recompute_tax", "evictions", "utilisation")
POINTS = 48  # of the pages over time
PLOT = Path(__file__).parents[1] / "docs" / "pressure_error.png"


@dataclass(frozen=True)
class Size:
    """An engine, and how much smaller than the large one's everything of a workload is.

    Attributes:
      tokens, blocks: by what lengths are divided; blocks of traces stay whole.
      seconds: by what gaps between arrivals are divided.
      counts: requests of each workload.
      pool, longest: tokens.
    """

    tokens: int
    seconds: float
    counts: dict[str, int]
    pool: int
    longest: int
    engine: dict[str, Any]


LARGE = Size(
    tokens=1,
    seconds=1.0,
    counts=dict(azure=120, mooncake=40, burst=140, rollouts=96, chats=160),
    pool=24576,
    longest=16384,
    engine=dict(
        max_rows=64,
        row_buckets=(16, 64),
        decode_steps=8,
        prefill_chunk=512,
        chunk_buckets=(128, 512),
        prefill_rows=4,
        prefill_tokens=2048,
    ),
)
SMALL = Size(
    tokens=8,
    seconds=1.0,
    counts=dict(azure=60, mooncake=16, burst=60, rollouts=48, chats=80),
    pool=2048,
    longest=1664,
    engine=dict(
        max_rows=16,
        row_buckets=(4, 16),
        decode_steps=8,
        prefill_chunk=64,
        prefill_rows=2,
        prefill_tokens=128,
    ),
)


# ---- workloads


def azure(traces: Path, count: int) -> Iterable[Request]:
    """At three times their rate."""
    found = read_azure(traces / "azure_conv_2023.csv")
    return (replace(r, arrival_seconds=r.arrival_seconds / 3) for r in islice(found, count))


def mooncake(traces: Path, count: int) -> Iterable[Request]:
    """At three quarters of their rate, which is what one card bears."""
    found = read_mooncake(traces / "mooncake_conversation.jsonl")
    short = (r for r in found if r.prompt_tokens <= 12288)
    chosen = (replace(r, output_tokens=min(r.output_tokens, 512)) for r in short)
    return (replace(r, arrival_seconds=1.3 * r.arrival_seconds) for r in islice(chosen, count))


def burst(traces: Path, count: int) -> Iterable[Request]:
    return poisson(count, 8.0, seed=3, burst=8.0)


def reinforcement(traces: Path, count: int) -> Iterable[Request]:
    for number, r in enumerate(rollouts(count // 8, seed=5, output_median=640, longest=1536)):
        blocks = -(-r.prompt_tokens // 16)
        shared = range(r.blocks[0] * 1000, r.blocks[0] * 1000 + blocks)
        yield replace(
            r,
            blocks=(*shared, 10**6 + number),
            block_tokens=16,
            prompt_tokens=16 * (blocks + 1),
        )


def talks(traces: Path, count: int) -> Iterable[Request]:
    return chats(count // 4, 6.0, seed=2, output_tokens=160, think_seconds=2.0)


WORKLOADS: dict[str, Callable[[Path, int], Iterable[Request]]] = dict(
    azure=azure, mooncake=mooncake, burst=burst, rollouts=reinforcement, chats=talks
)


def workload(name: str, traces: Path, size: Size) -> list[Request]:
    """Of this size, from 0 s on."""
    found = []
    for r in WORKLOADS[name](traces, size.counts[name]):
        block = max(1, r.block_tokens // size.tokens)
        # As many blocks as before: the last one is shorter than others, or whole.
        rest = max(1, (r.prompt_tokens - (len(r.blocks) - 1) * r.block_tokens) // size.tokens)
        found.append(
            replace(
                r,
                arrival_seconds=r.arrival_seconds / size.seconds,
                block_tokens=block,
                prompt_tokens=(len(r.blocks) - 1) * block + min(rest, block),
                output_tokens=max(1, r.output_tokens // size.tokens),
            )
        )
    first = found[0].arrival_seconds
    return [replace(r, arrival_seconds=r.arrival_seconds - first) for r in found]


# ---- a device that sleeps


def sleeping(model: Any) -> Any:
    """The same model, whose programs take longer: 8 ms, 0.2 ms for each token that a chunk has room
    for, and 0.1 us for each pair of a query and a token that it sees."""

    def slept(width: Any, last: Any) -> Any:
        width = int(width)
        chunk = 2e-4 * np.size(last) * width if width > 1 else 0.0
        time.sleep(8e-3 + chunk + 1e-7 * width * int(np.sum(last)))
        return np.int32(0)

    def slow(params: Any, cache: Any, tokens: Any, batch: Any) -> Any:
        zero = jax.ShapeDtypeStruct((), np.int32)
        later = jax.pure_callback(slept, zero, tokens.shape[1], batch.positions[:, -1])
        return model(params, cache, tokens + later, batch)

    return slow


# ---- both


def compare(engine: Engine, name: str, requests: list[Request], costs: Fitted) -> dict[str, Any]:
    """One workload through both."""
    engine.allocator.reset_prefix_cache(same_weights=True)
    start = time.perf_counter()
    real = run(engine, requests)
    middle = time.perf_counter()
    allocator = BlockAllocator(engine.allocator.usable_pages + 1, engine.allocator.page_size)
    model = simulate(requests, allocator, costs, config=engine.config)
    end = time.perf_counter()
    names = (*BARS, *ALSO)
    errors = {n: error(model.figures[n], real.figures[n]) for n in BARS}
    pages = [used(real), used(model)]
    return dict(
        case=dict(workload=name, requests=len(requests)),
        system="paged-decode/simulate",
        real={n: real.figures[n] for n in names},
        simulated={n: model.figures[n] for n in names},
        errors=errors,
        within={n: abs(each) <= BARS[n] for n, each in errors.items()},
        pages_over_time=dict(
            real=sampled(pages[0], real), simulated=sampled(pages[1], model), seconds=longest(real)
        ),
        alike=sum(
            (a.hit_tokens, a.preemptions, a.ending) == (b.hit_tokens, b.preemptions, b.ending)
            for a, b in zip(real.records, model.records, strict=True)
        ),
        pages_error=apart(pages[0], pages[1], longest(real)) / max(pages[0][1]),
        real_wall_seconds=middle - start,
        simulated_in_seconds=end - middle,
    )


def error(model: float | None, real: float | None) -> float:
    """As a part of the real one."""
    if model is None or real is None:
        raise SystemExit(f"a figure has no value: real {real}, simulated {model}")
    return model / real - 1


def longest(report: Report) -> float:
    return report.figures["seconds"] or 0.0


def used(report: Report) -> tuple[np.ndarray, np.ndarray]:
    """Seconds, and pages that somebody used then."""
    line = report.timeline
    return np.array(line["seconds"]), np.add(line["owned_pages"], line["shared_pages"])


def sampled(pages: tuple[np.ndarray, np.ndarray], report: Report) -> list[int]:
    """Pages at as many times, evenly over the run."""
    return at(pages, np.linspace(0, longest(report), POINTS)).astype(int).tolist()


def at(pages: tuple[np.ndarray, np.ndarray], times: np.ndarray) -> np.ndarray:
    places = np.searchsorted(pages[0], times, side="right") - 1
    return np.where(places < 0, 0, pages[1][np.maximum(places, 0)])


def apart(a: Any, b: Any, seconds: float) -> float:
    """The mean difference over the time of the run."""
    times = np.linspace(0, seconds, 1000)
    return float(np.abs(at(a, times) - at(b, times)).mean())


def records(args: argparse.Namespace, size: Size) -> Iterator[dict[str, Any]]:
    begin = time.perf_counter()
    shapes = llama_shapes(small=args.small)
    if args.small:
        shapes = replace(shapes, model=sleeping(shapes.model))
        sys.setswitchinterval(1e-4)  # what sleeps needs Python to wake up, and a card does not
    engine = make_engine(shapes, tokens=size.pool, longest=size.longest, **size.engine)
    warm = time.perf_counter()
    costs = calibrate(engine)
    done = time.perf_counter()
    print(f"weights and programs {warm - begin:.1f} s, calibration {done - warm:.1f} s", flush=True)
    for fit in costs.programs.values():
        kind = f"{fit.kind} of {fit.rows} x {fit.width}"
        print(f"  {kind:<22} residual {fit.mean_residual:.1%}, at most {fit.max_residual:.1%}")
    for work, line in costs.host.items():
        print(f"  host, {work:<10} {line.base * 1e3:.3f} ms + {line.each * 1e6:.3f} us each")
    yield dict(
        case=dict(part="calibration", **shapes.name),
        system="paged-decode/calibrate",
        seconds=done - warm,
        engine=dict(costs.sizes),
        pages=engine.allocator.usable_pages,
        about=dict(costs.about),
        programs=[fit._asdict() for fit in costs.programs.values()],
        host={work: line._asdict() for work, line in costs.host.items()},
    )
    run(engine, workload("burst", args.traces, size)[:8], time_scale=0)  # warms the host up
    gc.collect()
    gc.freeze()  # as servers do: what is there stays, and Python need not look for cycles in it
    for name in args.workloads:
        record = compare(engine, name, workload(name, args.traces, size), costs)
        real, model = record["real"], record["simulated"]
        print(f"{name}: {record['real_wall_seconds']:.1f} s", flush=True)
        for figure, each in record["errors"].items():
            word = "" if record["within"][figure] else f"  (more than {BARS[figure]:.0%})"
            print(f"  {figure:<25} {real[figure]:9.4g} {model[figure]:9.4g} {each:+7.1%}{word}")
        for figure in ALSO:
            print(f"  {figure:<25} {real[figure]:9.4g} {model[figure]:9.4g}")
        print(f"  pages over time           {record['pages_error']:.1%} of the most")
        print(f"  hits, preemptions alike   {record['alike']} of {record['case']['requests']}")
        sys.stdout.flush()
        yield record


def plot(found: list[dict[str, Any]]) -> None:
    """Pages over time, a panel for each workload."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = [r for r in found if "pages_over_time" in r]
    figure = Figure(figsize=(3.0 * len(found), 2.8), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(found), squeeze=False)[0]
    for axes, record in zip(panels, found, strict=True):
        for name, style in (("real", "-"), ("simulated", "--")):
            seconds = np.linspace(0, record[name]["seconds"], POINTS)
            axes.step(seconds, record["pages_over_time"][name], style, where="post", label=name)
        axes.set(title=record["case"]["workload"], xlabel="seconds")
        axes.grid(alpha=0.3)
    panels[0].set(ylabel="pages in use")
    panels[0].legend(fontsize="small")
    figure.savefig(PLOT, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--traces", type=Path, metavar="DIR", help="needed but for --plot")
    parser.add_argument("--workloads", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument("--small", action="store_true", help="tiny shapes, on a CPU")
    parser.add_argument("--plot", action="store_true", help="draw what the results file has")
    args = parser.parse_args()
    if args.plot:
        plot(json.loads((RESULTS / "pressure_error.json").read_text())["records"])
        return
    if args.traces is None:
        parser.error("--traces DIR is needed")
    words = [] if args.workloads == list(WORKLOADS) else ["--workloads", *args.workloads]
    device, found = jax.devices()[0], []
    for record in records(args, SMALL if args.small else LARGE):
        found.append(record)
        if not args.small:  # after each: what was measured is not lost with what follows
            write_result(
                "pressure_error",
                found,
                command=" ".join(["python benchmarks/pressure_error.py --traces DIR", *words]),
                device=None if device.platform == "cpu" else device.device_kind,
            )


if __name__ == "__main__":
    main()
