"""Caches of several groups of layers with known bits, after lives of many calls."""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes  # noqa: F401  (teaches NumPy the names of the small floats)
import numpy as np

from paged_decode import BlockAllocator, CacheLayout, KVCache, PageSpec
from paged_decode.allocator import PageCopies
from paged_decode.allocator.merging import in_groups
from paged_decode.errors import OutOfPages

from .small import bits, random_bits

SIZE = 4
FULL = PageSpec((1,), num_kv_heads=1, head_dim=3, num_pages=60)
WINDOW = PageSpec((0, 2), num_kv_heads=2, head_dim=2, num_pages=40, dtype="bfloat16", window=6)
TWO = CacheLayout(SIZE, (FULL, WINDOW))
THREE = CacheLayout(
    SIZE,
    (
        replace(FULL, layers=(4, 1)),
        PageSpec((3,), num_kv_heads=3, head_dim=2, num_pages=61, dtype="float16"),
        replace(WINDOW, window=9),
    ),
)
LEDGER = CacheLayout(
    SIZE,
    (
        PageSpec((), num_kv_heads=1, head_dim=1, num_pages=62),
        replace(WINDOW, layers=(0,)),
        replace(FULL, num_pages=45, window=1),
    ),
)
LAYOUTS = {"two": TWO, "three": THREE, "ledger": LEDGER}


def with_pages(layout: CacheLayout, *counts: int) -> CacheLayout:
    groups = zip(layout.groups, counts, strict=True)
    return CacheLayout(layout.page_size, tuple(replace(g, num_pages=n) for g, n in groups))


def cache_of(layout: CacheLayout, seed: int = 0) -> KVCache:
    """Any bits at all in every page."""

    def array(layer: int, kind: int) -> np.ndarray:
        spec = layout.groups[layout.group_of[layer]]
        shape = (spec.num_pages, spec.num_kv_heads, layout.page_size, spec.head_dim)
        return random_bits(shape, np.dtype(spec.dtype), seed + 2 * layer + kind)

    k, v = (tuple(array(i, kind) for i in range(layout.num_layers)) for kind in (0, 1))
    return KVCache(k, v, None, layout if len(layout.groups) > 1 else None)


def allocator_of(layout: CacheLayout, **options) -> BlockAllocator:
    return BlockAllocator(layout, hash_key=b"test", **options)


def leaves(cache):
    return [*cache.k_pages, *cache.v_pages]


def content(cache, allocator, handle) -> list[np.ndarray]:
    """The bits of every layer's committed keys and values that the sequence still has."""
    info, found, size = allocator.sequence(handle), [], allocator.page_size
    for at, leaf in enumerate(leaves(cache)):
        held = info.groups[cache.group_of(at % cache.num_layers)]
        rows = bits(leaf)[list(held.pages)].swapaxes(1, 2)
        rows = rows.reshape(-1, *rows.shape[2:])
        found.append(rows[: max(0, info.computed - held.first * size)])
    return found


class Life:
    """Random calls, and what a device would write: new bits in every slot that is computed."""

    def __init__(self, layout: CacheLayout, seed: int = 0, **options):
        self.cache, self.allocator = cache_of(layout, seed), allocator_of(layout, **options)
        self.rng, self.handles = np.random.default_rng(seed), []

    def prefill(self, tokens, chunk: int = 5, end: int | None = None):
        handle = self.allocator.allocate(tokens, chunk=chunk)
        self.handles.append(handle)
        self.compute(handle, len(tokens) if end is None else end, chunk)
        return handle

    def compute(self, handle, end: int, chunk: int = 5) -> None:
        done = self.allocator.sequence(handle).computed
        while done < end:
            ahead = min(done + chunk, end)
            prepared = in_groups(self.allocator.prepare([handle], ahead))
            self.copy(each.copies for each in prepared)
            self.write(handle, done, ahead)
            self.allocator.commit([handle], ahead)
            done = ahead

    def grow(self, tokens) -> None:
        copies = self.allocator.append(self.handles, tokens)
        self.copy([copies] if isinstance(copies, PageCopies) else copies)
        for handle in self.handles:
            info = self.allocator.sequence(handle)
            self.compute(handle, info.length)

    def copy(self, copies) -> None:
        for number, each in enumerate(copies):
            for at, leaf in enumerate(leaves(self.cache)):
                if self.cache.group_of(at % self.cache.num_layers) == number:
                    leaf[each.dst] = leaf[each.src]

    def write(self, handle, begin: int, end: int) -> None:
        info, size = self.allocator.sequence(handle), self.allocator.page_size
        for at, leaf in enumerate(leaves(self.cache)):
            held = info.groups[self.cache.group_of(at % self.cache.num_layers)]
            for position in range(begin, end):
                page = held.pages[position // size - held.first]
                new = random_bits(leaf.shape[1::2], leaf.dtype, int(self.rng.integers(2**31)))
                leaf[page, :, position % size] = new

    def turn(self) -> None:
        """One of the calls, chosen at random."""
        rng, allocator = self.rng, self.allocator
        move, handles = int(rng.integers(5)), self.handles
        try:
            if move == 0 and handles:
                allocator.free(handles.pop(int(rng.integers(len(handles)))))
            elif move == 1 and handles:
                handle = handles[int(rng.integers(len(handles)))]
                info = allocator.sequence(handle)
                least = max(
                    each.first * SIZE + (window or 1) - 1 if each.first else 0
                    for each, (_, window) in zip(info.groups, allocator.pools, strict=True)
                )
                allocator.truncate([handle], int(rng.integers(least, info.length + 1)))
            elif move == 2 and handles and len(handles) < 5:
                handles += allocator.fork(handles[int(rng.integers(len(handles)))])
            elif move == 3 and handles:
                self.grow(rng.integers(0, 3, (len(handles), int(rng.integers(1, 4)))))
            elif len(handles) < 4:
                self.prefill(rng.integers(0, 2, int(rng.integers(1, 24))).tolist())
        except OutOfPages:
            allocator.free([handles.pop() for _ in range(len(handles))])
        allocator.check_invariants()


def lived(layout: CacheLayout, seed: int = 0, turns: int = 40, **options) -> Life:
    life = Life(layout, seed, **options)
    for _ in range(turns):
        life.turn()
    while not life.handles:
        life.turn()
    life.prefill([2, 1, 0] * 5, end=7)  # in the middle of its prompt
    life.handles = list(life.allocator.handles)  # as a save lists them
    return life
