"""Cards that are processes: each runs the kernel of `DeviceSum` on memory that they share."""

import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.shared_memory import SharedMemory
from typing import Any

import numpy as np

from . import worker

__all__ = ["Cards"]


class Cards:
    """Processes that interpret, and a workspace for each, as `DeviceSum` lays it out."""

    def __init__(self, count: int):
        self.count = count
        # Fresh processes, not forks: this one may have imported triton as a compiler.
        self._pools = [
            ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), worker.start)
            for _ in range(count)
        ]

    def close(self) -> None:
        for pool in self._pools:
            pool.shutdown()

    def run(
        self,
        parts: np.ndarray,
        launches: list[dict[str, Any]],
        constants: dict[str, Any],
        *,
        absent: tuple[int, ...] = (),
    ) -> tuple[list[list[np.ndarray]], list[np.ndarray]]:
        """What each card made of every launch, and the workspaces in the end.

        parts is `[cards, rows, width]`; each launch has `residual`, `weight`, `eps` and, for a card
        that comes late, `late`. Cards that are absent launch nothing.
        """
        rows, width = parts.shape[1:]
        bits = np.dtype(f"uint{8 * parts.itemsize}")
        numbers = constants["PLACES"] * self.count * constants["ROWS"] * width
        size = constants["HEAD"] + numbers * bits.itemsize
        spaces = [SharedMemory(create=True, size=size) for _ in range(self.count)]
        try:
            for space in spaces:
                _bytes(space)[:] = 0
                _bytes(space)[constants["HEAD"] :].view(bits)[:] = 1 << (8 * bits.itemsize - 1)
            names = [space.name for space in spaces]
            waits = [
                pool.submit(_launches, card, names, parts[card], launches, constants)
                for card, pool in enumerate(self._pools)
                if card not in absent
            ]
            outs = [wait.result() for wait in waits]
            ends = [_bytes(space).copy() for space in spaces]
        finally:
            for space in spaces:
                space.close()
                space.unlink()
        return outs, ends


def _bytes(space: SharedMemory) -> np.ndarray:
    """All that it has, which a system rounds up to its own pages."""
    buffer: Any = space.buf
    return np.frombuffer(buffer, np.uint8)


def _launches(
    card: int,
    names: list[str],
    part: np.ndarray,
    launches: list[dict[str, Any]],
    constants: dict[str, Any],
) -> list[np.ndarray]:
    """Every launch of one card: the sum and the norm `[2, rows, width]` of each."""
    from paged_decode.kernels.triton.device_sum import device_sum_kernel

    spaces = [SharedMemory(name) for name in names]
    views = [_bytes(space) for space in spaces]
    around = [views[(card + i) % len(views)].ctypes.data for i in range(len(views))]
    addresses = np.array([*around, card], np.int64).view(np.int32).reshape(-1, 2)
    pointer, found = worker._Pointer, []
    for launch in launches:
        if launch.get("late") == card:
            time.sleep(0.2)
        part_now = part * launch.get("times", 1)
        made = [np.full_like(part_now, np.nan) for _ in range(2)]
        inputs = [part_now, addresses, launch["residual"], launch["weight"]]
        kernel: Any = device_sum_kernel
        kernel[(len(part),)](*map(pointer, inputs), launch["eps"], *map(pointer, made), **constants)
        found.append(np.stack(made))
    del views
    for space in spaces:
        space.close()
    return found
