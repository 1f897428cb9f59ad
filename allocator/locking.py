"""One lock per allocator, taken by every public call."""

import functools
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

__all__ = ["atomic", "changing"]


S = TypeVar("S", bound=Any)
P = ParamSpec("P")
R = TypeVar("R")


def atomic(method: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """Run the method under the lock of its object, so no thread sees half a change."""

    @functools.wraps(method)
    def locked(self: S, *args: P.args, **kwargs: P.kwargs) -> R:
        with self._lock:
            return method(self, *args, **kwargs)

    return locked


def changing(method: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """The same for one that changes it, or asks a user's digest: never within another such call."""

    @functools.wraps(method)
    def locked(self: S, *args: P.args, **kwargs: P.kwargs) -> R:
        with self._lock:
            if self._is_changing:
                raise RuntimeError(
                    "an eviction rank or a digest must not change the allocator that asks it"
                )
            self._is_changing = True
            try:
                return method(self, *args, **kwargs)
            finally:
                self._is_changing = False

    return locked
