"""The prefix cache: which full pages can be found by the tokens that they hold."""

import hashlib
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count, repeat
from operator import attrgetter
from typing import Generic, NamedTuple, TypeVar

import numpy as np

from .eviction import CachedPage, EvictionQueue, EvictionRank
from .tails import TailQueue

__all__ = [
    "CacheEntry",
    "CachedPages",
    "Digest",
    "Namespace",
    "PrefixCache",
    "blake2b_digest",
    "new_generation",
    "salt_key",
    "salt_of",
]

Q = TypeVar("Q", EvictionQueue, TailQueue)
Digest = Callable[[bytes, bytes], bytes]


def blake2b_digest(key: bytes, payload: bytes) -> bytes:
    """The default digest: keyed BLAKE2b of 32 bytes, so nobody without the key finds collisions."""
    return hashlib.blake2b(payload, digest_size=32, key=key).digest()


_digest_of = attrgetter("digest")


def _no_digest(value: object) -> TypeError:
    return TypeError(f"digest must return bytes, got {type(value).__name__}")


def new_generation() -> bytes:
    """A name for weights that nobody else has."""
    return secrets.token_bytes(16)


def salt_key(salt: str | bytes | None) -> bytes:
    """The salt as bytes, tagged by its type."""
    if salt is None:
        return b"\0"
    if isinstance(salt, bytes):
        return b"b" + salt
    if not isinstance(salt, str):
        raise TypeError(f"cache_salt must be str, bytes or None, got {type(salt).__name__}")
    try:
        return b"s" + salt.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"cache_salt must be valid Unicode text: {error}") from None


def salt_of(key: bytes) -> str | bytes | None:
    """The salt of which `salt_key` made these bytes."""
    if key[:1] == b"s":
        return key[1:].decode()
    return key[1:] if key[:1] == b"b" else None


class Namespace(NamedTuple):
    """Where the pages of one salt begin: its tagged bytes, and the digest of the empty prefix."""

    key: bytes
    digest: bytes


class CacheEntry(NamedTuple):
    """One published page.

    `parent` is the link that makes a hit safe even if two digests collide: the serial number of
    the page before it, or the namespace key for the first page. Serials are never used twice, so
    equal tokens under an equal link mean equal tokens from the start of the sequence.
    """

    page: int
    digest: bytes
    parent: int | bytes
    serial: int


class CachedPages(Generic[Q]):
    """Published pages of one pool, and the unreferenced ones among them in the order of eviction.

    It knows nothing of reference counts: the pool tells its order of eviction when a page loses
    its last owner, and when it gets one again.
    """

    def __init__(self, num_pages: int, eviction: Q):
        self.eviction = eviction
        self.published = np.zeros(num_pages, bool)
        self.num_evicted = self.num_withdrawn = 0  # pages forgotten so far, by why
        self.queried_tokens = self.hit_tokens = 0

    @property
    def num_evictable(self) -> int:
        """Published pages without an owner."""
        return len(self.eviction)

    def count_query(self, num_tokens: int, hits: int) -> None:
        """For the statistics: so many tokens were asked for, and so many found."""
        self.queried_tokens += num_tokens
        self.hit_tokens += hits

    def forget(self, page: int) -> CachedPage | None:
        """The page can no longer be found, whoever holds it; returns its history."""
        past = self.eviction.known.get(page)
        self.forget_each([page])
        return past

    def forget_each(self, pages: list[int]) -> None:
        """The same for many."""
        self.num_withdrawn += len(pages)
        self._forget(pages)

    def evict(self, count: int) -> list[int]:
        """Give up the pages whose turn it is; there are so many."""
        pages = self.eviction.pop_each(count)
        self.num_evicted += count
        self._forget(pages)
        return pages

    def pass_by(self, pages: np.ndarray) -> None:
        """Published pages lost their last owner, who goes on without them."""
        raise NotImplementedError

    def repair(self, allowed: np.ndarray, idle: np.ndarray) -> None:
        """Keep the pages on which all books agree; both bool `[N]`: pages that may be published,
        and those without an owner."""
        raise NotImplementedError

    def _forget(self, pages: list[int]) -> None:
        raise NotImplementedError


class PrefixCache(CachedPages[EvictionQueue]):
    """Digest to page, of the first group of layers.

    Attributes:
      followers: called with every entry that is forgotten.
    """

    def __init__(
        self,
        num_pages: int,
        *,
        hash_key: bytes | None = None,
        fingerprint: bytes = b"",
        small: bytes = b"",
        eviction: EvictionRank | None = None,
        digest: Digest | None = None,
    ):
        if not isinstance(fingerprint, bytes):
            raise TypeError(f"fingerprint must be bytes, got {type(fingerprint).__name__}")
        if hash_key is not None and not isinstance(hash_key, bytes):
            raise TypeError(f"hash_key must be bytes or None, got {type(hash_key).__name__}")
        if hash_key is not None and len(hash_key) > hashlib.blake2b.MAX_KEY_SIZE:
            raise ValueError(f"hash_key must be at most 64 bytes, got {len(hash_key)}")
        super().__init__(num_pages, EvictionQueue(eviction))
        self.rank = eviction
        self.followers: list[Callable[[CacheEntry], None]] = []
        self.by_page: dict[int, CacheEntry] = {}
        self.index: dict[bytes, CacheEntry] = {}
        self._hash_key = secrets.token_bytes(32) if hash_key is None else hash_key
        self.fingerprint = fingerprint
        self._small = small  # which pages have 8 bits
        self.generation = b""  # of the weights; another one makes other digests
        self.weights = b""  # what a snapshot calls them
        self.num_updates = 0  # of the weights
        self._digest = blake2b_digest if digest is None else digest
        self.next_serial = 1

    # ---- digests: the only place where a user's function is called; it changes nothing

    @property
    def scheme(self) -> tuple[object, ...]:
        """What a digest depends on beside the tokens, the page size and the salt."""
        return self._digest, self._hash_key, self.fingerprint, self._small, self.generation

    def namespace(self, salt: str | bytes | None) -> Namespace:
        """The start of every chain under this salt; None, "", b"" and "x", b"x" all differ.

        What is digested begins with "n", "e" or "g" here and with "p" for pages, so that no salt
        can be chosen to look like a page.
        """
        key = salt_key(salt)
        return Namespace(key, self.root_digest(key))

    def root_digest(self, key: bytes, generation: bytes | None = None) -> bytes:
        """The digest of the empty prefix in the namespace with that key; None is ours."""
        generation = self.generation if generation is None else generation
        width = len(self.fingerprint).to_bytes(8, "little")
        root = b"n" + width + self.fingerprint + key
        if self._small:
            root = b"e" + len(self._small).to_bytes(8, "little") + self._small + root
        if generation:
            root = b"g" + len(generation).to_bytes(8, "little") + generation + root
        digest = self._digest(self._hash_key, root)
        if type(digest) is not bytes:
            raise _no_digest(digest)
        return digest

    def next_digests(self, parents: Sequence[bytes], page_tokens: np.ndarray) -> list[bytes]:
        """Of each row of `page_tokens` `[n, S]`, as a page behind one with the parent's digest."""
        return [*map(self._next, parents, self._pages(page_tokens))]

    def digests(
        self, parent: bytes, page_tokens: np.ndarray, known: list[bytes] | None = None
    ) -> Iterator[bytes]:
        """Chained digests of the rows of `page_tokens` `[n, S]`, which are added to `known`."""
        note = (list[bytes]() if known is None else known).append
        pages = self._pages(page_tokens)
        if self._digest is not blake2b_digest:
            for page in pages:
                parent = self._next(parent, page)
                note(parent)
                yield parent
            return
        # The same, for most of what a prompt costs is here: the key is mixed in once.
        begun = hashlib.blake2b(b"p", digest_size=32, key=self._hash_key)
        for page in pages:
            whole = begun.copy()
            whole.update(parent + page)
            parent = whole.digest()
            note(parent)
            yield parent

    def _next(self, parent: bytes, page: bytes) -> bytes:
        found = self._digest(self._hash_key, b"p" + parent + page)
        if type(found) is not bytes:
            raise _no_digest(found)
        return found

    @staticmethod
    def _pages(tokens: np.ndarray) -> Iterator[bytes]:
        size = 4 * tokens.shape[1]
        data = np.ascontiguousarray(tokens, "<i4").tobytes()
        return (data[begin : begin + size] for begin in range(0, len(data), size))

    def partial_digests(self, parent: bytes, tokens: np.ndarray, page_size: int) -> Iterator[bytes]:
        """The digest of every leading part of `tokens` `[T]`, as if its last page ended there."""
        for begin in range(0, len(tokens), page_size):
            page = tokens[begin : begin + page_size]
            ends = [next(self.digests(parent, page[None, :n])) for n in range(1, len(page) + 1)]
            yield from ends
            parent = ends[-1]

    # ---- what can be found

    def match(
        self,
        namespace: Namespace,
        digests: Iterable[bytes],
        page_tokens: np.ndarray,
        pool_tokens: np.ndarray,
    ) -> list[CacheEntry]:
        """Entries for the longest run of leading rows of `page_tokens` `[n, S]` that is cached.

        A hit needs the digest, the parent link and the tokens themselves (`pool_tokens` `[N, S]`).
        """
        found: list[CacheEntry] = []
        parent: int | bytes = namespace.key
        for digest in digests:
            entry = self.index.get(digest)
            if entry is None or entry.parent != parent:
                break
            found.append(entry)
            parent = entry.serial
        pages = np.array([entry.page for entry in found], np.int64)
        equal = (pool_tokens[pages] == page_tokens[: len(found)]).all(axis=1)
        return found if equal.all() else found[: int(equal.argmin())]

    def is_live(self, entry: CacheEntry) -> bool:
        """Whether the entry can still be found."""
        return self.by_page.get(entry.page) is entry

    def num_lost(self, borrows: int) -> int:
        """How many entries were forgotten that may have stood for a page of a row.

        An entry on one of its own pages can only be withdrawn; one that it borrows from another
        page can be evicted, too. As long as the number stands still, none of the row's is gone.
        """
        return self.num_withdrawn + (self.num_evicted if borrows else 0)

    # ---- changes, none of which can fail

    def add(
        self,
        page: int,
        digest: bytes,
        parent: int | bytes,
        depth: int = 0,
        past: CachedPage | None = None,
    ) -> CacheEntry:
        """Publish a page that has an owner; neither the page nor the digest is published yet.

        `depth` and `past`, the history of the page that it replaces, are for eviction.
        """
        entry = CacheEntry(page, digest, parent, self.next_serial)
        self.next_serial += 1
        self.index[digest] = self.by_page[page] = entry
        self.published[page] = True
        self.eviction.publish(page, depth, past, digest)
        return entry

    def add_each(
        self,
        pages: Sequence[int],
        digests: Sequence[bytes],
        parents: Sequence[int | bytes],
        depths: Sequence[int],
    ) -> list[CacheEntry]:
        """`add` of many at once; they get the serials from `next_serial` on."""
        fields = zip(pages, digests, parents, count(self.next_serial))
        entries = list(map(tuple.__new__, repeat(CacheEntry), fields))  # `_make`, but at once
        self.next_serial += len(entries)
        self.index.update(zip(digests, entries, strict=True))
        self.by_page.update(zip(pages, entries, strict=True))
        self.published[pages] = True
        self.eviction.publish_each(pages, depths, digests)
        return entries

    def repair(self, allowed: np.ndarray, idle: np.ndarray) -> None:
        kept = {
            page: entry
            for page, entry in self.by_page.items()
            if self.index.get(entry.digest) is entry
            and self.published[page]
            and allowed[page]
            and self.eviction.has(page, idle=bool(idle[page]))
        }
        published = np.zeros_like(self.published)
        published[list(kept)] = True
        self.eviction.repair(kept, {page for page in kept if idle[page]})
        self.by_page, self.published = kept, published
        self.index = {entry.digest: entry for entry in kept.values()}

    def clear(self) -> list[int]:
        """Forget every page; returns those without an owner, in the order of eviction."""
        if self.followers:  # who want to hear of each
            pages = self.evict(self.num_evictable)
            self.forget_each(list(self.by_page))
            return pages
        pages, every = self.eviction.pop_each(self.num_evictable), len(self.by_page)
        self.by_page, self.index = {}, {}
        self.published[:] = False
        self.eviction.known.clear()
        self.num_evicted += len(pages)
        self.num_withdrawn += every - len(pages)
        return pages

    def _forget(self, pages: list[int]) -> None:
        entries = [*map(self.by_page.pop, pages)]
        for digest in map(_digest_of, entries):
            del self.index[digest]
        self.published[pages] = False
        self.eviction.forget(pages)
        for forget in self.followers:
            for entry in entries:
                forget(entry)
