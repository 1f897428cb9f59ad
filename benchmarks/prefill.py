"""Prompts into the cache through the Engine, beside a loop in torch with the same chunks.

    python benchmarks/prefill.py [--name prefill]
    python benchmarks/prefill.py --small      # tiny shapes on a CPU

The example model with Llama-3.1-8B's shapes and random bfloat16 weights. Seconds are those from the
first `submit` until every prompt has delivered its one token; no two prompts begin alike. The peer
is `_torch_prefill.py`: cuBLAS and FlashInfer, in a process of its own.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
from _engine_runs import Watch, make_engine, prompts, submit
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
    found = []
    for repeat in range(REPEATS + 1):
        texts, watch = prompts(shapes, [length] * count, seed=repeat), Watch(engine)
        start = time.perf_counter()
        for text in texts:
            submit(engine, text, 1)
        watch.until(lambda: engine.idle)
        found.append(time.perf_counter() - start)
        if sum(visit.read for visit in watch.visits) != count:
            raise RuntimeError("a prompt delivered no token")
    return dict(spread(found[1:]))


def main() -> None:
    """Run the cases and store them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--name", default="prefill", help="of the result file")
    args = parser.parse_args()
    cases = SMALL if args.small else CASES
    peers = {} if args.small else {case: measure_torch_prefill(*case) for case in cases}
    shapes, records = llama_shapes(small=args.small), []
    for sizes in cases:
        case = dict(zip(("prompts", "length", "rows", "chunk"), sizes, strict=True)) | shapes.name
        systems = {"paged-decode": ours(shapes, *sizes)}
        gc.collect()
        if peer := peers.get(sizes):
            if "seconds" in peer:
                peer |= spread(peer.pop("seconds"))
            systems["torch+flashinfer"] = peer
        for name, record in systems.items():
            if "median_s" in record:
                record["tokens_per_s"] = sizes[0] * sizes[1] / record["median_s"]
            told = record.get("error") or f"{record['tokens_per_s']:,.0f} tokens/s"
            print(f"{sizes[0]:3} prompts of {sizes[1]:6}: {name:18} {told}", flush=True)
            records.append(dict(case=case, system=name, **record))
    device = jax.devices()[0].device_kind if jax.default_backend() == "gpu" else None
    write_result(args.name, records, command=" ".join(["python", *sys.argv]), device=device)


if __name__ == "__main__":
    main()
