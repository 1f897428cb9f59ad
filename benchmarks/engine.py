"""The engine as a whole: its rate, its host work, its latency under load.

    python benchmarks/engine.py [--parts rate host arrivals gap waiting] [--name engine]
    python benchmarks/engine.py --small      # tiny shapes on a CPU, in under a minute

The model is the example's, with Llama-3.1-8B's shapes and random bfloat16 weights; k = 8 steps a
visit.

- `rate`: tokens/s delivered in steady decode, after every prompt is in the cache and before the
  first row ends, beside the decode program alone in the same process and a loop in torch with
  FlashInfer (`_torch_loop.py`, which runs first, in a process of its own).
- `host`: the median of a visit's wall time less the time blocked for the device, with a shallow
  model.
- `arrivals`: requests that come at random (Poisson; lengths lognormal). Time to first token counts
  from the arrival. `gap` is the time between two deliveries of a request, `per_token` a request's
  time from the first delivery to the last over the tokens that came after the first.
- `gap`: the longest time between two deliveries of a decoding row while long prompts arrive, beside
  the median visit before they came and the time of the last budget of such a prompt, alone.
- `waiting`: host time of a visit while 8 and 400 requests wait for a prefix that is being computed.
  The command fails if the second exceeds three times the first.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import numpy as np
from _engine_runs import (
    Visit,
    Watch,
    decode_until,
    device_gaps,
    drain,
    make_engine,
    middle,
    plot,
    prompts,
    quantile,
    submit,
)
from _llama_shapes import LlamaShapes, llama_shapes
from _result import spread, write_result
from _torch_loop import measure_torch_loop

from paged_decode import Engine
from paged_decode.engine.plans import Growth, Taken, decode_plan

OURS, PROGRAM, TORCH = "paged-decode", "paged-decode/decode program", "torch+flashinfer"
Record = dict[str, Any]
STEPS, SETTLE = 8, 2
LEAD = 40  # by which rows are longer than the prompt when the rate's clock starts, less 8 of torch
_NOTHING = np.empty((3, 0), np.int32)
MOST_WAITING_RATIO = 3.0

FULL: dict[str, Any] = dict(
    prefill=dict(prefill_chunk=512, prefill_rows=4, prefill_tokens=2048),
    cases=((1, 2048), (16, 1024), (16, 2048), (64, 1024)),  # rows, context
    visits=16,
    host=dict(rows=(64, 256), context=512, visits=48, layers=2),
    arrivals=dict(max_rows=(16, 64, 256), rates=(4, 12, 24), seconds=8, tokens_a_row=1024),
    lengths=dict(prompt=(512, 0.6, 16, 4096), new=(128, 0.6, 8, 512)),  # median, sigma, limits
    gap=dict(rows=32, context=512, prompt=8192, arrivals=4, apart=4, before=16),
    waiting=dict(counts=(8, 400), prefix=8192, rows=16),
)
SMALL: dict[str, Any] = dict(
    prefill=dict(prefill_chunk=32, prefill_rows=2, prefill_tokens=64),
    cases=((1, 32), (4, 32)),
    visits=4,
    host=dict(rows=(2, 4), context=32, visits=4, layers=1),
    arrivals=dict(max_rows=(2, 4), rates=(8, 32), seconds=0.5, tokens_a_row=128),
    lengths=dict(prompt=(24, 0.5, 4, 64), new=(12, 0.5, 2, 32)),
    gap=dict(rows=2, context=16, prompt=128, arrivals=2, apart=2, before=4),
    waiting=dict(counts=(8, 400), prefix=512, rows=4),
)


# ---- rate


def rate(shapes: LlamaShapes, sizes: Record, peers: dict[Any, Record]) -> Iterator[Record]:
    """Three records a case: the engine, its decode program, and the torch loop."""
    for rows, context in sizes["cases"]:
        case = dict(part="rate", rows=rows, context=context, decode_steps=STEPS, **shapes.name)
        ours, program = _steady(shapes, sizes, rows, context)
        alone = dict(tokens_per_s=rows * STEPS / program, visit_s=program)
        beside: list[Record] = [dict(case=case, system=PROGRAM, **alone)]
        found = peers.get((rows, context))
        if found is not None and "error" in found:
            beside.append(dict(case=case, system=TORCH, error=found["error"]))
        elif found is not None:
            times = spread(found.pop("seconds"))
            step = times["median_s"]
            beside.append(dict(case=case, system=TORCH, tokens_per_s=rows / step, **times, **found))
        for record in beside:
            if "tokens_per_s" in record:
                ours[f"of {record['system']}"] = ours["tokens_per_s"] / record["tokens_per_s"]
        yield dict(case=case, system=OURS, **ours)
        yield from beside


def _steady(shapes: LlamaShapes, sizes: Record, rows: int, context: int) -> tuple[Record, float]:
    """The engine's figures over a window, and seconds of a launch of its program.

    The program runs first, from the lengths at which the engine goes on then.
    """
    chunk = sizes["prefill"]["prefill_chunk"]
    warm = -(-context // chunk) + SETTLE + 4
    new = STEPS * (2 * warm + 2 * sizes["visits"] + 16)
    prefill = sizes["prefill"] | dict(prefill_tokens=max(rows, 4) * chunk)  # all rows in one visit
    longest = context + new
    engine = make_engine(
        shapes, tokens=rows * longest, longest=longest, max_rows=rows, decode_steps=STEPS, **prefill
    )
    watch = Watch(engine)
    ids = [submit(engine, each, new) for each in prompts(shapes, [context] * rows)]
    decode_until(watch, ids, SETTLE)
    program = program_seconds(engine, sizes["visits"])
    visits = list(watch.visits)
    decode_until(watch := Watch(engine), ids, SETTLE)
    visits += watch.visits
    delivered = [e.request_id for visit in visits for e in visit.events if e.token is not None]
    lengths = [context + delivered.count(i) for i in ids]
    start, before = watch.visits[-1].end, _times(engine)
    window = watch.steps(sizes["visits"])
    after = _times(engine)
    if any(visit.ended for visit in window):
        raise RuntimeError("a row ended while the rate was measured")
    seconds, tokens = window[-1].end - start, sum(visit.read for visit in window)
    ours = dict(
        tokens_per_s=tokens / seconds,
        tokens=tokens,
        window_s=seconds,
        visits=len(window),
        row_tokens_at_start=[min(lengths), max(lengths)],  # of the torch loop: context + LEAD + 8
        **_visit_seconds(start, window),
        host_s_per_visit=(after[1] - before[1] - after[2] + before[2]) / (after[0] - before[0]),
    )
    if jax.default_backend() == "gpu":
        ours |= _idle(watch)
    drain(engine, ids)
    return ours, program


def _idle(watch: Watch) -> Record:
    """What a profile of a few visits says of the device: how much of the time it did nothing.

    `visit_gaps_part` is of the longest gaps, one for each visit: no more than what lies between
    visits.
    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            watch.steps(2)  # it stops the host to begin, and then the device
            start = time.perf_counter()
            visits = len(watch.steps(4))
            seconds = time.perf_counter() - start
        gaps = sorted(device_gaps(folder, seconds))
    longest = sum(gaps[-visits:])
    return dict(
        idle_part=sum(gaps) / seconds,
        visit_gaps_part=longest / seconds,
        longest_gap_s=gaps[-1],
        profiled_visit_s=seconds / visits,
    )


def _times(engine: Engine) -> tuple[float, float, float]:
    """Visits, seconds in them, and seconds blocked for the device, since the engine was made."""
    stats: Any = engine.stats
    return stats.visits, stats.visit_seconds, stats.wait_seconds


def _visit_seconds(start: float, window: list[Visit]) -> Record:
    """From delivery to delivery."""
    ends = [start, *(visit.end for visit in window)]
    return spread([b - a for a, b in zip(ends, ends[1:], strict=False)])


def program_seconds(engine: Engine, launches: int) -> float:
    """Seconds of one launch of the engine's own decode program, for the rows that decode now.

    Pages for all launches are prepared in advance; each launch takes its tokens and lengths from
    the one before, on the device; the host waits only after the last one. Afterwards the engine
    computes the last pages of its rows again, and goes on from where it was.
    """
    engine.loop.collect()
    rows, runner = list(engine.scheduler.running), engine.runner
    grown = Growth.of(rows, STEPS * (launches + 1), engine.allocator)
    grown = grown._replace(budgets=np.full(len(rows), STEPS))
    plan = decode_plan(0, grown, (), grown.taken.tables)
    runner.wait(runner.decode(plan).out)
    nothing = Taken.total([], len(plan.tables))
    plan = plan._replace(copies=nothing.copies, tables=nothing.tables)
    start = time.perf_counter()
    tickets = [runner.decode(plan) for _ in range(launches)]
    runner.wait(tickets[-1].out)
    seconds = (time.perf_counter() - start) / launches
    engine.loop.discard()
    return seconds


# ---- host


def host(shapes: LlamaShapes, sizes: Record) -> Iterator[Record]:
    """Host work of a visit in steady decode."""
    for rows in sizes["host"]["rows"]:
        context, visits = sizes["host"]["context"], sizes["host"]["visits"]
        chunk = sizes["prefill"]["prefill_chunk"]
        new = STEPS * (-(-context // chunk) + SETTLE + 4 + visits)
        longest = context + new
        prefill = sizes["prefill"] | dict(prefill_tokens=max(rows, 4) * chunk)
        engine = make_engine(
            shapes,
            tokens=rows * longest,
            longest=longest,
            max_rows=rows,
            decode_steps=STEPS,
            **prefill,
        )
        watch = Watch(engine)
        ids = [submit(engine, each, new) for each in prompts(shapes, [context] * rows)]
        decode_until(watch, ids, SETTLE)
        window = watch.steps(visits)
        if any(visit.ended for visit in window):
            raise RuntimeError("a row ended while the host was measured")
        drain(engine, ids)
        yield dict(
            case=dict(part="host", rows=rows, context=context, decode_steps=STEPS, **shapes.name),
            system=OURS,
            **spread(visit.host for visit in window),
            p90_s=quantile((visit.host for visit in window), 0.9),
            visit_median_s=middle(window, "seconds"),
            wait_median_s=middle(window, "wait"),
            tokens_per_visit=statistics.median(visit.read for visit in window),
        )


# ---- arrivals


def arrivals(shapes: LlamaShapes, sizes: Record) -> Iterator[Record]:
    """Every rate of arrivals on an engine of every size."""
    about = sizes["arrivals"]
    longest = sizes["lengths"]["prompt"][3] + sizes["lengths"]["new"][3]
    for max_rows in about["max_rows"]:
        engine = make_engine(
            shapes,
            tokens=max(max_rows * about["tokens_a_row"], 2 * longest),
            longest=longest,
            max_rows=max_rows,
            row_buckets=tuple(b for b in (16, 64) if b < max_rows) + (max_rows,),
            decode_steps=STEPS,
            **sizes["prefill"],
        )
        for per_second in about["rates"]:
            requests = _requests(shapes, sizes, per_second)
            case = dict(part="arrivals", max_rows=max_rows, requests_per_s=per_second)
            case |= dict(requests=len(requests), decode_steps=STEPS, **shapes.name)
            yield dict(case=case, system=OURS, **_offered(engine, requests))
        engine = None
        gc.collect()


def _requests(
    shapes: LlamaShapes, sizes: Record, per_second: float
) -> list[tuple[float, list[int], int]]:
    """When each comes, its prompt, and how many tokens it asks for."""
    rng = np.random.default_rng(0)
    count = max(int(per_second * sizes["arrivals"]["seconds"]), 2)
    times = np.cumsum(rng.exponential(1 / per_second, count))

    def lengths(median: float, sigma: float, least: int, most: int) -> list[int]:
        drawn = rng.lognormal(np.log(median), sigma, count)
        return np.clip(drawn, least, most).astype(int).tolist()

    asked, new = (lengths(*sizes["lengths"][name]) for name in ("prompt", "new"))
    seed = int(per_second * 1000)  # no prompt of another rate is met again in the prefix cache
    return list(zip(times.tolist(), prompts(shapes, asked, seed), new, strict=True))


def _offered(engine: Engine, requests: list[tuple[float, list[int], int]]) -> Record:
    """Submit each request when its time has come, until all have ended."""
    watch, arrived, coming = Watch(engine), {}, list(reversed(requests))
    start = time.perf_counter()
    while coming or not engine.idle:
        while coming and start + coming[-1][0] <= time.perf_counter():
            at, prompt, new = coming.pop()
            arrived[submit(engine, prompt, new)] = start + at
        if engine.idle:
            time.sleep(max(start + coming[-1][0] - time.perf_counter(), 0))
        else:
            watch.step()
    first = [watch.delivered[i][0][0] - at for i, at in arrived.items()]
    per_token, gaps = [], []
    for deliveries in watch.delivered.values():
        times = [end for end, _ in deliveries]
        gaps += [b - a for a, b in zip(times, times[1:], strict=False)]
        after = sum(count for _, count in deliveries[1:])
        per_token += [(times[-1] - times[0]) / after] if after else []
    seconds = watch.visits[-1].end - start
    tokens = sum(visit.read for visit in watch.visits)
    found: Record = dict(tokens_per_s=tokens / seconds, tokens=tokens, seconds=seconds)
    for name, values in dict(first_token=first, gap=gaps, per_token=per_token).items():
        for label, part in (("median", 0.5), ("p99", 0.99)):
            found[f"{name}_{label}_s"] = quantile(values, part) if values else None
    return found


# ---- gap


def gap(shapes: LlamaShapes, sizes: Record) -> Iterator[Record]:
    """Rows decode; long prompts arrive."""
    about = sizes["gap"]
    rows, context, long = about["rows"], about["context"], about["prompt"]
    engine, new = _gap_engine(shapes, sizes)
    alone = _last_budget_seconds(shapes, sizes, engine, long)
    watch = Watch(engine)
    ids = [submit(engine, each, new) for each in prompts(shapes, [context] * rows)]
    decode_until(watch, ids, SETTLE)
    calm = _visit_seconds(watch.visits[-1].end, watch.steps(about["before"]))
    since = watch.visits[-1].end
    coming = []
    for prompt in prompts(shapes, [long] * about["arrivals"], seed=1):
        coming.append(submit(engine, prompt, 1))
        watch.steps(about["apart"])
    watch.until(lambda: set(coming) <= watch.delivered.keys())
    watch.steps(1)
    if any(e.finish_reason and e.request_id in ids for v in watch.visits for e in v.events):
        raise RuntimeError("a decoding row ended while prompts arrived")
    gaps = [each for i in ids for each in _gaps(watch, i, since)]
    drain(engine, ids)
    yield dict(
        case=dict(part="gap", **about, **sizes["prefill"], decode_steps=STEPS, **shapes.name),
        system=OURS,
        longest_gap_s=max(gaps),
        median_gap_s=statistics.median(gaps),
        visit_without_prefill_s=calm["median_s"],
        last_budget_s=alone,
        longest_over_both=max(gaps) / (calm["median_s"] + alone),
    )


def _gap_engine(shapes: LlamaShapes, sizes: Record) -> tuple[Engine, int]:
    """An engine, and how many tokens keep its rows decoding until the last prompt is in."""
    about = sizes["gap"]
    rows, context, long = about["rows"], about["context"], about["prompt"]
    chunk = sizes["prefill"]["prefill_chunk"]
    visits = (rows + about["arrivals"]) * -(-long // chunk) + about["before"] + 32
    new = STEPS * visits
    longest = max(context + new, long + 8 + STEPS)
    engine = make_engine(
        shapes,
        tokens=rows * (context + new) + about["arrivals"] * (long + 2 * STEPS),
        longest=longest,
        max_rows=rows + about["arrivals"],
        decode_steps=STEPS,
        **sizes["prefill"],
    )
    return engine, new


def _gaps(watch: Watch, request: int, since: float) -> list[float]:
    """Times between deliveries of a request, from the last one before `since`."""
    ends = [end for end, _ in watch.delivered[request]]
    return [b - a for a, b in zip(ends, ends[1:], strict=False) if b > since]


def _last_budget_seconds(shapes: LlamaShapes, sizes: Record, engine: Engine, long: int) -> float:
    """Seconds of the last budget of prefill: a prompt alone beside one that is so much shorter."""
    found, budget = [], sizes["prefill"]["prefill_tokens"]
    for length in (long, long - budget, long, long - budget):  # the first two also warm up
        watch, start = Watch(engine), time.perf_counter()
        (prompt,) = prompts(shapes, [length], seed=length + len(found))
        submit(engine, prompt, 1)
        watch.until(lambda: engine.idle)
        found.append(watch.visits[-1].end - start)
    return found[2] - found[3]


# ---- waiting


def waiting(shapes: LlamaShapes, sizes: Record) -> Iterator[Record]:
    """Requests that wait for a prefix which another request is computing."""
    about = sizes["waiting"]
    longest, medians = about["prefix"] + 64, {}
    for count in about["counts"]:
        rows, tokens = about["rows"], 2 * longest + about["rows"] * 64
        one_by_one = dict(prefill_rows=1, prefill_tokens=sizes["prefill"]["prefill_chunk"])
        shape = dict(max_rows=rows, decode_steps=STEPS, **sizes["prefill"]) | one_by_one
        engine = make_engine(shapes, tokens=tokens, longest=longest, **shape)
        watch = Watch(engine)
        prefix, *tails = prompts(shapes, [about["prefix"]] + [16] * (1 + count))
        ids = [submit(engine, prefix + tails[0], STEPS)]
        watch.steps(1)
        ids += [submit(engine, prefix + tail, STEPS) for tail in tails[1:]]
        watch.steps(1)  # it meets the newcomers for the first time
        first = watch.visits[-1].host
        head, done = ids[0], watch.delivered
        # The last ones admit those that waited.
        window = watch.until(lambda head=head, done=done: head in done)[:-3]
        if len(window) < 3:
            raise RuntimeError("the prefix was computed in too few visits to measure one")
        medians[count] = middle(window, "host")
        drain(engine, ids)
        case = dict(part="waiting", waiting=count, prefix=about["prefix"], max_rows=about["rows"])
        yield dict(
            case=case | shapes.name,
            system=OURS,
            **spread(visit.host for visit in window),
            visits=len(window),
            first_visit_s=first,
            ratio_to_fewest=medians[count] / medians[min(medians)],
        )


# ---- all of them


PARTS = dict(host=host, arrivals=arrivals, gap=gap, waiting=waiting)


def measure(parts: list[str], small: bool, torch: bool) -> Iterator[Record]:
    """The records of the parts. The torch loop runs before this process touches the device."""
    sizes, peers = SMALL if small else FULL, {}
    if "rate" in parts and torch and not small:
        for rows, context in sizes["cases"]:
            found = measure_torch_loop(rows, context + LEAD, STEPS * sizes["visits"])
            peers[rows, context] = found
    if "host" in parts:
        yield from host(llama_shapes(sizes["host"]["layers"], small=small), sizes)
        gc.collect()
    if not set(parts) - {"host"}:
        return
    shapes = llama_shapes(small=small)
    for part in (part for part in parts if part != "host"):
        yield from rate(shapes, sizes, peers) if part == "rate" else PARTS[part](shapes, sizes)
        gc.collect()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    every = ["rate", *PARTS]
    parser.add_argument("--parts", nargs="+", choices=every, default=every)
    parser.add_argument("--small", action="store_true", help="tiny shapes, no torch")
    parser.add_argument("--no-torch", action="store_true", help="leave the torch loop out")
    parser.add_argument("--name", help="of the result file: engine, or engine_small")
    args = parser.parse_args()
    name, records = args.name or ("engine_small" if args.small else "engine"), []
    path = None
    for record in measure(args.parts, args.small, not args.no_torch):
        records.append(record)
        print(record, flush=True)
        path = write_result(  # after each: a run that is cut off keeps what it has
            name,
            records,
            command=" ".join(["python", *sys.argv]),
            device=None if jax.default_backend() == "cpu" else jax.devices()[0].device_kind,
        )
    if path is None:
        sys.exit("nothing was measured")
    plot(records, path.with_suffix(".png"))
    print(path)
    worst = [r["ratio_to_fewest"] for r in records if "ratio_to_fewest" in r]
    if worst and max(worst) > MOST_WAITING_RATIO:
        sys.exit(f"a visit with many waiting takes {max(worst):.1f} times one with few")


if __name__ == "__main__":
    main()
