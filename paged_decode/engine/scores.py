"""Log-probabilities of a prompt's tokens: what is known of them, chunk by chunk."""

from __future__ import annotations

import secrets
from typing import Any, NamedTuple

import numpy as np

from ..allocator.prefix import salt_key

__all__ = ["PromptLogprobs", "Scored", "Scores"]


class PromptLogprobs(NamedTuple):
    """How likely the tokens of a prompt were, by the model's own distribution.

    Attributes:
      logprobs: of every token but the first, each given those before it.
      top_logprobs: for each of those places the likeliest tokens as (id, log-probability) pairs, as
        many as were asked for; the prompt's own need not be among them.
    """

    logprobs: tuple[float, ...]
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...]


class Scored(NamedTuple):
    """What one program has found of n tokens: float32 `[n]`, int32 and float32 `[n, top]`."""

    logprobs: np.ndarray
    ids: np.ndarray
    likely: np.ndarray


class Scores:
    """What is known of one prompt, whose samples share it.

    A token that is found in the prefix cache has no logits. So the prompt has a salt of its own,
    under which nobody has computed anything, and all of it is computed here; with another one, such
    as after new weights, it is computed again.

    Args:
      length: tokens of the prompt.
    """

    def __init__(self, length: int):
        self._length, self._nonce = length, secrets.token_bytes(16)
        self._logprobs = np.full(length - 1, np.nan, np.float32)
        self._known = np.zeros(length - 1, bool)
        self._top: tuple[np.ndarray, np.ndarray] | None = None

    @property
    def complete(self) -> bool:
        """Whether every token has its number."""
        return bool(self._known.all())

    def salted(self, salt: str | bytes | None) -> bytes:
        """The salt of its pages, for a request with this one."""
        return self._nonce + salt_key(salt)

    def put(self, begin: int, found: Scored) -> None:
        """Those of the tokens behind position `begin` and the next."""
        places = slice(begin, begin + len(found.logprobs))
        if self._top is None:
            width = found.ids.shape[1]
            self._top = (
                np.zeros((self._length - 1, width), np.int32),
                np.zeros((self._length - 1, width), np.float32),
            )
        self._logprobs[places] = found.logprobs
        self._top[0][places], self._top[1][places] = found.ids, found.likely
        self._known[places] = True

    def reported(self, count: int) -> PromptLogprobs:
        """All of them, with so many alternatives."""
        tops: list[Any] = []
        if count and self._top is not None:
            ids, likely = (each[:, :count].tolist() for each in self._top)
            tops = [tuple(zip(i, x, strict=True)) for i, x in zip(ids, likely, strict=True)]
        return PromptLogprobs(tuple(self._logprobs.tolist()), tuple(tops))
