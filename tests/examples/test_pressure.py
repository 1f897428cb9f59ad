"""The real model in a pool that is too small for it."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

from paged_decode import SamplingParams
from paged_decode.faults import FaultPlan, Faults
from paged_decode.policies import LeastComputed, Recompute, Swap
from paged_decode.tiers import HostTier

EXAMPLE = Path(__file__).parents[2] / "examples" / "pressure.py"
GOLDEN = json.loads((Path(__file__).parents[1] / "golden/smollm2_greedy.json").read_text())["cases"]


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_greedy_tokens_under_any_pressure_equal_those_with_ample_memory(real_gguf):
    make_engine = runpy.run_path(str(EXAMPLE))["make_engine"]
    longest = max(len(c["prompt_ids"]) for c in GOLDEN) + 64
    pages = -(-longest // 16) + 4  # one at its full length, and a little of another
    for policies, plan in (
        (dict(preemption=Recompute(), victim=LeastComputed()), FaultPlan()),
        (dict(preemption=Swap(), tier=HostTier(64)), FaultPlan()),
        (
            dict(preemption=Swap(), tier=HostTier(12)),
            FaultPlan(seed=1, allocation_rate=0.1, copy_rate=0.2, preempt_every=5),
        ),
    ):
        engine = make_engine(pages, gguf=real_gguf, **policies)
        Faults(plan).install(engine)
        done = engine.generate([c["prompt_ids"] for c in GOLDEN], SamplingParams(max_new_tokens=64))
        assert [list(c.tokens) for c in done] == [c["greedy_ids"] for c in GOLDEN]
        assert engine.stats.preemptions > 0
        engine.allocator.check_invariants()
        assert engine.allocator.num_used == 0
