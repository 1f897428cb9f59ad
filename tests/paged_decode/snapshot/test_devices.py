"""One file, whatever the devices: heads over 1 to 8 of them, with and without copies, and back.

On CPUs always; on GPUs where there are two.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parents[3]

SCRIPT = """
import sys
from pathlib import Path
import jax
jax.config.update("jax_platforms", sys.argv[2])
jax.config.update("jax_num_cpu_devices", 8)
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from paged_decode import BlockAllocator, KVCache, load_snapshot, save_snapshot
from paged_decode.snapshot import _format, _in, _out

if sys.argv[3] == "batches":
    _format.CHUNK_BYTES, _in.BATCH_CHUNKS, _out.BATCH_CHUNKS = 2048, 1, 1
    _in._has_room = lambda device, nbytes: False

folder, rng, COUNT = Path(sys.argv[1]), np.random.default_rng(0), len(jax.devices())

def cache_on(devices, pages, fill=None):
    arrays = [np.zeros((pages, 4, 4, 8), np.float32) if fill is None else fill() for _ in range(4)]
    if devices > 1:
        mesh = jax.make_mesh((devices,), ("heads",), devices=jax.devices()[:devices])
        arrays = [jax.device_put(a, NamedSharding(mesh, P(None, "heads"))) for a in arrays]
    else:
        arrays = [jax.device_put(a) for a in arrays]
    return KVCache(tuple(arrays[:2]), tuple(arrays[2:]))

def fresh():
    return rng.standard_normal((20, 4, 4, 8)).astype(np.float32)

allocator = BlockAllocator(20, 4)
for n in (9, 5, 16):
    h = allocator.allocate(rng.integers(0, 50, n))
    allocator.commit(h, n)
allocator.free(h)
save_snapshot(folder / "1", cache_on(1, 20, fresh), allocator)
want = (folder / "1").read_bytes()
last = "1"
for devices, pages in ((2, 30), (4, 12), (1, 25), (4, 20), (1, 20)):
    if devices > COUNT:
        continue
    other = BlockAllocator(pages, 4)
    restored = load_snapshot(folder / last, cache_on(devices, pages), other)
    other.check_invariants()
    assert len(restored.cache.k_pages[0].sharding.device_set) == devices
    last = f"to-{devices}-{pages}"
    save_snapshot(folder / last, restored.cache, other)
    assert (folder / last).read_bytes() == want, last

few = min(COUNT, 4)
mesh = jax.make_mesh((few,), ("pages",), devices=jax.devices()[:few])
pages = jax.device_put(np.zeros((20, 4, 4, 8), np.float32), NamedSharding(mesh, P("pages")))
try:
    save_snapshot(folder / "x", KVCache((pages,), (pages,)), allocator)
except NotImplementedError as error:
    assert "only heads may be" in str(error)
else:
    raise SystemExit("pages over devices were saved")

# Hk = 2: on 8 devices every head has 4 copies; the file has it once.
sizes = dict(num_layers=2, num_kv_heads=2, page_size=4, head_dim=8)
def split(pages, **axes):
    heads = COUNT // axes.pop("others", 1)
    mesh = jax.make_mesh((heads, COUNT // heads), ("heads", "others"))
    return KVCache.create(num_pages=pages, **sizes, mesh=mesh, **axes)

half = [rng.standard_normal((20, 2, 4, 8)).astype(np.float32) for _ in range(4)]
one = KVCache(tuple(map(jax.device_put, half[:2])), tuple(map(jax.device_put, half[2:])))
save_snapshot(folder / "once", one, allocator)
want = (folder / "once").read_bytes()
for at, others in enumerate(n for n in (1, 2, 4, 8) if n <= COUNT):
    other = BlockAllocator(24, 4)
    into = split(24, head_axis="heads", others=others)
    assert into.placement.kv_copies == max(1, COUNT // others // 2)
    restored = load_snapshot(folder / "once", into, other)
    copies = into.placement.kv_copies
    for leaf in jax.tree.leaves(restored.cache):
        np.testing.assert_array_equal(leaf, np.repeat(np.asarray(leaf)[:, ::copies], copies, 1))
    save_snapshot(folder / f"copies-{at}", restored.cache, other)
    assert (folder / f"copies-{at}").read_bytes() == want, at

try:
    save_snapshot(folder / "y", split(24, data_axis="heads"), BlockAllocator(24, 4))
except NotImplementedError as error:
    assert f"{COUNT} data shards" in str(error)
else:
    raise SystemExit("data shards were saved")
assert not (folder / "y").exists()
"""


def run(*arguments):
    command = [sys.executable, "-W", "error", "-c", SCRIPT, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("pages", ["at once", "batches"])
def test_heads_over_devices_and_back_give_the_same_bytes(tmp_path, pages):
    run(tmp_path, "cpu", pages)


@pytest.mark.gpu
@pytest.mark.parametrize("pages", ["at once", "batches"])
def test_heads_over_gpus_and_back_give_the_same_bytes(tmp_path, pages):
    if jax.default_backend() != "gpu" or len(jax.devices()) < 2:
        pytest.skip("needs two GPUs")
    run(tmp_path, "cuda", pages)
