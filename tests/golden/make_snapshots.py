"""How the snapshots of format versions 1 to 5 in this folder were made. They are never made
again: a release that cannot read them is broken, whatever it writes itself.

    python -m tests.golden.make_snapshots FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import ml_dtypes
import numpy as np

from paged_decode import SamplingParams, save_snapshot

from ..paged_decode.engine.test_engine_groups import engine_of
from ..paged_decode.snapshot.asking import SERVING, ask, events
from ..paged_decode.snapshot.grouped import LAYOUTS, lived
from ..paged_decode.snapshot.small import busy
from ..paged_decode.tiny import PARAMS, make_engine, prompts

EXTRA = {
    "newest tokens": np.arange(5, dtype=np.int32),
    "keys": np.arange(10, dtype=np.uint32).reshape(5, 2) << 28,
    "done": np.array([True, False, True]),
    "step": np.array(7, np.int64),
    "none": np.zeros((0, 3), np.float16),
    "\u00e9": np.arange(6).reshape(3, 2).astype(ml_dtypes.bfloat16),
    "tiny": np.arange(4).astype(ml_dtypes.float8_e4m3fn),
}


def make(folder: Path) -> None:
    """All files of version 1, then those of version 2, and so on."""
    _make_first(folder)
    _make_second(folder)
    cache, allocator, _ = busy(fingerprint=b"golden")
    save_snapshot(folder / "snapshot_v3_one.pgd", cache, allocator, extra=EXTRA)
    life = lived(LAYOUTS["two"], seed=8, fingerprint=b"golden")
    save_snapshot(folder / "snapshot_v3_two.pgd", life.cache, life.allocator, extra=EXTRA)
    _make_fourth(folder)
    _make_fifth(folder)


def _make_fifth(folder: Path) -> None:
    """After two updates: a request that runs by the weights of now, and one that they have ended.
    The number that a device computed is a token."""
    engine = make_engine()
    engine.update_params(PARAMS)
    engine.submit([1, 2, 3], SamplingParams(max_new_tokens=12, seed=3))
    for _ in range(2):
        engine.step()
    engine.loop.collect()
    engine.update_params(PARAMS, in_flight="end")
    engine.submit([4, 5, 6], SamplingParams(max_new_tokens=5, seed=4))
    engine.save(folder / "snapshot_v5_waiting.pgd")


def _make_fourth(folder: Path) -> None:
    """In the middle of a visit; and requests that wait, with no number that a device computed."""
    engine = make_engine(**SERVING)
    ask(engine)
    engine.step()
    engine.save(folder / "snapshot_v4_engine.pgd")
    engine = engine_of(**SERVING)
    ask(engine)
    engine._outbox.put_back(events()[:3], events()[3:])
    engine.save(folder / "snapshot_v4_waiting.pgd", extra=EXTRA)
    engine = make_engine(policies=dict(clock=lambda: 2.0))
    engine.pin(range(10), "tenant")
    plain = SamplingParams(max_new_tokens=5)
    engine.submit([1, 2, 3], plain, priority=-1, timeout=30)
    engine.submit([4, 5], plain, n=2, priority=3, max_wait=0.5)
    engine.submit([6], plain)
    engine.scheduler.limits.clock = lambda: 2.25
    engine.save(folder / "snapshot_v4_order.pgd")


def _make_second(folder: Path) -> None:
    for name, layout in LAYOUTS.items():
        life = lived(layout, seed=8, fingerprint=b"golden")
        path = folder / f"snapshot_v2_{name}.pgd"
        parent = save_snapshot(path, life.cache, life.allocator, metadata={"layout": name})
        if name == "two":
            for _ in range(3):
                life.turn()
            path = folder / "snapshot_v2_delta.pgd"
            save_snapshot(path, life.cache, life.allocator, parent=parent)


def _make_first(folder: Path) -> None:
    for dtype in ("float32", "bfloat16", "float8_e4m3fn", "int8"):
        cache, allocator, handles = busy(
            dtype=np.dtype(getattr(ml_dtypes, dtype, dtype)), fingerprint=b"golden"
        )
        path = folder / f"snapshot_v1_{dtype}.pgd"
        parent = save_snapshot(path, cache, allocator, metadata={"dtype": dtype, "made": 1})
        if dtype == "bfloat16":
            allocator.free(handles[0])
            save_snapshot(folder / "snapshot_v1_delta.pgd", cache, allocator, parent=parent)
    engine = make_engine()
    for prompt in prompts(3, seed=6):
        engine.submit(prompt, SamplingParams(max_new_tokens=12, temperature=0.7, seed=3), n=2)
    for _ in range(3):
        engine.step()
    engine.save(folder / "snapshot_v1_engine.pgd")


if __name__ == "__main__":
    make(Path(sys.argv[1]))
