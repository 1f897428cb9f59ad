"""The simulator: against hand-computed schedules, and against the real engine."""

import numpy as np
import pytest

from paged_decode import (
    BlockAllocator,
    CacheLayout,
    EngineConfig,
    OutOfPages,
    PageSpec,
    SamplingParams,
)
from paged_decode.policies import LeastComputed, Watermark
from paged_decode.pressure import Measured, Program, Request, Roofline, poisson, simulate
from paged_decode.pressure.report import LIFETIME_EDGES, UsageLog
from paged_decode.tiers import HostTier

from ..tiny import VOCAB, make_engine


class PerKind:
    """1 s per prefill chunk, 10 s per decode program, 3 s per copy to the host and 2 s back."""

    def seconds(self, program: Program) -> float:
        times = {"prefill": 1.0, "decode": 10.0, "copy": 0.0, "store": 3.0, "load": 2.0}
        return times[program.kind]


class Recording(BlockAllocator):
    """Notes every successful call that changes something, with the pages that it left."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.events = []

    def _note(self, name, handles):
        self.check_invariants()
        handles = np.atleast_1d(np.asarray(handles, np.int64)).tolist()
        infos = [self.sequence(h) for h in handles]
        self.events.append((name, handles, [(i.length, i.computed, i.pages) for i in infos]))

    def allocate(self, *args, **kwargs):
        handle = super().allocate(*args, **kwargs)
        self._note("allocate", handle)
        return handle

    def prepare(self, handles, end):
        prepared = super().prepare(handles, end)
        self._note("prepare", handles)
        return prepared

    def append(self, handles, tokens, counts=None):
        copies = super().append(handles, tokens, counts)
        self._note("append", handles)
        return copies

    def commit(self, handles, computed):
        super().commit(handles, computed)
        self._note("commit", handles)

    def free(self, handles):
        super().free(handles)
        self.events.append(("free", np.atleast_1d(handles).tolist()))


def request(arrival, blocks, output, block=4):
    return Request(arrival, tuple(blocks), block, len(blocks) * block, output)


CONFIG = EngineConfig(max_rows=2, decode_steps=4, prefill_chunk=8)


def test_a_lone_request_takes_the_steps_computed_by_hand():
    # 12 tokens: 11 are prefilled in chunks of 8 and 3, one per visit, and the second visit goes
    # on to decode 4 of 6 tokens, the third decodes 2 more. Tokens are there when theirs is read.
    report = simulate([request(2.0, [1, 2, 3], 6)], BlockAllocator(9, 4), PerKind(), config=CONFIG)
    (record,) = report.records
    assert record.first_seconds == 2 + 2 + 10
    assert record.end_seconds == 2 + 2 + 10 + 10
    assert (record.output_tokens, record.finished, record.preemptions) == (6, True, 0)
    assert report.figures["recompute_tax"] == 0


class WithHost(PerKind):
    """A host that needs some time for everything."""

    def host_seconds(self, work: str, size: int) -> float:
        times = {"submit": 0.5, "prefill": 0.25, "decode": 0.125 * size, "read": 4.0}
        return times.get(work, 0.0625)


def test_the_host_plans_and_reads_while_the_device_works_and_both_take_their_time():
    # The device begins at 2 + 0.5 + 0.25 + 0.0625 with the first chunk, and has the second when
    # it is over: the host has planned it by then. So it is with the decode programs; the first is
    # over at 14.8125, and read by 18.8125; the second at 24.8125, and read by 28.8125.
    report = simulate([request(2.0, [1, 2, 3], 6)], BlockAllocator(9, 4), WithHost(), config=CONFIG)
    (record,) = report.records
    assert record.first_seconds == 2.8125 + 1 + 1 + 10 + 4
    assert record.end_seconds == 2.8125 + 1 + 1 + 10 + 10 + 4
    assert report.figures["seconds"] == record.end_seconds


def test_who_comes_while_a_program_runs_waits_for_the_one_that_is_queued_behind_it():
    # The first decodes from 1 s on, in programs until 11, 21, 31, 41 s. The second comes in the
    # first of these, and is seen when that is read, at 11 s; then the next one is queued already.
    # Its chunk and its first tokens take 11 s from 21 s on.
    two = [request(0.0, [1], 16), request(5.0, [2], 4)]
    report = simulate(two, BlockAllocator(17, 4), PerKind(), config=CONFIG)
    assert [r.first_seconds for r in report.records] == [11, 32]


def test_the_events_of_a_lone_request_are_those_written_by_hand():
    # 5 tokens, 6 to come, pages of 4: the newest token is always outside the pages.
    allocator = Recording(9, 4)
    simulate([request(0.0, [1], 6, block=5)], allocator, PerKind(), config=CONFIG)
    (handle,) = allocator.events[0][1]
    assert allocator.events == [
        ("allocate", [handle], [(5, 0, (1, 2))]),
        ("commit", [handle], [(4, 4, (1,))]),  # truncated to 4, one chunk, the page is full
        ("prepare", [handle], [(4, 4, (1, 2))]),  # 4 steps
        ("prepare", [handle], [(4, 4, (1, 2, 3))]),  # the 2 that are left, before the 4 are read
        ("append", [handle], [(8, 4, (1, 2, 3))]),
        ("commit", [handle], [(8, 8, (1, 2, 3))]),
        ("append", [handle], [(10, 8, (1, 2, 3))]),
        ("commit", [handle], [(10, 10, (1, 2, 3))]),
        ("free", [handle]),
    ]


def test_the_second_of_two_equal_prompts_finds_the_first():
    two = [request(0.0, [1, 2, 3], 2), request(50.0, [1, 2, 3], 2)]
    report = simulate(two, BlockAllocator(9, 4), PerKind(), config=CONFIG)
    assert [r.hit_tokens for r in report.records] == [0, 8]


def test_when_two_outgrow_the_pool_the_last_admitted_gives_way_once():
    # 5 pages: prompts of 4 tokens take one page each and grow to 12 tokens, three pages each.
    two = [request(0.0, [1], 8), request(0.0, [2], 8)]
    report = simulate(two, BlockAllocator(6, 4), PerKind(), config=CONFIG)
    assert [r.preemptions for r in report.records] == [0, 1]
    assert all(r.finished for r in report.records)


def test_a_swapped_sample_takes_the_copies_computed_by_hand():
    # Two chunks (1 s each), a program of four steps, one of one step: at 22 s the second gives way
    # with 8 computed tokens. The first ends 10 s later. Then a chunk and a program: 43 s. Or: two
    # copies of a page to the host, which take 6 of those 10 s, and two back (2 s each): 46 s.
    two = [request(0.0, [1], 8), request(0.0, [2], 8)]
    for tier, end, tax in ((None, 43, 8 / 30), (HostTier(8, buckets=(4,)), 46, 0)):
        allocator = BlockAllocator(6, 4, prefix_cache=False)
        report = simulate(two, allocator, PerKind(), config=CONFIG, tier=tier)
        assert [r.end_seconds for r in report.records] == [32, end]
        assert report.figures["recompute_tax"] == pytest.approx(tax)
        assert report.figures["swapped_in_pages"] == (0 if tier is None else 2)


class Counting(PerKind):
    """How many tokens are prefilled."""

    tokens = 0

    def seconds(self, program):
        self.tokens += program.tokens if program.kind == "prefill" else 0
        return super().seconds(program)


@pytest.mark.parametrize("swaps", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_the_recompute_tax_counts_what_was_computed_again_and_nothing_else(seed, swaps):
    """Prompts that share nothing: all that is prefilled beyond each of them once was there before,
    whether a sample was preempted in its prompt or behind it, or came too late to share pages."""
    rng, costs = np.random.default_rng(seed), Counting()
    work = [
        Request(float(at), (i,), prompt, prompt, output, samples=samples)
        for i, (at, prompt, output, samples) in enumerate(
            zip(
                rng.integers(0, 300, 24).cumsum(),
                rng.integers(1, 60, 24).tolist(),
                rng.integers(1, 60, 24).tolist(),
                rng.integers(1, 4, 24).tolist(),
                strict=True,
            )
        )
    ]
    config = EngineConfig(max_rows=6, decode_steps=4, prefill_chunk=8, max_sequence_tokens=128)
    tier = HostTier(400, buckets=(4,)) if swaps else None
    report = simulate(work, BlockAllocator(40, 4), costs, config=config, tier=tier)
    again = costs.tokens - sum(each.prompt_tokens - 1 for each in work)
    made = sum(each.output_tokens * each.samples for each in work)
    assert report.figures["recompute_tax"] == pytest.approx(again / (costs.tokens + made))
    assert report.figures["preemptions"] == sum(r.preemptions for r in report.records) > 3
    assert again > 0 or swaps


def test_no_two_of_many_samples_generate_the_same_text():
    # A page of the prompt, and for each sample one that it has filled.
    work = [Request(100.0 * i, (0,), 5, 5, 8, samples=1100) for i in range(2)]
    config = EngineConfig(max_rows=64, decode_steps=8, prefill_chunk=8)
    allocator = BlockAllocator(5000, 4)
    simulate(work, allocator, PerKind(), config=config)
    assert allocator.stats().published == 1 + 2 * 1100 * 2


def test_what_can_never_fit_is_refused_and_what_outgrows_the_pool_ends():
    both = [request(0.0, range(9), 1), request(0.0, [1], 90)]
    report = simulate(both, BlockAllocator(9, 4), PerKind(), config=CONFIG)
    assert [r.finished for r in report.records] == [False, False]
    assert [r.output_tokens for r in report.records] == [0, 28]
    assert all(r.end_seconds is not None for r in report.records)


def test_a_tier_that_is_none_is_refused_by_name(unchecked):
    with pytest.raises(TypeError, match="tier must be a HostTier, got 5"):
        simulate([], BlockAllocator(9, 4), PerKind(), config=CONFIG, tier=5)


def test_the_same_seed_gives_the_same_report():
    def once():
        work = poisson(60, 2.0, seed=5, prompt_median=30.0, output_median=10.0)
        return simulate(
            work,
            BlockAllocator(65, 4, hash_key=b"k"),
            PerKind(),
            config=CONFIG,
            victim=LeastComputed(),
        )

    assert once() == once()


@pytest.mark.parametrize("num_pages, preempts", [(64, False), (13, True)])
def test_simulated_and_real_engine_make_the_same_allocator_events(num_pages, preempts):
    rng = np.random.default_rng(4)
    # No two prompts are equal: greedy outputs would be, too, and a simulation cannot know that.
    work = [
        request(
            0.0,
            [*rng.integers(0, 3, rng.integers(0, 3)).tolist(), 10 + i],
            int(rng.integers(1, 20)),
        )
        for i in range(10)
    ]
    policies = dict(admission=Watermark(0))
    recording = Recording(num_pages, 4, hash_key=b"test")
    real = make_engine(num_pages, policies=policies, allocator=recording)
    for each in work:
        assert each.prompt().max() < VOCAB
        real.submit(each.prompt().tolist(), SamplingParams(max_new_tokens=each.output_tokens))
    list(real.stream())

    modelled = Recording(num_pages, 4, hash_key=b"test")
    simulate(work, modelled, PerKind(), config=real.config, **policies)
    assert modelled.events == real.allocator.events
    assert (real.stats.preemptions > 0) == preempts


def test_a_page_lives_from_being_taken_to_being_freed_or_evicted():
    allocator = BlockAllocator(4, 2, hash_key=b"k")
    usage = UsageLog(allocator)
    usage.note(0.0)
    plain, cached = allocator.allocate([1]), allocator.allocate([5, 6, 7])
    allocator.commit(cached, 2)
    usage.note(1.0)
    allocator.free([plain, cached])  # two pages are gone, the full one stays
    usage.note(5.0)
    allocator.allocate_pages(3)  # and is evicted, and taken by another at once
    usage.note(13.0)
    bins = dict(zip((*LIFETIME_EDGES, float("inf")), usage.lifetimes, strict=True))
    assert {edge: n for edge, n in bins.items() if n} == {4.0: 2, 16.0: 1}  # 4, 4 and 12 s
    assert usage.utilisation() == pytest.approx((1 * 3 + 4 * 0 + 8 * 3) / 13 / 3)


def test_measured_times_lie_on_a_line_between_those_that_were_measured():
    timed = [(Program("decode", 4, 2, 8, 0), 1.0), (Program("decode", 4, 6, 24, 0), 3.0)]
    costs = Measured.fit([*timed, (Program("load", 1, 1, 0, 0), 0.5)])
    assert costs.seconds(Program("decode", 4, 3, 12, 0)) == pytest.approx(1.5)
    assert costs.seconds(Program("load", 4, 1, 0, 0)) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="prefill"):
        costs.seconds(Program("prefill", 1, 8, 8, 0))


def test_a_simulation_keeps_the_promise_of_the_pool():
    allocator = BlockAllocator(9, 4)
    simulate([request(0.0, [1], 4)], allocator, PerKind(), config=CONFIG)
    assert allocator.num_used == 0
    with pytest.raises(OutOfPages):
        allocator.allocate_pages(9)


def test_a_window_is_read_no_further_than_itself_and_its_pool_has_figures_of_its_own():
    costs = Roofline(0.0, 1.0, 0.0, 1.0, 1.0, 0.0, window_bytes_per_token=(100.0,))
    program = Program("decode", 4, 2, 2, 30, (7,))
    assert costs.seconds(program) == (2 + 30) + 100 * (2 + 7)
    kinds = dict(num_kv_heads=1, head_dim=8)
    groups = PageSpec((1,), num_pages=30, **kinds), PageSpec((0,), num_pages=9, window=6, **kinds)
    allocator, programs = BlockAllocator(CacheLayout(4, groups)), []

    class Noting(PerKind):
        def seconds(self, program):
            programs.append((program.kind, program.context_tokens, program.window_tokens))
            return super().seconds(program)

    report = simulate([request(0.0, [1, 2, 3, 4, 5], 6)], allocator, Noting(), config=CONFIG)
    # 20 tokens: 19 in chunks of 8; then 4 and 2 steps from lengths 20 and 24.
    assert programs == [
        ("prefill", 0, (0,)),
        ("prefill", 8, (6,)),
        ("prefill", 16, (6,)),
        ("decode", 20 + 21 + 22 + 23, (4 * 6,)),
        ("decode", 24 + 25, (2 * 6,)),
    ]
    figures = report.figures
    assert (figures["peak_used_pages"], figures["peak_used_pages/1"]) == (7, 4)
    assert 0 < figures["utilisation/1"] < 1 and figures["evictions/1"] == figures["copies/1"] == 0
