"""The questions of docs/pressure.md, answered by simulations of one H100 with an 8B model.

    python benchmarks/pressure.py pool --traces DIR      # how small can the pool be?
    python benchmarks/pressure.py swap --traces DIR      # recompute or swap?
    python benchmarks/pressure.py eviction --traces DIR  # which eviction wins?
    python benchmarks/pressure.py capacity --traces DIR  # how far is it from the best?
    python benchmarks/pressure.py speed --traces DIR     # how long does a simulation take?

DIR holds mooncake_conversation.jsonl (kvcache-ai/Mooncake, FAST25-release/traces/
conversation_trace.jsonl) and azure_conv_2023.csv, azure_code_2023.csv (Azure/AzurePublicDataset,
data/AzureLLMInferenceTrace_{conv,code}.csv). Each writes results/pressure_NAME.json and a plot.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from _result import RESULTS, write_result
from tqdm import tqdm

from paged_decode.pressure import hit_rate, read_mooncake
from paged_decode.pressure._case import CASE_FIELDS, EVICTIONS, Case, read_workload
from paged_decode.pressure._charts import draw_lines

PLAIN = ("lru", "fifo", "lfu", "slru", "cost")
PLOTS = Path(__file__).parents[1] / "docs"
BASE = Case(
    workload="poisson",
    limit=None,
    rate=1.0,
    stretch=1.0,
    seed=0,
    pages=0,
    page_size=16,
    eviction="lru",
    victim="last",
    preemption="recompute",
    admission="watermark",
    host_pages=200_000,
    max_rows=64,
    ttft=2.0,
    per_token=0.1,
    weight_bytes=16e9,
    kv_bytes_per_token=131072.0,
    bandwidth_bytes=3e12,
    flops=6e14,
    link_bytes=5e10,
)


def pool_cases(traces: Path) -> Iterable[Case]:
    """Ample to scarce memory, each trace at a load that one card bears."""
    for kind, name, limit, stretch in (
        ("azure", "azure_conv_2023.csv", 2000, 1.0),
        ("azure", "azure_code_2023.csv", 2000, 1.0),
        ("mooncake", "mooncake_conversation.jsonl", 1000, 4.0),
    ):
        ttft = 2.0 if kind == "azure" else 10.0  # prompts of the third are ten times as long
        for tokens in (8, 16, 24, 32, 48, 64, 128, 192, 256, 512):
            if kind == "mooncake" and tokens < 128:  # its longest prompts have 126,195 tokens
                continue
            yield replace(
                BASE,
                workload=f"{kind}:{traces / name}",
                limit=limit,
                stretch=stretch,
                ttft=ttft,
                pages=tokens * 1024 // 16,
            )


def swap_cases(traces: Path) -> Iterable[Case]:
    """A pool in which samples give way all the time, over the speed of the link to the host."""
    tight = replace(
        BASE,
        workload=f"azure:{traces / 'azure_conv_2023.csv'}",
        limit=1500,
        stretch=0.5,
        pages=1024,
        max_rows=32,
    )
    yield tight
    for link in (1e9, 2e9, 4e9, 8e9, 16e9, 32e9, 64e9):
        for preemption in ("swap", "cheaper"):
            yield replace(tight, preemption=preemption, link_bytes=link)


def eviction_cases(traces: Path) -> Iterable[Case]:
    """Shared prefixes, over the size of the pool."""
    for workload, rate in (("tree", 8.0), ("chats", 8.0)):
        for eviction in PLAIN:
            for pages in (512, 1024, 2048, 4096, 8192):
                yield replace(
                    BASE, workload=workload, limit=2000, rate=rate, eviction=eviction, pages=pages
                )


def figures(case: Case) -> dict[str, Any]:
    """The record of one case."""
    start = time.perf_counter()
    found = case.figures()
    names = ("workload", "policy", "pages", "page_size", "link_bytes")
    return {
        "case": {name: found[name] for name in names} | {"limit": case.limit},
        "system": case.policy,
        "simulated_in_seconds": time.perf_counter() - start,
        **{
            name: value
            for name, value in found.items()
            if name not in CASE_FIELDS and not isinstance(value, str | list | dict)
        },
    }


def curve(task: tuple[Path | str, str, int]) -> dict[str, Any]:
    """One point of the hit-rate curve of a workload, one prompt after another.

    It is the file of the Mooncake trace, or a word for 2000 generated requests.
    """
    path, name, capacity = task
    if isinstance(path, Path):
        requests, word, size = read_mooncake(path), "mooncake", 512
    else:
        requests, word, size = read_workload(path, 2000, 8.0, 1.0, 0), path, 64
    rate = hit_rate(requests, capacity, EVICTIONS[name]())
    case = {"workload": f"{word}, one after another", "pages": capacity, "page_size": size}
    return {"case": case, "system": name, "hit_rate": rate}


def capacity_tasks(traces: Path) -> Iterable[tuple[Path | str, str, int]]:
    """What learns, and what knows the future, beside what does neither."""
    trace = traces / "mooncake_conversation.jsonl"
    for name in ("lru", "fifo", "lfu", "reuse", "belady"):
        yield from ((trace, name, thousand * 1000) for thousand in (1, 2, 5, 10, 20, 50))
        for word in ("tree", "chats"):
            yield from ((word, name, 64 * 2**i) for i in range(6))


def speed(traces: Path) -> list[dict[str, Any]]:
    """Seconds and memory for the whole Mooncake conversation trace."""
    records = []
    trace = f"mooncake:{traces / 'mooncake_conversation.jsonl'}"
    for size in (512, 16):
        case = replace(BASE, workload=trace, page_size=size, pages=2**20 // size)
        start, cpu = time.perf_counter(), time.process_time()
        report = case.simulate()
        records.append(
            {
                "case": {"trace": "mooncake, 12,031 requests", "page_size": size},
                "system": "paged-decode/simulate",
                "seconds": time.perf_counter() - start,
                "cpu_seconds": time.process_time() - cpu,
                "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
                "evictions": report.figures["evictions"],
            }
        )
        print(records[-1])
    return records


def many(function: Callable[[Any], Any], tasks: Iterable[Any], jobs: int) -> list[Any]:
    tasks = list(tasks)
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as executor:
        return list(tqdm(executor.map(function, tasks), total=len(tasks), unit="run"))


def plot(
    name: str, panels: list[tuple[str, str, str, dict[str, list[tuple[float, float]]]]]
) -> None:
    """One panel per (title, x label, y label, lines)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * len(panels), 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, x, y, lines) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
    ):
        draw_lines(axes, lines)
        axes.set(title=title, xlabel=x, ylabel=y)
    figure.savefig(PLOTS / f"{name}.png", dpi=110)


def lines_of(
    records: list[dict[str, Any]], x: str, y: str, label: Callable[[dict[str, Any]], str]
) -> dict[str, list[tuple[float, float]]]:
    lines: dict[str, list[tuple[float, float]]] = {}
    for record in records:
        lines.setdefault(label(record), []).append((record["case"][x], record[y]))
    return lines


def plot_pool(records: list[dict[str, Any]]) -> None:
    names = dict.fromkeys(r["case"]["workload"] for r in records)
    best = {n: max(r["goodput"] for r in records if r["case"]["workload"] == n) for n in names}
    for record in records:
        record["goodput_of_best"] = record["goodput"] / best[record["case"]["workload"]]
    panels = [
        (title, "usable pages of 16 tokens", unit, lines_of(records, "pages", key, _trace))
        for title, unit, key in (
            ("Goodput", "part of the best", "goodput_of_best"),
            ("Recompute tax", "part of computed tokens", "recompute_tax"),
            ("Time to first token, p90", "seconds", "ttft_seconds_p90"),
        )
    ]
    plot("pressure_pool", panels)


def plot_swap(records: list[dict[str, Any]]) -> None:
    plain, swapped = records[0], records[1:]
    panels = []
    for title, unit, key in (
        ("Whole workload", "seconds", "seconds"),
        ("Time to first token, p90", "seconds", "ttft_seconds_p90"),
        ("Recompute tax", "part of computed tokens", "recompute_tax"),
    ):
        lines = lines_of(swapped, "link_bytes", key, lambda r: r["system"])
        links = [r["case"]["link_bytes"] for r in swapped]
        lines["recompute"] = [(min(links), plain[key]), (max(links), plain[key])]
        panels.append((title, "link, bytes per second", unit, lines))
    plot("pressure_swap", panels)


def plot_eviction(records: list[dict[str, Any]], file: str = "pressure_eviction") -> None:
    panels = []
    for name in dict.fromkeys(r["case"]["workload"] for r in records):
        mine = [r for r in records if r["case"]["workload"] == name]
        size = mine[0]["case"]["page_size"]
        lines = lines_of(mine, "pages", "hit_rate", lambda r: r["system"])
        panels.append((name, f"usable pages of {size} tokens", "hit rate", lines))
    plot(file, panels)


def _trace(record: dict[str, Any]) -> str:
    return record["case"]["workload"].split(".")[0].split(":")[-1]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("question", choices=("pool", "swap", "eviction", "capacity", "speed"))
    parser.add_argument("--traces", type=Path, required=True, metavar="DIR")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--plot", action="store_true", help="draw what the results file has")
    args = parser.parse_args()
    plots = {
        "pool": plot_pool,
        "swap": plot_swap,
        "eviction": plot_eviction,
        "capacity": lambda records: plot_eviction(records, "pressure_capacity"),
    }
    if args.plot:
        found = json.loads((RESULTS / f"pressure_{args.question}.json").read_text())
        return plots[args.question](found["records"])
    if args.question == "speed":
        records = speed(args.traces)
    elif args.question == "capacity":
        records = many(curve, capacity_tasks(args.traces), args.jobs)
    else:
        cases = {"pool": pool_cases, "swap": swap_cases, "eviction": eviction_cases}
        records = many(figures, cases[args.question](args.traces), args.jobs)
    if args.question == "eviction":
        trace = args.traces / "mooncake_conversation.jsonl"
        tasks = [(trace, e, c * 1000) for e in PLAIN for c in (1, 5, 10, 20, 50)]
        records += many(curve, tasks, args.jobs)
    command = f"python benchmarks/pressure.py {args.question} --traces DIR"
    write_result(f"pressure_{args.question}", records, command=command)
    if args.question in plots:
        plots[args.question](records)


if __name__ == "__main__":
    main()
