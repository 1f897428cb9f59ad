"""The engine for asyncio: steps run in a thread of their own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TypeAlias, Unpack

from ..allocator.arguments import Ints
from .engine import Engine
from .events import TokenEvent
from .params import SamplingParams
from .requests import RequestOptions

__all__ = ["AsyncEngine", "EventStream"]

Queue: TypeAlias = asyncio.Queue[TokenEvent | BaseException]


class EventStream(AsyncIterator[TokenEvent]):
    """The events of one request.

    If the task that waits for the next one is cancelled, or the stream is closed or dropped before
    the request has ended, the request is cancelled.
    """

    def __init__(self, engine: Engine, request_id: int, queues: dict[int, Queue], samples: int):
        self.request_id = request_id
        self._engine, self._queues, self._left = engine, queues, samples
        self._queue = queues[request_id]

    async def __anext__(self) -> TokenEvent:
        if not self._left:
            raise StopAsyncIteration
        try:
            event = await self._queue.get()
        except asyncio.CancelledError:
            self._end()
            raise
        if isinstance(event, BaseException):
            self._end()
            raise event
        self._left -= event.finish_reason is not None
        if not self._left:
            self._queues.pop(self.request_id, None)
        return event

    async def aclose(self) -> None:
        """End the request, if it has not ended."""
        self._end()

    def __del__(self) -> None:
        self._end()

    def _end(self) -> None:
        if self._left:
            self._left = 0
            self._queues.pop(self.request_id, None)
            with suppress(KeyError):  # it has ended, and nobody has read so
                self._engine.cancel(self.request_id)


class AsyncEngine:
    """One engine for many tasks of an event loop.

    One thread steps while there is something to do, so no task waits for the device. While it is
    in use, nobody else may call the engine but for `submit` and `cancel`.

    Args:
      engine: an engine, warm for preference.

    Examples:
      >>> async def answer(engine, prompt):
      ...     async with AsyncEngine(engine) as server:
      ...         return [event.token async for event in server.submit(prompt)]
    """

    def __init__(self, engine: Engine):
        self.engine = engine
        self._queues: dict[int, Queue] = {}
        self._thread = ThreadPoolExecutor(1, "paged-decode-steps")
        self._stepping: asyncio.Task[None] | None = None

    def submit(
        self,
        prompt: Ints,
        sampling: SamplingParams | None = None,
        **options: Unpack[RequestOptions],
    ) -> EventStream:
        """Queue a prompt now, and return the stream of the events of all its samples.

        Args:
          prompt: as in `Engine.submit`, whose `on_token` has the stream in its place here.
          sampling: as there.
          options: as there.

        What a step raises comes from every stream whose request was not over.
        """
        loop, queue = asyncio.get_running_loop(), Queue()

        def tell(event: TokenEvent) -> None:
            loop.call_soon_threadsafe(queue.put_nowait, event)

        request_id = self.engine.submit(prompt, sampling, on_token=tell, **options)
        self._queues[request_id] = queue
        if self._stepping is None or self._stepping.done():
            self._stepping = loop.create_task(self._steps())
        return EventStream(self.engine, request_id, self._queues, int(options.get("n", 1)))

    async def _steps(self) -> None:
        """Until nothing is left to do."""
        loop = asyncio.get_running_loop()
        while not self.engine.idle:
            try:
                await loop.run_in_executor(self._thread, self.engine.step)
            except Exception as error:  # of a program, a policy: the engine goes on
                for queue in self._queues.values():
                    queue.put_nowait(error)
                if self.engine.asleep:
                    return

    async def aclose(self) -> None:
        """Cancel what has not ended, and let the thread end."""
        for request_id in list(self._queues):
            with suppress(KeyError):
                self.engine.cancel(request_id)
        if self._stepping is not None:
            await self._stepping
        self._thread.shutdown()

    async def __aenter__(self) -> AsyncEngine:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()
