"""What the allocator tests share: a device made of NumPy, and frozen copies of all bookkeeping."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np

from paged_decode.allocator import (
    BlockAllocator,
    DecodeBatch,
    PageCopies,
    PageState,
    ShardedAllocator,
)
from paged_decode.allocator.view import AllocatorView

POISON = -1


def root(salt: str | bytes | None) -> int:
    """Content before the first token: a wrong hit across salts reads wrong content too."""
    return zlib.crc32(repr(salt).encode())


def mix(before: int, token: int, position: int) -> int:
    """Content at a position: it depends on every token before it, as keys and values do."""
    return zlib.crc32(b"%d %d %d" % (before, token, position))


def contents(tokens: list[int], salt: str | bytes | None) -> list[int]:
    """What a sequence must read, position by position."""
    out, before = [], root(salt)
    for position, token in enumerate(tokens):
        before = mix(before, token, position)
        out.append(before)
    return out


class Device:
    """Page contents `[N, S]`, written and read only through batches, as a kernel does."""

    def __init__(self, allocator: BlockAllocator | ShardedAllocator):
        self.page_size = allocator.page_size
        self.pages = np.full((allocator.num_pages, allocator.page_size), POISON, np.int64)

    def copy(self, copies: PageCopies) -> None:
        self.pages[copies.dst] = self.pages[copies.src]

    def step(self, batch: DecodeBatch, tokens: list[list[int]], salts: list[Any]) -> None:
        """Write tokens[b], right-aligned, reading what is before them through the table."""
        flat = self.pages.reshape(-1)
        for b, (row, salt) in enumerate(zip(tokens, salts, strict=True)):
            for token, position, slot in zip(
                row,
                batch.positions[b, len(batch.positions[b]) - len(row) :],
                batch.slots[b, len(batch.slots[b]) - len(row) :],
                strict=True,
            ):
                before = root(salt)
                if position:
                    at = position - 1
                    page = batch.page_table[b, at // self.page_size]
                    before = int(self.pages[page, at % self.page_size])
                flat[slot] = mix(before, token, int(position))

    def read(self, allocator: BlockAllocator, handle: int) -> list[int]:
        """The content of a sequence's computed positions, through its pages."""
        info = allocator.sequence(handle)
        return self.pages[list(info.pages)].reshape(-1)[: info.computed].tolist()

    def poison(self, allocator: BlockAllocator) -> None:
        """Spoil all that nobody may read: free pages and the null page."""
        states = allocator.page_states()
        self.pages[(states == PageState.FREE) | (states == PageState.NULL)] = POISON


def prefill(allocator: BlockAllocator, device: Device, handle: int) -> None:
    """Compute what is not computed yet, and commit it."""
    info, tokens = allocator.sequence(handle), allocator.tokens(handle).tolist()
    width = max(info.length - info.computed, 1)
    batch = allocator.batch([handle], info.computed, info.length, tokens_per_row=width)
    device.step(batch, [tokens[info.computed :]], [info.cache_salt])
    allocator.commit([handle], info.length)


def freeze(allocator: BlockAllocator | ShardedAllocator) -> Any:
    """A copy of all bookkeeping that can be compared: ids, counts, order of eviction, counters."""
    if isinstance(allocator, ShardedAllocator):
        return [_freeze(shard) for shard in allocator.shards]
    return _freeze(allocator)


def _freeze(allocator: AllocatorView) -> dict[str, Any]:
    (books,) = allocator._shards
    table, pool, cache = books.rows, books.main.pool, books.cache
    live = table.live.tolist()
    return {
        "free": pool.free_pages.tolist(),
        "refs": pool.refs.tolist(),
        "raw": pool.raw.tolist(),
        "tokens": {h: allocator.tokens(h).tolist() for h in map(table.name, live)},
        "infos": {h: allocator.sequence(h) for h in map(table.name, live)},
        "chains": [list(table.chains[row]) for row in live],
        "published": dict(cache.by_page),
        "eviction": cache.eviction.order(),
        "described": [np.minimum(table.described, table.length)[row] for row in live],
        "stats": allocator.stats(),
    }
