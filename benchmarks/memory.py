"""Pages and bytes that long rows hold: one group, two groups, and one pool of equal pages.

    python benchmarks/memory.py

16 rows of 32768 tokens go through the real allocator: prompts in chunks of 512, one chunk of each
row by turns, so that all are in flight at once, then 64 steps of decode. Pages are counted by
`stats(group)`, and the pools are those that `plan_layout` names, without room for cached tails. The
floor is what the layers see: all tokens in some, the window in the others.

What one pool of equal pages for all groups would hold is computed by vLLM's rule
(`_get_kv_cache_groups_uniform_page_size` in `vllm/v1/core/kv_cache_utils.py`), not measured: groups
have as many layers as the fewest of a kind, or as the most where these are less than 1.5 times as
many; the last group of a kind is filled up with layers that do not exist; each group has a page
table of its own. Its rows are given the pages that ours held.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from _result import write_result

from paged_decode.allocator import BlockAllocator
from paged_decode.planning import ModelShape, Plan, plan_layout

ROWS, TOKENS, CHUNK, STEPS, PAGE_SIZE = 16, 32768, 512, 64, 16
MODELS = (  # heads, windows and layers of their published configurations
    ModelShape.of_sizes(
        18, num_kv_heads=1, head_dim=256, window=512, full_every=6, name="Gemma 3 270M"
    ),
    ModelShape.of_sizes(
        62, num_kv_heads=16, head_dim=128, window=1024, full_every=6, name="Gemma 3 27B"
    ),
    ModelShape.of_sizes(
        24, num_kv_heads=8, head_dim=64, window=128, full_every=2, name="gpt-oss-20b"
    ),
)


def one_group(model: ModelShape) -> ModelShape:
    """The same model, as if all its layers saw all tokens."""
    shape = model.layers[0]
    return ModelShape.of_sizes(
        len(model.layers), num_kv_heads=shape.num_kv_heads, head_dim=shape.head_dim, name=model.name
    )


def planned(model: ModelShape) -> Plan:
    return plan_layout(
        model,
        rows=ROWS,
        context=TOKENS,
        page_size=PAGE_SIZE,
        tokens_in_flight=CHUNK,
        cached_tails=0,
    )


def run(plan: Plan) -> tuple[list[int], list[int]]:
    """Pages of every group that the rows hold at the end, and the most that they ever held."""
    allocator, rng = BlockAllocator(plan.layout), np.random.default_rng(0)
    prompt = TOKENS - STEPS
    handles = [
        allocator.allocate(rng.integers(0, 30_000, prompt), chunk=CHUNK) for _ in range(ROWS)
    ]
    for begin in range(0, prompt, CHUNK):
        for handle in handles:
            end = min(begin + CHUNK, prompt)
            allocator.batch([handle], begin, end, tokens_per_row=CHUNK)
            allocator.commit([handle], [end])
            allocator.prepare([handle], min(end + CHUNK, prompt))
    for _ in range(STEPS):
        allocator.advance(handles, rng.integers(0, 30_000, ROWS), commit=True)
    allocator.check_invariants()
    stats = [allocator.stats(group) for group in range(len(plan.layout.groups))]
    return [each.used for each in stats], [each.peak_used for each in stats]


def equal_pages(plan: Plan, pages: list[int]) -> dict[str, Any]:
    """What the same rows hold by the rule, which are given these pages of each kind of layers."""
    counts = [len(group.layers) for group in plan.layout.groups]
    size = max(counts) if max(counts) < 1.5 * min(counts) else min(counts)
    groups = [-(-count // size) for count in counts]
    layer_bytes = plan.token_bytes[0] // counts[0] * PAGE_SIZE  # heads are alike in all
    blocks = sum(each * count for each, count in zip(groups, pages, strict=True))
    return {
        "pages": blocks,
        "bytes": blocks * size * layer_bytes,
        "layers_of_a_group": size,
        "groups": sum(groups),
        "padding_layers": sum(groups) * size - sum(counts),
    }


def nbytes(plan: Plan, pages: list[int]) -> int:
    pairs = zip(plan.token_bytes, pages, strict=True)
    return sum(token_bytes * PAGE_SIZE * count for token_bytes, count in pairs)


def records() -> Iterator[dict[str, Any]]:
    for model in MODELS:
        case = dict(model=model.name, rows=ROWS, tokens=TOKENS, chunk=CHUNK, page_size=PAGE_SIZE)
        case |= dict(dtype="bfloat16", window=model.layers[0].window)
        two = planned(model)
        seen = [min(TOKENS, group.window or TOKENS) for group in two.layout.groups]
        floor = ROWS * sum(t * n for t, n in zip(two.token_bytes, seen, strict=True))
        yield dict(case=case, system="floor", bytes=floor)
        for name, plan in (("one group", planned(one_group(model))), ("two groups", two)):
            held, peak = run(plan)
            yield dict(
                case=case,
                system=f"paged-decode/{name}",
                layers=[len(group.layers) for group in plan.layout.groups],
                pages=held,
                bytes=nbytes(plan, held),
                peak_pages=peak,
                peak_bytes=nbytes(plan, peak),
                pool_pages=[group.num_pages for group in plan.layout.groups],
                pool_bytes=plan.nbytes,
                floor_bytes=floor,
            )
        rule, most = equal_pages(two, held), equal_pages(two, peak)
        yield dict(
            case=case,
            system="vLLM's rule, computed",
            peak_pages=most["pages"],
            peak_bytes=most["bytes"],
            floor_bytes=floor,
            **rule,
        )


def main() -> None:
    found = list(records())
    for record in found:
        over = record["bytes"] / record.get("floor_bytes", record["bytes"])
        name = f"{record['case']['model']}, {record['system']}"
        print(f"{name:44s} {record['bytes'] / 1e9:7.3f} GB {over:.3f}x {record.get('pages', '')}")
    path = write_result(
        "memory", found, command="python benchmarks/memory.py", packages=("numpy", "paged-decode")
    )
    print(path)


if __name__ == "__main__":
    main()
