"""Prefill in chunks in torch, as servers built on it run it: the peer of `prefill.py`.

    python benchmarks/_torch_prefill.py --prompts 64 --length 512 --rows 4 --chunk 512 [--json]

Llama-3.1-8B's shapes with random bfloat16 weights. The products are cuBLAS's; norms, rotary
embedding, SiLU, the append and paged prefill attention are FlashInfer's kernels (the faster of its
FA2 and FA3). A launch has one chunk of some prompts; the host plans and launches the next one while
the device works, and waits after the last. The newest token of a prompt has its logits computed.

It needs torch, flashinfer-python and a CUDA device, and runs in a process of its own, so that its
memory is its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from importlib import metadata
from typing import Any

import numpy as np
from _torch_loop import EPS, PAGE, THETA, Sizes, Weights, run_alone

__all__ = ["measure_torch_prefill", "torch_prefill"]

BACKENDS = ("fa3", "fa2")


class Prefill:
    """The cache, the tables and the attention wrapper of prompts of one length."""

    def __init__(self, weights: Weights, prompts: int, length: int, backend: str):
        import flashinfer  # pyright: ignore
        import torch

        self.weights, self.prompts, self.length = weights, prompts, length
        s, device = weights.sizes, weights.device
        columns = -(-length // PAGE)
        ids = np.random.default_rng(0).permutation(np.arange(1, 1 + prompts * columns))
        self.table = ids.astype(np.int32).reshape(prompts, columns)
        # As different as those of the Engine: equal rows would take less power, and less time.
        texts = np.random.default_rng(1).integers(0, s.vocab, (prompts, length))
        self.tokens = torch.from_numpy(texts).to(device)
        shape = (1 + prompts * columns, 2, s.kv_heads, PAGE, s.dim)
        self.cache = [
            torch.zeros(shape, dtype=torch.bfloat16, device=device) for _ in range(s.layers)
        ]
        work = torch.zeros(3 * 2**27, dtype=torch.uint8, device=device)
        self.wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(work, "HND", backend=backend)

    def launch(self, rows: range, begin: int, end: int) -> Any:
        """Plan and launch tokens `begin .. end - 1` of some prompts; logits of the last ones."""
        import torch

        s, count, tokens = self.weights.sizes, len(rows), end - begin
        pages = -(-end // PAGE)
        ends = np.arange(count + 1, dtype=np.int32)
        ids = self.table[rows.start : rows.stop, :pages].reshape(-1)
        last = np.full(count, (end - 1) % PAGE + 1, np.int32)
        row, position = np.divmod(np.arange(count * tokens, dtype=np.int32), np.int32(tokens))
        arrays = (ends * pages, ids, last, row, position + begin)
        where = [torch.from_numpy(a).pin_memory().cuda(non_blocking=True) for a in arrays]
        self.wrapper.plan(
            torch.from_numpy(ends * tokens),
            torch.from_numpy(arrays[0]),
            where[1],
            torch.from_numpy(last),
            s.heads,
            s.kv_heads,
            s.dim,
            PAGE,
            causal=True,
            q_data_type=torch.bfloat16,
            kv_data_type=torch.bfloat16,
        )
        return self._forward(self.tokens[rows.start : rows.stop, begin:end].reshape(-1), where)

    def _forward(self, tokens: Any, where: list[Any]) -> Any:
        from flashinfer.activation import silu_and_mul  # pyright: ignore
        from flashinfer.norm import fused_add_rmsnorm, rmsnorm  # pyright: ignore

        w = self.weights
        residual = w.embed[tokens]
        x = rmsnorm(residual, w.layers[0]["attention_norm"], EPS)
        for index, layer in enumerate(w.layers):
            if index:
                fused_add_rmsnorm(x, residual, layer["attention_norm"], EPS)
            x = self._attention(layer, self.cache[index], x, where)
            fused_add_rmsnorm(x, residual, layer["inner_norm"], EPS)
            x = silu_and_mul(x @ layer["gate_up"].t()) @ layer["down"].t()
        fused_add_rmsnorm(x, residual, w.norm, EPS)
        rows = len(where[2])
        return x.view(rows, -1, x.shape[-1])[:, -1] @ w.head.t()

    def _attention(self, layer: dict[str, Any], cache: Any, x: Any, where: list[Any]) -> Any:
        import flashinfer  # pyright: ignore

        s, (ends, ids, last, row, position) = self.weights.sizes, where
        queries, keys = s.heads * s.dim, s.kv_heads * s.dim
        q, k, v = (x @ layer["qkv"].t()).split([queries, keys, keys], -1)
        q = q.view(-1, s.heads, s.dim)
        k, v = (each.view(-1, s.kv_heads, s.dim) for each in (k, v))
        flashinfer.rope.apply_rope_pos_ids_inplace(q, k, position, rope_theta=THETA)
        flashinfer.page.append_paged_kv_cache(
            k, v, row, position, cache, ids, ends, last, kv_layout="HND"
        )
        return self.wrapper.run(q, cache).reshape(-1, queries) @ layer["out"].t()

    def run(self, rows: int, chunk: int) -> float:
        """Seconds until every prompt is in the cache."""
        import torch

        torch.cuda.synchronize()
        start = time.perf_counter()
        for first in range(0, self.prompts, rows):
            for begin in range(0, self.length, chunk):
                end = min(begin + chunk, self.length)
                self.launch(range(first, min(first + rows, self.prompts)), begin, end)
        torch.cuda.synchronize()
        return time.perf_counter() - start


def build(dim: int) -> None:
    """Build FlashInfer's modules side by side; one by one, as they are needed, takes minutes."""
    import flashinfer.jit as jit  # pyright: ignore
    import torch
    from flashinfer.jit.norm import gen_norm_module  # pyright: ignore
    from flashinfer.jit.page import gen_page_module  # pyright: ignore
    from flashinfer.jit.rope import gen_rope_module  # pyright: ignore

    kinds = *(torch.bfloat16,) * 3, torch.int32, dim, dim, 0, False, False, False
    specs = [jit.gen_batch_prefill_module(backend, *kinds) for backend in BACKENDS]
    specs += [gen_norm_module(), gen_rope_module(), gen_page_module()]
    jit.build_jit_specs([*specs, jit.gen_act_and_mul_module("silu")])


def torch_prefill(
    prompts: int, length: int, rows: int, chunk: int, repeats: int = 3
) -> dict[str, Any]:
    """Seconds of every repeat, by the faster of FlashInfer's two prefill kernels."""
    import torch

    torch.set_grad_enabled(False)
    weights, times, failed = Weights(Sizes()), {}, {}
    build(weights.sizes.dim)
    for backend in BACKENDS:
        try:
            prefill = Prefill(weights, prompts, length, backend)
            prefill.run(rows, chunk)
            times[backend] = [prefill.run(rows, chunk) for _ in range(repeats)]
        except Exception as error:
            failed[backend] = repr(error)[:300]
        prefill = None  # its cache goes before the next one's comes
        torch.cuda.empty_cache()
    if not times:
        raise RuntimeError(str(failed))
    best = min(times, key=lambda backend: statistics.median(times[backend]))
    return {
        "seconds": times[best],
        "kernel": best,
        "kernel_medians_s": {name: statistics.median(each) for name, each in times.items()},
        "failed": failed,
        "versions": {name: metadata.version(name) for name in ("torch", "flashinfer-python")},
    }


def measure_torch_prefill(prompts: int, length: int, rows: int, chunk: int) -> dict[str, Any]:
    """`torch_prefill` in a process of its own; {"error": ...} where it cannot run."""
    return run_alone(__file__, prompts=prompts, length=length, rows=rows, chunk=chunk)


def main() -> None:
    """Time one case and print it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    for name in ("prompts", "length", "rows", "chunk"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--json", action="store_true", help="one line of JSON, the last printed")
    args = parser.parse_args()
    found = torch_prefill(args.prompts, args.length, args.rows, args.chunk)
    if args.json:
        print(json.dumps(found))
    else:
        tokens = args.prompts * args.length
        for name, seconds in found["kernel_medians_s"].items():
            print(f"{name}: {tokens / seconds:,.0f} tokens/s")


if __name__ == "__main__":
    main()
