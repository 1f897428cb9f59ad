"""Random programs over two groups of layers, beside the device's memory and a model of hits."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from paged_decode.allocator import (
    BlockAllocator,
    CacheLayout,
    OutOfPages,
    PageSpec,
    PageTableError,
    SequenceTooLong,
    ShardedAllocator,
)
from paged_decode.allocator.windows import most_pages


def layout(window: int, page_size: int, *, pages: int = 4096, full: int = 4096) -> CacheLayout:
    one = dict(num_kv_heads=1, head_dim=8)
    return CacheLayout(
        page_size,
        (
            PageSpec(layers=(1,), num_pages=full, **one),
            PageSpec(layers=(0,), num_pages=pages, window=window, **one),
        ),
    )


class Device:
    """What programs have written: a token for every slot of every group, or -1."""

    def __init__(self, allocator):
        self.pools = [np.full(pages * allocator.page_size, -1) for pages, _ in allocator.pools]
        self.size = allocator.page_size

    def copy(self, copies) -> None:
        for pool, part in zip(self.pools, copies, strict=True):
            pages = pool.reshape(-1, self.size)
            pages[part.dst] = pages[part.src]

    def fill(self, group: int, page: int, text, column: int) -> None:
        part = text[column * self.size : (column + 1) * self.size]
        self.pools[group][page * self.size :][: len(part)] = part

    def run(self, batch, texts) -> None:
        """Write the batch's tokens, then compare all that every query sees with the texts."""
        for pool, group in zip(self.pools, batch.groups, strict=True):
            pool[group.slots] = batch.tokens
            pool[: self.size] = -1  # the null page
        for pool, group in zip(self.pools, batch.groups, strict=True):
            for row, column in zip(*(group.slots >= self.size).nonzero(), strict=True):
                position, text = int(batch.positions[row, column]), texts[row]
                begin = 0
                if group.window is not None:
                    begin = max(0, position - group.window + 1)
                    assert group.starts[row] <= begin
                seen = np.arange(begin, position + 1)
                slots = group.page_table[row][seen // self.size] * self.size + seen % self.size
                assert pool[slots].tolist() == text[begin : position + 1]


class Refused(Exception):
    """A call that the pools have no room for, or that comes too late."""


class Program:
    """Calls over a window of random size, of few prompts that begin alike; counts what happened."""

    def __init__(self, seed: int, *, shards: int = 1, **options: Any):
        rng = self.rng = np.random.default_rng(seed)
        size = self.size = int(rng.choice([1, 2, 4, 8]))
        self.window = int(rng.integers(1, 4 * size + 6))
        pages, full = shards * (8 + 40 // size), shards * (8 + 160 // size)
        sizes = layout(self.window, size, pages=pages, full=full)
        if shards > 1:
            self.allocator: Any = ShardedAllocator(sizes, num_shards=shards, **options)
        else:
            self.allocator = BlockAllocator(sizes, **options)
        self.device, self.counts = Device(self.allocator), Counter[str]()
        self.texts: dict[int, list[int]] = {}
        self.written: dict[int, int] = {}  # tokens that were computed, committed or not
        self.starts = [self.some_tokens(50) for _ in range(3)]

    def run(self, moves: int) -> Counter[str]:
        """`go`, and free everything."""
        self.go(moves)
        self.counts["evictions"] = self.allocator.stats(1).evictions
        self.allocator.free(list(self.texts))
        assert self.allocator.stats(0).used == self.allocator.stats(1).used == 0
        return self.counts

    def go(self, moves: int) -> None:
        """So many of the moves below, with every rule checked after each."""
        often = [self.allocate, self.allocate, self.prefill, self.prefill, self.step, self.step]
        seldom = [self.append, self.fork, self.truncate, self.free, self.end, self.others]
        if self.allocator.num_shards == 1:
            seldom.append(self.copy)
        for _ in range(moves):
            move = (often + seldom)[int(self.rng.integers(len(often + seldom)))]
            try:
                if self.texts or move == self.allocate:
                    move()
            except Refused:
                self.counts["refused"] += 1
                if len(self.texts) > 2:
                    self.free()
            self.check()

    def attempt(self, call: Any, *args: Any, **kwargs: Any) -> Any:
        """What is refused has changed nothing."""
        before = self.state()
        try:
            return call(*args, **kwargs)
        except (OutOfPages, SequenceTooLong, PageTableError) as error:
            assert self.state() == before
            raise Refused from error

    # ---- moves

    def allocate(self) -> None:
        start = self.starts[int(self.rng.integers(3))][: int(self.rng.integers(51))]
        text = start + self.some_tokens(int(self.rng.integers(1, 10)))
        expected = longest_hit(self.allocator, text)
        assert self.allocator.match_prefix(text) == expected
        handle = self.attempt(self.allocator.allocate, text, chunk=int(self.rng.integers(1, 20)))
        found = self.allocator.sequence(handle).cached
        assert found == expected or (found < expected and self.allocator.num_shards > 1)
        self.texts[handle], self.written[handle] = text, found
        self.counts["hits"] += found > 0

    def prefill(self) -> None:
        """A chunk; or all in chunks."""
        handle, chunk = self.pick(), int(self.rng.integers(1, 12))
        for _ in range(int(self.rng.choice([1, 60]))):
            begin = self.allocator.sequence(handle).computed
            end = min(len(self.texts[handle]), begin + chunk)
            if end == begin:
                return
            self.device.copy(
                [each.copies for each in self.attempt(self.allocator.prepare, [handle], end)]
            )
            batch = self.allocator.batch([handle], begin, end, tokens_per_row=12)
            self.device.run(batch, [self.texts[handle]])
            self.written[handle] = max(end, self.written[handle])
            self.allocator.commit([handle], end)

    def step(self) -> None:
        """A token for some of those that are computed to the end; committed now, or by the next."""
        texts, rng = self.texts, self.rng
        whole = [handle for handle in texts if self.written[handle] == len(texts[handle])]
        whole = whole[: int(rng.integers(1, 4))]
        if not whole:
            return
        tokens = rng.integers(0, 50, len(whole)).tolist()
        batch, copies = self.attempt(self.allocator.advance, whole, tokens, commit=True)
        self.device.copy(copies)
        for handle, token in zip(whole, tokens, strict=True):
            texts[handle] = [*texts[handle], token]
            self.written[handle] = len(texts[handle])
        self.device.run(batch, [texts[handle] for handle in whole])
        if rng.integers(2):
            self.allocator.commit(whole, [len(texts[handle]) for handle in whole])

    def append(self) -> None:
        handle, more = self.pick(), self.some_tokens(int(self.rng.integers(1, 20)))
        copies = self.attempt(
            self.allocator.append, handle, more, chunk=int(self.rng.integers(1, 9))
        )
        self.device.copy(copies)
        self.texts[handle] = self.texts[handle] + more

    def fork(self) -> None:
        handle = self.pick()
        for child in self.attempt(self.allocator.fork, handle, int(self.rng.integers(1, 3))):
            self.texts[child], self.written[child] = self.texts[handle], self.written[handle]

    def truncate(self) -> None:
        handle = self.pick()
        keep = int(self.rng.integers(len(self.texts[handle]) + 1))
        self.attempt(self.allocator.truncate, handle, keep)
        self.texts[handle] = self.texts[handle][:keep]
        self.written[handle] = min(keep, self.written[handle])

    def free(self) -> None:
        self.forget([self.pick()])

    def end(self) -> None:
        """Several at once, sometimes as broken ones."""
        some = [handle for handle in self.texts if self.rng.integers(2)]
        if not self.rng.integers(4):
            self.allocator.withdraw(some)
        self.forget(some)

    def copy(self) -> None:
        """As from a tier: what the next query sees, of more tokens than are computed."""
        handle = self.pick()
        text, computed = self.texts[handle], self.allocator.sequence(handle).computed
        end = int(self.rng.integers(computed, len(text) + 1))
        _, aside = self.attempt(self.allocator.prepare_copy, handle, end)
        if not self.rng.integers(3):
            self.allocator.cancel_copy(handle)
        if self.rng.integers(3):
            pages, first = self.allocator.sequence(handle).pages, -(-end // self.size) - len(aside)
            for column in range(computed // self.size, -(-end // self.size)):
                self.device.fill(0, pages[column], text, column)
            for column, page in enumerate(aside, first):
                self.device.fill(1, page, text, column)
            try:
                self.allocator.commit_copy(handle)
            except ValueError:
                return  # cancelled
            self.written[handle] = end
            self.counts["copies"] += 1

    def others(self) -> None:
        which = int(self.rng.integers(16))
        if which == 0:
            self.allocator.new_weights()
        elif which == 1:
            self.allocator.trim(self.pick())
        elif which == 2:
            self.allocator.withdraw(self.pick())
        else:
            pages = self.allocator.sequence(self.pick()).pages
            self.allocator.prioritize(pages, int(self.rng.integers(3)))

    # ---- what they share

    def some_tokens(self, count: int) -> list[int]:
        return self.rng.integers(0, 50, count).tolist()

    def pick(self) -> int:
        return list(self.texts)[int(self.rng.integers(len(self.texts)))]

    def forget(self, handles: list[int]) -> None:
        self.allocator.free(handles)
        for handle in handles:
            del self.texts[handle], self.written[handle]

    def state(self) -> list[Any]:
        a, groups = self.allocator, range(len(self.allocator.pools))
        rows = [(handle, a.sequence(handle), a.tokens(handle).tolist()) for handle in self.texts]
        orders = [
            group.pool.cache.eviction.order() for books in a._shards for group in books.groups
        ]
        return [rows, orders, [a.stats(group) for group in groups]]

    def check(self) -> None:
        self.allocator.check_invariants()
        for handle, text in self.texts.items():
            info = self.allocator.sequence(handle)
            assert self.allocator.tokens(handle).tolist() == text
            held, computed = info.groups[1], info.computed
            ahead = max(0, (held.first + len(held.pages)) * self.size - computed)
            assert len(held.pages) <= most_pages(self.window, ahead, self.size)
            assert held.first == max(0, computed - self.window + 1) // self.size or computed == 0
            self.counts["passed"] += held.first > 0


def longest_hit(allocator, text) -> int:
    """By trying every length, from what is published alone: entries, and what goes with them."""
    best, size = 0, allocator.page_size
    for books in allocator._shards:
        cache, tokens = books.cache, books.main.pool.tokens
        children = {(e.parent, tuple(tokens[e.page])): e.serial for e in cache.by_page.values()}
        serials, parent = list[int](), b"\0"
        for begin in range(0, len(text) - size, size):
            parent = children.get((parent, tuple(text[begin : begin + size])))
            if parent is None:
                break
            serials.append(parent)
        for columns in range(len(serials) + 1):
            if all(
                serials[token // size] in group.pool.cache.pages
                for group in books.others
                for token in range(columns * size)
                if group.window is None or token > columns * size - group.window
            ):
                best = max(best, columns * size)
    return best
