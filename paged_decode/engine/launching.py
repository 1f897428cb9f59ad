"""The thread that gives programs to the device, in the order in which they were queued."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

__all__ = ["Launched", "Launching"]


class Launched:
    """A job of the launching thread: what it will return, and when it went to the device.

    Attributes:
      future: of what the job returns.
      begun: set when the launching thread is about to give its last program to the device.
    """

    def __init__(self) -> None:
        self.future: Future[Any] = Future()
        self.begun = threading.Event()


class Launching:
    """Whoever has such a thread."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "paged-decode-launch")
        self._last: Launched | None = None
        self._launcher: int | None = None
        self._failure: BaseException | None = None  # of a job: those behind it are not run

    def _launch(self, job: Callable[[Launched], Any]) -> Launched:
        """Queue a job; an interrupt here leaves it in the queue, or takes it out."""
        launched, before = Launched(), self._last
        try:
            self._last = launched
            self._thread.submit(self._run, job, launched)
        except BaseException:
            if launched.future.cancel():
                self._last = before  # which may still be at work
            raise
        return launched

    def _run(self, job: Callable[[Launched], Any], launched: Launched) -> None:
        if not launched.future.set_running_or_notify_cancel():
            return
        self._launcher = threading.get_ident()
        try:
            if self._failure is not None:
                raise self._failure
            launched.future.set_result(job(launched))
        except BaseException as error:  # handed to whoever waits
            self._failure = error
            launched.future.set_exception(error)
        finally:
            launched.begun.set()

    def _drain(self) -> None:
        """Return when everything is launched, or has failed."""
        if threading.get_ident() == self._launcher:
            return  # the check asks, for one
        if self._last is not None:
            self._last.future.exception()
