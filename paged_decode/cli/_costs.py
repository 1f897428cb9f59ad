"""`paged-decode pressure calibrate`, and what `run` says with the costs that it has written."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .._text import print_table, printable, say
from ..allocator import BlockAllocator
from ..engine import Engine
from ..policies import LRU
from ..pressure.calibrate import calibrate
from ..pressure.fitted import Fitted
from ..pressure.report import Report
from ..pressure.simulate import simulate
from ._factory import blamed, load_factory, make_engine
from ._options import count, option, power_of_two

__all__ = ["EPILOG", "add_calibrate", "check_costs", "print_errors", "run_calibrate", "simulated"]

EPILOG = """\
example:
  paged-decode pressure calibrate --num-pages 4096 --engine my_engine.py:make_engine --out h100.json
  paged-decode pressure sweep chats --pages 1024 4096 --costs h100.json

FUNCTION is called as `run` does it. Every program of the engine is measured with several lengths,
then a few requests go through it. Exit status: 0; 1 for an error; 2 for a wrong option."""

_COMPARED = (
    "output_tokens_per_second",
    *(f"{name}_p{p}" for name in ("ttft_seconds", "per_token_seconds") for p in (50, 99)),
    *("preemptions", "hit_rate", "peak_used_pages"),
)


def add_calibrate(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.add_argument("--engine", required=True, help="MODULE:FUNCTION or FILE.py:FUNCTION")
    text = "of the pool, the null page included"
    parser.add_argument("--num-pages", type=count(2), required=True, help=text)
    option(parser, "--page-size", "tokens of a page", type=power_of_two, default=16)
    option(parser, "--out", "file that is written", type=Path, default=Path("costs.json"))


def run_calibrate(args: argparse.Namespace) -> int:
    """Measure, write the file, and show how well it fits."""
    sizes = {"num_pages": args.num_pages, "page_size": args.page_size}
    engine = make_engine(load_factory(args.engine), **sizes, eviction=LRU())
    with blamed():
        engine.warmup()
        costs = calibrate(engine)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    costs.write(args.out)
    rows = [
        (f"{f.kind}, {_shape(f.kind, f.rows, f.width)}", str(f.points), *_percents(f))
        for f in costs.programs.values()
    ]
    rows += [(f"host, {work}", str(f.points), *_percents(f)) for work, f in costs.host.items()]
    print_table(("measured", "points", "residual", "at most"), rows)
    say(f"{costs.about['card']}: {costs.about['model']}")
    say(printable(args.out))
    return 0


def _shape(kind: str, rows: int, width: int) -> str:
    if kind == "decode":
        return f"{rows} rows, {f'{width} steps' if width else 'fewer steps'}"
    return f"{rows} rows of {width}" if kind == "prefill" else "pages"


def _percents(fit: Any) -> tuple[str, str]:
    return f"{fit.mean_residual:.1%}", f"{fit.max_residual:.1%}"


def check_costs(engine: Engine, costs: Fitted) -> None:
    """See whether a simulation with these costs is of this engine.

    Raises:
      NotImplementedError: the engine has a host tier.
      ValueError: the costs are those of other programs.
    """
    if engine.tier is not None:
        raise NotImplementedError("--costs simulates no host tier beside a real run; use a sweep")
    own = {n: getattr(engine.config, n) for n in costs.sizes if n != "page_size"}
    own["page_size"] = engine.allocator.page_size
    if other := [n for n, value in costs.sizes.items() if own[n] != value]:
        told = ", ".join(f"{n} {costs.sizes[n]} there and {own[n]} here" for n in other)
        raise ValueError(f"the costs are of an engine with other programs: {told}")


def simulated(engine: Engine, requests: Sequence[Any], costs: Fitted, eviction: Any) -> Report:
    """The same workload in a pool and with policies like the engine's."""
    allocator = BlockAllocator(
        engine.allocator.usable_pages + 1, engine.allocator.page_size, eviction=eviction
    )
    victim, preemption, admission = engine.scheduler.room.policies
    return simulate(
        requests,
        allocator,
        costs,
        config=engine.config,
        victim=victim,
        preemption=preemption,
        admission=admission,
    )


def print_errors(real: dict[str, Any], model: dict[str, Any]) -> None:
    """Both, and how far the simulation is from the engine."""
    rows = []
    for name in _COMPARED:
        a, b = real[name], model[name]
        far = f"{b / a - 1:+.1%}" if a and b is not None else ""
        rows.append((name, *("none" if x is None else f"{x:.4g}" for x in (a, b)), far))
    print_table(("figure", "engine", "simulated", "error"), rows)
