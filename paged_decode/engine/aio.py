"""The engine for asyncio: steps run in a thread of their own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ..allocator.arguments import Ints
from ..requests import TokenEvent
from ..sampling import SamplingParams
from .engine import Engine

__all__ = ["AsyncEngine"]


class AsyncEngine:
    """One engine for many tasks of an event loop.

    One thread steps while there is something to do, so no task waits for the device. While it is
    in use, nobody else may call the engine but for `submit` and `cancel`.

    Args:
      engine: an engine, warm for preference.

    Example:
      >>> async def answer(engine, prompt):
      ...     async with AsyncEngine(engine) as server:
      ...         return [event.token async for event in server.submit(prompt)]
    """

    def __init__(self, engine: Engine):
        self.engine = engine
        self._queues: dict[int, asyncio.Queue[TokenEvent | BaseException]] = {}
        self._thread = ThreadPoolExecutor(1, "paged-decode-steps")
        self._stepping: asyncio.Task[None] | None = None

    def submit(
        self, prompt: Ints, sampling: SamplingParams | None = None, **options: Any
    ) -> AsyncIterator[TokenEvent]:
        """Queue a prompt now; the events of all its samples come from what is returned.

        Args:
          prompt, sampling, options: as in `Engine.submit`, without `on_token`.

        A task that is cancelled, or leaves the iterator with `aclose`, cancels its request. What a
        step raises, all tasks get whose requests have not ended.
        """
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[TokenEvent | BaseException] = asyncio.Queue()

        def tell(event: TokenEvent) -> None:
            loop.call_soon_threadsafe(queue.put_nowait, event)

        samples = int(options.get("n", 1))
        request_id = self.engine.submit(prompt, sampling, on_token=tell, **options)
        self._queues[request_id] = queue
        if self._stepping is None or self._stepping.done():
            self._stepping = loop.create_task(self._steps())
        return self._events(request_id, queue, samples)

    async def _events(
        self, request_id: int, queue: asyncio.Queue[TokenEvent | BaseException], samples: int
    ) -> AsyncIterator[TokenEvent]:
        try:
            while samples:
                event = await queue.get()
                if isinstance(event, BaseException):
                    raise event
                samples -= event.finish_reason is not None
                yield event
        finally:
            del self._queues[request_id]
            if samples:
                self.engine.cancel(request_id)

    async def _steps(self) -> None:
        """Until nothing is left to do."""
        loop = asyncio.get_running_loop()
        while not self.engine.idle:
            try:
                await loop.run_in_executor(self._thread, self.engine.step)
            except Exception as error:  # of a program, a policy: the engine goes on
                for queue in self._queues.values():
                    queue.put_nowait(error)

    async def aclose(self) -> None:
        """Cancel what has not ended, and let the thread end."""
        for request_id in list(self._queues):
            self.engine.cancel(request_id)
        if self._stepping is not None:
            await self._stepping
        self._thread.shutdown()

    async def __aenter__(self) -> AsyncEngine:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()
