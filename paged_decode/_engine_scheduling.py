"""Which samples of an engine hold pages: admission, growth, and giving way."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from ._requests import Sample, common_pages
from .errors import OutOfPages, PagedDecodeError
from .policies import MustFit

if TYPE_CHECKING:
    from .engine import Engine

__all__ = ["EngineScheduling", "protected"]

_MUST_FIT = MustFit()


class EngineScheduling:
    """The methods of `Engine` that move samples between its queues."""

    # ---- admission

    def _admit(self: Any) -> None:
        """Take waiting samples in order while rows and pages last.

        The admission policy says how many pages stay free; an empty engine admits whatever fits.
        """
        for sample in list(self._waiting):
            if len(self._running) >= self.config.max_rows:
                return
            if self._prefix_in_flight(sample):
                continue
            try:
                handle = self.allocator.allocate(sample.key, keep_free=_keep_free(self, sample))
            except OutOfPages:
                return
            self.allocator.truncate(handle, len(sample.tokens) - 1)
            self._waiting.remove(sample)
            sample.handle, sample.computed = handle, self.allocator.sequence(handle).computed
            self._running.append(sample)
            if self.tier is not None:
                self._load(sample)
            self._admitted(sample)
            if sample.preemptions == 0:
                self.stats.prefix_hit_tokens += sample.computed
            else:
                self.stats.recomputed_tokens += len(sample.tokens) - 1 - sample.computed
            if sample.decoding:
                self._fork_siblings(sample)

    def _admitted(self: Any, sample: Sample) -> None:
        """The sample has pages from now on; for whoever watches."""

    def _load(self: Any, sample: Sample) -> None:
        """Bring back what the host tier has of the sample."""
        before = self.tier.stats.loaded
        self.cache = self.tier.load(self.cache, self.allocator, sample.handle)
        sample.computed = self.allocator.sequence(sample.handle).computed
        self.stats.swapped_in_pages += self.tier.stats.loaded - before

    def _prefix_in_flight(self: Any, sample: Sample) -> bool:
        """Whether a running prefill is about to publish a longer prefix than is cached now."""
        if not self.allocator.prefix_cache:
            return False
        shared = max(
            (
                common_pages(sample.tokens, other.tokens, self.allocator.page_size)
                for other in self._running
                if not other.decoding and other.cache_salt == sample.cache_salt
            ),
            default=0,
        )
        if not shared:
            return False
        hit = self.allocator.match_prefix(sample.key)
        return shared * self.allocator.page_size > hit

    def _adopt(self: Any, child: Sample, parent: Sample) -> None:
        """Give the child a fork of the parent's pages."""
        (child.handle,) = self.allocator.fork(parent.handle)
        child.computed = parent.computed
        self._running.append(child)

    def _fork_siblings(self: Any, sample: Sample) -> None:
        """The prompt is in the cache: let the other samples share it, or wait for a row."""
        siblings, sample.siblings = sample.siblings, []
        for position, sibling in enumerate(siblings):
            if len(self._running) < self.config.max_rows:
                self._adopt(sibling, sample)
            else:
                self._waiting.extendleft(reversed(siblings[position:]))
                return

    # ---- growth

    def _reserve_steps(self: Any) -> tuple[list[Sample], list[int]]:
        """Find pages for as many steps as possible, preempting if there is not one."""
        while rows := [s for s in self._running if s.decoding]:
            handles = [s.handle for s in rows]
            most = [min(s.left, self.max_sequence_tokens - len(s.tokens)) for s in rows]
            steps = self.config.decode_steps
            while steps:
                budget = [min(steps, m) for m in most]
                try:
                    copies = self.allocator.reserve(handles, budget)
                except OutOfPages:
                    steps //= 2
                    continue
                self._run_copies(copies)
                self._note_usage()
                return rows, budget
            if len(self._running) > 1:
                self._preempt(self._choose_victim())
            else:
                self._outbox.add(rows[0], None, "capacity")
                self._drop(rows[0])
                self._release()
        return [], []

    def _choose_victim(self: Any) -> Sample:
        """Whom the policy names among those that were not preempted too often before."""
        running: list[Sample] = self._running
        candidates = [s for s in running if not protected(self, s)] or list(running)
        return self._victim.choose(candidates) if len(candidates) > 1 else candidates[0]

    # ---- giving way

    def _preempt(self: Any, sample: Sample) -> None:
        """Take a sample's pages; it waits at the front, and comes back with its tokens."""
        if self.tier is not None and sample.computed and self._preemption.swaps(sample):
            stored = self.tier.store(self.cache, self.allocator, sample.handle)
            self.stats.swaps += stored > 0
            self.stats.swapped_out_pages += stored
        self._requeue(sample)
        self._release()

    def _requeue(self: Any, sample: Sample, *, counts: bool = True) -> None:
        self._drop(sample)
        sample.handle, sample.computed = None, 0
        sample.preemptions += counts
        self.stats.preemptions += counts
        self._waiting.appendleft(sample)

    def _drop(self: Any, sample: Sample) -> None:
        """Remove a sample from the queues; `_release` frees its pages."""
        if sample.handle is not None:
            self._running.remove(sample)
            self._leaving.append(sample.handle)
        else:
            self._waiting.remove(sample)

    def _release(self: Any) -> None:
        """Free the pages of the samples that are gone; if a user's rank raises, the next time."""
        if self._leaving:
            self.allocator.free(self._leaving)
            self._leaving = []

    def _requeue_all(self: Any, *, counts: bool = True) -> None:
        """The pages cannot be trusted: nobody keeps any, and nothing goes to the host tier."""
        for sample in reversed(list(self._running)):
            self._requeue(sample, counts=counts)
        self._release()

    def _lose_cache(self: Any) -> None:
        """A program failed with the donated cache: start an empty one and queue all again."""
        self._requeue_all()
        if not self.allocator.reset_prefix_cache(same_weights=True):
            raise PagedDecodeError(
                "the cache was lost in a failed program, and with it the pages that sequences "
                "outside the engine hold; free those, then call step again"
            )
        self.cache = jax.tree.map(
            lambda a: jnp.zeros(a.shape, a.dtype, device=a.sharding), self.cache
        )


def protected(engine: Any, sample: Sample) -> bool:
    """Whether the sample gave way so often that it must not again."""
    return sample.preemptions >= engine.config.max_preemptions


def _keep_free(engine: Engine, sample: Sample) -> int:
    """Pages that must be left. A sample that gave way too often comes back for good.

    It cannot be a victim any more, so it is let in when all that it and others like it can grow to
    is free: those always finish, and each sample gives way a bounded number of times.
    """
    if not engine._running:
        return 0
    size = engine.allocator.page_size
    keep = engine._admission.keep_free(sample, tuple(engine._running), size)
    if protected(engine, sample):
        others = [s for s in engine._running if protected(engine, s)]
        keep = max(keep, _MUST_FIT.keep_free(sample, others, size))
    return keep
