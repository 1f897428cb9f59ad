"""Which pages of another group go with entries of the first group's prefix cache."""

from collections.abc import Sequence

import numpy as np

from .prefix import CachedPages, CacheEntry, PrefixCache
from .tails import TailQueue

__all__ = ["Companions"]


class Companions(CachedPages[TailQueue]):
    """Serial number of an entry to the page of this group that goes with it, its *companion*.

    No digest and no tokens: serials are never used twice, and the entry proves every token from the
    start. An entry that is forgotten takes its companion along.

    Attributes:
      pages: the companions, by the serial number of their live entries.
      serials: int64 `[N]`, with which entry each published page goes.
    """

    def __init__(self, num_pages: int, leader: PrefixCache, group: int = 1):
        super().__init__(num_pages, TailQueue(num_pages, leader.rank, group))
        self.leader = leader
        self.pages: dict[int, int] = {}
        self.serials = np.zeros(num_pages, np.int64)

    def page_of(self, entry: CacheEntry) -> int:
        """The companion of an entry; 0 if it has none."""
        return self.pages.get(entry.serial, 0)

    def attach_each(
        self, pages: list[int], entries: list[CacheEntry], depths: Sequence[int]
    ) -> None:
        """Let distinct pages that have owners go with live entries that have no companions."""
        serials = [entry.serial for entry in entries]
        self.pages.update(zip(serials, pages, strict=True))
        self.serials[pages], self.eviction.depths[pages] = serials, depths
        self.eviction.name(pages, [entry.digest for entry in entries])
        self.published[pages] = True
        self.eviction.inherit(pages, self.leader.eviction, [entry.page for entry in entries])

    def pass_by(self, pages: np.ndarray) -> None:
        self.eviction.pass_by(pages.tolist(), self.serials[pages].tolist())

    def repair(self, allowed: np.ndarray, idle: np.ndarray) -> None:
        """As of the leader, which was repaired before."""
        live = {entry.serial for entry in self.leader.by_page.values()}
        kept = {
            serial: page
            for serial, page in self.pages.items()
            if serial in live
            and self.serials[page] == serial
            and self.published[page]
            and allowed[page]
            and self.eviction.has(page, idle=bool(idle[page]))
        }
        published = np.zeros_like(self.published)
        published[list(kept.values())] = True
        self.eviction.repair(set(kept.values()), {page for page in kept.values() if idle[page]})
        branches = self.eviction.branches
        self.eviction.branches = {each: branches[each] for each in branches if each in live}
        self.pages, self.published = kept, published

    def _forget(self, pages: list[int]) -> None:
        for serial in self.serials[pages].tolist():
            del self.pages[serial]
        self.published[pages] = False
        self.eviction.forget(pages)
