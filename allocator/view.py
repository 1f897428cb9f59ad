"""What can be read from an allocator without changing it."""

import threading
from typing import SupportsIndex

import numpy as np

from .arguments import Ints, as_count, as_ints, as_prompt
from .invariants import require_consistent
from .locking import atomic
from .pool import PagePool
from .prefix import CacheEntry, Namespace
from .sequences import Handle, SequenceInfo, SequenceTable
from .state import AllocatorState
from .stats import AllocatorStats, collect_stats, page_states
from .transfer import StatePages, collect_state

__all__ = ["AllocatorView"]


class AllocatorView:
    """The reading half of `BlockAllocator`."""

    def __init__(self, pool: PagePool, *, prefix_cache: bool):
        self._pool = pool
        self._cache = pool.cache
        self._table = SequenceTable()
        self._caching = prefix_cache
        self._lock = threading.RLock()

    @property
    def num_pages(self) -> int:
        """N, the null page included."""
        return self._pool.usable + 1

    @property
    def page_size(self) -> int:
        """S, in tokens."""
        return self._pool.page_size

    @property
    def prefix_cache(self) -> bool:
        """Whether committed pages can be found again."""
        return self._caching

    @property
    def fingerprint(self) -> bytes:
        """What else the keys and values depend on, as it was given."""
        return self._cache.fingerprint

    @property
    def generation(self) -> bytes:
        """Of the weights, in the root of every digest; empty until they are replaced."""
        return self._cache.generation

    @property
    def weights(self) -> bytes:
        """What a snapshot calls the weights: the name that `new_weights` was given, or how often it
        was called; empty before."""
        return self._cache.weights

    @property
    def usable_pages(self) -> int:
        """N - 1; always `num_free + num_evictable + num_used`."""
        return self._pool.usable

    @property
    def sequence_pages(self) -> int:
        """The most pages that one sequence can have."""
        return self._pool.usable

    @property
    def num_free(self) -> int:
        """Pages that hold nothing."""
        return self._pool.num_free

    @property
    def num_evictable(self) -> int:
        """Cached pages without an owner: taken when the free ones are used up."""
        return self._cache.num_evictable

    @property
    def num_used(self) -> int:
        """Pages with at least one owner."""
        return self._pool.num_used

    def can_ever_fit(self, num_tokens: SupportsIndex) -> bool:
        """Whether one sequence of that many tokens would fit the pool if it were empty."""
        return self._pool.pages_for(as_count("num_tokens", num_tokens)) <= self._pool.usable

    @atomic
    def sequence(self, handle: SupportsIndex) -> SequenceInfo:
        """What is known about one sequence."""
        row = self._table.resolve_one(handle)
        pages = tuple(self._table.pages(row).tolist())
        return SequenceInfo(
            length=int(self._table.length[row]),
            computed=int(self._table.computed[row]),
            cached=int(self._table.cached[row]),
            capacity=len(pages) * self.page_size,
            pages=pages,
            cache_salt=self._table.salts[row],
            private=self._table.namespaces[row].private,
        )

    @atomic
    def tokens(self, handle: SupportsIndex) -> np.ndarray:
        """The tokens of one sequence, int32 `[length]`, a copy."""
        row = self._table.resolve_one(handle)
        return self._pool.tokens[self._table.pages(row)].reshape(-1)[: self._table.length[row]]

    @atomic
    def match_prefix(self, tokens: Ints, *, cache_salt: str | bytes | None = None) -> int:
        """How many leading tokens `allocate` would find in the prefix cache; changes nothing.

        A multiple of S and at most `len(tokens) - 1`: the last token is always left to compute,
        because its logits are wanted.
        """
        prompt = as_prompt("tokens", tokens)
        return len(self._match(self._cache.namespace(cache_salt), prompt)) * self.page_size

    @atomic
    def page_digests(
        self, tokens: Ints, *, cache_salt: str | bytes | None = None, partial: bool = False
    ) -> list[bytes]:
        """The digests of the full pages of `tokens`: the keys by which they would be cached.

        With the same `hash_key`, `fingerprint` and `generation` they are the same in every process.

        Args:
          partial: add one of a last page that is not full, which the prefix cache never has.
        """
        prompt = as_prompt("tokens", tokens)
        parent = self._cache.namespace(cache_salt).digest
        found = list(self._cache.digests(parent, self._full_pages(prompt, len(prompt))))
        rest = prompt[len(found) * self.page_size :]
        if partial and rest.size:
            found += self._cache.digests(found[-1] if found else parent, rest[None])
        return found

    @atomic
    def prefix_digests(self, tokens: Ints, *, cache_salt: str | bytes | None = None) -> list[bytes]:
        """The digest of every leading part of `tokens` `[T]`: of all that `page_digests` can give
        for one of them, with `partial`."""
        prompt, parent = as_prompt("tokens", tokens), self._cache.namespace(cache_salt).digest
        return list(self._cache.partial_digests(parent, prompt, self.page_size))

    @property
    def handles(self) -> tuple[Handle, ...]:
        """The live sequences, in the order in which `export_state` lists them."""
        return tuple(self._table.handle(row) for row in self._table.rows.tolist())

    @atomic
    def export_state(
        self, handles: Ints | None = None, *, cached: bool = True, committed_only: bool = False
    ) -> tuple[AllocatorState, StatePages]:
        """Sequences, page table, tokens and prefix cache as plain arrays, and where they lie.

        Reserved pages and pages of `allocate_pages` are not part of it. Entries whose parent was
        evicted cannot be found and are left out. A private sequence is exported with no token
        computed: its tokens are kept, and whoever imports it computes keys and values of its own.

        Args:
          handles: the sequences to export, in this order; None is `self.handles`.
          cached: take the cached pages along that none of them owns.
          committed_only: slots behind what was committed hold nothing yet; without it, slots up to
            the length count as filled.
        """
        row = self._table.rows if handles is None else self._table.resolve(handles)
        return collect_state(
            self._pool, self._table, row, cached=cached, committed_only=committed_only
        )

    def page_stamps(self, pages: Ints) -> np.ndarray:
        """int64 `[k]`: see `StatePages.stamps`."""
        return self._pool.stamps[as_ints("pages", pages)]

    def ref_count(self, page: SupportsIndex) -> int:
        """How many owners a page has: sequences, or 1 if it is pinned. The null page has 0."""
        page = as_count("page", page)
        if page > self._pool.usable:
            raise ValueError(f"page must be at most {self._pool.usable}, got {page}")
        return int(self._pool.refs[page]) if page else 0

    @atomic
    def page_states(self) -> np.ndarray:
        """What every page is doing: uint8 `[N]` of `PageState`."""
        return page_states(self._pool)

    @atomic
    def stats(self) -> AllocatorStats:
        """All counts at this moment; see `AllocatorStats`."""
        return collect_stats(self._pool, self._table)

    @atomic
    def check_invariants(self) -> None:
        """Verify all bookkeeping from scratch; raises CorruptState with every broken rule."""
        require_consistent(self._pool, self._table, caching=self._caching)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.usable_pages} usable pages of {self.page_size} tokens: "
            f"{self.num_used} used, {self.num_evictable} evictable, {self.num_free} free)"
        )

    def _full_pages(self, prompt: np.ndarray, num_tokens: int) -> np.ndarray:
        full = num_tokens // self.page_size
        return prompt[: full * self.page_size].reshape(full, self.page_size)

    def _match(self, namespace: Namespace, prompt: np.ndarray) -> list[CacheEntry]:
        if not self.prefix_cache:
            return []
        pages = self._full_pages(prompt, len(prompt) - 1)
        return self._cache.match(namespace, pages, self._pool.tokens)
