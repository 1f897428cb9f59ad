"""What a save gives, at once or later, and the thread that writes behind the decode loop."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from weakref import WeakValueDictionary

import numpy as np

from .._text import printable
from ..allocator import BlockAllocator

__all__ = ["WRITER", "PendingSnapshot", "Snapshot", "Writer"]


@dataclass(frozen=True, slots=True, eq=False)
class Snapshot:
    """A saved or loaded snapshot: what a later delta names as its parent.

    Attributes:
      path: of the file.
      id: 16 bytes, other for any other content.
      num_pages: pages that it consists of, of all groups of layers; written_pages of them are in
        this file.
    """

    path: Path
    id: bytes
    num_pages: int
    written_pages: int
    _allocator: BlockAllocator
    _stamps: tuple[np.ndarray, ...]  # of every group
    _parents: tuple[str, ...]  # real paths of the files that it is a delta of, the newest first

    def __repr__(self) -> str:
        return (
            f"Snapshot({str(self.path)!r}, {self.id.hex()}, {self.num_pages} pages, "
            f"{self.written_pages} in the file)"
        )


class PendingSnapshot(Future[Snapshot]):
    """A snapshot that a thread writes: a `concurrent.futures.Future` of it, so `done()`,
    `result(timeout)`, `cancel()`, callbacks and `asyncio.wrap_future` are there.

    Attributes:
      path: of the file.
    """

    def __init__(self, path: Path):
        super().__init__()
        self.path = path


class Writer:
    """The thread that writes behind the loop, made at its first file, and what it has to write."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "paged-decode-snapshots", self._begin)
        self._ident: int | None = None
        self._newest: WeakValueDictionary[str, PendingSnapshot] = WeakValueDictionary()
        self._entering = threading.Lock()  # what is about to be entered there may be at work

    def _begin(self) -> None:
        self._ident = threading.get_ident()

    def submit(self, path: Path, write: Callable[[], Snapshot]) -> PendingSnapshot:
        """Let the thread call `write`, behind everything that was submitted before."""
        pending = PendingSnapshot(path)
        with self._entering:
            self._thread.submit(_run, pending, write)  # may raise: then nobody waits for it
            self._newest[os.path.realpath(path)] = pending
        return pending

    def wait_for(self, path: str | os.PathLike[str]) -> None:
        """Return when everything that was submitted for the path is written, or has failed.

        Raises:
          RuntimeError: the writing thread itself would wait for what it has yet to write.
        """
        with self._entering:
            newest = self._newest.get(os.path.realpath(path))
        if newest is None or wait([newest], timeout=0).done:
            return
        if threading.get_ident() == self._ident:
            raise RuntimeError(
                f"{printable(path)} is yet to be written by this thread; use save_snapshot_async "
                "in a callback"
            )
        wait([newest])  # a cancelled one too: it gets its turn behind those before it


def _run(pending: PendingSnapshot, write: Callable[[], Snapshot]) -> None:
    if not pending.set_running_or_notify_cancel():
        return
    try:
        snapshot = write()
    except BaseException as error:  # whatever it is, whoever waits is told
        pending.set_exception(error)
    else:
        pending.set_result(snapshot)


# One for the process, whatever is saved: a file is named by its path alone, and two threads that
# write one path would not keep the order of the calls. It has no thread before its first file.
WRITER = Writer()
