"""A whole decode step of 32 layers on one GPU: append, attention and a small update per layer.

python benchmarks/decode_step.py

16 rows, 8 KV heads, group 4, D = 128, pages of 16, 1024 tokens a row, bfloat16. The floor is the
time to read K and V once at the rate at which the card reads 4 GiB. Wall time of 20 calls, or of
one call that loops 20 times on the device, between two waits; the best and the median of 10.
"""

import os
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"

import jax
import jax.numpy as jnp
import numpy as np
from _result import spread, write_result
from jax import lax

from paged_decode.kernels import append_and_attend, append_kv, paged_attention

LAYERS, ROWS, KV_HEADS, GROUP, DIM, PAGE, CONTEXT = 32, 16, 8, 4, 128, 16, 1024
STEPS = 20
COLUMNS = CONTEXT // PAGE
PAGES = ROWS * COLUMNS + 1
KV_BYTES = LAYERS * ROWS * CONTEXT * KV_HEADS * DIM * 2 * 2


def one_layer(q: Any, k_pages: Any, v_pages: Any, table: Any, lens: Any, fused: bool, layer: Any):
    """Append, attend, and an update in place of the rest of a model."""
    k = v = q.reshape(ROWS, KV_HEADS, GROUP, DIM)[:, :, 0]
    if fused:
        out, k_pages, v_pages = append_and_attend(
            k_pages, v_pages, q, k, v, table, lens, layer=layer
        )
    else:
        at = lens - 1
        slots = table[jnp.arange(ROWS), at // PAGE] * PAGE + at % PAGE
        k_pages, v_pages = append_kv(k_pages, v_pages, k, v, slots, layer=layer)
        out = paged_attention(q, k_pages, v_pages, table, lens, layer=layer)
    return (q + out * jnp.bfloat16(0.5)).astype(q.dtype), k_pages, v_pages


def step_tuple(q: Any, k: Any, v: Any, table: Any, lens: Any, fused: bool) -> tuple[Any, Any, Any]:
    """One array for each layer, layers unrolled."""
    k, v = list(k), list(v)
    for i in range(LAYERS):
        q, k[i], v[i] = one_layer(q, k[i], v[i], table, lens, fused, None)
    return q, tuple(k), tuple(v)


def step_unrolled(q: Any, k: Any, v: Any, table: Any, lens: Any, fused: bool) -> tuple:
    """One stacked array, layers unrolled."""
    for i in range(LAYERS):
        q, k, v = one_layer(q, k, v, table, lens, fused, i)
    return q, k, v


def step_scan(q: Any, k: Any, v: Any, table: Any, lens: Any, fused: bool) -> tuple[Any, Any, Any]:
    """One stacked array, carried through a scan over layers."""

    def body(carry: tuple[Any, Any, Any], layer: Any) -> tuple[tuple[Any, Any, Any], None]:
        q, k, v = carry
        return one_layer(q, k, v, table, lens, fused, layer), None

    return lax.scan(body, (q, k, v), jnp.arange(LAYERS))[0]


def measure(step: Callable, stacked: bool, fused: bool, loop: bool) -> dict[str, Any]:
    """Seconds per step, and what the compiled program says of its memory."""
    keys = jax.random.split(jax.random.key(0), 3)
    shape = (PAGES, KV_HEADS, PAGE, DIM)

    def pool(key: Any) -> Any:
        if stacked:
            return jax.random.normal(key, (LAYERS, *shape), jnp.bfloat16)
        layers = jax.random.split(key, LAYERS)
        return tuple(jax.random.normal(layer, shape, jnp.bfloat16) for layer in layers)

    ids = np.random.default_rng(0).permutation(np.arange(1, PAGES)).astype(np.int32)
    table = jnp.asarray(ids.reshape(ROWS, COLUMNS))
    lens = jnp.full(ROWS, CONTEXT, jnp.int32)
    q = jax.random.normal(keys[0], (ROWS, KV_HEADS * GROUP, DIM), jnp.bfloat16)
    k, v = pool(keys[1]), pool(keys[2])

    def steps(q: Any, k: Any, v: Any, table: Any, lens: Any) -> Any:
        if not loop:
            return step(q, k, v, table, lens, fused)
        return lax.fori_loop(0, STEPS, lambda _, c: step(*c, table, lens, fused), (q, k, v))

    compiled = jax.jit(steps, donate_argnums=(0, 1, 2)).lower(q, k, v, table, lens).compile()
    memory: Any = compiled.memory_analysis()
    times = []
    for _ in range(11):
        jax.block_until_ready((q, k, v))
        start = time.perf_counter()
        for _ in range(1 if loop else STEPS):
            q, k, v = compiled(q, k, v, table, lens)
        jax.block_until_ready((q, k, v))
        times.append((time.perf_counter() - start) / STEPS)
    return spread(times[1:]) | dict(
        temp_bytes=memory.temp_size_in_bytes, alias_bytes=memory.alias_size_in_bytes
    )


def read_rate() -> float:
    """Bytes a second at which the card reads 4 GiB."""
    import torch
    from _gpu_timing import Timer

    timer = Timer()
    x = torch.randint(0, 1000, (2**30,), dtype=torch.int32, device="cuda")
    rate = 2**32 / float(np.median(timer.time_reads(x)))
    del x, timer
    torch.cuda.empty_cache()
    return rate


def main() -> None:
    """Measure every layout, fused and not, stepped by the host and looped on the device."""
    rate = read_rate()
    floor_s = KV_BYTES / rate
    records = []
    for name, step, stacked in (
        ("tuple, unrolled", step_tuple, False),
        ("stacked, unrolled", step_unrolled, True),
        ("stacked, scan", step_scan, True),
    ):
        for fused in (True, False):
            for loop in (False, True):
                case = dict(layout=name, append="fused" if fused else "scatter", device_loop=loop)
                try:
                    found = measure(step, stacked, fused, loop)
                    found |= dict(bytes=KV_BYTES, floor_s=floor_s)
                    print(case, f"{found['median_s'] * 1e6:.0f} us",
                          f"{found['median_s'] / floor_s:.2f}x floor", found["temp_bytes"],
                          flush=True)  # fmt: skip
                except Exception as error:
                    found = dict(error=repr(error)[:300])
                    print(case, found, flush=True)
                records.append(dict(case=case, system="paged-decode/triton", **found))
    write_result(
        "decode_step",
        records,
        command=" ".join(["python", *sys.argv]),
        device=jax.devices()[0].device_kind,
        packages=("jax", "jaxlib", "torch", "triton", "jax-triton"),
    )


if __name__ == "__main__":
    main()
