"""One allocator per data shard, behind one front that speaks of pages of the whole pool."""

import secrets
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, SupportsIndex

import numpy as np

from .arguments import Ints, as_count, as_ints, as_rows, as_step_tokens
from .batch import DecodeBatch, PageCopies
from .block_allocator import BlockAllocator
from .errors import OutOfPages, PageTableError
from .framing import empty_page_table
from .growth import plan_growth
from .policy import EvictionPolicy
from .prefix import Digest, new_generation
from .sequences import Handle, SequenceInfo, as_handles
from .stats import AllocatorStats

__all__ = ["ShardedAllocator"]

_ROW_MASK = 0xFFFF_FFFF


class ShardedAllocator:
    """Sequences over the pages of R equal shards; a sequence lives on one shard for life.

    Page ids, slots and handles are those of the whole pool: shard r has the pages
    `r * N/R .. (r+1) * N/R - 1`, the first of which is its null page. `split_batch` makes of a
    batch what the devices see. The calls are those of `BlockAllocator`, and as there what raises
    changed nothing, on no shard.

    A new sequence goes to the shard that knows most of its prefix, and among equals to the one
    with most pages to give. A prefix that only another shard has is computed again.

    Args:
      num_pages: N, a multiple of R, with at least 2 pages a shard.
      page_size: S.
      num_shards: R.
      prefix_cache: of every shard's `BlockAllocator`, as are the next three.
      hash_key: the same for all shards.
      fingerprint: as there.
      digest: as there.
      eviction: makes a policy, one for each shard; None makes `LRU()`.

    Example:
      >>> allocator = ShardedAllocator(16, 4, num_shards=2)
      >>> handles = [allocator.allocate([5, 6, 7]), allocator.allocate([8, 9])]
      >>> allocator.sequence(handles[0]).pages, allocator.sequence(handles[1]).pages
      ((1,), (9,))
    """

    def __init__(
        self,
        num_pages: SupportsIndex,
        page_size: SupportsIndex,
        *,
        num_shards: SupportsIndex,
        prefix_cache: bool = True,
        hash_key: bytes | None = None,
        fingerprint: bytes = b"",
        eviction: Callable[[], EvictionPolicy] | None = None,
        digest: Digest | None = None,
    ):
        pages, shards = as_count("num_pages", num_pages), as_count("num_shards", num_shards, 1)
        if pages % shards:
            raise ValueError(f"num_pages must be a multiple of {shards} shards, got {pages}")
        key = secrets.token_bytes(32) if hash_key is None else hash_key
        self.shards = tuple(
            BlockAllocator(
                pages // shards,
                page_size,
                prefix_cache=prefix_cache,
                hash_key=key,
                fingerprint=fingerprint,
                eviction=None if eviction is None else eviction(),
                digest=digest,
            )
            for _ in range(shards)
        )
        self.prefix_cache = prefix_cache
        self.fingerprint = fingerprint

    # ---- counts

    @property
    def num_pages(self) -> int:
        """N, the null page of every shard included."""
        return sum(shard.num_pages for shard in self.shards)

    @property
    def page_size(self) -> int:
        """S, in tokens."""
        return self.shards[0].page_size

    @property
    def usable_pages(self) -> int:
        """N - R."""
        return sum(shard.usable_pages for shard in self.shards)

    @property
    def sequence_pages(self) -> int:
        """The most pages that one sequence can have: those of one shard."""
        return self.shards[0].usable_pages

    @property
    def num_free(self) -> int:
        """Pages that hold nothing."""
        return sum(shard.num_free for shard in self.shards)

    @property
    def num_evictable(self) -> int:
        """Cached pages without an owner."""
        return sum(shard.num_evictable for shard in self.shards)

    @property
    def num_used(self) -> int:
        """Pages with at least one owner."""
        return sum(shard.num_used for shard in self.shards)

    @property
    def handles(self) -> tuple[Handle, ...]:
        """The live sequences, shard by shard."""
        return tuple(
            self._whole(i, h) for i, shard in enumerate(self.shards) for h in shard.handles
        )

    def can_ever_fit(self, num_tokens: SupportsIndex) -> bool:
        """Whether one sequence of that many tokens would fit a shard if it were empty."""
        return self.shards[0].can_ever_fit(num_tokens)

    def ref_count(self, page: SupportsIndex) -> int:
        """How many owners a page has; see `BlockAllocator.ref_count`."""
        page = as_count("page", page)
        if page >= self.num_pages:
            raise ValueError(f"page must be at most {self.num_pages - 1}, got {page}")
        shard, own = divmod(page, self.shards[0].num_pages)
        return self.shards[shard].ref_count(own)

    def shard_of(self, handle: SupportsIndex) -> int:
        """On which shard a sequence lives."""
        shard, own = self._own(as_handles(handle).reshape(-1))
        self.shards[shard[0]].sequence(int(own[0]))
        return int(shard[0])

    # ---- one sequence

    def match_prefix(self, tokens: Ints, *, cache_salt: str | bytes | None = None) -> int:
        """The most leading tokens that a shard has cached."""
        return max(shard.match_prefix(tokens, cache_salt=cache_salt) for shard in self.shards)

    def page_digests(self, tokens: Ints, **options: Any) -> list[bytes]:
        """The keys by which full pages would be cached, on any shard; options as in
        `BlockAllocator.page_digests`."""
        return self.shards[0].page_digests(tokens, **options)

    def prefix_digests(self, tokens: Ints, **options: Any) -> list[bytes]:
        """As `BlockAllocator.prefix_digests`."""
        return self.shards[0].prefix_digests(tokens, **options)

    def allocate(
        self,
        tokens: Ints,
        *,
        cache_salt: str | bytes | None = None,
        keep_free: SupportsIndex = 0,
    ) -> Handle:
        """Start a sequence on the shard that suits it best; see `BlockAllocator.allocate`.

        `keep_free` counts pages of the whole pool, of which a shard keeps its part.

        Raises:
          SequenceTooLong: no shard could ever hold it.
          OutOfPages: no shard can now; the error is that of the shard that suits best.
        """
        keep_free = -(-as_count("keep_free", keep_free) // len(self.shards))
        known = [shard.match_prefix(tokens, cache_salt=cache_salt) for shard in self.shards]
        room = [shard.num_free + shard.num_evictable for shard in self.shards]
        order = sorted(range(len(self.shards)), key=lambda i: (-known[i], -room[i], i))
        refusal: OutOfPages | None = None
        for index in order:
            try:
                handle = self.shards[index].allocate(
                    tokens, cache_salt=cache_salt, keep_free=keep_free
                )
                return self._whole(index, handle)
            except OutOfPages as error:
                refusal = refusal or error
        raise refusal or RuntimeError("unreachable: there is at least one shard")

    def fork(self, handle: SupportsIndex, n: SupportsIndex = 1) -> list[Handle]:
        """n more sequences with the same tokens, on the same shard."""
        index, own = self._one(handle)
        return [self._whole(index, child) for child in self.shards[index].fork(own, n)]

    def truncate(self, handle: SupportsIndex, length: SupportsIndex) -> None:
        """Forget the tokens from `length` on."""
        index, own = self._one(handle)
        self.shards[index].truncate(own, length)

    def sequence(self, handle: SupportsIndex) -> SequenceInfo:
        """What is known about one sequence, with page ids of the whole pool."""
        index, own = self._one(handle)
        info = self.shards[index].sequence(own)
        first = index * self.shards[0].num_pages
        return replace(info, pages=tuple(first + page for page in info.pages))

    def tokens(self, handle: SupportsIndex) -> np.ndarray:
        """The tokens of one sequence, int32 `[length]`, a copy."""
        index, own = self._one(handle)
        return self.shards[index].tokens(own)

    # ---- many sequences: first everything is checked on every shard, then it is done

    def reserve(self, handles: Ints, num_tokens: Ints) -> PageCopies:
        """As `BlockAllocator.reserve`; no shard has changed if one cannot."""
        groups, size = self._groups(handles)
        count = as_rows("num_tokens", num_tokens, size)
        self._check_growth(groups, count)
        return self._copies(
            (i, self.shards[i].reserve(own, count[at])) for i, (at, own) in groups.items()
        )

    def append(self, handles: Ints, tokens: Ints, counts: Ints | None = None) -> PageCopies:
        """As `BlockAllocator.append`; no shard has changed if one cannot."""
        groups, size = self._groups(handles)
        token = as_step_tokens(tokens, as_handles(handles).shape, "k")
        width = token.shape[-1]
        token = token.reshape(size, width)
        count = as_rows("counts", width if counts is None else counts, size)
        if count.size and count.max() > width:
            raise ValueError(f"counts must be at most k = {width}, got {count.max()}")
        self._check_growth(groups, count)
        return self._copies(
            (i, self.shards[i].append(own, token[at], count[at])) for i, (at, own) in groups.items()
        )

    def advance(
        self,
        handles: Ints,
        tokens: Ints,
        *,
        rows: SupportsIndex | None = None,
        columns: SupportsIndex | None = None,
    ) -> tuple[DecodeBatch, PageCopies]:
        """As `BlockAllocator.advance`: one more token each, and the step that computes it."""
        groups, size = self._groups(handles)
        token = as_step_tokens(tokens, as_handles(handles).shape).reshape(size)
        length = np.zeros(size, np.int64)
        for i, (at, own) in groups.items():
            length[at] = [self.shards[i].sequence(h).length for h in own.tolist()]
        longest = -(-(int(length.max(initial=0)) + 1) // self.page_size)
        empty_page_table(rows, columns, np.full(size, longest), longest)  # refuses what is too few
        flat = as_handles(handles).reshape(-1)
        copies = self.append(flat, token[:, None])
        return self.batch(flat, length, length + 1, rows=rows, columns=columns), copies

    def commit(self, handles: Ints, computed: Ints) -> None:
        """As `BlockAllocator.commit`; no shard has changed if one cannot."""
        groups, size = self._groups(handles)
        computed = as_rows("computed", computed, size)
        for i, (at, own) in groups.items():
            length = [self.shards[i].sequence(h).length for h in own.tolist()]
            if (computed[at] > length).any():
                raise ValueError(f"computed must be at most the lengths {length}, append first")
        for i, (at, own) in groups.items():
            self.shards[i].commit(own, computed[at])

    def trim(self, handles: Ints) -> int:
        """Give back the reserved pages behind the last token; returns how many."""
        groups, _ = self._groups(handles)
        return sum(self.shards[i].trim(own) for i, (_, own) in groups.items())

    def free(self, handles: Ints) -> None:
        """End sequences; nothing is freed if one handle is stale or named twice."""
        groups, _ = self._groups(handles)
        for i, (_, own) in groups.items():
            self.shards[i].free(own)

    def withdraw(self, handles: Ints) -> None:
        """As `BlockAllocator.withdraw`; none is if one handle is stale or named twice."""
        groups, _ = self._groups(handles)
        for i, (_, own) in groups.items():
            self.shards[i].withdraw(own)

    def batch(
        self,
        handles: Ints,
        begin: Ints,
        end: Ints,
        *,
        tokens_per_row: SupportsIndex = 1,
        rows: SupportsIndex | None = None,
        columns: SupportsIndex | None = None,
    ) -> DecodeBatch:
        """As `BlockAllocator.batch`, rows in the order of `handles`, ids of the whole pool."""
        groups, size = self._groups(handles)
        begin, end = as_rows("begin", begin, size), as_rows("end", end, size)
        width = as_count("tokens_per_row", tokens_per_row, 1)
        parts = {
            i: self.shards[i].batch(own, begin[at], end[at], tokens_per_row=width, columns=columns)
            for i, (at, own) in groups.items()
        }
        held = np.array([p.page_table.shape[1] for p in parts.values()], np.int64)
        padded = size if rows is None else as_count("rows", rows)
        if padded < size:
            raise ValueError(f"rows must be at least the {size} handles, got {padded}")
        empty = (np.zeros((padded, width), np.int32) for _ in range(2))
        table = np.zeros(
            (padded, int(held.max(initial=1)) if columns is None else columns), np.int32
        )
        whole = DecodeBatch(table, np.zeros(padded, np.int32), *empty)
        for i, part in parts.items():
            at, first = groups[i][0], i * self.shards[0].num_pages
            used = part.page_table
            table[at, : used.shape[1]] = np.where(used, used + first, 0)
            real = part.slots >= self.page_size  # padding stays on page 0
            whole.slots[at] = np.where(real, part.slots + first * self.page_size, 0)
            whole.seq_lens[at], whole.positions[at] = part.seq_lens, part.positions
        return whole

    # ---- pages outside sequences

    def allocate_pages(self, k: SupportsIndex) -> list[int]:
        """Take k pages by number, pinned until `free_pages`, from the shards with most room.

        Raises:
          OutOfPages: all shards together have fewer; nothing is taken.
        """
        left = as_count("k", k)
        if left > self.num_free + self.num_evictable:
            raise OutOfPages(left, self.num_free, self.num_evictable)
        room = [shard.num_free + shard.num_evictable for shard in self.shards]
        pages: list[int] = []
        try:
            for i in sorted(range(len(room)), key=lambda i: (-room[i], i)):
                own = self.shards[i].allocate_pages(min(left, room[i]))
                pages += [i * self.shards[0].num_pages + page for page in own]
                left -= len(own)
        except BaseException:  # an eviction policy that fails must not leak pages
            self.free_pages(pages)
            raise
        return pages

    def free_pages(self, pages: Ints) -> None:
        """Give back pages of `allocate_pages`; null pages among them are padding, and skipped.

        Raises:
          ValueError, PageTableError: as `BlockAllocator.free_pages`; nothing is freed.
        """
        ids = as_ints("pages", pages)
        if ids.ndim != 1:
            raise ValueError(f"pages must have shape [k], got shape {list(ids.shape)}")
        if ids.size and (ids.min() < 0 or ids.max() >= self.num_pages):
            raise ValueError(f"pages must be from 0 to {self.num_pages - 1}, got {ids.tolist()}")
        shard, own = np.divmod(ids, self.shards[0].num_pages)
        groups = [own[(shard == i) & (own != 0)] for i in range(len(self.shards))]
        for i, group in enumerate(groups):
            if len(np.unique(group)) != len(group):
                raise ValueError(f"pages must name each page once, got {ids.tolist()}")
            if not (held := self.shards[i]._pool.pinned[group]).all():
                first = i * self.shards[0].num_pages
                raise PageTableError(
                    f"pages {(group[~held] + first).tolist()} were not handed out by "
                    "allocate_pages, or were freed already; nothing was freed"
                )
        for one, group in zip(self.shards, groups, strict=True):
            one.free_pages(group)

    # ---- what it knows

    def page_states(self) -> np.ndarray:
        """What every page of the pool is doing: uint8 `[N]` of `PageState`."""
        return np.concatenate([shard.page_states() for shard in self.shards])

    def stats(self) -> AllocatorStats:
        """The shards' counts added up; `peak_used` adds peaks that may be of different moments."""
        parts = [shard.stats() for shard in self.shards]
        names = [field.name for field in fields(AllocatorStats)]
        total = {name: sum(getattr(part, name) for part in parts) for name in names}
        slots = (total["used"] - total["pinned"]) * self.page_size
        waste = 1 - total["stored_tokens"] / slots if slots else 0.0
        return AllocatorStats(**total | dict(tail_waste=waste))

    def reset_prefix_cache(self, *, same_weights: bool = False) -> bool:
        """As `BlockAllocator.reset_prefix_cache`: False while any page of a shard has an owner."""
        if self.num_used:
            return False
        drawn = None if same_weights else new_generation()
        return all([shard._reset(drawn) for shard in self.shards])

    def new_weights(self, generation: bytes | None = None) -> None:
        """As `BlockAllocator.new_weights`, the same generation on every shard."""
        drawn = new_generation()
        for shard in self.shards:
            shard._replace_weights(generation, drawn)

    @property
    def generation(self) -> bytes:
        """Of the weights, in the root of every digest; empty until they are replaced."""
        return self.shards[0].generation

    @property
    def weights(self) -> bytes:
        """As `BlockAllocator.weights`."""
        return self.shards[0].weights

    def check_invariants(self) -> None:
        """Verify every shard; raises CorruptState."""
        for shard in self.shards:
            shard.check_invariants()

    def __repr__(self) -> str:
        return (
            f"ShardedAllocator({len(self.shards)} shards, each {self.shards[0].usable_pages} pages)"
        )

    # ---- handles: the shard is the row's rest by R

    def _whole(self, shard: int, handle: Handle) -> Handle:
        row = (handle & _ROW_MASK) * len(self.shards) + shard
        return Handle((handle & ~_ROW_MASK) | row)

    def _own(self, handles: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        row = handles & _ROW_MASK
        return row % len(self.shards), (handles & ~_ROW_MASK) | row // len(self.shards)

    def _one(self, handle: SupportsIndex) -> tuple[int, int]:
        array = as_handles(handle)
        if array.ndim != 0:
            raise TypeError(f"handle must be one handle, got {handle!r}")
        shard, own = self._own(array.reshape(1))
        return int(shard[0]), int(own[0])

    def _groups(self, handles: Ints) -> tuple[dict[int, Any], int]:
        """Per shard the places and its own handles; all are live and distinct."""
        flat = as_handles(handles).reshape(-1)
        shard, own = self._own(flat)
        groups = {}
        for i in np.unique(shard).tolist():
            at = np.flatnonzero(shard == i)
            self.shards[i]._table.resolve(own[at])
            groups[i] = at, own[at]
        return groups, len(flat)

    def _check_growth(self, groups: dict[int, Any], count: np.ndarray) -> None:
        for i, (at, own) in groups.items():
            pool, table = self.shards[i]._pool, self.shards[i]._table
            plan_growth(pool, table, table.resolve(own), count[at])

    def _copies(self, parts: Any) -> PageCopies:
        src, dst = [np.empty(0, np.int32)], [np.empty(0, np.int32)]
        for i, copies in parts:
            first = np.int32(i * self.shards[0].num_pages)
            src.append(copies.src + first)
            dst.append(copies.dst + first)
        return PageCopies(np.concatenate(src), np.concatenate(dst))
