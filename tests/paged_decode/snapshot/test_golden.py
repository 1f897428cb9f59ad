"""Versions 1 to 5 are read for ever, by the library and by a reader made from the page of docs."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from paged_decode import SamplingParams, load_snapshot, save_snapshot, verify_snapshot

from ...golden.make_snapshots import EXTRA, make
from ..engine.test_engine_groups import engine_of
from ..tiny import make_engine, prompts
from . import independent_reader
from .asking import EVERYTHING, SERVING, ask, events, told
from .grouped import LAYOUTS, TWO, allocator_of, cache_of
from .small import LAYERS, busy, content, make_allocator, make_cache
from .test_asked import agree

GOLDEN = Path(__file__).parents[2] / "golden"
DTYPES = ("float32", "bfloat16", "float8_e4m3fn", "int8")


@pytest.mark.parametrize("name", [*DTYPES, "delta"])
def test_a_golden_snapshot_restores_the_state_that_it_was_made_of(name):
    dtype = np.dtype(getattr(ml_dtypes, name, "bfloat16" if name == "delta" else name))
    cache, allocator, handles = busy(dtype=dtype, fingerprint=b"golden")
    if name == "delta":
        allocator.free(handles[0])
        handles = handles[1:]
    other = make_allocator(30, fingerprint=b"golden")
    path = GOLDEN / f"snapshot_v1_{name}.pgd"
    restored = load_snapshot(path, make_cache(30, dtype, seed=3), other)
    other.check_invariants()
    by_tokens = {tuple(other.tokens(h).tolist()): h for h in restored.handles}
    for handle in handles:
        twin = by_tokens[tuple(allocator.tokens(handle).tolist())]
        for a, b in zip(
            content(cache, allocator, handle), content(restored.cache, other, twin), strict=True
        ):
            np.testing.assert_array_equal(a, b)


def test_the_golden_engine_continues_with_the_tokens_of_an_uninterrupted_one():
    engine, twin = make_engine(), make_engine()
    engine.restore(GOLDEN / "snapshot_v1_engine.pgd")
    for prompt in prompts(3, seed=6):
        twin.submit(prompt, SamplingParams(max_new_tokens=12, temperature=0.7, seed=3), n=2)
    whole = {(e.request_id, e.sample, e.index): e for e in twin.stream()}
    rest = list(engine.stream())
    assert rest and all(told(whole[e.request_id, e.sample, e.index]) == told(e) for e in rest)
    ends = {(e.request_id, e.sample) for e in rest if e.finish_reason == "length"}
    assert ends == {(request, sample) for request in range(3) for sample in range(2)}


def test_this_release_still_writes_the_golden_bytes(tmp_path):
    """Equal state, equal bytes; the engine's pages hold floats that a processor may round anew."""
    make(tmp_path)
    for path in sorted(GOLDEN.glob("*.pgd")):
        verify_snapshot(path)
        if "engine" not in path.name:
            assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize("name", [*DTYPES, "delta", "engine"])
def test_a_reader_written_from_the_page_alone_reads_the_same(name):
    path = GOLDEN / f"snapshot_v1_{name}.pgd"
    info = verify_snapshot(path)
    fields, arrays, ident = independent_reader.read(path)
    assert ident == info.id and fields["metadata"] == info.metadata
    found = independent_reader.sequences(path)
    assert len(found) == info.sequences and sum(len(t) for t, _, _ in found) == info.tokens
    if name == "engine":
        assert len(arrays["engine/request"]) == info.requests == 6
        return
    dtype = arrays["kv/k_pages/0"].dtype
    other = make_allocator(40, fingerprint=b"golden")
    restored = load_snapshot(path, make_cache(40, dtype), other)
    for (tokens, salt, pages), handle in zip(found, restored.handles, strict=True):
        assert tokens == other.tokens(handle).tolist()
        key = other.sequence(handle).cache_salt
        assert salt == {None: b"\0", "tenant": b"stenant", b"x": b"bx"}[key]
        held = list(other.sequence(handle).pages)
        for layer in range(LAYERS):
            for kind in ("k_pages", "v_pages"):
                here = np.array(getattr(restored.cache, kind)[layer])[held]
                there = independent_reader.pages(path, f"kv/{kind}/{layer}")[pages]
                assert here.tobytes() == there.tobytes()


@pytest.mark.parametrize("name", [*LAYOUTS, "delta"])
def test_a_golden_snapshot_of_groups_is_read_alike_by_a_reader_of_the_page_alone(name):
    path, layout = GOLDEN / f"snapshot_v2_{name}.pgd", LAYOUTS.get(name, TWO)
    info, (fields, _, ident) = verify_snapshot(path), independent_reader.read(path)
    assert ident == info.id
    assert fields["groups"] == [[g.window or 0, g.num_pages, list(g.layers)] for g in info.groups]
    allocator = allocator_of(layout, fingerprint=b"golden")
    restored = load_snapshot(path, cache_of(layout, seed=5), allocator)
    allocator.check_invariants()
    found = independent_reader.sequences(path)
    for at, (handle, (tokens, *_)) in enumerate(zip(restored.handles, found, strict=True)):
        assert tokens == allocator.tokens(handle).tolist()
        for group, here in enumerate(allocator.sequence(handle).groups):
            first, pages = independent_reader.held(path, group)[at]
            assert first == here.first
            for layer in layout.groups[group].layers:
                for kind in ("k_pages", "v_pages"):
                    ours = np.asarray(getattr(restored.cache, kind)[layer])[list(here.pages)]
                    theirs = independent_reader.pages(path, f"kv/{kind}/{layer}")[pages]
                    assert ours.tobytes() == theirs.tobytes()


@pytest.mark.parametrize("name", ["one", "two"])
def test_golden_arrays_of_the_user_are_read_alike_by_a_reader_of_the_page_alone(name):
    path, groups = GOLDEN / f"snapshot_v3_{name}.pgd", 1 if name == "one" else 2
    info, (fields, arrays, ident) = verify_snapshot(path), independent_reader.read(path)
    assert ident == info.id and len(info.groups) == groups and ("groups" in fields) == (groups > 1)
    restored = load_snapshot(path)
    found = {n.removeprefix("extra/"): a for n, a in arrays.items() if n.startswith("extra/")}
    assert list(EXTRA) == list(info.extra) == list(restored.extra) == list(found)
    for name, array in EXTRA.items():
        for each in (restored.extra[name], found[name]):
            assert (each.dtype, each.shape) == (array.dtype, array.shape)
            assert each.tobytes() == array.tobytes()


@pytest.mark.parametrize("name", ["engine", "waiting"])
def test_golden_requests_that_ask_for_everything_are_read_alike(name):
    path, groups = GOLDEN / f"snapshot_v4_{name}.pgd", 1 if name == "engine" else 2
    info, (fields, _, ident) = verify_snapshot(path), independent_reader.read(path)
    assert ident == info.id and len(info.groups) == groups and ("groups" in fields) == (groups > 1)
    assert list(info.extra) == ([] if name == "engine" else list(EXTRA))
    agree(path)
    found = independent_reader.events(path)
    assert any(e[4] == "no_allowed_token" for e in found) and any(len(e[8]) > 1 for e in found)
    if name == "waiting":
        again = engine_of(**SERVING)
        again.restore(path)
        assert [*again._outbox.contents()[0], *again._outbox.contents()[1]] == events()
        assert next(iter(again.scheduler.waiting)).sampling == EVERYTHING


def test_the_golden_engine_that_was_asked_for_everything_goes_on_as_an_uninterrupted_one():
    """But for log-probabilities, which a processor may round anew."""
    engine, twin = (make_engine(**SERVING) for _ in range(2))
    engine.restore(GOLDEN / "snapshot_v4_engine.pgd")
    ask(twin)
    assert twin.step() == []
    rest, whole = (sorted(each.stream(), key=lambda e: e[:3]) for each in (engine, twin))
    assert [e[:5] for e in rest] == [e[:5] for e in whole]
    for a, b in zip(rest, whole, strict=True):
        numbers = [[e.logprob or 0, e.processed_logprob or 0] for e in (a, b)]
        np.testing.assert_allclose(*numbers, rtol=0, atol=1e-3)
        assert [i for i, _ in a.top_logprobs] == [i for i, _ in b.top_logprobs]


def test_the_golden_order_is_read_alike_and_restored():
    path, inf = GOLDEN / "snapshot_v4_order.pgd", float("inf")
    agree(path)
    turns = [(o["pinned"], o["priority"], o["place"]) for o in independent_reader.beside(path)]
    assert turns == [(True, 0, 0), *[(False, 3, 2)] * 2, (False, 0, 3), (False, -1, 1)]
    left = [(o["max_wait"], o["timeout"]) for o in independent_reader.beside(path)]
    assert left == [(inf, inf), *[(0.25, inf)] * 2, (inf, inf), (inf, 29.75)]
    engine = make_engine(policies=dict(clock=lambda: 0.0))
    ids = engine.restore(path)
    assert [s.request_id for s in engine.scheduler.waiting] == [2, 0, 3, 1]
    rest = list(engine.stream())
    assert {e.request_id for e in rest} == {1, 2, 3} and engine.pinned_pages == 2
    assert engine.allocator.match_prefix(range(9), cache_salt="tenant") == 8
    engine.unpin(ids[0])
    assert engine.allocator.num_used == 0


def test_arrays_of_several_chunks_agree_with_the_page_too(tmp_path):
    rng = np.random.default_rng(0)
    pool = {"k": rng.standard_normal((700, 4, 4, 256)).astype(np.float32)}  # 11 MB
    allocator = make_allocator(700)
    handle = allocator.allocate(rng.integers(0, 9, 2700))
    save_snapshot(tmp_path / "s", pool, allocator)
    fields, arrays, _ = independent_reader.read(tmp_path / "s")
    assert [len(c) for *_, c in fields["arrays"]][-1] == 3 * 4
    pages = list(allocator.sequence(handle).pages)
    np.testing.assert_array_equal(arrays["kv/k"], pool["k"][pages])
    other = make_allocator(800)
    restored = load_snapshot(tmp_path / "s", {"k": np.zeros((800, 4, 4, 256), "f4")}, other)
    held = list(other.sequence(restored.handles[0]).pages)
    np.testing.assert_array_equal(np.array(restored.cache["k"])[held], pool["k"][pages])
