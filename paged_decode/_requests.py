"""What the engine knows about its requests, and what it tells about them."""

from __future__ import annotations

from collections.abc import Callable, MutableSequence, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from .allocator import PromptKey
from .allocator.arguments import Ints, as_prompt
from .sampling import SamplingParams

__all__ = [
    "Completion",
    "Sample",
    "TokenEvent",
    "check_sampling",
    "common_pages",
    "gather",
    "prompt_ids",
]


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One token of one sample, or its end.

    Attributes:
      request_id: what `submit` returned.
      sample: 0 <= sample < n.
      index: place of the token among the generated ones, from 0.
      token: its id; None if the sample ended without another token.
      finish_reason: None while it goes on; "stop" (a stop token, which is `token`), "length"
        (max_new_tokens), "capacity" (the pool or the page table cannot hold more of it and
        nothing was left to preempt), "cancelled", "invalid_logits" (the model's logits for the next
        token had a NaN, or nothing but -inf: its weights or its pages are broken).
      top_logits: the largest logits of this step as (id, logit) pairs, if the engine keeps them.
    """

    request_id: int
    sample: int
    index: int
    token: int | None
    finish_reason: str | None = None
    top_logits: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Completion:
    """Everything one sample of a request generated; fields as in `TokenEvent`."""

    request_id: int
    sample: int
    tokens: tuple[int, ...]
    finish_reason: str
    top_logits: tuple[tuple[tuple[int, float], ...], ...] = ()


@dataclass(slots=True, eq=False)
class Sample:
    """One stream of tokens inside the engine: waiting (no handle), prefilling, or decoding.

    `tokens` holds prompt and generated tokens. The newest one is never in the cache: the next
    decode step writes it, so a fresh prompt, a fork and a resumed request all look alike.
    """

    request_id: int
    index: int
    prompt_len: int
    tokens: MutableSequence[int]
    params: SamplingParams
    cache_salt: str | bytes | None
    on_token: Callable[[TokenEvent], None] | None
    siblings: list[Sample] = field(default_factory=list)  # forked when the prompt is in the cache
    handle: Any = None  # a Handle while it has pages
    computed: int = 0
    preemptions: int = 0
    priority: int = 0
    _key: PromptKey | None = None

    @property
    def key(self) -> PromptKey:
        """Its tokens, to be looked up visit after visit: their digests are computed once."""
        if self._key is None or len(self._key) != len(self.tokens):
            self._key = PromptKey(np.array(self.tokens, np.int32), cache_salt=self.cache_salt)
        return self._key

    @property
    def generated(self) -> int:
        return len(self.tokens) - self.prompt_len

    @property
    def left(self) -> int:
        return self.params.max_new_tokens - self.generated

    @property
    def decoding(self) -> bool:
        return self.handle is not None and self.computed == len(self.tokens) - 1

    def ending(self, max_tokens: int) -> str | None:
        """Why the sample ends with its newest token, if it does."""
        if self.tokens[-1] in self.params.stop_tokens:
            return "stop"
        if self.left == 0:
            return "length"
        return "capacity" if len(self.tokens) >= max_tokens else None

    def event(self, token: int | None, reason: str | None, **fields: Any) -> TokenEvent:
        index = self.generated - (token is not None)
        return TokenEvent(self.request_id, self.index, index, token, reason, **fields)

    def spawn(self, request_id: int, index: int, params: SamplingParams) -> Sample:
        """A sample with the same tokens and no place in the pool."""
        return replace(
            self,
            request_id=request_id,
            index=index,
            params=params,
            tokens=list(self.tokens),
            siblings=[],
            handle=None,
            computed=0,
            preemptions=0,
        )


def prompt_ids(prompt: Ints, vocab_size: int | None = None) -> list[int]:
    """Check a prompt and make it a list of ints."""
    ids = as_prompt("prompt", prompt)
    if vocab_size is not None and ids.max() >= vocab_size:
        raise ValueError(f"prompt must be ids below vocab_size {vocab_size}, got {ids.max()}")
    return ids.tolist()


def check_sampling(params: SamplingParams) -> SamplingParams:
    """Refuse what is not `SamplingParams`, before it is queued."""
    if not isinstance(params, SamplingParams):
        raise TypeError(f"params must be SamplingParams, got {type(params).__name__}")
    return params


def common_pages(a: Sequence[int], b: Sequence[int], page_size: int) -> int:
    """How many full pages two token lists begin with alike, the last token of each left out."""
    width = (min(len(a), len(b)) - 1) // page_size * page_size
    for page, first in enumerate(range(0, width, page_size)):
        if a[first : first + page_size] != b[first : first + page_size]:
            return page
    return width // page_size


def gather(events: Sequence[TokenEvent]) -> list[Completion]:
    """Join events to completions, ordered by request and sample; all must have ended."""
    streams: dict[tuple[int, int], list[TokenEvent]] = {}
    for event in events:
        streams.setdefault((event.request_id, event.sample), []).append(event)
    return [
        Completion(
            request_id=key[0],
            sample=key[1],
            tokens=tuple(e.token for e in stream if e.token is not None),
            finish_reason=stream[-1].finish_reason or "unfinished",
            top_logits=tuple(e.top_logits for e in stream if e.top_logits),
        )
        for key, stream in sorted(streams.items())
    ]
