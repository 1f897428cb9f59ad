"""The host tier and the disk behind it: bits, capacity, copies in flight, copies that fail."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paged_decode import BlockAllocator, CacheLayout, KVCache, PageSpec
from paged_decode.faults import FaultPlan, Faults
from paged_decode.tiers import CopyFailed, CopyPending, DeviceMover, DiskTier, HostTier

from ...allocator.test_interrupts import interrupted

ROOT = Path(__file__).parents[3]
PAGES, SIZE = 24, 4
MOVERS = [DeviceMover("numpy"), DeviceMover("pinned_host")]


def random_bits(dtype, seed=0):
    """A cache of random bits, NaNs of every kind among them."""
    cache = KVCache.create(
        num_layers=2, num_pages=PAGES, num_kv_heads=2, page_size=SIZE, head_dim=8, dtype=dtype
    )
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda a: jnp.asarray(
            rng.integers(0, 256, (*a.shape, a.dtype.itemsize), np.uint8).view(a.dtype)[..., 0]
        ),
        cache,
    )


def content(cache, pages):
    return [
        np.asarray(leaf)[list(pages)].view(np.uint8).tobytes() for leaf in jax.tree.leaves(cache)
    ]


def started(allocator, tokens, salt=None):
    handle = allocator.allocate(tokens, cache_salt=salt)
    allocator.commit(handle, len(tokens))
    return handle


def forget(allocator, *handles):
    allocator.free(list(handles))
    assert allocator.reset_prefix_cache(same_weights=True)


WINDOW = 6
LAYOUT = CacheLayout(
    SIZE,
    (
        PageSpec((1, 3), num_kv_heads=2, head_dim=8, num_pages=40),
        PageSpec((0, 2), num_kv_heads=1, head_dim=16, num_pages=20, window=WINDOW),
        PageSpec((4,), num_kv_heads=1, head_dim=8, num_pages=40, dtype=jnp.bfloat16),
    ),
)


def grouped(seed=0):
    """A cache of three groups of random numbers, and the books of it."""
    rng = np.random.default_rng(seed)
    cache = jax.tree.map(
        lambda a: jnp.asarray(rng.normal(size=a.shape), a.dtype), KVCache.create(layout=LAYOUT)
    )
    return cache, BlockAllocator(LAYOUT, hash_key=b"k")


def prefilled(allocator, tokens, end, chunk=8):
    """A sequence, computed up to `end` as a prefill does."""
    handle = allocator.allocate(tokens, chunk=chunk)
    for done in (*range(chunk, end, chunk), end):
        allocator.prepare([handle], done)
        allocator.commit([handle], done)
    return handle


def seen_of(cache, allocator, handle):
    """The keys and values of every layer that its next token sees, as bytes."""
    info, found = allocator.sequence(handle), []
    for layer, (k, v) in enumerate(zip(cache.k_pages, cache.v_pages, strict=True)):
        first, pages = info.groups[LAYOUT.group_of[layer]]
        window = LAYOUT.groups[LAYOUT.group_of[layer]].window or info.computed + 1
        begin = max(0, info.computed - window + 1)
        for pool in (k, v):
            text = np.moveaxis(np.asarray(pool)[list(pages)], 1, 2).reshape(-1, pool.shape[1])
            rows = text.reshape(len(pages) * SIZE, -1)
            found.append(rows[begin - first * SIZE : info.computed - first * SIZE].tobytes())
    return found


@pytest.mark.parametrize("spills", [False, True])
def test_every_group_comes_back_as_far_as_its_window_still_held_it(spills, tmp_path):
    cache, allocator = grouped()
    disk = DiskTier(tmp_path, 10**7)
    tier = HostTier(24 if spills else 100, buckets=(1, 4), disk=disk)
    rng = np.random.default_rng(1)
    texts = [rng.integers(0, 50, n).tolist() for n in (37, 30, 21)]
    want = []
    for text in texts:
        handle = prefilled(allocator, text, len(text))
        want.append(seen_of(cache, allocator, handle))
        assert tier.store(cache, allocator, handle) == -(-len(text) // SIZE)
        tier.settle()
        forget(allocator, handle)
    assert (tier.stats.spilled > 0) == spills
    for text, wanted in zip(texts, want, strict=True):
        handle = allocator.allocate(text, chunk=8)
        used = allocator.stats(1).used
        cache = tier.load(cache, allocator, handle)
        assert allocator.sequence(handle).computed == len(text)
        assert allocator.stats(1).used <= used and allocator.stats(1).peak_used <= 8
        assert seen_of(cache, allocator, handle) == wanted
        allocator.check_invariants()
        tier.check_invariants()
        allocator.advance([handle], [7], commit=True)
        forget(allocator, handle)
    assert (tier.stats.revived > 0) == spills
    assert all(allocator.stats(group).used == 0 for group in range(3))


def test_of_several_groups_all_come_back_or_nothing_does():
    cache, allocator = grouped()
    tier, text = HostTier(100, buckets=(1, 4)), list(range(37))
    handle = prefilled(allocator, text, 37)
    tier.store(cache, allocator, handle)
    tier.settle()
    forget(allocator, handle)
    other = allocator.allocate(range(60, 79))  # which leaves no page for the window
    handle = allocator.allocate(text, chunk=56)
    before = allocator.sequence(handle)
    allocator.allocate_pages(allocator.stats(1).free, group=1)
    cache = tier.load(cache, allocator, handle)
    assert allocator.sequence(handle) == before and before.computed == 0
    allocator.check_invariants()

    class Failing(DeviceMover):
        def put(self, cache, rested, pages):
            if len(jax.tree.leaves(cache)) == 2:  # of the last group
                raise CopyFailed("no")
            return super().put(cache, rested, pages)

    allocator.free([other])
    tier.mover = Failing()
    cache = tier.load(cache, allocator, handle)
    assert tier.stats.failed_copies == 1 and allocator.sequence(handle) == before
    assert allocator.stats(1).used - allocator.stats(1).raw == len(before.groups[1].pages)
    tier.forget(allocator, handle)
    assert tier.num_pages == 0
    tier.check_invariants()


class Held:
    """A mover that carries page numbers only, and remembers what it was asked."""

    def __init__(self):
        self.calls = []

    def take(self, cache, pages):
        self.calls.append(("take", pages.tolist()))
        return pages.tolist()

    def finish(self, copy):
        return copy

    def put(self, cache, rested, pages):
        self.calls.append(("put", pages.tolist()))
        return cache


def test_a_tier_whose_calls_are_cut_off_anywhere_goes_on():
    """With a mover that knows no copy twice; what is found afterwards is what was stored."""

    class Once(Held):
        def finish(self, copy):
            assert isinstance(copy, tuple)
            return list(copy)

        def take(self, cache, pages):
            return tuple(pages.tolist())

    at, torn = 0, True
    while torn:
        allocator, cache = BlockAllocator(20, SIZE, hash_key=b"k"), object()
        tier = HostTier(9, buckets=(1, 4), mover=Once())
        one, two = (started(allocator, list(range(i, i + 17))) for i in (0, 30))
        tier.store(cache, allocator, one)
        tier.settle()

        def life(tier=tier, allocator=allocator, cache=cache, one=one, two=two):
            tier.store(cache, allocator, two)
            tier.settle()
            forget(allocator, one, two)
            tier.load(cache, allocator, allocator.allocate(list(range(30, 47))))

        torn = interrupted(life, at)
        at += 7
        tier.check_invariants()
        tier.settle()
        tier.check_invariants()
        allocator.check_invariants()
        allocator.free(list(allocator.handles))
        assert tier.num_pages <= 9 and not tier._flying
    assert at > 200


@pytest.mark.parametrize("mover", MOVERS, ids=lambda m: m.memory)
@pytest.mark.parametrize(
    "dtype",
    [jnp.float32, jnp.float16, jnp.bfloat16, jnp.float8_e4m3fn, jnp.float8_e5m2, jnp.int8],
)
def test_pages_come_back_bit_for_bit_to_other_places_and_touch_no_other_page(mover, dtype):
    cache, allocator = random_bits(dtype), BlockAllocator(PAGES, SIZE, hash_key=b"k")
    tokens = list(range(27))  # six full pages and a partial one: copies of 4, 1, 1 and 1
    tier = HostTier(PAGES, buckets=(4,), mover=mover)
    handle = started(allocator, tokens)
    pages = allocator.sequence(handle).pages
    want = content(cache, pages)
    assert tier.store(cache, allocator, handle) == 7
    forget(allocator, handle)
    cache = jax.tree.map(lambda a: a.at[np.array(pages)].set(0), cache)
    tier.settle()
    tier.check_invariants()

    allocator.allocate_pages(5)  # so that the pages are others than before
    handle = allocator.allocate(tokens)
    moved = allocator.sequence(handle).pages
    others = [p for p in range(1, PAGES) if p not in moved]
    before = content(cache, others)
    cache = tier.load(cache, allocator, handle)
    assert moved != pages and content(cache, moved) == want
    assert content(cache, others) == before
    assert allocator.sequence(handle).computed == 27
    allocator.check_invariants()


@pytest.mark.parametrize("mover", MOVERS, ids=lambda m: m.memory)
def test_pages_written_in_place_while_their_copy_is_in_flight_come_back_as_they_were(mover):
    """Layers of several MiB, several of which travel in one array, and numbers beside scales."""
    rng = np.random.default_rng(0)

    def pool(dtype, *shape):
        bits = rng.integers(0, 256, (65, *shape, np.dtype(dtype).itemsize), np.uint8)
        return jnp.asarray(bits.view(dtype)[..., 0])

    cache = [pool(np.int8, 4, SIZE, 4096) for _ in range(12)]  # 4 MiB each for 64 pages
    cache += [pool(np.float32, 4, SIZE), pool(jnp.bfloat16, 4), pool(np.int8, 4, SIZE, 4096)]
    allocator, tier = BlockAllocator(65, SIZE, hash_key=b"k"), HostTier(64, mover=mover)
    handle = started(allocator, list(range(256)))
    want = content(cache, allocator.sequence(handle).pages)
    wipe = jax.jit(lambda c: jax.tree.map(jnp.zeros_like, c), donate_argnums=0)
    assert tier.store(cache, allocator, handle) == 64
    forget(allocator, handle)
    cache = wipe(cache)  # at once: nobody waits for the copy
    handle = allocator.allocate(list(range(256)))
    tier.settle()
    cache = tier.load(cache, allocator, handle)
    assert allocator.sequence(handle).computed == 256
    assert content(cache, allocator.sequence(handle).pages) == want


@pytest.mark.gpu
def test_a_copy_for_which_no_page_locked_memory_is_left_fails_alone_and_leaves_no_entry():
    if jax.default_backend() != "gpu":
        pytest.skip("needs a GPU")
    script = """
import jax, jax.numpy as jnp, numpy as np
from paged_decode import BlockAllocator
from paged_decode.tiers import HostTier
cache = [jnp.full((257, 4, 16, 2048), at, jnp.float32) for at in range(16)]  # 2 GiB
allocator, tier = BlockAllocator(257, 16), HostTier(256)
handle = allocator.allocate(np.arange(256 * 16))
allocator.commit(handle, 256 * 16)
assert tier.store(cache, allocator, handle) <= 256
tier.settle()
tier.check_invariants()
assert tier.stats.failed_copies and tier.stats.stored == tier.num_pages, tier.stats
tier.clear()
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_only_the_missing_end_is_loaded_when_the_device_still_has_the_start():
    mover = Held()
    allocator, tier = BlockAllocator(PAGES, SIZE), HostTier(PAGES, buckets=(4,), mover=mover)
    handle = started(allocator, list(range(22)))  # five full pages and a partial one
    assert tier.store(None, allocator, handle) == 6
    tier.settle()
    started(allocator, [*range(8), 99])  # keeps the first two alive
    allocator.free(handle)
    allocator.free_pages(allocator.allocate_pages(PAGES - 1 - 3))  # evicts the others
    again = allocator.allocate(list(range(22)))
    info = allocator.sequence(again)
    assert info.computed == 8
    tier.load(None, allocator, again)
    assert mover.calls[3:] == [
        ("put", [0, 0, *info.pages[2:4]]),  # unwanted pages go to the null page
        ("put", [info.pages[4]]),
        ("put", [info.pages[5]]),
    ]
    assert allocator.sequence(again).computed == 22


def test_a_copy_in_flight_is_not_found_and_not_given_up():
    allocator, mover = BlockAllocator(PAGES, SIZE), Held()
    tier = HostTier(4, mover=mover)
    one = started(allocator, list(range(16)))
    assert tier.store(None, allocator, one) == 4
    two = started(allocator, list(range(100, 108)))
    assert tier.store(None, allocator, two) == 0  # all room is taken by what is in flight
    forget(allocator, one, two)
    again = allocator.allocate(list(range(16)))
    tier.load(None, allocator, again)
    assert allocator.sequence(again).computed == 0
    tier.settle()
    tier.load(None, allocator, again)
    assert allocator.sequence(again).computed == 16
    tier.check_invariants()


@pytest.mark.parametrize("number, left", [(0, 0), (1, 4), (2, 0), (3, 4)])
def test_a_failed_copy_to_the_host_leaves_no_entry(number, left):
    # Copies 0 and 1 begin the chunks of 4 and 1 pages, 2 and 3 finish what was begun.
    allocator, tier = BlockAllocator(PAGES, SIZE), HostTier(PAGES, buckets=(4,), mover=Held())
    tier.mover = Faults(FaultPlan(copies=frozenset({number}))).wrap_mover(tier.mover)
    handle = started(allocator, list(range(20)))
    tier.store(None, allocator, handle)
    tier.settle()
    tier.check_invariants()
    assert tier.stats.failed_copies == 1
    forget(allocator, handle)
    again = allocator.allocate(list(range(20)))
    tier.load(None, allocator, again)
    expected = {0: 0, 1: 16, 2: 0, 3: 16}[number]
    assert allocator.sequence(again).computed == expected
    assert tier.num_pages == {0: 0, 1: 4, 2: 1, 3: 4}[number]


def test_a_failed_copy_back_commits_only_what_came_before_it():
    allocator, tier = BlockAllocator(PAGES, SIZE), HostTier(PAGES, buckets=(2,), mover=Held())
    handle = started(allocator, list(range(20)))
    tier.store(None, allocator, handle)
    tier.settle()
    forget(allocator, handle)
    tier.mover = Faults(FaultPlan(copies=frozenset({1}))).wrap_mover(tier.mover)
    handle = allocator.allocate(list(range(20)))
    tier.load(None, allocator, handle)
    assert allocator.sequence(handle).computed == 8
    tier.check_invariants()
    tier.load(None, allocator, handle)  # the pages are still here
    assert allocator.sequence(handle).computed == 20


def test_a_copy_that_is_late_after_clear_is_dropped():
    allocator, tier = BlockAllocator(PAGES, SIZE), HostTier(PAGES, mover=Held())
    handle = started(allocator, list(range(8)))
    tier.store(None, allocator, handle)
    tier.clear()
    tier.settle()
    tier.check_invariants()
    assert tier.num_pages == 0
    forget(allocator, handle)
    handle = allocator.allocate(list(range(8)))
    tier.load(None, allocator, handle)
    assert allocator.sequence(handle).computed == 0


def test_the_least_recently_used_gives_way_and_never_a_page_of_the_same_request():
    allocator, tier = BlockAllocator(PAGES, SIZE), HostTier(6, buckets=(1,), mover=Held())
    handles = [started(allocator, list(range(s, s + 8))) for s in (0, 100, 200)]
    for handle in handles:
        assert tier.store(None, allocator, handle) == 2
    tier.settle()
    tier.store(None, allocator, handles[0])  # used again: nothing is copied, 100 is the oldest
    grown = started(allocator, list(range(200, 220)))  # two of its five pages are there
    assert tier.store(None, allocator, grown) == 5
    tier.settle()
    tier.check_invariants()
    forget(allocator, *handles, grown)
    for start, count, computed in ((0, 8, 4), (100, 8, 0), (200, 20, 20)):
        handle = allocator.allocate(list(range(start, start + count)))
        tier.load(None, allocator, handle)
        assert allocator.sequence(handle).computed == computed, start


def test_different_salts_and_other_weights_never_share_host_pages():
    tier = HostTier(PAGES, mover=Held())
    allocator = BlockAllocator(PAGES, SIZE, hash_key=b"k", fingerprint=b"one")
    handle = started(allocator, list(range(8)), salt="a")
    tier.store(None, allocator, handle)
    tier.settle()
    for fingerprint, salt, computed in ((b"one", "a", 8), (b"one", "b", 0), (b"two", "a", 0)):
        other = BlockAllocator(PAGES, SIZE, hash_key=b"k", fingerprint=fingerprint)
        handle = other.allocate(list(range(8)), cache_salt=salt)
        tier.load(None, other, handle)
        assert other.sequence(handle).computed == computed


def test_equal_digests_of_different_tokens_are_no_hit():
    allocator = BlockAllocator(PAGES, SIZE, digest=lambda key, payload: b"d" * 32)
    tier = HostTier(PAGES, mover=Held())
    handle = started(allocator, [1, 2, 3, 4])
    tier.store(None, allocator, handle)
    tier.settle()
    forget(allocator, handle)
    handle = allocator.allocate([5, 6, 7, 8])
    tier.load(None, allocator, handle)
    assert allocator.sequence(handle).computed == 0


@pytest.mark.parametrize("mover", MOVERS, ids=lambda m: m.memory)
def test_after_warmup_no_copy_compiles(mover, compiled):
    jax.clear_caches()
    cache, allocator = random_bits(jnp.float32), BlockAllocator(PAGES, SIZE, hash_key=b"k")
    tier = HostTier(PAGES, buckets=(1, 4), mover=mover)
    cache = tier.warmup(cache)
    compiled.clear()
    for at, length in enumerate((3, 8, 23, 17, 28)):
        prompt = [30 * at + i for i in range(length)]
        handle = started(allocator, prompt)
        tier.store(cache, allocator, handle)
        tier.settle()
        forget(allocator, handle)
        handle = allocator.allocate(prompt)
        cache = tier.load(cache, allocator, handle)
        assert allocator.sequence(handle).computed == length
        forget(allocator, handle)
    assert compiled == []


def spilled(folder, allocator, cache, capacity_bytes=10**7):
    """Three prompts of four pages each through a host tier of four pages."""
    tier = HostTier(4, buckets=(4,), disk=DiskTier(folder, capacity_bytes))
    for start in (0, 100, 200):
        handle = started(allocator, list(range(start, start + 16)))
        tier.store(cache, allocator, handle)
        tier.settle()
        forget(allocator, handle)
    return tier


def test_pages_come_back_from_the_disk_bit_for_bit_even_after_a_restart(tmp_path):
    cache = random_bits(jnp.bfloat16)
    allocator = BlockAllocator(PAGES, SIZE, hash_key=b"k")
    want = content(cache, (1, 2, 3, 4))
    tier = spilled(tmp_path, allocator, cache)
    assert (tier.stats.spilled, len(list(tmp_path.iterdir()))) == (8, 2)
    for each in (tier, HostTier(4, disk=DiskTier(tmp_path, 10**7))):
        handle = allocator.allocate(list(range(16)))
        pages = allocator.sequence(handle).pages
        cache = jax.tree.map(lambda a, p=pages: a.at[np.array(p)].set(0), cache)
        cache = each.load(cache, allocator, handle)
        assert allocator.sequence(handle).computed == 16
        assert content(cache, pages) == want
        assert each.stats.revived == 4
        forget(allocator, handle)


def test_a_damaged_file_of_the_disk_tier_is_as_if_it_had_never_been(tmp_path):
    cache, allocator = random_bits(jnp.float32), BlockAllocator(PAGES, SIZE, hash_key=b"k")
    tier = spilled(tmp_path, allocator, cache)
    for path in tmp_path.iterdir():
        data = bytearray(path.read_bytes())
        data[len(data) * 3 // 4] ^= 1
        path.write_bytes(data)
    handle = allocator.allocate(list(range(16)))
    tier.load(cache, allocator, handle)
    assert allocator.sequence(handle).computed == 0
    assert len(list(tmp_path.iterdir())) == 1  # the one that was read is gone


def test_the_disk_tier_keeps_to_its_capacity(tmp_path):
    cache, allocator = random_bits(jnp.float32), BlockAllocator(PAGES, SIZE, hash_key=b"k")
    one = spilled(tmp_path / "a", allocator, cache).disk.num_bytes // 2
    tier = spilled(tmp_path / "b", allocator, cache, capacity_bytes=int(1.5 * one))
    assert len(list((tmp_path / "b").iterdir())) == 1
    assert tier.disk.num_bytes <= int(1.5 * one)


def test_pages_of_another_shape_on_the_disk_are_not_taken(tmp_path):
    allocator = BlockAllocator(PAGES, SIZE, hash_key=b"k")
    spilled(tmp_path, allocator, random_bits(jnp.float32))
    tier = HostTier(4, disk=DiskTier(tmp_path, 10**7))
    handle = allocator.allocate(list(range(16)))
    tier.load(random_bits(jnp.bfloat16), allocator, handle)
    assert allocator.sequence(handle).computed == 0


def test_a_mover_may_take_its_time():
    class Slow(Held):
        visits = 4  # two copies, each asked three times

        def finish(self, copy):
            self.visits -= 1
            if self.visits >= 0:
                raise CopyPending
            return copy

    allocator, tier = BlockAllocator(PAGES, SIZE), HostTier(PAGES, mover=Slow())
    handle = started(allocator, list(range(8)))
    tier.store(None, allocator, handle)
    for stored in (0, 0, 2):
        tier.settle()
        tier.check_invariants()
        assert tier.stats.stored == stored


def test_an_interrupt_while_waiting_leaves_the_copies_in_flight():
    class Interrupted(Held):
        count = 0

        def finish(self, copy):
            self.count += 1
            if self.count == 2:
                raise KeyboardInterrupt
            return copy

    allocator, tier = BlockAllocator(PAGES, SIZE), HostTier(PAGES, mover=Interrupted())
    handle = started(allocator, list(range(12)))  # three copies of one page
    tier.store(None, allocator, handle)
    with pytest.raises(KeyboardInterrupt):
        tier.settle()
    tier.check_invariants()
    tier.settle()
    tier.check_invariants()
    assert tier.stats.stored == 3


def test_mistakes_of_a_mover_are_raised_and_failures_are_not():
    class Broken(Held):
        def __init__(self, error):
            self.error = error

        def take(self, cache, pages):
            raise self.error

    allocator = BlockAllocator(PAGES, SIZE)
    handle = started(allocator, list(range(8)))
    assert HostTier(8, mover=Broken(CopyFailed())).store(None, allocator, handle) == 0
    assert HostTier(8, mover=Broken(MemoryError())).store(None, allocator, handle) == 0
    with pytest.raises(KeyError):
        HostTier(8, mover=Broken(KeyError())).store(None, allocator, handle)
