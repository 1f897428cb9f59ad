"""What the policies are asked: who is let in, who is preempted; and what the pool has left."""

from __future__ import annotations

from collections.abc import Sequence

from ..allocator import BlockAllocator, ShardedAllocator
from ..errors import OutOfPages, PagedDecodeError
from ..policies import (
    AdmissionPolicy,
    LastAdmitted,
    MustFit,
    PreemptionPolicy,
    Swap,
    VictimPolicy,
    Watermark,
    ask_keep_free,
    ask_swaps,
    ask_victim,
    require_policy,
)
from .config import EngineConfig, groups_of
from .requests import Sample

__all__ = ["Allocator", "Room", "forget_prefixes"]

Allocator = BlockAllocator | ShardedAllocator
_MUST_FIT = MustFit()


class Room:
    """The policies of an engine and its pool; changes nothing.

    Args:
      allocator: the pool.
      config: of which the number of preemptions matters.
      victim, preemption, admission: the policies; None is the plain one, as `Engine` says.

    Raises:
      TypeError: a policy is no object with the method that it needs.
    """

    def __init__(
        self,
        allocator: Allocator,
        config: EngineConfig,
        *,
        victim: VictimPolicy | None = None,
        preemption: PreemptionPolicy | None = None,
        admission: AdmissionPolicy | None = None,
    ):
        self._allocator, self._most = allocator, config.max_preemptions
        self._victim = require_policy("victim", victim or LastAdmitted(), VictimPolicy)
        self._preemption = require_policy("preemption", preemption or Swap(), PreemptionPolicy)
        self._admission = require_policy("admission", admission or Watermark(), AdmissionPolicy)
        self._groups = groups_of(config, allocator)

    @property
    def policies(self) -> tuple[VictimPolicy, PreemptionPolicy, AdmissionPolicy]:
        """Who is preempted, how, and who is let in."""
        return self._victim, self._preemption, self._admission

    def protected(self, sample: Sample) -> bool:
        """Whether the sample was preempted so often that it must not be again."""
        return sample.preemptions >= self._most

    def keep_free(self, sample: Sample, running: Sequence[Sample]) -> tuple[int, ...]:
        """Pages that must be left where these run, in every group; where nobody does, whatever fits
        is let in.

        A sample that was preempted too often comes back for good: it is let in when all that it and
        others like it can grow to is free. Those always finish, and each sample is preempted a
        bounded number of times.
        """
        if not running:
            return (0,) * len(self._groups)
        keep = ask_keep_free(self._admission, sample, tuple(running), self._groups)
        if self.protected(sample):
            others = tuple(s for s in running if self.protected(s))
            must = ask_keep_free(_MUST_FIT, sample, others, self._groups)
            keep = tuple(map(max, keep, must))
        return keep

    def has_fork(
        self, sibling: Sample, running: Sequence[Sample], shard: int, *, forked: int = 0
    ) -> bool:
        """Whether the policy lets in a fork, which copies a partial page when it writes.

        So many forks of the same page are there that have not done so.
        """
        copied = (len(sibling.tokens) - 1) % self._allocator.page_size > 0
        copies = (forked + 1) * copied
        pairs = zip(self.keep_free(sibling, running), self.available(shard), strict=True)
        return all(keep + copies <= available for keep, available in pairs)

    def victim(self, candidates: Sequence[Sample]) -> Sample:
        """Whom the policy names among those that were not preempted too often before."""
        free = [s for s in candidates if not self.protected(s)] or list(candidates)
        return ask_victim(self._victim, free) if len(free) > 1 else free[0]

    def swaps(self, sample: Sample) -> bool:
        """Whether the sample's pages are to go to the host tier."""
        return ask_swaps(self._preemption, sample)

    def shard_of(self, sample: Sample) -> int:
        """Where the pages of a sample are."""
        allocator = self._allocator
        return 0 if isinstance(allocator, BlockAllocator) else allocator.shard_of(sample.handle)

    def available(self, shard: int | None = None) -> tuple[int, ...]:
        """Pages of every group that can be had on a shard, or on the one that has most."""
        parts = self._allocator.shards if isinstance(self._allocator, ShardedAllocator) else ()
        if shard is not None and parts:
            parts = (parts[shard],)
        each = [part.num_available for part in parts or (self._allocator,)]
        return tuple(map(max, zip(*each, strict=True)))

    def passes(self, error: OutOfPages, shard: int | None = None) -> bool:
        """Whether the pages are there that were missing: the failure was injected, or passes."""
        return error.needed <= self.available(shard)[error.group]

    def shortage(
        self, error: OutOfPages, shard: int | None = None, *, pinned: Sequence[int] = ()
    ) -> str:
        """Who has the pages, when nothing runs that could give some back; so many of each group are
        pinned."""
        group = error.group
        usable, raw = self._groups[group].usable, self._allocator.stats(group).raw
        where = f" of group {group}" if len(self._groups) > 1 else ""
        pins = f"{pinned[group]} by pins (unpin), " if any(pinned[group : group + 1]) else ""
        return (
            f"needed {error.needed} pages{where}, but only {self.available(shard)[group]} of "
            f"{usable} can be had: {raw} are held by number (allocate_pages), {pins}the others by "
            "sequences outside the engine, or by itself; free those, or create a larger pool"
        )


def forget_prefixes(allocator: Allocator) -> None:
    """The pages are lost: nobody may find them."""
    if not allocator.reset_prefix_cache(same_weights=True):
        raise PagedDecodeError(
            "the cache was lost in a failed program, and with it the pages that sequences "
            "outside the engine hold; free those, then call step again"
        )
