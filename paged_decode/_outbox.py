"""Events on their way out: shown to callbacks one by one, then returned together."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from ._requests import Sample, TokenEvent

__all__ = ["Outbox"]


class Outbox:
    """Keeps every event until it was shown and returned, whatever callbacks do."""

    def __init__(self) -> None:
        self._pending: deque[tuple[Sample, TokenEvent]] = deque()
        self._shown: list[TokenEvent] = []

    def __bool__(self) -> bool:
        return bool(self._pending or self._shown)

    def add(self, sample: Sample, token: int | None, reason: str | None, tops: tuple = ()) -> None:
        """Queue the event that `sample` has got `token`, or has ended."""
        self._pending.append((sample, sample.event(token, reason, top_logits=tops)))

    def contents(self) -> tuple[list[tuple[Sample, TokenEvent]], list[TokenEvent]]:
        """What is yet to be shown, and what was shown but not returned."""
        return list(self._pending), list(self._shown)

    def put_back(self, sample: Sample, event: TokenEvent, shown: bool) -> None:
        """Take an event of `contents`, here or in another engine."""
        if shown:
            self._shown.append(event)
        else:
            self._pending.append((sample, event))

    def deliver(self, abandon: Callable[[int], None]) -> list[TokenEvent]:
        """Show every event to its callback and return them all.

        A callback that raises is not called again: `abandon(request_id)` is, and the exception
        goes on. What was not returned then is returned by the next call.
        """
        while self._pending:
            sample, event = self._pending.popleft()
            self._shown.append(event)
            if sample.on_token is None:
                continue
            try:
                sample.on_token(event)
            except Exception:
                for other, _ in self._pending:
                    if other.request_id == event.request_id:
                        other.on_token = None
                abandon(event.request_id)
                raise
        events, self._shown = self._shown, []
        return events
