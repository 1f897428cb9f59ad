"""`paged-decode pressure run|sweep|compare`."""

from __future__ import annotations

import argparse
import csv
import importlib
import importlib.util
import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import product
from pathlib import Path
from typing import Any

from ..pressure._case import (
    ADMISSIONS,
    EVICTIONS,
    PREEMPTIONS,
    VICTIMS,
    WORKLOADS,
    Case,
    check_workload,
    read_workload,
)

__all__ = ["add"]

# An 8B model in bfloat16 with 8 KV heads of 128 and 32 layers, on an H100.
_DEVICE = {
    "weight_bytes": (16e9, "of the model, two per weight"),
    "kv_bytes_per_token": (131072.0, "keys and values of all layers"),
    "bandwidth_bytes": (3e12, "of device memory, per second"),
    "flops": (6e14, "per second"),
}


def add(subparsers: Any) -> None:
    """Register the subcommand."""
    parser = subparsers.add_parser("pressure", help="run or simulate a workload as pages run out")
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    sweep = actions.add_parser("sweep", help="simulate one workload over pool sizes and policies")
    _add_workload(sweep)
    _add_sweep(sweep)
    run = actions.add_parser("run", help="one workload through a real engine and its model")
    _add_workload(run)
    run.add_argument("--engine", required=True, help="MODULE:FUNCTION or FILE.py:FUNCTION")
    run.add_argument("--num-pages", type=int, required=True, help="the null page included")
    run.add_argument("--vocab-size", type=int, help="default: the engine's")
    run.add_argument("--eviction", default="lru", choices=list(EVICTIONS))
    run.add_argument("--time-scale", type=float, default=1.0, help="0: all requests at once")
    run.set_defaults(run=_run)
    compare = actions.add_parser("compare", help="figures of several runs side by side")
    compare.add_argument("reports", type=Path, nargs="+", help="report.json or sweep.json files")
    compare.add_argument("--out", type=Path, help="write compare.csv there, too")
    compare.set_defaults(run=_compare)


def _add_workload(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("workload", type=_workload, help=" or ".join(WORKLOADS))
    parser.add_argument("--limit", type=int, help="only the first so many requests")
    parser.add_argument("--rate", type=float, default=1.0, help="arrivals per second, generated")
    parser.add_argument("--stretch", type=float, default=1.0, help="of the time between arrivals")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--page-size", type=int, default=16)
    parser.add_argument("--ttft", type=float, default=2.0, help="goal in seconds")
    parser.add_argument("--per-token", type=float, default=0.1, help="goal in seconds")
    parser.add_argument("--out", type=Path, default=Path("pressure"), help="folder")


def _workload(word: str) -> str:
    try:
        check_workload(word)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return word


def _add_sweep(sweep: argparse.ArgumentParser) -> None:
    sweep.add_argument("--pages", type=int, nargs="+", required=True, help="usable pages")
    for name, choices in (
        ("eviction", EVICTIONS),
        ("victim", VICTIMS),
        ("preemption", PREEMPTIONS),
        ("admission", ADMISSIONS),
    ):
        first = next(iter(choices))
        sweep.add_argument(f"--{name}", nargs="+", default=[first], choices=list(choices))
    sweep.add_argument("--host-pages", type=int, default=100_000, help="of the host tier")
    sweep.add_argument("--link-bytes", type=float, nargs="+", default=[5e10], help="per second")
    for name, (value, text) in _DEVICE.items():
        sweep.add_argument(f"--{name.replace('_', '-')}", type=float, default=value, help=text)
    sweep.add_argument("--max-rows", type=int, default=64)
    sweep.add_argument("--jobs", type=int, default=1, help="processes")
    sweep.set_defaults(run=_sweep)


def _sweep(args: argparse.Namespace) -> int:
    """Run what is not there yet, then write `sweep.json`, `sweep.csv`, PNGs and `report.html`."""
    from ..pressure.page import write_page

    args.out.mkdir(parents=True, exist_ok=True)
    cases = list(_cases(args))
    _run_missing(cases, args.out, args.jobs)
    runs = [json.loads((args.out / f"{case.key}.json").read_text()) for case in cases]
    (args.out / "sweep.json").write_text(json.dumps(runs, indent=1) + "\n")
    _write_csv(args.out / "sweep.csv", runs)
    print(write_page(args.out, runs, _typed()))
    return 0


def _cases(args: argparse.Namespace) -> Iterator[Case]:
    plain = ("workload", "limit", "rate", "stretch", "seed", "page_size", "host_pages", "max_rows")
    fixed = {name: getattr(args, name) for name in (*plain, "ttft", "per_token", *_DEVICE)}
    swept = ("eviction", "victim", "preemption", "admission", "link_bytes", "pages")
    for values in product(*(getattr(args, name) for name in swept)):
        yield Case(**fixed, **dict(zip(swept, values, strict=True)))


def _run_missing(cases: list[Case], folder: Path, jobs: int) -> None:
    from tqdm import tqdm

    missing = [case for case in cases if not (folder / f"{case.key}.json").exists()]
    with tqdm(total=len(cases), initial=len(cases) - len(missing), unit="run") as bar:
        for case, figures in _figures(missing, jobs):
            path = folder / f"{case.key}.json"
            part = path.with_suffix(".part")
            part.write_text(json.dumps(figures))
            part.replace(path)  # whole or absent, so a sweep that was cut off can go on
            bar.update()


def _figures(cases: list[Case], jobs: int) -> Iterator[tuple[Case, dict[str, Any]]]:
    """Cases and their figures as they come."""
    if jobs == 1:
        yield from ((case, case.figures()) for case in cases)
        return
    with ProcessPoolExecutor(jobs, mp_context=_spawn()) as executor:
        futures = {executor.submit(Case.figures, case): case for case in cases}
        for future in as_completed(futures):
            yield futures[future], future.result()


def _spawn() -> Any:
    import multiprocessing

    return multiprocessing.get_context("spawn")  # jax has threads, which fork would not copy


def _run(args: argparse.Namespace) -> int:
    """Run it, and write `report.json`, `requests.csv`, PNGs and `report.html`."""
    from tqdm import tqdm

    from ..pressure.page import write_page
    from ..pressure.real import run

    requests = list(read_workload(args.workload, args.limit, args.rate, args.stretch, args.seed))
    make = _factory(args.engine)
    engine = make(
        num_pages=args.num_pages,
        page_size=args.page_size,
        eviction=EVICTIONS[args.eviction](),
    )
    engine.warmup()
    with tqdm(total=len(requests), unit="request") as bar:
        report = run(
            engine,
            requests,
            vocab_size=args.vocab_size,
            time_scale=args.time_scale,
            progress=bar.update,
        )
    report.write(args.out)
    about = {
        "workload": args.workload,
        "policy": args.eviction,
        "pages": args.num_pages - 1,
        "goodput": report.goodput(args.ttft, args.per_token),
    }
    figures = about | report.figures | {"lifetimes": report.lifetimes}
    print(write_page(args.out, [figures], _typed()))
    return 0


def _factory(name: str) -> Any:
    """The function of `MODULE:FUNCTION` or `FILE.py:FUNCTION`."""
    where, _, function = name.rpartition(":")
    if not where or not function:
        raise SystemExit(f"--engine must be MODULE:FUNCTION or FILE.py:FUNCTION, got {name!r}")
    if not where.endswith(".py"):
        return getattr(importlib.import_module(where), function)
    path = Path(where).resolve()
    sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise SystemExit(f"--engine: {where} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, function)


def _compare(args: argparse.Namespace) -> int:
    """Print each figure of every run, the first one as it is and the others with their ratio."""
    runs: list[dict[str, Any]] = []
    for path in args.reports:
        content = json.loads(path.read_text())
        for each in content if isinstance(content, list) else [content]:
            runs.append({"report": str(path), **each})
    names = [n for n in runs[0] if n != "lifetimes" and all(n in run for run in runs)]
    width = max(map(len, names))
    for name in names:
        first = runs[0][name]
        cells = [_cell(run[name], first if run is not runs[0] else None) for run in runs]
        print(f"{name:<{width}}  " + "  ".join(f"{cell:>20}" for cell in cells))
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        _write_csv(args.out / "compare.csv", [{n: run[n] for n in names} for run in runs])
    return 0


def _cell(value: Any, first: Any) -> str:
    if not isinstance(value, int | float):
        return str(value)[-20:]
    text = f"{value:.5g}"
    return f"{text} (x{value / first:.2f})" if first else text


def _write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with open(path, "w", newline="") as out:
        writer = csv.DictWriter(out, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _typed() -> str:
    return shlex.join(["paged-decode", *sys.argv[1:]])
