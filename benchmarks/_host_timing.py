"""Times of calls by the clock of the host, where no card has one."""

import time
from collections.abc import Callable
from typing import Any

__all__ = ["host_clock"]

ROUNDS = 5


def host_clock(calls: dict[str, Callable[[], Any]]) -> dict[str, list[float]]:
    """Seconds of some rounds of all calls, as `_gpu_timing.Timer.time` gives those of a device."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - begin)
    return times
