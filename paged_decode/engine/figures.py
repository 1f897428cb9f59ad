"""When things happened to a request, and what the engine as a whole is doing."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

from ..allocator.stats import AllocatorStats
from .config import EngineStats

__all__ = ["Figures", "Gauges", "Times", "check_gauges"]

_WINDOW = 10.0  # seconds that rates are taken over
_PAGES = dict(total="usable", used="used", cached="evictable", free="free")


class Figures(NamedTuple):
    """What became of one sample, told with its last event; None where something did not happen.

    Seconds are of the engine's clock, which is read once for what a visit brings. Those of a
    restored request begin when it was restored, as if it was submitted then.

    Attributes:
      seed: the one that it was drawn with.
      prompt_tokens: tokens of its prompt.
      cached_tokens: those whose pages were there at its first admission, in the prefix cache or a
        tier; None of a sample that shares the pages of another one from its beginning.
      preemptions: how often it lost its pages.
      queued_seconds: from `submit` to its first admission.
      first_token_seconds: from `submit` until its first token was read.
      token_seconds: between further tokens, in the mean.
      total_seconds: from `submit` to its end.
    """

    seed: int
    prompt_tokens: int
    cached_tokens: int | None
    preemptions: int
    queued_seconds: float | None
    first_token_seconds: float | None
    token_seconds: float | None
    total_seconds: float


class Times(NamedTuple):
    """When what happened to one sample, by the engine's clock.

    Attributes:
      begun: submitted, forked or restored; with `before` tokens that others have generated.
      admitted: got pages for the first time; `cached` tokens were there.
      first: tokens were read for the first time.
    """

    begun: float
    before: int = 0
    admitted: float | None = None
    cached: int | None = None
    first: float | None = None

    def admit(self, now: float, cached: int | None) -> Times:
        """It has pages; only the first time counts."""
        return self if self.admitted is not None else self._replace(admitted=now, cached=cached)

    def figures(self, now: float, sample: Any) -> Figures:
        """The sample that they are of ends now."""
        mean, further = None, sample.generated - self.before - 1
        if self.first is not None and further > 0:
            mean = max(sample.read_at - self.first, 0.0) / further
        return Figures(
            sample.sampling.seed or 0,
            sample.prompt_len,
            self.cached,
            sample.preemptions,
            None if self.admitted is None else max(self.admitted - self.begun, 0.0),
            None if self.first is None else max(self.first - self.begun, 0.0),
            mean,
            max(now - self.begun, 0.0),
        )


class Gauges:
    """Rates over the last seconds, and who is told.

    Args:
      stats: of the engine.
      clock: its clock.
      tell: called with the gauges, if somebody wants them.
      every: seconds between two calls.
    """

    def __init__(
        self,
        stats: EngineStats,
        clock: Callable[[], float],
        tell: Callable[[dict[str, float | int]], object] | None = None,
        every: float = 10.0,
    ):
        self._stats, self._clock, self._tell, self._every = stats, clock, tell, every
        self._begun = self._told = clock()
        self._visits = deque([(self._begun, 0, 0)])  # the first one is before the window

    def note_visit(self, read: Callable[[], dict[str, float | int]]) -> None:
        """A visit is over; `read` gives all gauges, if it is time to tell them."""
        now, stats = self._clock(), self._stats
        self._visits.append((now, stats.decode_tokens, stats.prefill_tokens))
        self._forget(now)
        if self._tell is not None and now - self._told >= self._every:
            self._told = now
            self._tell(read())

    def rates(self) -> dict[str, float]:
        """Tokens per second."""
        now, stats = self._clock(), self._stats
        self._forget(now)
        _, decoded, prefilled = self._visits[0]
        seconds = min(now - self._begun, _WINDOW)
        counts = stats.decode_tokens - decoded, stats.prefill_tokens - prefilled
        decode, prefill = (count / seconds if seconds > 0 else 0.0 for count in counts)
        return dict(decode_tokens_per_second=decode, prefill_tokens_per_second=prefill)

    def _forget(self, now: float) -> None:
        visits = self._visits
        while len(visits) > 1 and visits[1][0] <= now - _WINDOW:
            visits.popleft()

    def read(
        self, pools: list[AllocatorStats], *, running: int, waiting: int, pinned: int
    ) -> dict[str, float | int]:
        """All of them.

        Args:
          pools: of every group of layers.
          running: samples that run.
          waiting: those that wait.
          pinned: pages that pins hold.
        """
        out: dict[str, float | int] = dict(requests_running=running, requests_waiting=waiting)
        for name, field in _PAGES.items():
            each = [getattr(pool, field) for pool in pools]
            out[f"pages_{name}"] = sum(each)
            if len(each) > 1:
                out |= {f"pages_{name}_group_{group}": n for group, n in enumerate(each)}
        out["pages_pinned"] = pinned
        asked = pools[0].prefix_query_tokens
        out["preemptions"] = self._stats.preemptions
        out["prefix_hit_rate"] = pools[0].prefix_hit_tokens / asked if asked else 0.0
        return out | self.rates()


def check_gauges(tell: Callable[..., object] | None, every: float) -> None:
    """Refuse what cannot be called, or ever.

    Raises:
      TypeError: `tell` cannot be called, or `every` is no number.
      ValueError: `every` is negative or NaN.
    """
    if not (tell is None or callable(tell)):
        raise TypeError(f"on_gauges must be callable, got {type(tell).__name__}")
    if isinstance(every, bool) or not isinstance(every, int | float):
        raise TypeError(f"gauges_every must be a number of seconds, got {every!r}")
    if not every >= 0:
        raise ValueError(f"gauges_every must be at least 0 seconds, got {every!r}")
