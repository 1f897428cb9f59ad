"""The figures of a report, against a model of a few lines, and what is no figure at all."""

import csv
import json
from itertools import pairwise

import numpy as np
import pytest

from paged_decode import BlockAllocator, EngineConfig
from paged_decode.pressure import Measured, Program, Request, Roofline, poisson, run, simulate

from ..tiny import VOCAB, make_engine
from .test_simulate import CONFIG, PerKind, request


def strict(path):
    return json.loads(path.read_text(), parse_constant=lambda word: pytest.fail(word))


class One:
    """A second for every token of a prompt, and for every step."""

    def seconds(self, program: Program) -> float:
        return float(program.tokens if program.kind == "prefill" else program.width)


def queue_of_one(work):
    """Seconds of arrival, first token and end, if one request after another has the engine."""
    free = 0.0
    for each in work:
        start = max(free, each.arrival_seconds) + each.prompt_tokens - 1
        free = start + each.output_tokens
        yield each.arrival_seconds, start + 1, free


def test_times_and_rates_are_those_of_a_queue_with_one_row():
    rng = np.random.default_rng(3)
    arrivals = np.cumsum(rng.integers(0, 40, 30)).astype(float).tolist()
    lengths = rng.integers(1, 20, (30, 2)).tolist()
    work = [
        Request(arrivals[i], (i,), prompt, prompt, output)
        for i, (prompt, output) in enumerate(lengths)
    ]
    config = EngineConfig(max_rows=1, decode_steps=1, prefill_chunk=32)
    report = simulate(work, BlockAllocator(20, 2), One(), config=config)
    wanted = list(queue_of_one(work))
    got = [(r.arrival_seconds, r.first_seconds, r.end_seconds) for r in report.records]
    assert got == wanted

    figures, seconds = report.figures, wanted[-1][2]
    assert figures["seconds"] == seconds
    output = sum(r.output_tokens for r in work)
    assert figures["output_tokens_per_second"] == pytest.approx(output / seconds)
    first = [f - a for a, f, _ in wanted]
    gaps = [
        (e - f) / (r.output_tokens - 1)
        for (_, f, e), r in zip(wanted, work, strict=True)
        if r.output_tokens > 1
    ]
    for percent in (50, 90, 99):
        assert figures[f"ttft_seconds_p{percent}"] == pytest.approx(np.percentile(first, percent))
        assert figures[f"per_token_seconds_p{percent}"] == pytest.approx(
            np.percentile(gaps, percent)
        )
    assert report.ttft_quantiles()[::50] == pytest.approx(np.percentile(first, [0, 50, 100]))
    good = sum(f <= 30.0 for f in first)
    assert 0 < good < 30 and report.goodput(30.0, 1.0) == pytest.approx(good / seconds)
    assert report.goodput(30.0, 0.5) == pytest.approx(
        sum(f <= 30 and r.output_tokens == 1 for f, r in zip(first, work, strict=True)) / seconds
    )


def test_a_pool_that_waits_for_a_request_is_not_in_use():
    # 3 of 8 pages for 12 tokens, of 11 + 2 seconds; then nothing for 87 seconds; then the same.
    work = [Request(at, (i,), 12, 12, 1) for i, at in enumerate((0.0, 100.0))]
    config = EngineConfig(max_rows=1, decode_steps=1, prefill_chunk=32)
    allocator = BlockAllocator(9, 4, prefix_cache=False)
    report = simulate(work, allocator, One(), config=config)
    assert report.figures["seconds"] == 112
    assert report.figures["utilisation"] < 0.1


def test_pages_are_in_use_until_they_are_freed_whenever_the_host_looks():
    # One request after another holds 63 of 64 pages for the 1000 s of its prompt and its token.
    work = [Request(1001.0 * i, (i,), 1000, 1000, 1) for i in range(5)]
    config = EngineConfig(max_rows=1, decode_steps=1, prefill_chunk=1000)
    allocator = BlockAllocator(65, 16, prefix_cache=False)
    figures = simulate(work, allocator, One(), config=config).figures
    assert figures["utilisation"] == pytest.approx(63 / 64 * 1000 / 1001, rel=1e-3)
    # The slots without a token are those of the newest page: 1000 tokens, or 999 of them.
    assert figures["tail_waste"] == pytest.approx(1 - 1000 / 63 / 16, abs=1e-3)


def test_tail_waste_is_a_mean_over_time_and_not_that_of_the_beginning():
    # One token and then 240: of ever more pages, one is not full when a visit has been read.
    work, config = [Request(0.0, (0,), 1, 1, 240)], EngineConfig(max_rows=1, decode_steps=8)
    figures = simulate(work, BlockAllocator(33, 16), One(), config=config).figures
    assert 0.05 < figures["tail_waste"] < 0.3


def test_requests_are_counted_by_how_they_ended():
    work = [request(0.0, range(9), 1), request(0.0, [1], 90), request(0.0, [1], 4)]
    report = simulate(work, BlockAllocator(9, 4), PerKind(), config=CONFIG)
    assert [r.ending for r in report.records] == ["too long", "capacity", "length"]
    names = ("requests", "finished", "too_long", "outgrown", "max_sequence_tokens")
    assert [report.figures[n] for n in names] == [3, 1, 1, 1, 32]
    assert [r.request_id for r in report.unfit] == [0, 1]
    # Only prompts that were looked up count: 8 tokens, the third of which finds the second's.
    assert report.figures["hit_rate"] == pytest.approx(report.records[2].hit_tokens / 8)


@pytest.mark.parametrize("work", [[], [request(0.0, range(9), 1)], [request(3.0, range(9), 1)]])
def test_where_there_is_no_value_there_is_none_and_json_is_json(tmp_path, work):
    report = simulate(work, BlockAllocator(9, 4), PerKind(), config=CONFIG)
    assert report.figures["ttft_seconds_p90"] is report.figures["hit_rate"] is None
    assert report.goodput(1.0, 1.0) == 0 and report.ttft_quantiles() == []
    report.write(tmp_path)
    figures = strict(tmp_path / "report.json")
    assert figures["ttft_seconds_p90"] is None and figures["too_long"] == len(work)
    with open(tmp_path / "requests.csv") as file:
        assert [row["ending"] for row in csv.DictReader(file)] == ["too long"] * len(work)


@pytest.mark.parametrize("visits", [40, 800])
def test_the_timeline_is_the_state_over_time_in_a_bounded_number_of_points(visits):
    work = [Request(0.0, (i,), 4, 4, 8) for i in range(visits // 8)]
    report = simulate(work, BlockAllocator(6, 4), PerKind(), config=CONFIG)
    timeline = report.timeline
    seconds = timeline["seconds"]
    assert 5 < len(seconds) <= 513 and all(a <= b for a, b in pairwise(seconds))
    assert seconds[-1] == report.figures["seconds"]
    kinds = (timeline[f"{kind}_pages"] for kind in ("free", "cached", "owned", "shared"))
    assert {sum(each) for each in zip(*kinds, strict=True)} == {5}
    assert timeline["preemptions"][-1] == report.figures["preemptions"] > 0
    assert max(timeline["running"]) == 2 and timeline["waiting"][-1] == 0
    assert sorted(timeline["preemptions"]) == list(timeline["preemptions"])


def test_a_second_run_over_one_engine_reports_itself_alone():
    work = [Request(0.0, (i,), 8, 8, 12) for i in range(6)]
    engine = make_engine(16)
    first = run(engine, work, vocab_size=VOCAB, time_scale=0)
    other = [Request(0.0, (50 + i,), 8, 8, 12) for i in range(6)]
    second = run(engine, other, vocab_size=VOCAB, time_scale=0)
    assert first.figures["preemptions"] > 0
    for name in ("preemptions", "finished", "recompute_tax", "peak_used_pages"):
        assert first.figures[name] == second.figures[name]
    tokens = second.figures["output_tokens_per_second"] * second.figures["seconds"]
    assert tokens == pytest.approx(6 * 12)


def test_a_run_that_fails_takes_its_requests_with_it():
    engine = make_engine(16)
    watched = engine.scheduler.on_admitted
    work = [Request(5.0, (1,), 8, 8, 12), Request(0.0, (2,), 8, 8, 12)]
    with pytest.raises(ValueError, match="order of arrival"):
        run(engine, work, vocab_size=VOCAB, time_scale=0)

    def broken():
        yield Request(0.0, (1,), 8, 8, 12)
        raise OSError("the trace is gone")

    with pytest.raises(OSError):
        run(engine, broken(), vocab_size=VOCAB)
    assert engine.idle and engine.allocator.num_used == 0
    assert engine.scheduler.on_admitted is watched
    report = run(engine, [Request(0.0, (1,), 8, 8, 12)], vocab_size=VOCAB)
    assert report.figures["finished"] == 1


@pytest.mark.parametrize(
    "wrong",
    [dict(time_scale=bad) for bad in (-1, float("nan"), float("inf"), "1")]
    + [dict(queue_rows=bad) for bad in (0, -1, 1.5)]
    + [dict(vocab_size=bad) for bad in (0, -5, 2.5, VOCAB + 1)],
)
def test_a_run_refuses_wrong_options(wrong, unchecked):
    engine = make_engine(16, vocab_size=VOCAB)
    with pytest.raises(ValueError, match=next(iter(wrong))):
        run(engine, [request(0.0, [1], 4)], **wrong)


def test_a_run_needs_an_idle_engine():
    engine = make_engine(16)
    engine.submit([1, 2, 3])
    with pytest.raises(ValueError, match="idle"):
        run(engine, [], vocab_size=VOCAB)


class Seconds:
    def __init__(self, value):
        self.value = value

    def seconds(self, program):
        return self.value


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0, None, "1"])
def test_a_cost_that_is_no_time_is_refused_and_never_ends_the_clock(bad):
    with pytest.raises(ValueError, match="by costs.seconds must be a finite number"):
        simulate([request(0.0, [1], 4)], BlockAllocator(9, 4), Seconds(bad), config=CONFIG)


def test_a_simulation_refuses_what_it_cannot_end_with(unchecked):
    def once(work=(), allocator=None, costs=PerKind(), **options):  # noqa: B008
        return simulate(work, allocator or BlockAllocator(9, 4), costs, config=CONFIG, **options)

    for bad in (0, -1, 1.5):
        with pytest.raises(ValueError, match="queue_rows"):
            once(queue_rows=bad)
    taken = BlockAllocator(9, 4)
    taken.allocate_pages(3)
    with pytest.raises(ValueError, match="3 pages in use"):
        once(allocator=taken)
    with pytest.raises(TypeError, match="seconds"):
        once(costs=5)
    with pytest.raises(ValueError, match="request 1 comes at 1.0 s, after one at 2.0 s"):
        once([request(2.0, [1], 1), request(1.0, [1], 1)])
    with pytest.raises(ValueError, match="must be a Request"):
        once(["a prompt"])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0, "1", True])
def test_a_roofline_and_goals_are_of_finite_numbers(bad, unchecked):
    right = dict(
        weight_bytes=1.0,
        kv_bytes_per_token=1.0,
        flops_per_token=1.0,
        bandwidth_bytes=1.0,
        flops=1.0,
        launch_seconds=0.0,
    )
    Roofline(**right)
    for name in (*right, "link_bytes", "page_size"):
        with pytest.raises(ValueError, match=name):
            Roofline(**right | {name: bad})
    for name in ("bandwidth_bytes", "flops", "link_bytes"):
        with pytest.raises(ValueError, match=name):
            Roofline(**right | {name: 0.0})
    with pytest.raises(ValueError, match="time of"):
        Measured.fit([(Program("decode", 1, 1, 1, 0), bad)])
    report = simulate(poisson(1, 1.0), BlockAllocator(999, 4), PerKind())
    for goals in ((bad, 1.0), (1.0, bad)):
        with pytest.raises(ValueError, match="_seconds must be"):
            report.goodput(*goals)


def test_a_calibration_of_nothing_is_refused():
    with pytest.raises(ValueError, match="got none"):
        Measured.fit([])
