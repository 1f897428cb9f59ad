"""How long a device program takes: from first principles, or from measured programs."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from ._values import as_number, as_whole

__all__ = ["CostModel", "HostCosts", "Measured", "Program", "Roofline"]


@dataclass(frozen=True, slots=True)
class Program:
    """One run of one device program.

    Attributes:
      kind: "prefill", "decode", "copy" (within the pool), "store" or "load" (to and from the host).
      rows: compiled rows, for copies of any kind pages.
      width: compiled tokens per row; for decode, steps that were needed.
      tokens: tokens computed, padding left out.
      context_tokens: cached tokens read, summed over rows and steps, by layers that see all.
      window_tokens: the same for each group of layers with a window, which reads no more than that.
      pairs: queries times the tokens that each sees, summed over rows.
      longest: of the row for which it is most: the tokens that it has at the end of a chunk; for
        decode, those at its first step times its steps.
    """

    kind: str
    rows: int
    width: int
    tokens: int
    context_tokens: int
    window_tokens: tuple[int, ...] = ()
    pairs: int = 0
    longest: int = 0


@runtime_checkable
class CostModel(Protocol):
    """Seconds for a program."""

    def seconds(self, program: Program) -> float:
        """How long the device takes for it."""
        ...


@runtime_checkable
class HostCosts(Protocol):
    """What a cost model may have besides: the host's time; without it the host takes none."""

    def host_seconds(self, work: str, size: int) -> float:
        """How long the host takes for one piece of work.

        Args:
          work: "submit" takes a prompt in; "prefill" and "decode" plan a program; "launch" is from
            there until an idle device begins; "read" gets what a visit has generated and hands it
            out, up to the next visit.
          size: tokens of the prompt or of the program; for decode, rows; for read, tokens; for
            launch, 0.
        """
        ...


@dataclass(frozen=True, slots=True)
class Roofline:
    """The slower of memory and arithmetic, and a launch for every step.

    Attributes:
      weight_bytes: read once per step.
      kv_bytes_per_token: keys and values of all layers; of those without a window, if there are
        `window_bytes_per_token`.
      flops_per_token: twice the number of weights, as a rule.
      bandwidth_bytes: per second.
      flops: per second.
      launch_seconds: per step.
      page_size: for copies of pages.
      link_bytes: per second between device and host, one way; PCIe 5 with 16 lanes has about 5e10.
      window_bytes_per_token: keys and values of each group of layers with a window, in their order.

    Raises:
      ValueError: a value is not finite, negative, or 0 where something is divided by it; page_size
        is less than 1.
    """

    weight_bytes: float
    kv_bytes_per_token: float
    flops_per_token: float
    bandwidth_bytes: float
    flops: float
    launch_seconds: float
    page_size: int = 16
    link_bytes: float = 5e10
    window_bytes_per_token: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for name in ("bandwidth_bytes", "flops", "link_bytes"):
            as_number(name, getattr(self, name))
        for name in ("weight_bytes", "kv_bytes_per_token", "flops_per_token", "launch_seconds"):
            as_number(name, getattr(self, name), zero=True)
        for value in self.window_bytes_per_token:
            as_number("each of window_bytes_per_token", value, zero=True)
        as_whole("page_size", self.page_size, 1)

    def seconds(self, program: Program) -> float:
        """Bytes over bandwidth or operations over `flops`, whichever is more, and the launches."""
        if program.kind in ("copy", "store", "load"):
            num_bytes = program.rows * self.page_size * self.kv_bytes_per_token
            within = program.kind == "copy"
            busy = 2 * num_bytes / self.bandwidth_bytes if within else num_bytes / self.link_bytes
            return self.launch_seconds + busy
        steps = program.width if program.kind == "decode" else 1
        read = program.tokens + program.context_tokens
        num_bytes = steps * self.weight_bytes + read * self.kv_bytes_per_token
        for tokens, per_token in zip(
            program.window_tokens, self.window_bytes_per_token, strict=False
        ):
            num_bytes += (program.tokens + tokens) * per_token
        work = program.tokens * self.flops_per_token
        busy = max(num_bytes / self.bandwidth_bytes, work / self.flops)
        return steps * self.launch_seconds + busy

    def recompute_seconds(self, tokens: int) -> float:
        """Prefilling that many tokens in one program."""
        return self.seconds(Program("prefill", 1, tokens, tokens, 0))

    def swap_seconds(self, tokens: int) -> float:
        """Copying their keys and values to the host and back."""
        return 2 * (self.launch_seconds + tokens * self.kv_bytes_per_token / self.link_bytes)

    def crossover_link_bytes(self, tokens: int) -> float:
        """Link bandwidth in bytes per second above which swap beats recompute; inf if none."""
        budget = self.recompute_seconds(tokens) / 2 - self.launch_seconds
        return tokens * self.kv_bytes_per_token / budget if budget > 0 else float("inf")


@dataclass(frozen=True, slots=True)
class Measured:
    """Mean seconds per compiled shape; an engine has few of them.

    The mean, because a run adds them up. A number of steps, or of pages to copy, that was not
    measured lies on the line between those that were.

    Examples:
      >>> program = Program("decode", 4, 8, 32, 100)
      >>> Measured.fit([(program, 0.25), (program, 0.75)]).seconds(program)
      0.5
    """

    means: Mapping[tuple[str, int, int], float]

    @classmethod
    def fit(cls, timings: Iterable[tuple[Program, float]]) -> Measured:
        """Calibrate from programs and how long each took, as `ProgramTimer` notes them.

        Raises:
          ValueError: there are none, or a time is not finite or negative.
        """
        by_shape: dict[tuple[str, int, int], list[float]] = {}
        for program, seconds in timings:
            shape = program.kind, program.rows, program.width
            by_shape.setdefault(shape, []).append(as_number(f"time of {shape}", seconds, zero=True))
        if not by_shape:
            raise ValueError("expected timings of programs, got none: run some after ProgramTimer")
        return cls({shape: statistics.fmean(times) for shape, times in by_shape.items()})

    def seconds(self, program: Program) -> float:
        """The mean for this shape, or what its neighbours say; see the class."""
        shape = program.kind, program.rows, program.width
        if shape in self.means:
            return self.means[shape]
        # Of kind, rows and width: which one is the same, and which one there is a line over.
        for fixed, free, at in ((1, 2, program.width), (2, 1, program.rows)):
            line = sorted(
                (known[free], seconds)
                for known, seconds in self.means.items()
                if known[0] == shape[0] and known[fixed] == shape[fixed]
            )
            if line:
                places, times = np.array(line).T
                return float(np.interp(at, places, times))
        raise ValueError(f"no program like {shape} was measured, only {list(self.means)}")
