"""Products of rows with one of several matrices each, beside what they must cost.

    python benchmarks/grouped_matmul.py              # one GPU, about a minute
    python benchmarks/grouped_matmul.py --tilings --name grouped_matmul_tilings
    python benchmarks/grouped_matmul.py --small      # CPU: that it runs

The matrices are those of the experts of Qwen3-30B-A3B and gpt-oss-20b in bfloat16, `up` and `down`;
M tokens ask for 8 of 128, or 4 of 32, all as likely. The floor is the larger of two: the matrices
that are asked for, the rows and the results at the rate at which the card reads 4 GiB, and the
products at that of one large bfloat16 product. The peer is `jax.lax.ragged_dot` over rows that are
sorted and copied already. On a GPU times are device times with a cold L2 (`_gpu_timing.py`), and
every result is compared with a float32 product of some rows.

`--tilings` times other tilings of `up`: rows, columns and depth of a tile, warps, stages.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np
from _host_timing import host_clock
from _result import spread, write_result

from paged_decode import group_rows, grouped_matmul

Record = dict[str, Any]
TOKENS = (1, 16, 64, 256, 2048)
CHECKED = 8  # rows of every result
TOLERANCE = 2e-2


@dataclass(frozen=True)
class Experts:
    """K of G matrices `[width, columns]` for each token; `each` results of a row of x."""

    name: str
    matrices: int
    chosen: int
    width: int
    columns: int
    each: int


EXPERTS = (
    Experts("qwen3-30b-a3b up", 128, 8, 2048, 1536, 8),
    Experts("qwen3-30b-a3b down", 128, 8, 768, 2048, 1),
    Experts("gpt-oss-20b up", 32, 4, 2880, 5760, 4),
    Experts("gpt-oss-20b down", 32, 4, 2880, 2880, 1),
)
SMALL = (Experts("small", 8, 2, 48, 32, 2),)
COLUMNS = ((64, 4), (128, 4), (256, 8), (128, 8))  # and warps, of a tile


def tilings(rows: int) -> Iterator[Any]:
    """Those that a tile of so many rows may have."""
    from paged_decode.kernels.triton.grouped_matmul import Tiling

    for size in sorted({rows, min(2 * rows, 128)}):
        for columns, warps in COLUMNS:
            for stages in (3, 4) if columns < 256 else (3,):
                yield Tiling(rows=size, columns=columns, depth=64, warps=warps, stages=stages)


def systems(
    experts: Experts, tokens: int, dtype: Any, *, tilings_too: bool
) -> tuple[dict[str, tuple[Any, tuple[Any, ...]]], np.ndarray, tuple[Any, ...]]:
    """Lowered programs and their arrays by name, the matrix of each product, and the arrays."""
    rng = np.random.default_rng(tokens)
    chosen = np.stack([rng.permutation(experts.matrices) for _ in range(tokens)])
    chosen = chosen[:, : experts.chosen].reshape(-1).astype(np.int32)
    keys = jax.random.split(jax.random.key(0))
    x = jax.random.normal(keys[0], (len(chosen) // experts.each, experts.width), dtype)
    size = (experts.matrices, experts.width, experts.columns)
    matrices = jax.random.normal(keys[1], size, dtype) * jnp.asarray(0.02, dtype)
    rows = jax.jit(group_rows, static_argnums=1)(chosen, experts.matrices)
    args = x, matrices, rows
    found: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "paged-decode": (jax.jit(grouped_matmul).lower(*args), args)
    }
    if tilings_too:
        from paged_decode.kernels.grouped_matmul import rows_of_tile
        from paged_decode.kernels.triton.grouped_matmul import multiply

        for tiling in tilings(rows_of_tile(len(chosen), experts.matrices)):
            kind = f"{tiling.rows}x{tiling.columns}x{tiling.depth} {tiling.warps}x{tiling.stages}"
            own = x, matrices, rows.order, rows.ends
            call = jax.jit(lambda *a, tiling=tiling: multiply(*a, tiling=tiling))
            found[f"paged-decode {kind}"] = call.lower(*own), own
    else:
        taken = x[rows.order // experts.each]
        sizes = jnp.diff(rows.ends, prepend=0)
        own = taken, matrices, sizes
        found["jax.lax.ragged_dot"] = jax.jit(jax.lax.ragged_dot).lower(*own), own
    return found, chosen, args


def measure(
    experts: Experts, tokens: int, dtype: Any, clock: Any, rates: tuple[float, float], tiled: bool
) -> Iterator[Record]:
    """A record of every system."""
    found, chosen, (x, matrices, rows) = systems(experts, tokens, dtype, tilings_too=tiled)
    case = dict(experts=experts.name, tokens=tokens, products=len(chosen))
    with ThreadPoolExecutor(8) as pool:
        made = {name: pool.submit(each[0].compile) for name, each in found.items()}
    step = -(-len(chosen) // CHECKED)
    wide = x[np.arange(0, len(chosen), step) // experts.each].astype(jnp.float32)
    want = jnp.einsum("rk,rkn->rn", wide, matrices[chosen[::step]].astype(jnp.float32))
    calls: dict[str, Callable[[], Any]] = {}
    for name, (_, args) in found.items():
        try:
            program = made[name].result()
            got = program(*args)
            if name.endswith("ragged_dot"):
                got = jnp.zeros_like(got).at[rows.order].set(got)
            wrong = float(jnp.linalg.norm(got[::step] - want) / jnp.linalg.norm(want))
            if not wrong < TOLERANCE:
                raise RuntimeError(f"differs by {wrong:.1e}")
        except Exception as error:  # a tiling for which there is no room
            yield dict(case=case, system=name, error=repr(error)[:300])
            continue
        calls[name] = lambda program=program, args=args: jax.block_until_ready(program(*args))
    touched = len(np.unique(chosen)) * experts.width * experts.columns
    numbers = touched + x.size + len(chosen) * experts.columns
    flops = 2 * len(chosen) * experts.width * experts.columns
    floor = max(numbers * x.dtype.itemsize / rates[0], flops / rates[1])
    for name, seconds in clock(calls).items():
        yield dict(case=case, system=name, floor_s=floor, **spread(seconds))


def product_rate(clock: Any) -> float:
    """FLOPs a second of a large bfloat16 product."""
    x = jnp.ones((8192, 8192), jnp.bfloat16)
    product = jax.jit(jnp.matmul)
    seconds = clock({"product": lambda: jax.block_until_ready(product(x, x))})["product"]
    return 2 * 8192**3 / min(seconds)


def main() -> None:
    """Measure the cases and store them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="few rows, on any device")
    parser.add_argument("--tilings", action="store_true", help="other tilings, no peer")
    parser.add_argument("--name", default="grouped_matmul", help="of the result file")
    args = parser.parse_args()
    on_gpu, clock, rates = jax.default_backend() == "gpu", host_clock, (1e10, 1e10)
    if on_gpu:
        from _gpu_timing import Timer

        timer = Timer(6)  # before jax-triton is imported
        clock = timer.time
        from decode_step import read_rate

        rates = read_rate(), product_rate(clock)
    elif not args.small:
        parser.error("this is for a GPU; elsewhere give --small")
    dtype = jnp.bfloat16 if on_gpu else jnp.float32
    records: list[Record] = []
    for experts in SMALL if args.small else EXPERTS[:: 1 + args.tilings]:
        for tokens in (1, 40) if args.small else TOKENS:
            for record in measure(experts, tokens, dtype, clock, rates, args.tilings):
                records.append(record)
                told = record.get("error")
                if "median_s" in record:
                    took, floor = record["median_s"], record["floor_s"]
                    told = f"{took * 1e6:9.1f} us {took / floor:6.2f}x"
                print(f"{experts.name:20} {tokens:5} {record['system']:36} {told}", flush=True)
    command = " ".join(["python", *sys.argv])
    kind = jax.devices()[0].device_kind if on_gpu else None
    packages = ["jax", "jaxlib", "triton", "jax-triton"]
    write_result(args.name, records, command=command, device=kind, packages=packages)


if __name__ == "__main__":
    main()
