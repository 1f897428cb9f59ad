"""The tilings of T > 1 behind `kernels/triton/config.py`: all candidates at every case, on a card.

python benchmarks/tune_tails.py        # about 4 minutes on 16 cores

The kernel is launched by Triton itself, without JAX, with the plan of the library. A candidate is
dropped if its result differs from the shipped one's or leaves a counter standing. The tables of
config.py are read off what this stores by eye: one row of them has to serve many cases.
"""

import argparse
import multiprocessing
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"  # the pages are torch's

from _result import spread, write_result

from paged_decode.kernels.cards import Card
from paged_decode.kernels.record import AttentionCall
from paged_decode.kernels.triton.config import TailConfig, choose_config
from paged_decode.kernels.triton.launch import limits
from paged_decode.kernels.triton.plan import Plan

CARD = Card()
PROCESSORS = CARD.processors
# T, rows, tokens of each, D; 8 KV heads of 4 query heads, pages of 16.
CASES = [
    (2, 64, 4096, 128), (4, 64, 2048, 128), (8, 16, 4096, 128), (8, 64, 2048, 128),
    (16, 4, 8192, 128), (16, 32, 4096, 128), (64, 4, 4096, 128), (256, 1, 8192, 128),
    (512, 1, 512, 128), (512, 1, 4096, 128), (512, 8, 4096, 128), (2048, 1, 2048, 128),
    (2048, 1, 16384, 128), (4, 64, 2048, 64), (16, 16, 4096, 64), (2048, 1, 8192, 64),
    (4, 64, 2048, 256), (16, 16, 4096, 256), (2048, 1, 8192, 256),
]  # fmt: skip
FEW = [(32, 4, 3), (32, 4, 4), (64, 4, 2), (64, 4, 3), (128, 4, 2), (128, 8, 2), (64, 8, 3)]
MANY = [
    (128, 64, 8, 2, 128), (128, 64, 8, 3, 128), (128, 128, 8, 2, 0), (128, 64, 8, 2, 0),
    (64, 64, 4, 3, 0), (64, 64, 4, 2, 168), (64, 64, 4, 3, 168), (128, 32, 8, 3, 128),
    (64, 64, 8, 2, 0), (64, 64, 8, 2, 128), (64, 32, 4, 3, 0), (128, 32, 8, 2, 0),
]  # fmt: skip

Case = tuple[int, int, int, int]


def call_of(case: Case) -> AttentionCall:
    """The sizes of a case."""
    tokens, rows, length, dim = case
    sizes: dict[str, Any] = dict(
        rows=rows, tokens=tokens, columns=length // 16, pages=rows * (length // 16) + 1
    )
    heads: dict[str, Any] = dict(kv_heads=8, group=4, dim=dim, page_size=16)
    return AttentionCall.of_sizes(**sizes, **heads, scale=dim**-0.5)


def candidates(case: Case) -> Iterator[TailConfig]:
    """The shipped config, and every tiling with every sensible number of programs."""
    call = call_of(case)
    shipped = choose_config(call, CARD)
    assert isinstance(shipped, TailConfig)
    yield shipped
    if call.tokens * call.group <= 64:
        for tokens, warps, stages in FEW:
            tiling = dict(queries=shipped.queries, tokens=tokens, warps=warps, stages=stages)
            for waves in (2, 3, 4):
                yield TailConfig(**tiling, aim=waves * PROCESSORS)
        return
    for tiling in MANY:
        names = ("queries", "tokens", "warps", "stages", "registers")
        yield TailConfig(**dict(zip(names, tiling, strict=True)), aim=2 * PROCESSORS)
    yield replace(shipped, aim=PROCESSORS)
    yield replace(shipped, aim=4 * PROCESSORS)


def launch_of(case: Case, config: TailConfig) -> Plan:
    """The plan of one candidate."""
    return Plan.of(call_of(case), CARD, config)


def _options(plan: Plan) -> dict[str, Any]:
    options = dict(num_warps=plan.config.warps, num_stages=plan.config.stages)
    return options | limits(plan.constants)


def compile_one(job: tuple[Case, TailConfig]) -> str:
    """Compile a candidate into Triton's cache; why not, if it does not."""
    import torch

    from paged_decode.kernels.triton.tail import tail_kernel

    made = launch_of(*job)
    wide, whole, real = torch.bfloat16, torch.int32, torch.float32
    kinds = [wide, wide, wide, whole, whole, whole, whole, wide, whole, whole, whole, whole]
    kinds += [wide, real, real, real]
    kernel: Any = tail_kernel
    try:
        kernel.warmup(*kinds, grid=(1,), **made.constants, **_options(made))
    except Exception as error:
        return repr(error)[:200]
    return ""


def bind(case: Case, config: TailConfig, arrays: tuple[Any, ...]) -> Any:
    """A call of a candidate that returns its output; its counters are left for a look."""
    import torch

    from paged_decode.kernels.triton.tail import tail_kernel

    made = launch_of(case, config)
    outs = [
        torch.full(size, float("nan"), dtype=getattr(torch, dtype), device="cuda")
        for size, dtype in made.outputs
    ]
    counters = torch.zeros(made.counters, dtype=torch.int32, device="cuda")
    q, k, v, layer, table, lens = arrays
    kernel: Any = tail_kernel

    def call() -> Any:
        args = (q, k, v, layer, table, lens, lens, q, counters, lens, lens, lens, *outs)
        kernel[(made.grid,)](*args, **made.constants, **_options(made))
        return outs[0]

    call.counters = counters  # pyright: ignore[reportFunctionMemberAccess]
    return call


def make_arrays(case: Case) -> tuple[Any, ...]:
    """q, pages, layer, table and lengths on the card."""
    import numpy as np
    import torch

    tokens, rows, length, dim = case
    columns = length // 16
    generator = torch.Generator(device="cuda").manual_seed(0)

    def normal(*size: int) -> Any:
        empty = torch.empty(size, dtype=torch.bfloat16, device="cuda")
        return empty.normal_(generator=generator)

    ids = np.random.default_rng(0).permutation(np.arange(1, rows * columns + 1))
    table = torch.from_numpy(ids.astype(np.int32).reshape(rows, columns)).cuda()
    lens = torch.full((rows,), length, dtype=torch.int32, device="cuda")
    pool = (rows * columns + 1, 8, 16, dim)
    layer = torch.zeros((), dtype=torch.int32, device="cuda")
    return normal(rows, tokens, 32, dim), normal(*pool), normal(*pool), layer, table, lens


def measure(timer: Any, case: Case, failed: dict[Any, str]) -> Iterator[dict[str, Any]]:
    """A record of every candidate of a case."""
    import torch

    arrays, calls, want = make_arrays(case), {}, None
    names = ("tokens", "rows", "length", "dim")
    for config in dict.fromkeys(candidates(case)):
        record: dict[str, Any] = dict(case=dict(zip(names, case, strict=True)))
        record["system"] = "paged-decode/triton"
        record["config"] = asdict(config)
        if reason := failed.get((case, config)):
            yield record | dict(error=reason)
            continue
        call = bind(case, config, arrays)
        try:
            out = call().float()
        except Exception as error:  # more shared memory than there is
            yield record | dict(error=repr(error)[:200])
            continue
        torch.cuda.synchronize()
        want = out if want is None else want
        wrong = float((out - want).norm() / want.norm())
        if not wrong < 1e-2 or bool(call.counters.any()):
            yield record | dict(error=f"off by {wrong:.1e}, counters {int(call.counters.sum())}")
            continue
        calls[config] = (record, call)
    times = timer.time({str(config): call for config, (_, call) in calls.items()})
    for config, (record, _) in calls.items():
        yield record | spread(times[str(config)])


def main() -> None:
    """Compile on all cores, time one by one, store."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--name", default="tune_tails")
    parser.add_argument("--dim", type=int, help="only the cases of this head dim")
    args = parser.parse_args()
    cases = [case for case in CASES if args.dim in (None, case[3])]
    jobs = [(case, config) for case in cases for config in dict.fromkeys(candidates(case))]
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        failed = dict(zip(jobs, pool.map(compile_one, jobs), strict=True))
    import torch
    from _gpu_timing import Timer

    records, timer = [], Timer()
    for case in cases:
        found = list(measure(timer, case, failed))
        records += found
        timed = sorted((r for r in found if "median_s" in r), key=lambda r: r["median_s"])
        shipped = found[0].get("median_s", float("nan"))
        print(f"{case}: shipped {shipped * 1e6:.1f} us", flush=True)
        for record in timed[:4]:
            print(f"  {record['median_s'] * 1e6:9.1f} us {record['config']}", flush=True)
    write_result(
        args.name,
        records,
        command="python benchmarks/tune_tails.py" + (f" --dim {args.dim}" if args.dim else ""),
        device=torch.cuda.get_device_name(),
        packages=["triton", "torch"],
    )


if __name__ == "__main__":
    sys.exit(main())
