"""Generate with a model of your own, or one that is fetched, through a paged cache.

    python examples/generate.py "Why is the sky blue?" "Name three rivers."
    python examples/generate.py --model gemma3-270m "The sea is"
    python examples/generate.py --model ~/Qwen3-0.6B --dtype bfloat16 --ids-file in.json
    python examples/generate.py --ids-file in.json --max-new 64 --top-logits 5 --json out.json

An ids file is `[{"name": ..., "prompt_ids": [...]}, ...]`; the result has per case `name`,
`greedy_ids`, `finish_reason` and, with --top-logits K, `last_prompt_topK`: [[id, logit], ...], of
the first token, and `final_step_topK`, of the last.
An answer ends at the tokens that the model was made for, its prompt's included ("capacity").
A model is a checkpoint's folder (config.json, safetensors), a GGUF file, or the name of one that is
fetched once and checked by its hash. Gemma has terms of use, which you are shown and must accept. A
model without a chat template continues the prompts.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import jax
import weights

from paged_decode import (
    BlockAllocator,
    Completion,
    DeviceSum,
    Engine,
    EngineConfig,
    KVCache,
    SamplingParams,
)
from paged_decode._optional import needs
from paged_decode.engine.events import gather
from paged_decode.errors import PagedDecodeError
from paged_decode.policies import GroupPages
from paged_decode.tiers import HostTier

with needs("examples", or_exit=True):
    from models import decoder, parallel, tokenizer


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("prompt", nargs="*", help="texts to answer, as chat turns, or to continue")
    parser.add_argument(
        "--ids-file", type=Path, help="prompts as token ids; EOS does not stop them"
    )
    parser.add_argument(
        "--model",
        default="smollm2",
        metavar=f"DIR|FILE.gguf|{'|'.join(weights.RELEASES)}",
        help="default: smollm2",
    )
    parser.add_argument("--accept-terms", action="store_true", help="of use, of --model")
    parser.add_argument("--max-new", type=int, default=64, help="tokens to generate")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument(
        "--pages-dtype",
        choices=["float32", "bfloat16", "float16", "int8", "float8_e4m3fn"],
        help="of keys and values; default: --dtype",
    )
    parser.add_argument("--devices", type=int, default=1, help="split the model over so many")
    parser.add_argument("--page-size", type=int, default=16, help="tokens per page, a power of two")
    parser.add_argument("--num-pages", type=int, help="pages in the pool; default: all fit at once")
    parser.add_argument("--window-pages", type=int, help="the same of layers that see a window")
    parser.add_argument("--host-pages", type=int, help="pages in host memory for those preempted")
    parser.add_argument(
        "--snapshot-at",
        nargs=2,
        metavar=("TOKENS", "FILE"),
        help="after so many, save to a file and go on from it in an engine of its own",
    )
    parser.add_argument("--max-rows", type=int, default=8, help="sequences that run at once")
    parser.add_argument("--decode-steps", type=int, default=8, help="tokens per host visit")
    parser.add_argument("--prefill-chunk", type=int, default=128, help="prompt tokens per visit")
    parser.add_argument(
        "--prefix-cache",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="share the pages of equal beginnings",
    )
    order = parser.add_mutually_exclusive_group()
    order.add_argument("--together", action="store_true", help="one continuous batch (default)")
    order.add_argument("--one-by-one", action="store_true", help="one prompt after the other")
    parser.add_argument("--top-logits", type=int, default=0, help="report the K largest logits")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the result here instead of printing text")
    args = parser.parse_args()
    if bool(args.prompt) == bool(args.ids_file):
        parser.error("give either prompts or --ids-file")
    if args.devices < 1:
        parser.error(f"--devices: expected at least 1, got {args.devices}")
    return args


def read_ids(path: Path) -> list[dict]:
    """The cases of an ids file, checked."""
    try:
        cases = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(cases, list) or not all(
        isinstance(c, dict) and {"name", "prompt_ids"} <= c.keys() for c in cases
    ):
        raise ValueError(f'{path} must hold [{{"name": ..., "prompt_ids": [...]}}, ...]')
    if not cases:
        raise ValueError(f"{path} must hold at least one case")
    return cases


class Engines:
    """Engines of one model and one set of weights, each with a pool of its own."""

    def __init__(self, args: argparse.Namespace, prompts: list[list[int]], path: Path):
        self.args = args
        mesh = parallel.make_mesh(args.devices) if args.devices != 1 else None
        self.config, self.params = decoder.load(path, args.dtype, mesh=mesh, shown=weights.progress)
        sums: DeviceSum | None = None
        if mesh is not None:
            sums = DeviceSum(mesh, parallel.AXIS, width=self.config.width, dtype=args.dtype)
        self.model = decoder.make_model(self.config, mesh=mesh, sums=sums)
        self.where: dict[str, Any] = dict(mesh=mesh, head_axis=parallel.AXIS) if mesh else {}
        most = self.config.max_positions
        if (longest := max(map(len, prompts))) >= most:
            raise ValueError(
                f"expected prompts and answers of at most {most} tokens, for which the model was "
                f"made, got a prompt of {longest}"
            )
        self.totals = [min(len(prompt) + args.max_new, most) for prompt in prompts]
        needed = sum(-(-tokens // args.page_size) for tokens in self.totals)
        self.num_pages = args.num_pages or needed + 1
        rows = 1 if args.one_by_one else min(args.max_rows, len(prompts))
        self.shapes = EngineConfig(
            max_rows=rows,
            row_buckets=(rows,),
            chunk_buckets=(16, args.prefill_chunk) if args.prefill_chunk > 16 else (),
            decode_steps=args.decode_steps,
            prefill_chunk=args.prefill_chunk,
            max_sequence_tokens=min(max(self.totals), (self.num_pages - 1) * args.page_size),
            top_logits=args.top_logits,
            vocab_size=self.config.vocab_size,
        )

    def window_pages(self) -> int | None:
        """What all rows need at once of a pool for a window, unless the user says otherwise."""
        if self.config.sliding_window is None or self.args.window_pages:
            return self.args.window_pages
        window, ahead = self.config.sliding_window, self.shapes.tokens_ahead
        pool = GroupPages(self.args.page_size, 0, window, ahead, ahead)
        most = sorted(map(pool.pages_for, self.totals))[-self.shapes.max_rows :]
        return min(sum(most) + 1, self.num_pages)

    def make(self) -> Engine:
        args = self.args
        layout = decoder.layout(
            self.config,
            page_size=args.page_size,
            num_pages=self.num_pages,
            window_pages=self.window_pages(),
            dtype=args.pages_dtype or args.dtype,
        )
        if args.window_pages and len(layout.groups) == 1:
            raise ValueError("the layers of this model have one pool: leave out --window-pages")
        cache = KVCache.create(layout=layout, **self.where)
        allocator = BlockAllocator(layout, prefix_cache=args.prefix_cache)
        tier = HostTier(args.host_pages) if args.host_pages else None
        return Engine(self.model, self.params, cache, allocator, self.shapes, tier=tier)


def answer(
    engines: Engines, prompts: list[list[int]], sampling: SamplingParams
) -> tuple[list[Completion], Engine]:
    """What is said to the prompts, and the engine that said the end of it."""
    engine = engines.make()
    if engines.args.snapshot_at is None:
        return engine.generate(prompts, sampling), engine
    tokens, path = engines.args.snapshot_at
    for prompt in prompts:
        engine.submit(prompt, sampling)
    events = []
    while not engine.idle and len(events) < int(tokens):
        events += engine.step()
    engine.save(path)
    engine = engines.make()  # the other one's pages are given up
    engine.restore(path)
    return gather([*events, *engine.stream()]), engine


def report(engine: Engine) -> str:
    stats, allocator = engine.stats, engine.allocator
    used = ", ".join(
        f"{allocator.stats(group).peak_used} of {num_pages - 1} pages"
        + (f" for windows of {window}" if window else "")
        for group, (num_pages, window) in enumerate(allocator.pools)
    )
    back = f", {stats.swapped_in_pages} back from the host" if engine.tier is not None else ""
    return (
        f"{stats.prefill_tokens} tokens prefilled ({stats.prefix_hit_tokens} found in the prefix "
        f"cache), {stats.decode_tokens} generated, {stats.preemptions} preemptions, {used} "
        f"used at most{back}"
    )


def main() -> None:
    args = arguments()
    if args.devices > 1:  # only a CPU obeys: one process then shows as many devices
        jax.config.update("jax_num_cpu_devices", args.devices)
    cases = read_ids(args.ids_file) if args.ids_file else []
    path = weights.find(args.model, accept_terms=args.accept_terms)
    words, stop = None, ()
    if not cases:
        words = tokenizer.load(path)
        encode = words.encode_chat if words.chats else words.encode
        cases = [{"name": p, "prompt_ids": encode(p)} for p in args.prompt]
        stop = words.eos_ids
    prompts = [case["prompt_ids"] for case in cases]
    sampling = SamplingParams(
        max_new_tokens=args.max_new,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
        stop_tokens=stop,
    )
    done, engine = answer(Engines(args, prompts, path), prompts, sampling)
    print(report(engine), file=sys.stderr)
    results = []
    for case, completion in zip(cases, done, strict=True):
        result = {
            "name": case["name"],
            "greedy_ids": list(completion.tokens),
            "finish_reason": completion.finish_reason,
        }
        if args.top_logits:
            every = completion.top_logits or ((),)
            result[f"last_prompt_top{args.top_logits}"] = every[0]
            result[f"final_step_top{args.top_logits}"] = every[-1]
        results.append(result)
        if words is not None:
            print(f"> {case['name']}\n{words.decode(completion.tokens)}\n")
        if completion.finish_reason == "invalid_logits":
            print(f"{case['name']}: the model gave no valid logits", file=sys.stderr)
        if completion.finish_reason == "capacity":
            print(
                f"{case['name']}: ends with {len(case['prompt_ids']) + len(completion.tokens)} "
                "tokens, its prompt's included: the model or the pool is for no more",
                file=sys.stderr,
            )
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")
    elif words is None:
        print(json.dumps(results))


if __name__ == "__main__":
    jax.config.update("jax_default_matmul_precision", "highest")
    expected = (PagedDecodeError, weights.WeightsError, NotImplementedError, TypeError)
    expected += (ValueError, OSError)
    try:
        main()
    except expected as error:
        sys.exit(f"generate.py: {type(error).__name__}: {error}")
