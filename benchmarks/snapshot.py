"""Snapshots against the machine's raw rate and against safetensors, same bytes, one run.

    python benchmarks/snapshot.py --mib 1024

Systems: `raw` writes the bytes from one buffer and syncs, or reads them into one; `safetensors`
saves the gathered pages and syncs, or loads them to JAX arrays; `paged-decode` saves a cache whose
pages lie in random order, or loads it into a pool. Rounds are interleaved. Reads are made twice:
with the file in the page cache, and after asking the kernel to drop it. `pause` is what
`save_snapshot_async` costs the loop, beside copying the pages out and nothing else.
"""

from __future__ import annotations

import argparse
import os
import resource
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.flax
import safetensors.numpy
from _result import spread, write_result

from paged_decode import (
    BlockAllocator,
    KVCache,
    load_snapshot,
    save_snapshot,
    save_snapshot_async,
)
from paged_decode.snapshot._crc import crc32

LAYERS, HEADS, PAGE, DIM = 8, 8, 16, 64
CHUNK = 1 << 22


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(work())
    return time.perf_counter() - start


def raw_write(path: Path, buffer: memoryview, total: int) -> None:
    file = os.open(path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
    for _ in range(0, total, len(buffer)):
        os.write(file, buffer)
    os.fsync(file)
    os.close(file)


def raw_read(path: Path, buffer: bytearray) -> None:
    file = os.open(path, os.O_RDONLY)
    while os.readv(file, [buffer]):
        pass
    os.close(file)


def drop(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(file)


def make(num_pages: int) -> tuple[KVCache, BlockAllocator, int]:
    """A pool half of which is used, its pages in random order."""
    rng = np.random.default_rng(0)
    shape = (num_pages, HEADS, PAGE, DIM)
    layers = [jnp.asarray(rng.standard_normal(shape, np.float32)) for _ in range(2 * LAYERS)]
    allocator = BlockAllocator(num_pages, PAGE)
    held = np.array(allocator.allocate_pages(num_pages - 1))
    allocator.free_pages(rng.permutation(held))
    tokens = rng.integers(0, 1000, (8, (num_pages - 1) // 16 * PAGE))
    handles = [allocator.allocate(row) for row in tokens]
    allocator.commit(handles, tokens.shape[1])
    cache = KVCache(tuple(layers[:LAYERS]), tuple(layers[LAYERS:]))
    return cache, allocator, allocator.num_used * cache.page_bytes


def gather(cache: KVCache, allocator: BlockAllocator) -> dict[str, np.ndarray]:
    _, where = allocator.export_state()
    leaves = (*cache.k_pages, *cache.v_pages)
    return {str(i): np.asarray(leaf)[where.pages] for i, leaf in enumerate(leaves)}


def synced(path: Path, work: Callable[[], object]) -> None:
    work()
    file = os.open(path, os.O_RDONLY)
    os.fsync(file)
    os.close(file)


def run(folder: Path, mib: int, rounds: int) -> list[dict]:
    page_bytes = 2 * LAYERS * HEADS * PAGE * DIM * 4
    cache, allocator, live = make(2 * mib * 2**20 // page_bytes)
    pages = gather(cache, allocator)
    ours, theirs, raw = folder / "s.pgd", folder / "s.safetensors", folder / "raw"
    buffer = bytearray(CHUNK)
    times: dict[tuple[str, str], list[float]] = {}

    def note(case: str, system: str, work: Callable[[], object]) -> None:
        times.setdefault((case, system), []).append(timed(work))

    def load() -> float:
        pool = KVCache.create(
            num_layers=LAYERS,
            num_pages=cache.num_pages,
            num_kv_heads=HEADS,
            page_size=PAGE,
            head_dim=DIM,
        )
        jax.block_until_ready(jax.tree.map(lambda a: a + 0, pool))  # its memory is there
        other = BlockAllocator(cache.num_pages, PAGE)
        start = time.perf_counter()
        jax.block_until_ready(load_snapshot(ours, into=(pool, other)).cache)
        return time.perf_counter() - start

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    save_snapshot(ours, cache, allocator)
    above = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    for _ in range(rounds):
        note("write", "raw", lambda: raw_write(raw, memoryview(buffer), live))
        note(
            "write",
            "safetensors",
            lambda: synced(
                theirs, lambda: safetensors.numpy.save_file(gather(cache, allocator), theirs)
            ),
        )
        note("write", "paged-decode", lambda: save_snapshot(ours, cache, allocator))
        for case in ("read, cached", "read, dropped"):
            for path in (raw, theirs, ours):
                drop(path) if case == "read, dropped" else raw_read(path, buffer)
            note(case, "raw", lambda: raw_read(raw, buffer))
            note(case, "safetensors", lambda: safetensors.flax.load_file(theirs))
            times.setdefault((case, "paged-decode"), []).append(load())
        note("pause", "copy alone", lambda: gather(cache, allocator))
        start = time.perf_counter()
        pending = save_snapshot_async(ours, cache, allocator)
        times.setdefault(("pause", "paged-decode"), []).append(time.perf_counter() - start)
        pending.result()
    for name, function in (("zlib.crc32", zlib.crc32), ("crc32 in use", crc32)):
        data = memoryview(np.concatenate([p.reshape(-1) for p in pages.values()]).tobytes())
        note(
            "checksum",
            name,
            lambda f=function, d=data: (
                [f(d[i : i + CHUNK]) for i in range(0, len(d), CHUNK)] and None
            ),
        )
    return [
        {
            "case": {"what": case, "mib": live >> 20},
            "system": system,
            **spread(seconds),
            "bytes": live,
            "gb_per_s": round(live / sorted(seconds)[len(seconds) // 2] / 1e9, 3),
        }
        for (case, system), seconds in times.items()
    ] + [
        {
            "case": {"what": "memory above the cache", "mib": live >> 20},
            "system": "paged-decode",
            "bytes": above,
        }
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=1024, help="bytes in use")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        records = run(Path(folder), args.mib, args.rounds)
    for r in records:
        print(r["case"]["what"], r["system"], r.get("gb_per_s", ""), r["bytes"])
    packages = ("numpy", "jax", "jaxlib", "safetensors", "isal")
    command = f"python benchmarks/snapshot.py --mib {args.mib}"
    write_result("snapshot", records, command=command, packages=packages)


if __name__ == "__main__":
    main()
