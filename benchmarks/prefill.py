"""Prompts into the cache through the Engine, beside a loop in torch with the same chunks.

    python benchmarks/prefill.py [--name prefill] [--by-columns] [--first]
    python benchmarks/prefill.py --small      # tiny shapes on a CPU

`--by-columns` lays weights as checkpoints have them, `--first` runs the first case alone.

The example model with Llama-3.1-8B's shapes and random bfloat16 weights. Seconds are those from the
first `submit` until every prompt has delivered its one token; no two prompts begin alike. The peer
is `_torch_prefill.py`: cuBLAS and FlashInfer, in a process of its own. On a GPU one repeat more is
traced: what the kernels took, and how long none ran from the first to the last.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import tempfile
import time
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
from _engine_runs import Watch, device_spans, make_engine, prompts, submit
from _llama_shapes import LlamaShapes, llama_shapes
from _result import spread, write_result
from _torch_prefill import measure_torch_prefill

Record = dict[str, Any]
# prompts, their length, rows of a launch, tokens of a row in it
CASES = ((64, 512, 4, 512), (16, 2048, 1, 2048), (2, 32768, 1, 2048))
SMALL = ((4, 32, 2, 16), (1, 64, 1, 32))
REPEATS = 3


def ours(shapes: LlamaShapes, count: int, length: int, rows: int, chunk: int) -> Record:
    """Seconds of every repeat; one before them warms up."""
    engine = make_engine(
        shapes,
        tokens=count * (length + 16),
        longest=length + 16,
        max_rows=count,
        decode_steps=1,
        prefill_rows=rows,
        prefill_chunk=chunk,
        prefill_tokens=count * length,  # nobody decodes meanwhile
    )

    def seconds(seed: int) -> float:
        texts, watch = prompts(shapes, [length] * count, seed=seed), Watch(engine)
        start = time.perf_counter()
        for text in texts:
            submit(engine, text, 1)
        watch.until(lambda: engine.idle)
        end = time.perf_counter()
        if sum(visit.read for visit in watch.visits) != count:
            raise RuntimeError("a prompt delivered no token")
        return end - start

    found: Record = dict(spread([seconds(seed) for seed in range(REPEATS + 1)][1:]))
    if jax.default_backend() == "gpu":
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                found["traced_s"] = seconds(REPEATS + 1)
            found |= device_time(folder)
    return found


def device_time(folder: str) -> Record:
    """Of a trace: the kernels that took most, and how long none ran between the first and last."""
    kernels: dict[str, list[float]] = {}
    idle, end = 0.0, None
    for begin, after, name in device_spans(folder):
        idle += 0 if end is None else max(begin - end, 0)
        end = after if end is None else max(end, after)
        took = kernels.setdefault(name, [0, 0.0])
        took[0], took[1] = took[0] + 1, took[1] + (after - begin) * 1e-6
    most = sorted(kernels.items(), key=lambda item: -item[1][1])[:20]
    return dict(
        idle_s=idle * 1e-6, kernels=[dict(name=n, count=c, seconds=s) for n, (c, s) in most]
    )


def main() -> None:
    """Run the cases and store them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--small", action="store_true")
    parser.add_argument(
        "--by-columns", action="store_true", help="weights as checkpoints have them"
    )
    parser.add_argument("--first", action="store_true", help="the first case alone")
    parser.add_argument("--name", default="prefill", help="of the result file")
    args = parser.parse_args()
    cases = (SMALL if args.small else CASES)[: 1 if args.first else None]
    shapes, records = llama_shapes(small=args.small, by_columns=args.by_columns), []

    def note(sizes: tuple[int, int, int, int], name: str, record: Record) -> None:
        case = dict(zip(("prompts", "length", "rows", "chunk"), sizes, strict=True)) | shapes.name
        if "median_s" in record:
            record["tokens_per_s"] = sizes[0] * sizes[1] / record["median_s"]
        told = record.get("error") or f"{record['tokens_per_s']:,.0f} tokens/s"
        print(f"{sizes[0]:3} prompts of {sizes[1]:6}: {name:18} {told}", flush=True)
        for kernel in record.get("kernels", ()):
            each = kernel["seconds"] / kernel["count"]
            print(f"{kernel['count']:8} x {each * 1e6:8.1f} us  {kernel['name'][:80]}")
        if "idle_s" in record:
            print(f"    idle between kernels {record['idle_s'] * 1e3:.1f} ms")
        records.append(dict(case=case, system=name, **record))

    for sizes in cases:
        note(sizes, "paged-decode", ours(shapes, *sizes))
        gc.collect()
        if not args.small:
            peer = measure_torch_prefill(*sizes)
            if "seconds" in peer:
                peer |= spread(peer.pop("seconds"))
            note(sizes, "torch+flashinfer", peer)
    device = jax.devices()[0].device_kind if jax.default_backend() == "gpu" else None
    write_result(args.name, records, command=" ".join(["python", *sys.argv]), device=device)


if __name__ == "__main__":
    main()
