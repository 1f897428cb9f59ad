"""The allocator's hot call over two groups of layers beside one.

    python benchmarks/groups.py [--rows 256] [--steps 3000]

`advance(handles, tokens, commit=True)` of many rows, with the prefix cache: of one full group, and
of one full group with a window of 512 tokens beside. Both take turns step by step, so that a slow
moment is slow for both. Rows begin with 1,000 tokens, so that the window passes pages.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Sequence

import numpy as np
from _result import write_result

from paged_decode.allocator import BlockAllocator, CacheLayout, PageSpec

PAGE_SIZE, WINDOW, BEGIN = 16, 512, 1000


def layouts(rows: int, tokens: int) -> list[CacheLayout]:
    """One group, and two."""
    pages = rows * -(-tokens // PAGE_SIZE) + 1
    full = PageSpec((0,), num_kv_heads=1, head_dim=256, num_pages=pages)
    window = PageSpec((1,), num_kv_heads=1, head_dim=256, num_pages=pages, window=WINDOW)
    return [CacheLayout(PAGE_SIZE, (full,)), CacheLayout(PAGE_SIZE, (full, window))]


def started(layout: CacheLayout, rows: int) -> tuple[BlockAllocator, Sequence[int]]:
    """Rows whose first tokens are computed."""
    allocator, rng = BlockAllocator(layout), np.random.default_rng(0)
    handles = [allocator.allocate(rng.integers(0, 30_000, BEGIN)) for _ in range(rows)]
    allocator.commit(handles, [BEGIN] * rows)
    return allocator, handles


def measure(rows: int, steps: int) -> list[list[float]]:
    """Seconds of every step, for one group and for two."""
    systems = [started(layout, rows) for layout in layouts(rows, BEGIN + steps + 1)]
    times: list[list[float]] = [[] for _ in systems]
    rng = np.random.default_rng(1)
    gc.disable()
    for _ in range(steps):
        tokens = rng.integers(0, 30_000, rows)
        for (allocator, handles), taken in zip(systems, times, strict=True):
            start = time.perf_counter()
            allocator.advance(handles, tokens, commit=True)
            taken.append(time.perf_counter() - start)
    gc.enable()
    for allocator, _ in systems:
        allocator.check_invariants()
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--steps", type=int, default=3000)
    args = parser.parse_args()
    records = []
    for groups, times in enumerate(measure(args.rows, args.steps), 1):
        case = dict(rows=args.rows, groups=groups, page_size=PAGE_SIZE, steps=args.steps)
        times.sort()
        records.append(
            dict(
                case=case | dict(call="advance(commit=True)"),
                system="paged-decode",
                median_s=statistics.median(times),
                mean_s=statistics.fmean(times),
                min_s=times[0],
                max_s=times[-1],
            )
        )
    one, two = records
    for name in ("median_s", "mean_s"):
        ratio = two[name] / one[name]
        print(f"{name}: {one[name] * 1e6:.0f} us, {two[name] * 1e6:.0f} us: {ratio:.2f}x")
    command = f"python benchmarks/groups.py --rows {args.rows} --steps {args.steps}"
    print(write_result("groups", records, command=command, packages=("numpy", "paged-decode")))


if __name__ == "__main__":
    main()
