"""What has become of samples: entered all at once, and done again if it was cut off."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from .figures import Figures
from .records import Decode, Result
from .requests import Sample
from .sampling import Broken
from .scores import PromptLogprobs
from .text import Texts, Told

__all__ = ["Journal", "Outcome", "Outcomes", "outcomes_of"]


class Outcome(NamedTuple):
    """What became of one sample: the tokens that it got behind the first `at`, and its end."""

    sample: Sample
    at: int
    tokens: Sequence[int]
    reason: str | None = None
    tops: tuple[np.ndarray, np.ndarray] | None = None
    detail: str = ""
    logprobs: np.ndarray | None = None  # [3, tokens], as `Result` has them
    prompt: PromptLogprobs | None = None  # with the first token
    told: Told | None = None
    figures: Figures | None = None
    version: int | None = None  # of the weights; None: those of now


_REASONS = {Broken.MODEL: "invalid_logits", Broken.FORBIDDEN: "no_allowed_token"}
_FAILED = "detokenizer_failed"


@runtime_checkable
class Outcomes(Protocol):
    """Where they go: a call with a serial number that was there replaces what it said then."""

    def put(self, serial: int, outcomes: Sequence[Outcome]) -> None: ...


class Journal:
    """Tokens and endings on their way into samples.

    An interrupt may come between any two lines. So what happened is first written down, in one
    assignment; entering it a second time changes nothing.

    Attributes:
      living: by request, its samples that have not ended.
      texts: what reads their text, if there is something.
      clock: says when something is entered.
      version: of the weights, for ends without a token.
    """

    def __init__(
        self,
        outcomes: Outcomes,
        texts: Texts | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.living: dict[int, list[Sample]] = {}
        self.texts, self.clock, self.version = texts, clock, 0
        self._outcomes, self._serials = outcomes, itertools.count()
        self._open: tuple[int, Sequence[Outcome], float] | None = None

    def enter(self, outcomes: Sequence[Outcome]) -> None:
        """Let this have happened, whatever comes from here on. An end without a token has the text
        that was held."""
        if (texts := self.texts) is not None:
            outcomes = [
                o if o.tokens or o.told else o._replace(told=texts.rest(o.sample)) for o in outcomes
            ]
        outcomes = [
            o if o.version is not None else o._replace(version=self.version) for o in outcomes
        ]
        self._open = next(self._serials), outcomes, self.clock()
        self.replay()

    def replay(self) -> None:
        """Enter what was written down, if that was cut off."""
        if self._open is None:
            return
        serial, outcomes, now = self._open
        entered = []
        for outcome in outcomes:
            sample, tokens, told = outcome.sample, outcome.tokens, outcome.told
            times = sample.times or sample.begin(now)
            if tokens:
                del sample.tokens[outcome.at :]
                sample.tokens.extend(tokens)
                sample.computed = len(sample.tokens) - 1
                sample.reading = None if told is None else told.reading
                sample.read_at = now
                if times.first is None:
                    sample.times = times = times._replace(first=now)
            if outcome.reason is not None:
                sample.ended = True
                outcome = outcome._replace(figures=times.figures(now, sample))
            entered.append(outcome)
        self._outcomes.put(serial, entered)
        for request in {o.sample.request_id for o in outcomes if o.reason is not None}:
            if group := [s for s in self.living.get(request, ()) if not s.ended]:
                self.living[request] = group
            else:
                self.living.pop(request, None)
        self._open = None


def outcomes_of(
    plan: Decode, result: Result, texts: Texts | None = None
) -> tuple[list[Outcome], np.ndarray]:
    """What each row got, and its end, if it has come to it; ends without a token come last. And how
    many tokens each row of the plan got, int64 `[n]`.

    None of the rows had ended. They are read: what is in flight of them is less by this visit.
    """
    steps = len(result.tokens)
    columns = (a.tolist() for a in (result.tokens.T, result.counts, result.broken, plan.budgets))
    outcomes, last, counts = [], [], []
    rows = enumerate(zip(plan.samples, *columns, strict=True))
    for i, (sample, tokens, count, broken, budget) in rows:
        sample.in_flight -= budget
        at, tops, logprobs, reason, told = len(sample.tokens), None, None, None, None
        if count:
            if count < steps:
                tokens = tokens[:count]
            count, reason = sample.ending(tokens)
            if texts is not None and (told := texts.told(sample, tokens[:count], reason)):
                count, reason = len(told.pieces), told.reason
            if count < len(tokens):
                tokens = tokens[:count]
        if count:
            if result.top_ids is not None and result.top_logits is not None:
                tops = result.top_ids[:count, i], result.top_logits[:count, i]
            if sample.sampling.logprobs is not None and result.logprobs is not None:
                logprobs = result.logprobs[:, :count, i]
            prompt = None
            asked = sample.sampling.prompt_logprobs
            if asked is not None and at == sample.prompt_len and sample.scores is not None:
                prompt = sample.scores.reported(asked)
            own = reason, tops, "", logprobs, prompt, told, None, plan.version
            outcomes.append(Outcome(sample, at, tokens, *own))
        counts.append(count)
        failure = None if told is None else told.failure
        if reason is None and (broken or failure is not None):
            reason = _REASONS[Broken(broken)] if failure is None else _FAILED
            held = None if texts is None or told is None else texts.rest(sample, told.reading)
            end = Outcome(sample, at + count, (), reason, detail=failure or "", told=held)
            last.append(end)
    return outcomes + last, np.array(counts, np.int64)
