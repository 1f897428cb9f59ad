"""What can be read from an allocator without changing it, of one shard or several."""

import copy
from itertools import islice
from typing import Any, NoReturn, SupportsIndex, TypeVar

import numpy as np

from .arguments import Ints, as_count
from .bookkeeping import Bookkeeping
from .eviction import EvictionRank
from .invariants import require_consistent
from .locking import Guard, atomic, changing
from .prefix import salt_of
from .prompt import PromptKey, as_key
from .publication import digests_of
from .rows import ROW_MASK, Handle, HeldPages, SequenceInfo, as_handle
from .stats import AllocatorStats, collect_stats, page_states
from .windows import most_pages, window_of

__all__ = ["AllocatorView"]

A = TypeVar("A", bound="AllocatorView")


class AllocatorView:
    """The reading half of an allocator. A plain one has one shard, and its pages begin at 0."""

    def __init__(self, shards: tuple[Bookkeeping, ...], guard: Guard | None = None):
        self._shards = shards
        self._only = shards[0] if len(shards) == 1 else None
        self._guard = guard or Guard(shards)

    @property
    def num_pages(self) -> int:
        """N, null pages included."""
        return sum(len(books.main.pool.refs) for books in self._shards)

    @property
    def page_size(self) -> int:
        """S, in tokens."""
        return self._shards[0].main.pool.page_size

    @property
    def prefix_cache(self) -> bool:
        """Whether committed pages can be found again."""
        return self._shards[0].caching

    @property
    def eviction(self) -> EvictionRank | None:
        """The rank that was given."""
        return self._shards[0].cache.rank

    @property
    def fingerprint(self) -> bytes:
        """What else the keys and values depend on, as it was given."""
        return self._shards[0].cache.fingerprint

    @property
    def generation(self) -> bytes:
        """Of the weights, in the root of every digest; empty until they are replaced."""
        return self._shards[0].cache.generation

    @property
    def weights(self) -> bytes:
        """What a snapshot calls the weights: the name that `new_weights` was given, or how often it
        was called; empty before."""
        return self._shards[0].cache.weights

    @property
    def usable_pages(self) -> int:
        """N without null pages; always `num_free + num_evictable + num_used`."""
        return sum(books.main.pool.usable for books in self._shards)

    @property
    def sequence_pages(self) -> int:
        """The most pages that one sequence can have: those of one shard."""
        return self._shards[0].main.pool.usable

    @property
    def pools(self) -> tuple[tuple[int, int | None], ...]:
        """Pages and window of every group of layers."""
        return tuple((group.num_pages, group.window) for group in self._shards[0].groups)

    @property
    def num_shards(self) -> int:
        """R, into how many parts the pages are split."""
        return len(self._shards)

    @property
    def num_free(self) -> int:
        """Pages that hold nothing."""
        return sum(books.main.pool.num_free for books in self._shards)

    @property
    def num_evictable(self) -> int:
        """Cached pages without an owner: taken when the free ones are used up."""
        return sum(books.cache.num_evictable for books in self._shards)

    @property
    def num_available(self) -> tuple[int, ...]:
        """Pages that are free or evictable, of every group."""
        pools = ([group.pool for group in books.groups] for books in self._shards)
        return tuple(sum(p.num_available for p in each) for each in zip(*pools, strict=True))

    @property
    def num_used(self) -> int:
        """Pages with at least one owner."""
        return sum(books.main.pool.num_used for books in self._shards)

    def can_ever_fit(self, num_tokens: SupportsIndex) -> bool:
        """Whether one sequence of that many tokens would fit if nothing else were there."""
        pages, size = -(-as_count("num_tokens", num_tokens) // self.page_size), self.page_size
        return pages <= self.sequence_pages and all(
            min(pages, most_pages(window_of(group), 1, size)) <= group.pool.usable
            for group in self._shards[0].windows
        )

    @atomic
    def sequence(self, handle: SupportsIndex) -> SequenceInfo:
        """What is known about one sequence."""
        books, row = self._home(handle)
        rows, group = books.rows, books.main
        held = [
            HeldPages(int(g.table.first[row]), tuple(g.whole(g.table.pages(row)).tolist()))
            for g in books.groups
        ]
        return SequenceInfo(
            length=int(rows.length[row]),
            computed=int(rows.computed[row]),
            cached=int(rows.cached[row]),
            capacity=int(group.table.end[row]) * self.page_size,
            pages=held[0].pages,
            cache_salt=salt_of(rows.namespaces[row].key),
            private=bool(rows.private[row]),
            groups=tuple(held),
        )

    @atomic
    def tokens(self, handle: SupportsIndex) -> np.ndarray:
        """The tokens of one sequence, int32 `[length]`, a copy."""
        books, row = self._home(handle)
        pages = books.main.table.pages(row)
        return books.main.pool.tokens[pages].reshape(-1)[: books.rows.length[row]]

    @changing
    def match_prefix(
        self, tokens: Ints | PromptKey, *, cache_salt: str | bytes | None = None
    ) -> int:
        """How many leading tokens `allocate` would find in the prefix cache; changes nothing.

        A multiple of S and at most `len(tokens) - 1`: the last token is always left to compute,
        because its logits are wanted.
        """
        key = as_key(tokens, cache_salt)
        return max(books.match(key).served for books in self._shards) * self.page_size

    @changing
    def page_digests(
        self,
        tokens: Ints | PromptKey,
        *,
        cache_salt: str | bytes | None = None,
        partial: bool = False,
        num_tokens: SupportsIndex | None = None,
    ) -> list[bytes]:
        """The digests of the full pages of `tokens`: the keys by which they would be cached.

        With the same `hash_key`, `fingerprint` and `generation` they are the same in every process.

        Args:
          partial: add one of a last page that is not full, which the prefix cache never has.
          num_tokens: of so many leading tokens alone; None is all.
        """
        key, cache, size = as_key(tokens, cache_salt), self._shards[0].cache, self.page_size
        count = len(key) if num_tokens is None else as_count("num_tokens", num_tokens, 0, len(key))
        chain = key.chain(cache, size)
        if len(found := chain.digests[: count // size]) < count // size:
            found = list(islice(key.digests(cache, size, chain), count // size))
        root = chain.root.digest
        return found + self._partial(found, root, key.tokens[:count]) if partial else found

    @changing
    def sequence_digests(
        self, handle: SupportsIndex, num_tokens: SupportsIndex, *, partial: bool = False
    ) -> list[bytes]:
        """`page_digests` of that many leading tokens of a sequence; those known are not computed.

        Of a private sequence these are keys under which nobody must find its pages.
        """
        books, row = self._home(handle)
        count = as_count("num_tokens", num_tokens, 0, int(books.rows.length[row]))
        full = count // self.page_size
        found = digests_of(books.main, books.rows, row, full)[:full]
        if not partial:
            return found
        root = books.rows.namespaces[row].digest
        return found + self._partial(found, root, self.tokens(handle)[:count])

    @changing
    def prefix_digests(self, tokens: Ints, *, cache_salt: str | bytes | None = None) -> list[bytes]:
        """The digest of every leading part of `tokens` `[T]`: of all that `page_digests` can give
        for one of them, with `partial`."""
        key, cache, size = as_key(tokens, cache_salt), self._shards[0].cache, self.page_size
        root = key.chain(cache, size).root.digest
        return list(cache.partial_digests(root, key.tokens, size))

    @property
    @atomic
    def handles(self) -> tuple[Handle, ...]:
        """The live sequences, in the order in which `export_state` lists them."""
        live = (books.rows.handle[books.rows.live] for books in self._shards)
        return tuple(handle for each in live for handle in each.tolist())

    def ref_count(self, page: SupportsIndex, *, group: SupportsIndex = 0) -> int:
        """How many owners a page has: sequences, or 1 if it is raw. A null page has 0."""
        parts = [books.groups[self._number(group)] for books in self._shards]
        base, size = parts[0].base, sum(len(part.pool.refs) for part in parts)
        if not 0 <= (at := as_count("page", page) - base) < size:
            raise ValueError(
                f"page must be at least {base} and at most {base + size - 1}, got {page}"
            )
        shard, own = divmod(at, size // len(parts))
        return int(parts[shard].pool.refs[own]) if own else 0

    @atomic
    def page_states(self, group: SupportsIndex = 0) -> np.ndarray:
        """What every page of a group is doing: uint8 `[N]` of `PageState`."""
        number = self._number(group)
        return np.concatenate([page_states(books.groups[number].pool) for books in self._shards])

    @atomic
    def stats(self, group: SupportsIndex = 0) -> AllocatorStats:
        """All counts of one group of layers at this moment; see `AllocatorStats`."""
        number = self._number(group)
        return AllocatorStats.total(
            [collect_stats(books.groups[number], books.rows) for books in self._shards],
            self.page_size,
        )

    @atomic
    def check_invariants(self) -> None:
        """Verify all bookkeeping from scratch; raises CorruptState with every broken rule."""
        for books in self._shards:
            require_consistent(books.main, books.others, books.rows, caching=books.caching)

    @atomic
    def __deepcopy__(self: A, memo: dict[int, Any]) -> A:
        """Another allocator in the same state: the same handles, pages and digests are good there,
        and the same calls give the same page ids. A rank or digest of yours is copied along."""
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        vars(twin).update({name: copy.deepcopy(each, memo) for name, each in vars(self).items()})
        return twin

    def __copy__(self: A) -> A:
        """As `copy.deepcopy`: two allocators over one set of books would corrupt it."""
        return copy.deepcopy(self)

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"a {type(self).__name__} cannot be pickled, as nothing here is ever unpickled: use "
            "export_state and import_state, or save_snapshot; copy.deepcopy copies it here"
        )

    def __repr__(self) -> str:
        shards = "" if self._only is not None else f"{len(self._shards)} shards, "
        return (
            f"{type(self).__name__}({shards}{self.usable_pages} usable pages of "
            f"{self.page_size} tokens: {self.num_used} used, {self.num_evictable} evictable, "
            f"{self.num_free} free)"
        )

    def _number(self, group: SupportsIndex) -> int:
        return as_count("group", group, 0, len(self._shards[0].groups) - 1)

    def _split(self, handle: np.ndarray) -> list[tuple[Bookkeeping, np.ndarray, Any]]:
        """For every shard that has some of the handles: its rows, and their places among them."""
        handle = handle.reshape(-1)
        if self._only is not None:
            return [(self._only, self._only.rows.resolve(handle), slice(0, len(handle)))]
        shard, parts = (handle & ROW_MASK) % len(self._shards), []
        for i in np.unique(shard).tolist() or [0]:
            at = np.flatnonzero(shard == i)
            parts.append((self._shards[i], self._shards[i].rows.resolve(handle[at]), at))
        return parts

    def _home(self, handle: SupportsIndex) -> tuple[Bookkeeping, int]:
        """The shard and row of one sequence."""
        ((books, row, _),) = self._split(as_handle(handle))
        return books, int(row[0])

    def _partial(self, found: list[bytes], root: bytes, tokens: np.ndarray) -> list[bytes]:
        """The digest of a last page that is not full, behind those found; none if there is none."""
        rest = tokens[len(found) * self.page_size :]
        parent = found[-1] if found else root
        return list(self._shards[0].cache.digests(parent, rest[None])) if rest.size else []
