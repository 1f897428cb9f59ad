"""Seeds that the engine draws."""

from __future__ import annotations

import secrets

import pytest

from paged_decode import SamplingParams

from ..tiny import make_engine

PROMPT = [5, 9, 2, 7]
DRAWN = SamplingParams(max_new_tokens=9, temperature=2.0, seed=None)


@pytest.fixture
def drawn(monkeypatch):
    """The seeds that are drawn next: the largest, so that a second sample has 0."""
    seeds = [2**32 - 1, 17, 4]
    monkeypatch.setattr(secrets, "randbits", lambda bits: seeds.pop(0) if bits == 32 else None)
    return seeds


def seeds_of(engine) -> list[tuple[int, int, int | None]]:
    samples = (*engine.scheduler.running, *engine.scheduler.waiting)
    every = [s for first in samples for s in (first, *first.siblings)]
    return sorted((s.request_id, s.index, s.sampling.seed) for s in every)


def test_a_request_without_a_seed_gets_one_and_its_samples_those_behind_it(drawn):
    engine = make_engine()
    engine.submit(PROMPT, DRAWN, n=2)
    engine.submit(PROMPT, DRAWN)
    assert seeds_of(engine) == [(0, 0, 2**32 - 1), (0, 1, 0), (1, 0, 17)] and drawn == [4]


def test_equal_prompts_differ_and_a_seed_that_was_drawn_gives_its_tokens_again(drawn):
    engine = make_engine()
    first, second = engine.generate([PROMPT] * 2, DRAWN)
    assert first.tokens != second.tokens
    named = [SamplingParams(max_new_tokens=9, temperature=2.0, seed=s) for s in (2**32 - 1, 17)]
    assert [c.tokens for c in engine.generate([PROMPT] * 2, named)] == [first.tokens, second.tokens]
    assert SamplingParams().seed == 0


def test_a_fork_draws_its_own_and_a_snapshot_has_what_was_drawn(drawn, tmp_path):
    engine = make_engine(decode_steps=2)
    parent = engine.submit(PROMPT, DRAWN)
    events = []
    while not events:
        events += engine.step()
    engine.fork(parent, DRAWN)
    want = [(0, 0, 2**32 - 1), (1, 0, 17)]
    assert seeds_of(engine) == want
    engine.save(tmp_path / "s")
    assert (tmp_path / "s").read_bytes()[8] == 1
    again = make_engine(decode_steps=2)
    again.restore(tmp_path / "s")
    assert seeds_of(again) == want and drawn == [4]


def test_a_seed_is_none_or_a_number():
    with pytest.raises(ValueError, match="seed must be from 0"):
        SamplingParams(seed=-1)
