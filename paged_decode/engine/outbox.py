"""Events on their way out: shown to callbacks one by one, then handed to the caller."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, NamedTuple

from .events import Events, OnToken, TokenEvent
from .figures import Figures
from .journal import Outcome
from .scores import PromptLogprobs

__all__ = ["Outbox"]


class _Kept(NamedTuple):
    """```
    events   [ taken | shown, to be taken | to be shown ]  <- what came in since, by its serial
                     num_taken            num_shown
    ```
    """

    events: Events
    num_taken: int = 0
    num_shown: int = 0
    handed: Any = None  # what leaves with it

    @classmethod
    def of(cls, ready: Events, unseen: Events) -> _Kept:
        return cls(Events.joined([ready, unseen]), 0, len(ready))

    @property
    def ready(self) -> Events:
        everything = self.num_taken == 0 and self.num_shown == len(self.events)
        return self.events if everything else self.events[self.num_taken : self.num_shown]

    @property
    def unseen(self) -> Events:
        return self.events[self.num_shown :]


class Outbox:
    """Keeps every event until it was shown and taken, whatever callbacks and interrupts do.

    An interrupt between two lines loses no event and doubles none: what came in is kept under its
    serial number until it is entered, every change is one assignment, and what is handed out leaves
    in one operation with the state in which it was there.

    Attributes:
      callbacks: by request, who is told of its events.
    """

    def __init__(self) -> None:
        self.callbacks: dict[int, OnToken] = {}
        self._new: dict[int, Sequence[Outcome]] = {}
        self._states = deque([_Kept(Events())])  # the first one counts

    @property
    def _kept(self) -> _Kept:
        return self._states[0]

    @_kept.setter
    def _kept(self, kept: _Kept) -> None:
        self._states = deque([kept])

    def __bool__(self) -> bool:
        return bool(self._new) or self._kept.num_taken < len(self._kept.events)

    def put(self, serial: int, outcomes: Sequence[Outcome]) -> None:
        """Take what became of samples; of equal serials the last one holds."""
        self._new[serial] = outcomes

    def put_back(self, pending: Iterable[TokenEvent], shown: Iterable[TokenEvent]) -> None:
        """Take what `contents` gave in another engine."""
        unseen, ready = self.contents()
        self._kept = _Kept.of(
            Events.joined([ready, Events.of(shown)]), Events.joined([unseen, Events.of(pending)])
        )

    def contents(self) -> tuple[Events, Events]:
        """What is yet to be shown, and what was shown but not taken."""
        self._open()
        return self._kept.unseen, self._kept.ready

    def drop(self, requests: Collection[int]) -> None:
        """Forget the events of some requests."""
        unseen, ready = (each.only(requests, others=True) for each in self.contents())
        self._kept = _Kept.of(ready, unseen)

    def num_unseen(self, request_id: int, sample: int) -> int:
        """Tokens of a sample that nobody was shown yet."""
        unseen = (e for e in self.contents()[0] if (e.request_id, e.sample) == (request_id, sample))
        return sum(event.token is not None for event in unseen)

    def mentions(self, request_id: int) -> bool:
        """Whether there is an event of that request; changes nothing."""
        new = (o.sample.request_id for each in list(self._new.values()) for o in each)
        kept = self._kept
        return request_id in new or request_id in kept.events.columns[0][kept.num_taken :]

    def show(self, abandon: Callable[[int], None]) -> None:
        """Show every event to its callback; then they are there to be taken.

        A callback that raises is not called again: `abandon(request_id)` is, and the exception
        goes on. The next call shows the rest. An interrupt that comes just before a callback keeps
        the event from it, not from the caller.
        """
        self._open()
        while (kept := self._kept).num_shown < (count := len(kept.events)):
            if not self.callbacks:
                self._kept = kept._replace(num_shown=count)
                break
            event = kept.events[kept.num_shown]
            self._kept = _Kept(kept.events, kept.num_taken, kept.num_shown + 1)
            if (on_token := self.callbacks.get(event.request_id)) is not None:
                try:
                    on_token(event)
                except Exception:
                    self.callbacks.pop(event.request_id, None)
                    abandon(event.request_id)
                    raise
            self._open()  # a callback may have cancelled

    def forget_callbacks(self, living: Collection[int]) -> None:
        """Keep those of requests that are living; all of the others' events were shown."""
        if self.callbacks and not self._new and self._kept.num_shown == len(self._kept.events):
            kept = {request: cb for request, cb in self.callbacks.items() if request in living}
            self.callbacks = kept

    def take(self, requests: Collection[int] | None = None) -> Events:
        """All events that were shown, or those of some requests."""
        ready, unseen = self._kept.ready, self._kept.unseen
        if requests is None:
            return self._hand_out(ready, _Kept(unseen))
        others = ready.only(requests, others=True)
        return self._hand_out(ready.only(requests), _Kept.of(others, unseen))

    def take_one(self) -> TokenEvent | None:
        """The first of them; None if there is none."""
        events, taken, shown, _ = self._kept
        if taken == shown:
            return None
        rest = _Kept(events, taken + 1, shown) if taken + 1 < len(events) else _Kept(Events())
        return self._hand_out(events[taken], rest)

    def _hand_out(self, what: Any, rest: _Kept) -> Any:
        self._states = deque([self._kept._replace(handed=what), rest])
        return self._states.popleft().handed

    def _open(self) -> None:
        """Enter what came in."""
        while self._new:
            serial = next(iter(self._new))
            kept = self._kept
            new = _events(self._new[serial])
            events = Events.joined([kept.events, new]) if len(kept.events) else new
            states = deque([kept._replace(events=events)])
            rest = {key: value for key, value in self._new.items() if key != serial}
            # Both at once: an interrupt between them would lose the events, or double them.
            self._states, self._new = states, rest


def _events(outcomes: Iterable[Outcome]) -> Events:
    request_ids, samples, indices, tokens, versions, total = [], [], [], [], [], 0
    special: list[tuple[int, Outcome]] = []  # with the place behind its last event
    for outcome in outcomes:
        sample, at, new, reason, tops, _, logprobs, prompt, told, _, version = outcome
        count, first = len(new) or 1, at - sample.prompt_len
        request_ids += [sample.request_id] * count
        samples += [sample.index] * count
        indices += range(first, first + count)
        tokens += new or (None,)
        versions += [version] * count
        total += count
        if told or any(each is not None for each in (reason, tops, logprobs, prompt)):
            special.append((total, outcome))
    reasons: list[str | None] = [None] * total
    pairs: list[tuple[tuple[int, float], ...]] = [()] * total
    details = [""] * total
    own: list[float | None] = [None] * total
    processed: list[float | None] = [None] * total
    likeliest: list[tuple[tuple[int, float], ...]] = [()] * total
    prompts: list[PromptLogprobs | None] = [None] * total
    texts = [""] * total
    all_figures: list[Figures | None] = [None] * total
    for end, (sample, _, new, reason, tops, detail, logprobs, prompt, told, figures, _) in special:
        reasons[end - 1], details[end - 1], all_figures[end - 1] = reason, detail, figures
        if prompt is not None:
            prompts[end - len(new)] = prompt
        if told is not None:
            texts[end - len(told.pieces) : end] = told.pieces
        if tops is not None:
            pairs[end - len(new) : end] = _pairs(*tops)
        if logprobs is not None:
            own[end - len(new) : end] = logprobs[0].tolist()
            processed[end - len(new) : end] = logprobs[1].tolist()
            if tops is not None and (asked := sample.sampling.logprobs):
                ids, logits = (each[:, :asked] for each in tops)
                likeliest[end - len(new) : end] = _pairs(ids, logits - logprobs[2][:, None])
    columns = [request_ids, samples, indices, tokens, reasons, pairs, details]
    return Events([*columns, own, processed, likeliest, prompts, texts, all_figures, versions])


def _pairs(ids: Any, logits: Any) -> list[tuple[tuple[int, float], ...]]:
    """The largest logits of every step."""
    both = zip(ids.tolist(), logits.tolist(), strict=True)
    return [tuple(zip(i, x, strict=True)) for i, x in both]
