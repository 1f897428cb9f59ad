"""Many tasks of an event loop share one engine; a task that is cancelled ends its request."""

import asyncio
from importlib import import_module

from paged_decode import AsyncEngine, SamplingParams

toy = import_module("02_stop_and_resume")  # its engine; make your own here
PROMPTS = [[3, 1, 4], [1, 5, 9, 2], [6, 5]]


async def answer(server, prompt, seed):
    """What a handler of a web server would do with one request."""
    words = []
    sampling = SamplingParams(max_new_tokens=40, temperature=0.8, seed=seed)
    async for event in server.submit(prompt, sampling):
        words.append(event.token)
    return words


async def main():
    engine = toy.make_engine()
    engine.warmup()
    async with AsyncEngine(engine) as server:
        tasks = [asyncio.create_task(answer(server, p, seed)) for seed, p in enumerate(PROMPTS)]
        await asyncio.sleep(0)  # they are queued
        tasks[1].cancel()  # its reader has gone
        for prompt, words in zip(
            PROMPTS, await asyncio.gather(*tasks, return_exceptions=True), strict=True
        ):
            print(*prompt, "->", *(words if isinstance(words, list) else ["cancelled"]))
    if not engine.idle or engine.allocator.num_used:
        raise SystemExit("something was left behind")


if __name__ == "__main__":
    asyncio.run(main())
