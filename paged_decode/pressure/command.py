"""`paged-decode pressure sweep`: one workload over pool sizes and policies."""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import shlex
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .._engine_config import EngineConfig
from ..allocator import LRU, BlockAllocator, EvictionPolicy
from ..policies import FIFO, LFU, SLRU, CostAware, LastAdmitted, LeastComputed, MostPages, Ranked
from .costs import Roofline
from .simulate import simulate
from .workload import Request, chats, poisson, read_azure, read_mooncake

__all__ = ["add"]

_EVICTIONS = {"fifo": FIFO, "lfu": LFU, "slru": SLRU, "cost": CostAware}
_VICTIMS = {"last": LastAdmitted, "least": LeastComputed, "most": MostPages}
_WORKLOADS = ("mooncake:PATH", "azure:PATH", "poisson", "chats")


@dataclass(frozen=True, slots=True)
class _Case:
    """Everything that decides one run."""

    workload: str
    limit: int | None
    rate: float
    seed: int
    pages: int
    page_size: int
    eviction: str
    victim: str
    max_rows: int
    ttft: float
    per_token: float

    @property
    def key(self) -> str:
        """Names the run's file, so that a sweep that was cut off goes on."""
        text = repr(self)
        kind, _, path = self.workload.partition(":")
        if path:
            text += hashlib.sha256(Path(path).read_bytes()).hexdigest()
        return f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def add(subparsers: Any) -> None:
    """Register the subcommand."""
    parser = subparsers.add_parser("pressure", help="simulate a workload as pages run out")
    kinds = parser.add_subparsers(required=True, metavar="ACTION")
    sweep = kinds.add_parser("sweep", help="one workload, several pool sizes and policies")
    sweep.add_argument("workload", help=" or ".join(_WORKLOADS))
    sweep.add_argument("--pages", type=int, nargs="+", required=True, help="usable pages")
    sweep.add_argument("--page-size", type=int, default=16)
    sweep.add_argument("--eviction", nargs="+", default=["lru"], choices=["lru", *_EVICTIONS])
    sweep.add_argument("--victim", default="last", choices=list(_VICTIMS))
    sweep.add_argument("--limit", type=int, help="only the first so many requests")
    sweep.add_argument("--rate", type=float, default=1.0, help="arrivals per second, generated")
    sweep.add_argument("--seed", type=int, default=0)
    sweep.add_argument("--max-rows", type=int, default=64)
    sweep.add_argument("--ttft", type=float, default=2.0, help="goal in seconds")
    sweep.add_argument("--per-token", type=float, default=0.1, help="goal in seconds")
    sweep.add_argument("--jobs", type=int, default=1, help="processes")
    sweep.add_argument("--out", type=Path, default=Path("pressure"), help="folder")
    sweep.set_defaults(run=_sweep)


def _sweep(args: argparse.Namespace) -> int:
    """Run what is not there yet, then write `sweep.json`, `sweep.csv`, PNGs and `report.html`."""
    from .page import write_page

    args.out.mkdir(parents=True, exist_ok=True)
    cases = [
        _Case(
            args.workload, args.limit, args.rate, args.seed, pages, args.page_size, eviction,
            args.victim, args.max_rows, args.ttft, args.per_token,
        )
        for eviction in args.eviction
        for pages in args.pages
    ]  # fmt: skip
    _run_missing(cases, args.out, args.jobs)
    runs = [json.loads((args.out / f"{case.key}.json").read_text()) for case in cases]
    (args.out / "sweep.json").write_text(json.dumps(runs, indent=1) + "\n")
    with open(args.out / "sweep.csv", "w", newline="") as out:
        writer = csv.DictWriter(out, list(runs[0]))
        writer.writeheader()
        writer.writerows(runs)
    print(write_page(args.out, runs, _typed(args)))
    return 0


def _run_missing(cases: list[_Case], folder: Path, jobs: int) -> None:
    from tqdm import tqdm

    missing = [case for case in cases if not (folder / f"{case.key}.json").exists()]
    bar = tqdm(total=len(cases), initial=len(cases) - len(missing), unit="run")
    with bar, ProcessPoolExecutor(jobs, mp_context=_spawn()) as executor:
        futures = {executor.submit(_run, case): case for case in missing}
        for future in as_completed(futures):
            path = folder / f"{futures[future].key}.json"
            part = path.with_suffix(".part")
            part.write_text(json.dumps(future.result()))
            part.replace(path)  # whole or absent, so a sweep that was cut off can go on
            bar.update()


def _run(case: _Case) -> dict[str, Any]:
    eviction: EvictionPolicy = LRU()
    if case.eviction != "lru":
        eviction = Ranked(_EVICTIONS[case.eviction]())
    pages = case.pages + 1
    allocator = BlockAllocator(pages, case.page_size, hash_key=b"pressure", eviction=eviction)
    limit = min(131072, case.pages * case.page_size)
    config = EngineConfig(
        max_rows=case.max_rows, decode_steps=8, prefill_chunk=2048, max_sequence_tokens=limit
    )
    # An 8B model in bfloat16 with 8 KV heads of 128 and 32 layers, on a card of 3 TB/s.
    costs = Roofline(16e9, 131072, 16e9, 3e12, 6e14, 20e-6, case.page_size)
    report = simulate(
        _requests(case), allocator, costs, config=config, victim=_VICTIMS[case.victim]()
    )
    about = {"policy": case.eviction, "victim": case.victim, "pages": case.pages}
    goodput = report.goodput(case.ttft, case.per_token)
    return {**about, "goodput": goodput, **report.figures}


def _requests(case: _Case) -> Iterable[Request]:
    kind, _, path = case.workload.partition(":")
    count = case.limit or 1000
    if kind == "poisson":
        return poisson(count, case.rate, seed=case.seed)
    if kind == "chats":
        return chats(count, case.rate, seed=case.seed)
    readers = {"mooncake": read_mooncake, "azure": read_azure}
    if kind not in readers or not path:
        raise ValueError(f"workload must be one of {', '.join(_WORKLOADS)}, got {case.workload!r}")
    from itertools import islice

    return islice(readers[kind](path), case.limit)


def _spawn() -> Any:
    import multiprocessing

    return multiprocessing.get_context("spawn")  # jax has threads, which fork would not copy


def _typed(args: argparse.Namespace) -> str:
    flags = [
        ("--pages", args.pages), ("--page-size", [args.page_size]), ("--eviction", args.eviction),
        ("--victim", [args.victim]), ("--limit", [args.limit] if args.limit else []),
        ("--rate", [args.rate]), ("--seed", [args.seed]), ("--max-rows", [args.max_rows]),
        ("--ttft", [args.ttft]), ("--per-token", [args.per_token]),
    ]  # fmt: skip
    words = ["paged-decode", "pressure", "sweep", args.workload]
    for flag, values in flags:
        words += [flag, *map(str, values)] if values else []
    return shlex.join(words)
