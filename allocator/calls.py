"""Every call that changes an allocator, of one shard or several."""

from collections.abc import Callable, Iterable
from typing import Any, SupportsIndex, TypeVar

import numpy as np

from .arguments import (
    Ints,
    as_appended,
    as_count,
    as_counts,
    as_int,
    as_ints,
    as_kept,
    as_rows,
    as_step_tokens,
)
from .batch import DecodeBatch, Prepared
from .bookkeeping import Bookkeeping, Plan
from .errors import OutOfPages
from .framing import Frame, check_span
from .locking import changing
from .merging import Copies, Grown, in_groups, merged_copies, prepared, run
from .prefix import new_generation
from .prompt import PromptKey, as_key
from .rows import Handle, as_handle, as_handles
from .view import AllocatorView

__all__ = ["AllocatorCalls"]

_MAX_FORKS = 2**16  # per call: far below what int32 reference counts and memory for rows can hold
T = TypeVar("T")


class AllocatorCalls(AllocatorView):
    """The changing half of an allocator: arguments, then a plan for every shard, then all of them.

    Wherever `handles` are taken, one handle or a sequence of B distinct handles will do.
    """

    # ---- the start of a sequence ----

    @changing
    def allocate(
        self,
        tokens: Ints | PromptKey,
        *,
        cache_salt: str | bytes | None = None,
        keep_free: Ints = 0,
        chunk: SupportsIndex | None = None,
    ) -> Handle:
        """Start a sequence of T tokens: cached pages for its prefix, new pages for the rest.

        Afterwards its length is T, and `computed` and `cached` are the tokens that were found.

        Args:
          tokens: int `[T]`, T >= 1; ids from 0 to 2**31 - 1. Or a `PromptKey` of them, whose
            digests serve again.
          cache_salt: only sequences with an equal salt share pages through the cache. None, "",
            b"", "x" and b"x" are five different salts.
          keep_free: pages that must be free or evictable afterwards (a watermark), in every group.
            Over shards, of one number every shard keeps its part; a number for each, int `[R]`,
            holds there, and `[R, G]` in each group.
          chunk: of the tokens that were not found, how many are computed first. Window groups take
            pages for these alone; `prepare` takes those for the next, after `commit`. None: all.

        Raises:
          SequenceTooLong: the whole pool holds fewer than T tokens.
          OutOfPages: not enough free or evictable pages at the moment. `needed` counts new pages,
            found ones that were evictable, and `keep_free`.
        """
        key, shards = as_key(tokens, cache_salt), len(self._shards)
        first = None if chunk is None else as_count("chunk", chunk, 1)
        return self._plan_allocate(key, as_kept(keep_free, shards, len(self.pools)), first)()

    # ---- growth ----

    @changing
    def append(
        self,
        handles: Ints,
        tokens: Ints,
        counts: Ints | None = None,
        *,
        chunk: SupportsIndex | None = None,
    ) -> Copies:
        """Add up to k tokens to each of B sequences; all rows or none.

        Args:
          handles: B distinct handles.
          tokens: int `[B, k]`; `[k]` for one handle.
          counts: int `[B]` or one for all, from 0 to k: row b takes its first counts[b] tokens.
            None takes all.
          chunk: as in `allocate`: how many tokens behind those computed are computed next.

        Returns:
          The pages to copy on the device before anything is written to the new positions; of
          several groups one for each.

        Raises:
          OutOfPages, SequenceTooLong, StaleHandle: no sequence has changed.
        """
        handle = as_handles(handles)
        token, count = as_appended(handle, tokens, counts)
        parts = self._grown(handle, count, None if chunk is None else as_count("chunk", chunk, 1))
        return merged_copies(
            [books.append(row, token[at], count[at], each) for books, row, at, each in parts]
        )

    @changing
    def advance(
        self,
        handles: Ints,
        tokens: Ints,
        *,
        pad_to: SupportsIndex | None = None,
        columns: SupportsIndex | None = None,
        commit: bool = False,
    ) -> tuple[DecodeBatch, Copies]:
        """Add one token to each of B sequences and describe the decode step that computes it.

        The hot call: the same as `append` and then `batch` of the new positions, without a loop
        over sequences.

        Args:
          handles: B distinct handles.
          tokens: int `[B]`, the newest token of each; its keys and values are not written yet.
          pad_to: rows of the batch, of which those behind B are padding; None is B.
          columns: width of the page table; see `batch`.
          commit: first commit what batches have described so far of these sequences. Say so only
            if every program that was given one of them has been launched.

        Returns:
          A batch with T = 1, and the pages to copy on the device before the step.

        Raises:
          OutOfPages, SequenceTooLong, StaleHandle: no sequence has changed.
        """
        handle = as_handles(handles)
        token = as_step_tokens(tokens, handle.shape).reshape(handle.size, 1)
        return self._step(self._grown(handle, 1), token, None, pad_to, columns, commit)

    @changing
    def extend(
        self,
        handles: Ints,
        tokens: Ints,
        counts: Ints | None = None,
        *,
        reserve: Ints = 0,
        pad_to: SupportsIndex | None = None,
        columns: SupportsIndex | None = None,
        commit: bool = False,
    ) -> tuple[DecodeBatch, Copies]:
        """`advance` by up to k tokens each, such as drafts: `append`, `reserve`, and the step.

        Args:
          handles: B distinct handles.
          tokens: int `[B, k]`; `[k]` for one handle. k may be 0.
          counts: int `[B]` or one for all, from 0 to k: row b takes its first counts[b] tokens.
            None takes all.
          reserve: int `[B]` or one for all: pages for that many tokens behind the new ones, too.
          pad_to: as in `advance`, like the others and what is raised.
          columns: see `batch`.
          commit: as in `advance`.

        Returns:
          A batch with T = k, at least 1, and the pages to copy on the device before the step.
        """
        handle = as_handles(handles)
        token, count = as_appended(handle, tokens, counts)
        more = np.minimum(as_rows("reserve", reserve, handle.size), 2**32)
        return self._step(self._grown(handle, count + more), token, count, pad_to, columns, commit)

    @changing
    def prepare(self, handles: Ints, end: Ints) -> Prepared | tuple[Prepared, ...]:
        """Take the pages for all positions below `end` of each sequence, all rows or none.

        Lengths do not change. Until the next fork, tokens up to there take no page and copy none,
        and `batch` may describe positions up to there: that is what k decode steps on the device
        without a visit to the host need.

        Args:
          handles: B distinct handles.
          end: int `[B]`, or one for all; 0 or more. Where it is not past the length nothing is
            taken.

        Returns:
          The pages to copy on the device before anything is written past the lengths, and which
          entries of the page tables are others now.

        Raises:
          OutOfPages, SequenceTooLong, StaleHandle: no sequence has changed.
        """
        handle = as_handles(handles)
        ends = as_rows("end", end, handle.size)
        parts = [
            (books, row, at, books.plan_pages(row, ends[at]))
            for books, row, at in self._split(handle)
        ]
        return prepared(parts, handle.size)

    @changing
    def reserve(self, handles: Ints, num_tokens: Ints) -> Copies:
        """`prepare` of `num_tokens` (int `[B]`, or one for all) past the length of each sequence.

        Pages reserved before count. Returns the pages to copy before anything is written there.
        """
        handle = as_handles(handles)
        count = as_rows("num_tokens", num_tokens, handle.size)
        done = prepared(self._grown(handle, count), handle.size)
        return merged_copies([[each.copies for each in in_groups(done)]])

    @changing
    def trim(self, handles: Ints) -> int:
        """Give back the reserved pages behind the last token; returns how many."""
        return sum(self._each(as_handles(handles), lambda books, row, _: books.plan_trim(row)))

    # ---- a step on the device ----

    @changing
    def batch(
        self,
        handles: Ints,
        begin: Ints,
        end: Ints,
        *,
        tokens_per_row: SupportsIndex = 1,
        pad_to: SupportsIndex | None = None,
        columns: SupportsIndex | None = None,
    ) -> DecodeBatch:
        """Describe a step that computes positions begin[b] to end[b] - 1.

        Nothing changes but what `advance(commit=True)` may take for computed later: positions
        described in their order, up to the length. Those past it, `commit` after `append`.

        Args:
          handles: B distinct handles.
          begin: int `[B]`, or one for all, at least what is computed.
          end: int `[B]`, or one for all; `begin <= end <= capacity` and
            `end - begin <= tokens_per_row`. Past the length, reserve first.
          tokens_per_row: T; a row with fewer positions has its padding in front.
          pad_to: rows of the batch, of which those behind B have length 0; None is B.
          columns: width of the page table, enough for every `end`; None is the most pages that a
            row holds, reserved ones included, rounded up to a power of two.

        Raises:
          PageTableError: a position past the length lies on a page that others share or that is
            published: `reserve` first. Or two rows would write the same slot, as forks that are
            not computed yet do: compute one of them, then commit all.
        """
        handle, width = as_handles(handles), as_count("tokens_per_row", tokens_per_row, 1)
        begins = as_rows("begin", begin, handle.size)
        ends = as_rows("end", end, handle.size)
        parts = self._split(handle)
        for books, row, at in parts:
            for group in books.groups:
                check_span(group, books.rows, row, begins[at], ends[at], width, at)
        groups = parts[0][0].groups
        tables = [(g.table, row) for books, row, _ in parts for g in books.groups]
        held = max(int(table.end[row].max(initial=0)) for table, row in tables)
        needed = -(-int(ends.max(initial=0)) // self.page_size)
        frame = Frame.empty(groups, len(ends), width, pad_to, columns, held=held, needed=needed)
        run(books.describe(row, begins[at], ends[at], frame, at) for books, row, at in parts)
        return frame.batch(groups)

    @changing
    def commit(self, handles: Ints, computed: Ints) -> None:
        """State that the keys and values of the first computed[b] tokens are written.

        Full pages among them enter the prefix cache, unless the sequence is private. A number that
        is not larger than what was committed before changes nothing.

        Args:
          handles: B distinct handles.
          computed: int `[B]`, or one for all; from 0 to the length.
        """
        handle = as_handles(handles)
        ends = as_rows("computed", computed, handle.size)
        self._each(handle, lambda books, row, at: books.plan_commit(row, ends[at]))

    # ---- sharing, and the end of a sequence ----

    @changing
    def fork(
        self, handle: SupportsIndex, n: SupportsIndex = 1, *, commit: bool = False
    ) -> list[Handle]:
        """Make n more sequences with the same tokens; takes no page and copies nothing.

        Every page that holds tokens is shared, a partial last page too; whoever writes to that one
        first gets a copy of it then (copy-on-write), and the last owner keeps it. Reserved pages
        stay with the parent. Salt, `computed`, `cached` and `private` are inherited.

        Args:
          handle: one sequence.
          n: from 0 to 2**16.
          commit: as in `advance`.
        """
        count = as_count("n", n)
        if count > _MAX_FORKS:
            raise ValueError(f"n must be at most {_MAX_FORKS}, got {count}")
        ((books, row, _),) = self._split(as_handle(handle))
        committed = books.plan_commit(row, None) if commit else lambda: None
        forked = books.plan_fork(row, count)
        committed()
        return forked()

    @changing
    def truncate(self, handles: Ints, length: Ints) -> None:
        """Forget the tokens from `length` on, and the pages that only they needed.

        Reserved pages are given back too. `computed` falls to the length where it was more. A last
        page that becomes partial leaves the prefix cache, unless another sequence has it too.

        Args:
          handles: B distinct handles.
          length: int `[B]`, or one for all; each from 0 to the length of its sequence.
        """
        handle = as_handles(handles)
        keep = as_rows("length", length, handle.size)
        self._each(handle, lambda books, row, at: books.plan_truncate(row, keep[at]))

    @changing
    def free(self, handles: Ints) -> None:
        """End sequences; their handles are stale afterwards.

        Pages without another owner become free, or evictable where they are in the prefix cache.

        Raises:
          StaleHandle: one of them is not live; nothing is freed.
          ValueError: one of them is named twice; nothing is freed.
        """
        self._each(as_handles(handles), lambda books, row, _: books.plan_free(row))

    @changing
    def withdraw(self, handles: Ints) -> None:
        """Take the pages of sequences out of the prefix cache: what they hold may be wrong.

        Their owners keep them. One that lives on publishes its own again when it fills one more,
        so free the broken ones next.
        """
        for books, row, _ in self._split(as_handles(handles)):
            books.withdraw(row)

    @changing
    def prioritize(self, pages: Iterable[SupportsIndex], priority: SupportsIndex) -> None:
        """Give cached pages a priority, for an eviction rank such as `policies.Priority`.

        It lasts until the page leaves the cache. Pages that are not cached are passed over. What
        other groups have for the same tokens gets it too.
        """
        value, last = as_int("priority", priority), self.num_pages - 1
        ids = np.array([page for page in as_counts("pages", pages) if page <= last], np.int64)
        self._each_pool(ids, lambda books, own: books.plan_prioritize(own.tolist(), value))

    @changing
    def reset_prefix_cache(self, *, same_weights: bool = False) -> bool:
        """Empty the prefix cache; False, and no change, while any page has an owner.

        A host tier finds nothing of before either, unless the weights are said to be the same.
        """
        if any(group.pool.num_used for books in self._shards for group in books.groups):
            return False
        drawn = None if same_weights else new_generation()
        run(books.plan_renewal(drawn) for books in self._shards)
        return True

    @changing
    def new_weights(self, generation: bytes | None = None) -> None:
        """Nothing that was computed so far can be found from now on; call it at any time.

        The generation of the weights is in the root of every digest, so tiers and their files on
        the disk miss as the pool does. Cached pages become free. Sequences keep their pages, but as
        private ones (`SequenceInfo.private`): free them, and allocate them again, to compute them
        with the new weights.

        Args:
          generation: a name for the new weights. Another process that gives the same one (with the
            same `hash_key` and `fingerprint`) finds what this one leaves on a disk. None draws 16
            random bytes, which no other process has; a snapshot then counts the updates.
        """
        if generation is not None and not isinstance(generation, bytes):
            raise TypeError(f"generation must be bytes or None, got {type(generation).__name__}")
        if generation == b"":
            raise ValueError("generation must not be empty: that is the name of the first weights")
        name = generation or b"%d" % (self._shards[0].cache.num_updates + 1)
        generation = generation or new_generation()
        run(books.plan_renewal(generation, name) for books in self._shards)

    # ---- pages outside sequences ----

    @changing
    def allocate_pages(self, k: SupportsIndex, *, group: SupportsIndex = 0) -> list[int]:
        """Take k raw pages of a group, by number, until `free_pages`; raises OutOfPages."""
        count, number = as_count("k", k), self._number(group)
        pools = [books.groups[number].pool for books in self._shards]
        room, free = [p.num_available for p in pools], sum(p.num_free for p in pools)
        if count > sum(room):
            raise OutOfPages(count, free, sum(room) - free, number)
        plans: list[Plan[list[int]]] = []
        for i in sorted(range(len(room)), key=lambda i: (-room[i], i)):
            share = min(count, room[i])
            plans.append(self._shards[i].plan_take_raw(share, number))
            count -= share
        return sum(run(plans), [])

    @changing
    def free_pages(self, pages: Ints, *, group: SupportsIndex = 0) -> None:
        """Give back pages of `allocate_pages`; the null page among them is padding, and skipped.

        Raises:
          ValueError: an id outside the pool, or named twice; nothing is freed.
          PageTableError: a page that `allocate_pages` did not hand out, or that was freed
            already; nothing is freed.
        """
        ids = as_ints("pages", pages)
        if ids.ndim != 1:
            raise ValueError(f"pages must have shape [k], got shape {list(ids.shape)}")
        number = self._number(group)
        self._each_pool(ids, lambda books, own: books.plan_free_raw(own, number), number)

    # ---- over all shards

    def _plan_allocate(
        self, key: PromptKey, keep_free: list[list[int]], chunk: int | None
    ) -> Plan[Handle]:
        """On the shard that knows most of the prompt, and among equals has most pages to give."""
        if self._only is not None:
            return self._only.plan_allocate(key, keep_free[0], chunk)
        refusals: list[OutOfPages] = []
        order = [
            (-books.match(key).served, -books.main.pool.num_available) for books in self._shards
        ]
        for i in sorted(range(len(order)), key=lambda i: (order[i], i)):
            try:
                return self._shards[i].plan_allocate(key, keep_free[i], chunk)
            except OutOfPages as error:
                refusals.append(error)
        raise refusals[0]

    def _step(
        self,
        parts: Grown,
        token: np.ndarray,
        count: np.ndarray | None,
        pad_to: SupportsIndex | None,
        columns: SupportsIndex | None,
        commit: bool,
    ) -> tuple[DecodeBatch, Copies]:
        """Add tokens `[B, k]`, the first `count[b]` or one of one, and describe the step."""
        groups, growing = parts[0][0].groups, [each for *_, each in parts]
        frame = Frame.empty(
            groups,
            len(token),
            max(token.shape[1], 1),
            pad_to,
            columns,
            held=max([each.held for each in growing]),
            needed=max([each.needed for each in growing]),
        )
        if commit:
            run(books.plan_commit(row, None) for books, row, *_ in parts)
        copies = [
            books.advance(row, token[at], None if count is None else count[at], each, frame, at)
            for books, row, at, each in parts
        ]
        return frame.batch(groups), merged_copies(copies)

    def _grown(self, handle: np.ndarray, count: Any, chunk: int | None = None) -> Grown:
        """`_split`, and on every shard the plan for `count[b]` more tokens."""
        return [
            (
                books,
                row,
                at,
                books.plan_growth(row, count if isinstance(count, int) else count[at], chunk),
            )
            for books, row, at in self._split(handle)
        ]

    def _each(
        self, handle: np.ndarray, plan: Callable[[Bookkeeping, np.ndarray, Any], Plan[T]]
    ) -> list[T]:
        """Plan on every shard that has one of the handles, then carry all of the plans out."""
        return run(plan(books, row, at) for books, row, at in self._split(handle))

    def _each_pool(
        self, ids: np.ndarray, plan: Callable[[Bookkeeping, np.ndarray], Plan[None]], group: int = 0
    ) -> None:
        """The same for pages of a whole pool, which `plan` is given with ids from 0."""
        num_pages, _ = self.pools[group]
        if ids.size and (ids.min() < 0 or ids.max() >= num_pages):
            bad = ids[(ids < 0) | (ids >= num_pages)][0]
            raise ValueError(f"pages must be page ids from 0 to {num_pages - 1}, got {bad}")
        shard, own = np.divmod(ids, num_pages // len(self._shards))
        run(plan(books, own[shard == i]) for i, books in enumerate(self._shards))
