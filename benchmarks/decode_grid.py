"""Paged decode attention on one GPU: the Triton backend against every peer that runs there.

python benchmarks/decode_grid.py              # the whole grid, about 15 minutes on 16 cores
python benchmarks/decode_grid.py --models --name decode_grid_models    # other heads and dims
python benchmarks/decode_grid.py --eight-bits --name decode_grid_8bit  # pages of 8 bits
python benchmarks/decode_grid.py --quick      # a short list
python benchmarks/decode_grid.py --summary    # tables and plot of the stored result

Ours is the shipped default, called through JAX; peers get their best setting at every point. The
time is device time with a cold L2 (`_gpu_timing.py`). Every result is compared with float32 first.

Peers are used if they are installed: flashinfer-python 0.5.3, flash-attn3-jax 0.2.3, ejkernel
0.0.80, torch 2.11. FlashInfer builds its kernels with nvcc.
"""

import argparse
import json
import math
import multiprocessing
import os
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from _result import RESULTS, spread, write_result

SHAPES = {
    "32/8/128": (32, 8, 128),
    "64/8/128": (64, 8, 128),
    "8/1/128": (8, 1, 128),
    "32/4/128": (32, 4, 128),
    "32/32/128": (32, 32, 128),
    "16/8/256": (16, 8, 256),
    "64/8/64": (64, 8, 64),
}
CONTEXTS = (512, 1024, 2048, 4096, 8192, 16384, 32768, 131072)
# Tokens of a case, 4.3 GB of K and V: beyond 2^31 numbers in a pool a peer reads out of bounds.
LIMIT = 2**20
TOLERANCE = 1e-2  # relative error in bfloat16
PLOTS = RESULTS.parents[1] / "docs"
OURS = "paged-decode/triton"
PALLAS = "paged-decode/pallas"
EIGHT_BITS = ("paged-decode/int8", "paged-decode/e4m3", "flashinfer/fp8")


def make_case(
    lengths: str, rows: int, page_size: int = 16, shape: str = "32/8/128", order: str = "permuted"
) -> dict[str, Any]:
    """A case as it stands in the result file; `lengths` is a context or a name of `ragged`."""
    heads, kv_heads, dim = SHAPES[shape]
    return dict(
        lengths=lengths,
        rows=rows,
        heads=heads,
        kv_heads=kv_heads,
        dim=dim,
        page_size=page_size,
        dtype="bfloat16",
        order=order,
    )


RAGGED = {
    "uniform 1 to 4096": 64,
    "uniform 1024 to 2048": 64,
    "log-normal, mean 2147": 64,
    "zipf, mean 2048": 64,
    "one of 32768, rest 1024": 64,
    "63 of 256, one of 65536": 64,
    "4500, 45000, 1800, 1800": 4,
    "1000 to 1016": 64,
    "every second empty, rest 4096": 64,
}


def lengths_of(case: dict[str, Any]) -> list[int]:
    """The lengths of a case, always the same."""
    import numpy as np

    rng, rows, name = np.random.default_rng(0), case["rows"], case["lengths"]

    def with_mean(values: Any, mean: int) -> list[int]:
        return [max(int(v), 1) for v in values / values.mean() * mean]

    made = {
        "uniform 1 to 4096": lambda: rng.integers(1, 4097, rows).tolist(),
        "uniform 1024 to 2048": lambda: rng.integers(1024, 2049, rows).tolist(),
        "log-normal, mean 2147": lambda: with_mean(rng.lognormal(0, 1, rows), 2147),
        "zipf, mean 2048": lambda: with_mean(1 / np.arange(1, rows + 1), 2048),
        "one of 32768, rest 1024": lambda: [1024] * (rows - 1) + [32768],
        "63 of 256, one of 65536": lambda: [256] * (rows - 1) + [65536],
        "4500, 45000, 1800, 1800": lambda: [4500, 45000, 1800, 1800],
        "1000 to 1016": lambda: rng.integers(1000, 1017, rows).tolist(),
        "every second empty, rest 4096": lambda: [0, 4096] * (rows // 2),
    }
    return made[name]() if name in made else [int(name)] * rows


def all_cases() -> list[dict[str, Any]]:
    """The grid of Llama-3-8B's heads: uniform, ragged, a second page size, pages in order."""
    cases = [
        make_case(str(context), rows)
        for context in (1024, 4096, 16384, 512, 2048, 8192, 32768, 131072)
        for rows in (1, 4, 16, 64, 128, 256)
        if rows * context <= LIMIT
    ]
    ragged = [make_case(name, rows, size) for size in (16, 64) for name, rows in RAGGED.items()]
    second = [
        make_case(str(context), rows, 64)
        for rows, context in [(1, 4096), (16, 1024), (16, 4096), (64, 4096), (128, 2048)]
    ]
    # The most telling first, for a run that has to end before.
    main, rest = cases[:16], cases[16:]
    return [*main, *ragged, *second, make_case("4096", 64, order="in order"), *rest]


def model_cases() -> list[dict[str, Any]]:
    """Other heads, groups and head dims."""
    return [
        make_case(str(context), rows, 16, shape)
        for shape in list(SHAPES)[1:]
        for rows, context in [(1, 4096), (16, 1024), (64, 4096)]
    ]


def quick_cases() -> list[dict[str, Any]]:
    """One case of each kind."""
    cases = [make_case(str(c), b) for b, c in [(1, 4096), (1, 32768), (16, 1024), (16, 4096)]]
    cases += [make_case("4096", 64), make_case("4096", 64, 64), make_case("2048", 128)]
    names = ("log-normal, mean 2147", "63 of 256, one of 65536", "4500, 45000, 1800, 1800")
    return cases + [make_case(name, RAGGED[name]) for name in names]


def prepare(case: dict[str, Any], systems: list[str]) -> tuple[Any, dict, dict[str, str]]:
    """The case, and every variant of every system compiled for it, or why not."""
    from _grid_systems import SYSTEMS, GridCase

    point = GridCase(case, lengths_of(case))
    binds, errors = {}, {}
    for system in systems:
        try:
            binds |= {(system, name): bind for name, bind in SYSTEMS[system](point)}
        except Exception as error:  # a peer that cannot serve a case is a result, too
            errors[system] = f"{type(error).__name__}: {error}"[:200]
    return point, binds, errors


def measure(timer: Any, point: Any, binds: dict, errors: dict[str, str]) -> list[dict[str, Any]]:
    """The records of one case: every system at its best variant."""
    import torch
    from _grid_systems import Arrays

    arrays = Arrays(point)
    exact = arrays.reference(arrays.k, arrays.v)
    calls, off = {}, {}
    for key, bind in binds.items():
        try:
            call = bind(arrays)
            got, want = torch.from_dlpack(call()), getattr(call, "want", exact)
            off[key] = ((got.float() - want).norm() / want.norm()).item()
            if off[key] < TOLERANCE:
                calls[key] = call
            else:
                errors[key[0]] = f"{key[1]}: relative error {off[key]:.1e}"
        except Exception as error:
            errors[key[0]] = f"{key[1]}: {type(error).__name__}: {error}"[:200]
    torch.cuda.synchronize()
    times = {key: spread(values) for key, values in timer.time(calls).items()}
    records = []
    for system in dict.fromkeys([*errors, *(system for system, _ in binds)]):
        mine = {name: times[s, name] for s, name in times if s == system}
        record: dict[str, Any] = dict(case=point.case, system=system)
        if mine:
            best = min(mine, key=lambda name: mine[name]["median_s"])
            record |= dict(variant=best, **mine[best], bytes=point.kv_bytes)
            record["relative_error"] = off[system, best]
            record["variants"] = {name: value["median_s"] for name, value in mine.items()}
            record |= getattr(calls[system, best], "aside", {})
        else:
            record["error"] = errors[system]
        records.append(record)
    return records


def ceilings(timer: Any) -> list[dict[str, Any]]:
    """What this card reads and copies."""
    import torch

    records: list[dict[str, Any]] = []
    for size in (2**28, 2**30, 2**32):
        x = torch.randint(0, 1000, (size // 4,), dtype=torch.int32, device="cuda")
        y = torch.empty_like(x)
        copied = timer.time({"copy": lambda y=y, x=x: y.copy_(x)})["copy"]
        for kind, times, moved in (("read", timer.time_reads(x), size), ("copy", copied, 2 * size)):
            case = dict(kind=kind, array_bytes=size)
            records.append(dict(case=case, system="ceiling", **spread(times), bytes=moved))
        del x, y
        torch.cuda.empty_cache()
    return records


def run(cases: list[dict[str, Any]], systems: list[str], budget_s: float) -> list[dict[str, Any]]:
    """All records; the next case is compiled in a thread while this one is measured."""
    import torch
    from _gpu_timing import Timer

    start = time.monotonic()
    timer = Timer()
    with ThreadPoolExecutor(1) as compiler:
        ready = [compiler.submit(prepare, case, systems) for case in cases]
        _build_flashinfer(cases, [name for name in systems if name.startswith("flashinfer")])
        records = ceilings(timer)
        for case, made in zip(cases, ready, strict=True):
            if time.monotonic() - start > budget_s:
                made.cancel()
                records.append(dict(case=case, system="all", error="the budget was used up"))
                continue
            found: list[dict[str, Any]]
            try:
                found = measure(timer, *made.result())
            except Exception as error:
                found = [dict(case=case, system="all", error=repr(error)[:300])]
            torch.cuda.empty_cache()
            records += found
            shown = {
                r["system"]: f"{r['median_s'] * 1e6:.1f}" if "median_s" in r else r["error"][:60]
                for r in found
            }
            name = f"{case['rows']} x {case['lengths']} page {case['page_size']}"
            print(f"[{time.monotonic() - start:.0f} s] {name}: {shown}", flush=True)
    return records


def _build_flashinfer(cases: list[dict[str, Any]], systems: list[str]) -> None:
    """Build its modules side by side, in other processes."""
    from _grid_systems import warm_flashinfer

    keys = {(c["heads"] // c["kv_heads"], c["dim"], c["page_size"]): c for c in cases}
    each = [(case, system) for case in keys.values() for system in systems]
    if not each:
        return
    with multiprocessing.get_context("spawn").Pool(len(each)) as pool:
        for (case, system), error in zip(each, pool.starmap(warm_flashinfer, each), strict=True):
            print(system, case["page_size"], case["dim"], error or "built", flush=True)


def by_point(records: list[dict[str, Any]]) -> list[tuple[dict[str, Any], dict[str, dict]]]:
    """Every case with the record of each system that served it."""
    points: dict[str, dict[str, dict]] = {}
    for record in records:
        if "median_s" in record and record["system"] != "ceiling":
            points.setdefault(json.dumps(record["case"]), {})[record["system"]] = record
    return [(json.loads(key), systems) for key, systems in points.items() if OURS in systems]


def peers_of(systems: dict[str, dict]) -> dict[str, float]:
    """Median seconds of the paged peers; dense attention is a ceiling, not a peer."""
    return {
        system: record["median_s"]
        for system, record in systems.items()
        if system not in ("torch/dense", *EIGHT_BITS) and not system.startswith("paged-decode/")
    }


def read_ceiling(records: list[dict[str, Any]]) -> float:
    """Bytes per second of the fastest plain read of the run."""
    reads = [r for r in records if r["system"] == "ceiling" and r["case"]["kind"] == "read"]
    return max(r["bytes"] / r["median_s"] for r in reads)


def means(
    records: list[dict[str, Any]], ceiling: float | None = None
) -> dict[tuple[str, str], tuple[float, float, int]]:
    """By kind and peer: geometric mean and worst of its time over ours, and the points.

    With `ceiling` over the time to read K and V at so many bytes per second instead, which no
    kernel can be faster than.
    """
    ratios: dict[tuple[str, str], list[float]] = {}
    for case, systems in by_point(records):
        if not (peers := peers_of(systems)):
            continue
        kind = "uniform" if case["lengths"].isdigit() else "ragged"
        ours = systems[OURS]
        seconds = ours["bytes"] / ceiling if ceiling else ours["median_s"]
        for name, value in {**peers, "best": min(peers.values())}.items():
            ratios.setdefault((kind, name), []).append(value / seconds)
    return {
        key: (math.exp(statistics.fmean(map(math.log, values))), min(values), len(values))
        for key, values in sorted(ratios.items(), reverse=True)
    }


def summary(records: list[dict[str, Any]]) -> str:
    """Ours against the best peer at every point, and geometric means."""
    lines = []
    for case, systems in by_point(records):
        peers, mine = peers_of(systems), systems[OURS]
        line = (
            f"{case['rows']:4d} x {case['lengths']:30s} {case['heads']}/{case['kv_heads']}/"
            f"{case['dim']} page {case['page_size']:3d}  {mine['median_s'] * 1e6:8.1f} us "
            f"{mine['bytes'] / mine['median_s'] / 1e12:5.2f} TB/s"
        )
        if peers:
            best = min(peers, key=lambda system: peers[system])
            line += (
                f"  best peer {peers[best] * 1e6:8.1f} us ({best}) ratio "
                f"{peers[best] / mine['median_s']:.3f}"
            )
        if (pallas := systems.get(PALLAS)) is not None:
            line += (
                f"  Pallas {pallas['median_s'] * 1e6:8.1f} us, Triton takes "
                f"{mine['median_s'] / pallas['median_s']:.3f} of that"
            )
        for system in EIGHT_BITS:
            if (small := systems.get(system)) is not None:
                line += (
                    f"  {system} {small['median_s'] * 1e6:8.1f} us, bfloat16 takes "
                    f"{mine['median_s'] / small['median_s']:.2f} of that"
                )
        lines.append(line)
    for (kind, name), (mean, worst, count) in means(records).items():
        lines.append(f"{kind} / {name}: geometric mean {mean:.3f}, worst {worst:.3f}, {count}")
    for record in records:
        if record["system"] == "ceiling":
            rate = record["bytes"] / record["median_s"] / 1e12
            lines.append(f"{record['case']['kind']} {record['bytes'] >> 20} MiB: {rate:.3f} TB/s")
    return "\n".join(lines)


def plot(records: list[dict[str, Any]], path: str) -> None:
    """TB/s over context for three batch sizes, one line for each system."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    read = max(
        r["bytes"] / r["median_s"] / 1e12
        for r in records
        if r["system"] == "ceiling" and r["case"]["kind"] == "read"
    )
    points = [
        (case, systems)
        for case, systems in by_point(records)
        if case["lengths"].isdigit() and case["page_size"] == 16 and case["order"] == "permuted"
    ]
    figure, panels = plt.subplots(1, 3, figsize=(13, 4.2), sharey=True, layout="constrained")
    names = list(dict.fromkeys(name for _, systems in points for name in systems))
    for panel, rows in zip(panels, (1, 16, 64), strict=True):
        here = sorted(
            (int(case["lengths"]), systems) for case, systems in points if case["rows"] == rows
        )
        for name in names:
            line = [
                (context, systems[name]["bytes"] / systems[name]["median_s"] / 1e12)
                for context, systems in here
                if name in systems
            ]
            style = dict(lw=2.6, zorder=5) if name == OURS else dict(lw=1.2)
            style |= dict(ls="--", color="0.6") if name == "torch/dense" else {}
            panel.plot(*zip(*line, strict=True), marker="o", ms=3.5, label=name, **style)
        panel.axhline(read, color="0.3", lw=0.8, ls=":")
        panel.set(xscale="log", title=f"{rows} rows" if rows > 1 else "1 row")
        panel.set_xlabel("context, tokens")
        ticks = [context for context, _ in here]
        panel.set_xticks(ticks, [f"{t // 1024}k" if t >= 1024 else t for t in ticks])
        panel.minorticks_off()
        panel.grid(alpha=0.25)
    panels[0].set_ylabel("K and V read, TB/s")
    panels[0].text(600, read - 0.12, "read ceiling", fontsize=8, color="0.3")
    panels[2].legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=110)


def main() -> None:
    """Measure and store, or show what is stored."""
    parser = argparse.ArgumentParser(
        description="Paged decode attention on one GPU against its peers."
    )
    parser.add_argument("--quick", action="store_true", help="a short list of cases")
    parser.add_argument("--models", action="store_true", help="the cases of other models instead")
    parser.add_argument("--eight-bits", action="store_true", help="pages of 8 bits and ours")
    parser.add_argument("--summary", action="store_true", help="show the stored result")
    parser.add_argument("--systems", nargs="*", help="some of the systems only")
    parser.add_argument("--budget", type=float, default=3600, help="seconds, then it stores")
    parser.add_argument("--name", default="decode_grid", help="of the result file")
    args = parser.parse_args()
    if args.summary:
        records = json.loads((RESULTS / f"{args.name}.json").read_text())["records"]
        plot(records, str(PLOTS / f"{args.name}.png"))
        print(summary(records))
        return
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    import torch
    from _grid_systems import SYSTEMS

    every = [name for name in SYSTEMS if name not in EIGHT_BITS]
    systems = args.systems or ([OURS, *EIGHT_BITS] if args.eight_bits else every)
    cases = quick_cases() if args.quick else model_cases() if args.models else all_cases()
    records = run(cases, systems, args.budget)
    packages = ("jax", "jaxlib", "torch", "triton", "jax-triton", "flashinfer-python",
                "flash-attn3-jax", "ejkernel")  # fmt: skip
    write_result(
        args.name,
        records,
        command=" ".join(["python", *sys.argv]),
        device=torch.cuda.get_device_name(),
        packages=packages,
    )
    print(summary(records))


if __name__ == "__main__":
    main()
