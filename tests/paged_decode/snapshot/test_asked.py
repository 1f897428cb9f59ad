"""All that a request may ask for, and all that it was told, in a snapshot: format version 4."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest

from paged_decode import (
    Figures,
    SamplingParams,
    SnapshotMismatch,
    compact_snapshot,
    inspect_snapshot,
    verify_snapshot,
)
from paged_decode.engine.events import TokenEvent
from paged_decode.snapshot._asked import pack_asked, unpack_asked
from paged_decode.snapshot._open import Opened

from ..engine.test_engine_groups import engine_of
from ..tiny import fail_decode, make_engine
from . import independent_reader
from .asking import ALONE, EVERYTHING, FEW, SERVING, ask, events, told

EIGHT = tuple(range(8))
COLUMNS = ("max_new_tokens", "temperature", "top_k", "top_p", "seed")


def version_of(path) -> int:
    return path.read_bytes()[8]


def waiting(*params: SamplingParams, pending=(), **options):
    """An engine whose requests have not begun."""
    engine = make_engine(**SERVING, **options)
    for at, each in enumerate(params):
        engine.submit([at + 1, 2, 3], each)
    engine._outbox.put_back(pending, [])
    return engine


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """Files of some visits with what was told before each, and all that is told without a save."""
    engine, twin = (make_engine(28, **SERVING) for _ in range(2))
    ask(engine), ask(twin)
    files, before = {}, []
    for visit in (1, 2, 3):
        before += engine.step()
        path = tmp_path_factory.mktemp("begun") / str(visit)
        engine.save(path)
        files[visit] = path, sorted(map(told, before), key=place)
    return files, sorted(map(told, twin.stream()), key=place)


def place(event) -> tuple:
    return event[:3]


def parted(events) -> tuple[list, list[float]]:
    """What must be the same in them, and their numbers in order."""
    numbers: list[float] = []

    def exact(value):
        if isinstance(value, float):
            numbers.append(value)
            return None
        return tuple(map(exact, value)) if isinstance(value, tuple) else value

    return list(map(exact, events)), numbers


@pytest.mark.parametrize("visit", [2, *(pytest.param(n, marks=pytest.mark.long) for n in (1, 3))])
def test_requests_that_ask_for_everything_go_on_as_without_the_save(begun, visit):
    """Tokens, texts and reasons, and log-probabilities but for the rounding of another program:
    what was not saved yet is computed in a chunk, where others add in another order."""
    (path, before), whole = begun[0][visit], begun[1]
    assert version_of(path) == 4
    again = make_engine(40, **SERVING)
    again.restore(path)
    again.allocator.check_invariants()
    rest = list(again.stream())
    assert len(rest) > 20 and again.allocator.num_used == 0
    ours, theirs = parted(sorted([*before, *map(told, rest)], key=place)), parted(whole)
    assert ours[0] == theirs[0] and len(ours[1]) > 100
    assert ours[1] == pytest.approx(theirs[1], abs=1e-5)


def test_what_is_restored_is_saved_as_the_same_bytes(begun, tmp_path):
    again = make_engine(28, **SERVING)
    path, _ = begun[0][2]
    again.restore(path)
    again.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == path.read_bytes()


def test_the_saved_visits_have_all_there_is(begun):
    """What runs, a sibling, what waits; events with log-probabilities and the new reason."""
    path, _ = begun[0][1]
    sampled = independent_reader.requests(path)
    usual = independent_reader.DEFAULTS | {"stop_tokens": []}
    found = [{n for n, value in usual.items() if params[n] != value} for *_, params in sampled]
    assert (
        {*ALONE} - {"detokenize", "prompt_logprobs"} in found
        and {"detokenize"} <= set().union(*found)
        and set() in found
    )
    pending = independent_reader.events(path)
    assert {e[4] for e in pending} >= {None, "no_allowed_token"}
    assert {e[6] is None for e in pending} == {len(e[8]) > 1 for e in pending} == {False, True}


def test_a_reader_of_the_page_alone_reads_what_the_library_reads(begun):
    for path, _ in begun[0].values():
        agree(path)


def agree(path) -> None:
    """The independent reader and the library read the same requests and events."""
    with Opened(path) as opened:
        state = opened.engine
    assert state is not None
    names = [field.name for field in fields(SamplingParams)]
    ours = [
        (s.request_id, s.index, list(s.tokens), {n: getattr(s.sampling, n) for n in names})
        for s in state.samples
    ]
    theirs = independent_reader.requests(path)
    assert len(ours) == len(theirs)
    for (*mine, params), (*other, found) in zip(ours, theirs, strict=True):
        assert mine == other and params.keys() == found.keys()
        assert {n: plain(v) for n, v in params.items()} == {n: plain(v) for n, v in found.items()}
    kept = [tuple(p.event._replace(detail="")) + (p.shown,) for p in state.events]
    assert [(*e[:6], *e[7:]) for e in kept] == independent_reader.events(path)


def plain(value):
    return tuple(map(plain, value)) if isinstance(value, list | tuple) else value


def test_every_field_is_read_as_it_was_written():
    assert {*ALONE} | {*COLUMNS} == {field.name for field in fields(SamplingParams)}
    for params in (EVERYTHING, *(SamplingParams(**{n: v}) for n, v in ALONE.items())):
        columns = {name: getattr(params, name) for name in COLUMNS}
        assert SamplingParams(**columns, **unpack_asked(0, pack_asked(params))) == params
    columns = dict(max_new_tokens=1, temperature=1.0, top_k=1, top_p=0.5, seed=1)
    assert pack_asked(SamplingParams(**columns, stop_tokens=EIGHT)) == b""


@pytest.mark.parametrize("name", ALONE)
def test_one_field_alone_makes_a_file_of_version_4_that_holds_it(tmp_path, name):
    asking = SamplingParams(**{name: ALONE[name]})
    waiting(SamplingParams(), asking).save(tmp_path / "s")
    assert version_of(tmp_path / "s") == 4
    other = make_engine(**SERVING)
    other.restore(tmp_path / "s")
    assert [s.sampling for s in other.scheduler.waiting] == [SamplingParams(), asking]
    agree(tmp_path / "s")


NUMBERS = dict(logprob=-1.0, processed_logprob=-0.5)
TOLD = {
    "log-probabilities": TokenEvent(0, 0, 0, 5, **NUMBERS),
    "likeliest tokens": TokenEvent(0, 0, 0, 5, top_logprobs=((5, -1.0), (4, -2.0)), **NUMBERS),
    "a new reason": TokenEvent(0, 0, 0, None, "no_allowed_token"),
    "another": TokenEvent(0, 0, 0, None, "detokenizer_failed"),
    "text": TokenEvent(0, 0, 0, 5, text="\u00e9"),
    "figures": TokenEvent(0, 0, 0, 5, "length", figures=Figures(*FEW)),
}


@pytest.mark.parametrize("name", TOLD)
def test_one_event_alone_makes_a_file_of_version_4_that_holds_it(tmp_path, name):
    pending = [TokenEvent(0, 0, 7, 8), TOLD[name]]
    waiting(SamplingParams(), pending=pending).save(tmp_path / "s")
    assert version_of(tmp_path / "s") == 4
    other = make_engine(**SERVING)
    other.restore(tmp_path / "s")
    assert list(other._outbox.contents()[0]) == pending
    agree(tmp_path / "s")


def test_what_needs_no_new_version_is_written_as_ever(tmp_path):
    """Defaults in other words, and as many stop tokens as there are columns for."""
    defaults = SamplingParams(
        stop_tokens=EIGHT, min_p=-0.0, repetition_penalty=1.0, logit_bias={}, allowed_tokens=None
    )
    waiting(defaults, pending=[TokenEvent(0, 0, 0, None, "invalid_logits")]).save(tmp_path / "s")
    assert version_of(tmp_path / "s") == 1
    assert not any("asked" in s.name for s in inspect_snapshot(tmp_path / "s").arrays)
    agree(tmp_path / "s")


def test_biases_that_are_equal_are_equal_bytes(tmp_path):
    for name, bias in (("a", {5: -0.0, 7: 1.0}), ("b", {7: 1.0, 5: 0.0})):
        waiting(SamplingParams(logit_bias=bias)).save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_file_of_version_4_may_have_groups_and_arrays_of_the_user(tmp_path):
    engine = engine_of(**SERVING)
    ask(engine)
    engine._outbox.put_back(events()[:3], events()[3:])
    for extra, name in ((None, "groups"), ({"mine": np.arange(3)}, "both")):
        engine.save(tmp_path / name, extra=extra)
        info = verify_snapshot(tmp_path / name)
        assert version_of(tmp_path / name) == 4
        assert len(info.groups) == 2 and list(info.extra) == list(extra or {})
        agree(tmp_path / name)
    again = engine_of(**SERVING)
    restored = again.restore(tmp_path / "both")
    assert restored.extra["mine"].tolist() == [0, 1, 2]
    assert [*again._outbox.contents()[0], *again._outbox.contents()[1]] == events()


def test_a_delta_and_what_it_is_folded_to_ask_for_the_same(tmp_path):
    engine = waiting(SamplingParams(), EVERYTHING)
    parent = engine.save(tmp_path / "whole")
    engine.save(tmp_path / "delta", parent=parent)
    compact_snapshot(tmp_path / "delta", tmp_path / "folded")
    assert [version_of(tmp_path / name) for name in ("whole", "delta", "folded")] == [4] * 3
    assert (tmp_path / "folded").read_bytes() == (tmp_path / "whole").read_bytes()


def test_only_what_is_saved_decides_the_version(tmp_path):
    engine = waiting(SamplingParams(), EVERYTHING, pending=[TOLD["a new reason"]])
    engine.save(tmp_path / "asks", requests=[1])
    assert version_of(tmp_path / "asks") == 4
    other = waiting(SamplingParams(), EVERYTHING)
    other.save(tmp_path / "plain", requests=[0])
    assert version_of(tmp_path / "plain") == 1


CANNOT = {
    "named tokens": (dict(named_tokens=4), "request 1 cannot be served here: .*named_tokens is 4"),
    "alternatives": (dict(top_logits=1), "request 1 cannot be served here: .*top_logits is 1"),
    "arguments": (dict(logits_args=1), "request 1 cannot be served here: .*logits_args is 1"),
    "text": (
        dict(policies={}, score_chunk=0),
        r"request 1 cannot be served here: .*Engine\(detokenize=\)",
    ),
    "ids": (dict(vocab_size=59, top_logits=2), "request 1 cannot be served .* vocab_size is 59"),
}


@pytest.mark.parametrize("name", CANNOT)
def test_an_engine_refuses_requests_that_its_config_cannot_serve(tmp_path, name):
    config, text = CANNOT[name]
    waiting(SamplingParams(), replace(EVERYTHING, seed=1)).save(tmp_path / "s")
    other = make_engine(**SERVING | config)
    other.submit([1, 2, 3], SamplingParams(max_new_tokens=2))
    with pytest.raises(SnapshotMismatch, match=text) as caught:
        other.restore(tmp_path / "s")
    assert caught.value.path == tmp_path / "s"
    assert other.num_waiting == 1


def test_an_engine_whose_cache_was_lost_is_saved_at_once(tmp_path):
    engine = make_engine()
    request = engine.submit([1, 2, 3], SamplingParams(max_new_tokens=9))
    engine.step()
    fail_decode(engine, {0}, RuntimeError("dead"), deleting=True)
    with pytest.raises(RuntimeError, match="dead"):
        engine.step()
    engine.save(tmp_path / "s")
    again = make_engine()
    again.restore(tmp_path / "s")
    assert [e.token for e in engine.stream()] == [e.token for e in again.stream()] != []
    assert request == 0
