"""What saving and loading takes above the cache: at most the live pages and 64 MiB."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]

SCRIPT = """
import sys
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_platforms", "cpu")  # where the cache is memory of the process
from paged_decode import (
    BlockAllocator, KVCache, compact_snapshot, load_snapshot, save_snapshot, save_snapshot_async,
)

LAYERS, PAGES, SHAPE = 4, 641, (8, 16, 64)  # 32 KiB a page and leaf: 160 MiB, 128 of them live

def make():
    pool = [jnp.full((PAGES, *SHAPE), i, jnp.float32) for i in range(2 * LAYERS)]
    return KVCache(tuple(pool[:LAYERS]), tuple(pool[LAYERS:])), BlockAllocator(PAGES, 16)

def bytes_of(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024

def peak(work):
    before = bytes_of("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    jax.block_until_ready(work())
    return (bytes_of("VmHWM") - before) / 2**20

folder = Path(sys.argv[1])
cache, allocator = make()
handle = allocator.allocate(np.zeros(512 * 16, np.int32))
allocator.commit(handle, 512 * 16)
live = allocator.num_used * cache.page_bytes / 2**20
assert live == 128
print("save", peak(lambda: save_snapshot(folder / "s", cache, allocator) and None))
work = lambda: save_snapshot_async(folder / "t", cache, allocator).result() and None
print("save_async", peak(work))
print("compact", peak(lambda: compact_snapshot(folder / "s", folder / "u") and None))
into = make()
print("load", peak(lambda: load_snapshot(folder / "s", *into).cache))
"""


def test_saving_and_loading_take_no_more_than_the_live_pages_and_64_mib(tmp_path):
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("the peak of a process cannot be reset here")
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    peaks = {line.split()[0]: float(line.split()[1]) for line in done.stdout.splitlines()}
    assert peaks.keys() == {"save", "save_async", "compact", "load"}
    most = {"save": 64, "compact": 64, "save_async": 128 + 64, "load": 128 + 64}
    assert all(peaks[what] <= mib for what, mib in most.items()), peaks
