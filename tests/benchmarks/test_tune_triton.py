"""The tuning of the Triton kernel, as far as it goes without a GPU."""

from __future__ import annotations

import importlib
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def tune(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setitem(os.environ, "JAX_PLATFORMS", os.environ["JAX_PLATFORMS"])
    module = importlib.import_module("tune_triton")
    monkeypatch.setattr(sys.modules["_result"], "RESULTS", tmp_path)
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    monkeypatch.setattr(module, "card", lambda: "a card")
    monkeypatch.setattr(module, "_pages", lambda case: 9)  # torch's arrays know how many
    return module


def test_every_candidate_of_every_case_has_a_launch_and_the_shipped_one_is_the_first(tune):
    for case in tune.cases():
        found = list(tune.candidates(case, coarse=True))
        assert found[0] == tune.shipped(case) and len(found) > 3
        for config in found:
            made = tune.launch(case, config)
            assert made.grid >= case["rows"] * case["kv_heads"] and made.constants["SPLIT"]


def test_a_result_is_stored_with_device_versions_date_and_command_and_can_be_shown(
    tune, monkeypatch, capsys, tmp_path
):
    def run(wanted, budget_s, coarse):
        """Every candidate with times of its own."""
        return [
            dict(case=case, system="paged-decode/triton", config=asdict(config), shipped=i == 0)
            | dict(bytes=1, median_s=1e-6 * (9 - i), min_s=1e-6, max_s=1e-5)
            for case in wanted
            for i, config in enumerate(list(tune.candidates(case, coarse))[:9])
        ]

    monkeypatch.setattr(tune, "run", run)
    tune.main(["--cases", "1 x 4096", "--coarse"])
    stored = json.loads((tmp_path / "tune_triton.json").read_text())
    assert {"benchmark", "command", "date", "device", "versions", "records"} == set(stored)
    assert stored["device"] == "a card" and "jax" in stored["versions"]
    first = capsys.readouterr().out
    tune.main(["--summary"])
    shown = capsys.readouterr().out
    assert shown == first and shown.startswith("1 x 4096") and "shipped" in shown


def test_nothing_measured_stores_nothing(tune, monkeypatch, tmp_path):
    monkeypatch.setattr(tune, "run", lambda *_: [])
    with pytest.raises(SystemExit, match="nothing was measured"):
        tune.main(["--cases", "no such case"])
    assert list(tmp_path.iterdir()) == []
