"""The engine among others: threads, tasks of an event loop, policies that are wrong."""

from __future__ import annotations

import asyncio
import threading

import pytest

from paged_decode.engine.aio import AsyncEngine
from paged_decode.policies import LastAdmitted, Swap, Watermark
from paged_decode.tiers import HostTier

from ..tiny import dense_greedy, fail_decode, make_engine
from .test_promises import GREEDY, P, greedy, run, texts

# ---- threads


def test_threads_submit_while_another_one_steps():
    engine = make_engine()
    made: list[tuple[int, int]] = []
    want = [dense_greedy(p, 3) for p in P]

    def submit(number):
        for i in range(20):
            which = (number + i) % len(P)
            made.append((engine.submit(P[which], greedy(3)), which))

    threads = [threading.Thread(target=submit, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    events = []
    while any(t.is_alive() for t in threads) or not engine.idle:
        events += engine.step()
    assert len({request for request, _ in made}) == len(made) == 160
    assert texts(events) == {(request, 0): want[which] for request, which in made}


def test_a_second_thread_may_cancel_and_submit_but_not_step():
    engine, refused, made = make_engine(), [], []

    def beside(request):
        try:
            engine.step()
        except RuntimeError as error:
            refused.append(str(error))
        engine.cancel(request)
        made.append(engine.submit(P[1], GREEDY))

    def callback(event):
        if event.index == 0:
            thread = threading.Thread(target=beside, args=(event.request_id,))
            thread.start()
            thread.join()

    request = engine.submit(P[0], greedy(60), on_token=callback)
    events = run(engine)
    assert len(refused) == 1 and "another thread" in refused[0]
    mine = [e for e in events if e.request_id == request]
    assert mine[-1].finish_reason == "cancelled" and len(mine) < 15
    assert texts(events)[made[0], 0] == dense_greedy(P[1], 12)


# ---- asyncio


def in_loop(call, seconds: float = 120.0):
    return asyncio.run(asyncio.wait_for(call, seconds))


async def collected(stream, tokens: list) -> list:
    async for event in stream:
        tokens.append(event.token)
    return tokens


async def until(condition) -> None:
    while not condition():
        await asyncio.sleep(0.002)


def test_tasks_get_their_own_tokens_and_one_that_is_cancelled_ends_its_request():
    engine = make_engine()

    async def serve():
        async with AsyncEngine(engine) as server:
            got = [[], [], []]
            streams = [server.submit(p, greedy(t)) for p, t in zip(P, (12, 12, 200), strict=False)]
            tasks = [
                asyncio.create_task(collected(*pair)) for pair in zip(streams, got, strict=True)
            ]
            await until(lambda: len(got[2]) > 4)
            tasks[2].cancel()
            done = await asyncio.gather(*tasks, return_exceptions=True)
            await until(lambda: engine.idle)
            return done, got[2]

    done, cut = in_loop(serve())
    assert [tuple(t) for t in done[:2]] == [dense_greedy(p, 12) for p in P[:2]]
    assert isinstance(done[2], asyncio.CancelledError) and len(cut) < 200
    assert tuple(cut) == dense_greedy(P[2], len(cut))
    assert engine.allocator.num_used == 0


def test_what_a_step_raises_reaches_every_task_whose_request_has_not_ended():
    engine = make_engine()
    fail_decode(engine, {1}, RuntimeError("device"))

    async def serve():
        async with AsyncEngine(engine) as server:
            streams = [server.submit(p, GREEDY) for p in P[:3]]
            done = await asyncio.gather(
                *(collected(s, []) for s in streams), return_exceptions=True
            )
            again = await collected(server.submit(P[3], GREEDY), [])
            return done, again

    done, again = in_loop(serve())
    assert [str(error) for error in done] == ["device"] * 3
    assert tuple(again) == dense_greedy(P[3], 12)
    assert engine.idle and engine.allocator.num_used == 0


def test_an_iterator_may_be_closed_after_its_request_has_ended():
    engine = make_engine()

    async def serve():
        async with AsyncEngine(engine) as server:
            stream = server.submit(P[0], GREEDY)
            await anext(stream)
            await until(lambda: engine.idle)
            await stream.aclose()

    in_loop(serve())


def test_an_iterator_that_is_closed_before_its_first_event_cancels_its_request():
    engine = make_engine()

    async def serve():
        async with AsyncEngine(engine) as server:
            stream = server.submit(P[0], greedy(200))
            await stream.aclose()
            await until(lambda: engine.idle)
            return engine.stats.decode_tokens

    assert in_loop(serve()) < 200


def test_the_server_may_be_left_while_events_wait_to_be_taken():
    engine = make_engine()

    async def serve():
        async with AsyncEngine(engine) as server:
            stream = server.submit(P[0], GREEDY)
            await until(lambda: engine.idle)
        return stream

    in_loop(serve())


# ---- policies that are wrong


@pytest.mark.parametrize("name", ["victim", "preemption", "admission"])
def test_a_class_is_no_policy(name, unchecked):
    kind = dict(victim=LastAdmitted, preemption=Swap, admission=Watermark)[name]
    for bad in (kind, 5, object()):
        with pytest.raises(TypeError, match=f"{name} must be an object with a method"):
            make_engine(16, policies={name: bad})


class Wrong:
    """Every policy at once, with one answer."""

    def __init__(self, answer):
        self.answer = answer

    def choose(self, running):
        return self.answer

    def swaps(self, sample):
        return self.answer

    def keep_free(self, sample, running, groups):
        return self.answer


@pytest.mark.parametrize(
    "kind, answer",
    [
        ("victim", None),
        ("victim", object()),
        ("admission", None),
        ("admission", -1),
        ("admission", (1, 2)),
        ("preemption", None),
    ],
)
def test_the_engine_goes_on_after_a_policy_that_was_wrong(unchecked, kind, answer):
    right = dict(victim=LastAdmitted(), admission=Watermark(0), preemption=Swap())
    engine = make_engine(16, policies=right | {kind: Wrong(answer)} | dict(tier=HostTier(64)))
    ids = [engine.submit(p, GREEDY) for p in P]
    events, errors = [], []
    for _ in range(400):
        if engine.idle:
            break
        try:
            events += engine.step()
        except (TypeError, ValueError) as error:
            errors.append(error)
            setattr(engine.scheduler.room, f"_{kind}", right[kind])
    assert len(errors) == 1 and "Wrong." in str(errors[0])
    assert texts(events) == {(i, 0): dense_greedy(p, 12) for i, p in zip(ids, P, strict=True)}
    assert engine.stats.preemptions and engine.allocator.num_used == 0
    engine.allocator.check_invariants()
