"""One lock per allocator, taken by every public call; and what became of a call that was torn."""

import copy
import functools
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, Concatenate, ParamSpec, TypeVar

from .bookkeeping import Bookkeeping
from .repair import repair

__all__ = ["Guard", "atomic", "changing"]


S = TypeVar("S", bound=Any)
P = ParamSpec("P")
R = TypeVar("R")


class Guard:
    """The lock of an allocator and of the views of its shards, and the changing call under way.

    Attributes:
      call: the frame of that call. It stays here when the call was torn: ended by what is not an
        ordinary error, a KeyboardInterrupt for one, which may come between any two lines.
    """

    def __init__(self, shards: tuple[Bookkeeping, ...]) -> None:
        self._shards = shards
        self.lock = threading.RLock()
        self.call: FrameType | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "Guard":
        """A lock of its own for a copy of the shards, of which no call is under way."""
        return Guard(copy.deepcopy(self._shards, memo))

    def under_way(self) -> bool:
        """Whether that call is one that we are within; if not it was torn, and is repaired."""
        frame: FrameType | None = sys._getframe()
        while frame is not None:
            if frame is self.call:
                return True
            frame = frame.f_back
        for books in self._shards:
            repair(books)
        self.call = None  # not before: a repair that is torn is begun again
        return False


def atomic(method: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """Run the method under the lock of its object, so no thread sees half a change."""

    @functools.wraps(method)
    def locked(self: S, *args: P.args, **kwargs: P.kwargs) -> R:
        guard: Guard = self._guard
        with guard.lock:
            if guard.call is not None:
                guard.under_way()
            return method(self, *args, **kwargs)

    return locked


def changing(method: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """The same for one that changes it, or asks a user's digest: never within another such call.

    An ordinary error comes from a plan, and nothing has changed. After anything else, such as a
    KeyboardInterrupt, the next call repairs what this one left: for every sequence it has happened
    or not, though reserved and cached pages may be gone. What it would have returned is lost, so
    sequences of a growing call (`append`, `advance`, `extend`, `prepare`, `reserve`) or of `batch`
    are to be freed: their page copies were not made, their tokens not computed.
    """

    @functools.wraps(method)
    def locked(self: S, *args: P.args, **kwargs: P.kwargs) -> R:
        guard: Guard = self._guard
        with guard.lock:
            if guard.call is not None and guard.under_way():
                raise RuntimeError(
                    "an eviction rank or a digest must not change the allocator that asks it"
                )
            guard.call = sys._getframe()
            try:
                result = method(self, *args, **kwargs)
            except (MemoryError, RecursionError):
                raise  # these may come from anywhere
            except Exception:
                guard.call = None
                raise
            guard.call = None
            return result

    return locked
