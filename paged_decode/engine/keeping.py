"""What outlives a request: pinned prefixes, and snapshots. A part of `Engine`."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, SupportsIndex, Unpack

from ..allocator import BlockAllocator, ShardedAllocator
from ..allocator.arguments import Ints, as_int
from ..snapshot import AS_SAVED, PendingSnapshot, SavedSalt, Snapshot
from ..snapshot._load import Terms
from ..snapshot._reader import Progress
from ..snapshot._save import SaveJob
from . import saving
from .calls import Calls
from .config import EngineConfig
from .events import OnToken
from .loop import Loop
from .masks import MakeMask
from .outbox import Outbox
from .pins import new_pin
from .runner import DeviceRunner
from .saving import EngineSaveOptions, RestoredRequests
from .scheduler import Scheduler
from .text import Texts

__all__ = ["Keeps"]


class Keeps(ABC):
    """What an engine can keep."""

    config: EngineConfig
    allocator: BlockAllocator | ShardedAllocator
    max_sequence_tokens: int
    scheduler: Scheduler
    runner: DeviceRunner
    loop: Loop
    _outbox: Outbox
    _calls: Calls
    _texts: Texts | None

    @abstractmethod
    def _settled(self) -> AbstractContextManager[None]:
        """Nobody else changes the engine meanwhile, and no visit is in flight."""

    @abstractmethod
    def _try(self, calls: Callable[[], None]) -> None:
        """Carry out calls now, or in the next visit."""

    def pin(self, tokens: Ints, cache_salt: str | bytes | None = None) -> int:
        """Keep the full pages of a prefix, such as a system prompt, until `unpin`; from any thread.

        They are computed as the engine steps, unless they are in the prefix cache, and stay there:
        no page of them is evicted, and no row is preempted for them once they are computed. There
        is no event. After new weights or a lost cache they are computed again. Where there is no
        room although nothing runs, the pin waits until there is, and the engine is idle.

        Args:
          tokens: ids, of which those of full pages count.
          cache_salt: of the requests that are to find them.

        Returns:
          The pin's id; request and pin never have the same.

        Raises:
          NotImplementedError: the pool is split over a data axis.
          SequenceTooLong: the pages and one token can never fit.
          ValueError: there is no prefix cache, or not a full page of tokens.
        """
        allocator, config, limit = self.allocator, self.config, self.max_sequence_tokens
        sample = new_pin(tokens, cache_salt, allocator=allocator, config=config, limit=limit)
        self.scheduler.digests_of(sample)  # here, and not in a visit
        pin_id = self._calls.submit(sample, None)
        self._try(self._calls.take_in)
        return pin_id

    def unpin(self, pin_id: SupportsIndex) -> None:
        """Let the pages of a pin go, once requests have let go of them, too; from any thread.

        They stay in the prefix cache until they are evicted.

        Raises:
          KeyError: there is no such pin.
        """
        self._calls.unpin(as_int("pin_id", pin_id))
        self._try(self._calls.carry_out)

    @property
    def pinned_pages(self) -> int | tuple[int, ...]:
        """Pages that pins hold; of each group, if there are several groups of layers."""
        pages = self.scheduler.pins.pages
        (first, *others) = pages
        return pages if others else first

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        requests: Sequence[SupportsIndex] | None = None,
        **options: Unpack[EngineSaveOptions],
    ) -> Snapshot:
        """Write the engine's requests, their pages and the prefix cache; call it between steps.

        A request keeps its tokens, sampling state, stop conditions, place in the queue and what
        was not delivered yet; callbacks are code and are not saved.

        Args:
          requests: ids of the requests to save, without cached pages of others; None is all.
          options: metadata, extra, parent, cached, progress: as in `save_snapshot`.

        Raises:
          KeyError: no such request is in the engine.
          OSError: the file could not be written. The engine goes on in any case.
        """
        return self._plan_save(False, path, requests, options).write()

    def save_async(
        self,
        path: str | os.PathLike[str],
        *,
        requests: Sequence[SupportsIndex] | None = None,
        **options: Unpack[EngineSaveOptions],
    ) -> PendingSnapshot:
        """`save`, but return when the pages are copied out: step on while a thread writes."""
        return self._plan_save(True, path, requests, options).write_behind()

    def _plan_save(self, copy: bool, path: Any, chosen: Any, options: Any) -> SaveJob:
        with self._settled():  # which may make another cache
            parts = self.runner.cache, self.scheduler, self._outbox, self._calls
            return saving.plan_engine_save(path, *parts, requests=chosen, copy=copy, **options)

    def restore(
        self,
        path: str | os.PathLike[str],
        *,
        on_token: OnToken | Mapping[int, OnToken] | None = None,
        masks: MakeMask | Mapping[int, MakeMask] | None = None,
        accept_fingerprint: bytes | None = None,
        cache_salt: str | bytes | SavedSalt | None = AS_SAVED,
        prefix_cache: bool = True,
        progress: Progress | None = None,
    ) -> RestoredRequests:
        """Take up the requests of `save`; those that run here already go on.

        With the same model, params and config, every request continues with the tokens that it
        would have got. Requests for which there are no rows wait, and compute their pages again; so
        do all, if the pool has no room for their pages, or a group sees more than the file's did.

        Args:
          on_token: called with every event; or one per saved request id.
          masks: what makes the masks of requests that had one; or one per saved request id.
          accept_fingerprint: as in `load_snapshot`.
          cache_salt: as there; it is the salt of the requests, too.
          prefix_cache: as there; without it the requests that run keep their pages for
            themselves, and what is computed here is found again as ever.
          progress: as there.

        Returns:
          The new id of every saved request id, as a dict; equal, if this engine had no request
          before (and those of the file are below 2**52). What else the file holds are attributes.

        Raises:
          SnapshotMismatch: the file is not of an engine, or does not fit, or a request asks for
            what this engine cannot serve, or had a mask that is not in `masks`; else as
            `load_snapshot`. Nothing has changed.
          SequenceTooLong: a request does not fit this engine's `max_sequence_tokens`.
        """
        terms = Terms(accept_fingerprint, cache_salt, prefix_cache)
        serving = saving.Serving(
            self.max_sequence_tokens, self.config, self._texts is not None, saving.each_of(masks)
        )
        with self._settled():
            try:
                target = self.runner.cache, self.allocator
                loaded = saving.load(path, *target, terms, serving, progress)
            except BaseException:
                if self.runner.is_lost:
                    self.loop.discard()
                raise
            self.runner.cache = loaded.cache
            listen = saving.each_of(on_token)
            return saving.adopt(loaded, self.scheduler, self._outbox, self._calls, listen=listen)
