"""Whose turn it is: calls for one thread at a time, and those that any thread may make."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

__all__ = ["Turn", "refuse_copy"]


def refuse_copy(self: Any) -> NoReturn:
    """What `copy` and `pickle` are told: every step donates the cache, so there is but one."""
    raise TypeError(
        f"an {type(self).__name__} cannot be copied or pickled: save it, and restore the file "
        "into another one; its allocator can be copied with copy.deepcopy"
    )


class Turn:
    """A lock that refuses a second thread, instead of letting it wait for a visit."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._owner: int | None = None  # the thread in a call that is for one thread at a time

    @contextmanager
    def alone(self) -> Iterator[None]:
        """For one thread at a time; what `between` does is short, and waited for.

        Raises:
          RuntimeError: another thread is in such a call.
        """
        me, owner = threading.get_ident(), self._owner
        if owner not in (None, me):
            raise RuntimeError(
                "another thread is in a call of this engine: one thread at a time may step, fork, "
                "save or restore; submit, cancel, pin and unpin are for all"
            )
        with self._lock:
            self._owner = me
            try:
                yield
            finally:
                self._owner = owner

    @contextmanager
    def between(self) -> Iterator[bool]:
        """Whether no other thread is in a call; if so, none will be meanwhile."""
        free = self._owner in (None, threading.get_ident()) and self._lock.acquire(blocking=False)
        try:
            yield free
        finally:
            if free:
                self._lock.release()
