"""Engines over groups of layers: saved with windows passed, the same tokens follow."""

from __future__ import annotations

from pathlib import Path

import pytest

from paged_decode import CacheLayout, PageSpec, SamplingParams, SnapshotMismatch
from paged_decode.faults import poison_free_pages

from ..engine.test_engine_groups import BOUND, ROWS, SIZE, P, engine_of
from ..tiny import DIM, KV_HEADS, dense_greedy, make_engine
from .test_engine_restore import key

LENGTHS = [3, 40, 17, 25, 9, 1, 30, 12, 22]


def begun(engine, visits: int):
    """Greedy and sampled requests of which some run, some wait, and windows have passed pages."""
    for i, (prompt, length) in enumerate(zip(P, LENGTHS, strict=True)):
        sampled = dict(temperature=1.0, seed=i) if i % 2 else {}
        engine.submit(prompt, SamplingParams(max_new_tokens=length, **sampled), n=1 + (i == 4))
    for _ in range(visits):
        engine.step()
    return engine


def rest_of(engine, *, poison: bool = False) -> list:
    events = []
    while not engine.idle:
        if poison:
            engine.runner.exchange(lambda cache: poison_free_pages(cache, engine.allocator))
        events += engine.step()
        engine.allocator.check_invariants()
    return [key(event) for event in events]


def tokens(rest: list) -> dict:
    """Tokens of every sample, whatever the order of requests."""
    found: dict = {}
    for request, sample, index, token, _ in rest:
        found[request, sample, index] = token
    return found


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[Path, list]:
    """A file of the seventh visit, and what an engine that goes on answers."""
    engine = begun(engine_of(), 7)
    firsts = [engine.allocator.sequence(s.handle).groups[1].first for s in engine.scheduler.running]
    assert max(firsts) > 1 and len(engine.scheduler.waiting)
    path = tmp_path_factory.mktemp("engine") / "s"
    engine.save(path)
    return path, rest_of(engine)


def test_tokens_after_a_restore_are_those_of_the_uninterrupted_run(saved):
    path, rest = saved
    again = engine_of(windowed=3 * ROWS * BOUND)
    again.restore(path)
    again.allocator.check_invariants()
    assert any(again.allocator.sequence(s.handle).groups[1].first for s in again.scheduler.running)
    assert tokens(rest_of(again, poison=True)) == tokens(rest)


def test_without_room_requests_wait_and_are_computed_again(saved):
    path, rest = saved
    again = engine_of(full=30, windowed=BOUND + 1, max_sequence_tokens=116)
    assert again.restore(path) and not again.scheduler.running
    assert tokens(rest_of(again, poison=True)) == tokens(rest)


def other_layout(*groups) -> CacheLayout:
    kinds = dict(num_kv_heads=KV_HEADS, head_dim=DIM, num_pages=120)
    return CacheLayout(SIZE, tuple(PageSpec(layers, window=w, **kinds) for layers, w in groups))


OTHERS = {
    "merged": ([((0, 1), None)], (None, None)),
    "wider": ([((1,), None), ((0,), 9)], (9, None)),
    "narrower": ([((1,), None), ((0,), 3)], (3, None)),
}


@pytest.mark.parametrize(
    "name", ["merged", pytest.param("wider", marks=pytest.mark.long), "narrower"]
)
def test_requests_go_on_in_other_groups_and_are_computed_again_where_pages_are_missing(saved, name):
    path, _ = saved
    groups, windows = OTHERS[name]
    engine = make_engine(layout=other_layout(*groups))
    engine.restore(path)
    assert bool(engine.scheduler.running) == (name == "narrower")
    waiting = [s for s in engine.scheduler.waiting if s.request_id == 1 or name != "narrower"]
    greedy = [s for s in waiting if not s.sampling.temperature][:2]
    texts = {(s.request_id, s.index): (tuple(s.tokens), s.left) for s in greedy}
    found: dict = {}
    for request, sample, _, token, _ in rest_of(engine, poison=True):
        found.setdefault((request, sample), []).append(token)
    for each, (text, left) in texts.items():
        assert tuple(found[each][-left:]) == dense_greedy(text, left, windows=windows)


def test_another_difference_is_refused_whatever_the_groups(saved):
    path, _ = saved
    engine = make_engine(layout=other_layout(*OTHERS["merged"][0]))
    engine.allocator.new_weights(b"other")
    with pytest.raises(SnapshotMismatch, match="fingerprint is .* one group here"):
        engine.restore(path)
    assert engine.idle


def test_a_file_of_one_group_is_restored_into_windows(tmp_path):
    """A model whose windows were masks alone before its cache had groups."""
    engine = begun(make_engine(layout=other_layout(((0, 1), None))), 7)
    engine.save(tmp_path / "s")
    other = engine_of(windowed=3 * ROWS * BOUND)
    other.restore(tmp_path / "s")
    other.allocator.check_invariants()
    firsts = [other.allocator.sequence(s.handle).groups[1] for s in other.scheduler.running]
    assert firsts and max(held.first for held in firsts) > 1
    assert max(len(held.pages) for held in firsts) <= BOUND
    assert {request for request, *_ in rest_of(other, poison=True)} > {1, 2}


def test_an_engine_of_groups_saves_deltas_between_its_steps_behind_the_loop(tmp_path):
    engine, parent = begun(engine_of(), 3), None
    for turn in range(3):
        parent = engine.save_async(tmp_path / f"{turn}", parent=parent).result(60)
        engine.step()
    engine.save(tmp_path / "whole")
    assert parent is not None and parent.written_pages < parent.num_pages
    again = engine_of()
    again.restore(tmp_path / "2")
    rest = tokens(rest_of(again))
    assert tokens(rest_of(engine)).items() <= rest.items()
