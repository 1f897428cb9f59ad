"""Agents, branching conversations and rollouts: what their distributions promise."""

import numpy as np
import pytest

from paged_decode import BlockAllocator, CacheLayout, EngineConfig, PageSpec
from paged_decode.pressure import Roofline, agents, branches, rollouts, simulate
from paged_decode.pressure._case import read_workload


def test_a_generator_repeats_itself_under_its_seed_only():
    assert agents(9, 2.0, seed=1) == agents(9, 2.0, seed=1) != agents(9, 2.0, seed=2)
    assert branches(9, 2.0, seed=1) == branches(9, 2.0, seed=1) != branches(9, 2.0, seed=2)
    assert rollouts(9, seed=1) == rollouts(9, seed=1) != rollouts(9, seed=2)


def sessions_of(requests, start):
    """Requests by the block behind the first `start`, in order of arrival."""
    found = {}
    for request in requests:
        found.setdefault(request.blocks[start], []).append(request)
    return list(found.values())


def test_an_agent_repeats_all_before_and_adds_what_its_tool_has_said():
    requests = agents(40, 1.0, seed=3, tool_sets=2, system_blocks=5, task_blocks=2)
    sessions = sessions_of(requests, 5)
    assert len(sessions) == 40
    assert len({r.blocks[:5] for r in requests}) == 2
    for turns in sessions:
        assert len(turns[0].blocks) == 7
        for early, late in zip(turns, turns[1:], strict=False):
            assert late.blocks[: len(early.blocks)] == early.blocks
            assert len(late.blocks) > len(early.blocks)
            assert late.arrival_seconds > early.arrival_seconds


def test_agents_follow_the_distributions_that_they_name():
    pauses = dict(pause_chance=0.25, pause_seconds=1000.0)
    requests = agents(1500, 1.0, seed=1, calls=5.0, block_tokens=16, **pauses)
    sessions = sessions_of(requests, 32)
    assert len(requests) / 1500 == pytest.approx(5, rel=0.08)
    pairs = [(a, b) for turns in sessions for a, b in zip(turns, turns[1:], strict=False)]
    grown = np.array([b.prompt_tokens - a.prompt_tokens for a, b in pairs])
    assert np.median(grown) == pytest.approx(512, rel=0.1)
    assert np.log(grown[grown > 512]).std() > 0.4  # a long tail
    gaps = np.array([b.arrival_seconds - a.arrival_seconds for a, b in pairs])
    assert np.median(gaps[gaps < 30]) == pytest.approx(2, rel=0.15)
    assert (gaps > 30).mean() == pytest.approx(0.25, rel=0.1)
    assert np.median([r.output_tokens for r in requests]) == pytest.approx(64, rel=0.1)


def test_a_branch_goes_on_from_a_turn_that_was_there_and_shares_its_trunk():
    requests = branches(300, 1.0, seed=2, turns=6, fork_chance=0.5, turn_blocks=2)
    forks = turns = 0
    for texts in ([r.blocks for r in each] for each in sessions_of(requests, 0)):
        assert len(texts) == 6
        for at, text in enumerate(texts[1:], 1):
            parent = text[:-2]
            assert parent in texts[:at]
            assert text[-1] not in sum(texts[:at], ())
            forks += parent != texts[at - 1]
            turns += at > 1
    assert forks / turns == pytest.approx(0.5, rel=0.1)


def test_without_forks_a_conversation_is_a_chain():
    for each in sessions_of(branches(5, 1.0, fork_chance=0.0), 0):
        for early, late in zip(each, each[1:], strict=False):
            assert late.blocks[:-4] == early.blocks


def test_rollouts_come_at_once_with_lengths_of_their_own_and_a_long_tail():
    requests = rollouts(400, seed=5, samples=4, longest=4000)
    assert {r.arrival_seconds for r in requests} == {0.0}
    assert [r.blocks for r in requests] == [(i,) for i in range(400) for _ in range(4)]
    assert all(len({r.prompt_tokens for r in requests[i : i + 4]}) == 1 for i in (0, 4, 80))
    ends = np.array([r.output_tokens for r in requests])
    assert np.median(ends) == pytest.approx(512, rel=0.1)
    assert np.log(ends[ends < 4000]).std() == pytest.approx(0.95, rel=0.1)
    assert ends.max() == 4000 and 0.005 < (ends == 4000).mean() < 0.05


@pytest.mark.parametrize(
    "make, wrong",
    [
        (agents, dict(seed=-1)),
        (agents, dict(calls=0.5)),
        (agents, dict(tool_sets=0)),
        (agents, dict(system_blocks=0)),
        (agents, dict(sigma=-1.0)),
        (agents, dict(sigma=1e3)),
        (agents, dict(tool_median=0.0)),
        (agents, dict(pause_chance=1.5)),
        (agents, dict(pause_seconds=float("nan"))),
        (branches, dict(seed=0.5)),
        (branches, dict(turns=0)),
        (branches, dict(fork_chance=-0.1)),
        (branches, dict(turn_blocks=0)),
        (branches, dict(think_seconds=float("inf"))),
    ],
)
def test_a_generator_refuses_a_wrong_option(make, wrong, unchecked):
    with pytest.raises(ValueError):
        make(20, 1.0, **wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        dict(seed=-1),
        dict(samples=0),
        dict(prompt_median=0.0),
        dict(prompt_sigma=1e3),
        dict(output_sigma=-1.0),
        dict(longest=0),
    ],
)
def test_rollouts_refuse_a_wrong_option(wrong, unchecked):
    with pytest.raises(ValueError):
        rollouts(20, **wrong)


@pytest.mark.parametrize("word", ["agents", "branches", "rollouts"])
def test_the_command_line_gives_as_many_as_were_asked_for_in_order(word):
    requests = list(read_workload(word, 40, 4.0, 1.0, 7))
    assert len(requests) == 40
    arrivals = [r.arrival_seconds for r in requests]
    assert arrivals == sorted(arrivals)


def test_agents_run_in_a_pool_with_a_group_of_windows():
    groups = (PageSpec((0,), 1, 8, 200), PageSpec((1,), 1, 8, 60, window=32))
    allocator = BlockAllocator(CacheLayout(8, groups), hash_key=b"k")
    costs = Roofline(1e9, 1e3, 1e9, 1e12, 1e14, 1e-5, 8, window_bytes_per_token=(1e3,))
    work = agents(
        4, 2.0, calls=3.0, block_tokens=8, system_blocks=4, tool_median=24.0, output_median=8.0
    )
    config = EngineConfig(max_rows=4, prefill_chunk=32, max_sequence_tokens=1000)
    report = simulate(work, allocator, costs, config=config)
    assert all(r.finished for r in report.records)
    assert report.figures["hit_rate"] > 0.2
    assert 0 < report.figures["peak_used_pages/1"] < report.figures["peak_used_pages"]
    allocator.check_invariants()
