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
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import chain
from typing import Any, SupportsIndex, Unpack

from ..allocator import BlockAllocator, ShardedAllocator
from ..allocator.arguments import Ints, as_count, as_int
from ..cache import KVCache
from ..policies import AdmissionPolicy, PreemptionPolicy, VictimPolicy
from ..tiers import HostTier
from .calls import Calls
from .config import EngineConfig, EngineStats, sequence_limit
from .drafting import Drafter
from .events import Completion, Events, OnToken, TokenEvent, check_callback, gather
from .figures import Gauges, check_gauges
from .loop import Loop
from .model import Model
from .outbox import Outbox
from .params import SamplingParams
from .plans import choose_decoding
from .processing import ProcessLogits
from .requests import RequestOptions, check_sampling, new_request
from .room import Room, forget_prefixes
from .runner import DeviceRunner, Progress
from .scheduler import Scheduler
from .swapping import TierSwapping
from .text import Detokenizer, check_detokenizer
from .turn import Turn, refuse_copy
from .weights import Trains

__all__ = ["Engine"]


class Engine(Trains):
    """Generate for many requests at once from one pool of pages.

    Args:
      model: `model(params, cache, tokens, batch) -> (logits, cache)`: tokens int32 `[B, T]`, a
        `DecodeBatch`, logits `[B, V]` of column T-1. It writes K and V of every token and attends
        with `cache.append_and_attend(layer, q, k, v, batch)`.
      params: whatever the model takes, a pytree.
      cache: the pool; the engine donates it to its programs, `engine.cache` is the living one.
      allocator: its bookkeeping, with the same number and size of pages.
      config: shapes and limits.
      victim: who loses its pages when they run out; None is `LastAdmitted()`.
      tier: host memory for the pages of samples that are preempted; None computes them again.
      preemption: whose pages go to the tier; None is `Swap()`.
      admission: how many pages stay free; None is `Watermark()`, one per running sample.
      check: called with every plan by the thread that launches it, before it does, such as
        `ReplicaCheck()`; what it raises stops the visit, and comes out of `step`.
      drafter: guesses tokens that a step checks at once, such as `PromptLookup(4)`; the model then
        returns logits `[B, T, V]` of every token.
      score: a function like `model` that returns logits `[B, T, V]` of every token, for
        `SamplingParams.prompt_logprobs`; with a drafter the model itself does.
      process_logits: `process_logits(logits, rows) -> logits`, which JAX traces: changes what the
        model says of the next token, before all that the request asks for (`ProcessLogits`).
      detokenize: the tokenizer's decode of ids to text, such as `tokenizer.decode`: events have
        their `text` then, and requests may have stop strings.
      on_gauges: called with `gauges()` at the end of a visit, every `gauges_every` seconds; what it
        raises comes out of `step`, and the next one returns the events.
      gauges_every: seconds between two calls.
      clock: seconds, which never go back, of `max_wait` and `timeout`, figures and gauges.

    `submit`, `cancel`, `pin` and `unpin` are for any thread, the rest for one at a time.

    Attributes:
      config, allocator, tier: as given.
      max_sequence_tokens: the longest sequence, prompt and output.
      stats: what was done so far.
      scheduler, runner, loop: its parts; `loop.scheduler` and `loop.runner` may be wrapped.

    Raises:
      NotImplementedError: a tier for a pool that is split over a data axis; a drafter with
        `batch_invariant`.
      TypeError: a policy is no object with the method that it needs.
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
        check: Callable[[Any], object] | None = None,
        drafter: Drafter | None = None,
        process_logits: ProcessLogits | None = None,
        score: Model | None = None,
        detokenize: Detokenizer | None = None,
        on_gauges: Callable[[dict[str, float | int]], object] | None = None,
        gauges_every: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.config = config = config or EngineConfig()
        if cache.is_deleted:
            raise ValueError("the cache was donated to an earlier call; pass what that returned")
        cache.check_allocator(allocator)
        if not (score is None or callable(score)):
            raise TypeError(f"score must be a model function, got {type(score).__name__}")
        if config.score_chunk and score is drafter is None:
            raise ValueError(
                "score_chunk needs score: a model with logits [B, T, V] of every token"
            )
        if config.batch_invariant and drafter is not None:
            raise NotImplementedError(
                "batch_invariant serves no drafter: a step would check several tokens of a row"
            )
        self.allocator, self.tier, self.stats = allocator, tier, (stats := EngineStats())
        self.max_sequence_tokens = limit = sequence_limit(config, allocator)
        self._params, columns = params, -(-limit // allocator.page_size)
        self.runner = DeviceRunner(
            model,
            params,
            cache,
            config,
            columns=columns,
            stats=stats,
            check=check,
            drafter=drafter,
            process=process_logits,
            score=score,
        )
        swapping = None if tier is None else TierSwapping(tier, allocator, self.runner)
        self._outbox, self._texts = Outbox(), check_detokenizer(detokenize)
        check_gauges(on_gauges, gauges_every)
        self.scheduler = Scheduler(
            allocator,
            config,
            self._outbox,
            self.stats,
            Room(allocator, config, victim=victim, preemption=preemption, admission=admission),
            limit=limit,
            swapping=swapping,
            texts=self._texts,
            clock=clock,
        )
        self._gauges = Gauges(stats, clock, on_gauges, gauges_every)
        self.loop = Loop(
            self.scheduler,
            self.runner,
            self.stats,
            wait=config.collect_at_once,
            forget_prefixes=partial(forget_prefixes, allocator),
        )
        self._turn = Turn()
        self._calls = Calls(self.scheduler, self._outbox)

    # ---- what users call

    @property
    def cache(self) -> KVCache:
        """The living cache; keep it no longer than to the next call."""
        return self.runner.cache

    def submit(
        self,
        prompt: Ints,
        sampling: SamplingParams | None = None,
        *,
        on_token: OnToken | None = None,
        **options: Unpack[RequestOptions],
    ) -> int:
        """Queue one prompt for n samples and return the request's id; from any thread.

        Args:
          prompt: ids of at least one token.
          sampling: what is asked for; None: 64 greedy tokens.
          on_token: called with every event of the request after the visit that read it; if it
            raises, its request is cancelled, `step` raises what it raised, and the next `step`
            returns the events.
          options: as `RequestOptions` says.

        Raises:
          SequenceTooLong: the prompt and one token can never fit.
          TypeError, ValueError: the prompt or an option is not what it should be.
        """
        check_callback(on_token)
        sampling = SamplingParams() if sampling is None else sampling
        limit, has_text = self.max_sequence_tokens, self._texts is not None
        first = new_request(
            prompt,
            sampling,
            config=self.config,
            limit=limit,
            now=self.scheduler.clock(),
            has_text=has_text,
            **options,
        )
        self.scheduler.digests_of(first)  # the sample keeps them: here, and not in a visit
        request_id = self._calls.submit(first, on_token)
        self._try(self._calls.take_in)
        return request_id

    def fork(
        self,
        request_id: SupportsIndex,
        sampling: SamplingParams,
        *,
        sample: SupportsIndex | None = None,
        on_token: OnToken | None = None,
    ) -> int:
        """Branch a sample that is decoding: a new request goes on from its tokens so far.

        Those are the tokens of events that `step` has returned or shown. All pages but the last are
        shared; where there is none for a copy of that one, the new request waits. Its
        `max_new_tokens` counts the tokens before the fork, too; its events begin after them, and
        its text behind what its own stop strings would have let through of theirs. It has the
        parent's priority, mask and timeout.

        Args:
          request_id: which request.
          sampling: how the new one goes on.
          sample: which of its samples; None if only one of them is there.
          on_token: as in `submit`.

        Raises:
          KeyError: no such request or sample is decoding.
          ValueError: all rows are taken, or it is not said which sample.
        """
        request_id = as_int("request_id", request_id)
        sampling = check_sampling(sampling, self.config, has_text=self._texts is not None)
        if sampling.prompt_logprobs is not None:
            raise ValueError("prompt_logprobs is for submit: the prompt of a fork is computed")
        check_callback(on_token)
        with self._awake():
            rows = (*self.scheduler.running, *self.scheduler.ending)
            index = None if sample is None else as_int("sample", sample)
            parent = choose_decoding(rows, request_id, index)
            unseen = self._outbox.num_unseen(request_id, parent.index)
            if len(self.scheduler.running) >= self.config.max_rows:
                raise ValueError(f"all {self.config.max_rows} rows are taken; fork later")
            if sampling.max_new_tokens <= (before := parent.generated - unseen):
                raise ValueError(
                    f"max_new_tokens must exceed the {before} tokens generated before the fork, "
                    f"got {sampling.max_new_tokens}"
                )
            new = self._calls.new_ids()
            if on_token is not None:
                self._outbox.callbacks[new] = on_token
            child = parent.spawn(new, 0, sampling)
            del child.tokens[len(child.tokens) - unseen :]
            child.begin(self.scheduler.clock())
            self.loop.change(lambda: self.runner.copy(self.scheduler.fork(parent, child)))
        return new

    def cancel(self, request_id: SupportsIndex) -> None:
        """End a request in whatever state it is and give its pages back; from any thread.

        Its last event, reason "cancelled", comes with the next step; what a visit in flight makes
        of it is dropped. One that has ended already, but whose events are yet to be returned, is
        left as it is.

        Raises:
          KeyError: no such request is in the engine.
        """
        self._calls.cancel(as_int("request_id", request_id))
        self._try(self._calls.carry_out)

    @property
    def num_waiting(self) -> int:
        """Requests that wait for pages, samples of others that do, and pins."""
        return len(self._calls) + len(self.scheduler.waiting)

    def gauges(self) -> dict[str, float | int]:
        """What the engine is doing, for a log or a monitor; between steps, or in a callback.

        - `requests_running`, `requests_waiting`: samples that have a row or whose last tokens are
          on their way, and `num_waiting`.
        - `pages_total`, `pages_used`, `pages_cached`, `pages_free`: the second last are used by
          nobody, but found by their tokens. Where there are several groups of layers these are
          sums, and `pages_used_group_0` and so on those of each.
        - `pages_pinned`: of those used, the ones that pins hold.
        - `preemptions`; `prefix_hit_rate`, the part of the tokens asked for that the prefix cache
          had: since the beginning.
        - `decode_tokens_per_second`, `prefill_tokens_per_second`: over the last 10 seconds.
        """
        pools = [self.allocator.stats(group) for group in range(len(self.allocator.pools))]
        running = len(self.scheduler.running) + len(self.scheduler.ending)
        waiting, pinned = self.num_waiting, sum(self.scheduler.pins.pages)
        return self._gauges.read(pools, running=running, waiting=waiting, pinned=pinned)

    @property
    def idle(self) -> bool:
        """Whether nothing waits, runs or is yet to be delivered; pins that are computed do not."""
        busy = self._calls or self._outbox or self.loop.in_flight
        return not busy and self.scheduler.idle

    def step(self) -> Events:
        """One visit: admit what fits, launch prefill and k steps, deliver those of the one before.

        The device computes while the host reads and plans: tokens come one visit late. If a
        device program fails, no request is lost: those whose pages it took with it are queued
        again. What an eviction rank, a policy or a digest of the user's raises comes out here, and
        the next step goes on; so does it after an interrupt anywhere.

        Raises:
          RuntimeError: another thread is in `step`, or the engine is asleep.
        """
        self._step()
        return self._outbox.take()

    def _step(self) -> None:
        with self._awake():
            self._take_calls()
            if self.scheduler.limits.passed:
                self.loop.change(self.scheduler.expire)
            self.loop.visit()
            self._outbox.show(self._abandon)
            self._outbox.forget_callbacks(self.scheduler.living.keys())
            self._gauges.note_visit(self.gauges)

    def stream(self) -> Iterator[TokenEvent]:
        """Step until nothing is left, yielding events as they come.

        What is not taken, because the caller leaves early, is there for the next call.
        """
        while True:
            while (event := self._outbox.take_one()) is not None:
                yield event
            if self.idle:
                return
            self._step()

    def generate(
        self,
        prompts: Iterable[Ints],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        **options: Unpack[RequestOptions],
    ) -> list[Completion]:
        """Submit prompts together, run until they have ended, and return their completions.

        The order is that of the prompts, n samples each; `options` are those of `submit`. Requests
        submitted before run along, and their events stay for `step` and `stream`. If it is left by
        an exception, its requests are cancelled.
        """
        prompts = list(prompts)
        each = sampling if isinstance(sampling, Sequence) else [sampling] * len(prompts)
        if len(each) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts, but {len(each)} sampling params")
        ids: set[int] = set()
        got: list[Events] = []
        try:
            for prompt, one in zip(prompts, each, strict=True):
                ids.add(self.submit(prompt, one, **options))
            left = len(ids) * as_count("n", options.get("n", 1), 1)
            while left:
                self._step()
                got.append(self._outbox.take(ids))
                left -= sum(event.finish_reason is not None for event in got[-1])
        except BaseException:
            self._withdraw(ids)
            raise
        return gather(chain.from_iterable(got))

    def _withdraw(self, ids: set[int]) -> None:
        """Cancel requests without telling anybody."""
        for request_id in ids:
            with suppress(KeyError):
                self.cancel(request_id)
        with self._alone():
            self._take_calls()
            self._outbox.drop(ids)

    def warmup(self, progress: Progress | None = None) -> int:
        """Compile every program that the engine can need; returns how many are new to it.

        Several are compiled at a time. `progress(done, total)` is called after each.
        """
        with self._awake():
            self.loop.collect()
            before = self.stats.programs
            self.loop.change(lambda: self._warm(progress))
            self.loop.discard()  # the device knows no row now
            return self.stats.programs - before

    def _warm(self, progress: Progress | None) -> None:
        if self.tier is not None:
            self.runner.exchange(self.tier.warmup)
        self.runner.warmup(progress)

    __reduce__ = refuse_copy

    def __repr__(self) -> str:
        return (
            f"Engine({len(self.scheduler.running)} running, {len(self.scheduler.waiting)} waiting, "
            f"{self.allocator.num_used} of {self.allocator.usable_pages} pages used, {self.cache})"
        )

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Nobody else changes the engine meanwhile, and what was cut off before is whole again."""
        with self._turn.alone():
            self.loop.mend()
            yield

    @contextmanager
    def _awake(self) -> Iterator[None]:
        """The same, and there are pages."""
        with self._alone():
            if self.asleep:
                raise RuntimeError(
                    "the engine is asleep: call wake() first; until then it takes submit, cancel, "
                    "pin, unpin, update_params and gauges alone"
                )
            yield

    @contextmanager
    def _settled(self) -> Iterator[None]:
        """The same, and no visit is in flight: all is known."""
        with self._awake():
            self._take_calls()
            self.loop.collect()
            yield

    def _try(self, calls: Callable[[], None]) -> None:
        """Carry out calls now; in the middle of a visit, or after one that was cut off, the next
        one does."""
        with self._turn.between() as free:
            if free and not self.loop.torn:
                self.loop.change(calls)

    def _take_calls(self) -> None:
        """What `submit` and `cancel` have left, from whatever thread."""
        if self._calls:
            self.loop.change(self._calls.carry_out)

    def _abandon(self, request_id: int) -> None:
        """The request's callback failed: the request ends."""
        self.loop.change(lambda: self.scheduler.cancel(request_id))
