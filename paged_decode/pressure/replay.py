"""The hit-rate curve: prompts one after another through the prefix cache, nothing else."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from .._text import shown
from ..allocator import BlockAllocator, EvictionRank
from ._values import as_whole
from .workload import Request

__all__ = ["hit_rate"]


def hit_rate(
    requests: Iterable[Request], capacity_pages: int, eviction: EvictionRank | None = None
) -> float:
    """Part of all prompt blocks found in a cache of so many pages, one page per block, 0 to 1.

    The last block counts as a full one. A real request never finds its last token, so each
    prompt gets one token more here, on a page beyond the capacity that is never cached. A prompt
    of more blocks than the capacity finds and leaves nothing. Without any block there is no part,
    and 0 is returned.

    Raises:
      ValueError: capacity_pages is less than 1, or what comes is no `Request`.
    """
    capacity_pages = as_whole("capacity_pages", capacity_pages, 1, 2**31 - 3)
    size = 2  # a block is one content id, so the shortest page tells blocks apart
    allocator = BlockAllocator(capacity_pages + 2, size, hash_key=b"replay", eviction=eviction)
    asked = found = 0
    for number, request in enumerate(requests):
        if not isinstance(request, Request):
            raise ValueError(f"request {number} must be a Request, got {shown(request)}")
        count = len(request.blocks)
        asked += count
        if count > capacity_pages:
            continue
        tokens = np.append(np.repeat(np.array(request.blocks, np.int32), size), 0)
        handle = allocator.allocate(tokens)
        found += allocator.sequence(handle).cached // size
        allocator.commit(handle, count * size)
        allocator.free(handle)
    return found / asked if asked else 0.0
