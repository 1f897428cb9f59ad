"""The host tier: how fast pages leave a device and come back, and does decoding go on meanwhile?

    python benchmarks/tier.py      # on a GPU: results/tier_gpu.json; elsewhere tier_cpu.json, small

- `link`: one array of 256 MiB to page-locked memory and back: the ceiling; and `np.asarray` of it.
- `copy out`, `copy in`: a chunk of pages through `DeviceMover`, for every bucket. `returned_s` is
  how long `take` holds the host up.
- `bits`: pages of every dtype go to the host, are overwritten in place at once, and come back.
- `overlap`: a visit of an engine (8 tokens for each of 8 rows), a copy of 128 pages, and both
  together, in turns. `hidden` is the part of the copy that costs no time. `all at once` sends the
  same arrays without waiting: the loop on the device then asks the host behind all of them.
- `pressure`: the same requests with ample memory, and with a third of it by swap and by recompute,
  in float32: equal tokens, or the command fails.

`compilations` counts programs compiled after the warm-up.
"""

from __future__ import annotations

import argparse
import functools
import os
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
from _result import spread, write_result

from paged_decode import BlockAllocator, Engine, EngineConfig, KVCache, SamplingParams
from paged_decode._devices import pinned_sharding
from paged_decode.policies import Recompute
from paged_decode.tiers import DeviceMover, HostTier
from paged_decode.tiers._device import _gather

ON_CPU = jax.default_backend() == "cpu"
PAGE, MAX_LEN, VOCAB = 16, 4096, 4096
# layers, width, heads, KV heads, head dim
LARGE = (2, 64, 4, 2, 16) if ON_CPU else (16, 2048, 16, 8, 128)
SMALL = (2, 64, 4, 2, 16) if ON_CPU else (4, 512, 8, 4, 64)
COMPILED: list[str] = []


def count_compilations() -> None:
    def note(event: str, duration_secs: float, **_: Any) -> None:
        if event.endswith("backend_compile_duration"):
            COMPILED.append(event)

    jax.monitoring.register_event_duration_secs_listener(note)


# ---- a model of some size


def make_params(sizes: tuple[int, ...], dtype: Any) -> dict[str, Any]:
    layers, width, heads, kv_heads, dim = sizes
    shapes = {"q": (width, heads * dim), "k": (width, kv_heads * dim), "v": (width, kv_heads * dim)}
    shapes |= {"o": (heads * dim, width), "up": (width, 4 * width), "down": (4 * width, width)}
    keys = iter(jax.random.split(jax.random.key(0), 3 + layers * len(shapes)))

    def normal(*shape: int) -> jax.Array:
        return (jax.random.normal(next(keys), shape) * shape[0] ** -0.5).astype(dtype)

    return {
        "embed": normal(VOCAB, width) * VOCAB**0.5,
        "place": normal(MAX_LEN, width) * MAX_LEN**0.5,
        "head": normal(width, VOCAB),
        "layers": [{name: normal(*shape) for name, shape in shapes.items()} for _ in range(layers)],
    }


@functools.cache
def model_of(sizes: tuple[int, ...]) -> Callable[..., tuple[jax.Array, KVCache]]:
    _, _, heads, kv_heads, dim = sizes

    def unit(x: jax.Array) -> jax.Array:
        return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)

    def model(params: Any, cache: KVCache, tokens: Any, batch: Any) -> tuple[jax.Array, KVCache]:
        x = params["embed"][tokens] + params["place"][batch.positions]
        for at, p in enumerate(params["layers"]):
            y = unit(x)
            q, k, v = (
                (y @ p[name]).reshape(*tokens.shape, n, dim)
                for name, n in (("q", heads), ("k", kv_heads), ("v", kv_heads))
            )
            out, cache = cache.append_and_attend(at, q, k, v, batch)
            x = x + out.reshape(*tokens.shape, heads * dim) @ p["o"]
            x = x + jax.nn.gelu(unit(x) @ p["up"]) @ p["down"]
        return unit(x)[:, -1] @ params["head"], cache

    return model


def make_cache(sizes: tuple[int, ...], num_pages: int, dtype: Any) -> KVCache:
    layers, _, _, kv_heads, dim = sizes
    return KVCache.create(
        num_layers=layers,
        num_pages=num_pages,
        num_kv_heads=kv_heads,
        page_size=PAGE,
        head_dim=dim,
        dtype=dtype,
    )


# ---- copies alone


def timed(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(work())
    return time.perf_counter() - start


def entry(what: str, system: str, nbytes: int, seconds: list[float], **more: Any) -> dict[str, Any]:
    case = {"what": what} | more.pop("case", {})
    rate = nbytes / sorted(seconds)[len(seconds) // 2] / 1e9
    return {"case": case, "system": system, **spread(seconds), "bytes": nbytes} | {
        "gb_per_s": round(rate, 2),
        **more,
    }


def link(rounds: int) -> list[dict[str, Any]]:
    x = jax.block_until_ready(jnp.ones(((1 << 14) if ON_CPU else 1 << 26), jnp.float32))
    pinned = pinned_sharding(x) or x.sharding.with_memory_kind("pinned_host")
    there = jax.block_until_ready(jax.device_put(x, pinned))
    ways = {
        "out": lambda: jax.device_put(x, pinned),
        "in": lambda: jax.device_put(there, x.sharding),
        "np.asarray": lambda: np.asarray(jax.block_until_ready(x + 1)),
    }
    return [
        entry(f"link, {way}", "ceiling", x.nbytes, [timed(work) for _ in range(rounds)])
        for way, work in ways.items()
    ]


def copies(rounds: int) -> list[dict[str, Any]]:
    """Every bucket out and in, pages in random order."""
    cache = make_cache(LARGE, 257, jnp.bfloat16)
    rng = np.random.default_rng(0)
    records = []
    for memory in ("pinned_host", "numpy"):
        mover, tier = DeviceMover(memory), HostTier(1024)
        tier.mover = mover
        cache = jax.block_until_ready(tier.warmup(cache))
        before = len(COMPILED)
        for count in tier.buckets:
            back, out, into = [], [], []
            for _ in range(rounds):
                ids = rng.permutation(np.arange(1, 257))[:count].astype(np.int32)
                start = time.perf_counter()
                copy = mover.take(cache, ids)
                back.append(time.perf_counter() - start)
                rested = mover.finish(copy)
                out.append(time.perf_counter() - start)
                start = time.perf_counter()
                cache = jax.block_until_ready(mover.put(cache, rested, ids))
                into.append(time.perf_counter() - start)
            case = {"pages": count, "memory": memory}
            nbytes = count * cache.page_bytes
            returned = sorted(back)[rounds // 2]
            new = len(COMPILED) - before
            ours = "paged-decode"
            records += [
                entry("copy out", ours, nbytes, out, case=case, returned_s=returned),
                entry("copy in", ours, nbytes, into, case=case, compilations=new),
            ]
    return records


def bits(_: int) -> list[dict[str, Any]]:
    """Random bits of every dtype, NaNs among them, overwritten while their copy is in flight."""
    rng = np.random.default_rng(0)
    wipe = jax.jit(lambda pool: jax.tree.map(jnp.zeros_like, pool), donate_argnums=0)
    names = ("float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int8")
    records = []
    for name in names:
        shapes = [((8, PAGE, 128), name)] * 8
        shapes += [((8, PAGE), "float32")] * 8 if name == "int8" else []  # its scales
        pool = []
        for shape, dtype in shapes:
            kind = jnp.dtype(dtype)
            raw = rng.integers(0, 256, (65, *shape, kind.itemsize), np.uint8)
            pool.append(jnp.asarray(raw.view(kind)[..., 0]))
        want = [np.asarray(a).view(np.uint8) for a in pool]
        allocator, tier = BlockAllocator(65, PAGE), HostTier(64)
        handle = allocator.allocate(np.arange(64 * PAGE))
        allocator.commit(handle, 64 * PAGE)
        pages = list(allocator.sequence(handle).pages)
        tier.store(pool, allocator, handle)
        pool = wipe(pool)
        allocator.free(handle)
        allocator.reset_prefix_cache(same_weights=True)
        tier.settle()
        handle = allocator.allocate(np.arange(64 * PAGE))
        pool = tier.load(pool, allocator, handle)
        moved = list(allocator.sequence(handle).pages)
        same = all(
            np.array_equal(np.asarray(a).view(np.uint8)[moved], w[pages])
            for a, w in zip(pool, want, strict=True)
        )
        if not same or tier.stats.loaded != 64:
            raise SystemExit(f"{name}: pages came back changed, {tier.stats}")
        label = f"{name} with scales" if name == "int8" else name
        case = {"what": "bits", "dtype": label, "pages": 64}
        records.append({"case": case, "system": "paged-decode", "bits_equal": same})
    return records


# ---- copies beside decoding


class AllAtOnce(DeviceMover):
    """The same arrays, handed over in one go."""

    def take(self, cache: Any, pages: np.ndarray) -> Any:
        out = _gather(jax.tree.leaves(cache), pages, axis=0)
        return jax.device_put(out, [a.sharding.with_memory_kind("pinned_host") for a in out])

    def finish(self, copy: Any) -> Any:
        return jax.block_until_ready(copy)


def overlap(rounds: int) -> list[dict[str, Any]]:
    rows, parked_pages = (4, 8) if ON_CPU else (8, 128)
    new = 8 * (3 * rounds + 8)
    pages = rows * (1 + (512 + new) // PAGE) + parked_pages + 2 * rows
    engine = make_engine(LARGE, jnp.bfloat16, pages, rows, HostTier(1024), 512 + new)
    for seed in range(rows):
        prompt = np.random.default_rng(seed).integers(0, VOCAB, 512).tolist()
        engine.submit(prompt, SamplingParams(max_new_tokens=new))
    parked = engine.allocator.allocate(np.arange(parked_pages * PAGE) % VOCAB)
    engine.allocator.commit([parked], parked_pages * PAGE)
    while any(not s.decoding for s in engine.scheduler.running) or engine.num_waiting:
        engine.step()
    tier, movers = engine.tier, {"paged-decode": DeviceMover(), "all at once": AllAtOnce()}
    assert tier is not None
    for mover in movers.values():  # compiled, and the memory is there
        tier.mover = mover
        swap_out(engine, parked)
        engine.step()
    before = len(COMPILED)
    times: dict[str, list[float]] = {}

    def note(name: str, work: Callable[[], Any]) -> None:
        times.setdefault(name, []).append(timed(work))

    def together() -> None:
        store(engine, parked)
        engine.step()
        settle()

    def alone() -> None:
        store(engine, parked)
        settle()

    # A visit begins by waiting for the copies of the one before it; this one begins in its midst,
    # as where a sample gives way.
    settle = tier.settle
    tier.settle = lambda: None
    for _ in range(rounds):
        note("visit", engine.step)
        for name, mover in movers.items():
            tier.mover = mover
            tier.clear()
            note(f"copy, {name}", alone)
            tier.clear()
            note(f"both, {name}", together)
    nbytes = parked_pages * engine.cache.page_bytes
    records = []
    for name in movers:
        a, b, c = (
            sorted(times[k])[rounds // 2] for k in ("visit", f"copy, {name}", f"both, {name}")
        )
        case = {"what": "overlap", "rows": rows, "steps": 8, "pages": parked_pages}
        records.append(
            {"case": case, "system": name, "bytes": nbytes, "visit_s": a, "copy_s": b, "both_s": c}
            | {"hidden": round((a + b - c) / b, 3), "compilations": len(COMPILED) - before}
        )
    return records


def store(engine: Engine, handle: Any) -> None:
    assert engine.tier is not None and isinstance(engine.allocator, BlockAllocator)
    engine.tier.store(engine.cache, engine.allocator, handle)


def swap_out(engine: Engine, handle: Any) -> None:
    assert engine.tier is not None
    store(engine, handle)
    engine.tier.settle()
    engine.tier.clear()


# ---- an engine under pressure


def make_engine(
    sizes: tuple[int, ...],
    dtype: Any,
    num_pages: int,
    rows: int,
    tier: Any,
    longest: int,
    **policies: Any,
) -> Engine:
    config = EngineConfig(
        max_rows=rows,
        row_buckets=(rows,),
        prefill_chunk=128,
        prefill_rows=4,
        decode_steps=8,
        max_sequence_tokens=longest,
    )
    cache, allocator = make_cache(sizes, num_pages, dtype), BlockAllocator(num_pages, PAGE)
    params, model = make_params(sizes, dtype), model_of(sizes)
    engine = Engine(model, params, cache, allocator, config, tier=tier, **policies)
    engine.warmup()
    return engine


def pressure(_: int) -> list[dict[str, Any]]:
    count, rows, new = (6, 4, 32) if ON_CPU else (24, 8, 256)
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, VOCAB, rng.integers(64, 192)).tolist() for _ in range(count)]
    ample = rows * -(-(192 + new) // PAGE) + 1
    records, expected = [], None
    for name, pages, tier, more in (
        ("ample", ample, None, {}),
        ("swap", ample // 3, HostTier(4 * ample), {}),
        ("recompute", ample // 3, None, {"preemption": Recompute()}),
    ):
        with jax.default_matmul_precision("highest"):
            engine = make_engine(SMALL, jnp.float32, ample, rows, tier, 192 + new, **more)
            engine.allocator.allocate_pages(ample - pages)  # the same programs, fewer pages
            before, start = len(COMPILED), time.perf_counter()
            done = engine.generate(prompts, SamplingParams(max_new_tokens=new))
        seconds = time.perf_counter() - start
        tokens = [c.tokens for c in done]
        expected = expected or tokens
        distinct = len({t for row in tokens for t in row})
        if tokens != expected:
            raise SystemExit(f"{name}: other tokens than with ample memory")
        stats = engine.stats
        records.append(
            {"case": {"what": "pressure", "pages": pages, "requests": count}, "system": name}
            | {"seconds": seconds, "tokens": stats.decode_tokens, "tokens_equal": True}
            | {"distinct_tokens": distinct, "compilations": len(COMPILED) - before}
            | {"preemptions": stats.preemptions, "swaps": stats.swaps}
            | {"swapped_in_pages": stats.swapped_in_pages}
            | {"recomputed_tokens": stats.recomputed_tokens}
        )
    return records


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=21)
    args = parser.parse_args()
    count_compilations()
    records = []
    for part in (link, copies, bits, overlap, pressure):
        found = part(args.rounds)
        records += found
        for record in found:
            print({k: v for k, v in record.items() if k not in ("min_s", "max_s")}, flush=True)
    write_result(
        "tier_cpu" if ON_CPU else "tier_gpu",
        records,
        command=f"python benchmarks/tier.py --rounds {args.rounds}",
        device=None if ON_CPU else jax.devices()[0].device_kind,
    )


if __name__ == "__main__":
    main()
