"""A prompt and its digests, computed once for all who ask."""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from .arguments import Ints, as_prompt
from .prefix import Namespace, PrefixCache, salt_key

__all__ = ["PromptKey", "as_key"]


class Chain(NamedTuple):
    """Digests of leading full pages, under one scheme (page size, keys, weights)."""

    scheme: tuple[object, ...]
    root: Namespace
    digests: list[bytes]


class PromptKey:
    """A prompt to be looked up more than once: its digests are computed once, page by page.

    `match_prefix`, `allocate` and `page_digests` take it in the place of tokens. It serves any
    number of allocators, one after the other; with equal keys (as the shards of one
    `ShardedAllocator` have them) they share the digests. New weights are noticed.

    Args:
      tokens: int `[T]`, T >= 1; ids from 0 to 2**31 - 1.
      cache_salt: as in `BlockAllocator.allocate`.

    Examples:
      >>> from paged_decode import BlockAllocator
      >>> allocator, key = BlockAllocator(9, 4), PromptKey([5, 6, 7, 8, 9])
      >>> allocator.match_prefix(key)
      0
      >>> allocator.sequence(allocator.allocate(key)).length
      5
    """

    __slots__ = ("_chain", "cache_salt", "tokens")

    def __init__(self, tokens: Ints, *, cache_salt: str | bytes | None = None):
        salt_key(cache_salt)  # refuses a bad one
        self.tokens: np.ndarray = as_prompt("tokens", tokens)
        self.tokens.flags.writeable = False
        self.cache_salt = cache_salt
        self._chain = Chain((), Namespace(b"", b""), [])

    def __len__(self) -> int:
        return len(self.tokens)

    def __repr__(self) -> str:
        return f"PromptKey({len(self)} tokens, cache_salt={self.cache_salt!r})"

    def pages(self, num_tokens: int, page_size: int) -> np.ndarray:
        """int32 `[n, S]`: the full pages among so many leading tokens."""
        full = num_tokens // page_size
        return self.tokens[: full * page_size].reshape(full, page_size)

    def chain(self, cache: PrefixCache, page_size: int) -> Chain:
        """What is known of its digests there; whoever computes others makes a new one."""
        chain, scheme = self._chain, (page_size, *cache.scheme)
        if chain.scheme != scheme:
            self._chain = chain = Chain(scheme, cache.namespace(self.cache_salt), [])
        return chain

    def digests(self, cache: PrefixCache, page_size: int, chain: Chain) -> Iterator[bytes]:
        """The digest of every full page, one after the other; what was computed stays known."""
        before = tuple(chain.digests)  # which another thread may be adding to
        known = list(before)
        self._chain = Chain(chain.scheme, chain.root, known)
        parent = known[-1] if known else chain.root.digest
        pages = self.pages(len(self), page_size)[len(known) :]
        return itertools.chain(before, cache.digests(parent, pages, known))


def as_key(tokens: Ints | PromptKey, cache_salt: str | bytes | None) -> PromptKey:
    """What a caller passed as tokens and salt."""
    if not isinstance(tokens, PromptKey):
        return PromptKey(tokens, cache_salt=cache_salt)
    if cache_salt is not None:
        raise ValueError("cache_salt is part of a PromptKey; give it to that")
    return tokens
