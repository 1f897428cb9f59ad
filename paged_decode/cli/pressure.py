"""`paged-decode pressure run|sweep|compare|calibrate`."""

from __future__ import annotations

import argparse
import multiprocessing
import shlex
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, as_completed
from dataclasses import replace
from functools import wraps
from itertools import product
from pathlib import Path
from typing import Any

from .._optional import needs
from .._text import print_table, printable, say
from ..engine import Engine
from ..pressure._case import (
    ADMISSIONS,
    CARD,
    EVICTIONS,
    MODEL,
    PREEMPTIONS,
    VICTIMS,
    WORKLOADS,
    Case,
    check_workload,
    curves,
    read_workload,
    store,
    stored,
)
from ..pressure._labels import MAIN_FIGURES, label, quantity, swept
from ..pressure.clairvoyant import Belady
from ..pressure.fitted import Fitted
from ..pressure.report import Report, as_json
from ..pressure.workload import in_order
from ._compare import print_runs, read_runs, write_csv
from ._costs import EPILOG, add_calibrate, check_costs, print_errors, run_calibrate, simulated
from ._factory import FactoryError, blamed, load_factory, make_engine
from ._options import Parser, count, given, number, option, power_of_two

__all__ = ["add"]

_SWEPT = ("eviction", "victim", "preemption", "admission", "link_bytes", "pages")
_GENERATED = {"rate": 1.0, "seed": 0}  # of generated workloads alone
_SWAPPING = {"host_pages": 100_000, "link_bytes": [5e10]}  # where something goes to the host
_ROOFLINE = {n: v for n, (v, _) in (MODEL | CARD).items()} | {"max_rows": 64}  # without --costs
_RATES = ("hit_rate", "recompute_tax", "utilisation")  # parts, shown in percent
_MOST_NAMED = 8

_SWEEP = """\
examples:
  paged-decode pressure sweep mooncake:conversation_trace.jsonl --page-size 512 \\
      --pages 1000 2000 4000 --eviction lru slru --preemption recompute swap --jobs 2 --out out
  paged-decode pressure sweep chats --limit 100 --rate 4 --pages 256 512 1024

Every combination is one run; files of runs that are there already are not computed again.
Exit status: 0; 1 for an error or if a request did not fit some pool; 2 for a wrong option."""

_RUN = """\
example:
  paged-decode pressure run tree --limit 8 --rate 4 --num-pages 200 \\
      --engine examples/pressure.py:make_engine

FUNCTION is called once, by keyword, with num_pages (int, the null page included), page_size (int,
tokens) and eviction (a fresh object for BlockAllocator(eviction=)). It returns an idle
paged_decode.Engine with such a pool; whatever else the engine has is the function's choice. A
FILE.py imports from its own folder, a MODULE from the current one, too.
Exit status: 0; 1 for an error or if a request did not fit; 2 for a wrong option."""

_COMPARE = """\
example:
  paged-decode pressure compare out/sweep.json"""


class OptionError(ValueError):
    """Options that contradict each other."""


def _told(run: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    """The same command; an error that its message explains is one line, and status 1 or 2."""

    @wraps(run)
    def told(args: argparse.Namespace) -> int:
        try:
            return run(args)
        except (
            ValueError,
            NotImplementedError,
            FactoryError,
            MemoryError,
            BrokenExecutor,
        ) as error:
            text = " ".join(str(error).split()) or type(error).__name__
            print(f"paged-decode pressure: {printable(text)}", file=sys.stderr)
            return 2 if isinstance(error, OptionError) else 1

    return told


def add(subparsers: Any) -> None:
    """Register the subcommand."""
    text = "run or simulate a workload as pages run out"
    parser = subparsers.add_parser("pressure", help=text, description=text)
    actions = parser.add_subparsers(required=True, metavar="ACTION", parser_class=Parser)
    text = "simulate one workload over pool sizes and policies"
    sweep = actions.add_parser("sweep", help=text, description=text, epilog=_SWEEP)
    _add_workload(sweep)
    _add_sweep(sweep)
    sweep.set_defaults(run=_told(_sweep))
    text = "one workload through a real engine and its model"
    run = actions.add_parser("run", help=text, description=text, epilog=_RUN)
    _add_workload(run)
    run.add_argument("--engine", required=True, help="MODULE:FUNCTION or FILE.py:FUNCTION")
    run.add_argument(
        "--num-pages", type=count(2), required=True, help="of the pool, the null page included"
    )
    run.add_argument("--vocab-size", type=count(1), help="of prompts (default: the engine's)")
    known = [name for name, each in EVICTIONS.items() if each is not Belady]
    option(run, "--eviction", "which cached page goes", default="lru", choices=known)
    text = "seconds to wait per second between arrivals; 0: all requests at once"
    option(run, "--time-scale", text, type=number(zero=True), default=1.0)
    run.set_defaults(run=_told(_run))
    text = "figures of several runs side by side"
    compare = actions.add_parser("compare", help=text, description=text, epilog=_COMPARE)
    compare.add_argument("reports", type=Path, nargs="+", help="report.json or sweep.json files")
    compare.add_argument("--out", type=Path, help="folder for compare.csv (default: none)")
    compare.set_defaults(run=_told(_compare))
    text = "measure the programs of a real engine, for --costs"
    calibrate = actions.add_parser("calibrate", help=text, description=text, epilog=EPILOG)
    add_calibrate(calibrate)
    calibrate.set_defaults(run=_told(run_calibrate))


def _add_workload(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("workload", type=_workload, help=" or ".join(WORKLOADS))
    text = "only the first so many requests (default: 1000 generated ones, or the whole trace)"
    parser.add_argument("--limit", type=count(1, 10**7), help=text)
    text = (
        "requests per second (default: 1; a trace has its own); of several turns or calls: when as "
        "many sessions end as begin"
    )
    parser.add_argument("--rate", type=number(), help=text)
    option(parser, "--stretch", "of the time between arrivals", type=number(), default=1.0)
    text = "of what is generated (default: 0)"
    parser.add_argument("--seed", type=count(0, 2**63 - 1), help=text)
    text = "tokens of a page (default: 16, or that of --costs)"
    parser.add_argument("--page-size", type=power_of_two, help=text)
    text = "what `calibrate` has written (default: none)"
    parser.add_argument("--costs", type=Path, metavar="FILE", help=text)
    text = "goal for the first token, in seconds"
    option(parser, "--ttft", text, type=number(), default=2.0)
    text = "goal for the mean gap between tokens, in seconds"
    option(parser, "--per-token", text, type=number(), default=0.1)
    option(parser, "--out", "folder for what is written", type=Path, default=Path("pressure"))


def _workload(word: str) -> str:
    try:
        check_workload(word)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return word


def _add_sweep(sweep: argparse.ArgumentParser) -> None:
    sweep.add_argument("--pages", type=count(1), nargs="+", required=True, help="usable pages")
    for name, choices, text in (
        ("eviction", EVICTIONS, "which cached page goes"),
        ("victim", VICTIMS, "who is preempted"),
        ("preemption", PREEMPTIONS, "how it comes back"),
        ("admission", ADMISSIONS, "who is let in"),
    ):
        first = next(iter(choices))
        option(sweep, f"--{name}", text, nargs="+", default=[first], choices=list(choices))
    text = "pages of the host tier, for swap and cheaper (default: 100000)"
    sweep.add_argument("--host-pages", type=count(1), help=text)
    text = "bytes per second to the host, one way, for swap and cheaper (default: 5e+10)"
    sweep.add_argument("--link-bytes", type=number(), nargs="+", help=text)
    for name, (value, text) in (MODEL | CARD).items():
        flag = f"--{name.replace('_', '-')}"
        help = f"cost model: {text} (default: {value:g})"
        sweep.add_argument(flag, type=number(), help=help)
    text = "samples at once (default: 64)"
    sweep.add_argument("--max-rows", type=count(1), help=text)
    option(sweep, "--jobs", "processes", type=count(1), default=1)


def _requests(args: argparse.Namespace) -> Iterator[Any]:
    return in_order(read_workload(args.workload, args.limit, args.rate, args.stretch, args.seed))


def _settle(args: argparse.Namespace) -> None:
    """Fill in what was not given, and refuse what would have no effect."""
    if ":" in args.workload and (names := given(args, _GENERATED)):
        kind = args.workload.partition(":")[0]
        raise OptionError(
            f"{' and '.join(names)}: only of generated workloads, but {kind}: is a trace with its "
            "own arrivals; --stretch changes the time between them"
        )
    if args.workload == "rollouts" and args.rate is not None:
        raise OptionError("--rate: rollouts come all at once")
    defaults = _GENERATED | {"page_size": _page_size(args)}
    if hasattr(args, "preemption"):
        measured = (*_ROOFLINE, "link_bytes")
        if args.costs is not None and (names := given(args, measured)):
            raise OptionError(f"{' and '.join(names)}: what --costs has is measured")
        if set(args.preemption) == {"recompute"} and (names := given(args, _SWAPPING)):
            raise OptionError(
                f"{' and '.join(names)}: only for what is copied to the host, but --preemption is "
                "recompute; add swap or cheaper"
            )
        defaults |= _SWAPPING | _ROOFLINE
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def _page_size(args: argparse.Namespace) -> int:
    """That of the costs, if there are some."""
    if args.costs is None:
        return 16
    size = Fitted.read(args.costs).sizes["page_size"]
    if args.page_size not in (None, size):
        raise OptionError(f"--page-size: --costs is of an engine with pages of {size} tokens")
    return size


# ---- sweep


def _sweep(args: argparse.Namespace) -> int:
    """Run what is not there yet, then write `sweep.json`, `sweep.csv`, PNGs and `report.html`."""
    _settle(args)
    with needs("pressure"):
        import matplotlib  # noqa: F401  # before hours of simulations, and not after them
        import tqdm  # noqa: F401

        from ..pressure.page import write_page
    cases = list(_cases(args))
    for case in cases:
        case.check()
    for _ in _requests(args):  # a bad line is found before anything is computed
        pass
    args.out.mkdir(parents=True, exist_ok=True)
    runs = _run_all(cases, args.out, args.jobs)
    (args.out / "sweep.json").write_text(as_json(runs), "utf-8")
    write_csv(args.out / "sweep.csv", runs)
    names = swept(runs)
    unfit = [_unfit(run, label(run, names) if names else "") for run in runs]
    notes = [note for note in unfit if note]
    page = write_page(args.out, runs, _typed(), notes)
    _print_sweep(runs, names)
    return _finish(page, notes)


def _cases(args: argparse.Namespace) -> Iterator[Case]:
    plain = ("workload", "limit", "rate", "stretch", "seed", "page_size", "host_pages", "max_rows")
    fixed = {name: getattr(args, name) for name in (*plain, "ttft", "per_token", *MODEL, *CARD)}
    if args.costs is not None:
        fixed |= {"costs": str(args.costs), "max_rows": Fitted.read(args.costs).sizes["max_rows"]}
    values = [dict.fromkeys(getattr(args, name)) for name in _SWEPT]  # each of them once
    for chosen in product(*values):
        yield Case(**fixed, **dict(zip(_SWEPT, chosen, strict=True)))


def _run_all(cases: Sequence[Case], folder: Path, jobs: int) -> list[dict[str, Any]]:
    """The figures of all cases, those that have a file from there."""
    from tqdm import tqdm

    paths = {case: folder / f"{case.key}.json" for case in cases}  # a key is read off its trace
    known = {case: stored(path) for case, path in paths.items()}
    missing = [case for case in cases if known[case] is None]
    done = len(cases) - len(missing)
    with tqdm(total=len(cases), initial=done, unit="run", disable=None) as bar:
        for case, figures in _figures(missing, jobs):
            store(paths[case], figures)
            known[case] = figures
            bar.update()
    return [figures for case in cases if (figures := known[case]) is not None]


def _figures(cases: Sequence[Case], jobs: int) -> Iterator[tuple[Case, dict[str, Any]]]:
    """Cases and their figures as they come."""
    if min(jobs, len(cases)) <= 1:
        yield from ((case, case.figures()) for case in cases)
        return
    spawn = multiprocessing.get_context("spawn")  # jax has threads, which fork would not copy
    quiet = (
        signal.signal,
        (signal.SIGINT, signal.SIG_DFL),
    )  # workers end without a word of their own
    with ProcessPoolExecutor(min(jobs, len(cases)), spawn, *quiet) as executor:
        futures = {executor.submit(Case.figures, case): case for case in cases}
        for future in as_completed(futures):
            yield futures[future], future.result()


def _print_sweep(runs: Sequence[dict[str, Any]], names: Sequence[str]) -> None:
    """A row for every run: what tells it from others, and as many figures as a terminal holds."""
    shown = [n for n in names if n != "pages"] + ["pages"]
    head = [*(n.removesuffix("_bytes") for n in shown), *(text for _, text in MAIN_FIGURES)]
    rows = [
        [_word(run[n]) for n in shown] + [_figure(run, key) for key, _ in MAIN_FIGURES]
        for run in runs
    ]
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    most = shutil.get_terminal_size().columns + 2
    fits = max(i for i in range(1, len(head) + 1) if i == 1 or sum(widths[:i]) + 2 * i <= most)
    print_table(tuple(head[:fits]), [tuple(row[:fits]) for row in rows])


def _word(value: Any) -> str:
    return value if isinstance(value, str) else quantity(value)


def _figure(run: dict[str, Any], key: str) -> str:
    value = run[key]
    if key == "finished":
        return f"{value}/{run['requests']}"
    if value is None:
        return "none"
    if key in _RATES:
        return f"{value:.1%}"
    return f"{value:.3g} s" if "_seconds" in key else f"{value:.4g}"


# ---- run


def _run(args: argparse.Namespace) -> int:
    """Run it, and write `report.json`, `requests.csv`, PNGs and `report.html`."""
    _settle(args)
    with needs("pressure"):
        import matplotlib  # noqa: F401  # before the run, and not after it
        import tqdm  # noqa: F401

        from ..pressure.page import write_page
    requests = list(_requests(args))
    args.out.mkdir(parents=True, exist_ok=True)
    factory, eviction = load_factory(args.engine), EVICTIONS[args.eviction]()
    sizes = {"num_pages": args.num_pages, "page_size": args.page_size}
    engine = make_engine(factory, **sizes, eviction=eviction)
    notes = _other_pool(engine, args)
    if (costs := None if args.costs is None else Fitted.read(args.costs)) is not None:
        check_costs(engine, costs)
    report = _carry_out(engine, requests, args)
    about = _about(engine, args)
    about["goodput"] = report.goodput(args.ttft, args.per_token)
    report.write(args.out, about)
    figures = about | report.figures | curves(report)
    if note := _unfit(figures, ""):
        notes.append(note)
    page = write_page(args.out, [figures], _typed(), notes)
    _print_run(figures)
    if costs is not None:
        times = (replace(r, arrival_seconds=args.time_scale * r.arrival_seconds) for r in requests)
        model = simulated(engine, list(times), costs, EVICTIONS[args.eviction]())
        print_errors(report.figures, model.figures)
    _finish(page, notes)
    return int(bool(report.unfit))


def _carry_out(engine: Engine, requests: Sequence[Any], args: argparse.Namespace) -> Report:
    from tqdm import tqdm

    from ..pressure.real import run

    with tqdm(total=len(requests), unit="request", disable=None) as bar, blamed():
        engine.warmup()
        return run(
            engine,
            requests,
            vocab_size=args.vocab_size,
            time_scale=args.time_scale,
            progress=bar.update,
        )


def _about(engine: Engine, args: argparse.Namespace) -> dict[str, Any]:
    """What was run, for the report."""
    pages = engine.cache.k_pages
    layers = sum(array.shape[0] if array.ndim == 5 else 1 for array in pages)
    heads, dim, dtype = pages[0].shape[-3], pages[0].shape[-1], pages[0].dtype
    device = next(iter(pages[0].devices()))
    return {
        "workload": args.workload,
        "policy": args.eviction,
        "pages": engine.allocator.usable_pages,
        "page_size": engine.allocator.page_size,
        "goodput": None,
        "card": f"measured on {device.device_kind}",
        "model": f"{args.engine}: {layers} layers, {heads} KV heads of {dim}, {dtype} pages",
        "eviction": args.eviction,
        "ttft": args.ttft,
        "per_token": args.per_token,
    }


def _other_pool(engine: Engine, args: argparse.Namespace) -> list[str]:
    """A line if the engine has another pool than it was asked for: its own is what counts."""
    got = engine.allocator.usable_pages + 1, engine.allocator.page_size
    if got == (asked := (args.num_pages, args.page_size)):
        return []
    return [
        f"{args.engine} was asked for {asked[0]} pages of {asked[1]} tokens, and made an engine "
        f"with {got[0]} of {got[1]}; the report is on that one"
    ]


def _print_run(run: dict[str, Any]) -> None:
    say(
        f"{run['finished']} of {run['requests']} requests finished in {run['seconds']:.4g} s: "
        f"{run['output_tokens_per_second']:.4g} output tokens/s"
    )
    goals = f"requests/s within {run['ttft']:g} s and {run['per_token']:g} s per token"
    say(f"goodput              {run['goodput']:.4g} {goals}")
    for name, text in (("ttft_seconds", "time to first token"), ("per_token_seconds", "per token")):
        parts = (f"p{p} {_figure(run, f'{name}_p{p}')}" for p in (50, 90, 99))
        say(f"{text:<20} {', '.join(parts)}")
    say(f"prompt tokens found  {_figure(run, 'hit_rate')}")
    say(f"computed again       {_figure(run, 'recompute_tax')} of all computed tokens")
    say(
        f"preemptions          {run['preemptions']}, of {run['preempted_requests']} requests, "
        f"{run['preemptions_max']} at most"
    )
    say(
        f"pages in use         {_figure(run, 'utilisation')} on average, "
        f"{run['peak_used_pages']} of {run['pages']} at most"
    )


# ---- what both have


def _unfit(run: dict[str, Any], name: str) -> str:
    """A line that names the requests which did not get all their tokens; nothing if all did."""
    numbers = run["unfit_requests"]
    if not numbers:
        return ""
    some = ", ".join(map(str, numbers[:_MOST_NAMED]))
    more = len(numbers) - _MOST_NAMED
    rest = f" and {more} more" if more > 0 else ""
    where, noun = f"{name}: " if name else "", "request" if len(numbers) == 1 else "requests"
    kinds = (
        (run["too_long"], "with a prompt that can never fit"),
        (run["outgrown"], "with an output that outgrew it"),
        (run["invalid_logits"], "whose logits were no numbers: the model gave NaN"),
    )
    why = ", ".join(f"{count} {text}" for count, text in kinds if count)
    return (
        f"{where}{len(numbers)} of {run['requests']} requests did not finish within "
        f"{run['max_sequence_tokens']} tokens: {why} ({noun} {some}{rest})"
    )


def _finish(page: Path, notes: Sequence[str]) -> int:
    """Say where the report is, and what was wrong; returns the status."""
    say(printable(page))
    for note in notes[:_MOST_NAMED]:
        print(f"paged-decode pressure: {printable(note)}", file=sys.stderr)
    if len(notes) > _MOST_NAMED:
        print(
            f"paged-decode pressure: and so in {len(notes) - _MOST_NAMED} more runs",
            file=sys.stderr,
        )
    return int(bool(notes))


def _compare(args: argparse.Namespace) -> int:
    """Print the figures of every run, and write them if a folder was given."""
    runs = read_runs(args.reports)
    names = print_runs(runs)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        rows = [{name: run[name] for name in ("report", *names)} for run in runs]
        write_csv(args.out / "compare.csv", rows)
    return 0


def _typed() -> str:
    return shlex.join(["paged-decode", *sys.argv[1:]])
