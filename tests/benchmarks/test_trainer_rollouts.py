"""The benchmark of a trainer's rollouts: its lengths, what its engine does, and leaks."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from ..paged_decode.tiny import PARAMS, make_engine, make_params

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
COUNTED = ("decode_tokens", "prefix_hit_tokens", "prefill_tokens")


@pytest.fixture(scope="module")
def rollouts(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE", "")  # which it sets
        patch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
        module = importlib.import_module("trainer_rollouts")
        patch.setattr(sys.modules["_result"], "RESULTS", tmp_path_factory.mktemp("results"))
        yield module


@pytest.fixture(scope="module")
def made():
    """A small engine, weights for it, and prompts."""
    engine = make_engine(160, max_rows=8, row_buckets=(8,), max_sequence_tokens=96)
    states = [jax.device_put(each) for each in (PARAMS, make_params(seed=7))]
    return engine, states, [[1 + i] * 40 for i in range(2)]


def test_lengths_are_log_normal_up_to_the_longest_and_the_same_for_a_seed(rollouts):
    sizes = dict(prompts=64, samples=8, median=300.0, sigma=1.0, longest=1024)
    found, again, other = (
        rollouts.lengths_of(argparse.Namespace(**sizes, seed=seed)) for seed in (0, 0, 1)
    )
    assert found.shape == (64, 8) and (found == again).all() and (found != other).any()
    assert found.min() >= 1 and found.max() == 1024
    below = found[found < 1024]
    assert np.median(found) == pytest.approx(300, rel=0.1)
    assert np.mean(below <= 300 * np.exp(-1)) * below.size / found.size == pytest.approx(
        0.159, abs=0.04
    )


def test_samples_end_at_their_own_lengths_and_compute_of_their_prompt_what_is_no_full_page(
    rollouts, made
):
    engine, _, asked = made
    lengths, before = np.array([[3, 9, 1, 20], [7, 2, 12, 5]]), replace(engine.stats)
    assert rollouts.rollout(engine, asked, lengths) > 0
    done = {name: getattr(engine.stats, name) - getattr(before, name) for name in COUNTED}
    computed = 2 * (39 + 3 * 3)  # once, and of each other sample what is behind the full pages
    assert done == dict(decode_tokens=59, prefix_hit_tokens=2 * 3 * 36, prefill_tokens=computed)
    assert rollouts.pages_of(engine)["used"] == 0


def test_updates_are_timed_for_each_word_and_what_they_leave_is_seen(rollouts, made, monkeypatch):
    engine, states, asked = made
    args = argparse.Namespace(updates=1, samples=4, longest=30)
    times = dict(rollouts.updates(engine, states, asked, args))
    assert set(times) == {"keep", "recompute", "end"}
    assert all(len(each) == 1 and min(each) > 0 for each in times.values())
    assert engine.version == 6 and engine.idle
    was, now = rollouts.kept(engine, states, asked, 4, 30, count=12)
    assert was == now and now["used"] == now["cached"] == 0 and engine.version == 6 + 3 + 1 + 12 + 1
    left, whole = [], engine.update_params

    def leaks(new, **options):
        left.append(jax.device_put(np.zeros(10, np.float32)))
        whole(new, **options)

    monkeypatch.setattr(engine, "update_params", leaks)
    was, now = rollouts.kept(engine, states, asked, 4, 30, count=12)
    assert now["device_bytes"] - was["device_bytes"] == 13 * 40


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of tunix and what it imports
def test_a_small_run_beside_tunix_stores_every_system(rollouts, monkeypatch):
    pytest.importorskip("tunix", reason="google-tunix is not installed: pip install google-tunix")
    options = ["--small", "--updates", "2", "--engines", "shared_prefix", "--name", "tried"]
    monkeypatch.setattr(sys, "argv", ["it", *options])
    jax.config.update("jax_numpy_dtype_promotion", "standard")
    try:
        rollouts.main()
    finally:
        jax.config.update("jax_numpy_dtype_promotion", "strict")
    records = json.loads((sys.modules["_result"].RESULTS / "tried.json").read_text())["records"]
    own = [f"paged-decode/{system}" for system in ("shared_prefix", "update", "100 updates")]
    assert {record["system"] for record in records} == {"tunix/vanilla", *own}
    assert all(0 < record["min_s"] <= record["median_s"] for record in records)
