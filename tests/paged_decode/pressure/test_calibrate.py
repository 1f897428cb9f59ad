"""Cost models that were fitted: their terms, their file, and the engine that they come from."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from paged_decode import BlockAllocator, CacheLayout, EngineConfig, PageSpec, SamplingParams
from paged_decode.engine.drafting import PromptLookup
from paged_decode.policies import Cheaper
from paged_decode.pressure import Program, calibrate, poisson, simulate
from paged_decode.pressure.costs import CostModel, HostCosts
from paged_decode.pressure.fitted import HOST_WORK, Fitted, fit_line, fit_program
from paged_decode.tiers import HostTier

from ..tiny import DIM, KV_HEADS, VOCAB, every_token, make_engine

CHUNKS = [(16, 0), (16, 64), (8, 0), (8, 640), (16, 256)]  # tokens, and those before them


def chunk(count, begin):
    pairs = count * begin + count * (count + 1) // 2
    return Program("prefill", 2, 16, count, begin, (), pairs, begin + count)


def test_terms_that_made_the_times_are_found_again():
    timings = [(p := chunk(*each), 1e-3 + 2e-5 * p.tokens + 3e-7 * p.pairs) for each in CHUNKS]
    fit = fit_program(timings, 8)
    assert fit[:3] == ("prefill", 2, 16) and fit.points == 5
    np.testing.assert_allclose(fit.factors, (1e-3, 2e-5, 3e-7, 0), rtol=1e-6, atol=1e-15)
    assert fit.max_residual < 1e-6
    assert fit.seconds(chunk(4, 100)) == pytest.approx(1e-3 + 8e-5 + 3e-7 * 410)


def test_no_term_is_negative_and_what_it_cannot_tell_is_in_the_residuals():
    timings = [(chunk(16, begin), seconds) for begin, seconds in ((0, 2.0), (64, 1.0), (256, 2.0))]
    fit = fit_program(timings, 8)
    assert min(fit.factors) >= 0
    assert 0.2 < fit.mean_residual < fit.max_residual < 0.7
    with pytest.raises(ValueError, match="one shape"):
        fit_program([*timings, (Program("copy", 1, 1, 0, 0), 1.0)], 8)


def test_a_slow_moment_of_the_host_is_no_part_of_its_line():
    points = [(size, 1e-3 + 1e-6 * size) for size in (1, 10, 100) for _ in range(5)]
    line = fit_line([*points, (10, 1.0), (100, 2.0)])
    assert (line.base, line.each) == pytest.approx((1e-3, 1e-6))
    assert line.points == 17 and 0.1 < line.mean_residual < line.max_residual < 1


@pytest.fixture(scope="module")
def engine_and_costs():
    engine = make_engine(64, vocab_size=VOCAB, row_buckets=(1, 4))
    engine.warmup()
    told = []
    return engine, calibrate(engine, progress=told.append), told


def test_calibration_measures_every_program_and_the_host(engine_and_costs):
    engine, costs, told = engine_and_costs
    config = engine.config
    shapes = {("decode", rows, w) for rows in config.row_buckets for w in (config.decode_steps, 0)}
    shapes |= {("prefill", 2, width) for width in config.chunk_buckets} | {("copy", 0, 1)}
    assert set(costs.programs) == shapes and set(costs.host) == set(HOST_WORK)
    assert isinstance(costs, CostModel) and isinstance(costs, HostCosts)
    some = Program("decode", 1, 1, 1, 9, (), 9, 9)
    assert all(fit.seconds(some) > 0 for fit in costs.programs.values())
    assert costs.host_seconds("decode", 4) > 0 and costs.host_seconds("submit", 9) > 0
    about = costs.about
    assert about["card"] and "weights" in about["model"] and "jax" in about["versions"]
    assert told[0] == "decode, 1 rows" and told[-1] == "the host"


def test_a_calibrated_engine_is_as_it_was(engine_and_costs):
    engine, _, _ = engine_and_costs
    assert engine.idle and engine.allocator.num_used == 0
    programs = engine.stats.programs
    prompts, sampling = [[1, 2, 3, 4, 5], [7, 8]], SamplingParams(max_new_tokens=9)
    fresh = make_engine(64, vocab_size=VOCAB, row_buckets=(1, 4))
    expected = [c.tokens for c in fresh.generate(prompts, sampling)]
    assert [c.tokens for c in engine.generate(prompts, sampling)] == expected
    assert engine.stats.programs == programs


def test_a_simulation_runs_on_costs_and_their_file_holds_all_of_them(engine_and_costs, tmp_path):
    engine, costs, _ = engine_and_costs
    costs.write(tmp_path / "costs.json")
    again = Fitted.read(tmp_path / "costs.json")
    assert again == costs
    work = poisson(20, 50.0, prompt_median=12.0, output_median=6.0, sigma=0.5)
    reports = [
        simulate(work, BlockAllocator(64, 4, hash_key=b"k"), each, config=engine.config)
        for each in (costs, again)
    ]
    assert reports[0] == reports[1] and reports[0].figures["finished"] == 20
    with pytest.raises(ValueError, match="prefill of 1 rows and width 128"):
        simulate(work, BlockAllocator(64, 4), costs, config=EngineConfig(max_rows=2))


def test_copies_of_a_tier_and_every_window_are_measured_and_chunks_among_decodes(monkeypatch):
    monkeypatch.setattr(sys.modules[calibrate.__module__], "_gets_hot", lambda engine: True)
    tier = HostTier(32, buckets=(1, 4))
    engine = make_engine(64, vocab_size=VOCAB, policies=dict(tier=tier))
    engine.warmup()
    costs = calibrate(engine)
    assert {kind for kind, _, _ in costs.programs} == {"decode", "prefill", "copy", "store", "load"}
    assert costs.swap_seconds(8) > 0 and isinstance(
        Cheaper(costs).swaps(SimpleNamespace(computed=8)), bool
    )
    kinds = dict(num_kv_heads=KV_HEADS, head_dim=DIM)
    groups = PageSpec((0,), num_pages=64, **kinds), PageSpec((1,), num_pages=40, window=8, **kinds)
    engine = make_engine(layout=CacheLayout(4, groups), vocab_size=VOCAB)
    engine.warmup()
    costs = calibrate(engine)
    assert {len(f.factors) for (kind, *_), f in costs.programs.items() if kind != "copy"} == {5}
    work = poisson(5, 50.0, prompt_median=12.0, output_median=6.0, sigma=0.5)
    report = simulate(work, BlockAllocator(CacheLayout(4, groups)), costs, config=engine.config)
    assert report.figures["finished"] == 5


def test_recompute_takes_the_chunks_and_swap_needs_a_tier_to_be_measured(engine_and_costs):
    _, costs, _ = engine_and_costs
    chunk = costs.sizes["prefill_chunk"]
    assert 0 < costs.recompute_seconds(chunk) < costs.recompute_seconds(20 * chunk)
    with pytest.raises(ValueError, match="host tier"):
        Cheaper(costs).swaps(SimpleNamespace(computed=8))


@pytest.mark.parametrize(
    "change, why",
    [
        (lambda value: value.update(form="other"), "form"),
        (lambda value: value["programs"][0].update(factors=[-1]), "a factor must be"),
        (lambda value: value["host"].pop("read"), "'read' is missing"),
        (lambda value: value["engine"].update(max_rows=0), "max_rows must be"),
        (lambda value: value["programs"][0].update(kind="other"), "unknown kind"),
        (lambda value: value["programs"][0]["factors"].pop(), "expected 2 factors of every copy"),
        (lambda value: [each.update(factors=[]) for each in value["programs"]], "expected 2 fac"),
        (lambda value: value["programs"].append(value["programs"][0]), "every shape .* once"),
        (lambda value: value["programs"].pop(0), "no decode program of 1 rows and width"),
        (lambda value: value.update(programs=[]), "no decode program of 1 rows"),
        (lambda value: value["engine"].update(decode_steps=64), "no decode program of 1 rows"),
        (lambda value: value["engine"].update(row_buckets=[3, 2]), "row_buckets"),
        (lambda value: value["programs"][0].update(points=0), "points must be"),
        (lambda value: value["programs"][0].update(mean_residual=9.0), "above max_residual"),
    ],
)
def test_a_file_that_is_none_is_named_with_what_is_wrong(engine_and_costs, tmp_path, change, why):
    path = tmp_path / "costs.json"
    engine_and_costs[1].write(path)
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))
    with pytest.raises(ValueError, match=f"costs.json has no calibrated costs: .*{why}"):
        Fitted.read(path)


def test_what_cannot_be_measured_is_refused():
    engine = make_engine(16, vocab_size=VOCAB)
    engine.submit([1, 2], SamplingParams(max_new_tokens=2))
    with pytest.raises(ValueError, match="idle"):
        calibrate(engine)
    with pytest.raises(ValueError, match="vocab_size"):
        calibrate(make_engine(16))
    drafts = make_engine(fn=every_token, policies=dict(drafter=PromptLookup(2)), vocab_size=VOCAB)
    with pytest.raises(NotImplementedError, match="drafter"):
        calibrate(drafts)
