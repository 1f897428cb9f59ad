"""The tilings behind `kernels/triton/config.py`: every candidate at every case, on this card.

python benchmarks/tune_triton.py              # about 5 minutes on 16 cores
python benchmarks/tune_triton.py --coarse --cases uniform log-normal
python benchmarks/tune_triton.py --summary    # of what is stored; needs no GPU

The kernel is launched by Triton itself, without JAX, with the plan of the library. A candidate is
dropped if its result is off or leaves a counter standing. What the table of config.py holds is
read off this by eye: one row has to serve many cases, so it is seldom the best of any.
"""

import argparse
import importlib.util
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, fields
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"  # the pages are torch's

from _result import RESULTS, spread, write_result
from decode_grid import RAGGED, TOLERANCE, lengths_of, make_case

from paged_decode.kernels.cards import Card
from paged_decode.kernels.record import AttentionCall
from paged_decode.kernels.triton.config import DecodeConfig, choose_config
from paged_decode.kernels.triton.plan import Plan

CARD = Card()
PROCESSORS = CARD.processors
TILES = {
    64: [(128, 4, 2), (128, 4, 3), (64, 4, 2), (64, 4, 4), (256, 8, 2)],
    128: [
        (64, 4, 2),
        (64, 4, 3),
        (64, 4, 4),
        (128, 4, 2),
        (128, 4, 3),
        (32, 2, 4),
        (128, 8, 2),
        (128, 8, 3),
        (256, 8, 2),
    ],
    256: [(32, 4, 2), (32, 4, 3), (64, 4, 2), (64, 8, 3)],
}


def cases() -> list[dict[str, Any]]:
    """Few and many rows, even and ragged, of several models."""
    found = [make_case(name, rows) for name, rows in RAGGED.items()]
    even = [(128, 512), (64, 1024), (64, 4096), (256, 512), (128, 2048), (64, 512)]
    even += [(1, 4096), (1, 32768), (4, 4096), (16, 1024), (16, 4096)]
    found += [make_case(str(context), rows) for rows, context in even]
    for shape in ("64/8/128", "8/1/128", "32/4/128", "32/32/128", "16/8/256", "64/8/64"):
        found += [make_case("1024", 16, 16, shape), make_case("4096", 64, 16, shape)]
    return found


def call_of(case: dict[str, Any]) -> AttentionCall:
    """The sizes of a case."""
    lens, size, dim = lengths_of(case), case["page_size"], case["dim"]
    columns = max(-(-max(lens) // size), 1)
    sizes: dict[str, Any] = dict(rows=len(lens), columns=columns, page_size=size, dim=dim)
    heads = dict(kv_heads=case["kv_heads"], group=case["heads"] // case["kv_heads"])
    sizes |= dict(dtype=case["dtype"], pages=_pages(case), scale=dim**-0.5)
    return AttentionCall.of_sizes(**sizes, **heads)


def shipped(case: dict[str, Any]) -> DecodeConfig:
    """What the library takes for a case."""
    config = choose_config(call_of(case), CARD)
    assert isinstance(config, DecodeConfig)
    return config


def candidates(case: dict[str, Any], coarse: bool = False) -> Iterator[DecodeConfig]:
    """The shipped config, and every tiling with every sensible number of programs, or with few."""
    call = call_of(case)
    yield shipped(case)
    ragged = not case["lengths"].isdigit()
    lanes = call.rows * call.kv_heads
    if ragged:
        aims = [PROCESSORS * n for n in ((2, 3, 8) if coarse else (2, 3, 4, 5, 6, 8, 12))]
    else:
        cuts = max(PROCESSORS // lanes, 1)
        aims = [lanes * cuts * n for n in ((1, 2) if coarse else (1, 2, 3, 4))]
    for tokens, warps, stages in TILES[call.dim]:
        for aim in aims:
            if aim * tokens > 2 * lanes * call.capacity:
                continue  # programs without a tile
            for eighths in (4, 8) if ragged else (4,):
                yield DecodeConfig(
                    tokens=tokens, warps=warps, stages=stages, even=aim, ragged=aim, eighths=eighths
                )


def launch(case: dict[str, Any], config: DecodeConfig) -> Plan:
    """The plan of one candidate."""
    return Plan.of(call_of(case), CARD, config)


def _pages(case: dict[str, Any]) -> int:
    from _grid_systems import GridCase

    return GridCase(case, lengths_of(case)).pages


def compile_one(job: tuple[dict[str, Any], DecodeConfig]) -> str:
    """Compile a candidate into Triton's cache; why not, if it does not."""
    import torch

    from paged_decode.kernels.triton.decode import decode_kernel

    made = launch(*job)
    wide, whole, real = torch.bfloat16, torch.int32, torch.float32
    pages = getattr(torch, job[0]["dtype"])
    kinds = [wide, pages, pages, whole, whole, whole, whole, wide, whole, real, real]
    kinds += [wide, wide, whole, wide, real, real, real, pages, pages, real, real]
    try:
        kernel: Any = decode_kernel
        kernel.warmup(
            *kinds,
            grid=(1,),
            **made.constants,
            num_warps=made.config.warps,
            num_stages=made.config.stages,
        )
    except Exception as error:
        return repr(error)[:200]
    return ""


def bind(arrays: Any, case: dict[str, Any], config: DecodeConfig) -> Any:
    """A call of a candidate; its `out` and `counters` are left for a look."""
    import torch

    from paged_decode.kernels.triton.decode import decode_kernel

    made = launch(case, config)
    kernel: Any = decode_kernel
    outs = [
        torch.full(size, float("nan"), dtype=getattr(torch, dtype), device="cuda")
        for size, dtype in made.outputs
    ]
    counters = torch.zeros(made.counters, dtype=torch.int32, device="cuda")
    layer = torch.zeros((), dtype=torch.int32, device="cuda")
    (k, of_k), (v, of_v) = arrays.pools(case["dtype"])
    inputs = (arrays.q, k, v, layer, arrays.table, arrays.lens, arrays.lens, arrays.q, counters)
    inputs += (of_k, of_v, arrays.q, arrays.q, arrays.lens)  # and no new token
    everything: Any = (*inputs, *outs, k, v, of_k, of_v)

    def call() -> None:
        kernel[(made.grid,)](
            *everything,
            **made.constants,
            num_warps=made.config.warps,
            num_stages=made.config.stages,
        )

    call.out, call.counters = outs[0], counters  # pyright: ignore[reportFunctionMemberAccess]
    return call


def measure(timer: Any, case: dict[str, Any], configs: list[DecodeConfig]) -> list[dict[str, Any]]:
    """The record of every candidate that is right."""
    import torch
    from _grid_systems import Arrays, GridCase, wide

    point = GridCase(case, lengths_of(case))
    arrays = Arrays(point)
    want = arrays.reference(*(wide(*pool) for pool in arrays.pools(case["dtype"])))
    calls: dict[str, Any] = {}
    for i, config in enumerate(configs):
        call = bind(arrays, case, config)
        try:
            call()
            torch.cuda.synchronize()
        except Exception as error:
            print(case, config, repr(error)[:200], flush=True)
            continue
        off = ((call.out[:, 0].float() - want).norm() / want.norm()).item()
        if off < TOLERANCE and not call.counters.any():
            calls[str(i)] = call
        else:
            print("WRONG", case, config, off, flush=True)
    return [
        dict(case=case, system="paged-decode/triton", config=asdict(configs[int(i)]))
        | dict(shipped=i == "0", bytes=point.kv_bytes)
        | spread(values)
        for i, values in timer.time(calls).items()
    ]


def run(wanted: list[dict[str, Any]], budget_s: float, coarse: bool) -> list[dict[str, Any]]:
    """All records, after one round of compilations on all cores."""
    start = time.monotonic()
    jobs = [(case, list(dict.fromkeys(candidates(case, coarse)))) for case in wanted]
    flat = [(case, config) for case, configs in jobs for config in configs]
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        errors = pool.map(compile_one, flat, chunksize=1)
    bad = {(json.dumps(c), f) for (c, f), error in zip(flat, errors, strict=True) if error}
    print(f"[{time.monotonic() - start:.0f} s] {len(flat)} candidates, {len(bad)} do not compile")
    import torch
    from _gpu_timing import Timer

    timer, records = Timer(), []
    for case, configs in jobs:
        if time.monotonic() - start > budget_s:
            print("the budget is used up before", case)
            break
        found = measure(timer, case, [c for c in configs if (json.dumps(case), c) not in bad])
        torch.cuda.empty_cache()
        records += found
        print(f"[{time.monotonic() - start:.0f} s]", *lines(found), sep="\n", flush=True)
    return records


def title(case: dict[str, Any]) -> str:
    """A case in words, such as "64 x 4096, 32/8/128, page 16"."""
    heads = f"{case['heads']}/{case['kv_heads']}/{case['dim']}"
    return f"{case['rows']} x {case['lengths']}, {heads}, page {case['page_size']}"


def lines(found: list[dict[str, Any]], best: int = 6) -> Iterator[str]:
    """The shipped config of a case and the best ones, fastest first."""
    case = found[0]["case"]
    yield title(case)
    ranked = sorted(found, key=lambda r: r["median_s"])
    for rank, record in enumerate(ranked):
        if rank < best or record["shipped"]:
            kept = {f.name: f.default for f in fields(DecodeConfig)}
            shown = {k: v for k, v in record["config"].items() if v != kept[k]}
            mark = "shipped" if record["shipped"] else ""
            times = f"{record['median_s'] * 1e6:8.1f} {record['min_s'] * 1e6:8.1f} us"
            yield f"  {times} {shown} {mark}"


def summary(name: str) -> Iterator[str]:
    """What a stored result says, case by case."""
    records = json.loads((RESULTS / f"{name}.json").read_text())["records"]
    for case in {json.dumps(r["case"]): r["case"] for r in records}.values():
        yield from lines([r for r in records if r["case"] == case])


def card() -> str:
    """The name of the GPU that is measured."""
    import torch

    return torch.cuda.get_device_name()


def main(arguments: list[str] | None = None) -> None:
    """Measure and store, or show what is stored."""
    parser = argparse.ArgumentParser(description="Tilings of the Triton kernel on this card.")
    parser.add_argument("--cases", nargs="*", help="words; only cases with one of them")
    parser.add_argument("--dtype", default="bfloat16", help="of the pages: int8, float8_e4m3fn")
    parser.add_argument("--coarse", action="store_true", help="fewer numbers of programs")
    parser.add_argument("--budget", type=float, default=3600, help="seconds, then it stores")
    parser.add_argument("--summary", action="store_true", help="show the stored result")
    parser.add_argument("--name", default="tune_triton", help="of the result file")
    args = parser.parse_args(arguments)
    if not args.summary:
        kept = [c for c in cases() if not args.cases or any(w in title(c) for w in args.cases)]
        kept = [case | dict(dtype=args.dtype) for case in kept]
        records = run(kept, args.budget, args.coarse)
        if not records:
            raise SystemExit("nothing was measured: no case fits --cases, or none is right")
        command = " ".join(["python", *sys.argv])
        # torch measures and Triton compiles; jax only comes with the library.
        packages = [p for p in ("torch", "triton", "jax") if importlib.util.find_spec(p)]
        write_result(args.name, records, command=command, device=card(), packages=packages)
    print(*summary(args.name), sep="\n")


if __name__ == "__main__":
    main()
