"""Priorities and places of arrival in a snapshot, and files that contradict themselves there."""

from __future__ import annotations

import msgpack
import numpy as np
import pytest

from paged_decode import (
    SamplingParams,
    SnapshotCorrupt,
    SnapshotMismatch,
    inspect_snapshot,
    verify_snapshot,
)

from ..tiny import make_engine
from . import independent_reader
from .forge import build

PARAMS = SamplingParams(max_new_tokens=6)


def waiting(*priorities: int, n: int = 1, **config):
    engine = make_engine(**config)
    for at, priority in enumerate(priorities):
        engine.submit([at + 1, 2, 3], PARAMS, priority=priority, n=n)
    return engine


def order(engine) -> list[int]:
    return [s.request_id for s in engine.scheduler.waiting]


def own(engine) -> list[tuple[int, int]]:
    return [(s.priority, s.place) for s in engine.scheduler.waiting]


def test_priorities_and_places_come_back_and_are_written_as_the_same_bytes(tmp_path):
    engine = waiting(0, 2, -1, 1)
    engine.save(tmp_path / "s")
    assert (tmp_path / "s").read_bytes()[8] == 4
    other = make_engine()
    other.restore(tmp_path / "s")
    assert order(other) == order(engine) == [1, 3, 0, 2]
    assert own(other) == own(engine) == [(2, 1), (1, 3), (0, 0), (-1, 2)]
    other.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "s").read_bytes()
    found = [
        (each["priority"], each["place"]) for each in independent_reader.beside(tmp_path / "s")
    ]
    assert found == own(engine)


def test_without_priorities_a_file_is_what_it_was(tmp_path):
    waiting(0, 0, 0).save(tmp_path / "s")
    assert (tmp_path / "s").read_bytes()[8] == 1


def test_the_restored_come_behind_those_that_are_here_as_far_apart_as_there(tmp_path):
    engine = waiting(0, 0, 0, 1, priority_ageing=2)
    engine.save(tmp_path / "s", requests=[1, 3])
    other = waiting(0, 0, 1)
    ids = other.restore(tmp_path / "s")
    assert own(other) == [(1, 2), (1, 5), (0, 0), (0, 1), (0, 3)]
    assert order(other) == [2, ids[3], 0, 1, ids[1]]
    other = waiting(priority_ageing=1)
    ids = other.restore(tmp_path / "s")  # its own ageing says who comes first
    assert order(other) == [ids[1], ids[3]]


def test_samples_that_run_wait_in_their_order_where_there_is_no_row(tmp_path):
    """Running ones, siblings and waiting ones, into an engine with one row."""
    engine = waiting(0, 1, 0, n=2)
    engine.step()
    engine.save(tmp_path / "s")
    other = make_engine(max_rows=1, row_buckets=(1,))
    other.restore(tmp_path / "s")
    places = {(s.request_id, s.index): (s.priority, s.place) for s in other.scheduler.waiting}
    places |= {(s.request_id, s.index): (s.priority, s.place) for s in other.scheduler.running}
    assert places.items() <= {(r, i): ((0, 1, 0)[r], r) for r in range(3) for i in (0, 1)}.items()
    tokens = [(e.request_id, e.sample, e.token) for e in other.stream()]
    again = make_engine()
    again.restore(tmp_path / "s")
    assert sorted(tokens) == sorted((e.request_id, e.sample, e.token) for e in again.stream())
    assert other.allocator.num_used == again.allocator.num_used == 0


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    path = tmp_path_factory.mktemp("sound") / "s"
    waiting(3, 0, n=2).save(path)
    fields, arrays, _ = independent_reader.read(path)
    assert build(fields, arrays) == path.read_bytes()
    return fields, arrays


def beside(arrays, maps) -> dict:
    parts = [msgpack.packb(each) if each else b"" for each in maps]
    return arrays | {
        "engine/asked_length": np.array([len(each) for each in parts], np.int64),
        "engine/asked_bytes": np.frombuffer(b"".join(parts), np.uint8),
    }


FIRST, SECOND = {"priority": 3}, {"place": 1}
WRONG = {
    "place 0": ([FIRST, FIRST, {"place": 0}, SECOND], "place is at its default"),
    "priority 0": ([FIRST, FIRST, SECOND, SECOND | {"priority": 0}], "priority is at its default"),
    "place -1": ([FIRST, FIRST, {"place": -1}, SECOND], "place is not from 1"),
    "place 2^53 + 1": ([FIRST, FIRST, SECOND, {"place": 2**53 + 1}], "place is not from 1"),
    "priority 2^31": ([{"priority": 2**31}, *[SECOND] * 3], "priority is not from -2"),
    "priority 2^63": ([{"priority": 2**63}, *[SECOND] * 3], "priority is not from -2"),
    "priority -2^31-1": ([{"priority": -(2**31) - 1}, *[SECOND] * 3], "priority is not from"),
    "place 1.0": ([FIRST, FIRST, SECOND, {"place": 1.0}], "place is not an integer but"),
    "priority true": ([{"priority": True}, *[SECOND] * 3], "priority is not an integer but"),
    "places alone": ([{}, {}, SECOND, SECOND], "places, but no priorities"),
    "no first": ([{"place": 1, "priority": 3}] * 2 + [SECOND] * 2, "do not begin with 0"),
    "another sibling": ([FIRST, {"priority": 4}, SECOND, SECOND], "no further sample of the"),
    "a late sibling": ([FIRST, FIRST, SECOND, {"place": 2}], "no further sample of the"),
    "nothing": ([{}] * 4, "nothing in it needs that"),
}


@pytest.mark.parametrize("name", WRONG)
def test_an_order_that_nobody_can_have_is_refused(tmp_path, sample, name):
    fields, arrays = sample
    maps, text = WRONG[name]
    path = tmp_path / "hostile"
    path.write_bytes(build(fields, beside(arrays, maps)))
    for read in (inspect_snapshot, verify_snapshot):
        with pytest.raises(SnapshotCorrupt, match=text):
            read(path)


@pytest.mark.parametrize("place", [1, 2**52, 2**53])
def test_the_largest_places_can_be_restored_and_saved_again(tmp_path, sample, place):
    fields, arrays = sample
    path = tmp_path / "far"
    path.write_bytes(
        build(fields, beside(arrays, [FIRST, FIRST, {"place": place}, {"place": place}]))
    )
    engine = make_engine()
    for _ in range(3):
        engine.restore(path)
    engine.save(tmp_path / "again")
    other = make_engine()
    other.restore(tmp_path / "again")
    assert order(other) == order(engine)


# ---- limits


def limited(now: float = 0.0):
    engine = make_engine(policies=dict(clock=lambda: now))
    engine.submit([1, 2, 3], PARAMS, max_wait=5, timeout=9.5, n=2)
    engine.submit([4, 2, 3], PARAMS, timeout=1)
    engine.submit([5, 2, 3], PARAMS)
    return engine


def test_the_seconds_that_are_left_go_on_in_another_engine(tmp_path):
    engine = limited()
    engine.scheduler.limits.clock = lambda: 2.0  # a request is overdue, and no step has seen it
    engine.save(tmp_path / "s")
    found = [(o["max_wait"], o["timeout"]) for o in independent_reader.beside(tmp_path / "s")]
    inf = float("inf")
    assert found == [(3, 7.5), (3, 7.5), (inf, -1), (inf, inf)]
    other = make_engine(policies=dict(clock=lambda: 100.0))
    other.restore(tmp_path / "s")
    assert [(s.admit_by, s.end_by) for group in other.scheduler.living.values() for s in group] == [
        (103, 107.5),
        (103, 107.5),
        (inf, 99),
        (inf, inf),
    ]
    ends = {(e.request_id, e.sample): e.finish_reason for e in other.stream() if e.finish_reason}
    assert ends == {(0, 0): "length", (0, 1): "length", (1, 0): "timeout", (2, 0): "length"}
    none = make_engine()
    none.restore(tmp_path / "s", prefix_cache=False)
    assert none.num_waiting == 3


@pytest.mark.parametrize("reason", ["waited_too_long", "timeout"])
def test_ends_that_were_not_taken_come_back(tmp_path, reason):
    engine = limited()
    engine.scheduler.limits.clock = lambda: 5.0 if reason == "waited_too_long" else 9.5
    engine.submit([9], PARAMS, timeout=100)
    engine.loop.change(engine.scheduler.expire)
    engine.save(tmp_path / "s")
    other = make_engine()
    other.restore(tmp_path / "s")
    ends = {e.request_id: e.finish_reason for e in other.stream() if e.finish_reason}
    assert ends == {0: reason if reason[0] == "w" else "waited_too_long", 1: "timeout"} | {
        2: "length",
        3: "length",
    }
    assert [e[4] for e in independent_reader.events(tmp_path / "s")].count("timeout") == 1


@pytest.fixture(scope="module")
def limits(tmp_path_factory):
    path = tmp_path_factory.mktemp("sound") / "s"
    limited().save(path)
    fields, arrays, _ = independent_reader.read(path)
    return fields, arrays


TIMES = {"max_wait": 5.0, "timeout": 9.5}
NO_TIMES = {
    "nan": ([TIMES, TIMES, {"timeout": float("nan")}, {}], "timeout is not finite, or -0"),
    "-inf": ([TIMES, TIMES, {"timeout": float("-inf")}, {}], "timeout is not finite, or -0"),
    "inf": ([TIMES, TIMES, {"timeout": float("inf")}, {}], "timeout is at its default"),
    "-0": ([TIMES, TIMES, {"max_wait": -0.0}, {}], "max_wait is not finite, or -0"),
    "an integer": ([TIMES, TIMES, {"max_wait": 1}, {}], "max_wait is not a float but"),
    "another sibling": ([TIMES, {"timeout": 9.5}, {}, {}], "no further sample of the prompt"),
}


@pytest.mark.parametrize("name", NO_TIMES)
def test_limits_that_nobody_can_have_are_refused(tmp_path, limits, name):
    fields, arrays = limits
    maps, text = NO_TIMES[name]
    (tmp_path / "hostile").write_bytes(build(fields, beside(arrays, maps)))
    with pytest.raises(SnapshotCorrupt, match=text):
        inspect_snapshot(tmp_path / "hostile")


def test_a_request_with_pages_has_been_admitted(tmp_path):
    engine = limited()
    engine.step()
    engine.save(tmp_path / "s")
    fields, arrays, _ = independent_reader.read(tmp_path / "s")
    maps = independent_reader.asked_of(arrays)
    assert "max_wait" not in maps[0] and maps[0]["timeout"] == 9.5
    maps[0]["max_wait"] = 1.0
    maps[0] = dict(sorted(maps[0].items()))
    (tmp_path / "hostile").write_bytes(build(fields, beside(arrays, maps)))
    with pytest.raises(SnapshotCorrupt, match="pages and a max_wait|no further sample"):
        inspect_snapshot(tmp_path / "hostile")


# ---- pins


@pytest.fixture(scope="module")
def pinned(tmp_path_factory):
    """A pin, a request that asks for something, one that does not; an event of the first."""
    engine = make_engine()
    engine.pin(list(range(10)))
    engine.submit([1, 2, 3], PARAMS, priority=1)
    engine.submit([3, 2, 3], PARAMS)
    engine.submit([4] * 9, PARAMS)
    engine.cancel(1)
    path = tmp_path_factory.mktemp("sound") / "s"
    engine.save(path)
    fields, arrays, _ = independent_reader.read(path)
    own = independent_reader.beside(path)
    assert [each["pinned"] for each in own] == [True, False, False]
    assert independent_reader.requests(path)[0][2] == [*range(8), 0]
    assert build(fields, arrays) == path.read_bytes()
    return fields, arrays


PIN = {"pinned": True}
REQUEST, LENGTH = "engine/request", "engine/prompt_length"
NO_PINS = {
    "false": ({}, [PIN, {"pinned": False}, {}], "pinned is at its default"),
    "a number": ({}, [PIN, {"pinned": 1}, {}], "pinned is not a truth value but"),
    "not full": ({}, [PIN, PIN, {}], "pin 2 runs, or is more|not of full pages"),
    "a priority": ({}, [PIN | {"priority": 1}, {}, {}], "pin 0 runs, or is more than a prefix"),
    "a timeout": ({}, [PIN | {"timeout": 1.0}, {}, {}], "pin 0 runs, or is more than a prefix"),
    "more asked": ({}, [{"min_p": 0.5} | PIN, {}, {}], "pin 0 runs, or is more than a prefix"),
    "two tokens": ({"engine/max_new_tokens": (0, 2)}, [PIN, {}, {}], "pin 0 runs, or is more"),
    "another sample": ({"engine/sample": (0, 1)}, [PIN, {}, {}], "pin 0 runs, or is more"),
    "a token behind": ({"engine/tokens": (8, 5)}, [PIN, {}, {}], "pin 0 is not of full pages"),
    "a short prompt": ({LENGTH: (0, 8)}, [PIN, {}, {}], "has ended already|not of full pages"),
    "the id of another": ({REQUEST: (1, 0)}, [PIN, {}, {}], "a sample of a request is there twice"),
    "of a request": (
        {REQUEST: (1, 0), "engine/sample": (1, 1)},
        [PIN, {}, {}],
        "a pin has the id of a request",
    ),
    "of an event": (
        {"engine/event_request": (0, 0)},
        [PIN, {}, {}],
        "a pin has the id of a request",
    ),
}


@pytest.mark.parametrize("name", NO_PINS)
def test_pins_that_are_none_are_refused(tmp_path, pinned, name):
    fields, arrays = pinned
    changes, maps, text = NO_PINS[name]
    arrays = beside(arrays, maps)
    for column, (row, value) in changes.items():
        arrays[column] = arrays[column].copy()
        arrays[column][row] = value
    (tmp_path / "hostile").write_bytes(build(fields, arrays))
    with pytest.raises(SnapshotCorrupt, match=text):
        inspect_snapshot(tmp_path / "hostile")


def test_pins_are_written_as_the_same_bytes_and_need_a_prefix_cache(tmp_path, pinned):
    (tmp_path / "s").write_bytes(build(*pinned))
    engine = make_engine()
    assert dict(engine.restore(tmp_path / "s")) == {0: 0, 1: 1, 2: 2, 3: 3}
    engine.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "s").read_bytes()
    other = make_engine(prefix_cache=False)
    with pytest.raises(SnapshotMismatch, match="it has pins, which need an allocator with prefix"):
        other.restore(tmp_path / "s")
    assert other.idle and other.num_waiting == 0
    short = make_engine(max_sequence_tokens=10)
    short.restore(tmp_path / "s")
    assert short.num_waiting == 3
