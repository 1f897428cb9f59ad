"""Which pages a sequence has or needs in every group of layers, and the keys of these."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..allocator import BlockAllocator, CacheLayout, Handle
from ..allocator.windows import first_column
from ..cache import KVCache
from ..kernels.record import POOLS

__all__ = ["Wanted", "part_of", "wanted_pages", "with_part"]


@dataclass(frozen=True, slots=True)
class Wanted:
    """The columns of a sequence in one group: key and tokens of each, a last partial one included.

    Attributes:
      group: its number; window: the newest tokens that it sees, or None.
      keys, tokens: of every column from 0.
      first: the column of the first page that the sequence holds.
      pages: of its columns from there on.
    """

    group: int
    window: int | None
    keys: list[bytes]
    tokens: list[np.ndarray]
    first: int
    pages: tuple[int, ...]

    @property
    def held(self) -> range:
        """The columns of which it has pages."""
        return range(self.first, min(self.first + len(self.pages), len(self.keys)))

    def page(self, column: int) -> int:
        """That of a column which it holds."""
        return self.pages[column - self.first]

    def needed(self, begin: int, computed: int, page_size: int) -> range:
        """The columns that must be filled, so that of whole pages before `begin` it has `computed`
        tokens: in a window all that the next query sees."""
        end = -(-computed // page_size)
        if self.window is None:
            return range(begin, end)
        return range(int(first_column(computed, self.window, page_size)), end)

    def holding(self, first: int, pages: Sequence[int]) -> Wanted:
        """The same, with other pages."""
        return replace(self, first=first, pages=tuple(pages))


def wanted_pages(allocator: BlockAllocator, handle: Handle, num_tokens: int) -> list[Wanted]:
    """Of the first so many tokens, in every group that has layers."""
    if num_tokens == 0:
        return []
    info, size = allocator.sequence(handle), allocator.page_size
    tokens = allocator.tokens(handle)[:num_tokens]
    digests = allocator.sequence_digests(handle, num_tokens, partial=True)
    parts = [tokens[begin : begin + size] for begin in range(0, num_tokens, size)]
    groups = enumerate(zip(allocator.pools, info.groups, strict=True))
    return [
        Wanted(number, window, keys_of(allocator, number, digests), parts, *held)
        for number, ((_, window), held) in groups
        if allocator.layout is None or allocator.layout.groups[number].layers
    ]


def keys_of(allocator: BlockAllocator, group: int, digests: Sequence[bytes]) -> list[bytes]:
    """What pages of a group are known by: the digest in the first one, and in others a digest of
    that and of what the group is."""
    if group == 0:
        return list(digests)
    spec = None if allocator.layout is None else allocator.layout.groups[group]
    what = repr((group, spec and replace(spec, num_pages=2))).encode()
    person = hashlib.blake2b(what, digest_size=16).digest()
    return [hashlib.blake2b(d, digest_size=32, person=person).digest() for d in digests]


def part_of(cache: Any, group: int) -> Any:
    """The cache of one group of layers alone; of one group all of it."""
    if not isinstance(cache, KVCache) or cache.layout is None or len(cache.pools) == 1:
        return cache
    leaves, spec = cache.leaves_of(group), cache.layout.groups[group]
    own = {
        name: tuple(getattr(cache, name)[at] for at in leaves)
        for name in POOLS
        if getattr(cache, name)
    }
    alone = replace(spec, layers=tuple(range(len(spec.layers))), window=None)
    layout = CacheLayout(cache.page_size, (alone,)) if spec.layers else None
    return replace(cache, layout=layout, **own)


def with_part(cache: Any, group: int, part: Any) -> Any:
    """The cache with the pages of that one in the place of the group's."""
    if not isinstance(cache, KVCache) or cache.layout is None or len(cache.pools) == 1:
        return part
    for at, leaf in enumerate(cache.leaves_of(group)):
        cache = cache.with_pools(leaf, part.pools_of(at).values())
    return cache
