"""The block allocator: sequences of tokens, mapped to pages of one pool."""

from typing import SupportsIndex

import numpy as np

from .arguments import Ints, as_count, as_ints, as_prompt, as_rows, as_step_tokens
from .batch import DecodeBatch, PageCopies
from .errors import PageTableError, SequenceTooLong
from .framing import check_span, empty_page_table, frame_rows, frame_span, slots_of
from .growth import apply_growth, plan_growth
from .locking import atomic
from .policy import EvictionPolicy
from .pool import PagePool, check_pool_size
from .prefix import Digest, PrefixCache, new_generation
from .publication import plan_publication, publish
from .sequences import Handle, as_handles
from .state import AllocatorState
from .state_rules import check_state
from .transfer import adopt_state
from .view import AllocatorView

__all__ = ["BlockAllocator"]

_MAX_FORKS = 2**16  # per call: far below what int32 reference counts and memory for rows can hold


class BlockAllocator(AllocatorView):
    """Maps sequences to the pages of a pool of N pages with S tokens each. Host only, no jax.

    Page 0 is the null page: counted in `num_pages`, never handed out. Every call is
    all-or-nothing: if it raises, nothing has changed. Wherever `handles` are taken, one handle or
    a sequence of B distinct handles will do. The same calls give the same page ids.

    Each call is atomic under a lock, but a decode step is several calls and a device program:
    let one thread drive an allocator.

    Args:
      num_pages: N, at least 2; `num_pages * page_size` is at most 2**31, so slots fit int32.
      page_size: S, a power of two.
      prefix_cache: keep committed full pages findable, by their tokens, until evicted.
      hash_key: up to 64 bytes that key the digests; None takes 32 random bytes, so digests then
        differ from one allocator to the next.
      fingerprint: what else the keys and values depend on (weights, rope, dtype), as bytes.
      eviction: which unreferenced cached page goes first; None is `LRU()`.
      digest: replaces keyed BLAKE2b, `(key, payload) -> bytes`; for tests of collisions.

    Example:
      >>> allocator = BlockAllocator(num_pages=9, page_size=4)
      >>> handle = allocator.allocate([5, 6, 7, 8, 9])
      >>> allocator.sequence(handle).pages
      (1, 2)
      >>> batch, copies = allocator.advance([handle], [10])
      >>> batch.slots.tolist(), batch.seq_lens.tolist()
      ([[9]], [6])
      >>> allocator.free(handle)
      >>> allocator.num_free
      8
    """

    def __init__(
        self,
        num_pages: SupportsIndex,
        page_size: SupportsIndex,
        *,
        prefix_cache: bool = True,
        hash_key: bytes | None = None,
        fingerprint: bytes = b"",
        eviction: EvictionPolicy | None = None,
        digest: Digest | None = None,
    ):
        num_pages, page_size = check_pool_size(num_pages, page_size)
        cache = PrefixCache(
            num_pages, hash_key=hash_key, fingerprint=fingerprint, policy=eviction, digest=digest
        )
        super().__init__(PagePool(num_pages, page_size, cache), prefix_cache=prefix_cache)

    # ---- the start of a sequence ----

    @atomic
    def allocate(
        self,
        tokens: Ints,
        *,
        cache_salt: str | bytes | None = None,
        keep_free: SupportsIndex = 0,
    ) -> Handle:
        """Start a sequence of T tokens: cached pages for its prefix, new pages for the rest.

        Afterwards its length is T, and `computed` and `cached` are the tokens that were found.

        Args:
          tokens: int `[T]`, T >= 1; ids from 0 to 2**31 - 1.
          cache_salt: only sequences with an equal salt share pages through the cache. None, "",
            b"", "x" and b"x" are five different salts.
          keep_free: pages that must be free or evictable afterwards (a watermark).

        Raises:
          SequenceTooLong: the whole pool holds fewer than T tokens.
          OutOfPages: not now. `needed` counts new pages, found ones that were evictable, and
            `keep_free`.
        """
        prompt = as_prompt("tokens", tokens)
        keep_free = as_count("keep_free", keep_free)
        namespace = self._cache.namespace(cache_salt)
        num_pages = self._pool.pages_for(len(prompt))
        if num_pages > self._pool.usable:
            raise SequenceTooLong(
                f"tokens has {len(prompt)} entries and needs {num_pages} pages of "
                f"{self.page_size}, but the whole pool has {self._pool.usable}; shorten it, or "
                "create a larger pool"
            )
        entries = self._match(namespace, prompt)
        hits = np.array([entry.page for entry in entries], np.int32)
        revived, num_new = int((self._pool.refs[hits] == 0).sum()), num_pages - len(hits)
        self._pool.require(num_new + revived + keep_free)
        self._table.ensure_rows(1)
        self._table.ensure_columns(num_pages)

        self._pool.share(hits)  # first: from here on they cannot be evicted for the new pages
        try:
            pages = np.concatenate([hits, self._pool.take(num_new)])
        except BaseException:  # an eviction policy that fails must not leak the hits
            self._pool.release(hits)
            raise
        row = self._table.open(namespace, cache_salt, pages)
        found = len(hits) * self.page_size
        self._table.chains[row] = entries
        self._table.length[row] = len(prompt)
        self._table.computed[row] = self._table.cached[row] = found
        self._pool.store(pages[len(hits) :], prompt[found:])
        self._cache.count_query(len(prompt), found)
        return self._table.handle(row)

    # ---- growth ----

    @atomic
    def append(self, handles: Ints, tokens: Ints, counts: Ints | None = None) -> PageCopies:
        """Add up to k tokens to each of B sequences; all rows or none.

        Args:
          handles: B distinct handles.
          tokens: int `[B, k]`; `[k]` for one handle.
          counts: int `[B]` or one for all, from 0 to k: row b takes its first counts[b] tokens.
            None takes all.

        Returns:
          The pages to copy on the device before anything is written to the new positions.

        Raises:
          OutOfPages: not now; also SequenceTooLong or StaleHandle. No sequence has changed.
        """
        handles = as_handles(handles)
        row = self._table.resolve(handles)
        token = as_step_tokens(tokens, handles.shape, "k")
        width = token.shape[-1]
        count = as_rows("counts", width if counts is None else counts, len(row))
        if count.size and count.max() > width:
            raise ValueError(f"counts must be at most k = {width}, got {count.max()}")
        growth = plan_growth(self._pool, self._table, row, count)

        copies = apply_growth(self._pool, self._table, growth)
        at, step = (np.arange(width) < count[:, None]).nonzero()
        slots = slots_of(self._table, self.page_size, row[at], growth.start[at] + step)
        self._pool.tokens.reshape(-1)[slots] = token.reshape(len(row), width)[at, step]
        self._table.length[row] = growth.stop
        return copies

    @atomic
    def advance(
        self,
        handles: Ints,
        tokens: Ints,
        *,
        rows: SupportsIndex | None = None,
        columns: SupportsIndex | None = None,
    ) -> tuple[DecodeBatch, PageCopies]:
        """Add one token to each of B sequences and describe the decode step that computes it.

        The hot call: the same as `append` and then `batch` of the new positions, without a loop
        over sequences.

        Args:
          handles: B distinct handles.
          tokens: int `[B]`, the newest token of each; its keys and values are not written yet.
          rows: pad the batch to so many rows.
          columns: width of the page table; see `batch`.

        Returns:
          A batch with T = 1, and the pages to copy on the device before the step.

        Raises:
          OutOfPages: not now; also SequenceTooLong or StaleHandle. No sequence has changed.
        """
        handles = as_handles(handles)
        row = self._table.resolve(handles)
        token = as_step_tokens(tokens, handles.shape)
        growth = plan_growth(self._pool, self._table, row, 1)
        num_pages = self._pool.pages_for(growth.longest)
        page_table = empty_page_table(rows, columns, growth.held, num_pages)

        copies = apply_growth(self._pool, self._table, growth)
        pages = self._table.page_table[row, growth.column]
        slots = pages * self.page_size + growth.start % self.page_size
        self._pool.tokens.reshape(-1)[slots] = token.reshape(-1)
        self._table.length[row] = growth.stop
        positions = growth.start[:, None]
        batch = frame_rows(page_table, self._table, row, growth.stop, positions, slots[:, None])
        return batch, copies

    @atomic
    def reserve(self, handles: Ints, num_tokens: Ints) -> PageCopies:
        """Take the pages for that many tokens past the length of each sequence.

        Lengths do not change. Until the next fork, an `append` of so many tokens takes no page and
        copies none, and `batch` may describe positions up to there: that is what k decode steps on
        the device without a visit to the host need.

        Args:
          handles: B distinct handles.
          num_tokens: int `[B]`, or one for all; 0 or more. Pages reserved before count.

        Returns:
          The pages to copy on the device before anything is written past the lengths.

        Raises:
          OutOfPages: not now; also SequenceTooLong or StaleHandle. No sequence has changed.
        """
        row = self._table.resolve(handles)
        count = as_rows("num_tokens", num_tokens, len(row))
        return apply_growth(
            self._pool, self._table, plan_growth(self._pool, self._table, row, count)
        )

    @atomic
    def trim(self, handles: Ints) -> int:
        """Give back the reserved pages behind the last token; returns how many."""
        dropped = 0
        for row in self._table.resolve(handles).tolist():
            dropped += self._keep_tokens(row, int(self._table.length[row]))
        return dropped

    # ---- a step on the device ----

    @atomic
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
        """Describe a step that computes positions begin[b] to end[b] - 1; changes nothing.

        Args:
          handles: B distinct handles.
          begin: int `[B]`, or one for all, at least what is computed.
          end: int `[B]`, or one for all; `begin <= end <= capacity` and
            `end - begin <= tokens_per_row`. Past the length, reserve first.
          tokens_per_row: T; a row with fewer positions has its padding in front.
          rows: pad to so many rows, of length 0; None is B.
          columns: width of the page table, enough for every `end`; None is the most pages that a
            row holds, reserved ones included, rounded up to a power of two.

        Raises:
          PageTableError: a position past the length lies on a page that others share or that is
            published: `reserve` first. Or two rows would write the same slot, as forks that are
            not computed yet do: compute one of them, then commit all.
        """
        row = self._table.resolve(handles)
        begin, end = as_rows("begin", begin, len(row)), as_rows("end", end, len(row))
        num_tokens = as_count("tokens_per_row", tokens_per_row, 1)
        check_span(self._pool, self._table, row, begin, end, num_tokens)
        longest = self._pool.pages_for(int(end.max(initial=0)))
        held = self._table.num_pages[row]
        page_table = empty_page_table(rows, columns, held, longest, num_tokens)
        return frame_span(page_table, self._table, self.page_size, row, begin, end, num_tokens)

    @atomic
    def commit(self, handles: Ints, computed: Ints) -> None:
        """State that the keys and values of the first computed[b] tokens are written.

        Full pages among them enter the prefix cache, unless the sequence is private. A number that
        is not larger than what was committed before changes nothing.

        Args:
          handles: B distinct handles.
          computed: int `[B]`, or one for all; from 0 to the length.
        """
        table, row = self._table, self._table.resolve(handles)
        computed = as_rows("computed", computed, len(row))
        excess = computed - table.length[row]
        if (excess > 0).any():
            at = int(excess.argmax())
            raise ValueError(
                f"computed must be at most the length, got {computed[at]} for a sequence of "
                f"{table.length[row[at]]} tokens; append first"
            )
        computed = np.maximum(computed, table.computed[row])
        full, before = computed // self.page_size, table.computed[row] // self.page_size
        fuller = (full > before).nonzero()[0] if self.prefix_cache else ()
        plans = [
            plan_publication(self._pool, table, int(row[at]), int(full[at]))
            for at in fuller
            if not table.namespaces[row[at]].private
        ]
        table.computed[row] = computed
        for plan in plans:
            publish(self._pool, table, plan)

    # ---- sharing, and the end of a sequence ----

    @atomic
    def fork(self, handle: SupportsIndex, n: SupportsIndex = 1) -> list[Handle]:
        """Make n more sequences with the same tokens; takes no page and copies nothing.

        Every page that holds tokens is shared, a partial last page too; whoever writes to that one
        first gets a copy of it then (copy-on-write), and the last owner keeps it. Reserved pages
        stay with the parent. Salt, `computed`, `cached` and `private` are inherited.
        """
        table, parent = self._table, self._table.resolve_one(handle)
        n = as_count("n", n)
        if n > _MAX_FORKS:
            raise ValueError(f"n must be at most {_MAX_FORKS}, got {n}")
        table.ensure_rows(n)
        pages = table.pages(parent)[: self._pool.pages_for(int(table.length[parent]))].copy()
        self._pool.share(pages, n)
        return [table.handle(table.copy(parent, pages)) for _ in range(n)]

    @atomic
    def truncate(self, handle: SupportsIndex, length: SupportsIndex) -> None:
        """Forget the tokens from `length` on, and the pages that only they needed.

        Reserved pages are given back too. `computed` falls to the length where it was more. A last
        page that becomes partial leaves the prefix cache, unless another sequence has it too.

        Args:
          handle: one sequence.
          length: from 0 to its length.
        """
        table, row = self._table, self._table.resolve_one(handle)
        length = as_count("length", length)
        if length > table.length[row]:
            raise ValueError(
                f"length must be at most the sequence's length {table.length[row]}, got {length}"
            )
        self._keep_tokens(row, length)
        table.length[row] = length
        table.computed[row] = min(length, int(table.computed[row]))
        del table.chains[row][length // self.page_size :]
        tail = int(table.page_table[row, length // self.page_size])  # the null page if none
        if self._pool.refs[tail] == 1 and self._cache.published[tail]:
            self._pool.unpublish(tail)
        self._pool.stamp(np.array([tail]))  # its last slots may be written again

    @atomic
    def free(self, handles: Ints) -> None:
        """End sequences; their handles are stale afterwards.

        Pages without another owner become free, or evictable where they are in the prefix cache.

        Raises:
          StaleHandle: one of them is not live; nothing is freed.
          ValueError: one of them is named twice; nothing is freed.
        """
        for row in self._table.resolve(handles).tolist():
            self._pool.release(self._table.close(row))

    @atomic
    def withdraw(self, handles: Ints) -> None:
        """Take the pages of sequences out of the prefix cache: what they hold may be wrong.

        Their owners keep them. One that lives on publishes its own again when it fills one more,
        so free the broken ones next.
        """
        for row in self._table.resolve(handles).tolist():
            pages = self._table.pages(row)
            for page in pages[self._cache.published[pages]].tolist():
                self._pool.unpublish(page)

    def reset_prefix_cache(self, *, same_weights: bool = False) -> bool:
        """Empty the prefix cache; False, and no change, while any page has an owner.

        A host tier finds nothing of before either, unless the weights are said to be the same.
        """
        return self._reset(None if same_weights else new_generation())

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
        self._replace_weights(generation, new_generation())

    # ---- pages outside sequences ----

    @atomic
    def allocate_pages(self, k: SupportsIndex) -> list[int]:
        """Take k pages by number, pinned until `free_pages`; raises OutOfPages."""
        return self._pool.pin(as_count("k", k))

    @atomic
    def free_pages(self, pages: Ints) -> None:
        """Give back pages of `allocate_pages`; the null page among them is padding, and skipped.

        Raises:
          ValueError: an id outside the pool, or named twice; nothing is freed.
          PageTableError: a page that `allocate_pages` did not hand out, or that was freed
            already; nothing is freed.
        """
        ids = as_ints("pages", pages)
        if ids.ndim != 1:
            raise ValueError(f"pages must have shape [k], got shape {list(ids.shape)}")
        self._pool.unpin(ids)

    @atomic
    def import_state(
        self, state: AllocatorState, pages: Ints, *, private: bool = False
    ) -> list[Handle]:
        """Make the sequences and cached pages of `export_state` live here; returns handles.

        Args:
          state: from this or another allocator, or from a file: all of it is checked.
          pages: int `[M]`, from `allocate_pages`, filled with the keys and values of the state's
            pages. They belong to the sequences and the prefix cache afterwards.
          private: the sequences never publish what they hold, now or later; the state has no
            cached pages then.

        Raises:
          PageTableError: the state or the pages break a rule; the message says which.
        """
        ids = as_ints("pages", pages)
        if ids.shape != (state.num_pages,) or len(np.unique(ids)) != len(ids):
            raise ValueError(f"pages must be {state.num_pages} different page ids, got {ids}")
        if ids.size and (ids.min() < 1 or ids.max() > self._pool.usable):
            raise ValueError(f"pages must be from 1 to {self._pool.usable}, got {ids}")
        if not self._pool.pinned[ids].all():
            raise PageTableError("pages must be from allocate_pages, and not freed since")
        if state.page_size != self.page_size:
            raise PageTableError(f"page size {state.page_size} is not this pool's {self.page_size}")
        check_state(state)
        if private and len(state.entry_pages):
            raise ValueError("a state with cached pages cannot be private; drop its entries first")
        rows = adopt_state(
            self._pool, self._table, state, ids, caching=self.prefix_cache, private=private
        )
        return [self._table.handle(row) for row in rows]

    # ---- steps that several calls share ----

    @atomic
    def _reset(self, generation: bytes | None) -> bool:
        """`reset_prefix_cache`, with the generation that follows; None keeps the one there is."""
        if self._pool.num_used:
            return False
        if generation is not None:
            self._renew(generation)
        self._pool.clear_cache()
        return True

    @atomic
    def _replace_weights(self, name: bytes | None, drawn: bytes) -> None:
        """`new_weights`, with the generation of weights without a name."""
        if name is not None and not isinstance(name, bytes):
            raise TypeError(f"generation must be bytes or None, got {type(name).__name__}")
        if name == b"":
            raise ValueError("generation must not be empty: that is the name of the first weights")
        cache = self._cache
        cache.num_updates += 1
        cache.weights = b"%d" % cache.num_updates if name is None else name
        # First, so that whatever a user's eviction policy raises below, nothing is found again.
        self._renew(drawn if name is None else name)
        self._pool.clear_cache()

    def _renew(self, generation: bytes) -> None:
        """Another root for every digest. Who holds pages is private, who holds none begins anew."""
        cache, table = self._cache, self._table
        cache.generation = generation
        for row in table.rows.tolist():
            if table.num_pages[row] or table.namespaces[row].private:
                table.make_private(row)
            else:
                table.namespaces[row] = cache.namespace(table.salts[row])

    def _keep_tokens(self, row: int, length: int) -> int:
        """Release the pages behind so many tokens; returns how many."""
        dropped = self._table.shrink(row, self._pool.pages_for(length))
        self._pool.release(dropped)
        return len(dropped)
