"""The least time of a decode step: bytes over bandwidth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import SupportsIndex

from ..allocator.arguments import as_count
from .layouts import Plan

__all__ = ["CARDS", "Card", "DecodeStep", "decode_step"]


@dataclass(frozen=True, slots=True)
class Card:
    """What its maker's data sheet says of a device's memory.

    Attributes:
      memory_bytes: how large it is.
      bandwidth_bytes: per second; what a kernel can read is a few percent less.
    """

    memory_bytes: int
    bandwidth_bytes: float


CARDS = {
    "a100": Card(80 * 10**9, 2.039e12),  # SXM, 80 GB
    "h100": Card(80 * 10**9, 3.35e12),  # SXM
    "h200": Card(141 * 10**9, 4.8e12),
    "b200": Card(180 * 10**9, 8.0e12),  # one of eight in a DGX
    "v5e": Card(16 * 10**9, 819e9),
    "v5p": Card(95 * 10**9, 2765e9),
    "v6e": Card(32 * 10**9, 1638e9),
}
"""The devices that `paged-decode plan --card` knows by name."""


@dataclass(frozen=True, slots=True)
class DecodeStep:
    """One token more for every row, at the roofline of the memory.

    Attributes:
      rows: B, over all devices.
      length: tokens of each row.
      weights_bytes, kv_bytes: that each device reads.
      seconds: the least that this takes.
    """

    rows: int
    length: int
    weights_bytes: int
    kv_bytes: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Of all rows."""
        return self.rows / self.seconds


def decode_step(
    plan: Plan,
    *,
    weights_bytes: SupportsIndex,
    bandwidth_bytes: float,
    length: SupportsIndex | None = None,
) -> DecodeStep:
    """The roofline of a decode step of all rows of a plan.

    Each device reads its part of the weights, and of each of its rows the keys and values that the
    newest token sees: all of them in full layers, those of the window in others. The weights are
    split like the heads; shards of rows have copies.

    Args:
      plan: whose rows and devices.
      weights_bytes: that a step reads, over all devices: not the table of an embedding that is not
        the output's, too, nor experts that no row asks.
      bandwidth_bytes: of one device's memory, per second.
      length: tokens of each row, the newest one included; None: the plan's context.

    Raises:
      ValueError: the length is more than the plan's context, or the bandwidth not positive.
    """
    tokens = as_count("length", plan.context if length is None else length, 1, plan.context)
    if not 0 < bandwidth_bytes < float("inf"):
        raise ValueError(f"bandwidth_bytes must be bytes per second, got {bandwidth_bytes}")
    weights = -(-as_count("weights_bytes", weights_bytes) // plan.head_shards)
    rows = -(-plan.rows // plan.data_shards)
    seen = (
        token_bytes * min(tokens, group.window or tokens)
        for group, token_bytes in zip(plan.layout.groups, plan.token_bytes, strict=True)
    )
    kv = rows * sum(seen)
    return DecodeStep(plan.rows, tokens, weights, kv, (weights + kv) / bandwidth_bytes)
