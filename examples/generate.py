"""Generate with a Llama-family GGUF model through a paged cache.

    python examples/generate.py "Why is the sky blue?" "Name three rivers."
    python examples/generate.py --ids-file in.json --max-new 64 --top-logits 5 --json out.json

An ids file is `[{"name": ..., "prompt_ids": [...]}, ...]`; the result has per case `name`,
`greedy_ids`, `finish_reason` and, with --top-logits K, `last_prompt_topK`: [[id, logit], ...].
Without --gguf, SmolLM2-135M-Instruct is fetched once and checked by its hash.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import jax
from models import decoder, parallel, tokenizer, weights

from paged_decode import BlockAllocator, Engine, EngineConfig, KVCache, SamplingParams
from paged_decode.errors import PagedDecodeError


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("prompt", nargs="*", help="texts to answer, as chat turns")
    parser.add_argument(
        "--ids-file", type=Path, help="prompts as token ids; EOS does not stop them"
    )
    parser.add_argument("--gguf", type=Path, help="your own model file of the Llama family")
    parser.add_argument("--max-new", type=int, default=64, help="tokens to generate")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--devices", type=int, default=1, help="split the model over so many")
    parser.add_argument("--page-size", type=int, default=16, help="tokens per page, a power of two")
    parser.add_argument("--num-pages", type=int, help="pages in the pool; default: all fit at once")
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


def make_engine(args: argparse.Namespace, prompts: list[list[int]], path: Path) -> Engine:
    config, params = decoder.load(path, dtype=args.dtype)
    model = decoder.make_model(config)
    where: dict[str, Any] = {}
    if args.devices != 1:
        mesh = parallel.make_mesh(args.devices)
        model = parallel.make_parallel_model(config, params, mesh)
        params = parallel.split_params(config, params, mesh)
        where = dict(mesh=mesh, head_axis=parallel.AXIS)
    longest = max(map(len, prompts)) + args.max_new
    needed = sum(-(-(len(p) + args.max_new) // args.page_size) for p in prompts)
    num_pages = args.num_pages or needed + 1
    cache = KVCache.create(
        num_layers=config.num_layers,
        num_pages=num_pages,
        num_kv_heads=config.num_kv_heads,
        page_size=args.page_size,
        head_dim=config.head_dim,
        dtype=args.dtype,
        **where,
    )
    allocator = BlockAllocator(num_pages, args.page_size, prefix_cache=args.prefix_cache)
    rows = 1 if args.one_by_one else min(args.max_rows, len(prompts))
    shapes = EngineConfig(
        max_rows=rows,
        row_buckets=(rows,),
        chunk_buckets=(16, args.prefill_chunk) if args.prefill_chunk > 16 else (),
        decode_steps=args.decode_steps,
        prefill_chunk=args.prefill_chunk,
        max_sequence_tokens=min(longest, allocator.usable_pages * args.page_size),
        top_logits=args.top_logits,
        vocab_size=config.vocab_size,
    )
    return Engine(model, params, cache, allocator, shapes)


def main() -> None:
    args = arguments()
    if args.devices > 1:  # only a CPU obeys: one process then shows as many devices
        jax.config.update("jax_num_cpu_devices", args.devices)
    path = args.gguf or weights.fetch()
    words = None
    if args.ids_file:
        cases = read_ids(args.ids_file)
        stop: tuple[int, ...] = ()
    else:
        words = tokenizer.load(path)
        cases = [{"name": p, "prompt_ids": words.encode_chat(p)} for p in args.prompt]
        stop = (words.eos_id,)
    prompts = [case["prompt_ids"] for case in cases]
    sampling = SamplingParams(
        max_new_tokens=args.max_new,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
        stop_tokens=stop,
    )
    engine = make_engine(args, prompts, path)
    done = engine.generate(prompts, sampling)
    stats = engine.stats
    print(
        f"{stats.prefill_tokens} tokens prefilled ({stats.prefix_hit_tokens} found in the prefix "
        f"cache), {stats.decode_tokens} generated, {stats.preemptions} preemptions, "
        f"{stats.peak_used_pages} of {engine.allocator.usable_pages} pages used at most",
        file=sys.stderr,
    )
    results = []
    for case, completion in zip(cases, done, strict=True):
        result = {
            "name": case["name"],
            "greedy_ids": list(completion.tokens),
            "finish_reason": completion.finish_reason,
        }
        if args.top_logits:
            result[f"last_prompt_top{args.top_logits}"] = next(iter(completion.top_logits), ())
        results.append(result)
        if words is not None:
            print(f"> {case['name']}\n{words.decode(completion.tokens)}\n")
        if completion.finish_reason == "invalid_logits":
            print(f"{case['name']}: the model gave no valid logits", file=sys.stderr)
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
