"""A split decode step compiles for slices of TPUs: sums only, and no copy of the pool."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

SCRIPT = """
import json
import sharding_tpu as slices  # sets the environment before JAX is imported
import jax, jax.numpy as jnp
from sharding import LARGE, compiled, replace
from paged_decode import DecodeBatch, KVCache
from paged_decode.kernels import Placement

def attention(mesh):
    placement = Placement.create(mesh, num_kv_heads=8, num_pages=33 * mesh.shape["data"],
                                 head_axis="tensor", data_axis="data")
    def put(axes, *shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=placement.sharding(axes))
    rows, heads = 4 * mesh.shape["data"], 8 * placement.kv_copies
    page = put("N, Hk, S, D", 33 * mesh.shape["data"], heads, 16, 128)
    ints = [put("B", rows, *rest, dtype=jnp.int32) for rest in ((8,), (), (1,), (1,))]
    new = put("B, T, Hk, D", rows, 1, heads, 128)
    def step(cache, q, k, v, batch):
        cache = cache.append(0, k, v, batch.slots)
        return cache, cache.attend(0, q, batch)
    args = put("B, T, Hq, D", rows, 1, 64, 128), new, new, DecodeBatch.of(*ints)
    return jax.jit(step, donate_argnums=0).lower(KVCache((page,), (page,), placement), *args)

config = replace(LARGE["70B"], num_layers=2, width=1024, inner_width=2048, vocab_size=4096)
for name, heads in (("v5e:2x4", 8), ("v6e:4x4", 8), ("v6e:4x4", 16)):
    mesh = slices.mesh_of(name, heads)
    for what, program in (("attention", attention(mesh).compile()),
                          ("model", compiled(config, 4, mesh, jnp.bfloat16))):
        in_place = program.memory_analysis().alias_size_in_bytes
        print("RESULT", json.dumps([what, program.as_text(), in_place]))
"""


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="needs libtpu, which compiles for TPUs without any: pip install paged-decode[tpu]",
)
def test_a_split_step_compiles_for_tpu_slices_with_sums_only():
    paths = [str(ROOT / "benchmarks"), str(ROOT), str(ROOT / "examples")]
    env = os.environ | dict(PYTHONPATH=os.pathsep.join(paths))
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    results = [line[7:] for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert len(results) == 6
    for what, hlo, in_place_bytes in map(json.loads, results):
        found = set(re.findall(r" ((?:all|reduce-scatter|collective)[a-z-]*)(?:\.\d+)?\(", hlo))
        assert found == ({"all-reduce"} if what == "model" else set())
        layers, pages = (2, 1 + 4 * 32) if what == "model" else (1, 33)
        assert in_place_bytes >= 2 * layers * pages * 16 * 128 * 2  # one KV head on a chip
