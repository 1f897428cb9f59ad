"""A KeyboardInterrupt before any line of a call leaves an allocator that goes on."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paged_decode import allocator as package
from paged_decode.allocator import BlockAllocator, ShardedAllocator
from paged_decode.allocator.repair import repair

from .device import freeze

ROOT = Path(__file__).parents[2]
HERE = str(Path(package.__file__).resolve().parent)
S = 2
PROMPT = [*range(10, 17)]  # three full pages and one token


class ByUse:
    """An eviction rank that keeps a history."""

    def rank(self, page):
        return page.uses, page.last_used


def interrupted(call: Callable[[], Any], at: int) -> bool:
    """Run it with a KeyboardInterrupt before its line number `at` in the package; False: it had
    fewer lines, and has returned."""
    left = at

    def trace(frame, event, arg):
        nonlocal left
        if not ours(frame.f_code.co_filename):
            return None
        if event == "line":
            left -= 1
            if left == -1:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


_OURS: dict[str, bool] = {}


def ours(name: str) -> bool:
    if name not in _OURS:
        _OURS[name] = str(Path(name).resolve()).startswith(HERE)
    return _OURS[name]


class World:
    """A small allocator in use: cached, shared, reserved and raw pages, and what they must be."""

    def __init__(self, shards: int, eviction: object):
        options: dict[str, Any] = dict(hash_key=b"test", eviction=eviction)
        self.a: Any = (
            BlockAllocator(19, S, **options)
            if shards == 1
            else ShardedAllocator(19 * shards, S, num_shards=shards, **options)
        )
        a = self.a
        for first in (50, 60):  # four cached pages without an owner
            h = a.allocate([first, first + 1, first + 2, first + 3, first + 4])
            a.commit(h, 5)
            a.free(h)
        self.one = a.allocate(PROMPT)
        a.commit(self.one, 7)
        (self.two,) = a.fork(self.one)
        self.three = a.allocate([30, 31, 32])
        a.reserve(self.three, 4)
        a.commit(self.three, 2)
        self.raw = a.allocate_pages(2)
        self.bystander = a.allocate([40, 41, 42, 43, 44])
        a.commit(self.bystander, 4)
        self.state = None


def _import(w: World) -> None:
    w.a.import_state(w.state, w.raw)


def _fill(w: World) -> list[int]:
    """A prompt that hits a cached prefix and needs an eviction."""
    free = w.a.num_free if w.a.num_shards == 1 else 8
    return [50, 51, 52, 53, *range(100, 100 + S * free + 2)]


CALLS: dict[str, Callable[[World], Any]] = {
    "allocate": lambda w: w.a.allocate(_fill(w)),
    "append": lambda w: w.a.append([w.one, w.two], [[1, 2, 3], [4, 5, 6]]),
    "advance": lambda w: w.a.advance([w.one, w.two, w.three], [1, 2, 3], commit=True),
    "extend": lambda w: w.a.extend([w.one, w.two], [[1, 2], [3, 4]], [2, 1], reserve=2),
    "prepare": lambda w: w.a.prepare([w.one, w.three], 12),
    "reserve": lambda w: w.a.reserve([w.one, w.two], 3),
    "batch": lambda w: w.a.batch([w.three], 2, 3),
    "fork": lambda w: w.a.fork(w.one, 7, commit=True),
    "truncate": lambda w: w.a.truncate([w.one, w.two], [3, 1]),
    "trim": lambda w: w.a.trim([w.one, w.three]),
    "free": lambda w: w.a.free([w.one, w.three]),
    "free both owners": lambda w: w.a.free([w.one, w.two]),
    "commit": lambda w: (w.a.append([w.three], [[33]]), w.a.commit([w.three], 4)),
    "withdraw": lambda w: w.a.withdraw([w.one, w.three]),
    "allocate_pages": lambda w: w.a.allocate_pages(w.a.num_free + 2),
    "free_pages": lambda w: w.a.free_pages(w.raw),
    "reset_prefix_cache": lambda w: w.a.reset_prefix_cache(),
    "new_weights": lambda w: w.a.new_weights(b"next"),
    "prioritize": lambda w: w.a.prioritize(range(1, 12), 3),
    "import_state": _import,
}


def world(name: str, shards: int, eviction: object) -> World:
    w = World(shards, eviction)
    if name == "reset_prefix_cache":
        w.a.free(w.a.handles)
        w.a.free_pages(w.raw)
        w.raw = []
    if name == "import_state":
        other = BlockAllocator(12, S)
        handle = other.allocate([*PROMPT[:4], 90, 91, 92])
        other.commit(handle, 7)
        other.free(other.allocate([80, 81, 82]))
        w.state, where = other.export_state()
        w.raw += w.a.allocate_pages(len(where.pages) - len(w.raw))
    return w


def survives(name: str, w: World, before: dict, raw: list[int]) -> None:
    """All that must hold after the interrupt."""
    a = w.a
    a.check_invariants()
    for handle, tokens in before.items():
        if handle not in a.handles:
            assert name.startswith("free") and handle != w.bystander
            continue
        now = a.tokens(handle).tolist()
        common = min(len(now), len(tokens))
        assert now[:common] == tokens[:common]
        assert len(now) >= len(tokens) or name == "truncate" and len(now) in (3, 1)
    assert before[w.bystander] == a.tokens(w.bystander).tolist() if w.bystander in before else True
    if name not in ("free_pages", "import_state"):
        assert set(raw) <= set(raw_pages(a))
    hits_are_true(a)
    a.free(a.handles)
    held = raw_pages(a)
    assert a.num_used == len(held)
    a.free_pages(held)
    assert sorted(a.allocate_pages(a.usable_pages)) == [
        page for page in range(a.num_pages) if page % (a.num_pages // a.num_shards)
    ]
    a.check_invariants()


def raw_pages(a: Any) -> list[int]:
    size = a.num_pages // a.num_shards
    raw = np.concatenate([books.main.pool.raw for books in a._shards])
    return [page for page in np.flatnonzero(raw).tolist() if page % size]


def hits_are_true(a: Any) -> None:
    """Whatever is found holds the tokens that were asked for."""
    for prompt in ([50, 51, 52, 53, 1], [60, 61, 62, 63, 1], [*PROMPT, 1], [30, 31, 32, 33, 1]):
        if (found := a.match_prefix(prompt)) and a.num_free > len(prompt):
            handle = a.allocate(prompt)
            assert a.sequence(handle).cached in (found, 0)  # 0: on a shard that has the room
            assert a.tokens(handle).tolist() == prompt
            a.withdraw(handle)
            a.free(handle)


def run_all(shards: int, eviction: object, step: int, names: list[str]) -> None:
    """Every call, with an interrupt before each of its lines in turn, or every `step`th."""
    for name in names:
        if name == "import_state" and shards > 1:
            continue  # only a BlockAllocator imports
        at, more = 0, True
        while more:
            w = world(name, shards, eviction)
            before, raw = {h: w.a.tokens(h).tolist() for h in w.a.handles}, list(w.raw)
            more = interrupted(lambda w=w, name=name: CALLS[name](w), at)
            try:
                survives(name, w, before, raw)
            except Exception as error:
                raise SystemExit(f"{name}, interrupted before line {at}: {error!r}") from error
            at += step
        assert at > 10, name


def in_a_process(shards: int, eviction: str, step: int) -> None:
    """With types checked at every call, as they are here, it would take ten times as long."""
    command = [sys.executable, "-m", __name__, str(shards), eviction, str(step)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "shards, eviction, step", [(1, "ranked", 5), (1, "lru", 7), (2, "ranked", 11)]
)
def test_an_interrupt_before_any_line_leaves_an_allocator_that_goes_on(shards, eviction, step):
    in_a_process(shards, eviction, step)


@pytest.mark.long
@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("eviction", ["lru", "ranked"])
def test_so_does_one_before_every_line(shards, eviction):
    in_a_process(shards, eviction, 1)


def test_a_torn_repair_is_begun_again():
    torn = 120  # lines into a `free` of two sequences, when their pages are going
    at, more = 0, True
    while more:
        w = World(1, ByUse())
        before, raw = {h: w.a.tokens(h).tolist() for h in w.a.handles}, list(w.raw)
        assert interrupted(lambda w=w: CALLS["free both owners"](w), torn)
        more = interrupted(w.a.stats, at)
        survives("free", w, before, raw)
        at += 7


@pytest.mark.parametrize("eviction", [None, ByUse()], ids=["lru", "ranked"])
def test_a_repair_of_what_is_whole_changes_nothing(eviction):
    w = World(1, eviction)
    w.a.advance([w.one, w.two], [1, 2])
    w.a.truncate(w.one, 5)
    before, stacked = freeze(w.a), list(w.a._rows.vacant)
    repair(w.a._books)
    assert freeze(w.a) == before and w.a._rows.vacant == stacked


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, MemoryError])
def test_whatever_a_rank_raises_the_next_call_goes_on(error):
    class Raises(ByUse):
        def rank(self, page):
            if armed:
                raise error
            return super().rank(page)

    armed: list[int] = []
    w = World(1, Raises())
    before = freeze(w.a)
    armed.append(1)
    with pytest.raises(error):
        w.a.free([w.one, w.two])
    armed.clear()
    w.a.check_invariants()
    assert freeze(w.a) == before
    w.a.free(w.a.handles)
    w.a.check_invariants()


def test_a_thread_goes_on_after_a_call_that_another_one_tore():
    w = World(1, None)
    torn = threading.Thread(target=interrupted, args=(lambda: w.a.free(w.one), 60))
    torn.start()
    torn.join()
    w.a.check_invariants()
    w.a.free(w.a.handles)


if __name__ == "__main__":
    rank = ByUse() if sys.argv[2] == "ranked" else None
    run_all(int(sys.argv[1]), rank, int(sys.argv[3]), list(CALLS))
