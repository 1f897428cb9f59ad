"""The choice between the two GPU kernels, held to what was measured."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_the_dispatch_takes_the_faster_of_two_kernels_or_one_that_is_hardly_slower(monkeypatch):
    """It knows shapes, not lengths: what one long row among short ones costs is bounded."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    tables = importlib.import_module("_attention_tables")
    cases: dict[str, dict[str, float]] = {}
    taken: dict[str, str] = {}
    for record in json.loads((BENCHMARKS / "results" / "tails.json").read_text())["records"]:
        case, system = record["case"], record["system"]
        if system in ("paged-decode/triton", "paged-decode/pallas_gpu"):
            name = str(sorted(case.items()))
            cases.setdefault(name, {})[system] = record["median_s"]
            ours = "pallas_gpu" if tables.takes_pallas_gpu(case) else "triton"
            taken[name] = f"paged-decode/{ours}"
    slower = [found[taken[name]] / min(found.values()) for name, found in cases.items()]
    assert len(slower) == 20 and len(set(taken.values())) == 2
    assert max(slower) < 1.2 and sum(each > 1 for each in slower) == 1
