"""Device time of GPU calls, whichever framework makes them, with a cold L2.

Every sample is: read 256 MB (a flush that writes would leave dirty lines, which are written back
while the kernel reads), wait, call, wait. CUPTI records all kernels of the process; those between
two flushes are one sample, and its time is how long at least one of them ran. What the host does
in between is in no figure. Systems take turns, so that a drift of the card meets all alike.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch.profiler import ProfilerActivity, profile

__all__ = ["Timer"]


@triton.jit
def read_all_of_it(x, out, n, BLOCK: tl.constexpr, ROUND: tl.constexpr):
    """Read n numbers and store a sum that never comes out."""
    total = tl.zeros([BLOCK], tl.int32)
    step = tl.num_programs(0) * BLOCK
    for i in tl.range(tl.program_id(0) * BLOCK, n, step * ROUND):
        for j in tl.static_range(ROUND):
            at = i.to(tl.int64) + j * step + tl.arange(0, BLOCK)
            total += tl.load(x + at, mask=at < n, other=0)
    if tl.sum(total, 0) == 123456789:
        tl.store(out, 1)


class Timer:
    """Times calls; `samples` rounds of all of them, the first of which is not counted."""

    def __init__(self, samples: int = 8):
        self.samples = samples
        self.buffer = torch.randint(0, 1000, (2**26,), dtype=torch.int32, device="cuda")
        self.sum = torch.zeros(1, dtype=torch.int32, device="cuda")
        self.read(self.buffer)  # compiled now: importing jax-triton unsets Triton's cache

    def read(self, x: torch.Tensor) -> None:
        """Read every number of an int32 array once."""
        kernel: Any = read_all_of_it
        kernel[(132 * 8,)](x, self.sum, x.numel(), BLOCK=4096, ROUND=2, num_warps=8)

    def time_reads(self, x: torch.Tensor) -> list[float]:
        """Seconds of reading an array of 256 MB and more, which flushes for the next time."""
        with profile(activities=[ProfilerActivity.CUDA]) as run:
            for _ in range(self.samples):
                self.read(x)
                torch.cuda.synchronize()
        return [(end - start) * 1e-9 for start, end, _ in _kernels(run)][1:]

    def time(self, calls: dict[str, Callable[[], Any]]) -> dict[str, list[float]]:
        """Seconds of every sample of every call; each call returns when the device has ended."""
        with profile(activities=[ProfilerActivity.CUDA]) as run:
            for _ in range(self.samples):
                for call in calls.values():
                    self.read(self.buffer)
                    torch.cuda.synchronize()
                    call()
                    torch.cuda.synchronize()
            self.read(self.buffer)
            torch.cuda.synchronize()
        groups: list[list[tuple[int, int]]] = []
        for start, end, name in _kernels(run):
            if name.startswith("read_all_of_it"):
                groups.append([])
            elif groups:
                groups[-1].append((start, end))
        wanted = self.samples * len(calls) + 1
        if len(groups) != wanted or not all(groups[:-1]):
            empty = sum(not group for group in groups[:-1])
            raise RuntimeError(
                f"{len(groups)} flushes for {wanted}, {empty} samples without kernels"
            )
        names = list(calls)
        times: dict[str, list[float]] = {name: [] for name in names}
        for i, group in enumerate(groups[:-1]):
            if i >= len(names):
                times[names[i % len(names)]].append(_covered(group) * 1e-9)
        return times


def _kernels(run: profile) -> list[tuple[int, int, str]]:
    """Start, end (nanoseconds from the first) and name of all that ran on the card."""
    events = [
        event
        for event in run.profiler.kineto_results.events()
        if event.device_type() == torch.autograd.DeviceType.CUDA
    ]
    first = min((event.start_ns() for event in events), default=0)
    return sorted(
        (event.start_ns() - first, event.start_ns() - first + event.duration_ns(), event.name())
        for event in events
    )


def _covered(spans: list[tuple[int, int]]) -> int:
    """Nanoseconds in which at least one kernel ran."""
    total, reached = 0, 0
    for start, end in spans:
        total += max(end - max(start, reached), 0)
        reached = max(reached, end)
    return total
