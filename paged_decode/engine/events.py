"""What an engine tells of its requests: events, and what they come to."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, compress
from operator import eq
from typing import Any, NamedTuple, SupportsIndex, overload

from .figures import Figures
from .scores import PromptLogprobs

__all__ = ["Completion", "Events", "OnToken", "TokenEvent", "check_callback", "gather"]


class TokenEvent(NamedTuple):
    """One token of one sample, or its end.

    Attributes:
      request_id: what `submit` returned.
      sample: 0 <= sample < n.
      index: place of the token among the generated ones, from 0.
      token: its id; None if the sample ended without another token.
      finish_reason: None while it goes on; "stop" (at a stop, which `token` completes), "length"
        (max_new_tokens), "capacity" (the pool or the page table cannot hold more of it and
        nothing was left to preempt), "cancelled", "invalid_logits" (the model's logits for the next
        token had a NaN, or nothing but -inf: its weights or its pages are broken),
        "no_allowed_token" (what the request allows has no chance in these logits), "mask_failed"
        (its `mask` has raised), "detokenizer_failed" (the engine's `detokenize` has),
        "waited_too_long" (`max_wait` had passed, and it had not been admitted), "timeout",
        "new_weights" (`update_params(in_flight="end")`).
      top_logits: the largest logits of this step as (id, logit) pairs, if the engine keeps them.
      detail: of an end at "capacity" without a token: what holds the pages; of what failed: what
        was raised.
      logprob: of the token by the model's own distribution, if `SamplingParams.logprobs` asks.
      processed_logprob: by the one that it was drawn from, after penalties, temperature and what
        top-k and the like leave; 0 of a greedy request.
      top_logprobs: the likeliest tokens by the model as (id, log-probability) pairs, as many as
        were asked for; the drawn one need not be among them.
      prompt_logprobs: of the prompt's tokens, with the first token of a sample that asks for them.
      text: what has become certain with this token, if the engine has a `detokenize`. All of them
        joined are the sample's text; what may be half a character or part of a stop string waits.
      figures: of the last event: what became of the sample, and how long it took.
      version: of the weights that the token was drawn with, as `Engine.version` counts them; of an
        end without a token, those of then.
    """

    request_id: int
    sample: int
    index: int  # pyright: ignore[reportIncompatibleMethodOverride]
    token: int | None
    finish_reason: str | None = None
    top_logits: tuple[tuple[int, float], ...] = ()
    detail: str = ""
    logprob: float | None = None
    processed_logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    prompt_logprobs: PromptLogprobs | None = None
    text: str = ""
    figures: Figures | None = None
    version: int = 0


OnToken = Callable[[TokenEvent], object]


class _Rows:
    """The rows of some columns, again and again."""

    __slots__ = ("__iter__",)

    def __init__(self, columns: Sequence[Sequence[Any]]):
        self.__iter__ = partial(zip, *columns)


class Events(Sequence[TokenEvent]):
    """Events in order, kept as columns: each `TokenEvent` is made when it is looked at.

    A visit brings one for every row and step. As objects that wait to be read they would take the
    host longer than all else that it does, most of that in the garbage collector. What iterates
    them is C alone, so that `kept += engine.step()` is one operation for an interrupt. (So a list
    cannot have the sum with it, but be extended by it; `[*a, *b]` joins anything.)

    Attributes:
      columns: a list for every field of `TokenEvent`.
    """

    __slots__ = ("__iter__", "__len__", "columns")

    def __init__(self, columns: Iterable[list[Any]] | None = None):
        self.columns = [[] for _ in TokenEvent._fields] if columns is None else list(columns)
        self.__iter__ = partial(map, _make_event, _Rows(self.columns))
        self.__len__ = self.columns[0].__len__

    @classmethod
    def of(cls, events: Iterable[TokenEvent]) -> Events:
        """The same events."""
        rows = list(events)
        return cls(map(list, zip(*rows, strict=True)) if rows else None)

    @classmethod
    def joined(cls, parts: Iterable[Events]) -> Events:
        """One after the other."""
        columns = [each.columns for each in parts]
        return cls([list(chain(*column)) for column in zip(*columns, strict=True)] or None)

    @overload
    def __getitem__(self, index: SupportsIndex) -> TokenEvent: ...
    @overload
    def __getitem__(self, index: slice) -> Events: ...
    def __getitem__(self, index: SupportsIndex | slice) -> TokenEvent | Events:
        if isinstance(index, slice):
            return Events(column[index] for column in self.columns)
        return _make_event([column[index] for column in self.columns])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Events | list | tuple):
            return NotImplemented
        return len(self) == len(other) and all(map(eq, self, other))

    __hash__ = None  # type: ignore[assignment]

    def __add__(self, other: Iterable[TokenEvent]) -> list[TokenEvent]:
        return [*self, *other]

    def __repr__(self) -> str:
        return repr(list(self))

    def __reduce__(self) -> tuple[type[Events], tuple[list[list[Any]]]]:
        return Events, (self.columns,)

    def only(self, requests: Collection[int], *, others: bool = False) -> Events:
        """Those of these requests, or those of all others."""
        chosen = [(request in requests) != others for request in self.columns[0]]
        return Events(list(compress(column, chosen)) for column in self.columns)


_make_event = partial(tuple.__new__, TokenEvent)


@dataclass(frozen=True, slots=True)
class Completion:
    """Everything one sample of a request generated; fields as in `TokenEvent`, `text` joined.

    `logprobs` and `processed_logprobs` have a number for each token if the request asked for them;
    `versions` has one for each in any case.
    """

    request_id: int
    sample: int
    tokens: tuple[int, ...]
    finish_reason: str
    top_logits: tuple[tuple[tuple[int, float], ...], ...] = ()
    logprobs: tuple[float, ...] = ()
    processed_logprobs: tuple[float, ...] = ()
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...] = ()
    prompt_logprobs: PromptLogprobs | None = None
    text: str = ""
    figures: Figures | None = None
    versions: tuple[int, ...] = ()


def check_callback(on_token: OnToken | None) -> None:
    """Refuse what cannot be called, before anything is queued."""
    if not (on_token is None or callable(on_token)):
        raise TypeError(f"on_token must be callable, got {type(on_token).__name__}")


def gather(events: Iterable[TokenEvent]) -> list[Completion]:
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
            logprobs=tuple(e.logprob for e in stream if e.logprob is not None),
            processed_logprobs=tuple(
                e.processed_logprob for e in stream if e.processed_logprob is not None
            ),
            top_logprobs=tuple(e.top_logprobs for e in stream if e.top_logprobs),
            prompt_logprobs=stream[0].prompt_logprobs,
            text="".join(e.text for e in stream),
            figures=stream[-1].figures,
            versions=tuple(e.version for e in stream if e.token is not None),
        )
        for key, stream in sorted(streams.items())
    ]
