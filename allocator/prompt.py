"""A prompt and its digests, computed once for all who ask."""

from collections.abc import Iterator

import numpy as np

from .arguments import Ints, as_prompt
from .prefix import Namespace, PrefixCache, salt_key

__all__ = ["PromptKey", "as_key"]


class PromptKey:
    """A prompt to be looked up more than once: its digests are computed once, page by page.

    `match_prefix`, `allocate` and `page_digests` take it in the place of tokens. It serves any
    number of allocators, one after the other; with equal keys (as the shards of one
    `ShardedAllocator` have them) they share the digests. New weights are noticed.

    Args:
      tokens: int `[T]`, T >= 1; ids from 0 to 2**31 - 1.
      cache_salt: as in `BlockAllocator.allocate`.

    Example:
      >>> from paged_decode import BlockAllocator
      >>> allocator, key = BlockAllocator(9, 4), PromptKey([5, 6, 7, 8, 9])
      >>> allocator.match_prefix(key)
      0
      >>> allocator.sequence(allocator.allocate(key)).length
      5
    """

    __slots__ = ("_known", "cache_salt", "tokens")

    def __init__(self, tokens: Ints, *, cache_salt: str | bytes | None = None):
        salt_key(cache_salt)  # refuses a bad one
        self.tokens: np.ndarray = as_prompt("tokens", tokens)
        self.tokens.flags.writeable = False
        self.cache_salt = cache_salt
        self._known: tuple[object, Namespace, list[bytes]] | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def __repr__(self) -> str:
        return f"PromptKey({len(self)} tokens, cache_salt={self.cache_salt!r})"

    def pages(self, num_tokens: int, page_size: int) -> np.ndarray:
        """int32 `[n, S]`: the full pages among so many leading tokens."""
        full = num_tokens // page_size
        return self.tokens[: full * page_size].reshape(full, page_size)

    def namespace(self, cache: PrefixCache, page_size: int) -> Namespace:
        """Where the chain of its digests begins."""
        return self._for(cache, page_size)[1]

    def known(self, cache: PrefixCache, page_size: int) -> list[bytes]:
        """A copy of those digests of leading full pages that were asked for so far."""
        return list(self._for(cache, page_size)[2])

    def digests(self, cache: PrefixCache, page_size: int) -> Iterator[bytes]:
        """The digest of every full page, one after the other; what was computed stays known."""
        scheme, root, known = self._for(cache, page_size)
        yield from known
        known = list(known)  # another thread may be reading the old one
        pages = self.pages(len(self), page_size)[len(known) :]
        try:
            for digest in cache.digests(known[-1] if known else root.digest, pages):
                known.append(digest)
                yield digest
        finally:
            self._known = scheme, root, known

    def _for(self, cache: PrefixCache, page_size: int) -> tuple[object, Namespace, list[bytes]]:
        scheme = page_size, *cache.scheme
        if self._known is None or self._known[0] != scheme:
            self._known = scheme, cache.namespace(self.cache_salt), []
        return self._known


def as_key(tokens: Ints | PromptKey, cache_salt: str | bytes | None) -> PromptKey:
    """What a caller passed as tokens and salt."""
    if not isinstance(tokens, PromptKey):
        return PromptKey(tokens, cache_salt=cache_salt)
    if cache_salt is not None:
        raise ValueError("cache_salt is part of a PromptKey; give it to that")
    return tokens
