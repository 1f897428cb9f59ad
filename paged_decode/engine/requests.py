"""What an engine knows about its requests, and what it tells about them."""

from __future__ import annotations

import math
import secrets
from collections.abc import MutableSequence, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, SupportsFloat, SupportsIndex, TypedDict

import numpy as np

from ..allocator import PromptKey
from ..allocator.arguments import Ints, as_count, as_prompt
from ..allocator.prefix import salt_key
from ..errors import SequenceTooLong
from .config import EngineConfig
from .figures import Times
from .masks import Constraint, MakeMask, check_mask
from .params import SamplingParams, _as_float
from .scores import Scores

__all__ = [
    "RequestOptions",
    "Sample",
    "check_sampling",
    "new_request",
    "prompt_ids",
    "unserved",
]

MAX_SAMPLES = 2**16  # of one request: each keeps a copy of the prompt on the host
MOST_PRIORITY = 2**31 - 1
MOST_PLACES = 2**52  # half of what a snapshot holds: no engine counts through the other half
_UNLIMITED = 2**62


class RequestOptions(TypedDict, total=False):
    """What `submit` takes for a request beside its prompt and its sampling.

    Attributes:
      n: how many samples, at most 2**16. Sample i uses seed + i; they share the prompt's pages.
      cache_salt: requests of different salts never share pages.
      mask: makes a `TokenMask` for every sample, such as that of a grammar: before each token the
        host is asked which ones may come, so the request gets one token a visit. Called again for a
        fork, or where a text must be read anew. What the mask raises ends its sample with reason
        "mask_failed". No snapshot keeps it: `restore` takes it again.
      priority: who is admitted first, as `EngineConfig.priority_ageing` says; and for policies,
        such as `LowestPriority`. From -2**31 to 2**31 - 1, more is sooner.
      max_wait: seconds, above 0, after which a sample ends with "waited_too_long" if it has not
        been admitted by then; the samples of a prompt are admitted with the first. None: it waits.
      timeout: seconds, above 0, after which it ends with "timeout" wherever it is, with the tokens
        that were read. None: it goes on. Both count from `submit`, by the engine's clock, and are
        looked at when a step begins.
    """

    n: SupportsIndex
    cache_salt: str | bytes | None
    priority: SupportsIndex
    mask: MakeMask | None
    max_wait: SupportsFloat | None
    timeout: SupportsFloat | None


@dataclass(slots=True, eq=False)
class Sample:
    """One stream of tokens inside the engine: waiting (no handle), prefilling, or decoding.

    `tokens` holds prompt and generated tokens, as far as they were read from the device. The newest
    one is not in the cache yet: the next decode step writes it, so a fresh prompt, a fork and a
    resumed request all look alike.

    Attributes:
      limit: tokens that a sequence may have in the engine.
      goal: tokens that it can come to, by that and by `max_new_tokens`.
      siblings: further samples of the prompt, forked when it is in the cache.
      handle: its pages; None while it has none.
      computed: tokens whose keys and values are in the cache, or will be by programs launched.
      known: tokens that were computed before its pages went, by it or by whom it came from.
      priority, place: when it came, and how much sooner its turn is, as `WaitingQueue` says.
      slot: its row on the device from admission to its last visit; None without one.
      in_flight: tokens that visits were launched for and that are not read yet.
      admit_by, end_by: when it ends unless it has been admitted, and in any case; by the clock of
        the scheduler. Infinity: never.
      asked: whether the admission policy was asked for it and its siblings.
      ended: whether its last event is on its way.
      scores: of its prompt, if it asks for them.
      constraint: its mask, if it has one: every step of it waits for the host.
      reading: how far its text was read, as the `Texts` of the engine has it.
      times, read_at: when what happened to it, None before it came into an engine; and when tokens
        of it were read last.
      pinned: whether it is a prefix that keeps its pages, and no request: never decoded.
    """

    request_id: int
    index: int
    prompt_len: int
    tokens: MutableSequence[int]
    sampling: SamplingParams
    cache_salt: str | bytes | None
    siblings: list[Sample] = field(default_factory=list)
    handle: Any = None  # a Handle
    computed: int = 0
    known: int = 0
    preemptions: int = 0
    priority: int = 0
    limit: int = _UNLIMITED
    place: int = 0
    slot: int | None = None
    in_flight: int = 0
    admit_by: float = math.inf
    end_by: float = math.inf
    asked: bool = True
    ended: bool = False
    constraint: Constraint | None = None
    scores: Scores | None = None
    reading: Any = None  # a Reading
    times: Times | None = None
    read_at: float = 0.0
    pinned: bool = False
    goal: int = field(init=False)
    _key: PromptKey | None = None

    def __post_init__(self) -> None:
        self.bound(self.limit)
        if self.generated:
            self.known = max(self.known, len(self.tokens) - 1)
        asked = self.sampling.prompt_logprobs is not None and not self.generated
        if asked and self.scores is None:
            self.scores = Scores(self.prompt_len)

    def bound(self, limit: int) -> None:
        """Let it have so many tokens at most."""
        self.limit = limit
        self.goal = min(self.prompt_len + self.sampling.max_new_tokens, limit)

    @property
    def key(self) -> PromptKey:
        """Its tokens, to be looked up visit after visit: their digests are computed once."""
        salt = self.cache_salt if self.scores is None else self.scores.salted(self.cache_salt)
        key = self._key
        if key is None or len(key) != len(self.tokens) or key.cache_salt != salt:
            key = self._key = PromptKey(np.array(self.tokens, np.int32), cache_salt=salt)
        return key

    @property
    def unscored(self) -> bool:
        """Whether its prompt is to be computed by the program that scores it."""
        return self.scores is not None and not self.scores.complete

    def begin(self, now: float) -> Times:
        """Let it and its siblings be here since then, if they were not before."""
        for each in self.siblings:
            each.times = each.times or Times(now, each.generated)
        self.times = times = self.times or Times(now, self.generated)
        return times

    def admit(self, now: float, cached: int | None) -> None:
        """It has pages, so many tokens of which were there already; the first time counts."""
        self.times = self.begin(now).admit(now, cached)

    def leave_pages(self) -> None:
        """It has none from here on, and will compute its tokens again."""
        self.known = max(self.known, self.computed)
        self.handle, self.computed, self.in_flight = None, 0, 0

    @property
    def generated(self) -> int:
        """Tokens behind the prompt."""
        return len(self.tokens) - self.prompt_len

    @property
    def left(self) -> int:
        """Tokens that it can still get."""
        return self.goal - len(self.tokens)

    @property
    def decoding(self) -> bool:
        """Whether all but its newest token is in the cache."""
        return self.handle is not None and self.computed == len(self.tokens) - 1

    def ending(self, tokens: Sequence[int]) -> tuple[int, str | None]:
        """How many of these new tokens it gets, and why it ends with the last one, if it does."""
        if self.sampling.searched:
            if count := self._stop_in(tokens):
                return count, "stop"
        elif tokens[-1] in self.sampling.stop_tokens:  # where the device stops
            return len(tokens), "stop"
        length = len(self.tokens) + len(tokens)
        if length < self.goal:
            return len(tokens), None
        most = self.prompt_len + self.sampling.max_new_tokens
        return len(tokens), "length" if length >= most else "capacity"

    def _stop_in(self, tokens: Sequence[int]) -> int:
        """How many of these new tokens there are up to the first end of a stop; 0 without one."""
        params = self.sampling
        stops, runs = set(params.stop_tokens), [list(run) for run in params.stop_sequences]
        reach = max(map(len, runs), default=1) - 1
        before = self.tokens[max(len(self.tokens) - reach, self.prompt_len) :]
        text, missing = [*before, *tokens], params.min_new_tokens - self.generated
        for count, token in enumerate(tokens, 1):
            end = len(before) + count
            ended = count > missing and any(text[max(end - len(r), 0) : end] == r for r in runs)
            if token in stops or ended:
                return count
        return 0

    def spawn(self, request_id: int, index: int, sampling: SamplingParams, **fields: Any) -> Sample:
        """A sample with the same tokens and no place in the pool."""
        constraint = None if self.constraint is None else self.constraint.again()
        return replace(
            self,
            constraint=constraint,
            request_id=request_id,
            index=index,
            sampling=sampling,
            tokens=self.tokens[:],
            siblings=[],
            handle=None,
            computed=0,
            preemptions=0,
            slot=None,
            in_flight=0,
            reading=None,
            times=None,
            **fields,
        )


def new_request(
    prompt: Ints,
    sampling: SamplingParams,
    *,
    config: EngineConfig,
    limit: int,
    n: SupportsIndex = 1,
    cache_salt: str | bytes | None = None,
    priority: SupportsIndex = 0,
    mask: MakeMask | None = None,
    max_wait: SupportsFloat | None = None,
    timeout: SupportsFloat | None = None,
    now: float = 0.0,
    has_text: bool = False,
) -> Sample:
    """The first of n samples of a prompt, with the others; sample i has seed + i, ids are to come.

    It and its times begin now.

    Raises:
      SequenceTooLong: the prompt and one token are more than `limit`.
      TypeError, ValueError: an argument is not what it should be.
    """
    sampling = check_sampling(sampling, config, has_text=has_text)
    tokens = prompt_ids(prompt, config.vocab_size)
    salt_key(cache_salt)  # refuses a bad one now
    n = as_count("n", n, 1, MAX_SAMPLES)
    priority = as_count("priority", priority, -MOST_PRIORITY - 1, MOST_PRIORITY)
    limits = seconds_of("max_wait", max_wait), seconds_of("timeout", timeout)
    if len(tokens) + 1 > limit:
        raise SequenceTooLong(
            f"a prompt of {len(tokens)} tokens and one generated token need {len(tokens) + 1} "
            f"places, but a sequence can have {limit} (usable pages * page_size, or "
            "max_sequence_tokens); shorten it or enlarge the pool"
        )
    first = Sample(-1, 0, len(tokens), tokens, sampling, cache_salt, priority=priority)
    if mask is not None:
        first.constraint = check_mask(mask, config.token_masks)
    first.admit_by, first.end_by = (now + seconds for seconds in limits)
    for i in range(1, n):
        seeded = replace(sampling, seed=((sampling.seed or 0) + i) % 2**32)
        first.siblings.append(first.spawn(-1, i, seeded))
    first.begin(now)
    return first


def seconds_of(name: str, value: SupportsFloat | None) -> float:
    """A time that a request is given; infinity for None."""
    if value is None:
        return math.inf
    seconds = _as_float(name, value)
    if not 0 < seconds < math.inf:
        raise ValueError(f"{name} must be finite seconds above 0, or None, got {seconds}")
    return seconds


def prompt_ids(prompt: Ints, vocab_size: int | None = None) -> list[int]:
    """Check a prompt and make it a list of ints."""
    ids = as_prompt("prompt", prompt)
    if vocab_size is not None and ids.max() >= vocab_size:
        raise ValueError(f"prompt must be ids below vocab_size {vocab_size}, got {ids.max()}")
    return ids.tolist()


def check_sampling(
    sampling: SamplingParams, config: EngineConfig, *, has_text: bool = False
) -> SamplingParams:
    """Refuse what is no `SamplingParams` or cannot be served, before it is queued.

    Returns:
      The parameters, with the stop tokens of the engine unless they are ignored, and with a seed.

    Raises:
      TypeError: it is something else.
      ValueError: an id is none of the vocabulary, or `config` has not what it asks for, or it asks
        for text of an engine without.
    """
    if not isinstance(sampling, SamplingParams):
        raise TypeError(f"sampling must be SamplingParams, got {type(sampling).__name__}")
    if config.stop_tokens and not sampling.ignore_eos:
        more = tuple(t for t in config.stop_tokens if t not in sampling.stop_tokens)
        sampling = replace(sampling, stop_tokens=sampling.stop_tokens + more)
    if (lack := unserved(sampling, config, has_text=has_text)) is not None:
        raise ValueError(lack)
    if sampling.seed is None:
        sampling = replace(sampling, seed=secrets.randbits(32))
    return sampling


def unserved(sampling: SamplingParams, config: EngineConfig, *, has_text: bool) -> str | None:
    """Why an engine of that config cannot serve these parameters, with text or without, or None."""
    if sampling.stop and not has_text:
        return (
            "stop strings are found in the text, but the engine has none; use Engine(detokenize=)"
        )
    vocab_size, highest = config.vocab_size, max(sampling.ids(), default=-1)
    if vocab_size is not None and highest >= vocab_size:
        return f"sampling names the id {highest}, but vocab_size is {vocab_size}"
    if (named := len(sampling.named())) > config.named_tokens:
        return (
            f"sampling names {named} tokens in logit_bias, allowed_tokens, bad_tokens and as stop "
            f"tokens with min_new_tokens, but EngineConfig.named_tokens is {config.named_tokens}"
        )
    if (args := len(sampling.logits_args)) > config.logits_args:
        most = config.logits_args
        return f"logits_args has {args} numbers, but EngineConfig.logits_args is {most}"
    if sampling.prompt_logprobs is not None and not config.score_chunk:
        return "prompt_logprobs needs EngineConfig.score_chunk, which is 0"
    if (sampling.prompt_logprobs or 0) > config.top_logits:
        return (
            f"prompt_logprobs asks for {sampling.prompt_logprobs} alternatives, but "
            f"EngineConfig.top_logits is {config.top_logits}"
        )
    if (sampling.logprobs or 0) > config.top_logits:
        return (
            f"logprobs asks for {sampling.logprobs} alternatives, but EngineConfig.top_logits is "
            f"{config.top_logits}"
        )
    return None
