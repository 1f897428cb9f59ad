"""Ctrl-C between any two lines of a step: the engine goes on with the same tokens."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import paged_decode
from paged_decode import SamplingParams
from paged_decode.tiers import HostTier

from ..tiny import dense_greedy, fail_decode, make_engine, prompts

ROOT = Path(paged_decode.__file__).parent
ROOMS = {str(ROOT), str(ROOT.parent / "allocator"), str(ROOT / "allocator")}
ASKED = prompts(5, seed=3, low=6, high=14)
NEW = 9


class Planted:
    """Raises KeyboardInterrupt before the n-th line of the package that this thread executes."""

    def __init__(self, at: int):
        self.left, self.raised = at, False

    def __enter__(self) -> Planted:
        sys.settrace(self._call)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def _call(self, frame, event, arg):
        inside = any(frame.f_code.co_filename.startswith(room) for room in ROOMS)
        return self._line if inside and not self.raised else None

    def _line(self, frame, event, arg):
        if event == "line" and not self.raised:
            self.left -= 1
            if self.left < 0:
                self.raised = True
                sys.settrace(None)
                raise KeyboardInterrupt
        return self._line


@pytest.fixture(scope="module")
def expected():
    return [dense_greedy(prompt, NEW) for prompt in ASKED]


def life(at: int, tier: bool) -> tuple[bool, list[tuple], int]:
    """A crowded engine that is interrupted once; whether it was, its events, lines of a step."""
    engine = make_engine(13, policies=dict(tier=HostTier(32) if tier else None))
    outside = engine.allocator.allocate([60, 60, 60])
    for place, prompt in enumerate(ASKED):
        engine.submit(prompt, SamplingParams(max_new_tokens=NEW), n=1 + (place == 1))
    events, planted = [], Planted(at)
    with planted:
        try:
            while not engine.idle:
                events += engine.step()
        except KeyboardInterrupt:
            pass
    engine.allocator.check_invariants()
    for _ in range(300):
        if engine.idle:
            break
        events += engine.step()
    assert engine.idle, f"never idle after an interrupt at line {at}"
    engine.allocator.check_invariants()
    assert engine.allocator.tokens(outside).tolist() == [60, 60, 60]
    engine.allocator.free(outside)
    assert engine.allocator.num_used == 0, f"pages leak after an interrupt at line {at}"
    return planted.raised, events, at - planted.left


def check(events, expected, at):
    for place, want in enumerate(expected):
        for sample in range(1 + (place == 1)):
            own = [e for e in events if (e.request_id, e.sample) == (place, sample)]
            assert [e.index for e in own] == list(range(NEW)), f"events after line {at}"
            assert tuple(e.token for e in own) == want, f"tokens after line {at}"


@pytest.mark.parametrize("tier", [pytest.param(False, marks=pytest.mark.long), True])
def test_a_step_that_is_interrupted_anywhere_goes_on_with_the_same_tokens(
    expected, tier, unchecked
):
    """Some forty of the lines that a life takes, of the package and of its allocator."""
    raised, _, lines = life(10**9, tier)
    assert not raised and lines > 5000
    for at in range(7 + tier, lines * 9 // 10, lines // 40):
        raised, events, _ = life(at, tier)
        assert raised
        check(events, expected, at)


def test_sequences_of_others_survive_an_interrupt_after_a_sample_did_not_fit():
    engine = make_engine(14)
    for prompt in prompts(3, seed=3, low=14, high=14):
        engine.submit(prompt, SamplingParams(max_new_tokens=10))
    for _ in range(3):
        engine.step()  # at the last it is not even tried
    assert engine.num_waiting and len(engine.scheduler.running) == 2
    outside = engine.allocator.allocate([1, 2])
    fail_decode(engine, {0}, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    list(engine.stream())
    assert engine.allocator.tokens(outside).tolist() == [1, 2]
    engine.allocator.check_invariants()


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("tier", [False, True])
def test_many_lines_of_a_life_may_be_interrupted(expected, tier, unchecked):
    _, _, lines = life(10**9, tier)
    for at in range(3, lines, lines // 150):
        _, events, _ = life(at, tier)
        check(events, expected, at)
