"""Attention of samples that share prompts, T = 1, with the prompts read once and by every row.

    python benchmarks/shared_prefix.py            # one GPU, about a minute
    python benchmarks/shared_prefix.py --tilings --name shared_prefix_tilings    # of the parts
    python benchmarks/shared_prefix.py --small    # CPU: that it runs, and what it does there

64 rows are P prompts of G samples; each row has a tail to itself. `alone` is `paged_attention`,
`shared` the same with the plan of `shared_prefix_plan`, and `plan` the finding of it, once for all
layers and steps of a program; `batch_invariant` is `alone` with splits that follow from each row.
In the last case nobody shares anything: what the plan costs then.
`bytes` are those of keys and values that each system has to read. On a GPU times are device times
with a cold L2 (`_gpu_timing.py`); results are compared with those of `alone` first.

The peer is FlashInfer's cascade (MultiLevelCascadeAttentionWrapper, two levels), which is told on
the host who shares what, if flashinfer-python is installed; its `plan` is in no time. It builds
its kernels at the first call.

`--tilings` times `shared` in some cases with other tilings of Triton's kernel (tokens of a tile,
warps, stages) for the calls of more than 32 heads a KV head, which parts are.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np
from _host_timing import host_clock
from _result import spread, write_result

from paged_decode import paged_attention
from paged_decode.kernels import shared_prefix_plan

HEADS, KV_HEADS, DIM, PAGE = 32, 8, 128, 16
TOLERANCE = 1.5e-2  # relative difference in bfloat16 of two ways to round
# Prompts, samples of each, tokens of a prompt, tokens of a tail.
CASES = [
    (prompts, 64 // prompts, prefix, 256) for prefix in (1024, 4096, 16384) for prompts in (1, 4, 8)
]
CASES += [(1, 64, 8192, 512), (64, 1, 4096, 256)]
TILED = [(1, 64, 8192, 512), (4, 16, 4096, 256), (8, 8, 1024, 256)]
TILINGS = [(64, 4, 2), (64, 4, 3), (64, 8, 2), (64, 8, 3), (128, 4, 2), (128, 8, 2), (32, 4, 3)]
SMALL = [(1, 8, 512, 64), (2, 4, 512, 64), (8, 1, 512, 64)]

Call = Callable[[], Any]


class Arrays:
    """One case: page ids permuted, random values."""

    def __init__(self, prompts: int, samples: int, prefix: int, tail: int, dtype: Any):
        self.prompts, self.samples = prompts, samples
        self.shared, self.own = prefix // PAGE, tail // PAGE
        self.rows, self.length = prompts * samples, prefix + tail
        count = prompts * self.shared + self.rows * self.own
        ids = 1 + np.random.default_rng(0).permutation(count).astype(np.int32)
        split = prompts * self.shared
        self.prefixes = ids[:split].reshape(prompts, self.shared)
        self.tails = ids[split:].reshape(self.rows, self.own)
        self.table = np.concatenate([self.prefixes.repeat(samples, axis=0), self.tails], axis=1)
        keys = jax.random.split(jax.random.key(0), 3)
        pool = (count + 1, KV_HEADS, PAGE, DIM)
        self.k, self.v = (jax.random.normal(key, pool, dtype) for key in keys[:2])
        self.q = jax.random.normal(keys[2], (self.rows, HEADS, DIM), dtype)
        self.lens = np.full(self.rows, self.length, np.int32)
        self.token_bytes = 2 * KV_HEADS * DIM * self.k.dtype.itemsize

    def systems(self) -> dict[str, tuple[Call, int]]:
        """Ours, by name: a call, and the bytes that it has to read."""
        table, lens = jnp.asarray(self.table), jnp.asarray(self.lens)
        find = jax.jit(lambda t, n: shared_prefix_plan(t, n, page_size=PAGE)).lower(table, lens)
        find = find.compile()
        plan = find(table, lens)
        read = int(plan.seq_lens.sum()) + self.rows * self.length - int(plan.starts.sum())
        args = self.q, self.k, self.v, table, lens
        alone = jax.jit(lambda *a: paged_attention(*a)).lower(*args).compile()
        shared = jax.jit(lambda p, *a: paged_attention(*a, shared=p)).lower(plan, *args).compile()
        apart = jax.jit(lambda *a: paged_attention(*a, batch_invariant=True)).lower(*args).compile()
        wait = jax.block_until_ready
        return {
            "paged-decode/alone": (
                lambda: wait(alone(*args)), self.rows * self.length * self.token_bytes,
            ),
            "paged-decode/shared": (lambda: wait(shared(plan, *args)), read * self.token_bytes),
            "paged-decode/batch_invariant": (
                lambda: wait(apart(*args)), self.rows * self.length * self.token_bytes,
            ),
            "paged-decode/plan": (lambda: wait(find(table, lens)), self.table.nbytes),
        }  # fmt: skip

    def tiled(self, tokens: int, warps: int, stages: int) -> tuple[Call, int]:
        """`shared` with this tiling of its parts."""
        from paged_decode.kernels.triton import plan as launches

        shipped = launches.choose_config

        def choose(call: Any, card: Any) -> Any:
            config = shipped(call, card)
            wide = call.one_token and call.group > 32
            own = dict(tokens=tokens, warps=warps, stages=stages)
            return replace(config, **own) if wide else config

        jax.clear_caches()  # what is traced has its tiling already
        with mock.patch.object(launches, "choose_config", choose):
            return self.systems()["paged-decode/shared"]

    def cascade(self) -> tuple[Call, int]:
        """FlashInfer's: level 0 are the prompts, level 1 the tails."""
        import flashinfer  # pyright: ignore
        import torch  # pyright: ignore

        def card(x: Any) -> Any:
            return torch.from_numpy(np.ascontiguousarray(x, np.int32)).cuda()

        def ends(n: int, step: int) -> Any:
            return card(np.arange(n + 1) * step)

        work = torch.zeros(2**28, dtype=torch.uint8, device="cuda")
        wrapper = flashinfer.MultiLevelCascadeAttentionWrapper(2, work, "HND")
        rows, prompts = self.rows, self.prompts
        wrapper.plan(
            [ends(prompts, self.samples), ends(rows, 1)],
            [ends(prompts, self.shared), ends(rows, self.own)],
            [card(self.prefixes.reshape(-1)), card(self.tails.reshape(-1))],
            [card(np.full(prompts, PAGE)), card(np.full(rows, PAGE))],
            HEADS, KV_HEADS, DIM, PAGE,
            q_data_type=torch.bfloat16,
        )  # fmt: skip
        q, k, v = (torch.utils.dlpack.from_dlpack(x) for x in (self.q, self.k, self.v))
        pages = torch.stack([k, v], dim=1)  # [N, 2, Hk, S, D]
        tokens = PAGE * (self.prefixes.size + self.tails.size)
        return lambda: wrapper.run(q, pages), tokens * self.token_bytes


def measure(
    arrays: Arrays, case: dict[str, Any], clock: Any, *, peers: bool, tilings: bool
) -> Iterator[dict]:
    """A record for every system."""
    systems: dict[str, Any] = arrays.systems()
    for tiling in TILINGS if tilings else ():
        name = "paged-decode/shared " + "x".join(map(str, tiling))
        try:
            systems[name] = arrays.tiled(*tiling)
        except Exception as error:  # one that the card has no room for
            yield dict(case=case, system=name, error=repr(error)[:300])
    if peers:
        try:
            systems["flashinfer/cascade"] = arrays.cascade()
        except Exception as error:  # one that is not here, or does not serve the case
            yield dict(case=case, system="flashinfer/cascade", error=repr(error)[:300])
    want = np.asarray(systems["paged-decode/alone"][0](), np.float32)
    calls: dict[str, Call] = {}
    for name, (call, _) in systems.items():
        got = call()
        if not name.endswith("plan"):
            got = got if isinstance(got, jax.Array) else got.float().cpu().numpy()
            wrong = np.linalg.norm(np.asarray(got, np.float32) - want) / np.linalg.norm(want)
            if not wrong < TOLERANCE:
                yield dict(case=case, system=name, error=f"differs by {wrong:.1e}")
                continue
        calls[name] = call
    for name, seconds in clock(calls).items():
        yield dict(case=case, system=name, bytes=systems[name][1], **spread(seconds))


def main() -> None:
    """Run the cases and store them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="few rows, on any device")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--tilings", action="store_true", help="other tilings, no peers")
    parser.add_argument("--name", default="shared_prefix", help="of the result file")
    args = parser.parse_args()
    device, clock = jax.devices()[0], host_clock
    on_gpu = device.platform == "gpu"
    if on_gpu:
        from _gpu_timing import Timer

        clock = Timer().time
    elif not args.small:
        parser.error("this is for a GPU; elsewhere give --small")
    records = []
    peers = on_gpu and not (args.no_peers or args.tilings)
    cases = SMALL if args.small else TILED if args.tilings else CASES
    for prompts, samples, prefix, tail in cases:
        dtype = jnp.bfloat16 if on_gpu else jnp.float32
        case = dict(prompts=prompts, samples=samples, prefix=prefix, tail=tail)
        case |= dict(heads=HEADS, kv_heads=KV_HEADS, dim=DIM, page_size=PAGE, dtype=dtype.__name__)
        arrays = Arrays(prompts, samples, prefix, tail, dtype)
        for record in measure(arrays, case, clock, peers=peers, tilings=args.tilings):
            records.append(record)
            told = record.get("error") or f"{record['median_s'] * 1e6:9.1f} us"
            print(f"{prompts:2} x {samples:2} {prefix:6}+{tail} {record['system']:20} {told}",
                  flush=True)  # fmt: skip
    command = " ".join(["python", *sys.argv])
    packages = ["jax", "jaxlib", "triton", "torch", "flashinfer-python"]
    kind = device.device_kind if on_gpu else None
    write_result(args.name, records, command=command, device=kind, packages=packages)


if __name__ == "__main__":
    main()
