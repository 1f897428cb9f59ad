"""The page pool: which page is free, and how many owners every other one has."""

from typing import SupportsIndex

import numpy as np

from .arguments import as_count
from .errors import OutOfPages, PageTableError
from .prefix import CacheEntry, PrefixCache

__all__ = ["PagePool", "check_pool_size"]


def check_pool_size(num_pages: SupportsIndex, page_size: SupportsIndex) -> tuple[int, int]:
    """Both as ints, or an error that names the one that cannot be."""
    num_pages, page_size = as_count("num_pages", num_pages), as_count("page_size", page_size, 1)
    if num_pages < 2:
        raise ValueError(f"num_pages must be at least 2 (page 0 is the null page), got {num_pages}")
    if page_size & (page_size - 1):
        raise ValueError(f"page_size must be a power of two, got {page_size}")
    if num_pages * page_size > 2**31:
        raise ValueError(
            f"num_pages * page_size must be at most 2**31 = {2**31}, so that slots fit int32; "
            f"got {num_pages} * {page_size} = {num_pages * page_size}"
        )
    return num_pages, page_size


class PagePool:
    """N pages of S tokens; page 0, the null page, is pinned for ever and never handed out.

    ```
                take                    publish, release
      free  ------------>  referenced  ------------------>  cached (evictable)
       ^ ^                  |   ^ |                            |      |
       | +---- release -----+   | +-- share (another owner)    |      |
       |                        +------------ share -----------+      |
       +------------------------- take evicts ------------------------+
    ```

    Attributes:
      refs: int32 `[N]`, owners of each page: entries of page tables, plus pins.
      pinned: bool `[N]`, pages handed out by number, outside any sequence.
      tokens: int32 `[N, S]`, the token in every slot, as far as some owner's length reaches.
      stamps: int64 `[N]`, a new number whenever a page is taken, and when a full one is cut.
    """

    def __init__(self, num_pages: int, page_size: int, cache: PrefixCache):
        self.cache = cache
        self.page_size = page_size
        self.refs = np.zeros(num_pages, np.int32)
        self.pinned = np.zeros(num_pages, bool)
        self.tokens = np.zeros((num_pages, page_size), np.int32)
        self.stamps = np.zeros(num_pages, np.int64)
        self._last_stamp = 0
        self.refs[0], self.pinned[0] = 1, True
        # A stack: the first pages taken are 1, 2, 3, and a page freed last is taken first.
        self._free = np.arange(num_pages - 1, -1, -1, dtype=np.int32)
        self.num_free = num_pages - 1
        self.taken = self.evicted = self.copied = self.peak_used = 0

    @property
    def usable(self) -> int:
        """Pages there are, without the null page."""
        return len(self.refs) - 1

    def pages_for(self, num_tokens: int) -> int:
        """Pages that hold so many tokens."""
        return -(-num_tokens // self.page_size)

    @property
    def num_used(self) -> int:
        """Pages that have an owner."""
        return self.usable - self.num_free - self.cache.num_evictable

    @property
    def free_pages(self) -> np.ndarray:
        """int32 `[F]`: the free pages, the next one to be taken last."""
        return self._free[: self.num_free]

    def require(self, needed: int) -> None:
        """Raise OutOfPages unless `needed` pages are free or can be evicted; changes nothing."""
        if needed > self.num_free + self.cache.num_evictable:
            raise OutOfPages(needed, self.num_free, self.cache.num_evictable)

    def take(self, count: int) -> np.ndarray:
        """int32 `[count]` pages with one owner each: free ones first, then evicted ones.

        The caller has called `require`, so there are enough.
        """
        evicted: list[int] = []
        try:
            while self.num_free + len(evicted) < count:
                evicted.append(self.cache.evict())
        finally:  # if the policy fails, what it gave up before is free
            self._push(np.array(evicted, np.int32))
            self.evicted += len(evicted)
        pages = self._free[self.num_free - count : self.num_free][::-1].copy()
        self.num_free -= count
        self.refs[pages] = 1
        self.stamp(pages)
        self.taken += count
        self.peak_used = max(self.peak_used, self.num_used)
        return pages

    def stamp(self, pages: np.ndarray) -> None:
        """Mark pages whose content is about to be another one."""
        self.stamps[pages] = np.arange(self._last_stamp + 1, self._last_stamp + 1 + len(pages))
        self._last_stamp += len(pages)

    def store(self, pages: np.ndarray, tokens: np.ndarray) -> None:
        """Put the tokens into the slots of these pages, from the first slot on."""
        slots = pages[:, None] * self.page_size + np.arange(self.page_size)
        self.tokens.reshape(-1)[slots.reshape(-1)[: len(tokens)]] = tokens

    def share(self, pages: np.ndarray, owners: int = 1) -> None:
        """Give distinct pages more owners; cached pages without owner come back to life."""
        for page in pages[self.refs[pages] == 0].tolist():
            self.cache.revive(page)
        self.refs[pages] += owners
        self.peak_used = max(self.peak_used, self.num_used)

    def release(self, pages: np.ndarray) -> None:
        """Take one owner from each of the distinct pages, given in the order of a sequence.

        They are let go from the last to the first, so a deep page is evicted before the shallow
        ones without which it cannot be found.
        """
        pages = pages[::-1]
        self.refs[pages] -= 1
        idle = pages[self.refs[pages] == 0]
        cached = self.cache.published[idle]
        self._push(idle[~cached])
        for page in idle[cached].tolist():
            self.cache.retire(page)

    def publish(self, page: int, digest: bytes, parent: int | bytes, depth: int = 0) -> CacheEntry:
        """Make a full page findable, or return the entry that already stands for its content.

        An entry of the same digest that is not equal is out of date (its parent was evicted and
        computed anew) or a collision; the newer page takes its place.
        """
        found = self.cache.index.get(digest)
        if found is not None:
            equal = np.array_equal(self.tokens[found.page], self.tokens[page])
            if equal and found.parent == parent:
                return found
            self.unpublish(found.page)
        replaces = None if found is None else found.page
        return self.cache.add(page, digest, parent, depth, replaces)

    def unpublish(self, page: int) -> None:
        """Make a published page unfindable; without an owner it becomes free."""
        if self.refs[page] == 0:
            self.cache.revive(page)
            self._push(np.array([page], np.int32))
        self.cache.forget(page)

    def pin(self, count: int) -> list[int]:
        """Take pages outside any sequence."""
        self.require(count)
        pages = self.take(count)
        self.pinned[pages] = True
        return pages.tolist()

    def unpin(self, pages: np.ndarray) -> None:
        """Give pinned pages back; the null page among them is padding and is skipped."""
        pages = pages[pages != 0]
        if pages.size and (pages.min() < 0 or pages.max() > self.usable):
            bad = pages[(pages < 0) | (pages > self.usable)][0]
            raise ValueError(f"pages must be page ids from 0 to {self.usable}, got {bad}")
        if len(set(pages.tolist())) != len(pages):
            raise ValueError(f"pages must name each page once, got {pages.tolist()}")
        if not self.pinned[pages].all():
            raise PageTableError(
                f"pages {pages[~self.pinned[pages]].tolist()} were not handed out by "
                "allocate_pages, or were freed already; nothing was freed"
            )
        self.pinned[pages] = False
        self.release(pages)

    def clear_cache(self) -> None:
        """Forget every published page: first those without an owner, in the order of eviction."""
        while self.cache.num_evictable:
            self._push(np.array([self.cache.evict()], np.int32))
        for page in list(self.cache.by_page):
            self.unpublish(page)

    def _push(self, pages: np.ndarray) -> None:
        self._free[self.num_free : self.num_free + len(pages)] = pages
        self.num_free += len(pages)
