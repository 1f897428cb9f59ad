"""The TPU kernel beside those in JAX's own tree, by what the compiler makes of them. No TPU runs.

A bundle is one instruction of the core, so bundles for a page are what the core has to do, besides
waiting, before that page is dealt with. Counted are the final bundles of the loop over blocks in
the middle of a row, all KV heads of a page together; see `Listing.steady` in `_tpu_aot.py`. With
T > 1 a block of queries passes over the pages, so the count for one of its queries is told, too.
Both peers copy whole blocks, valid or not; ours copies valid pages only.

    pip install 'paged-decode[tpu]' && python benchmarks/tpu_static.py
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

from _result import write_result
from _tpu_aot import GENERATIONS, Case, compile_all

SHAPES = {
    "32/8 heads of 128, page 16": Case(),
    "32/8 heads of 128, page 64": Case(page_size=64, columns=64, pages=1024),
    "32/4 heads of 128, page 16": Case(kv_heads=4, group=8),
    "8/1 heads of 128, page 16": Case(kv_heads=1, group=8),
    "32/8 heads of 128, page 16, T = 8": Case(tokens=8),
    "32/8 heads of 128, page 16, T = 256": Case(rows=1, tokens=256),
}
# The other generations get the first shape of every T.
EVERYWHERE = ("v5e", "v6e", "tpu7x")
FIRST = [name for name in SHAPES if name.startswith("32/8 heads of 128, page 16")]
# Tokens of a block of keys and queries of a block that the ragged kernel is given. Its largest ones
# for a chunk do not fit the memory of every chip.
RAGGED = {1: [(256, 1), (256, 8)], 8: [(256, 8), (512, 8)]}
CHUNK = [(512, 32), (512, 64), (1024, 128)]


def systems(case: Case) -> dict[str, Case]:
    """Ours, and the peers with blocks near their best."""
    found = {"paged-decode/pallas_tpu": case}
    if case.tokens == 1:
        block = dict(pages=512 // case.page_size)
        found["jax/paged_attention"] = replace(case, system="jax/paged", block=block)
    for tokens, queries in RAGGED.get(case.tokens, CHUNK):
        name = f"jax/ragged_paged_attention, {tokens} tokens and {queries} queries a block"
        block = dict(pages=tokens // case.page_size, queries=queries)
        found[name] = replace(case, system="jax/ragged", block=block)
    return found


def records(generation: str) -> list[dict[str, Any]]:
    """Every system on every shape that this generation gets."""
    shapes = {
        name: shape for name, shape in SHAPES.items() if generation in EVERYWHERE or name in FIRST
    }
    cases = {
        (name, system): case
        for name, shape in shapes.items()
        for system, case in systems(shape).items()
    }
    answers = compile_all(generation, list(cases.values()))
    found = []
    for ((name, system), case), answer in zip(cases.items(), answers, strict=True):
        kept = ("bundles_per_page", "bundles", "spills", "temp_bytes", "error")
        if "error" in answer:
            answer = dict(error=answer["error"].splitlines()[0])
        pages, tile, _, _, queries = answer.get("block") or (0, 0, 0, 0, 0)
        block = case.block or dict(pages=pages, tile=tile, queries=queries)
        sizes = dict(generation=generation, shape=name, dtype=case.dtype, tokens=case.tokens)
        record = dict(case=sizes, system=system, block=block)
        record |= {key: answer[key] for key in kept if key in answer}
        if "bundles_per_page" in answer and case.tokens > 1:
            per_query = answer["bundles_per_page"] / block["queries"]
            record["bundles_per_page_and_query"] = per_query
        found.append(record)
        told = answer.get("bundles_per_page", answer.get("error"))
        print(generation, name, system, told, flush=True)
    return found


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    found = [record for generation in GENERATIONS for record in records(generation)]
    path = write_result(
        "tpu_static",
        found,
        command="python benchmarks/tpu_static.py",
        device="none: compiled for TPU v4, v5e, v5p, v6e and 7x",
        packages=("jax", "jaxlib", "libtpu"),
    )
    print(path)


if __name__ == "__main__":
    main()
