"""Continuous batching over a paged cache: admit, prefill, decode, stream, fork, preempt.

A sample's newest token is never in the cache. The next decode step writes it and samples its
successor, so a fresh prompt, a forked sample and a preempted one are the same thing: tokens, all
but the last of which must be in the cache before decoding goes on.

```
tokens     [ p0 p1 p2 ... pn | g0 g1 ... gm ]
pages hold [<------- the allocator's ----->]        all computed: decoding
next step                                 gm        is written, and the next one sampled
```
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, SupportsIndex, cast

import jax
import numpy as np

from ._devices import tied
from ._engine_config import EngineConfig, EngineStats
from ._engine_scheduling import EngineScheduling
from ._engine_snapshot import EngineSnapshots
from ._outbox import Outbox
from ._programs import DecodeOut, Model, decode, null_batch, prefill
from ._requests import Completion, Sample, TokenEvent, check_sampling, gather, prompt_ids
from .allocator import BlockAllocator, ShardedAllocator
from .allocator.arguments import Ints, as_count, as_int
from .allocator.prefix import salt_key
from .cache import DecodeBatch, KVCache, PageCopies
from .errors import SequenceTooLong
from .policies import (
    AdmissionPolicy,
    LastAdmitted,
    PreemptionPolicy,
    Swap,
    VictimPolicy,
    Watermark,
)
from .sampling import SamplingParams, SamplingRows
from .tiers import HostTier

__all__ = ["Completion", "Engine", "EngineConfig", "EngineStats", "TokenEvent"]

MAX_SAMPLES = 2**16  # of one request: each keeps a copy of the prompt on the host


class Engine(EngineScheduling, EngineSnapshots):
    """Generate for many requests at once from one pool of pages.

    Args:
      model: `model(params, cache, tokens, batch) -> (logits, cache)`: tokens int32 `[B, T]`, a
        `DecodeBatch`, logits `[B, V]` of column T-1. It writes K and V of every token to
        `batch.slots` and attends through `batch.page_table`.
      params: whatever the model takes, a pytree.
      cache: the pool; the engine donates it to its programs, `engine.cache` is the living one.
      allocator: its bookkeeping, with the same number and size of pages.
      config: shapes and limits.
      victim: who loses its pages when they run out; None is `LastAdmitted()`.
      tier: host memory for the pages of samples that give way; None computes them again.
      preemption: whose pages go to the tier; None is `Swap()`.
      admission: how many pages stay free; None is `Watermark()`, one per running sample.

    One thread at a time may use an engine.

    Raises:
      NotImplementedError: a tier for a pool that is split over a data axis.
      ValueError: cache and allocator differ, or max_sequence_tokens does not fit the pool.
    """

    def __init__(
        self,
        model: Model,
        params: Any,
        cache: KVCache,
        allocator: BlockAllocator | ShardedAllocator,
        config: EngineConfig | None = None,
        *,
        victim: VictimPolicy | None = None,
        tier: HostTier | None = None,
        preemption: PreemptionPolicy | None = None,
        admission: AdmissionPolicy | None = None,
    ):
        config = config or EngineConfig()
        if cache.is_deleted:
            raise ValueError("the cache was donated to an earlier call; pass what that returned")
        cache.check_allocator(allocator)
        capacity = allocator.sequence_pages * allocator.page_size
        limit = config.max_sequence_tokens or capacity
        if not 2 <= limit <= capacity:
            raise ValueError(
                f"max_sequence_tokens must be in [2, {capacity}] for a pool of "
                f"{allocator.sequence_pages} usable pages of {allocator.page_size}, got {limit}"
            )
        self.config, self._params, self.cache, self.allocator = config, params, cache, allocator
        if tier is not None and not isinstance(allocator, BlockAllocator):
            raise NotImplementedError("a host tier serves one pool, not one split over a data axis")
        self.stats, self.tier = EngineStats(), tier
        self._victim, self._preemption = victim or LastAdmitted(), preemption or Swap()
        self._admission = admission or Watermark()
        self.max_sequence_tokens = limit
        self._columns = -(-limit // allocator.page_size)
        self._prefill = partial(prefill, model=model)
        self._decode = partial(
            decode,
            model=model,
            steps=config.decode_steps,
            top=config.top_logits,
        )
        self._shapes: set[tuple[int, int]] = set()  # rows, chunk; chunk 0 decodes
        self._waiting: deque[Sample] = deque()
        self._running: list[Sample] = []  # in order of admission
        self._leaving: list[Any] = []  # handles of samples that are gone, yet to be freed
        self._outbox = Outbox()
        self._next_id = 0

    # ---- what users call

    @property
    def params(self) -> Any:
        """The weights; to assign others is `update_params`."""
        return self._params

    @params.setter
    def params(self, params: Any) -> None:
        self.update_params(params)

    def update_params(self, params: Any, *, keep_cached: bool = False) -> None:
        """Go on with other weights; call it between steps, or in a callback.

        Nothing that was computed with the old ones is used again: the prefix cache, the host tier
        and its disk tier forget their pages, and requests that run compute theirs again, with the
        tokens that they have so far. Weights of the same shapes compile nothing.

        Args:
          params: the new weights. An array of the old ones that is changed in place is not seen.
          keep_cached: keep every page, of running requests too: for weights with the same numbers,
            or where the difference does not matter.
        """
        if not keep_cached:
            if self.tier is not None:
                self.tier.clear()
            self.allocator.new_weights()
            self._requeue_all(counts=False)
        self._params = params

    def submit(
        self,
        prompt: Ints,
        params: SamplingParams | None = None,
        *,
        n: SupportsIndex = 1,
        cache_salt: str | bytes | None = None,
        on_token: Callable[[TokenEvent], None] | None = None,
        priority: SupportsIndex = 0,
    ) -> int:
        """Queue one prompt for n samples and return the request's id.

        Sample i uses seed + i, and n is at most 2**16. The samples share the prompt's pages.
        `on_token` is called with every event of the request after the visit that made it; if it
        raises, its request is cancelled, `step` raises what it raised, and the next `step` returns
        the events. `priority` is for policies, such as `LowestPriority`; a snapshot does not keep
        it.

        Raises:
          SequenceTooLong: the prompt and one token can never fit.
          TypeError, ValueError: the prompt, n or the salt is not what it should be.
        """
        params = check_sampling(params or SamplingParams())
        if not (on_token is None or callable(on_token)):
            raise TypeError(f"on_token must be callable, got {type(on_token).__name__}")
        tokens = prompt_ids(prompt, self.config.vocab_size)
        salt_key(cache_salt)  # refuses a bad one now
        n, priority = as_count("n", n, 1, MAX_SAMPLES), as_int("priority", priority)
        if len(tokens) + 1 > self.max_sequence_tokens:
            raise SequenceTooLong(
                f"a prompt of {len(tokens)} tokens and one generated token need "
                f"{len(tokens) + 1} places, but a sequence can have {self.max_sequence_tokens} "
                "(usable pages * page_size, or max_sequence_tokens); shorten it or enlarge the pool"
            )
        first = Sample(
            self._next_id, 0, len(tokens), tokens, params, cache_salt, on_token, priority=priority
        )
        for i in range(1, n):
            seeded = replace(params, seed=(params.seed + i) % 2**32)
            first.siblings.append(first.spawn(first.request_id, i, seeded))
        self._next_id += 1
        self._waiting.append(first)
        return first.request_id

    def fork(self, request_id: SupportsIndex, params: SamplingParams) -> int:
        """Branch a request that is decoding: a new request goes on from its tokens so far.

        The pages are shared until one of the two writes. The new request's `max_new_tokens` counts
        the tokens generated before the fork, too; its stream begins after them.

        Raises:
          KeyError: no such request is decoding.
          OutOfPages: never; the copy is paid when it is written.
          ValueError: all rows are taken.
        """
        request_id = as_int("request_id", request_id)
        parent = next((s for s in self._running if s.request_id == request_id and s.decoding), None)
        if parent is None:
            raise KeyError(f"request {request_id} is not decoding")
        if len(self._running) >= self.config.max_rows:
            raise ValueError(f"all {self.config.max_rows} rows are taken; fork later")
        child = parent.spawn(self._next_id, 0, check_sampling(params))
        if child.left < 1:
            raise ValueError(
                f"max_new_tokens must exceed the {child.generated} tokens generated before the "
                f"fork, got {params.max_new_tokens}"
            )
        self._adopt(child, parent)
        self._next_id += 1
        return child.request_id

    def cancel(self, request_id: SupportsIndex) -> None:
        """End a request in whatever state it is and give its pages back.

        Its last event, reason "cancelled", comes with the next step.

        Raises:
          KeyError: no such request is waiting or running.
        """
        request_id = as_int("request_id", request_id)
        found = [s for s in (*self._running, *self._waiting) if s.request_id == request_id]
        if not found:
            raise KeyError(f"request {request_id} is not in the engine")
        for sample in found:
            for ended in (sample, *sample.siblings):
                self._outbox.add(ended, None, "cancelled")
            self._drop(sample)
        self._release()

    @property
    def idle(self) -> bool:
        """Whether nothing waits, runs or is yet to be delivered."""
        return not (self._waiting or self._running or self._outbox or self._leaving)

    def step(self) -> list[TokenEvent]:
        """One host visit: admit what fits, prefill one chunk, decode k steps, deliver.

        If a device program fails, no request is lost: those whose pages it took with it are
        queued again. What an eviction rank or a digest of the user's raises comes out here, and
        the next step goes on.
        """
        try:
            self._release()
            if self.tier is not None:
                self.tier.settle()
            self._admit()
            self._prefill_visit()
            self._decode_visit()
            self._release()
        except BaseException:
            if self.cache.is_deleted:
                self._lose_cache()
            raise
        return self._outbox.deliver(self._abandon)

    def stream(self) -> Iterator[TokenEvent]:
        """Step until nothing is left, yielding events as they come."""
        while not self.idle:
            yield from self.step()

    def generate(
        self,
        prompts: Iterable[Ints],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        n: SupportsIndex = 1,
        cache_salt: str | bytes | None = None,
    ) -> list[Completion]:
        """Submit prompts together, run until all have ended, and return their completions.

        The order is that of the prompts, n samples each. Requests submitted before run along.
        """
        prompts = list(prompts)
        each = params if isinstance(params, Sequence) else [params] * len(prompts)
        if len(each) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts, but {len(each)} sampling params")
        ids: set[int] = set()
        try:
            for prompt, one in zip(prompts, each, strict=True):
                ids.add(self.submit(prompt, one, n=n, cache_salt=cache_salt))
        except BaseException:
            self._waiting = deque(s for s in self._waiting if s.request_id not in ids)
            raise
        events = [event for event in self.stream() if event.request_id in ids]
        return gather(events)

    def warmup(self) -> int:
        """Compile every program that the engine can need; returns how many are new to it."""
        before = self.stats.programs
        self.cache = tied(self.cache)  # as it is after a swap or `restore`
        if self.tier is not None:
            self.cache = self.tier.warmup(self.cache)
        for chunk in self.config.chunk_buckets:
            rows = self.config.prefill_rows
            self._run_prefill(null_batch(self.cache, rows, chunk, columns=self._columns))
        for rows in self.config.row_buckets:
            no_row = np.zeros(rows, np.int32)
            samplers = SamplingRows.create([], [], rows)
            batch = null_batch(self.cache, rows, 1, columns=self._columns)
            self._run_decode(no_row, batch, no_row, samplers)
        width = 1
        while width < 2 * self.config.max_rows:
            self._run_copies(PageCopies(np.zeros(width, np.int32), np.zeros(width, np.int32)))
            width *= 2
        return self.stats.programs - before

    def __repr__(self) -> str:
        return (
            f"Engine({len(self._running)} running, {len(self._waiting)} waiting, "
            f"{self.allocator.num_used} of {self.allocator.usable_pages} pages used, {self.cache})"
        )

    # ---- device visits

    def _prefill_visit(self) -> None:
        """One chunk for every sample whose prompt is not in the cache yet."""
        rows = [s for s in self._running if not s.decoding]
        if not rows:
            return
        start = time.perf_counter()
        begin = [s.computed for s in rows]
        end = [min(s.computed + self.config.prefill_chunk, len(s.tokens) - 1) for s in rows]
        for first in range(0, len(rows), self.config.prefill_rows):
            part = slice(first, first + self.config.prefill_rows)
            widest = max(e - b for b, e in zip(begin[part], end[part], strict=True))
            chunk = self._bucket(self.config.chunk_buckets, widest)
            self._launch_prefill(rows[part], begin[part], end[part], chunk)
        self.allocator.commit([s.handle for s in rows], end)
        self.stats.prefill_tokens += sum(end) - sum(begin)
        for sample, e in zip(rows, end, strict=True):
            sample.computed = e
            if sample.decoding:
                self._fork_siblings(sample)
        self.stats.prefill_seconds += time.perf_counter() - start
        self._note_usage()

    def _launch_prefill(
        self, rows: list[Sample], begin: list[int], end: list[int], chunk: int
    ) -> None:
        self._run_prefill(self._batch(rows, begin, end, chunk, self.config.prefill_rows))

    def _decode_visit(self) -> None:
        rows, budget = self._reserve_steps()
        if rows:
            start = time.perf_counter()
            out = self._launch_decode(rows, budget)
            self.stats.decode_seconds += time.perf_counter() - start
            self._book(rows, out)

    def _launch_decode(self, rows: list[Sample], budget: list[int]) -> DecodeOut:
        lengths = [len(s.tokens) for s in rows]
        size = self._bucket(self.config.row_buckets, len(rows))
        batch = self._batch(rows, [n - 1 for n in lengths], lengths, 1, size)
        newest, budgets = np.zeros(size, np.int32), np.zeros(size, np.int32)
        newest[: len(rows)] = [s.tokens[-1] for s in rows]
        budgets[: len(rows)] = budget
        samplers = SamplingRows.create([s.params for s in rows], [s.generated for s in rows], size)
        return self._run_decode(newest, batch, budgets, samplers)

    def _book(self, rows: list[Sample], out: DecodeOut) -> None:
        """Enter what the device wrote and generated.

        The token that a row with invalid logits had read is not entered: what the device wrote for
        it may be NaN, as may be what prefill wrote before, so none of the row's pages stays cached.
        """
        counts = out.counts[: len(rows)]
        handles = [s.handle for s in rows]
        newest = np.array([s.tokens[-1] for s in rows], np.int32)
        written = np.vstack([newest, out.tokens[:-1, : len(rows)]]).T
        self.allocator.append(handles, written, counts)
        self.stats.decode_tokens += int(counts.sum())
        for row, sample in enumerate(rows):
            for i in range(counts[row]):
                sample.tokens.append(int(out.tokens[i, row]))
                reason = sample.ending(self.max_sequence_tokens)
                top = zip(
                    out.top_ids[i, row].tolist(), out.top_logits[i, row].tolist(), strict=True
                )
                self._outbox.add(sample, sample.tokens[-1], reason, tuple(top))
            sample.computed = len(sample.tokens) - 1
        invalid = [s for s, bad in zip(rows, out.invalid[: len(rows)], strict=True) if bad]
        for sample in rows:
            if sample in invalid:
                self._outbox.add(sample, None, "invalid_logits")
                self._drop(sample)
            elif sample.ending(self.max_sequence_tokens) is not None:
                self._drop(sample)
        try:
            self.allocator.commit(handles, [s.computed for s in rows])
        finally:  # whatever a digest of the user's raises
            for sample in invalid:
                self.allocator.withdraw([sample.handle])
                if self.tier is not None:
                    self.tier.forget(cast(BlockAllocator, self.allocator), sample.handle)

    def _batch(
        self, rows: list[Sample], begin: Sequence[int], end: Sequence[int], width: int, size: int
    ) -> DecodeBatch:
        return self.allocator.batch(
            [s.handle for s in rows],
            begin,
            end,
            tokens_per_row=width,
            pad_to=size,
            columns=self._columns,
        )

    @staticmethod
    def _bucket(sizes: tuple[int, ...], size: int) -> int:
        return next(s for s in sizes if s >= size)

    def _run_prefill(self, batch: DecodeBatch) -> None:
        batch, _ = self.cache.split(batch, (self.config.prefill_rows,))
        self.cache = self._prefill(self.cache, self.params, batch)
        jax.block_until_ready(self.cache.k_pages[-1])
        self._note_program(*batch.slots.shape)

    def _run_decode(
        self, newest: np.ndarray, batch: DecodeBatch, budget: np.ndarray, samplers: SamplingRows
    ) -> DecodeOut:
        batch, spread = self.cache.split(batch, self.config.row_buckets)
        newest, budget, samplers = spread.put((newest, budget, samplers))
        self.cache, out = self._decode(self.cache, self.params, newest, batch, budget, samplers)
        self._note_program(len(newest), 0)
        return DecodeOut(*(spread.take(a, axis=min(a.ndim - 1, 1)) for a in out))

    def _run_copies(self, copies: PageCopies) -> None:
        try:
            self.cache = self.cache.copy_pages(copies)
        except BaseException:  # the allocator counts on copies that did not happen
            self._requeue_all()
            raise

    def _note_program(self, rows: int, chunk: int) -> None:
        self._shapes.add((rows, chunk))
        self.stats.programs = len(self._shapes)

    def _note_usage(self) -> None:
        self.stats.peak_used_pages = max(self.stats.peak_used_pages, self.allocator.num_used)

    # ---- endings

    def _abandon(self, request_id: int) -> None:
        """The request's callback failed: it is not called again, and the request ends."""
        living = [s for s in (*self._running, *self._waiting) if s.request_id == request_id]
        for sample in living:
            for each in (sample, *sample.siblings):
                each.on_token = None
        if living:
            self.cancel(request_id)
