"""A real model in a pool that is too small: recompute, swap, and the same words in the end.

    python examples/pressure.py
    paged-decode pressure run tree --limit 8 --rate 4 --num-pages 200 \
        --engine examples/pressure.py:make_engine
"""

import time
from typing import Any

import weights
from models import decoder

from paged_decode import BlockAllocator, Engine, EngineConfig, KVCache, SamplingParams
from paged_decode.policies import Recompute, Swap
from paged_decode.tiers import HostTier

PROMPT, PROMPTS, ANSWER = 40, 6, 48  # tokens, how many, tokens


def make_engine(num_pages, page_size=16, *, eviction=None, gguf=None, **policies):
    """SmolLM2-135M on a pool of so many pages, the null page included.

    `paged-decode pressure run` calls it with num_pages, page_size and eviction.
    """
    config, params = decoder.load(gguf or weights.fetch(), dtype="float32")
    cache = KVCache.create(
        num_layers=config.num_layers,
        num_pages=num_pages,
        num_kv_heads=config.num_kv_heads,
        page_size=page_size,
        head_dim=config.head_dim,
    )
    allocator = BlockAllocator(num_pages, page_size, eviction=eviction)
    shapes = EngineConfig(
        max_rows=8,
        row_buckets=(8,),
        prefill_chunk=64,
        max_sequence_tokens=min(config.max_positions, allocator.usable_pages * page_size),
        vocab_size=config.vocab_size,
    )
    return Engine(decoder.make_model(config), params, cache, allocator, shapes, **policies)


def main():
    prompts = [[1000 * i + j for j in range(PROMPT)] for i in range(1, PROMPTS + 1)]
    sampling, answers = SamplingParams(max_new_tokens=ANSWER), []
    ways: list[tuple[str, int, dict[str, Any]]] = [
        ("ample memory", 64, dict()),
        ("recompute", 16, dict(preemption=Recompute())),
        ("swap", 16, dict(preemption=Swap(), tier=HostTier(64))),
    ]
    for name, num_pages, policies in ways:
        engine = make_engine(num_pages, **policies)
        engine.warmup()
        start = time.perf_counter()
        answers.append([c.tokens for c in engine.generate(prompts, sampling)])
        stats = engine.stats
        print(
            f"{name:<13} {time.perf_counter() - start:5.1f} s, {stats.preemptions} preemptions, "
            f"{stats.recomputed_tokens} tokens computed again, "
            f"{stats.swapped_in_pages} pages from the host"
        )
    if any(answer != answers[0] for answer in answers):
        raise SystemExit("the words differ")
    print("the words are the same")


if __name__ == "__main__":
    main()
