"""Masks that the host makes, token by token: grammars, schemas, lists of what may be said."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias, runtime_checkable

import numpy as np

__all__ = ["Constraint", "MakeMask", "TokenMask", "check_mask"]


@runtime_checkable
class TokenMask(Protocol):
    """Says which tokens may come next in one text, such as a grammar does."""

    def fill(self, bits: np.ndarray, /) -> object:
        """Allow tokens: set bit t % 32 of word t // 32 for every token t that may come next.

        Args:
          bits: int32 `[ceil(vocab_size / 32)]`, all 0 when it comes.
        """
        ...

    def accept(self, token: int, /) -> object:
        """The text goes on with this token; False, or what is raised, ends the request."""
        ...


MakeMask: TypeAlias = Callable[[], TokenMask]
"""Makes the mask of a text that has no generated token yet."""


class Constraint:
    """The mask of one sample, and how far that has read.

    Where it is not known what a mask has read, because a call of it was cut off or the text is
    another one, a new one is made, and reads from the start.

    Args:
      make: called for the first mask when it is needed.
      mask: the first one, if it is there.
    """

    def __init__(self, make: MakeMask, mask: TokenMask | None = None):
        self.make = make
        self._mask, self._read = mask, list[int]()

    @classmethod
    def missing(cls) -> Constraint:
        """That of a sample whose mask is yet to be told."""
        return cls(_missing)

    def again(self) -> Constraint:
        """That of another sample."""
        return Constraint(self.make)

    def bits(self, generated: Sequence[int], words: int) -> np.ndarray:
        """Which tokens may follow these, as int32 words."""
        mask, self._mask, tokens = self._mask, None, list(generated)
        if mask is None or self._read != tokens[: len(self._read)]:
            mask, self._read = self.make(), []
        for token in tokens[len(self._read) :]:
            taken = mask.accept(token)
            if taken is not None and not taken:
                raise ValueError(f"the mask does not accept token {token}, which it had allowed")
        bits = np.zeros(words, np.int32)
        mask.fill(bits)
        self._mask, self._read = mask, tokens
        return bits


def _missing() -> TokenMask:
    raise RuntimeError("nobody has told the mask of this request")


def check_mask(make: MakeMask, enabled: bool) -> Constraint:
    """The constraint of a request, with its first mask.

    Raises:
      TypeError: `make` makes no mask.
      ValueError: the engine serves none.
    """
    if not enabled:
        raise ValueError("mask needs EngineConfig(token_masks=True, vocab_size=...)")
    if not callable(make):
        raise TypeError(
            f"mask must be a function that makes a TokenMask, got {type(make).__name__}"
        )
    mask = make()
    if not isinstance(mask, TokenMask):
        raise TypeError(
            f"mask must make an object with fill(bits) and accept(token), got {type(mask).__name__}"
        )
    return Constraint(make, mask)
