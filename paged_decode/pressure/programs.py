"""What a plan takes of a device, as cost models are asked for it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..engine import EngineConfig
from ..engine.records import Decode, Prefill
from .costs import Program

__all__ = ["decode_program", "prefill_program"]


def prefill_program(plan: Prefill, config: EngineConfig, windows: Sequence[int] = ()) -> Program:
    """The program of a plan; `windows` are those of the groups of layers that have one."""
    tokens = context = pairs = longest = 0
    for chunk in plan.chunks:
        count = len(chunk.tokens)
        tokens, context = tokens + count, context + chunk.begin
        pairs += count * chunk.begin + count * (count + 1) // 2
        longest = max(longest, chunk.begin + count)
    seen = tuple(sum(min(chunk.begin, window) for chunk in plan.chunks) for window in windows)
    rows = 1 if plan.scored else config.prefill_rows
    return Program("prefill", rows, plan.width, tokens, context, seen, pairs, longest)


def decode_program(plan: Decode, config: EngineConfig, windows: Sequence[int] = ()) -> Program:
    """The same for a plan of decode steps, its copies of pages left out."""
    count, budgets = len(plan.slots), plan.budgets.astype(np.int64)
    size = next(size for size in config.row_buckets if size >= count)
    # A row of n tokens reads n, n + 1, ... of them in its steps.
    context = _read(plan.context, budgets)
    seen = tuple(_read(plan.context, budgets, window) for window in windows)
    steps, tokens = int(budgets.max()), int(budgets.sum())
    longest = int((plan.context * budgets).max())
    return Program("decode", size, steps, tokens, context, seen, context, longest)


def _read(context: np.ndarray, steps: np.ndarray, window: int | None = None) -> int:
    """Tokens that rows of so many read in so many steps each, of the newest `window` alone."""
    short = steps if window is None else (window - context).clip(0, steps)
    read = short * context + short * (short - 1) // 2
    return int((read if window is None else read + (steps - short) * window).sum())
