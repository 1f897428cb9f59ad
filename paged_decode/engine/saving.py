"""Requests in flight, to a snapshot and out of it; no visit is in flight meanwhile."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, SupportsIndex, Unpack, cast

import numpy as np

from ..allocator import BlockAllocator
from ..allocator.arguments import as_counts
from ..errors import OutOfPages, SequenceTooLong, SnapshotMismatch
from ..snapshot import SavedSalt, Snapshot
from ..snapshot._about import about
from ..snapshot._engine import EngineState, PendingEvent, engine_arrays
from ..snapshot._format import Scalar
from ..snapshot._groups import GroupMismatch
from ..snapshot._load import Terms, place_snapshot
from ..snapshot._open import Opened
from ..snapshot._reader import Progress
from ..snapshot._save import FileOptions, SaveJob, plan_save
from .calls import Calls
from .config import EngineConfig
from .events import TokenEvent
from .masks import MakeMask, check_mask
from .outbox import Outbox
from .requests import Sample, unserved
from .room import Allocator
from .scheduler import Scheduler

__all__ = ["EngineSaveOptions", "Loaded", "RestoredRequests", "adopt", "load", "plan_engine_save"]

_MOST_KEPT_ID = 2**52  # half of what the format holds: no engine counts through the other half


class EngineSaveOptions(FileOptions, total=False):
    """Options of `Engine.save`; `cached` of None is true where all requests are saved."""

    cached: bool | None


def plan_engine_save(
    path: str | os.PathLike[str],
    cache: Any,
    scheduler: Scheduler,
    outbox: Outbox,
    calls: Calls,
    *,
    requests: Sequence[SupportsIndex] | None,
    copy: bool,
    cached: bool | None = None,
    **options: Unpack[FileOptions],
) -> SaveJob:
    """What a snapshot of these requests, or of all with None, will hold.

    Raises:
      KeyError: no such request is there.
    """
    wanted = None if requests is None else set(as_counts("requests", requests))

    def chosen(request_id: int) -> bool:
        return wanted is None or request_id in wanted

    running = [s for s in scheduler.running if chosen(s.request_id) and not s.pinned]
    waiting = [s for s in scheduler.waiting if chosen(s.request_id) and not s.pinned]
    pins = list(scheduler.pins.samples.values()) if wanted is None else []
    apart = [s for s in running if s.scores is not None]  # whose pages have a salt of their own
    running = [s for s in running if s.scores is None]
    waiting = [*apart, *waiting]
    pending, shown = outbox.contents()
    events = [PendingEvent(e, False) for e in pending if chosen(e.request_id)]
    events += [PendingEvent(e, True) for e in shown if chosen(e.request_id)]
    known = {s.request_id for s in (*running, *waiting)} | {p.event.request_id for p in events}
    if missing := (wanted or set()) - known:
        raise KeyError(f"requests {sorted(missing)} are not in the engine")
    limits = scheduler.limits
    own = calls.next_id, limits.now, scheduler.version
    state = EngineState(running, pins + waiting, events, *own)
    return plan_save(
        path,
        cache,
        cast(BlockAllocator, scheduler.allocator),  # of a sharded one the cache is refused
        handles=[s.handle for s in running],
        cached=wanted is None if cached is None else cached,
        committed_only=True,
        engine=engine_arrays(state),
        copy=copy,
        **options,
    )


class RestoredRequests(dict[int, int]):
    """What `Engine.restore` took up: the new id of every request, by the id it was saved under.

    Attributes:
      metadata: the user's.
      extra: the user's arrays.
      snapshot: name it as `parent` of a delta; None if the pages are computed anew.
    """

    def __init__(self, ids: Mapping[int, int], loaded: Loaded):
        super().__init__(ids)
        self.metadata, self.extra, self.snapshot = loaded.metadata, loaded.extra, loaded.snapshot


class Serving(NamedTuple):
    """What an engine can serve: the longest sequence, its config, whether it has a detokenizer, and
    what makes the mask of a request, by its id in the file."""

    limit: int
    config: EngineConfig
    has_text: bool
    mask_of: Callable[[int], MakeMask | None]

    def take(self, sample: Sample) -> None:
        """Refuse a sample that cannot be served; give it the mask that it had.

        Raises:
          SnapshotMismatch, SequenceTooLong, TypeError: as `load`.
        """
        title, vocab = f"request {sample.request_id}", self.config.vocab_size
        if len(sample.tokens) + (not sample.pinned) > self.limit:
            raise SequenceTooLong(
                f"{title} has {len(sample.tokens)} tokens, but a sequence here can have "
                f"{self.limit}; enlarge max_sequence_tokens or the pool"
            )
        if vocab is not None and max(sample.tokens) >= vocab:
            raise SnapshotMismatch(
                f"{title} has token {max(sample.tokens)}, but vocab_size here is {vocab}: a "
                "snapshot of another model"
            )
        lack = unserved(sample.sampling, self.config, has_text=self.has_text)
        make = None if sample.constraint is None else self.mask_of(sample.request_id)
        if sample.constraint is not None and lack is None:
            if not self.config.token_masks:
                lack = "it has a mask, but EngineConfig.token_masks is False"
            elif make is None:
                lack = f"it has a mask: say masks={{{sample.request_id}: ...}}"
        if lack is not None:
            raise SnapshotMismatch(f"{title} cannot be served here: {lack}")
        if make is not None:
            sample.constraint = check_mask(make, self.config.token_masks)


class Loaded(NamedTuple):
    """The requests of a snapshot, and the pages of those that ran; None if these are computed
    anew, and so is the snapshot."""

    state: EngineState
    cache: Any
    handles: Sequence[Any] | None
    metadata: Mapping[str, Scalar]
    extra: dict[str, np.ndarray]
    snapshot: Snapshot | None


def load(
    path: str | os.PathLike[str],
    cache: Any,
    allocator: Allocator,
    terms: Terms,
    serving: Serving,
    progress: Progress | None,
) -> Loaded:
    """Read and check everything, and put the pages into the pool; none without room for them, or
    if they cannot be cut to the groups of layers here.

    Raises:
      SnapshotMismatch: the file is not of an engine, or does not fit, or a request asks for what
        is not served.
      SequenceTooLong: a request does not fit the limit.
      TypeError: what is to make a mask makes none.
    """
    with Opened(path) as opened:
        state = opened.engine
        if state is None:
            with about(path):
                raise SnapshotMismatch("it holds no requests; use load_snapshot")
        with about(path):
            for sample in state.samples:
                serving.take(sample)
            if any(s.pinned for s in state.samples) and not allocator.prefix_cache:
                raise SnapshotMismatch("it has pins, which need an allocator with prefix_cache")
        metadata, placed = opened.chain.header.metadata, None
        with suppress(OutOfPages, GroupMismatch):
            target = cache, cast(BlockAllocator, allocator)
            placed = place_snapshot(opened, *target, terms, progress)
        extra = opened.read_extra() if placed is None else placed.extra
    if not isinstance(terms.cache_salt, SavedSalt):
        for sample in state.samples:
            sample.cache_salt = terms.cache_salt
    if placed is None:
        return Loaded(state, cache, None, metadata, extra, None)
    return Loaded(state, placed.cache, placed.handles, metadata, extra, placed.snapshot)


def adopt(
    loaded: Loaded,
    scheduler: Scheduler,
    outbox: Outbox,
    calls: Calls,
    *,
    listen: Callable[[int], Callable[[TokenEvent], object] | None],
) -> RestoredRequests:
    """Take the requests up: from here on nothing can fail.

    Args:
      listen: the callback of a request, by the id that it was saved under.

    Returns:
      The new id of every saved one, and what else the file holds.
    """
    state = loaded.state
    ids = _new_ids(state, calls)
    callbacks = {ids[old]: callback for old in ids if (callback := listen(old)) is not None}
    outbox.callbacks |= callbacks
    for sample in state.samples:
        sample.request_id = ids[sample.request_id]
    running = state.running if loaded.handles is not None else []
    for sample, handle in zip(running, loaded.handles or (), strict=True):
        sample.handle = handle
        sample.computed = scheduler.allocator.sequence(handle).computed
    alone = {id(s) for s in running if _owns_what_it_writes(scheduler.allocator, s)}
    scheduler.take_up(
        state.running, state.waiting, may_run=lambda s: id(s) in alone and not s.unscored
    )
    scheduler.version = max(scheduler.version, state.version)
    events = [(p.event._replace(request_id=ids[p.event.request_id]), p.shown) for p in state.events]
    outbox.put_back([e for e, shown in events if not shown], [e for e, shown in events if shown])
    return RestoredRequests(ids, loaded)


def _new_ids(state: EngineState, calls: Calls) -> dict[int, int]:
    """The new id of every request; those of an engine that had none stay, if room is left above."""
    known = sorted(
        {s.request_id for s in state.samples} | {e.event.request_id for e in state.events}
    )
    if calls.next_id == 0 and state.next_id <= _MOST_KEPT_ID:
        calls.new_ids(state.next_id)
        return {old: old for old in known}
    first = calls.new_ids(len(known))
    return {old: first + place for place, old in enumerate(known)}


def _owns_what_it_writes(allocator: Allocator, sample: Sample) -> bool:
    """Whether nobody else has the pages that it is to compute: a file may say otherwise, and two
    rows cannot write one slot."""
    info = allocator.sequence(sample.handle)
    if info.computed == info.length:
        return True
    column = info.computed // allocator.page_size
    return all(
        allocator.ref_count(page, group=number) == 1
        for number, held in enumerate(info.groups)
        for page in held.pages[max(0, column - held.first) :]
    )


def each_of(given: Callable[..., Any] | Mapping[int, Any] | None) -> Callable[[int], Any]:
    """What each request has of something: one for all, or one per saved id."""
    if isinstance(given, Mapping):
        return given.get
    return lambda _: given
