"""One allocator per data shard, behind one front that speaks of pages of the whole pool."""

import secrets
from typing import Any, SupportsIndex

from .arguments import as_count
from .bookkeeping import Bookkeeping
from .calls import AllocatorCalls
from .eviction import EvictionRank
from .layout import CacheLayout, pools_of, small_of
from .locking import atomic
from .pool import check_pool_size
from .prefix import Digest, PrefixCache
from .view import AllocatorView

__all__ = ["ShardedAllocator"]


class ShardedAllocator(AllocatorCalls):
    """Sequences over the pages of R equal shards; a sequence lives on one shard for life.

    Page ids, slots and handles are those of the whole pool: shard r has the pages
    `r * N/R .. (r+1) * N/R - 1`, the first of which is its null page. `split_batch` makes of a
    batch what the devices see. The calls are those of `BlockAllocator`, and as there what raises
    changed nothing, on no shard.

    A new sequence goes to the shard that knows most of its prefix, and among equals to the one
    with most pages to give. A prefix that only another shard has is computed again. `keep_free` of
    `allocate` counts pages of the whole pool, of which a shard keeps its part.

    Args:
      num_pages: N, a multiple of R, with at least 2 pages a shard. Or a `CacheLayout`, as in
        `BlockAllocator`, of which that is so for every group.
      page_size: S.
      num_shards: R.
      prefix_cache: passed to every shard, as are all that follow; see `BlockAllocator`.

    Examples:
      >>> allocator = ShardedAllocator(16, 4, num_shards=2)
      >>> handles = [allocator.allocate([5, 6, 7]), allocator.allocate([8, 9])]
      >>> allocator.sequence(handles[0]).pages, allocator.sequence(handles[1]).pages
      ((1,), (9,))
    """

    def __init__(
        self,
        num_pages: SupportsIndex | CacheLayout,
        page_size: SupportsIndex | None = None,
        *,
        num_shards: SupportsIndex,
        prefix_cache: bool = True,
        hash_key: bytes | None = None,
        fingerprint: bytes = b"",
        eviction: EvictionRank | None = None,
        digest: Digest | None = None,
    ):
        shards = as_count("num_shards", num_shards, 1)
        pools, size = pools_of(num_pages, page_size)
        for pages, _ in pools:
            if pages % shards:
                raise ValueError(f"num_pages must be a multiple of {shards} shards, got {pages}")
            check_pool_size(pages // shards, size)
        own = [(pages // shards, window) for pages, window in pools]
        options = dict[str, Any](fingerprint=fingerprint, eviction=eviction, digest=digest)
        options["small"] = small_of(num_pages)
        options["hash_key"] = secrets.token_bytes(32) if hash_key is None else hash_key
        super().__init__(
            tuple(
                Bookkeeping(
                    own,
                    size,
                    PrefixCache(own[0][0], **options),
                    caching=prefix_cache,
                    shard=shard,
                    num_shards=shards,
                )
                for shard in range(shards)
            )
        )

    @property
    def shards(self) -> tuple[AllocatorView, ...]:
        """The parts, to read from: handles and page ids are those of the whole."""
        return tuple(AllocatorView((books,), self._guard) for books in self._shards)

    @atomic
    def shard_of(self, handle: SupportsIndex) -> int:
        """On which shard a sequence lives."""
        return self._shards.index(self._home(handle)[0])
