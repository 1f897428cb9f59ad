"""The host tier: pages of preempted sequences, found again by what they hold."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any, TypeVar, cast

import jax
import numpy as np

from .._devices import tied
from ..allocator import BlockAllocator, Handle
from ..allocator.arguments import as_count, as_counts
from ..cache import KVCache
from ..errors import OutOfPages
from ._device import CacheHolder, CopyPending, DeviceMover, PageMover, fits
from ._disk import DiskTier
from ._wanted import Wanted, keys_of, part_of, wanted_pages, with_part

__all__ = ["HostTier", "TierStats"]

# What a copy may fail with. Anything else is a mistake in the program and is raised.
COPY_ERRORS = (RuntimeError, OSError, MemoryError)


@dataclass(slots=True)
class TierStats:
    """Counters of a tier, in pages but for `failed_copies`, which counts copies.

    Attributes:
      stored: copied to the host; loaded: copied back.
      evicted: given up for others; spilled: of these, written to the disk tier.
      revived: read back from the disk tier.
      failed_copies: in either direction; whatever they were to bring is computed again.
    """

    stored: int = 0
    loaded: int = 0
    evicted: int = 0
    spilled: int = 0
    revived: int = 0
    failed_copies: int = 0


@dataclass(slots=True, eq=False)
class _Chunk:
    """Pages that travelled together, one bucket of them: the unit of copies and of eviction."""

    keys: tuple[bytes, ...]
    tokens: tuple[np.ndarray, ...]
    pages: Any  # what the mover returned: in flight, then at rest
    busy: bool = False  # being copied to the device: not given up


@dataclass(slots=True)
class _Held:
    """A cache that is replaced at once."""

    cache: Any

    def exchange(self, change: Callable[[Any], Any]) -> None:
        self.cache = change(self.cache)


_Found = dict[int, tuple[_Chunk, int]]
"""By column, the chunk that has the page, and the row in it."""


_Call = TypeVar("_Call", bound=Callable[..., Any])


def _whole(method: _Call) -> _Call:
    """A call that first makes whole what another one left that did not come to its end."""

    @wraps(method)
    def call(self: HostTier, *args: Any, **options: Any) -> Any:
        if self._torn:
            self._repair()
        self._torn = True
        result = method(self, *args, **options)
        self._torn = False
        return result

    return cast(_Call, call)


class HostTier:
    """Pages in host memory, at most `capacity_pages`, the least recently used given up first.

    A page is known by the digest of all tokens up to its end, as in the prefix cache, so nothing
    has to be remembered of a sequence that was stored: whoever has the same tokens (and salt)
    finds its pages, and what was given up meanwhile is computed again. Between two calls of
    `settle` the copies run beside the device's programs; until they are done, their pages are
    neither found nor given up. A copy that fails leaves nothing behind.

    ```
    store    pages [ 5 9 2 7 4 8 ] -> chunks of 4, 1 and 1 pages (buckets), in flight
    settle   the copies are done: chunks at rest, their pages can be found
    load     the longest run of known pages -> the pages of a new sequence, committed
    ```

    Of several groups of layers each has its own chunks. A sequence is stored in all of them or,
    without the room, not at all: in a window the pages that it still holds. It comes back as far
    as every group has what the next token sees; a window takes no page for what is before.

    Args:
      capacity_pages: at rest and in flight together, of whatever group.
      buckets: pages per copy; a device program is compiled for each. 1 is always one of them.
      mover: how pages travel; None is `DeviceMover()`.
      disk: where chunks go that are given up; None is nowhere.

    Examples:
      >>> from paged_decode import BlockAllocator, KVCache
      >>> sizes = dict(num_layers=1, num_kv_heads=1, page_size=4, head_dim=8)
      >>> cache, allocator = KVCache.create(num_pages=9, **sizes), BlockAllocator(9, 4)
      >>> tier, handle = HostTier(16), allocator.allocate([5, 6, 7, 8, 9])
      >>> allocator.commit(handle, 5)
      >>> tier.store(cache, allocator, handle)
      2
      >>> allocator.free(handle); allocator.reset_prefix_cache(same_weights=True)
      True
      >>> tier.settle()
      >>> handle = allocator.allocate([5, 6, 7, 8, 9])
      >>> cache = tier.load(cache, allocator, handle)  # donates the cache
      >>> allocator.sequence(handle).computed
      5
    """

    def __init__(
        self,
        capacity_pages: int,
        *,
        buckets: Sequence[int] = (1, 4, 16, 64),
        mover: PageMover | None = None,
        disk: DiskTier | None = None,
    ):
        capacity_pages = as_count("capacity_pages", capacity_pages, 1)
        sizes = tuple(sorted({1, *as_counts("buckets", buckets, 1)}))
        self.capacity_pages, self.buckets, self.disk = capacity_pages, sizes, disk
        self.mover: PageMover = mover or DeviceMover()
        self.stats = TierStats()
        self.num_pages = 0
        self._chunks: OrderedDict[int, _Chunk] = OrderedDict()  # by id(), least recent first
        self._where: dict[bytes, tuple[_Chunk, int]] = {}
        self._flying: list[_Chunk] = []
        self._coming: set[bytes] = set()
        # A call has not come to its end: an interrupt may fall between any two lines of it. The
        # next call repairs, rather than each call a line that could be cut off as well.
        self._torn = False

    def warmup(self, cache: Any) -> Any:
        """Compile every copy; donates the cache, whose null page alone is written.

        The cache that comes back is committed to its device, as after every copy back; JAX
        compiles programs anew for it: compile your own afterwards, as `Engine.warmup` does.
        """
        cache = tied(cache)
        groups = range(len(cache.pools)) if isinstance(cache, KVCache) else (0,)
        for group in [g for g in groups if sum(map(np.size, jax.tree.leaves(part_of(cache, g))))]:
            for size in self.buckets:
                null, part = np.zeros(size, np.int32), part_of(cache, group)
                part = self.mover.put(part, self.mover.finish(self.mover.take(part, null)), null)
                cache = with_part(cache, group, part)
        return cache

    @_whole
    def store(self, cache: Any, allocator: BlockAllocator, handle: Handle) -> int:
        """Begin to copy the computed pages of a sequence out, which may be freed at once.

        Pages that are here already are not copied again. What has no room is left out, from the
        end of the sequence. Of a private sequence nothing is copied, as others would find it here.

        Returns:
          How many of its leading pages are here now, or on their way.
        """
        _check_pool(cache, allocator)
        info = allocator.sequence(handle)
        wanted = wanted_pages(allocator, handle, 0 if info.private else info.computed)
        if not wanted:
            return 0
        self._touch(each.keys[column] for each in wanted for column in reversed(each.held))
        missing = [[at for at in each.held if not self._has(each.keys[at])] for each in wanted]
        count = sum(map(len, missing))
        room = self._make_room(count, {each.keys[at] for each in wanted for at in each.held})
        if room == count or len(wanted) == 1:
            for each, columns in zip(wanted, missing, strict=True):
                for some in _split(columns[:room], self.buckets):
                    if not self._send(cache, each, some):
                        break
        keys = wanted[0].keys
        return next((at for at, key in enumerate(keys) if not self._has(key)), len(keys))

    @_whole
    def settle(self) -> None:
        """Wait for the copies that were begun, and make their pages findable."""
        for chunk in tuple(self._flying):  # an interrupt leaves the others in flight
            try:
                rested = self.mover.finish(chunk.pages)
            except CopyPending:
                continue
            except COPY_ERRORS:
                self.stats.failed_copies += 1
                self.num_pages -= len(chunk.keys)
            else:
                self.stats.stored += len(chunk.keys)
                self._shelve(_Chunk(chunk.keys, chunk.tokens, rested))
            self._flying.remove(chunk)
            self._coming.difference_update(chunk.keys)

    def load(self, cache: Any, allocator: BlockAllocator, handle: Handle) -> Any:
        """Fill and commit the pages behind what is computed of a sequence, as far as known here.

        Donates the cache; use the one that comes back. A copy that fails ends the run. A private
        sequence is left as it is.

        Raises:
          RuntimeError: a program failed and took the cache with it.
        """
        held = _Held(cache)
        self.load_into(held, allocator, handle)
        return held.cache

    @_whole
    def load_into(self, holder: CacheHolder, allocator: BlockAllocator, handle: Handle) -> None:
        """`load` into a cache that somebody else holds, who alone replaces it."""
        cache = holder.cache
        _check_pool(cache, allocator)
        info, size = allocator.sequence(handle), allocator.page_size
        first, rest = divmod(info.computed, size)
        if rest or info.private or info.computed == info.length:
            return
        wanted = wanted_pages(allocator, handle, info.length)
        busy: list[_Chunk] = []
        try:
            end, found = self._longest(wanted, first, info.length, size, cache, busy)
            if end > first:
                self._bring(holder, allocator, handle, wanted, range(first, end), found)
        finally:
            for chunk in busy:
                chunk.busy = False

    @_whole
    def forget(self, allocator: BlockAllocator, handle: Handle) -> None:
        """Forget the pages of a sequence, in flight and on the disk too: they may be wrong.

        Pages that travelled with them are forgotten as well.
        """
        info, tokens = allocator.sequence(handle), allocator.tokens(handle)
        if not len(tokens):
            return
        digests = allocator.prefix_digests(tokens, cache_salt=info.cache_salt)
        groups = range(len(allocator.pools))
        keys = {key for group in groups for key in keys_of(allocator, group, digests)}
        for chunk in [c for c in self._flying if not keys.isdisjoint(c.keys)]:
            self._flying.remove(chunk)
            self._coming.difference_update(chunk.keys)
            self.num_pages -= len(chunk.keys)
        found = [self._where[key][0] for key in keys & self._where.keys()]
        for chunk in {id(each): each for each in found}.values():
            self._take_out(chunk)
        if self.disk is not None:
            self.disk.forget(keys)

    @_whole
    def clear(self) -> None:
        """Forget every page, those in flight and those of the disk tier too."""
        self._chunks.clear()
        self._where.clear()
        self._flying.clear()
        self._coming.clear()
        self.num_pages = 0
        if self.disk is not None:
            self.disk.clear()

    @_whole
    def check_invariants(self) -> None:
        """Verify counts and indices against each other; raises RuntimeError."""
        rested, flying = list(self._chunks.values()), self._flying
        keys = [key for chunk in rested for key in chunk.keys]
        broken = {
            "pages are miscounted": self.num_pages != sum(len(c.keys) for c in (*rested, *flying)),
            "more pages than the capacity": self.num_pages > self.capacity_pages,
            "the index and the chunks differ": sorted(keys) != sorted(self._where),
            "a page in flight can be found": bool(self._coming & self._where.keys()),
            "a chunk stayed busy": any(chunk.busy for chunk in rested),
            "copies in flight are not those expected": self._coming
            != {key for chunk in flying for key in chunk.keys},
        }
        if problems := [rule for rule, holds in broken.items() if holds]:
            raise RuntimeError(f"host tier: {'; '.join(problems)}")

    def _repair(self) -> None:
        """Make whole what an interrupt cut off: pages at rest and in flight are what there is."""
        rested = list(self._chunks.values())
        for chunk in rested:
            chunk.busy = False
        self._where = {key: (c, row) for c in rested for row, key in enumerate(c.keys)}
        self._flying = [chunk for chunk in self._flying if chunk.keys[0] not in self._where]
        self._coming = {key for chunk in self._flying for key in chunk.keys}
        self.num_pages = sum(len(chunk.keys) for chunk in (*rested, *self._flying))

    # ---- one copy

    def _has(self, key: bytes) -> bool:
        return key in self._where or key in self._coming

    def _send(self, cache: Any, wanted: Wanted, columns: list[int]) -> bool:
        pages = np.array([wanted.page(column) for column in columns], np.int32)
        try:
            copy = self.mover.take(part_of(cache, wanted.group), pages)
        except COPY_ERRORS:
            self.stats.failed_copies += 1
            return False
        keys = tuple(wanted.keys[column] for column in columns)
        tokens = tuple(wanted.tokens[column] for column in columns)
        self._flying.append(_Chunk(keys, tokens, copy))
        self._coming.update(keys)
        self.num_pages += len(keys)
        return True

    def _shelve(self, chunk: _Chunk) -> None:
        self._chunks[id(chunk)] = chunk
        self._where.update((key, (chunk, row)) for row, key in enumerate(chunk.keys))

    # ---- what comes back

    def _longest(
        self,
        wanted: list[Wanted],
        first: int,
        length: int,
        size: int,
        cache: Any,
        busy: list[_Chunk],
    ) -> tuple[int, list[_Found]]:
        """Up to which column every group has here what it needs, and where; those chunks are
        `busy` then. A column that a window lacks is lacked by every end behind it."""
        found: list[_Found] = [{} for _ in wanted]
        keep = {key for each in wanted for key in each.keys}

        def has(at: int, column: int) -> bool:
            if column not in found[at]:
                if (place := self._find(wanted[at], column, cache, keep)) is None:
                    return False
                place[0].busy = True
                busy.append(place[0])
                found[at][column] = place
            return True

        full = [at for at, each in enumerate(wanted) if each.window is None]
        windows = [at for at, each in enumerate(wanted) if each.window is not None]
        end = first
        while end < len(wanted[0].keys) and all(has(at, end) for at in full):
            end += 1
        while end > first:
            lacking = (
                column
                for at in windows
                for column in reversed(wanted[at].needed(first, min(end * size, length), size))
                if not has(at, column)
            )
            if (column := next(lacking, None)) is None:
                break
            end = column
        return end, found

    def _find(
        self, wanted: Wanted, column: int, cache: Any, keep: set[bytes]
    ) -> tuple[_Chunk, int] | None:
        """Chunk and row of a page; None if it is not here, nor on the disk."""
        key = wanted.keys[column]
        if key not in self._where and not self._revive(key, keep, part_of(cache, wanted.group)):
            return None
        chunk, row = self._where[key]
        same = np.array_equal(chunk.tokens[row], wanted.tokens[column])
        return (chunk, row) if same else None  # else two contents of one digest

    def _bring(
        self,
        holder: CacheHolder,
        allocator: BlockAllocator,
        handle: Handle,
        wanted: list[Wanted],
        columns: range,
        found: list[_Found],
    ) -> None:
        """Copy back these columns, and what windows need at the end of them; then commit.

        Of one group as far as copies went well. Of several all or nothing: where a window has no
        room, or a copy fails, the tokens are computed.
        """
        size, length = allocator.page_size, allocator.sequence(handle).length
        computed = min(columns.stop * size, length)
        windows = any(each.window is not None for each in wanted)
        try:
            aside = allocator.prepare_copy(handle, computed) if windows else ()
        except OutOfPages:
            return
        for at, each in enumerate(wanted):
            need = each.needed(columns.start, computed, size)
            if each.window is not None:
                wanted[at] = each = each.holding(need.start, aside[each.group])
            loaded = self._copy(holder, each, {column: found[at][column] for column in need})
            end = next((column for column in need if column not in loaded), need.stop)
            self.stats.loaded += len(loaded) if windows else end - need.start
            if end < need.stop and len(wanted) > 1:
                if windows:
                    allocator.cancel_copy(handle)
                return
            columns = range(columns.start, min(end, columns.stop))
        if windows:
            allocator.commit_copy(handle)
        elif columns:
            allocator.commit([handle], [min(columns.stop * size, length)])
        self._touch(reversed(wanted[0].keys[: columns.stop]))

    def _copy(self, holder: CacheHolder, wanted: Wanted, found: _Found) -> set[int]:
        """Copy these columns to the pages that the sequence has; returns which are there now."""
        loaded: set[int] = set()
        try:
            for chunk in dict.fromkeys(chunk for chunk, _ in found.values()):
                ids = np.zeros(len(chunk.keys), np.int32)
                mine = [(column, row) for column, (c, row) in found.items() if c is chunk]
                for column, row in mine:
                    ids[row] = wanted.page(column)
                holder.exchange(partial(self._put, chunk, ids, wanted.group))
                loaded.update(column for column, _ in mine)
        except COPY_ERRORS:
            if getattr(holder.cache, "is_deleted", False):
                raise
            self.stats.failed_copies += 1
        return loaded

    def _put(self, chunk: _Chunk, ids: np.ndarray, group: int, cache: Any) -> Any:
        return with_part(cache, group, self.mover.put(part_of(cache, group), chunk.pages, ids))

    # ---- room

    def _touch(self, keys: Any) -> None:
        for key in keys:
            if key in self._where:
                self._chunks.move_to_end(id(self._where[key][0]))

    def _make_room(self, count: int, keep: set[bytes]) -> int:
        """Give up chunks until `count` pages fit, none of the pages `keep`; returns how many do."""
        for chunk in list(self._chunks.values()):
            if self.num_pages + count <= self.capacity_pages:
                break
            if not chunk.busy and keep.isdisjoint(chunk.keys):
                self._give_up(chunk)
        return min(count, self.capacity_pages - self.num_pages)

    def _take_out(self, chunk: _Chunk) -> None:
        del self._chunks[id(chunk)]
        for key in chunk.keys:
            del self._where[key]
        self.num_pages -= len(chunk.keys)

    def _give_up(self, chunk: _Chunk) -> None:
        self._take_out(chunk)
        self.stats.evicted += len(chunk.keys)
        if self.disk is not None and self.disk.write(chunk.keys, chunk.tokens, chunk.pages):
            self.stats.spilled += len(chunk.keys)

    def _revive(self, key: bytes, keep: set[bytes], cache: Any) -> bool:
        """Bring the chunk of a page back from the disk, if it fits the cache and has room here."""
        content = None if self.disk is None else self.disk.read(key)
        if content is None:
            return False
        keys, tokens, pages = content
        known = any(k in self._where or k in self._coming for k in keys)
        if (
            known
            or len(keys) > self.capacity_pages
            or not fits(cache, pages, len(keys))
            or self._make_room(len(keys), keep) < len(keys)
        ):
            return False
        self.num_pages += len(keys)
        self.stats.revived += len(keys)
        self._shelve(_Chunk(keys, tokens, pages))
        return True


def _check_pool(cache: Any, allocator: BlockAllocator) -> None:
    if isinstance(cache, KVCache):
        cache.check_allocator(allocator)


def _split(places: list[int], buckets: tuple[int, ...]) -> Iterator[list[int]]:
    """Cut to lengths that are buckets, the largest first."""
    begin = 0
    while begin < len(places):
        size = max(b for b in buckets if b <= len(places) - begin)
        yield places[begin : begin + size]
        begin += size
