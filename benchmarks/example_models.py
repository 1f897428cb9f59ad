"""The example models at full size on one GPU: steps and prefill beside what they must cost.

    python benchmarks/example_models.py [--models NAME ...] [--name example_models]
    python benchmarks/example_models.py --small      # tiny shapes on a CPU

NAME is llama-3.1-8b, qwen3-30b-a3b or gpt-oss-20b.

Random bfloat16 weights, through the configuration and the decoder of `examples/models`. A decode
step has B rows of 2048 tokens (128 rows: 1024), and takes the greedy token of each; prefill has one
chunk of some prompts. Seconds are wall time of steps in a row with one wait at the end. The floor
is the larger of two: weights that are touched and K and V that are seen, at the rate at which the
card reads 4 GiB; and the products, at the rate of one large bfloat16 product. Of experts, those are
touched that the tokens of the case do ask, `experts_of_a_layer` on average. One trace more says
which kernels took the time: attention, products, sums (norms, the greedy token) and all else. The
peers of the dense model are `_torch_loop.py` and `_torch_prefill.py`.
"""

from __future__ import annotations

import argparse
import gc
import os
import re
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from typing import Any
from unittest import mock

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")  # 61 GB are weights

import jax
import jax.numpy as jnp
import numpy as np
from _engine_runs import device_spans
from _llama_shapes import LARGE
from _result import spread, write_result
from _torch_loop import measure_torch_loop
from _torch_prefill import measure_torch_prefill
from models import decoder
from models.checkpoint import pieces
from models.config import ModelConfig, Rope

from paged_decode import BlockAllocator, DecodeBatch, KVCache, group_rows

Record = dict[str, Any]
PAGE, REPEATS, TRACED, SETTLE = 16, 5, 3, 2
LAYER = ("attention_norm", "inner_norm", "qkv", "out", "gate_up", "down")
BIASES = ("qkv_bias", "out_bias", "router_bias", "gate_up_bias", "down_bias")


@dataclass(frozen=True)
class Shape:
    """A model, what its layers have beside `LAYER`, and its peer, if it has one."""

    config: ModelConfig
    more: tuple[str, ...] = ()
    peer: bool = False


MODELS = {
    "llama-3.1-8b": Shape(LARGE, peer=True),
    "qwen3-30b-a3b": Shape(
        ModelConfig(
            vocab_size=151936,
            num_layers=48,
            width=2048,
            inner_width=768,
            num_heads=32,
            num_kv_heads=4,
            head_dim=128,
            max_positions=40960,
            rope=Rope(1e6),
            num_experts=128,
            experts_per_token=8,
        ),
        ("qk_norm", "router"),
    ),
    "gpt-oss-20b": Shape(
        ModelConfig(
            vocab_size=201088,
            num_layers=24,
            width=2880,
            inner_width=2880,
            num_heads=64,
            num_kv_heads=8,
            head_dim=64,
            max_positions=131072,
            rope=Rope(150000.0, "yarn", 32.0, 4096, magnitude=1.3466),
            sliding_window=128,
            full_layers=tuple(range(1, 24, 2)),
            gate="clamped",
            num_experts=32,
            experts_per_token=4,
        ),
        ("router", "sinks", *BIASES),
    ),
}


@dataclass(frozen=True)
class Case:
    """Rows of which each computes its newest `tokens`, and then has `context`."""

    rows: int
    tokens: int
    context: int

    @property
    def phase(self) -> str:
        return "decode" if self.tokens == 1 else "prefill"


CASES = (
    *(Case(rows, 1, 2048) for rows in (1, 16, 64)),
    Case(128, 1, 1024),
    Case(1, 2048, 2048),
    Case(4, 512, 512),
)
SMALL = (Case(1, 1, 24), Case(4, 1, 24), Case(1, 16, 16), Case(2, 8, 8))


def made_small(shape: Shape) -> Shape:
    config, experts = shape.config, min(shape.config.num_experts, 6)
    small = replace(
        config,
        vocab_size=512,
        num_layers=2,
        width=32,
        inner_width=16,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        num_experts=experts,
        experts_per_token=min(config.experts_per_token, 2),
        sliding_window=config.sliding_window and 8,
        full_layers=config.full_layers[:1],
    )
    return replace(shape, config=small)


def random_params(shape: Shape, dtype: Any) -> dict[str, Any]:
    """Normal numbers of deviation 0.02, drawn on the device one array at a time; norms are one."""
    config, key, drawn = shape.config, jax.random.key(0), 0
    draw = jax.jit(
        lambda key, shape, dtype: jax.random.normal(key, shape, dtype) * jnp.asarray(0.02, dtype),
        static_argnums=(1, 2),
    )

    def array(role: str) -> jax.Array:
        nonlocal drawn
        drawn += 1
        parts = pieces(config)[role]
        size = (*parts[0][:-1], sum(part[-1] for part in parts))
        if "norm" in role:
            return jnp.ones((2, config.head_dim) if role == "qk_norm" else size, jnp.float32)
        if role == "sinks":
            return jnp.zeros((*size, 1), jnp.float32)
        return draw(jax.random.fold_in(key, drawn), size, dtype)

    params: dict[str, Any] = {role: array(role) for role in ("embed", "head", "norm")}
    roles = (*LAYER, *shape.more)
    params["layers"] = [{role: array(role) for role in roles} for _ in range(config.num_layers)]
    return params


# ---- what it must cost


def least_bytes(
    config: ModelConfig, params: dict[str, Any], case: Case, experts: float = 0.0
) -> float:
    """Of weights, once, and of K and V that are read or written; of so many experts of a layer."""
    size, tokens = params["head"].dtype.itemsize, case.rows * case.tokens
    total = (params["head"].size + tokens * config.width) * size  # of the embedding, its tokens'
    part = experts / config.num_experts if config.num_experts else 1.0
    of_experts = ("gate_up", "down", "gate_up_bias", "down_bias")
    for number, layer in enumerate(params["layers"]):
        for role, array in layer.items():
            share = part if role in of_experts else 1.0
            total += array.size * array.dtype.itemsize * share
        seen = min(case.context, (config.window(number) or case.context) + case.tokens - 1)
        total += case.rows * seen * 2 * config.num_kv_heads * config.head_dim * size
    return total


def least_flops(config: ModelConfig, params: dict[str, Any], case: Case) -> float:
    """Of the products with weights, and of queries with keys and values."""
    tokens, share = case.rows * case.tokens, config.experts_per_token / max(config.num_experts, 1)
    total = 2.0 * case.rows * params["head"].size
    for number, layer in enumerate(params["layers"]):
        for role in ("qkv", "out", "router", "gate_up", "down"):
            if role in layer:
                chosen = share if layer[role].ndim == 3 else 1.0
                total += 2.0 * tokens * layer[role].size * chosen
        positions = np.arange(case.context - case.tokens, case.context)
        seen = np.minimum(positions + 1, config.window(number) or case.context)
        total += 4.0 * case.rows * config.num_heads * config.head_dim * float(seen.sum())
    return total


def rates(small: bool) -> tuple[float, float]:
    """Bytes a second of a large read, and FLOPs a second of a large product."""
    side, loops = (256, 2) if small else (8192, 20)
    x = jnp.ones((side, side), jnp.float32 if small else jnp.bfloat16)
    product = jax.jit(lambda x: jax.lax.fori_loop(0, loops, lambda _, y: x @ y, x))
    flops = 2 * side**3 * loops / min(timed(product, x) for _ in range(4))
    if jax.default_backend() == "gpu":
        from decode_step import read_rate

        # In a process of its own: torch's profiler, once on, keeps jax's from the card.
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            return pool.submit(read_rate).result(), flops
    numbers = jnp.ones(2**22, jnp.float32)
    return numbers.nbytes / min(timed(jax.jit(jnp.sum), numbers) for _ in range(4)), flops


def timed(call: Any, *arrays: Any) -> float:
    jax.block_until_ready(call(*arrays))
    start = time.perf_counter()
    jax.block_until_ready(call(*arrays))
    return time.perf_counter() - start


# ---- what it costs


def batch_of(case: Case, layout: Any, vocabulary: int) -> DecodeBatch:
    """Rows of random tokens on pages in a random order."""
    rng, allocator = np.random.default_rng(case.rows), BlockAllocator(layout)
    texts = rng.integers(0, vocabulary, (case.rows, case.context)).tolist()
    handles = [allocator.allocate(text, chunk=case.context) for text in texts]
    begin = case.context - case.tokens
    if begin:
        allocator.prepare(handles, begin)
        allocator.commit(handles, begin)
    allocator.prepare(handles, case.context)
    order = rng.permutation(case.rows)
    handles = [handles[row] for row in order]
    batch = allocator.batch(handles, begin, case.context, tokens_per_row=case.tokens)
    return jax.device_put(batch)


def measure(step: Any, params: Any, cache: Any, batch: DecodeBatch, steps: int) -> tuple[Any, Any]:
    """Seconds of a step, and on a GPU what they went to; the cache goes in and comes out."""

    def run(count: int, cache: Any) -> tuple[float, Any]:
        start, ids = time.perf_counter(), None
        for _ in range(count):
            ids, cache = step(params, cache, batch.tokens, batch)
        jax.block_until_ready(ids)
        return (time.perf_counter() - start) / count, cache

    _, cache = run(SETTLE, cache)
    seconds = []
    for _ in range(REPEATS):
        took, cache = run(steps, cache)
        seconds.append(took)
    found: Record = dict(spread(seconds))
    if jax.default_backend() == "gpu":
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                _, cache = run(TRACED, cache)
            found |= parts_of(device_spans(folder), TRACED)
    return found, cache


KINDS = (
    ("attention_s", re.compile(r"paged_|decode_kernel|tail_kernel|widen_kernel")),
    (
        "products_s",
        re.compile(r"gemm|gemv|nvjet|cutlass|cublas|xmma|splitk|grouped", re.IGNORECASE),
    ),
    ("sums_s", re.compile(r"reduce|add_norm")),
)


def parts_of(spans: list[tuple[float, float, str]], steps: int) -> Record:
    """Seconds of a step by kind of kernel, those in which none ran, and the longest kernels."""
    kinds, kernels = dict.fromkeys((*(name for name, _ in KINDS), "rest_s"), 0.0), {}
    idle, end = 0.0, spans[0][0]
    for begin, after, name in spans:
        idle, end = idle + max(begin - end, 0.0), max(end, after)
        kind = next((kind for kind, known in KINDS if known.search(name)), "rest_s")
        kinds[kind] += (after - begin) * 1e-6 / steps
        count, took = kernels.get(name, (0, 0.0))
        kernels[name] = count + 1, took + (after - begin) * 1e-6 / steps
    longest = sorted(kernels.items(), key=lambda item: -item[1][1])[:16]
    return kinds | dict(
        device_s=(end - spans[0][0] - idle) * 1e-6 / steps,
        idle_s=idle * 1e-6 / steps,
        kernels=[dict(name=n, count=c / steps, seconds=s) for n, (c, s) in longest],
    )


def ours(shape: Shape, cases: tuple[Case, ...], small: bool) -> dict[Case, Record]:
    """Every case by one set of weights and one pool; their programs are compiled side by side."""
    config, dtype = shape.config, jnp.float32 if small else jnp.bfloat16
    params, start = random_params(shape, dtype), time.perf_counter()
    pages = 1 + max(case.rows * -(-case.context // PAGE) for case in cases)
    layout = decoder.layout(config, page_size=PAGE, num_pages=pages, dtype=dtype)
    cache = KVCache.create(layout=layout)
    model = decoder.make_model(config)

    def step(params: Any, cache: Any, tokens: Any, batch: DecodeBatch) -> tuple[Any, Any]:
        asked: list[jax.Array] = []

        def noted(*args: Any) -> Any:
            asked.append((rows := group_rows(*args)).ends)
            return rows

        with mock.patch.object(decoder, "group_rows", noted):
            logits, cache = model(params, cache, tokens, batch)
        return (logits.argmax(-1), asked), cache

    batches = {case: batch_of(case, layout, config.vocab_size) for case in cases}
    lowered = {
        case: jax.jit(step, donate_argnums=1).lower(params, cache, batch.tokens, batch)
        for case, batch in batches.items()
    }
    with ThreadPoolExecutor() as pool:
        compiled = pool.map(lambda each: each.compile(), lowered.values())
        programs = dict(zip(lowered, compiled, strict=True))
    print(f"    {len(programs)} programs in {time.perf_counter() - start:.0f} s", flush=True)
    found = {}
    for case, program in programs.items():
        steps = 2 if small else 20 if case.tokens == 1 else 5
        batch = batches[case]
        found[case], cache = measure(program, params, cache, batch, steps)
        (_, asked), cache = program(params, cache, batch.tokens, batch)
        experts = [np.count_nonzero(np.diff(ends, prepend=0)) for ends in map(np.asarray, asked)]
        each = float(np.mean(experts)) if experts else 0.0
        found[case] |= dict(
            experts_of_a_layer=each,
            bytes=least_bytes(config, params, case, each),
            flops=least_flops(config, params, case),
            temp_bytes=program.memory_analysis().temp_size_in_bytes,
        )
    return found


def torch_peer(case: Case) -> Record:
    if case.tokens == 1:
        return measure_torch_loop(case.rows, case.context, 64)
    prompts = 4 * case.rows
    found = measure_torch_prefill(prompts, case.context, case.rows, case.tokens)
    if "seconds" in found:  # of four launches
        found["seconds"] = [each / 4 for each in found["seconds"]]
        found.pop("kernel_medians_s")
    return found


def main(argv: list[str] | None = None) -> None:
    """Measure the models that are named, and store them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=[*MODELS], metavar="NAME")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--name", default="example_models", help="of the result file")
    args = parser.parse_args(argv)
    cases = SMALL if args.small else CASES
    peers = {}  # before anything of ours is on the card
    if not args.small and any(MODELS[name].peer for name in args.models):
        peers = {case: torch_peer(case) for case in cases}
    read, product = rates(args.small)
    print(f"{read / 1e9:.0f} GB/s, {product / 1e12:.1f} TFLOP/s", flush=True)
    records = [dict(case={}, system="ceiling", bytes_per_s=read, flops_per_s=product)]
    for name in args.models:
        shape = made_small(MODELS[name]) if args.small else MODELS[name]
        print(name, flush=True)
        for case, found in ours(shape, cases, args.small).items():
            what = dict(model=name, phase=case.phase, rows=case.rows, tokens=case.tokens)
            what |= dict(context=case.context)
            floor = max(found["bytes"] / read, found["flops"] / product)
            note(records, what, "paged-decode", found | dict(floor_s=floor))
            if shape.peer and case in peers:
                peer = dict(peers[case])
                peer |= spread(peer.pop("seconds")) if "seconds" in peer else {}
                note(records, what, "torch+flashinfer", peer | dict(floor_s=floor))
        gc.collect()
    device = jax.devices()[0].device_kind if jax.default_backend() == "gpu" else None
    packages = ("jax", "jaxlib", "torch", "triton", "jax-triton", "flashinfer-python")
    command = " ".join(["python", *sys.argv])
    print(write_result(args.name, records, command=command, device=device, packages=packages))


def note(records: list[Record], what: Record, system: str, found: Record) -> None:
    """Keep a record and print it."""
    title = f"  {what['phase']:8}{what['rows']:3} x {what['tokens']:<5}{system:18}"
    if "median_s" not in found:
        print(title, found["error"], flush=True)
    else:
        told = f"{found['median_s'] * 1e3:9.3f} ms {found['median_s'] / found['floor_s']:6.2f}x"
        kinds = (*(kind for kind, _ in KINDS), "rest_s", "idle_s")
        split = [f"{kind[:-2]} {found[kind] * 1e3:.3f}" for kind in kinds if kind in found]
        print(title, told, ", ".join(split), flush=True)
        for kernel in found.get("kernels", ())[:8]:
            each = kernel["seconds"] / kernel["count"]
            print(f"{kernel['count']:12.0f} x {each * 1e6:8.1f} us  {kernel['name'][:80]}")
    records.append(dict(case=what, system=system, **found))


if __name__ == "__main__":
    main()
