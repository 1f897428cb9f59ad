"""What any thread may ask of an engine, until the one that steps carries it out."""

from __future__ import annotations

import threading
from collections import deque

from .events import OnToken
from .outbox import Outbox
from .requests import Sample
from .scheduler import Scheduler

__all__ = ["Calls"]


class Calls:
    """Requests that came and requests to be ended, and the next id.

    Each is taken out after it was carried out, so that an interrupt loses none; carrying it out a
    second time changes nothing.

    Attributes:
      next_id: of the next request.
    """

    def __init__(self, scheduler: Scheduler, outbox: Outbox):
        self.next_id = 0
        self._scheduler, self._outbox = scheduler, outbox
        self._lock = threading.RLock()
        self._submitted: deque[tuple[Sample, OnToken | None]] = deque()
        self._cancelled: deque[int] = deque()
        self._unpinned: deque[int] = deque()

    def __bool__(self) -> bool:
        return bool(self._submitted or self._cancelled or self._unpinned)

    def __len__(self) -> int:
        """Requests that came."""
        return len(self._submitted)

    def new_ids(self, count: int = 1) -> int:
        """The first of so many ids that nobody else gets."""
        with self._lock:
            first, self.next_id = self.next_id, self.next_id + count
        return first

    def submit(self, first: Sample, on_token: OnToken | None) -> int:
        """Name a request, and queue it."""
        with self._lock:
            for sample in (first, *first.siblings):
                sample.request_id = self.next_id
            self._submitted.append((first, on_token))
            self.next_id += 1
        return first.request_id

    def cancel(self, request_id: int) -> None:
        """Let a request be ended.

        Raises:
          KeyError: it neither lives nor has events that were not returned.
        """
        with self._lock:
            lives = request_id in self._scheduler.living or self._outbox.mentions(request_id)
            if not lives and not self._comes(request_id, pinned=False):
                raise KeyError(f"request {request_id} is not in the engine")
            self._cancelled.append(request_id)

    def unpin(self, pin_id: int) -> None:
        """Let a pin be given up.

        Raises:
          KeyError: there is none, or it is given up already.
        """
        with self._lock:
            lives = pin_id in self._scheduler.pins.samples or self._comes(pin_id, pinned=True)
            if not lives or pin_id in self._unpinned:
                raise KeyError(f"pin {pin_id} is not in the engine")
            self._unpinned.append(pin_id)

    def _comes(self, number: int, *, pinned: bool) -> bool:
        coming = [first for first, _ in tuple(self._submitted)]  # another thread takes them in
        return any(first.request_id == number and first.pinned == pinned for first in coming)

    def take_in(self) -> None:
        """Queue the requests that came."""
        while self._submitted:
            first, on_token = self._submitted[0]
            if on_token is not None:
                self._outbox.callbacks[first.request_id] = on_token
            (self._scheduler.pin if first.pinned else self._scheduler.add)(first)
            self._submitted.popleft()

    def carry_out(self) -> None:
        """The same, and end those that are to be ended; give up pins."""
        self.take_in()
        while self._cancelled:
            self._scheduler.cancel(self._cancelled[0])
            self._cancelled.popleft()
        while self._unpinned:
            self._scheduler.unpin(self._unpinned[0])
            self._unpinned.popleft()
        self._scheduler.release()
