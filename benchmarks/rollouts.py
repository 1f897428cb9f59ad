"""Rollouts through the engine: what shared prefixes gain, and what bits that no batch changes cost.

    python benchmarks/rollouts.py                # one GPU, about 80 s
    python benchmarks/rollouts.py --small        # tiny shapes on a CPU

P prompts of G samples each are submitted at once to an engine without options, to one with
`shared_prefix` and to one with `batch_invariant`. `prefill_s` is from the submission to the visit
in which every sample has a token, `median_s` the time of an output token of a row after that, over
rounds with prompts of their own. The model is the example's, with Llama-3.2-1B's shapes, or those
of Llama-3.1-8B (`--large`), fewer layers with `--layers`, and random weights.

For the engines with and without `batch_invariant` it then counts completions whose tokens and
log-probabilities have the same bits when requests are run alone (`alone`), when a conversation goes
on over pages that were found and over pages that are computed (`found`), and when what was drawn is
scored as a prompt (`scored`). The command fails if the first engine misses one.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import numpy as np
from _llama_shapes import LARGE, MEDIUM, LlamaShapes, llama_shapes
from _result import spread, write_result

from paged_decode import BlockAllocator, Completion, Engine, EngineConfig, KVCache, SamplingParams

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "examples"))
from models.decoder import make_model  # noqa: E402

PAGE = 16
ENGINES: dict[str, dict[str, Any]] = {
    "plain": {},
    "shared_prefix": dict(shared_prefix=512),
    "batch_invariant": dict(batch_invariant=True),
}


def make(shapes: LlamaShapes, args: argparse.Namespace, own: dict[str, Any]) -> Engine:
    """A compiled engine that holds all samples."""
    c, rows = shapes.config, args.prompts * args.samples
    longest = args.prefix + 2 * args.new + 8
    pages = 2 + args.prompts * (args.prefix // PAGE + 1) * 3 + rows * (2 * args.new // PAGE + 3)
    cache = KVCache.create(
        num_layers=c.num_layers, num_pages=pages, num_kv_heads=c.num_kv_heads, page_size=PAGE,
        head_dim=c.head_dim, dtype=shapes.dtype,
    )  # fmt: skip
    config = EngineConfig(
        max_rows=rows, row_buckets=(rows,), prefill_chunk=args.chunk, score_chunk=args.chunk,
        max_sequence_tokens=longest, **own,
    )  # fmt: skip
    score = make_model(c, every_token=True)
    allocator = BlockAllocator(pages, PAGE)
    engine = Engine(shapes.model, shapes.params, cache, allocator, config, score=score)
    engine.warmup()
    return engine


def prompts(shapes: LlamaShapes, count: int, length: int, seed: int) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, shapes.config.vocab_size, (count, length)).tolist()


def rollout(engine: Engine, asked: list[list[int]], samples: int, new: int) -> tuple[float, float]:
    """Seconds until every sample has a token, and of an output token of a row after that."""
    sampling = SamplingParams(max_new_tokens=new, temperature=1.0, seed=0, logprobs=0)
    begin, seen, read = time.perf_counter(), set(), 0
    for prompt in asked:
        engine.submit(prompt, sampling, n=samples)
    while len(seen) < len(asked) * samples:
        events = engine.step()
        seen |= {(event.request_id, event.sample) for event in events}
        read += len(events)
    first = time.perf_counter()
    while not engine.idle:
        engine.step()
    left = len(asked) * samples * new - read
    return first - begin, (time.perf_counter() - first) * len(asked) * samples / left


def bits(done: list[Completion]) -> list[tuple[Any, bytes]]:
    return [(each.tokens, np.array(each.logprobs, np.float32).tobytes()) for each in done]


def same_bits(engine: Engine, shapes: LlamaShapes, args: argparse.Namespace) -> dict[str, str]:
    """How many of the completions have the same bits, by what is different."""
    drawn = SamplingParams(max_new_tokens=args.new // 2, temperature=1.0, seed=7, logprobs=0)
    lengths = np.random.default_rng(5).integers(args.prefix // 8, args.prefix // 2, 4)
    asked = [prompts(shapes, 1, int(n), 50 + i)[0] for i, n in enumerate(lengths)]
    want = engine.generate(asked, drawn, n=2, cache_salt="among")
    alone: list[Completion] = []
    for prompt in asked:
        alone += engine.generate([prompt], drawn, n=2, cache_salt="alone")
    first = want[::2]
    texts = [[*prompt, *each.tokens] for prompt, each in zip(asked, first, strict=True)]
    goes_on = [[*text, 1, 2, 3] for text in texts]
    found = engine.generate(goes_on, drawn, cache_salt="among")
    computed = engine.generate(goes_on, drawn, cache_salt="fresh")
    scores = SamplingParams(max_new_tokens=1, prompt_logprobs=0)
    scored = [each.prompt_logprobs for each in engine.generate(texts, scores)]
    last = [np.array(s.logprobs[-args.new // 2 :], np.float32).tobytes() for s in scored if s]

    def count(a: list[Any], b: list[Any]) -> str:
        return f"{sum(x == y for x, y in zip(a, b, strict=True))} of {len(a)}"

    return {
        "alone": count(bits(want), bits(alone)),
        "found": count(bits(found), bits(computed)),
        "scored": count([b for _, b in bits(first)], last),
    }


def main() -> None:
    """Run the engines and store what they took."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--prefix", type=int, default=4096)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--chunk", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--name", default="rollouts", help="of the result file")
    args = parser.parse_args()
    if args.small:
        args.samples, args.prefix, args.new, args.chunk = 4, 256, 32, 64
    config = LARGE if args.large else MEDIUM
    shapes = llama_shapes(args.layers, small=args.small, config=config)
    records, wrong = [], []
    case = shapes.name | {
        name: getattr(args, name) for name in ("prompts", "samples", "prefix", "new", "chunk")
    }
    for name in args.engines:
        engine = make(shapes, args, ENGINES[name])
        took = []
        for round in range(args.rounds + 1):  # the first is not counted
            asked = prompts(shapes, args.prompts, args.prefix, round)
            took.append(rollout(engine, asked, args.samples, args.new))
        prefill, step = zip(*took[1:], strict=True)
        record: dict[str, Any] = dict(case=case, system=f"paged-decode/{name}", **spread(step))
        record |= dict(prefill_s=min(prefill))
        record |= dict(tokens_per_s=args.prompts * args.samples / record["median_s"])
        if name != "shared_prefix":
            record["same_bits"] = found = same_bits(engine, shapes, args)
            each = [text.split(" of ") for text in found.values()]
            if name == "batch_invariant" and any(a != b for a, b in each):
                wrong.append(found)
        records.append(record)
        print(
            f"{name:16} {record['median_s'] * 1e3:8.2f} ms a step, prefill "
            f"{record['prefill_s']:6.2f} s  {record.get('same_bits', '')}",
            flush=True,
        )
        del engine
        gc.collect()
    device = jax.devices()[0]
    kind = None if device.platform == "cpu" else device.device_kind
    command = " ".join(["python", *sys.argv])
    write_result(args.name, records, command=command, device=kind, packages=["jax", "jaxlib"])
    if wrong:
        raise SystemExit(f"batch_invariant has other bits: {wrong}")


if __name__ == "__main__":
    main()
