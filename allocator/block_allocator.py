"""The block allocator: sequences of tokens, mapped to pages of one pool."""

from collections.abc import Sequence
from typing import SupportsIndex

import numpy as np

from .arguments import Ints, as_count, as_ints
from .bookkeeping import Bookkeeping
from .calls import AllocatorCalls
from .copying import plan_cancel_copy, plan_commit_copy, plan_prepare_copy
from .eviction import EvictionRank
from .layout import CacheLayout, pools_of, small_of
from .locking import atomic, changing
from .prefix import Digest, PrefixCache
from .rows import Handle, as_handles
from .state import AllocatorState
from .transfer import StatePages, collect_state

__all__ = ["BlockAllocator"]


class BlockAllocator(AllocatorCalls):
    """Maps sequences to the pages of a pool of N pages with S tokens each. Host only, no jax.

    Page 0 is the null page: counted in `num_pages`, never handed out. Every call is
    all-or-nothing: if it raises an ordinary error, nothing has changed; what an interrupt tore is
    repaired by the next call. Wherever `handles` are taken, one handle or a sequence of B distinct
    handles will do. The same calls give the same page ids.

    Each call is atomic under a lock, but a decode step is several calls and a device program:
    let one thread drive an allocator.

    Args:
      num_pages: N, at least 2; `num_pages * page_size` is at most 2**31, so slots fit int32. Or a
        `CacheLayout` of several groups of layers, without `page_size`: pages, copies and batches
        are then those of every group, and what is said of one pool is so of the first group's.
      page_size: S, a power of two.
      prefix_cache: keep committed full pages findable, by their tokens, until evicted.
      hash_key: up to 64 bytes that key the digests; None takes 32 random bytes, so digests then
        differ from one allocator to the next.
      fingerprint: what else the keys and values depend on (weights, rope, dtype), as bytes. That a
        layout has pages of 8 bits need not be said.
      eviction: ranks the cached pages without an owner; None is `LRU()`. Its `rank` is called while
        a call is planned: if it raises, the call does, and nothing has changed. In other groups
        than the first the same object ranks tails, what sequences held at their end: each as a
        whole, with the history and depth of its last page, and the priority of the full page beside
        that one. What sequences passed before goes first, unranked.
      digest: replaces keyed BLAKE2b, `(key, payload) -> bytes`; for tests of collisions.

    Attributes:
      layout: the layout that was given, or None.

    Examples:
      >>> allocator = BlockAllocator(num_pages=9, page_size=4)
      >>> handle = allocator.allocate([5, 6, 7, 8, 9])
      >>> allocator.sequence(handle).pages
      (1, 2)
      >>> batch, copies = allocator.advance([handle], [10])
      >>> batch.slots.tolist(), batch.seq_lens.tolist()
      ([[9]], [6])
      >>> allocator.free(handle)
      >>> allocator.num_free
      8
    """

    def __init__(
        self,
        num_pages: SupportsIndex | CacheLayout,
        page_size: SupportsIndex | None = None,
        *,
        prefix_cache: bool = True,
        hash_key: bytes | None = None,
        fingerprint: bytes = b"",
        eviction: EvictionRank | None = None,
        digest: Digest | None = None,
    ):
        pools, size = pools_of(num_pages, page_size)
        cache = PrefixCache(
            pools[0][0],
            hash_key=hash_key,
            fingerprint=fingerprint,
            small=small_of(num_pages),
            eviction=eviction,
            digest=digest,
        )
        books = Bookkeeping(pools, size, cache, caching=prefix_cache)
        super().__init__((books,))
        self.layout = num_pages if isinstance(num_pages, CacheLayout) else None
        self._books, self._rows = books, books.rows
        self._pool, self._cache = books.main.pool, books.cache

    @atomic
    def export_state(
        self, handles: Ints | None = None, *, cached: bool = True, committed_only: bool = False
    ) -> tuple[AllocatorState, StatePages]:
        """Sequences, page tables, tokens and prefix cache as plain arrays, and where they lie.

        Reserved pages and pages of `allocate_pages` are not part of it. Entries whose parent was
        evicted cannot be found and are left out. A private sequence, or one that holds a page
        which was withdrawn and not published since, is exported with no token computed: its tokens
        are kept, and whoever imports it computes keys and values of its own.

        Args:
          handles: the sequences to export, in this order; None is `self.handles`.
          cached: take the cached pages along that none of them owns.
          committed_only: slots behind what was committed hold nothing yet; without it, slots up to
            the length count as filled.
        """
        row = (
            self._rows.live
            if handles is None
            else self._rows.resolve(as_handles(handles).reshape(-1))
        )
        main, others = self._books.main, self._books.others
        return collect_state(
            main, others, self._rows, row, cached=cached, committed_only=committed_only
        )

    @changing
    def prepare_copy(self, handle: SupportsIndex, computed: SupportsIndex) -> tuple[list[int], ...]:
        """Hold pages aside for keys and values that a copy will bring, up to `computed` tokens.

        Of a window those are for what the next query sees, and none before it; groups that see all
        tokens are filled in the sequence's own pages. Nothing else changes until `commit_copy`.
        They go back with `cancel_copy`, another `prepare_copy`, or the sequence.

        Args:
          handle: the sequence.
          computed: from what is computed to the length.

        Returns:
          For every group page ids: of a window for its columns `max(0, computed - W + 1) // S` to
          `ceil(computed / S) - 1`, elsewhere none.

        Raises:
          ValueError: computed is less or more.
          OutOfPages, SequenceTooLong, StaleHandle: nothing has changed.
        """
        return plan_prepare_copy(self._books, self._row(handle), as_count("computed", computed))()

    @changing
    def commit_copy(self, handle: SupportsIndex) -> int:
        """Say that the pages are filled; returns how many tokens are computed now.

        A window has the pages held aside from now on, and gives the others back. Full pages enter
        the prefix cache, as by `commit`.

        Raises:
          ValueError: no pages are held aside, or more tokens are computed or fewer there by now.
        """
        return plan_commit_copy(self._books, self._row(handle))()

    @changing
    def cancel_copy(self, handle: SupportsIndex) -> None:
        """Give back what `prepare_copy` holds aside, if there is anything."""
        plan_cancel_copy(self._books, self._row(handle))()

    def _row(self, handle: SupportsIndex) -> int:
        return self._home(handle)[1]

    def page_stamps(self, pages: Ints | None = None, *, group: SupportsIndex = 0) -> np.ndarray:
        """int64 `[k]`, of pages of a group: see `StatePages.stamps`; None is every page."""
        stamps = self._books.groups[self._number(group)].pool.stamps
        if pages is None:
            return stamps.copy()
        ids, last = as_ints("pages", pages), len(stamps) - 1
        if ids.ndim != 1 or (ids.size and not 0 <= ids.min() <= ids.max() <= last):
            raise ValueError(f"pages must be page ids from 0 to {last}, of shape [k]; got {pages}")
        return stamps[ids]

    @changing
    def import_state(
        self,
        state: AllocatorState,
        pages: Ints | Sequence[Ints],
        *,
        private: bool = False,
    ) -> list[Handle]:
        """Make the sequences and cached pages of `export_state` live here; returns handles.

        Args:
          state: from this or another allocator, or from a file: all of it is checked.
          pages: int `[M]`, from `allocate_pages`, filled with the keys and values of the state's
            pages; of several groups of layers one such array for each. They belong to the
            sequences and the prefix cache afterwards.
          private: the sequences never publish what they hold, now or later; the state has no
            cached pages then.

        Raises:
          PageTableError: the state or the pages break a rule, or its groups are others; the
            message says which.
        """
        return self._books.plan_import(state, pages, private=private)()
