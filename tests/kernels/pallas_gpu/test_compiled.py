"""The Hopper kernel, compiled ahead of time for an H100 that is not here."""

import importlib.util
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from paged_decode.kernels import paged_attention
from paged_decode.kernels.pallas_gpu.config import QUERIES

from .interpret import PROBLEM

PLUGIN = "jax_plugins.xla_cuda13"
MISSING = PROBLEM or (
    None
    if importlib.util.find_spec("jax_plugins") and importlib.util.find_spec(PLUGIN)
    else "needs the wheels jax-cuda13-pjrt and jax-cuda13-plugin to compile for a GPU"
)
pytestmark = [
    pytest.mark.skipif(MISSING is not None, reason=str(MISSING)),
    pytest.mark.slow,
]

CARD = Path(__file__).with_name("h100.txtpb")
SHAPES = {
    "as the benchmark": {},
    "pages smaller than a tile": dict(page_size=16, group=8),
    "every option": dict(
        page_size=256, group=1, dim=64, dtype=jnp.float16, starts=True, sinks=True,
        options=dict(sliding_window=100, soft_cap=3.0),
    ),
    "many rows, a large group": dict(rows=300, page_size=8, group=20),
}  # fmt: skip
TAILS = {
    "as the benchmark": dict(rows=1, tokens=2048, page_size=16),
    "an odd group, several rows": dict(rows=4, tokens=512, group=5, page_size=16),
    "every option": dict(
        rows=600, tokens=70, page_size=256, group=2, dim=64, dtype=jnp.float16, starts=True,
        sinks=True, options=dict(sliding_window=100, soft_cap=3.0),
    ),
    "D 256, windows, a cap": dict(
        tokens=512, dim=256, group=2, options=dict(sliding_window=1024, soft_cap=50.0),
    ),
}  # fmt: skip


def compiled(
    rows: int = 16,
    tokens: int = 1,
    columns: int = 64,
    pages: int = 2000,
    page_size: int = 64,
    kv_heads: int = 8,
    group: int = 4,
    dim: int = 128,
    dtype: Any = jnp.bfloat16,
    starts: bool = False,
    sinks: bool = False,
    options: dict[str, Any] | None = None,
) -> Any:
    """`paged_attention` on this backend for an H100."""
    card = topologies.get_topology_desc(
        platform="cuda", target_config=CARD.read_text(), topology="1x1x1"
    )
    sharding = SingleDeviceSharding(card.devices[0])

    def of(*shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    heads, pool = kv_heads * group, of(pages, kv_heads, page_size, dim, dtype=dtype)
    more: dict[str, Any] = dict(starts=of(rows)) if starts else {}
    more |= dict(sinks=of(heads, 1, dtype=jnp.float32)) if sinks else {}

    def attend(*args: Any, **more: Any) -> Any:
        return paged_attention(*args, **more, **(options or {}), implementation="pallas_gpu")

    args = (of(rows, tokens, heads, dim, dtype=dtype), pool, pool, of(rows, columns), of(rows))
    traced = jax.jit(attend).trace(*args, **more)
    return traced.lower(lowering_platforms=("cuda",)).compile()


@pytest.fixture(autouse=True)
def on_a_gpu(monkeypatch):
    """The call will run on a GPU, whatever this machine has."""
    from paged_decode.kernels import dispatch

    monkeypatch.setattr(dispatch, "default_platform", lambda platform=None: "gpu")


@pytest.mark.parametrize("name", SHAPES)
def test_it_compiles_without_spills_or_a_copy_of_the_pool(name, monkeypatch, tmp_path):
    monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", str(tmp_path))
    executable = compiled(**SHAPES[name])
    group, dim = (SHAPES[name].get(key, size) for key, size in (("group", 4), ("dim", 128)))
    parts_bytes = 2 * 132 * group * (dim + 1) * 4
    counters_and_more_bytes = 2**18
    temp_bytes = executable.memory_analysis().temp_size_in_bytes
    assert temp_bytes < parts_bytes + counters_and_more_bytes
    (ptx,) = (path.read_text() for path in tmp_path.glob("*.ptx"))
    assert "wgmma.mma_async" in ptx and "cp.async.bulk.tensor" in ptx
    # Only the weights, made anew for every tile, are operands in registers: ptxas 13.0 gave the
    # registers of an operand that outlived the first tile to these, and the second was wrong.
    left = re.findall(r"wgmma\.mma_async\S* \{[^}]*\}, (\S)", ptx)
    assert (left.count("{"), left.count("%")) == (QUERIES // 16, dim // 16)
    # What each register of a 256-thread block may be, and none of it in local memory.
    (report,) = (path.read_text() for path in tmp_path.glob("*.ptxas"))
    assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in report
    (registers,) = map(int, re.findall(r"Used (\d+) registers", report))
    assert registers * 256 <= 1 << 16


def test_it_is_one_launch():
    executable = compiled()
    calls = re.findall(r"custom-call\(", executable.as_text())
    kernels = re.findall(r"\bfusion\(", executable.as_text())
    assert len(calls) == 1 and not kernels


@pytest.mark.parametrize("name", TAILS)
def test_tails_compile_with_sums_in_registers_and_no_copy_of_the_pool(name, monkeypatch, tmp_path):
    monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", str(tmp_path))
    executable = compiled(**TAILS[name])
    # The numbers of the other layout of lse, and q where T is no whole unit.
    shape = [TAILS[name].get(key, default) for key, default in (("rows", 16), ("tokens", 1))]
    rows, tokens = shape[0], -(-shape[1] // 128) * 128
    heads, dim = 8 * TAILS[name].get("group", 4), TAILS[name].get("dim", 128)
    temp_bytes = executable.memory_analysis().temp_size_in_bytes
    assert temp_bytes <= rows * tokens * heads * (2 * dim * 2 + 2 * 4) + 2**12
    (ptx,) = (path.read_text() for path in tmp_path.glob("*.ptx"))
    assert "wgmma.mma_async" in ptx and "cp.async.bulk.tensor" in ptx
    (report,) = (path.read_text() for path in tmp_path.glob("*.ptxas"))
    # The loader has 40 registers and an id for each piece of a tile; the sums of a consumer, 64 x D
    # numbers of 128 threads, would be 128 bytes and more of each.
    spilled = re.search(r"stack frame, (\d+) bytes spill stores", report)
    assert spilled and int(spilled[1]) < 128
    # A third of what a multiprocessor has; the kernel hands them out anew.
    assert "Used 168 registers" in report
