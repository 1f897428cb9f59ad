"""Belady against every other policy, and against all evictions that there are."""

from functools import cache
from itertools import combinations

import numpy as np
import pytest

from paged_decode import BlockAllocator, EngineConfig
from paged_decode.engine.room import Room
from paged_decode.pressure import Belady, Request, Roofline, chats, hit_rate, simulate
from paged_decode.pressure._case import EVICTIONS
from paged_decode.pressure.clairvoyant import ForetoldRoom

ROOFLINE = Roofline(
    weight_bytes=16e9,
    kv_bytes_per_token=131072.0,
    flops_per_token=16e9,
    bandwidth_bytes=3e12,
    flops=6e14,
    launch_seconds=2e-5,
    page_size=16,
)


class Anyone:
    """A page by chance."""

    def __init__(self):
        self.rng = np.random.default_rng(7)

    def rank(self, page):
        return float(self.rng.random())


def of_blocks(number, blocks, output=1, size=4):
    return Request(float(number), tuple(blocks), size, len(blocks) * size, output)


def workload(seed, count, branching, depth):
    """Prompts that are random paths down a tree, of 1 to `depth` blocks."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, depth + 1, count)
    paths = [rng.integers(0, branching, n).tolist() for n in lengths]
    return [of_blocks(i, path) for i, path in enumerate(paths)]


def most_hits(requests, capacity):
    """The most blocks found that any eviction allows: all of them are tried.

    A page is a path from the root. After a prompt its pages are there, and of the others whatever
    has room; what is kept without its parent can be kept, and cannot be found.
    """
    prompts = [[r.blocks[: i + 1] for i in range(len(r.blocks))] for r in requests]

    @cache
    def best(at, there):
        if at == len(prompts):
            return 0
        pages = prompts[at]
        found = next((i for i, page in enumerate(pages) if page not in there), len(pages))
        others = there - set(pages)
        room = min(capacity - len(pages), len(others))
        kept = (frozenset(c).union(pages) for c in combinations(sorted(others), room))
        return found + max(best(at + 1, each) for each in kept)

    return best(0, frozenset())


@pytest.mark.parametrize("capacity", [3, 4, 5])
@pytest.mark.parametrize("seed", range(8))
def test_no_eviction_at_all_finds_more_than_belady(seed, capacity):
    requests = workload(seed, 10, 2, 3)
    blocks = sum(len(r.blocks) for r in requests)
    found = hit_rate(requests, capacity, Belady()) * blocks
    assert found == pytest.approx(most_hits(requests, capacity))


def test_the_search_over_all_evictions_finds_the_hits_counted_by_hand():
    a, b, c = ([1], [2], [3])
    requests = [of_blocks(i, blocks) for i, blocks in enumerate([a, b, c, a, b, a])]
    assert most_hits(requests, 2) == 2  # a twice, and b is not there any more
    assert most_hits(requests, 3) == 3
    assert hit_rate(requests, 2) == 1 / 6  # a a moment after b, no more
    assert hit_rate(requests, 2, Belady()) == 2 / 6


@pytest.mark.parametrize("seed, capacity", [(0, 6), (1, 15), (2, 30)])
def test_no_policy_finds_more_than_belady(seed, capacity, unchecked):
    requests = workload(seed, 60, 3, 6)
    best = hit_rate(requests, capacity, Belady())
    for other in (*EVICTIONS.values(), Anyone):
        assert hit_rate(requests, capacity, other()) <= best


def test_prompts_beyond_the_capacity_are_no_uses():
    long = [of_blocks(i, [1, 2, 3, 4]) for i in (1, 3, 5)]
    short = [of_blocks(i, [b]) for i, b in ((0, 1), (2, 5), (4, 6), (6, 5))]
    requests = sorted([*long, *short], key=lambda r: r.arrival_seconds)
    assert hit_rate(requests, 2, Belady()) == 1 / 16


def test_one_object_serves_one_workload_after_another():
    belady, requests = Belady(), workload(1, 40, 3, 5)
    first = hit_rate(requests, 12, belady)
    hit_rate(workload(2, 20, 2, 4), 9, belady)
    assert hit_rate(requests, 12, belady) == first


def test_without_a_workload_it_says_who_would_tell_it():
    allocator = BlockAllocator(9, 4, eviction=Belady())
    handle = allocator.allocate(range(9))
    allocator.commit(handle, 8)
    with pytest.raises(RuntimeError, match="hit_rate and simulate"):
        allocator.free(handle)


def simulated(requests, pages, eviction, **config):
    allocator = BlockAllocator(pages + 1, 16, hash_key=b"k", eviction=eviction)
    shapes = EngineConfig(max_rows=8, prefill_chunk=512, max_sequence_tokens=pages * 16, **config)
    report = simulate(requests, allocator, ROOFLINE, config=shapes)
    allocator.check_invariants()
    return report


def test_a_simulation_with_belady_finds_more_than_with_others():
    requests = chats(10, 1.0, seed=3, turns=3, output_tokens=16)
    rates = {
        name: simulated(requests, 120, EVICTIONS[name]()).figures["hit_rate"]
        for name in ("lru", "fifo", "lfu", "belady")
    }
    assert rates["belady"] > 1.1 * max(rate for name, rate in rates.items() if name != "belady")


def test_the_same_simulation_twice_gives_the_same_report():
    belady, requests = Belady(), chats(5, 1.0, seed=3, turns=2, output_tokens=16)
    assert simulated(iter(requests), 80, belady) == simulated(requests, 80, belady)


def test_what_preempted_samples_will_need_is_kept_for_them(monkeypatch):
    # Long outputs push each other out all the time, beside prompts that nobody repeats.
    requests = [of_blocks(0.01 * i, [i], output=100, size=64) for i in range(12)]
    told = simulated(requests, 40, Belady())
    assert told.figures["preemptions"] > 5
    assert all(record.finished for record in told.records)
    monkeypatch.setattr(ForetoldRoom, "victim", Room.victim)
    untold = simulated(requests, 40, Belady())
    assert told.figures["recompute_tax"] < untold.figures["recompute_tax"]


def test_it_is_told_of_every_sample_that_loses_its_pages_and_gets_others(monkeypatch):
    lost, belady = [], Belady()
    victim = ForetoldRoom.victim

    def choose(room, candidates):
        sample = victim(room, candidates)
        lost.append((sample.request_id, sample.index))
        assert (sample.request_id, sample.index) in belady._away
        return sample

    monkeypatch.setattr(ForetoldRoom, "victim", choose)
    requests = [
        Request(0.0, (i,), 64, 64, 80, samples=2) for i in range(6)
    ]  # of which siblings are forked, and come back alone
    report = simulated(requests, 30, belady)
    assert len(lost) == report.figures["preemptions"] > 0
    assert (belady._away, belady._again) == ({}, {})
    assert all(belady._begun)


def test_requests_that_never_fit_are_over_at_once():
    belady = Belady()
    requests = [of_blocks(i, range(n)) for i, n in enumerate((2, 900, 2))]
    report = simulated(requests, 20, belady)
    assert [r.finished for r in report.records] == [True, False, True]
    assert all(belady._begun)
