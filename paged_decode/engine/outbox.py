"""Events on their way out: shown to callbacks one by one, then handed to the caller."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Sequence
from functools import partial
from itertools import count, repeat
from typing import Any

from ..requests import OnToken, TokenEvent
from .journal import Outcome

__all__ = ["Outbox"]


class Outbox:
    """Keeps every event until it was shown and taken, whatever callbacks and interrupts do.

    An interrupt between two lines loses no event and doubles none: what came in is kept under its
    serial number, what was shown is counted, and what was taken leaves in one operation.

    Attributes:
      callbacks: by request, who is told of its events.
    """

    def __init__(self) -> None:
        self.callbacks: dict[int, OnToken] = {}
        self._new: dict[int, Sequence[Outcome]] = {}
        self._showing: list[TokenEvent] = []
        self._num_shown = 0
        self._ready: dict[str, deque[TokenEvent]] = {}

    def __bool__(self) -> bool:
        return bool(self._new or self._showing or self._ready)

    def put(self, serial: int, outcomes: Sequence[Outcome]) -> None:
        """Take what became of samples; of equal serials the last one holds."""
        self._new[serial] = outcomes

    def put_back(self, pending: Sequence[TokenEvent], shown: Sequence[TokenEvent]) -> None:
        """Take what `contents` gave in another engine."""
        self._open()
        self._showing = [*self._showing, *pending]
        if shown:
            self._ready = {"events": deque([*self._ready.get("events", ()), *shown])}

    def contents(self) -> tuple[list[TokenEvent], list[TokenEvent]]:
        """What is yet to be shown, and what was shown but not taken."""
        self._open()
        taken = [*self._ready.get("events", ()), *self._showing[: self._num_shown]]
        return self._showing[self._num_shown :], taken

    def drop(self, requests: Collection[int]) -> None:
        """Forget the events of some requests."""
        pending, shown = (
            [event for event in events if event.request_id not in requests]
            for events in self.contents()
        )
        self._showing, self._num_shown = pending, 0
        self._ready = {"events": deque(shown)} if shown else {}

    def num_unseen(self, request_id: int, sample: int) -> int:
        """Tokens of a sample that nobody was shown yet."""
        unseen = [e for e in self.contents()[0] if (e.request_id, e.sample) == (request_id, sample)]
        return sum(event.token is not None for event in unseen)

    def mentions(self, request_id: int) -> bool:
        """Whether there is an event of that request; changes nothing."""
        new = (o.sample.request_id for each in list(self._new.values()) for o in each)
        made = (*self._showing, *self._ready.get("events", ()))
        return request_id in new or any(event.request_id == request_id for event in made)

    def show(self, abandon: Callable[[int], None]) -> None:
        """Show every event to its callback; then they are there to be taken.

        A callback that raises is not called again: `abandon(request_id)` is, and the exception
        goes on. The next call shows the rest. An interrupt that comes just before a callback keeps
        the event from it, not from the caller.
        """
        self._open()
        while self._num_shown < len(self._showing):
            if not self.callbacks:
                self._num_shown = len(self._showing)
                break
            event = self._showing[self._num_shown]
            self._num_shown += 1
            if (on_token := self.callbacks.get(event.request_id)) is not None:
                try:
                    on_token(event)
                except Exception:
                    self.callbacks.pop(event.request_id, None)
                    abandon(event.request_id)
                    raise
            self._open()  # a callback may have cancelled
        if self._showing:
            events = deque(self._ready.get("events", ()))
            events.extend(self._showing)
            self._ready, self._showing, self._num_shown = {"events": events}, [], 0

    def forget_callbacks(self, living: Collection[int]) -> None:
        """Keep those of requests that are living; all of the others' events were shown."""
        if self.callbacks and not (self._new or self._showing):
            kept = {request: cb for request, cb in self.callbacks.items() if request in living}
            self.callbacks = kept

    def take(self, requests: Collection[int] | None = None) -> list[TokenEvent]:
        """All events that were shown, or those of some requests."""
        if requests is None:
            return list(self._ready.pop("events", ()))
        ready = self._ready.get("events", ())
        rest = deque(event for event in ready if event.request_id not in requests)
        self._ready = {"events": rest} if rest else {}
        return [event for event in ready if event.request_id in requests]

    def take_one(self) -> TokenEvent | None:
        """The first of them; None if there is none."""
        if (events := self._ready.get("events")) is None:
            return None
        return self._ready.pop("events")[0] if len(events) == 1 else events.popleft()

    def _open(self) -> None:
        """Make events of what came in."""
        while self._new:
            serial = next(iter(self._new))
            events = [*self._showing, *_events(self._new[serial])]
            rest = {key: value for key, value in self._new.items() if key != serial}
            # Both at once: an interrupt between them would lose the events, or double them.
            self._showing, self._new = events, rest


def _events(outcomes: Sequence[Outcome]) -> list[TokenEvent]:
    events: list[TokenEvent] = []
    make = partial(tuple.__new__, TokenEvent)
    for sample, at, tokens, reason, tops, detail in outcomes:
        request, index, first = sample.request_id, sample.index, at - sample.prompt_len
        if not tokens:
            events.append(TokenEvent(request, index, first, None, reason, detail=detail))
            continue
        pairs = repeat(()) if tops is None else _pairs(*tops)
        same = repeat(request), repeat(index), count(first)
        fields = zip(*same, tokens, repeat(None), pairs, repeat(""), strict=False)
        events += map(make, fields)
        if reason is not None:
            events[-1] = events[-1]._replace(finish_reason=reason)
    return events


def _pairs(ids: Any, logits: Any) -> list[tuple[tuple[int, float], ...]]:
    """The largest logits of every step."""
    both = zip(ids.tolist(), logits.tolist(), strict=True)
    return [tuple(zip(i, x, strict=True)) for i, x in both]
