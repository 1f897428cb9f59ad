"""Attention of T > 1 new tokens over pages on one GPU: chunks of prompts, and checks of drafts.

python benchmarks/tails.py                 # every case, about 5 minutes on 16 cores
python benchmarks/tails.py --quick --name tails_quick
python benchmarks/tails.py --eight-bits --name tails_8bit    # pages of 8 bits beside ours of 16

Ours are both GPU kernels, called through JAX. The cases of `CHOICE` are for the choice of the
dispatch between them, and no peer runs them. The time is device time with a cold L2
(`_gpu_timing.py`); FlashInfer's `plan` on the host is not in it. Every result is compared with
float32 first. `paged-decode/T = 1` is one token of each row over the same pages: the least that
reading the keys and values takes us.

Peers are used if they are installed: flashinfer-python 0.5.3 (its FA2 and FA3 paths) and torch.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
import torch
from _gpu_timing import Timer
from _grid_systems import pool_of, wide
from _result import spread, write_result

from paged_decode import paged_attention

HEADS, KV_HEADS, DIM, PAGE = 32, 8, 128, 16
TOLERANCE = 1e-2  # relative error in bfloat16
# T, and the lengths of all rows.
CASES: list[tuple[int, list[int]]] = [
    (512, [512]),
    (2048, [2048]),
    (8192, [8192]),
    (2048, [16384]),
    (512, [32768]),
    (512, [4096] * 8),
    (512, [600, 33000, 900, 700]),
    (8, [4096] * 16),
    (4, [2048] * 64),
    (2, [4096] * 64),
]
QUICK = [CASES[1], CASES[7]]
CHOICE: list[tuple[int, list[int]]] = [
    (64, [512]),
    (64, [8192]),
    (64, [2048] * 16),
    (64, [600] * 15 + [33000]),
    (128, [8192]),
    (256, [8192]),
    (256, [2048] * 4),
    (256, [600, 600, 600, 33000]),
    (384, [8192]),
    (512, [512] * 4),
]

Call = Callable[[], Any]


class Arrays:
    """One case on the card: page ids permuted, random values."""

    def __init__(self, tokens: int, lens: list[int]):
        self.tokens, self.lens = tokens, lens
        need = [-(-length // PAGE) for length in lens]
        pages = int(sum(need) * 1.3) + 2
        generator = torch.Generator(device="cuda").manual_seed(0)

        def normal(*size: int) -> torch.Tensor:
            empty = torch.empty(size, dtype=torch.bfloat16, device="cuda")
            return empty.normal_(generator=generator)

        self.k, self.v = normal(pages, KV_HEADS, PAGE, DIM), normal(pages, KV_HEADS, PAGE, DIM)
        self.q = normal(len(lens), tokens, HEADS, DIM)
        ids = np.random.default_rng(0).permutation(np.arange(1, pages)).astype(np.int32)
        table = np.zeros((len(lens), max(need)), np.int32)
        self.ends = np.cumsum([0, *need]).astype(np.int32)
        self.ids = ids[: self.ends[-1]]
        for row, count in enumerate(need):
            table[row, :count] = ids[self.ends[row] : self.ends[row + 1]]
        self.table = torch.from_numpy(table).cuda()
        self.seq_lens = torch.tensor(lens, dtype=torch.int32, device="cuda")

    @property
    def flops(self) -> float:
        """Of the products, the causal half of the new tokens counted as half."""
        t = self.tokens
        seen = sum(t * (length - t) + t * (t + 1) / 2 for length in self.lens)
        return 4 * HEADS * DIM * seen

    @property
    def kv_bytes(self) -> int:
        return sum(self.lens) * KV_HEADS * DIM * 2 * 2

    def row(self, pages: torch.Tensor, row: int) -> torch.Tensor:
        """The tokens of a row, `[Hk, length, D]`."""
        used = self.table[row, : self.ends[row + 1] - self.ends[row]].long()
        return pages[used].transpose(0, 1).reshape(KV_HEADS, -1, DIM)[:, : self.lens[row]]

    def errors(self, out: torch.Tensor, pools: Sequence[torch.Tensor]) -> float:
        """Relative error of up to 64 queries of every row over these pages, in float32."""
        some = np.unique(np.linspace(0, self.tokens - 1, 64).astype(int))
        wrong = size = 0.0
        for row, length in enumerate(self.lens):
            q = self.q[row, some].float().reshape(len(some), KV_HEADS, -1, DIM)
            k, v = (self.row(pages, row).float() for pages in pools)
            logits = torch.einsum("thgd,hnd->hgtn", q, k) * DIM**-0.5
            seen = torch.arange(length, device="cuda")
            position = torch.from_numpy(some).cuda() + length - self.tokens
            logits.masked_fill_(seen > position[:, None], -float("inf"))
            want = torch.einsum("hgtn,hnd->thgd", logits.softmax(-1), v).reshape(len(some), -1)
            got = out[row, some].float().reshape(len(some), -1)
            wrong += float((got - want).square().sum())
            size += float(want.square().sum())
        return (wrong / size) ** 0.5


def ours(arrays: Arrays, implementation: str) -> Call:
    """A backend of ours as it is shipped, through JAX."""
    given = _on_card(arrays.q, arrays.k, arrays.v, arrays.table, arrays.seq_lens)
    attend = jax.jit(lambda *a: paged_attention(*a, implementation=[implementation]))
    compiled = attend.lower(*given).compile()
    return lambda: compiled(*given).block_until_ready()


def ours_in_8_bits(arrays: Arrays, dtype: str, implementation: str) -> Call:
    """The same over pages of 8 bits with scales."""
    pools = [pool_of(pages, dtype) for pages in (arrays.k, arrays.v)]
    numbers = [_on_card(each.view(torch.int8))[0] for each, _ in pools]
    k, v = (jax.lax.bitcast_convert_type(each, dtype) for each in numbers)
    q, table, lens, of_k, of_v = _on_card(
        arrays.q, arrays.table, arrays.seq_lens, *(scales for _, scales in pools)
    )

    @jax.jit
    def attend(q: Any, k: Any, v: Any, table: Any, lens: Any, of_k: Any, of_v: Any) -> Any:
        scales: Any = dict(k_scales=of_k, v_scales=of_v)
        return paged_attention(q, k, v, table, lens, **scales, implementation=[implementation])

    given = q, k, v, table, lens, of_k, of_v
    compiled = attend.lower(*given).compile()

    def call() -> Any:
        return compiled(*given).block_until_ready()

    call.pools = [wide(*each) for each in pools]  # pyright: ignore[reportFunctionMemberAccess]
    return call


def one_token(arrays: Arrays) -> Call:
    """One token of each row over the same pages."""
    q = arrays.q[:, -1].contiguous()
    given = _on_card(q, arrays.k, arrays.v, arrays.table, arrays.seq_lens)
    compiled = jax.jit(lambda *a: paged_attention(*a)).lower(*given).compile()
    return lambda: compiled(*given).block_until_ready()


def _on_card(*tensors: torch.Tensor) -> list[jax.Array]:
    return [jax.dlpack.from_dlpack(tensor) for tensor in tensors]


def flashinfer(arrays: Arrays, backend: str) -> Call:
    """FlashInfer's paged prefill."""
    import flashinfer  # pyright: ignore

    work = torch.zeros(3 * 2**27, dtype=torch.uint8, device="cuda")
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(work, "HND", backend=backend)
    rows, tokens = len(arrays.lens), arrays.tokens
    wrapper.plan(
        torch.arange(0, (rows + 1) * tokens, tokens, dtype=torch.int32, device="cuda"),
        torch.from_numpy(arrays.ends).cuda(),
        torch.from_numpy(arrays.ids).cuda(),
        ((arrays.seq_lens - 1) % PAGE + 1).to(torch.int32),
        HEADS,
        KV_HEADS,
        DIM,
        PAGE,
        causal=True,
        q_data_type=torch.bfloat16,
        kv_data_type=torch.bfloat16,
    )
    q = arrays.q.reshape(-1, HEADS, DIM)
    return lambda: wrapper.run(q, (arrays.k, arrays.v))


def torch_dense(arrays: Arrays) -> Call:
    """torch's attention over a dense copy: no paging at all; only where all tokens are new."""
    if arrays.lens != [arrays.tokens]:
        raise NotImplementedError("its causal mask begins at the first token")
    k, v = (arrays.row(pages, 0)[None] for pages in (arrays.k, arrays.v))
    q = arrays.q.transpose(1, 2)
    attend = torch.nn.functional.scaled_dot_product_attention
    return lambda: attend(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


OURS: dict[str, Callable[[Arrays], Call]] = {
    "paged-decode/triton": lambda a: ours(a, "triton"),
    "paged-decode/pallas_gpu": lambda a: ours(a, "pallas_gpu"),
}
EIGHT_BITS: dict[str, Callable[[Arrays], Call]] = {
    f"{backend}/{dtype}": lambda a, d=dtype, b=backend: ours_in_8_bits(a, d, b)
    for backend in ("triton", "pallas_gpu")
    for dtype in ("int8", "float8_e4m3fn")
}
PEERS: dict[str, Callable[[Arrays], Call]] = {
    "flashinfer/fa3": lambda a: flashinfer(a, "fa3"),
    "flashinfer/fa2": lambda a: flashinfer(a, "fa2"),
    "torch/dense": torch_dense,
}


def measure(
    timer: Timer, tokens: int, lens: list[int], systems: dict[str, Callable[[Arrays], Call]]
) -> Iterator[dict[str, Any]]:
    """A record for every system that serves the case."""
    arrays = Arrays(tokens, lens)
    short = [*lens[:2], "...", lens[-1]] if len(lens) > 4 else lens
    case = dict(tokens=tokens, rows=len(lens), lengths=str(short), heads=HEADS, kv_heads=KV_HEADS)
    case |= dict(longest=max(lens), columns=arrays.table.shape[1])
    calls: dict[str, Call] = {"paged-decode/T = 1": one_token(arrays)}
    errors: dict[str, float] = {}
    for name, make in systems.items():
        try:
            call = make(arrays)
            out = call()
        except Exception as error:  # a peer that does not serve the case, with its reason
            yield dict(case=case, system=name, error=repr(error)[:300])
            continue
        torch.cuda.synchronize()
        out = torch.utils.dlpack.from_dlpack(out) if isinstance(out, jax.Array) else out
        pools = getattr(call, "pools", (arrays.k, arrays.v))
        errors[name] = arrays.errors(out.reshape(arrays.q.shape), pools)
        if errors[name] > TOLERANCE:
            yield dict(case=case, system=name, error=f"wrong by {errors[name]:.1e}")
            continue
        calls[name] = call
    for name, seconds in timer.time(calls).items():
        record = dict(case=case, system=name, bytes=arrays.kv_bytes, **spread(seconds))
        if name in errors:
            record |= dict(flops=arrays.flops, relative_error=errors[name])
        yield record


def main() -> None:
    """Run the cases and store them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--eight-bits", action="store_true", help="pages of 8 bits, no peers")
    parser.add_argument("--name", default="tails", help="of the result file")
    args = parser.parse_args()
    os.environ.setdefault("FLASHINFER_CUDA_ARCH_LIST", "9.0a")
    records, timer = [], Timer()
    run = [] if args.quick or args.eight_bits else [(case, OURS) for case in CHOICE]
    beside = EIGHT_BITS if args.eight_bits else PEERS
    run += [(case, OURS | beside) for case in (QUICK if args.quick else CASES)]
    for (tokens, lens), systems in run:
        for record in measure(timer, tokens, lens, systems):
            records.append(record)
            told = record.get("error")
            if told is None:
                told = f"{record['median_s'] * 1e6:9.1f} us"
                if "flops" in record:
                    told += f" {record['flops'] / record['median_s'] / 1e12:6.0f} TFLOP/s"
            print(
                f"T={tokens:5} {record['case']['lengths']:<34} {record['system']:23} {told}",
                flush=True,
            )
    command = " ".join(["python", *sys.argv])
    packages = ["jax", "jaxlib", "triton", "torch"]
    if any(r["system"].startswith("flashinfer") and "error" not in r for r in records):
        packages.append("flashinfer-python")
    device = jax.devices()[0].device_kind
    write_result(args.name, records, command=command, device=device, packages=packages)


if __name__ == "__main__":
    main()
