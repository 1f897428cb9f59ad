"""The page pool: which page is free, and how many owners every other one has."""

from collections.abc import Sequence
from typing import Generic, NamedTuple, SupportsIndex, TypeVar

import numpy as np

from .arguments import as_count
from .companions import Companions
from .errors import OutOfPages, PageTableError
from .eviction import CachedPage, Queued
from .prefix import CachedPages, CacheEntry, PrefixCache
from .tails import Tail

__all__ = ["PagePool", "Release", "check_pool_size"]

C = TypeVar("C", bound=CachedPages)


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


class Release(NamedTuple):
    """Owners that go: the plan of `PagePool.release`.

    Attributes:
      pages, left: distinct pages, and how many owners each of them has then.
      freed: pages without an owner then, in the order in which they become free.
      retired: what the order of eviction needs of those that stay cached.
    """

    pages: np.ndarray
    left: np.ndarray
    freed: np.ndarray
    retired: list[int] | list[Queued] | list[Tail]

    def owners_of(self, pages: np.ndarray, refs: np.ndarray) -> np.ndarray:
        """How many owners these pages have then, which have `refs` now."""
        then = dict(zip(self.pages.tolist(), self.left.tolist(), strict=True))
        return np.array([then.get(*pair) for pair in zip(pages.tolist(), refs, strict=True)], int)


class PagePool(Generic[C]):
    """N pages of S tokens; page 0, the null page, has an owner for ever and is never handed out.

    What can be refused, or calls a user's code, is a `plan_` or `require`, and changes nothing; the
    other calls cannot fail.

    ```
                take                    publish, release
      free  ------------>  referenced  ------------------>  cached (evictable)
       ^ ^                  |   ^ |                            |      |
       | +---- release -----+   | +-- share (another owner)    |      |
       |                        +------------ share -----------+      |
       +------------------------- take evicts ------------------------+
    ```

    Attributes:
      refs: int32 `[N]`, owners of each page: entries of page tables, and whoever took it raw.
      raw: bool `[N]`, pages handed out by number, outside any sequence.
      number: of its group; the first one, 0, has the tokens.
      tokens: int32 `[N, S]`, the token in every slot, as far as some owner's length reaches; `[N,
        0]` in other groups.
      withdrawn: bool `[N]`, pages whose content may be wrong, until they are taken or published.
      stamps: int64 `[N]`, a new number whenever a page is taken, and when a full one is cut.
    """

    def __init__(self, num_pages: int, page_size: int, cache: C, *, number: int = 0):
        self.cache, self.number = cache, number
        self.page_size = page_size
        self.refs = np.zeros(num_pages, np.int32)
        self.raw = np.zeros(num_pages, bool)
        self.withdrawn = np.zeros(num_pages, bool)
        self.tokens = np.zeros((num_pages, 0 if number else page_size), np.int32)
        self.stamps = np.zeros(num_pages, np.int64)
        self._last_stamp = 0
        self.refs[0], self.raw[0] = 1, True
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

    @property
    def num_available(self) -> int:
        """Pages that can be taken."""
        return self.num_free + self.cache.num_evictable

    def require(self, needed: int) -> None:
        """Raise OutOfPages unless `needed` pages are free or can be evicted; changes nothing."""
        if needed > self.num_available:
            raise OutOfPages(needed, self.num_free, self.cache.num_evictable, self.number)

    def take(self, count: int) -> np.ndarray:
        """int32 `[count]` pages with one owner each: free ones first, then evicted ones.

        The caller has called `require`, so there are enough.
        """
        if (short := count - self.num_free) > 0:
            self._push(np.array(self.cache.evict(short), np.int32))
            self.evicted += short
        pages = self._free[self.num_free - count : self.num_free][::-1].copy()
        self.num_free -= count
        self.refs[pages] = 1
        self.withdrawn[pages] = False
        self.stamp(pages)
        self.taken += count
        self.peak_used = max(self.peak_used, self.num_used)
        return pages

    def stamp(self, pages: np.ndarray) -> None:
        """Mark pages whose content is about to be another one."""
        begin = self._last_stamp + 1
        self._last_stamp += len(pages)  # first: none may be given twice
        self.stamps[pages] = np.arange(begin, begin + len(pages))

    def store(self, pages: np.ndarray, tokens: np.ndarray) -> None:
        """Put the tokens into the slots of these pages, from the first slot on."""
        full, rest = divmod(len(tokens), self.page_size)
        self.tokens[pages[:full]] = tokens[: len(tokens) - rest].reshape(full, self.page_size)
        if rest:
            self.tokens[pages[full], :rest] = tokens[-rest:]

    def share(self, pages: np.ndarray, owners: int = 1) -> None:
        """Give distinct pages more owners; cached pages without owner come back to life."""
        for page in pages[self.refs[pages] == 0].tolist():
            self.cache.eviction.remove(page)
        self.refs[pages] += owners
        self.peak_used = max(self.peak_used, self.num_used)

    def plan_release(
        self, pages: np.ndarray, *, several: bool = False, passed: Sequence[int] = ()
    ) -> Release:
        """Plan to take one owner from each page for every mention of it, in this order.

        Pages of a sequence are given from the last to the first, so a deep page is evicted before
        the shallow ones without which it cannot be found. Pages of `several` may occur again.
        Those `passed` have no owner, and get a place in the order as if they had lost one.
        """
        refs = self.refs
        if passed:
            refs = refs.copy()
            refs[passed] = 1
        left, idle = refs.take(pages) - 1, pages
        if np.count_nonzero(left):
            if several:
                distinct, last, lost = np.unique(pages[::-1], return_index=True, return_counts=True)
                left = refs[distinct] - lost
                pages, idle = distinct, pages[np.sort(len(pages) - 1 - last[left == 0])]
            else:
                idle = pages[left == 0]
        cached = self.cache.published.take(idle)
        if not np.count_nonzero(cached):
            return Release(pages, left, idle, [])
        retired = self.cache.eviction.plan(idle[cached].tolist())
        return Release(pages, left, idle[~cached], retired)

    def release(self, plan: Release) -> None:
        """Carry it out."""
        self.refs[plan.pages] = plan.left
        self._push(plan.freed)
        self.cache.eviction.add(plan.retired)

    def pass_by(self, pages: np.ndarray) -> None:
        """Take one owner from each page for every mention of it, who goes on without it.

        Those without an owner then are free, or go before all other cached ones.
        """
        distinct = list(dict.fromkeys(pages.tolist()))
        if len(distinct) == len(pages):
            self.refs[pages] -= 1
        else:
            np.subtract.at(self.refs, pages, 1)
            pages = np.array(distinct, np.int32)
        idle = pages[self.refs.take(pages) == 0]
        if idle.size:
            cached = self.cache.published.take(idle)
            self._push(idle[~cached])
            self.cache.pass_by(idle[cached])

    def publish(
        self: "PagePool[PrefixCache]",
        page: int,
        digest: bytes,
        parent: int | bytes,
        depth: int = 0,
    ) -> CacheEntry:
        """Make a full page findable, or return the entry that already stands for its content.

        An entry of the same digest that is not equal is out of date (its parent was evicted and
        computed anew) or a collision; the newer page takes its place.
        """
        found = self.cache.index.get(digest)
        if found is not None:
            equal = np.array_equal(self.tokens[found.page], self.tokens[page])
            if equal and found.parent == parent:
                return found
        past = None if found is None else self.unpublish(found.page)
        self.withdrawn[page] = False
        return self.cache.add(page, digest, parent, depth, past)

    def publish_each(
        self: "PagePool[PrefixCache]",
        pages: Sequence[int],
        digests: Sequence[bytes],
        parents: Sequence[int | bytes],
        depths: Sequence[int],
    ) -> list[CacheEntry]:
        """`publish` of many, of which none is the parent of another."""
        if self._are_new(digests):
            self.withdrawn[pages] = False
            return self.cache.add_each(pages, digests, parents, depths)
        each = zip(pages, digests, parents, depths, strict=True)
        return [self.publish(*one) for one in each]

    def publish_chain(
        self: "PagePool[PrefixCache]",
        pages: Sequence[int],
        digests: Sequence[bytes],
        parent: int | bytes,
        depth: int,
    ) -> list[CacheEntry]:
        """`publish` of many, each of which is the parent of the next."""
        depths = range(depth, depth + len(pages))
        if self._are_new(digests):
            serial = self.cache.next_serial
            parents = [parent, *range(serial, serial + len(pages) - 1)][: len(pages)]
            return self.publish_each(pages, digests, parents, depths)
        entries: list[CacheEntry] = []
        for page, digest, at in zip(pages, digests, depths, strict=True):
            entries.append(self.publish(page, digest, parent, at))
            parent = entries[-1].serial
        return entries

    def _are_new(self: "PagePool[PrefixCache]", digests: Sequence[bytes]) -> bool:
        known = self.cache.index.keys()
        return len(set(digests)) == len(digests) and known.isdisjoint(digests)

    def unpublish(self, page: int) -> CachedPage | None:
        """Make a published page unfindable; without an owner it becomes free."""
        if self.refs[page] == 0:
            self.cache.eviction.remove(page)
            self._push(np.array([page], np.int32))
        return self.cache.forget(page)

    def attach_each(
        self: "PagePool[Companions]",
        pages: list[int],
        entries: list[CacheEntry],
        depths: Sequence[int],
    ) -> None:
        """Publish full pages as companions of entries that have none."""
        self.withdrawn[pages] = False
        self.cache.attach_each(pages, entries, depths)

    def drop(self: "PagePool[Companions]", entry: CacheEntry) -> None:
        """Make the companion of an entry unfindable, and forget that a branch ends there."""
        if page := self.cache.page_of(entry):
            self.unpublish(page)
        self.cache.eviction.branches.pop(entry.serial, None)

    def withdraw(self, pages: np.ndarray) -> None:
        """Take pages out of the cache because what they hold may be wrong."""
        self.withdrawn[pages] = True
        for page in pages[self.cache.published[pages]].tolist():
            self.unpublish(page)

    def take_raw(self, count: int) -> list[int]:
        """Take pages outside any sequence; the caller has called `require`."""
        pages = self.take(count)
        self.raw[pages] = True
        return pages.tolist()

    def plan_raw_release(self, pages: np.ndarray, base: int) -> Release:
        """Plan to give raw pages back; the null page among them is padding and is skipped.

        `base` is what users call page 0."""
        pages = pages[pages != 0]
        if len(set(pages.tolist())) != len(pages):
            raise ValueError(f"pages must name each page once, got {(pages + base).tolist()}")
        if not self.raw[pages].all():
            raise PageTableError(
                f"pages {(pages[~self.raw[pages]] + base).tolist()} were not handed out by "
                "allocate_pages, or were freed already; nothing was freed"
            )
        return self.plan_release(pages[::-1])

    def release_raw(self, plan: Release) -> None:
        """Carry it out."""
        self.raw[plan.pages] = False
        self.release(plan)

    def clear_cache(self: "PagePool[PrefixCache]") -> None:
        """Forget every published page: first those without an owner, in the order of eviction."""
        self._push(np.fromiter(self.cache.clear(), np.int32))

    def repair(self, owners: np.ndarray) -> None:
        """Count all anew from what cannot be torn: the rows that hold each page `[N]`, and `raw`.

        A cached page without an owner that is not in the order of eviction is forgotten: nobody
        can be asked for its rank now.
        """
        self.raw[owners > 0] = False  # an import had given it to a sequence
        self.raw[0] = True
        self.refs[:] = owners + self.raw
        idle = self.refs == 0
        self.cache.repair(~self.raw & ~self.withdrawn, idle)
        free = np.flatnonzero(idle & ~self.cache.published)
        listed = list(dict.fromkeys(self.free_pages[np.isin(self.free_pages, free)].tolist()))
        free = np.concatenate([np.setdiff1d(free, listed)[::-1], np.array(listed, np.int32)])
        self._free[: len(free)] = free
        self.num_free = len(free)
        self.peak_used = max(self.peak_used, self.num_used)

    def _push(self, pages: np.ndarray) -> None:
        self._free[self.num_free : self.num_free + len(pages)] = pages
        self.num_free += len(pages)
