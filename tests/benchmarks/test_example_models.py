"""The benchmark of the example models: its floors, how it tells kernels apart, and a small run."""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def models(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.syspath_prepend(str(BENCHMARKS.parent / "examples"))
    for name in ("PREALLOCATE", "MEM_FRACTION"):  # which it sets for its own process
        monkeypatch.setitem(os.environ, f"XLA_PYTHON_CLIENT_{name}", "")
    monkeypatch.setattr(sys, "path", [*sys.path])
    module = importlib.import_module("example_models")
    monkeypatch.setattr(sys.modules["_result"], "RESULTS", tmp_path)
    return module


def abstract(models, name: str):
    """The configuration of a model, and shapes of its weights, of which none are made."""
    shape = models.MODELS[name]
    return shape.config, jax.eval_shape(lambda: models.random_params(shape, jnp.bfloat16))


@pytest.mark.parametrize(
    ("name", "weights", "touched"),
    [
        ("llama-3.1-8b", 8.03e9, 7.51e9),
        ("qwen3-30b-a3b", 30.5e9, 3.0e9),
        ("gpt-oss-20b", 20.9e9, 3.61e9),
    ],
)
def test_a_model_has_the_weights_that_its_name_says_and_a_token_touches_its_own(
    models, name, weights, touched
):
    config, params = abstract(models, name)
    assert sum(a.size for a in jax.tree.leaves(params)) == pytest.approx(weights, rel=0.01)
    one, all_ = models.Case(1, 1, 1), models.Case(4096, 1, 1)
    few, every = config.experts_per_token, config.num_experts
    least = models.least_bytes(config, params, one, few)
    most = models.least_bytes(config, params, all_, every)
    assert least / 2 == pytest.approx(touched, rel=0.03)
    assert most / 2 > weights - params["embed"].size


def test_a_window_bounds_what_is_read_and_what_is_computed(models):
    config, params = abstract(models, "gpt-oss-20b")
    short, long = (models.Case(1, 1, context) for context in (128, 2048))
    more = models.least_bytes(config, params, long) - models.least_bytes(config, params, short)
    assert more == 12 * 1920 * 2 * 8 * 64 * 2  # of the layers that see all tokens
    more = models.least_flops(config, params, long) - models.least_flops(config, params, short)
    assert more == 12 * 1920 * 4 * 64 * 64


def test_flops_of_a_prompt_are_those_of_its_products_and_pairs(models):
    config, params = abstract(models, "llama-3.1-8b")
    of_layer = sum(params["layers"][0][role].size for role in ("qkv", "out", "gate_up", "down"))
    pairs = 2048 * 2049 / 2
    want = 2 * 2048 * 32 * of_layer + 2 * params["head"].size + 32 * pairs * 4 * 32 * 128
    found = models.least_flops(config, params, models.Case(1, 2048, 2048))
    np.testing.assert_allclose(found, want, rtol=1e-12)


def test_time_is_told_apart_by_what_the_kernels_are(models):
    spans = [
        (0.0, 10.0, "nvjet_hsh_64x8_64x16"),
        (12.0, 15.0, "decode_kernel"),
        (15.0, 17.0, "input_reduce_fusion_3"),
        (16.0, 20.0, "loop_multiply_fusion"),
        (30.0, 39.0, "sm90_xmma_gemm_bf16"),
        (39.0, 40.0, "grouped_matmul_kernel"),
    ]
    found = models.parts_of(spans, 2)
    kinds = ("products_s", "attention_s", "sums_s", "rest_s", "idle_s", "device_s")
    np.testing.assert_allclose([found[kind] * 2e6 for kind in kinds], [20, 3, 2, 4, 12, 28])
    assert found["kernels"][0] == dict(name=spans[0][2], count=0.5, seconds=pytest.approx(5e-6))


@pytest.mark.slow
@pytest.mark.parametrize(
    "names",
    [
        ["gpt-oss-20b"],
        pytest.param(["llama-3.1-8b", "qwen3-30b-a3b", "gpt-oss-20b"], marks=pytest.mark.long),
    ],
    ids=len,
)
def test_a_small_run_stores_every_case_with_device_versions_and_date(models, tmp_path, names):
    models.main(["--small", "--name", "tried", "--models", *names])
    stored = json.loads((tmp_path / "tried.json").read_text())
    assert {"benchmark", "command", "date", "device", "versions", "records"} == set(stored)
    ceiling, *records = stored["records"]
    assert ceiling["system"] == "ceiling" and ceiling["bytes_per_s"] > 0
    assert [r["case"]["model"] for r in records] == [m for m in names for _ in models.SMALL]
    assert all(0 < record["min_s"] <= record["median_s"] for record in records)
    assert all(0 < record["floor_s"] < record["median_s"] for record in records)
    asked = [record["experts_of_a_layer"] for record in records]
    assert all(
        2 <= each <= 6
        for each, r in zip(asked, records, strict=True)
        if "llama" not in r["case"]["model"]
    )
