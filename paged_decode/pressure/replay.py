"""The hit-rate curve: prompts one after another through the prefix cache, nothing else."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from .._text import shown
from ..allocator import BlockAllocator, EvictionRank
from ._values import as_whole
from .clairvoyant import Belady
from .workload import Request

__all__ = ["hit_rate"]


def hit_rate(
    requests: Iterable[Request], capacity_pages: int, eviction: EvictionRank | None = None
) -> float:
    """Part of all prompt blocks found in a cache of so many pages, one page per block, 0 to 1.

    The last block counts as a full one. A real request never finds its last token, so each
    prompt gets one token more here, on a page beyond the capacity that is never cached. A prompt
    of more blocks than the capacity finds and leaves nothing. Pages have the priority of the
    request that had them last. Without any block there is no part, and 0 is returned. `Belady` is
    told all requests, and no eviction gives a higher rate than that.

    Raises:
      ValueError: capacity_pages is less than 1, or what comes is no `Request`.
    """
    capacity_pages = as_whole("capacity_pages", capacity_pages, 1, 2**31 - 3)
    size = 2  # a block is one content id, so the shortest page tells blocks apart
    allocator = BlockAllocator(capacity_pages + 2, size, hash_key=b"replay", eviction=eviction)
    belady = eviction if isinstance(eviction, Belady) else None
    coming = enumerate(requests)
    if belady is not None:
        known = list(coming)
        fitting = (r for i, r in known if len(_checked(i, r).blocks) <= capacity_pages)
        belady.learn((_tokens(request, size) for request in fitting), allocator)
        coming = iter(known)
    asked = found = entered = 0
    for number, request in coming:
        count = len(_checked(number, request).blocks)
        asked += count
        if count > capacity_pages:
            continue
        handle = allocator.allocate(_tokens(request, size))
        if belady is not None:
            belady.begin(entered)
        entered += 1
        found += allocator.sequence(handle).cached // size
        allocator.commit(handle, count * size)
        allocator.prioritize(allocator.sequence(handle).pages, request.priority)
        allocator.free(handle)
    return found / asked if asked else 0.0


def _tokens(request: Request, size: int) -> np.ndarray:
    """A page for each block, and a token behind them."""
    return np.append(np.repeat(np.array(request.blocks, np.int32), size), np.int32(0))


def _checked(number: int, request: Any) -> Request:
    if isinstance(request, Request):
        return request
    raise ValueError(f"request {number} must be a Request, got {shown(request)}")
