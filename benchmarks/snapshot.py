"""Snapshots against the machine's raw rate and against safetensors, same bytes, one run.

    pip install paged-decode[bench]
    python benchmarks/snapshot.py --mib 1024              # writes results/snapshot.json
    python benchmarks/snapshot.py --mib 1024 --rounds 3   # on a GPU: results/snapshot_gpu.json

Systems:

- `raw` writes the bytes from one buffer and syncs, or reads them into memory that holds all of
  them (`numpy.fromfile`): what any loader needs that looks at everything before it trusts it;
- `raw, thrown away` reads them into one buffer of 4 MiB, which keeps nothing;
- `safetensors` saves the gathered pages and syncs, or loads them to JAX arrays; from a GPU they
  come through page-locked memory;
- `paged-decode` saves a cache whose pages lie in random order, or loads it into a pool whose memory
  is in use already, checksums and bookkeeping included.

Rounds are interleaved. On a machine that others use, compare the best of each, `best_gb_per_s`, and
the processor time of all threads, `min_cpu_s`; the record `machine` says how busy it was.
Reads are made twice: with the file in the page cache, and after asking the kernel to drop it.
`pause` is what `save_snapshot_async` costs the loop, beside copying the pages out and nothing else;
on a GPU that is one gather and one copy to page-locked memory, or `np.asarray` of what was
gathered. `moved` loads the file into pools of other sizes and, where there are two GPUs, with the
heads over both and back, compares every bit, and saves them to the same bytes again.
`memory` is the peak of a process of its own above what it had with pool and allocator made (CPU).
`first pause` is of a process of its own, too (GPU): it compiles, and takes page-locked memory from
the system, unless that is `reserved`, as docs/snapshots.md shows.
"""

from __future__ import annotations

import argparse
import filecmp
import gc
import os
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np
from _result import spread, write_result
from jax.sharding import SingleDeviceSharding

from paged_decode import (
    BlockAllocator,
    KVCache,
    load_snapshot,
    save_snapshot,
    save_snapshot_async,
)
from paged_decode._optional import needs
from paged_decode.snapshot._crc import crc32

with needs("bench", or_exit=True):
    import safetensors.flax
    import safetensors.numpy

LAYERS, HEADS, PAGE, DIM = 8, 8, 16, 64
CHUNK = 1 << 22
PEAKS = ("save", "save_async", "load")
FIRST_PAUSES = ("first pause, plain", "first pause, reserved")
ON_CPU = jax.default_backend() == "cpu"


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds until the result is there, and seconds of processor time of all threads.

    Giving back what the work made, such as a pool, is nobody's time; JAX does some of it later.
    """
    gc.collect()
    start, used = time.perf_counter(), time.process_time()
    result = jax.block_until_ready(work())
    times = time.perf_counter() - start, time.process_time() - used
    del result
    return times


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


def thrown_away(path: Path) -> None:
    raw_read(path, bytearray(CHUNK))


def drop(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(file)


def make(num_pages: int) -> tuple[KVCache, BlockAllocator, int]:
    """A pool half of which is used, its pages in random order."""
    rng = np.random.default_rng(0)
    shape = (num_pages, HEADS, PAGE, DIM)
    layers = [jnp.asarray(rng.random(shape, np.float32)) for _ in range(2 * LAYERS)]
    allocator = BlockAllocator(num_pages, PAGE)
    held = np.array(allocator.allocate_pages(num_pages - 1))
    allocator.free_pages(rng.permutation(held))
    tokens = rng.integers(0, 1000, (8, (num_pages - 1) // 16 * PAGE))
    handles = [allocator.allocate(row) for row in tokens]
    allocator.commit(handles, tokens.shape[1])
    cache = KVCache(tuple(layers[:LAYERS]), tuple(layers[LAYERS:]))
    return cache, allocator, allocator.num_used * cache.page_bytes


@jax.jit
def taken(leaves: list[jax.Array], ids: np.ndarray) -> list[jax.Array]:
    return [leaf[ids] for leaf in leaves]


def gather(cache: KVCache, allocator: BlockAllocator) -> dict[str, np.ndarray]:
    """The pages in use, in the order of the file, the fastest way to the host."""
    _, where = allocator.export_state()
    leaves = [*cache.k_pages, *cache.v_pages]
    if ON_CPU:
        return {str(i): np.asarray(leaf)[where.pages] for i, leaf in enumerate(leaves)}
    out = taken(leaves, where.pages)
    out = jax.device_put(out, [a.sharding.with_memory_kind("pinned_host") for a in out])
    return {str(i): np.asarray(leaf) for i, leaf in enumerate(out)}


def gather_plainly(cache: KVCache, allocator: BlockAllocator) -> list[np.ndarray]:
    _, where = allocator.export_state()
    return [np.asarray(leaf) for leaf in taken([*cache.k_pages, *cache.v_pages], where.pages)]


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
    times: dict[tuple[str, str], list[tuple[float, float]]] = {}

    def note(case: str, system: str, work: Callable[[], object]) -> None:
        times.setdefault((case, system), []).append(timed(work))

    save_snapshot(ours, cache, allocator)
    first = load(ours, cache.num_pages)  # compiles what places the pages
    saved, behind = (ours, cache, allocator), []
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
            note(case, "raw", lambda: np.fromfile(raw, np.uint8))
            drop(raw) if case == "read, dropped" else None
            note(case, "raw, thrown away", lambda: thrown_away(raw))
            note(case, "safetensors", lambda: safetensors.flax.load_file(theirs))
            times.setdefault((case, "paged-decode"), []).append(load(ours, cache.num_pages))
        note("pause", "copy alone", lambda: gather(cache, allocator))
        if not ON_CPU:
            note("pause", "copy alone, np.asarray", lambda: gather_plainly(cache, allocator))
        note("pause", "paged-decode", lambda: behind.append(save_snapshot_async(*saved)))
        behind.pop().result()
    for name, function in (("zlib.crc32", zlib.crc32), ("crc32 in use", crc32)):
        data = memoryview(np.concatenate([p.reshape(-1) for p in pages.values()]).tobytes())
        note(
            "checksum",
            name,
            lambda f=function, d=data: (
                [f(d[i : i + CHUNK]) for i in range(0, len(d), CHUNK)] and None
            ),
        )
    times["first load of a process", "paged-decode"] = [first]
    records = [record(case, system, live, both) for (case, system), both in times.items()]
    return records + moved(ours, cache.num_pages, live, pages)


def moved(path: Path, num_pages: int, live: int, pages: dict[str, np.ndarray]) -> list[dict]:
    """From pool to pool, and over two devices and back where there are two."""
    places = [(1, num_pages * 3 // 2), (1, num_pages // 2 + 2)]
    places += [(2, num_pages), (1, num_pages)] if len(jax.devices()) > 1 and not ON_CPU else []
    records = []
    for devices, size in places:
        target = path.with_name(f"{devices}-{size}.pgd")
        times = one_move(path, target, size, devices, pages)
        case = {"what": "moved", "mib": live >> 20, "devices": devices, "pages": size}
        records.append({"case": case, "system": "paged-decode", "bytes": live, **times})
        path = target
    return records


def one_move(
    path: Path, target: Path, num_pages: int, devices: int, pages: dict[str, np.ndarray]
) -> dict:
    """Load `path`, save `target`, compare every bit of the cache and of the files."""
    into = pool(num_pages, devices), BlockAllocator(num_pages, PAGE)
    start = time.perf_counter()
    cache = jax.block_until_ready(load_snapshot(path, *into).cache)
    loaded = time.perf_counter() - start
    saved = min(timed(lambda: save_snapshot(target, cache, into[1]))[0] for _ in range(2))
    there = gather(cache, into[1])
    same = all(np.array_equal(there[name], pages[name]) for name in pages)
    if not (same and filecmp.cmp(path, target, shallow=False)):
        raise SystemExit(f"{devices} devices, {num_pages} pages: the bits are not those saved")
    return {"load_s": loaded, "save_s": saved, "bits_equal": same}


def record(case: str, system: str, live: int, both: list[tuple[float, float]]) -> dict:
    seconds = [wall for wall, _ in both]
    return {
        "case": {"what": case, "mib": live >> 20},
        "system": system,
        **spread(seconds),
        "min_cpu_s": min(used for _, used in both),
        "bytes": live,
        "gb_per_s": round(live / sorted(seconds)[len(seconds) // 2] / 1e9, 3),
        "best_gb_per_s": round(live / min(seconds) / 1e9, 3),
    }


def pool(num_pages: int, devices: int = 1) -> KVCache:
    """An empty pool whose memory is in use, its heads over so many devices."""
    split: dict = {}
    if devices > 1:
        mesh = jax.make_mesh((devices,), ("heads",), devices=jax.devices()[:devices])
        split = {"mesh": mesh, "head_axis": "heads"}
    cache = KVCache.create(
        num_layers=LAYERS,
        num_pages=num_pages,
        num_kv_heads=HEADS,
        page_size=PAGE,
        head_dim=DIM,
        **split,
    )
    return jax.block_until_ready(jax.tree.map(lambda a: a + 0, cache))


def load(path: Path, num_pages: int) -> tuple[float, float]:
    """As `timed`, a load into an empty pool."""
    into = pool(num_pages), BlockAllocator(num_pages, PAGE)
    return timed(lambda: load_snapshot(path, *into).cache)


def status(field: str) -> int:
    """Bytes, by /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def peak_above(what: str, mib: int) -> tuple[int, int]:
    """Live bytes, and peak memory above pool and allocator, of one save or load in this process.

    The pool is cut from one array per leaf, so that no freed memory is left to hide in; what is
    compiled, and the tables of the runtime, are counted in.
    """
    cache, allocator, live = make(2 * mib * 2**20 // (2 * LAYERS * HEADS * PAGE * DIM * 4))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "s"
        if what == "load":
            save_snapshot(path, cache, allocator)
            allocator = BlockAllocator(cache.num_pages, PAGE)
        before = status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        if what == "load":
            jax.block_until_ready(load_snapshot(path, cache, allocator).cache)
        elif what == "save":
            save_snapshot(path, cache, allocator)
        else:
            save_snapshot_async(path, cache, allocator).result()
        return live, status("VmHWM") - before


def first_pause(what: str, mib: int) -> tuple[int, float]:
    """Live bytes, and the pause of the first snapshot of this process."""
    cache, allocator, live = make(2 * mib * 2**20 // (2 * LAYERS * HEADS * PAGE * DIM * 4))
    if what == "first pause, reserved":
        pinned = SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")
        jax.block_until_ready(jax.device_put(np.zeros(live, np.uint8), pinned))
    jax.block_until_ready(cache)
    with tempfile.TemporaryDirectory() as folder:
        behind: list = []
        saved = Path(folder) / "s", cache, allocator
        pause, _ = timed(lambda: behind.append(save_snapshot_async(*saved)))
        behind[0].result()
    return live, pause


def alone(what: str, mib: int) -> list[str]:
    """What this command prints for one measurement in a process of its own."""
    command = [sys.executable, __file__, "--alone", what, "--mib", str(mib)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()


def first_pauses(mib: int) -> list[dict]:
    records = []
    for what in FIRST_PAUSES:
        live, pause = alone(what, mib)
        case = {"what": what, "mib": int(live) >> 20}
        over = {"bytes": int(live), "seconds": float(pause)}
        records.append({"case": case, "system": "paged-decode", **over})
    return records


def memory(mib: int) -> list[dict]:
    records = []
    for what in PEAKS:
        live, peak = map(int, alone(what, mib))
        case = {"what": f"memory, {what}", "mib": live >> 20}
        over = {"bytes": live, "peak_bytes": peak, "peak_over_live_bytes": peak - live}
        records.append({"case": case, "system": "paged-decode", **over})
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=1024, help="bytes in use")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--alone", choices=PEAKS + FIRST_PAUSES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.alone:
        print(*(peak_above if args.alone in PEAKS else first_pause)(args.alone, args.mib))
        return
    with tempfile.TemporaryDirectory() as folder:
        before = os.getloadavg()[0]
        records = run(Path(folder), args.mib, args.rounds)
        records += memory(args.mib) if ON_CPU else first_pauses(args.mib)
    load_averages = [before, os.getloadavg()[0]]
    case = {"what": "machine", "mib": args.mib}
    records.append(
        {"case": case, "system": "load average, before and after", "load": load_averages}
    )
    for r in records:
        print(r["case"]["what"], r["system"], r.get("best_gb_per_s", ""), r.get("peak_bytes", ""))
    write_result(
        "snapshot" if ON_CPU else "snapshot_gpu",
        records,
        command=f"python benchmarks/snapshot.py --mib {args.mib} --rounds {args.rounds}",
        device=None if ON_CPU else f"{len(jax.devices())} x {jax.devices()[0].device_kind}",
        packages=("numpy", "jax", "jaxlib", "safetensors", "isal"),
    )


if __name__ == "__main__":
    main()
