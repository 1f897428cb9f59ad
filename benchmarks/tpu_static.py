"""The TPU kernel beside those in JAX's own tree, by what the compiler makes of them. No TPU runs.

A bundle is one instruction of the core, so bundles for a page are what the core has to do, besides
waiting, before that page is dealt with. Counted are the final bundles of the loop over blocks in
the middle of a row, all KV heads of a page together; see `Listing.steady` in `_tpu_aot.py`. Both
peers copy whole blocks, valid or not; ours copies valid pages only.

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
}
EVERYWHERE = ("v5e", "v6e", "tpu7x")  # the other generations get the first shape


def systems(case: Case) -> dict[str, Case]:
    """Ours, and the peers with blocks near their best: larger ones gain nothing here."""
    pages = {tokens: tokens // case.page_size for tokens in (256, 512)}
    found = {"paged-decode/pallas_tpu": case}
    found["jax/paged_attention"] = replace(case, system="jax/paged", block=dict(pages=pages[512]))
    for queries in (1, 8):
        name = f"jax/ragged_paged_attention, {queries} queries a block"
        block = dict(pages=pages[256], queries=queries)
        found[name] = replace(case, system="jax/ragged", block=block)
    return found


def records(generation: str) -> list[dict[str, Any]]:
    """Every system on every shape that this generation gets."""
    shapes = SHAPES if generation in EVERYWHERE else dict(list(SHAPES.items())[:1])
    cases = {
        (name, system): case
        for name, shape in shapes.items()
        for system, case in systems(shape).items()
    }
    answers = compile_all(generation, list(cases.values()))
    found = []
    for ((name, system), case), answer in zip(cases.items(), answers, strict=True):
        kept = ("bundles_per_page", "bundles", "spills", "temp_bytes", "error")
        block = case.block or dict(pages=answer["block"][0], tile=answer["block"][1])
        found.append(
            dict(case=dict(generation=generation, shape=name, dtype=case.dtype), system=system)
            | dict(block=block)
            | {key: answer[key] for key in kept if key in answer}
        )
        print(generation, name, system, answer.get("bundles_per_page", answer.get("error")))
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
