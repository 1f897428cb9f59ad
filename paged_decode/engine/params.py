"""What a request asks for: how its tokens are drawn, and when it ends."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from itertools import chain
from typing import Any

import numpy as np

from ..allocator.arguments import as_count, as_counts

__all__ = ["ALWAYS", "HUGE", "MAX_STOP_TOKENS", "TINY", "Kind", "SamplingParams"]

MAX_STOP_TOKENS = 8  # width of the device's stop table; the host finds the others
ALWAYS = 2**31 - 1  # behind every token that a request may have

TINY = float(np.finfo(np.float32).tiny)  # devices flush what is smaller to zero
HUGE = float(np.finfo(np.float32).max)
_INF = float("inf")


class Kind(IntEnum):
    """What it takes to draw a token, in order of cost; a batch takes what one of its rows does."""

    GREEDY = 0
    WHOLE = 1  # from all tokens
    NARROW = 2  # from those that min_p, top_k and top_p leave
    SHAPED = 3  # after named tokens or penalties have changed the logits


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one request is sampled and when it ends.

    Numbers may be Python's or NumPy's; they are kept as Python ints and floats. Logits are changed
    by the tokens that it names, then by penalties, then come temperature, min_p, top_k and top_p.

    Attributes:
      max_new_tokens: upper bound of generated tokens, at least 1.
      temperature: 0 is greedy; otherwise logits are divided by it. Taken as float32, at least
        2**-126, which is greedy but for equal logits; its largest makes all but equally likely.
      top_k: keep the k most likely tokens (ties with the k-th stay in); 0 keeps all.
      top_p: of those, keep the smallest set of most likely tokens whose probability reaches it, in
        (0, 1]; of equal ones the lower ids. Taken as float32; 1 keeps all.
      seed: 0 <= seed < 2**32. Token i of a request depends on (seed, i) and the logits alone,
        never on what else is in the batch, so preemption and batching change nothing. None: the
        engine draws one for each request, and reports it.
      stop_tokens: ids, any number; the request ends with the first of them, which is kept.
      stop_sequences: runs of ids; the request ends with the first that its generated tokens have as
        a whole, which is kept.
      min_new_tokens: none of the first so many tokens can be a stop token, and no run of ids and
        no string stops that ends with one of them.
      ignore_eos: the stop tokens of `EngineConfig` are not those of this request.
      min_p: keep the tokens with at least this part of the probability of the likeliest, in [0, 1].
      presence_penalty: taken from the logits of tokens that were generated, in [-2, 2].
      frequency_penalty: the same, as often as they were, in [-2, 2].
      repetition_penalty: above 0; logits above 0 of tokens of prompt and output are divided by it,
        others multiplied.
      logit_bias: `{id: number}` to be added; -inf forbids. Kept as pairs.
      allowed_tokens: no others can be drawn; None: all.
      bad_tokens: these cannot be drawn.
      logits_args: numbers for the engine's `process_logits`, up to `EngineConfig.logits_args` of
        them; kept as float32.
      prompt_logprobs: report, with the first token, the log-probabilities of the prompt's tokens
        and so many alternatives, by the model's own distribution; needs
        `EngineConfig.score_chunk`. Nothing of the prompt is taken from the prefix cache, nor found
        there by others. None: nothing.
      stop: strings; the request ends with the token that completes the first of them in the text
        of its generated tokens. One string is taken for a tuple of it. They need
        `Engine(detokenize=)`.
      include_stop_str_in_output: the text ends with the stop string, not before it.
      detokenize: tell the text of tokens, where the engine can.
      logprobs: report the log-probability of every token, and so many alternatives (up to
        `EngineConfig.top_logits`); None: nothing.

    Raises:
      ValueError: a value is out of its range, or nothing is left to be drawn.
      TypeError: a value is of the wrong kind.

    Examples:
      >>> SamplingParams(max_new_tokens=16, temperature=0.8, top_p=0.95, seed=7).top_k
      0
      >>> SamplingParams(logit_bias={7: 1.5}).logit_bias
      ((7, 1.5),)
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = 0
    stop_tokens: tuple[int, ...] = ()
    stop_sequences: tuple[tuple[int, ...], ...] = ()
    min_new_tokens: int = 0
    ignore_eos: bool = False
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] = ()
    allowed_tokens: tuple[int, ...] | None = None
    bad_tokens: tuple[int, ...] = ()
    logits_args: tuple[float, ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    stop: str | tuple[str, ...] = ()
    include_stop_str_in_output: bool = False
    detokenize: bool = True

    def __post_init__(self) -> None:
        top, allowed = ALWAYS, self.allowed_tokens
        checked = dict(
            max_new_tokens=as_count("max_new_tokens", self.max_new_tokens, 1, top),
            temperature=_as_float("temperature", self.temperature),
            top_k=as_count("top_k", self.top_k, 0, top),
            top_p=_as_float("top_p", self.top_p),
            seed=None if self.seed is None else as_count("seed", self.seed, 0, 2**32 - 1),
            stop_tokens=as_counts("stop_tokens", self.stop_tokens, 0, top),
            stop_sequences=_runs(self.stop_sequences),
            min_new_tokens=as_count("min_new_tokens", self.min_new_tokens, 0, top),
            min_p=_as_float("min_p", self.min_p),
            logit_bias=_biases(self.logit_bias),
            allowed_tokens=None if allowed is None else _ids("allowed_tokens", allowed),
            bad_tokens=_ids("bad_tokens", self.bad_tokens),
            logits_args=_numbers("logits_args", self.logits_args),
            stop=_strings(self.stop),
        )
        for name in ("presence_penalty", "frequency_penalty", "repetition_penalty"):
            checked[name] = _as_float(name, getattr(self, name))
        for name in ("logprobs", "prompt_logprobs"):
            if (value := getattr(self, name)) is not None:
                checked[name] = as_count(name, value, 0, top)
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        for name in ("ignore_eos", "include_stop_str_in_output", "detokenize"):
            if not isinstance(value := getattr(self, name), bool):
                raise TypeError(f"{name} must be a bool, got {value!r}")
        self._check_ranges()
        self._check_choice()

    def _check_ranges(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature must be finite and at least 0, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must be in [0, 1], got {self.min_p}")
        for name in ("presence_penalty", "frequency_penalty"):
            if not -2 <= (value := getattr(self, name)) <= 2:
                raise ValueError(f"{name} must be in [-2, 2], got {value}")
        if not (TINY <= self.repetition_penalty <= HUGE):
            raise ValueError(
                f"repetition_penalty must be a positive float32, got {self.repetition_penalty}"
            )
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens must be at most max_new_tokens {self.max_new_tokens}, "
                f"got {self.min_new_tokens}"
            )
        if self.stop and not self.detokenize:
            raise ValueError(
                "stop strings are found in the text: detokenize must be True with stop"
            )

    def _check_choice(self) -> None:
        if self.allowed_tokens is None:
            return
        left = set(self.allowed_tokens) - set(self.bad_tokens)
        left -= {token for token, bias in self.bias_pairs if bias == -_INF}
        if not left:
            raise ValueError("allowed_tokens leaves no token to be drawn beside what is forbidden")
        if self.min_new_tokens and not left - set(self.stop_tokens):
            raise ValueError("allowed_tokens leaves only stop tokens before min_new_tokens")

    @property
    def bias_pairs(self) -> tuple[tuple[int, float], ...]:
        """`logit_bias` as it is kept."""
        bias = self.logit_bias
        return tuple(bias.items()) if isinstance(bias, Mapping) else bias

    @property
    def kind(self) -> Kind:
        """What it takes to draw its tokens."""
        if self.is_shaped:
            return Kind.SHAPED
        if not self.temperature:
            return Kind.GREEDY
        return Kind.NARROW if self.top_k or self.top_p < 1 or self.min_p else Kind.WHOLE

    @property
    def is_penalized(self) -> bool:
        """Whether its text changes its logits."""
        penalties = self.presence_penalty, self.frequency_penalty, self.repetition_penalty - 1
        return any(penalties)

    @property
    def is_shaped(self) -> bool:
        """Whether its logits are not those of the model."""
        return self.is_penalized or self.names

    @property
    def names(self) -> bool:
        """Whether it names tokens to allow, to forbid, or to add to their logits."""
        some = self.logit_bias or self.bad_tokens or (self.min_new_tokens and self.stop_tokens)
        return self.allowed_tokens is not None or bool(some)

    @property
    def searched(self) -> bool:
        """Whether the host must look for its end in the middle of what a visit brought."""
        return bool(self.stop_sequences) or len(self.stop_tokens) > MAX_STOP_TOKENS

    def named(self) -> list[tuple[int, float, int]]:
        """`id, what is added to its logit, before which token` of all that it names."""
        if not self.names:
            return []
        always = dict.fromkeys(self.allowed_tokens or (), 0.0)
        always |= dict(self.bias_pairs) | dict.fromkeys(self.bad_tokens, -_INF)
        early = set(self.stop_tokens) if self.min_new_tokens else set()
        if self.allowed_tokens is not None:  # what it does not name is forbidden as it is
            always = {token: always[token] for token in self.allowed_tokens}
            early &= always.keys()
        out = [(token, bias, ALWAYS) for token, bias in always.items()]
        return out + [(token, -_INF, self.min_new_tokens) for token in sorted(early)]

    def ids(self) -> Iterator[int]:
        """Every id that it names."""
        biased = (token for token, _ in self.bias_pairs)
        parts = self.stop_tokens, biased, self.allowed_tokens or (), self.bad_tokens
        return chain(*parts, *self.stop_sequences)


def _ids(name: str, ids: Any) -> tuple[int, ...]:
    """Different ids, in order."""
    return tuple(sorted(set(as_counts(name, ids, 0, ALWAYS))))


def _runs(runs: Any) -> tuple[tuple[int, ...], ...]:
    name = "stop_sequences"
    if isinstance(runs, str | bytes | Mapping) or not isinstance(runs, Iterable):
        raise TypeError(f"{name} must be sequences of ids, got {runs!r}")
    found = tuple(as_counts(name, run, 0, ALWAYS) for run in runs)
    if not all(found):
        raise ValueError(f"{name} must not be empty: such a run is everywhere")
    return found


def _strings(stop: Any) -> tuple[str, ...]:
    strings = (stop,) if isinstance(stop, str) else stop
    if isinstance(strings, bytes | Mapping) or not isinstance(strings, Iterable):
        raise TypeError(f"stop must be a string or strings, got {stop!r}")
    found = tuple(strings)
    for each in found:
        if not isinstance(each, str):
            raise TypeError(f"stop must be a string or strings, got {each!r} among them")
        if not each:
            raise ValueError("stop must not have an empty string: it is everywhere")
        if any("\ud800" <= char <= "\udfff" for char in each):
            raise ValueError(f"stop must be text, got {each!r}, which has half of a surrogate pair")
    return found


def _biases(bias: Any) -> tuple[tuple[int, float], ...]:
    name = "logit_bias"
    pairs = bias.items() if isinstance(bias, Mapping) else bias
    try:
        found = {as_count(name, token, 0, ALWAYS): _as_float(name, x) for token, x in pairs}
    except (TypeError, ValueError) as error:
        if name in str(error):
            raise
        raise TypeError(f"{name} must be a mapping of ids to numbers, got {bias!r}") from None
    for token, value in found.items():
        if not (value == -_INF or abs(value) <= HUGE):
            raise ValueError(f"{name} of {token} must be a float32 or -inf, got {value}")
    return tuple(sorted(found.items()))


def _numbers(name: str, values: Any) -> tuple[float, ...]:
    """Numbers as the device has them."""
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable):
        raise TypeError(f"{name} must be numbers, got {values!r}")
    found = tuple(_as_float(name, value) for value in values)
    if not all(abs(value) <= HUGE for value in found):
        raise ValueError(f"{name} must be finite float32 numbers, got {found}")
    return tuple(np.array(found, np.float32).tolist())


def _as_float(name: str, value: Any) -> float:
    """One Python float, of whatever kind of number; a bool or text is a TypeError."""
    kind = getattr(getattr(value, "dtype", None), "kind", "f")  # bfloat16 is a V, as np.void is
    number = hasattr(value, "__float__") and kind not in "bcSUOmM"
    several = not isinstance(value, type) and getattr(value, "ndim", 0) > 0
    if isinstance(value, bool | type | np.void) or not number or several:
        raise TypeError(f"{name} must be a number, got {value!r} of type {type(value).__name__}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} must fit a float, got an integer beyond it") from None
