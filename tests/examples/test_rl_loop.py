"""The loop in plain JAX learns, and its two sides agree on every log-probability."""

from __future__ import annotations

from importlib import import_module


def test_the_loop_learns_to_count_on_log_probabilities_that_agree_with_the_trainers():
    rewards, furthest = import_module("rl_loop").learn(48, tell=lambda line: None)
    assert rewards[0] < 0.3 and sum(rewards[-4:]) / 4 > 0.9
    assert furthest < 1e-4
