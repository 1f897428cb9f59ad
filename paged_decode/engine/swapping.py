"""The host tier of an engine: the scheduler says which pages, the runner has the cache."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from ..allocator import BlockAllocator, Handle, ShardedAllocator
from ..tiers import CacheHolder, HostTier

__all__ = ["Swapping", "TierSwapping"]


@runtime_checkable
class Swapping(Protocol):
    """A host tier, as the scheduler uses it."""

    def settle(self) -> None: ...
    def store(self, handle: Any) -> int: ...
    def load(self, handle: Any) -> int: ...
    def forget(self, handle: Any) -> None: ...


class TierSwapping:
    """Copies are launched at once, in the order of the programs around them."""

    def __init__(
        self, tier: HostTier, allocator: BlockAllocator | ShardedAllocator, holder: CacheHolder
    ):
        if not isinstance(allocator, BlockAllocator):
            raise NotImplementedError("a host tier serves one pool, not one split over a data axis")
        self._tier, self._allocator, self._holder = tier, allocator, holder

    def settle(self) -> None:
        """Let what was copied out be found."""
        self._tier.settle()

    def store(self, handle: Handle) -> int:
        """Begin to copy a sequence out; how many of its pages the tier has then."""
        return self._tier.store(self._holder.cache, self._allocator, handle)

    def load(self, handle: Handle) -> int:
        """Bring back and commit what there is of a sequence; how many pages."""
        if not self._tier.num_pages and self._tier.disk is None:
            return 0  # without the cache, for which the programs in flight would be waited for
        before = self._tier.stats.loaded
        self._tier.load_into(self._holder, self._allocator, handle)
        return self._tier.stats.loaded - before

    def forget(self, handle: Handle) -> None:
        """The pages of a sequence may be wrong."""
        self._tier.forget(self._allocator, handle)
