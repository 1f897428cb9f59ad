"""A decode loop in torch, as servers built on it run one: the peer of `engine.py`.

    python benchmarks/_torch_loop.py --rows 16 --context 1024 [--steps 128] [--json]

Llama-3.1-8B's shapes with random bfloat16 weights. The products are cuBLAS's; norms, rotary
embedding, SiLU, the append and paged decode attention are FlashInfer's kernels. One step is one
CUDA graph, greedy tokens stay on the device. The host plans a step and launches it before it reads
the tokens of the step before, which were copied to page-locked memory meanwhile. Prompts are in the
cache already (random K and V); lengths grow by one token a step and page tables with them. What a
server does besides (HTTP, detokenizing, admission, penalties) is left out.

It needs torch, flashinfer-python and a CUDA device, and runs in a process of its own, so that its
memory is its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import numpy as np

__all__ = ["Sizes", "Weights", "measure_torch_loop", "run_alone", "torch_loop"]

SETTLE = 8  # steps before the clock starts, in every repeat
PAGE = 16
THETA, EPS = 5e5, 1e-5


@dataclass(frozen=True)
class Sizes:
    """Those of Llama-3.1-8B."""

    layers: int = 32
    width: int = 4096
    inner: int = 14336
    heads: int = 32
    kv_heads: int = 8
    dim: int = 128
    vocab: int = 128256


class Weights:
    """Random weights `[out, in]`, normal of deviation 0.02."""

    def __init__(self, sizes: Sizes, device: str = "cuda"):
        import torch

        def normal(*shape: int) -> Any:
            return torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(0, 0.02)

        s = sizes
        ones = torch.ones(s.width, dtype=torch.bfloat16, device=device)
        queries, keys = s.heads * s.dim, s.kv_heads * s.dim
        self.sizes, self.device, self.norm = sizes, device, ones
        self.embed, self.head = normal(s.vocab, s.width), normal(s.vocab, s.width)
        self.layers = [
            {
                "attention_norm": ones,
                "inner_norm": ones,
                "qkv": normal(queries + 2 * keys, s.width),
                "out": normal(s.width, queries),
                "gate_up": normal(2 * s.inner, s.width),
                "down": normal(s.width, s.inner),
            }
            for _ in range(s.layers)
        ]


class Pages:
    """The host's books: a page table, and its rows as FlashInfer wants them.

    Rows have the same length. `table` has pages for all that they will grow to, and a row shows as
    many of them as its length needs.
    """

    def __init__(self, rows: int, longest: int):
        columns = -(-longest // PAGE)
        ids = np.random.default_rng(0).permutation(np.arange(1, 1 + rows * columns))
        self.table = ids.astype(np.int32).reshape(rows, columns)
        self.count = 1 + rows * columns

    def of(self, length: int) -> tuple[np.ndarray, np.ndarray, int]:
        """Offsets of the rows in the list of pages, that list, and tokens in the last page."""
        pages = -(-length // PAGE)
        ends = np.arange(len(self.table) + 1, dtype=np.int32) * pages
        return ends, self.table[:, :pages].reshape(-1), (length - 1) % PAGE + 1


class Loop:
    """The arrays, the attention wrapper and the graph of one batch."""

    def __init__(self, weights: Weights, rows: int, longest: int, tensor_cores: bool):
        import flashinfer  # pyright: ignore
        import torch

        self.weights, self.rows, self.pages = weights, rows, Pages(rows, longest)
        s, device = weights.sizes, weights.device
        shape = (self.pages.count, 2, s.kv_heads, PAGE, s.dim)
        self.cache = [
            torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(0, 0.3)
            for _ in range(s.layers)
        ]

        def ints(size: int, dtype: Any = torch.int32) -> Any:
            return torch.zeros(size, dtype=dtype, device=device)

        def pinned(size: int, dtype: Any = torch.int32) -> Any:
            return torch.zeros(size, dtype=dtype, pin_memory=True)

        self.tokens, self.positions = ints(rows, torch.long), ints(rows)
        self.row_ids = torch.arange(rows, dtype=torch.int32, device=device)
        listed = self.pages.table.size
        self.ends, self.ids, self.last = ints(rows + 1), ints(listed), ints(rows)
        self.host_ends, self.host_ids = pinned(rows + 1), pinned(listed)
        self.host_last = pinned(rows)
        self.read = [pinned(rows, torch.long) for _ in range(2)]
        self.done = [torch.cuda.Event() for _ in range(2)]
        self.planned, self.shown, self.graph = torch.cuda.Event(), 0, None
        self.wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            torch.zeros(2**28, dtype=torch.uint8, device=device),
            "HND",
            use_cuda_graph=True,
            use_tensor_cores=tensor_cores,
            paged_kv_indptr_buffer=self.ends,
            paged_kv_indices_buffer=self.ids,
            paged_kv_last_page_len_buffer=self.last,
        )

    def plan(self, length: int) -> None:
        """Show the device rows of that length. Every copy is asynchronous.

        Pages are sent again when there are more of them; the last page's length and FlashInfer's
        split of the work at every step. The page-locked memory of a step is written again only
        when the copies of the step before have left it.
        """
        import torch

        self.planned.synchronize()
        ends, ids, last = self.pages.of(length)
        self.host_last.fill_(last)
        self.last.copy_(self.host_last, non_blocking=True)
        if len(ids) != self.shown:
            self.host_ends.numpy()[:] = ends
            self.host_ids.numpy()[: len(ids)] = ids
            self.ends.copy_(self.host_ends, non_blocking=True)
            self.ids[: len(ids)].copy_(self.host_ids[: len(ids)], non_blocking=True)
            self.shown = len(ids)
        self._split(ids=self.ids[: len(ids)])
        self.planned.record(torch.cuda.current_stream())

    def _split(self, ids: Any) -> None:
        """FlashInfer's plan. After the first one it copies none of the tables again."""
        import torch
        from flashinfer.decode import fast_decode_plan  # pyright: ignore

        s = self.weights.sizes
        sizes = (s.heads, s.kv_heads, s.dim, PAGE)
        types = dict(q_data_type=torch.bfloat16, kv_data_type=torch.bfloat16)
        if self.graph is None:
            self.wrapper.plan(self.host_ends, ids, self.host_last, *sizes, **types)
        else:
            fast_decode_plan(
                self.wrapper,
                self.ends,
                ids,
                self.host_last,
                *sizes,
                **types,
                global_override_indptr_cpu=self.host_ends,
            )

    def forward(self) -> None:
        """One step, launched or captured: the tokens of all rows become the next ones."""
        from flashinfer.activation import silu_and_mul  # pyright: ignore
        from flashinfer.norm import fused_add_rmsnorm, rmsnorm  # pyright: ignore

        w = self.weights
        residual = w.embed[self.tokens]
        x = rmsnorm(residual, w.layers[0]["attention_norm"], EPS)
        for index, layer in enumerate(w.layers):
            if index:
                fused_add_rmsnorm(x, residual, layer["attention_norm"], EPS)
            x = self._attention(layer, self.cache[index], x)
            fused_add_rmsnorm(x, residual, layer["inner_norm"], EPS)
            x = silu_and_mul(x @ layer["gate_up"].t()) @ layer["down"].t()
        fused_add_rmsnorm(x, residual, w.norm, EPS)
        self.tokens.copy_((x @ w.head.t()).argmax(-1))
        self.positions.add_(1)

    def _attention(self, layer: dict[str, Any], cache: Any, x: Any) -> Any:
        import flashinfer  # pyright: ignore

        s = self.weights.sizes
        queries, keys = s.heads * s.dim, s.kv_heads * s.dim
        q, k, v = (x @ layer["qkv"].t()).split([queries, keys, keys], -1)
        q = q.view(self.rows, s.heads, s.dim)
        k, v = (each.view(self.rows, s.kv_heads, s.dim) for each in (k, v))
        flashinfer.rope.apply_rope_pos_ids_inplace(q, k, self.positions, rope_theta=THETA)
        flashinfer.page.append_paged_kv_cache(
            k,
            v,
            self.row_ids,
            self.positions,
            cache,
            self.ids,
            self.ends,
            self.last,
            kv_layout="HND",
        )
        out = self.wrapper.run(q, cache)
        return out.reshape(self.rows, queries) @ layer["out"].t()

    def start(self, context: int) -> None:
        """Rows hold `context` tokens of which the newest one is yet to be written."""
        import torch

        torch.cuda.synchronize()
        self.tokens.fill_(1)
        self.positions.fill_(context - 1)
        torch.cuda.synchronize()

    def capture(self, context: int) -> None:
        """Run twice to build and load every kernel, then record the graph."""
        import torch

        self.plan(context)
        self.start(context)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                self.positions.fill_(context - 1)
                self.forward()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.forward()
        self.graph, self.split = graph, _numbers(self.wrapper._plan_info)

    def run(self, context: int, steps: int) -> float:
        """Seconds per step, from the tokens of step `SETTLE` to those of the last one."""
        import torch

        out: list[list[int]] = [[] for _ in range(self.rows)]
        total, begin, end = SETTLE + steps, 0.0, 0.0
        graph: Any = self.graph
        self.start(context)
        for step in range(total + 1):
            if step < total:
                self.plan(context + step)
                graph.replay()
                self.read[step % 2].copy_(self.tokens, non_blocking=True)
                self.done[step % 2].record(torch.cuda.current_stream())
            if step:
                self._take(step - 1, out)
            if step == SETTLE:
                begin = time.perf_counter()
        end = time.perf_counter()
        if any(len(row) != total for row in out):
            raise RuntimeError("a row lost a token")
        if _numbers(self.wrapper._plan_info) != self.split:
            raise RuntimeError(
                "FlashInfer's plan no longer fits the graph: time more, shorter runs"
            )
        return (end - begin) / steps

    def _take(self, step: int, out: list[list[int]]) -> None:
        """Wait for a step's tokens and book them."""
        self.done[step % 2].synchronize()
        for row, token in zip(out, self.read[step % 2].tolist(), strict=True):
            row.append(token)


def _numbers(plan: Any) -> list[int]:
    return [int(each) for each in plan]


def torch_loop(rows: int, context: int, steps: int, repeats: int = 5) -> dict[str, Any]:
    """Seconds per step over repeats, by the faster of FlashInfer's two decode kernels.

    A kernel that cannot run is named in "failed"; if neither can, its error is raised.
    """
    import torch

    torch.set_grad_enabled(False)
    weights, times, failed = Weights(Sizes()), {}, {}
    for tensor_cores in (True, False):
        kernel = "tensor cores" if tensor_cores else "CUDA cores"
        try:
            loop = Loop(weights, rows, context + SETTLE + steps, tensor_cores)
            loop.capture(context)
            loop.run(context, steps)
            times[kernel] = [loop.run(context, steps) for _ in range(repeats)]
        except Exception as error:
            if failed:
                raise
            failed[kernel] = repr(error)[:300]
        loop = None  # its cache goes before the next one's comes
        torch.cuda.empty_cache()
    best = min(times, key=lambda kernel: statistics.median(times[kernel]))
    return {
        "seconds": times[best],
        "kernel": best,
        "kernel_medians_s": {name: statistics.median(each) for name, each in times.items()},
        "failed": failed,
        "device": torch.cuda.get_device_name(),
        "versions": {name: metadata.version(name) for name in ("torch", "flashinfer-python")},
    }


def measure_torch_loop(rows: int, context: int, steps: int) -> dict[str, Any]:
    """`torch_loop` in a process of its own; {"error": ...} where it cannot run."""
    return run_alone(__file__, rows=rows, context=context, steps=steps)


def run_alone(script: str, **sizes: int) -> dict[str, Any]:
    """What a script prints with `--json` in a process of its own; {"error": ...} if it fails."""
    command = [sys.executable, script, *(f"--{k}={v}" for k, v in sizes.items()), "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["it printed nothing"]
        return {"error": lines[-1][:300]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    """Time one case and print it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--context", type=int, required=True)
    parser.add_argument("--steps", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="one line of JSON, the last printed")
    args = parser.parse_args()
    found = torch_loop(args.rows, args.context, args.steps, args.repeats)
    if args.json:
        print(json.dumps(found))
    else:
        for name, seconds in found["kernel_medians_s"].items():
            print(f"{name}: {seconds * 1e3:.3f} ms a step")


if __name__ == "__main__":
    main()
