"""Measures the programs of an engine, and what the host does around them."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from importlib import metadata
from typing import Any, cast

import jax
import numpy as np

from ..allocator import BlockAllocator, PageCopies
from ..engine import Engine
from ..engine.params import SamplingParams
from ..engine.plans import Taken
from ..engine.records import Chunk, Decode, Enter, Prefill, TableDelta
from ..engine.room import forget_prefixes
from ..tiers import HostTier
from ..tiers._wanted import part_of, with_part
from .costs import Program
from .fitted import Fit, Fitted, Line, fit_line, fit_program, shape_of
from .hosttimer import HostTimer
from .programs import decode_program, prefill_program
from .real import run
from .workload import Request

__all__ = ["calibrate"]

_LEAST_SECONDS = 0.1  # of a timing
_MOST_LAUNCHES = 12
_ROUNDS = 3  # the median of so many timings counts
_LAUNCHES = 2 + _ROUNDS * (_MOST_LAUNCHES + 2)  # of a point
_ENTER = 8  # rows that begin in one message


def calibrate(engine: Engine, *, progress: Callable[[str], object] | None = None) -> Fitted:
    """Measure a warm, idle engine and fit a cost model to it.

    Every compiled decode and prefill program runs with several lengths and counts of rows, on
    pages whose content does not matter; then a few requests go through the engine, to see what the
    host does. Greedy decoding is what is measured. The prefix cache is empty afterwards.

    Args:
      engine: after `warmup`, without requests.
      progress: called with what is measured next.

    Raises:
      NotImplementedError: the pool is split over a data axis, or the engine has a drafter, whose
        steps depend on texts.
      ValueError: the engine is not idle, or has no `vocab_size` in its config.
    """
    if not isinstance(engine.allocator, BlockAllocator):
        raise NotImplementedError("calibrate measures one pool, not one split over a data axis")
    if engine.runner._drafter is not None:
        raise NotImplementedError("how many steps a drafter saves depends on texts: calibrate none")
    if not engine.idle or engine.allocator.num_used:
        raise ValueError("expected an idle engine, got one with requests or pages in use")
    if engine.config.vocab_size is None:
        raise ValueError("give the engine's config a vocab_size: requests are made of its ids")
    say = progress or (lambda text: None)
    forget_prefixes(engine.allocator)
    device = _Device(engine)
    try:
        programs = dict[tuple[str, int, int], Fit]()
        for text, timings in device.measure():
            say(text)
            shapes: dict[Any, list[tuple[Program, float]]] = {}
            for program, seconds in timings():
                shape = shape_of(program, engine.config.decode_steps)
                shapes.setdefault(shape, []).append((program, seconds))
            for shape, each in shapes.items():
                programs[shape] = fit_program(each, engine.config.decode_steps)
    finally:
        engine.runner.restart(lost=False)
    say("the host")
    host = _host(engine)
    host["launch"] = fit_line([(0, each) for each in device.launches])
    forget_prefixes(engine.allocator)
    config = engine.config
    sizes = {
        "page_size": engine.allocator.page_size,
        **{n: getattr(config, n) for n in ("max_rows", "decode_steps", "prefill_chunk")},
        **{n: getattr(config, n) for n in ("prefill_rows", "prefill_tokens")},
        **{n: getattr(config, n) for n in ("row_buckets", "chunk_buckets")},
    }
    return Fitted(programs, host, sizes, _about(engine))


def _about(engine: Engine) -> dict[str, Any]:
    pages = engine.cache.k_pages
    layers = sum(array.shape[0] if array.ndim == 5 else 1 for array in pages)
    heads, dim, dtype = pages[0].shape[-3], pages[0].shape[-1], pages[0].dtype
    numbers = sum(getattr(leaf, "size", 1) for leaf in jax.tree.leaves(engine.params))
    names = ("paged-decode", "jax", "jaxlib", "numpy")
    return {
        "card": next(iter(pages[0].devices())).device_kind,
        "model": f"{numbers:,} weights; {layers} layers, {heads} KV heads of {dim}, {dtype} pages",
        "versions": {"python": platform.python_version()} | {n: _version(n) for n in names},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "terms": "seconds = factors x [1, steps or tokens (pages), query-token pairs, longest row, "
        "tokens read in windows ...]; residuals are parts of what was measured",
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


class _Device:
    """Runs the engine's programs on rows and pages of its own making.

    Attributes:
      launches: seconds from a launch to its end on an idle device, less those of the program.
    """

    def __init__(self, engine: Engine):
        self.engine, self.runner, self.config = engine, engine.runner, engine.config
        self.allocator = engine.allocator
        self.windows = [window for _, window in self.allocator.pools if window is not None]
        self.size = self.allocator.page_size
        self.nothing = Taken.total([], len(self.allocator.pools))
        self.launches: list[float] = []

    def measure(self) -> Iterator[tuple[str, Callable[[], Iterator[tuple[Program, float]]]]]:
        """What comes next, and how to measure it."""
        for rows in self.config.row_buckets:
            yield f"decode, {rows} rows", lambda rows=rows: self._decode(rows)
        for width in self.config.chunk_buckets:
            yield f"prefill, {width} tokens a row", lambda width=width: self._prefill(width)
        yield "copies", self._copies
        if self.engine.tier is not None:
            yield "the host tier", self._tier

    # ---- decode

    def _decode(self, rows: int) -> Iterator[tuple[Program, float]]:
        """All steps and fewer, of rows that are short, long, and of one that is long."""
        most, each = self.config.decode_steps, self._longest(rows)
        alone = self._longest(1)
        short, middle = min(2 * self.size, each), max(each // 3, 1)
        for steps in sorted({most, max(most // 2, 1), 1}, reverse=True):
            shapes = [[short] * rows, [middle] * rows, [each] * rows]
            if rows > 1:
                shapes += [[alone, *[short] * (rows - 1)], [each] * (rows // 2 + 1)]
            else:
                shapes += [[alone // 2 + 1]]
            for lengths in shapes if steps == most else (shapes[0], shapes[2]):
                yield self._decode_point(lengths, steps)

    def _decode_point(self, lengths: Sequence[int], steps: int) -> tuple[Program, float]:
        rows = _Decoding(self, lengths, steps)
        self.runner.wait(rows.launch())
        first = rows.at
        seconds = self._timed(rows.launch)
        middle = rows.begin + (first + rows.at) // 2 * steps
        return decode_program(self.plan(middle, steps), self.config, self.windows), seconds

    def plan(self, context: np.ndarray, steps: int, slot: int = 0) -> Decode:
        """So many steps of rows that have these tokens, in the slots from `slot` on."""
        slots = np.arange(slot, slot + len(context), dtype=np.int32)
        budgets = np.full(len(context), steps, np.int32)
        copies, tables = self.nothing.copies, self._one_entry()
        return Decode(0, copies, tables, (), slots, budgets, context, ())

    def enter(self, begin: np.ndarray, end: np.ndarray, slot: int = 0) -> None:
        """Rows of these lengths, with pages up to those, each with its own if there are so many."""
        sampling, counts = SamplingParams(max_new_tokens=2**30, seed=0), -(-end // self.size)
        starts = np.cumsum(counts) - counts
        for first in range(0, len(begin), _ENTER):
            rows = np.arange(first, min(first + _ENTER, len(begin)), dtype=np.int32)
            pairs = zip((slot + rows).tolist(), begin[rows].tolist(), strict=True)
            enter = tuple(Enter(each, np.zeros(n, np.int32), 1, sampling) for each, n in pairs)
            self.runner.enter(enter, self._tables(slot + rows, counts[rows], starts[rows]))

    def _one_entry(self) -> tuple[TableDelta, ...]:
        """That of the first page of row 0, as it is: visits rarely change no table."""
        return self._tables(*np.array([[0], [1], [0]]))

    def _tables(
        self, slots: np.ndarray, counts: np.ndarray, starts: np.ndarray
    ) -> tuple[TableDelta, ...]:
        """In every group so many pages for these rows, from the page with that number on."""
        places = np.concatenate([np.arange(count) for count in counts])
        number = np.repeat(starts, counts) + places
        rows = np.repeat(slots, counts).astype(np.int32)
        return tuple(
            TableDelta(rows, places.astype(np.int32), (1 + number % (n - 1)).astype(np.int32))
            for n, _ in self.allocator.pools
        )

    def _longest(self, rows: int) -> int:
        """Tokens of each of so many rows that fill the pool, or are as long as they may be."""
        pool = min(pages - 1 for pages, window in self.allocator.pools if window is None)
        return max(1, min(self.engine.max_sequence_tokens, pool * self.size // rows))

    # ---- prefill

    def _prefill(self, width: int) -> Iterator[tuple[Program, float]]:
        """Full and shorter chunks, at the beginning of prompts and late, in all rows or one.

        On a card that slows down as it gets hot, each is followed by a decode program, as it is in
        a visit, and that is taken off again.
        """
        rows = min(self.config.prefill_rows, self.config.max_rows)
        full = min(width, self._longest(rows))
        late, alone = self._longest(rows) - full, self._longest(1) - full
        less = full // 2 + 1 if full > 1 else 1
        behind = None
        if _gets_hot(self.engine) and rows < self.config.max_rows:
            short = [min(2 * self.size, self._longest(1))]
            behind = _Decoding(self, short, self.config.decode_steps, self.config.max_rows - 1)
        decoding = 0.0 if behind is None else self._timed(behind.launch)
        for chunks in (
            [(0, full)] * rows,
            [(late // 2, full)] * rows,
            [(late, full)] * rows,
            [(0, less)] * rows,
            [(late, less)] * rows,
            [(0, full)],
            [(alone, full)],
        ):
            program, both = self._prefill_point(width, chunks, behind)
            if (seconds := both - decoding) <= 0:  # too short to be told apart
                program, seconds = self._prefill_point(width, chunks, None)
            yield program, seconds

    def _prefill_point(
        self, width: int, chunks: Sequence[tuple[int, int]], behind: _Decoding | None
    ) -> tuple[Program, float]:
        ends = np.array([begin + count for begin, count in chunks], np.int64)
        self.enter(ends + 1, ends)
        given = tuple(Chunk(slot, begin, [0] * count) for slot, (begin, count) in enumerate(chunks))
        plan = Prefill(self.nothing.copies, self._one_entry(), (), width, given, ())

        def launch() -> Any:
            out = self.runner.prefill(plan)
            return out if behind is None else behind.launch()

        self.runner.wait(launch())
        seconds = self._timed(launch)
        return prefill_program(plan, self.config, self.windows), seconds

    # ---- copies

    def _copies(self) -> Iterator[tuple[Program, float]]:
        """Of pages within the pool, in programs of a power of two of them."""
        usable = min(pages - 1 for pages, _ in self.allocator.pools)
        for count in sorted({1, max(1, min(self.config.max_rows, usable // 2))}):
            src = np.arange(1, 1 + count, dtype=np.int32)
            copies = (PageCopies(src, src + np.int32(usable - count)),) * len(self.allocator.pools)
            total = count * len(self.allocator.pools)

            def launch(copies: Any = copies) -> None:
                self.runner.copy(copies)

            seconds = self._timed(launch, lambda _: jax.block_until_ready(self.runner.cache))
            yield Program("copy", total, 1, 0, 0), seconds

    def _tier(self) -> Iterator[tuple[Program, float]]:
        """Of pages of the first group to the host and back, alone."""
        tier = self.engine.tier
        if tier is None:
            return
        usable = self.allocator.pools[0][0] - 1
        for count in tier.buckets:  # whatever it copies is one or several of these
            pages = 1 + np.arange(count, dtype=np.int32) % usable
            out, back = list[float](), list[float]()
            for _ in range(_ROUNDS + 1):
                start = time.perf_counter()
                rested = tier.mover.finish(tier.mover.take(part_of(self.runner.cache, 0), pages))
                out.append(time.perf_counter() - start)
                start = time.perf_counter()
                self.runner.exchange(lambda cache, r=rested, p=pages: self._put_back(cache, r, p))
                jax.block_until_ready(self.runner.cache)
                back.append(time.perf_counter() - start)
            yield Program("store", count, 1, 0, 0), statistics.median(out[1:])
            yield Program("load", count, 1, 0, 0), statistics.median(back[1:])

    def _put_back(self, cache: Any, rested: Any, pages: np.ndarray) -> Any:
        mover = cast(HostTier, self.engine.tier).mover
        return with_part(cache, 0, mover.put(part_of(cache, 0), rested, pages))

    # ---- time

    def _timed(self, launch: Callable[[], Any], wait: Callable[[Any], Any] | None = None) -> float:
        """Seconds of a program among others of its kind; how long one takes to begin is noted.

        What n more launches add counts: the first one of a round finds the device idle, and all
        would take a part of the time that it waits for the host.
        """
        wait = wait or self.runner.wait
        wait(launch())

        def round_of(launches: int) -> float:
            start = time.perf_counter()
            outs = [launch() for _ in range(launches)]
            wait(outs[-1])
            return time.perf_counter() - start

        more = int(np.clip(-(-_LEAST_SECONDS // max(round_of(1), 1e-6)), 2, _MOST_LAUNCHES))
        alone = statistics.median(round_of(1) for _ in range(_ROUNDS))
        among = statistics.median(round_of(1 + more) for _ in range(_ROUNDS))
        seconds = (among - alone) / more if among > alone else among / (1 + more)
        self.launches.append(max(0.0, alone - seconds))
        return seconds


def _gets_hot(engine: Engine) -> bool:
    """Whether products one behind the other slow the device down; a difference of two times is
    otherwise less exact than one."""
    return next(iter(engine.cache.k_pages[0].devices())).platform == "gpu"


class _Decoding:
    """Rows that decode so many steps at every launch, in the slots from `slot` on.

    Attributes:
      begin: tokens of each at first.
      at: launches since then.
    """

    def __init__(self, device: _Device, lengths: Sequence[int], steps: int, slot: int = 0):
        self._device, self._steps, self._slot = device, steps, slot
        ahead = steps * _LAUNCHES
        # So that no row goes past the longest sequence, whose pages the table has room for.
        room = device.engine.max_sequence_tokens
        self.begin = np.array([max(1, min(length, room - ahead)) for length in lengths], np.int64)
        self._count = min(ahead, int(room - self.begin.max())) // steps
        self._enter()

    def _enter(self) -> None:
        self._device.enter(self.begin, self.begin + self._steps * self._count, self._slot)
        self.at = 0

    def launch(self) -> Any:
        """From the beginning where no room is left; what `wait` takes."""
        if self.at >= self._count:
            self._enter()
        context = self.begin + self.at * self._steps
        ticket = self._device.runner.decode(self._device.plan(context, self._steps, self._slot))
        self.at += 1
        return ticket.out


def _host(engine: Engine) -> dict[str, Line]:
    """What the host does with requests of several lengths, few at once and as many as there are
    rows."""
    timer = HostTimer(engine)
    try:
        for _ in range(2):  # the first one warms the host up
            timer.clear()
            for requests in _requests(engine):
                run(engine, requests, time_scale=0)
        submits = list(_submits(engine))
        return {name: fit_line(points) for name, points in timer.points.items()} | {
            "submit": fit_line(submits)
        }
    finally:
        timer.remove()


def _requests(engine: Engine) -> Iterator[list[Request]]:
    """Such that no two prompts are alike, and nobody is preempted."""
    config, size, steps = engine.config, engine.allocator.page_size, engine.config.decode_steps
    pool = min(pages - 1 for pages, window in engine.allocator.pools if window is None)
    number = 0
    for rows in sorted({1, max(1, config.max_rows // 4), config.max_rows}):
        most = min(engine.max_sequence_tokens, pool // (rows + 1) * size)
        new = min(8 * steps, most // 2)
        longest = max(1, min(2 * config.prefill_chunk, most - new))
        requests = []
        for row in range(rows):
            prompt = max(1, longest * (row % 4 + 1) // 4)
            requests.append(Request(0.0, (number,), prompt, prompt, new))
            number += 1
        yield requests


def _submits(engine: Engine) -> Iterator[tuple[int, float]]:
    """Tokens of a prompt, and how long it takes to hand it over."""
    most = max(1, engine.max_sequence_tokens - 1)
    rng = np.random.default_rng(0)
    for size in sorted({min(16, most), min(1024, most), min(8192, most)}):
        for _ in range(5):
            prompt = rng.integers(0, engine.config.vocab_size, size).tolist()
            start = time.perf_counter()
            request = engine.submit(prompt, SamplingParams(max_new_tokens=1))
            yield size, time.perf_counter() - start
            engine.cancel(request)
            engine.step()
