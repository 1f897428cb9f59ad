"""Which cached page is given up first when the free ones are used up."""

from collections import OrderedDict
from collections.abc import Iterator
from typing import Protocol, runtime_checkable

__all__ = ["LRU", "CacheWatcher", "EvictionPolicy"]


@runtime_checkable
class EvictionPolicy(Protocol):
    """Which unreferenced cached page is given up first. Pages are plain ints, each there once."""

    def add(self, page: int) -> None:
        """The page has just lost its last owner. Of one sequence, deeper pages come first."""
        ...

    def remove(self, page: int) -> None:
        """The page has an owner again, or is no longer cached."""
        ...

    def pop(self) -> int:
        """Choose a page, forget it and return it; called only while there is one."""
        ...


@runtime_checkable
class CacheWatcher(Protocol):
    """What an eviction policy may have in addition, to know what enters and leaves the cache."""

    def publish(self, page: int, depth: int, replaces: int | None = None) -> None:
        """The page entered the cache; `depth` pages of its sequence come before it.

        `replaces` is the page forgotten just before, if it held the same digest.
        """
        ...

    def forget(self, page: int) -> None:
        """The page left the cache."""
        ...


class LRU:
    """Give up the page that has been without an owner for longest.

    Example:
      >>> policy = LRU()
      >>> policy.add(3); policy.add(5); policy.pop()
      3
    """

    def __init__(self) -> None:
        self._pages: OrderedDict[int, None] = OrderedDict()

    def add(self, page: int) -> None:
        self._pages[page] = None

    def remove(self, page: int) -> None:
        del self._pages[page]

    def pop(self) -> int:
        return self._pages.popitem(last=False)[0]

    def __iter__(self) -> Iterator[int]:
        return iter(self._pages)

    def __len__(self) -> int:
        return len(self._pages)

    def __contains__(self, page: object) -> bool:
        return page in self._pages
