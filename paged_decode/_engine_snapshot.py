"""Saving an engine with its requests in flight, and taking them up again."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, SupportsIndex, cast

from ._requests import Sample, TokenEvent
from ._text import printable
from .allocator import BlockAllocator
from .allocator.arguments import as_counts
from .errors import SequenceTooLong, SnapshotMismatch
from .snapshot import AS_SAVED, OSFiles, PendingSnapshot, SavedSalt, Snapshot
from .snapshot._engine import (
    EngineState,
    PendingEvent,
    engine_arrays,
)
from .snapshot._load import Opened, Terms, place_snapshot
from .snapshot._save import plan_save

if TYPE_CHECKING:
    from .engine import Engine

__all__ = ["EngineSnapshots"]

OnToken = Callable[[TokenEvent], None]
_MOST_KEPT_ID = 2**52  # half of what the format holds: no engine counts through the other half


class EngineSnapshots:
    """The methods of `Engine` that write and read snapshots."""

    def save(
        self: Any,
        path: str | os.PathLike[str],
        *,
        requests: Sequence[SupportsIndex] | None = None,
        **options: Any,
    ) -> Snapshot:
        """Write the engine's requests, their pages and the prefix cache; call it between steps.

        A request keeps its tokens, sampling state, stop conditions, place in the queue and what
        was not delivered yet; callbacks are code and are not saved.

        Args:
          requests: ids of the requests to save, without cached pages of others; None is all.
          options: metadata, parent, cached, progress, files: as in `save_snapshot`.

        Raises:
          KeyError: no such request is in the engine.
          OSError: the file could not be written. The engine goes on in any case.
        """
        progress, files = options.pop("progress", None), options.pop("files", None)
        job = _plan(self, path, requests, copy=False, **options)
        return job.write(files or OSFiles(), progress)

    def save_async(
        self: Any,
        path: str | os.PathLike[str],
        *,
        requests: Sequence[SupportsIndex] | None = None,
        **options: Any,
    ) -> PendingSnapshot:
        """`save`, but return when the pages are copied out: step on while a thread writes."""
        progress, files = options.pop("progress", None), options.pop("files", None)
        job = _plan(self, path, requests, copy=True, **options)
        return PendingSnapshot(job, files or OSFiles(), progress)

    def restore(
        self: Any,
        path: str | os.PathLike[str],
        *,
        on_token: OnToken | Mapping[int, OnToken] | None = None,
        accept_fingerprint: bytes | None = None,
        cache_salt: str | bytes | SavedSalt | None = AS_SAVED,
        prefix_cache: bool = True,
    ) -> dict[int, int]:
        """Take up the requests of `save`; those that run here already go on.

        With the same model, params and config, every request continues with the tokens that it
        would have got. Requests for which there are no rows wait, and compute their pages again.

        Args:
          on_token: called with every event; or one per saved request id.
          accept_fingerprint: as in `load_snapshot`.
          cache_salt: as there; it is the salt of the requests, too.
          prefix_cache: as there; without it the requests that run keep their pages for
            themselves, and what is computed here is found again as ever.

        Returns:
          The new id of every saved request id; equal, if this engine had no request before (and
          those of the file are below 2**52).

        Raises:
          SnapshotMismatch: the file is not of an engine, or does not fit; else as
            `load_snapshot`. Nothing has changed.
          SequenceTooLong: a request does not fit this engine's `max_sequence_tokens`.
        """
        terms = Terms(accept_fingerprint, cache_salt, prefix_cache)
        with Opened(path) as opened:
            state = opened.engine
            if state is None:
                raise SnapshotMismatch(f"{printable(path)} holds no requests; use load_snapshot")
            _require_fit(self, state)
            try:
                placed = place_snapshot(opened, self.cache, self.allocator, terms)
            except BaseException:
                if self.cache.is_deleted:
                    self._lose_cache()
                raise
        self.cache = placed.cache
        if not isinstance(cache_salt, SavedSalt):
            for sample in state.samples:
                sample.cache_salt = cache_salt
        return _adopt(self, state, placed.handles, on_token)


def _plan(
    engine: Engine,
    path: str | os.PathLike[str],
    requests: Sequence[SupportsIndex] | None,
    *,
    copy: bool,
    cached: bool | None = None,
    **options: Any,
) -> Any:
    wanted = None if requests is None else set(as_counts("requests", requests))

    def chosen(request_id: int) -> bool:
        return wanted is None or request_id in wanted

    running = [s for s in engine._running if chosen(s.request_id)]
    waiting = [s for s in engine._waiting if chosen(s.request_id)]
    if missing := (wanted or set()) - {s.request_id for s in (*running, *waiting)}:
        raise KeyError(f"requests {sorted(missing)} are not in the engine")
    pending, shown = engine._outbox.contents()
    events = [PendingEvent(e, False) for _, e in pending if chosen(e.request_id)]
    events += [PendingEvent(e, True) for e in shown if chosen(e.request_id)]
    state = EngineState(running, waiting, events, engine._next_id)
    return plan_save(
        path,
        engine.cache,
        cast(BlockAllocator, engine.allocator),  # of a sharded one the cache is refused
        handles=[s.handle for s in running],
        cached=wanted is None if cached is None else cached,
        committed_only=True,
        extra=engine_arrays(state),
        copy=copy,
        **options,
    )


def _require_fit(engine: Engine, state: EngineState) -> None:
    vocab = engine.config.vocab_size
    for sample in state.samples:
        if len(sample.tokens) + 1 > engine.max_sequence_tokens:
            raise SequenceTooLong(
                f"request {sample.request_id} has {len(sample.tokens)} tokens, but a sequence here "
                f"can have {engine.max_sequence_tokens}; enlarge max_sequence_tokens or the pool"
            )
        if vocab is not None and max(sample.tokens) >= vocab:
            raise SnapshotMismatch(
                f"request {sample.request_id} has token {max(sample.tokens)}, but vocab_size here "
                f"is {vocab}: a snapshot of another model"
            )


def _adopt(
    engine: Engine,
    state: EngineState,
    handles: Sequence[Any],
    on_token: OnToken | Mapping[int, OnToken] | None,
) -> dict[int, int]:
    """Everything is in the pool: from here on nothing can fail."""
    ids = _new_ids(engine, state)

    def callback(old: int) -> OnToken | None:
        return on_token.get(old) if isinstance(on_token, Mapping) else on_token

    for sample in state.samples:
        sample.on_token = callback(sample.request_id)
        sample.request_id = ids[sample.request_id]
    for sample, handle in zip(state.running, handles, strict=True):
        sample.handle = handle
        sample.computed = engine.allocator.sequence(handle).computed
    _seat(engine, state)
    for pending in state.events:
        old = pending.event
        event = replace(old, request_id=ids[old.request_id])
        engine._outbox.put_back(_stub(event, callback(old.request_id)), event, pending.shown)
    return ids


def _new_ids(engine: Engine, state: EngineState) -> dict[int, int]:
    """The new id of every request; those of an engine that had none stay, if room is left above."""
    known = {s.request_id for s in state.samples} | {e.event.request_id for e in state.events}
    if engine._next_id == 0 and state.next_id <= _MOST_KEPT_ID:
        engine._next_id = state.next_id
        return {old: old for old in sorted(known)}
    ids = {old: engine._next_id + place for place, old in enumerate(sorted(known))}
    engine._next_id += len(ids)
    return ids


def _seat(engine: Engine, state: EngineState) -> None:
    """Rows for those that ran, as far as there are any; the others wait as if they had given way.

    So does who is yet to compute tokens on a page that another sequence has as well: a file may
    say so, and two rows cannot write one slot.
    """
    engine._waiting.extend(state.waiting)
    alone = [s for s in state.running if _owns_what_it_writes(engine, s)]
    seated = alone[: max(0, engine.config.max_rows - len(engine._running))]
    engine._running.extend(seated)
    rows = {id(s) for s in seated}
    for sample in reversed(state.running):  # one at a time: each looks through the running
        if id(sample) not in rows:
            engine._running.append(sample)
            engine._preempt(sample)
    for sample in seated:
        if sample.decoding and sample.siblings:
            engine._fork_siblings(sample)


def _owns_what_it_writes(engine: Engine, sample: Sample) -> bool:
    info = engine.allocator.sequence(sample.handle)
    if info.computed == info.length:
        return True
    pages = info.pages[info.computed // engine.allocator.page_size :]
    return all(engine.allocator.ref_count(page) == 1 for page in pages)


def _stub(event: TokenEvent, on_token: OnToken | None) -> Sample:
    """Who to call about an event whose sample may have ended."""
    from .sampling import SamplingParams

    return Sample(event.request_id, event.sample, 1, [0], SamplingParams(), None, on_token)
