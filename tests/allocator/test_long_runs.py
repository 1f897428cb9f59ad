"""Long random runs: conservation, determinism, and failures injected at every place."""

from __future__ import annotations

import numpy as np
import pytest

from paged_decode.allocator import BlockAllocator, OutOfPages
from paged_decode.allocator.pool import PagePool

from .device import Device, contents, freeze, prefill


def program(
    allocator: BlockAllocator, seed: int, calls: int, check: bool = False
) -> list[tuple[int, ...]]:
    """Random calls; returns the page ids and tokens that came of them."""
    rng, live, trace, device = np.random.default_rng(seed), [], [], Device(allocator)
    for _ in range(calls):
        before = freeze(allocator) if check else None
        try:
            _one_call(allocator, device, rng, live, trace)
        except OutOfPages:
            assert not check or freeze(allocator) == before
            if live:
                allocator.free(live.pop(int(rng.integers(len(live)))))
        if check:
            allocator.check_invariants()
    for handle in live:
        info, tokens = allocator.sequence(handle), allocator.tokens(handle).tolist()
        read = contents(tokens, info.cache_salt)[: info.computed]
        assert device.read(allocator, handle) == read
    allocator.free(live)
    return trace


def _one_call(allocator, device, rng, live, trace) -> None:
    kind = rng.integers(6)
    if kind == 0 or not live:
        live.append(allocator.allocate(rng.integers(0, 2, rng.integers(1, 20))))
        prefill(allocator, device, live[-1])
        trace.append(allocator.sequence(live[-1]).pages)
    elif kind == 1:
        live += allocator.fork(live[rng.integers(len(live))], int(rng.integers(1, 3)))
    elif kind == 2:
        allocator.free(live.pop(int(rng.integers(len(live)))))
    elif kind == 3:
        handle = live[rng.integers(len(live))]
        allocator.truncate(handle, int(rng.integers(1, allocator.sequence(handle).length + 1)))
    else:
        some = [h for h in live if rng.random() < 0.5]
        tokens = rng.integers(0, 2, len(some))
        batch, copies = allocator.advance(some, tokens)
        device.copy(copies)
        device.step(batch, tokens[:, None].tolist(), [None] * len(some))
        allocator.commit(some, batch.seq_lens)
        trace.append(tuple(allocator.tokens(h)[-1] for h in some))
        trace.append(tuple(batch.slots.ravel().tolist()))


@pytest.mark.long
def test_ten_thousand_random_cycles_conserve_every_page():
    """scenario 9"""
    allocator, rng = BlockAllocator(33, 4), np.random.default_rng(0)
    live: list[int] = []
    for cycle in range(10_000):
        try:
            if len(live) < 8 and rng.random() < 0.5:
                live.append(allocator.allocate(rng.integers(0, 2, rng.integers(1, 20))))
                allocator.commit([live[-1]], allocator.sequence(live[-1]).length)
            elif live:
                allocator.free(live.pop(int(rng.integers(len(live)))))
        except OutOfPages:
            allocator.free(live.pop())
        total = allocator.num_free + allocator.num_evictable + allocator.num_used
        assert total == allocator.usable_pages
        if cycle % 200 == 0:
            allocator.check_invariants()
    allocator.free(live)
    allocator.check_invariants()
    assert allocator.num_used == 0


@pytest.mark.parametrize("page_size", [1, 2, 4])
@pytest.mark.parametrize("cache", [True, False])
def test_the_same_calls_give_the_same_pages(page_size, cache):
    """scenario 58"""
    first, second = (
        program(BlockAllocator(25, page_size, prefix_cache=cache, hash_key=key), 3, 300)
        for key in (b"one key", b"another key")
    )
    assert first == second


def test_a_random_program_reads_the_same_with_the_cache_on_and_off():
    """scenarios 57, 58: `program` compares all content with the history of each sequence"""
    for seed in range(5):
        for cache in (True, False):
            program(BlockAllocator(200, 2, prefix_cache=cache), seed, 150)


@pytest.mark.parametrize("fail_at", range(1, 23))
def test_a_failure_injected_at_any_allocation_leaks_nothing(monkeypatch, fail_at):
    """scenario 59"""
    real, calls = PagePool.require, 0

    def failing(self: PagePool, needed: int) -> None:
        nonlocal calls
        calls += 1
        if calls == fail_at:
            raise OutOfPages(needed, self.num_free, self.cache.num_evictable)
        real(self, needed)

    monkeypatch.setattr(PagePool, "require", failing)
    allocator = BlockAllocator(15, 4)
    program(allocator, 5, 40, check=True)
    assert calls > fail_at and allocator.num_used == 0
