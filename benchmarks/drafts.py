"""Decoding of SmolLM2 with drafts that are looked up in the text, beside the same loop without.

    python benchmarks/drafts.py

Prompts and loop are those of `examples/speculative.py`, float32: each prompt alone, then all at
once. Both sides take turns, with compiled programs; times are seconds per token of the answers, the
host's part of every step included.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from _result import spread, write_result

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
import weights  # noqa: E402
from models import tokenizer  # noqa: E402
from speculative import PROMPTS, Run, Speaker, compare  # noqa: E402


def records(case: dict[str, Any], plain: Sequence[Run], drafted: Sequence[Run]) -> list[dict]:
    """One of each side; the tokens of all rounds must be the same on a side, the steps too."""
    found = []
    for system, runs in (("plain", plain), ("drafts", drafted)):
        first = runs[0]
        if any((run.tokens, run.steps) != (first.tokens, first.steps) for run in runs):
            raise RuntimeError(f"rounds of {case} with {system} differ")
        found.append(
            {
                "case": case,
                "system": f"paged-decode/{system}",
                **spread(run.seconds / run.total for run in runs),
                "tokens": first.total,
                "steps": first.steps,
                "offered": first.offered,
                "accepted": first.accepted,
                "tokens_equal": first.tokens == plain[0].tokens,
            }
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--max-new", type=int, default=128)
    parser.add_argument("--drafts", type=int, nargs="+", default=[4, 8])
    args = parser.parse_args()
    path = weights.fetch()
    words = tokenizer.load(path)
    speaker = Speaker(path, [words.encode_chat(text) for text in PROMPTS.values()], args.max_new)
    news = speaker.lengths(words.eos_id)
    whiches = {name: [number] for number, name in enumerate(PROMPTS)}
    whiches["all at once"] = list(range(len(PROMPTS)))
    load, found = os.getloadavg()[0], []
    for name, which in whiches.items():
        for k in args.drafts:
            case = {"prompt": name, "rows": len(which), "k": k}
            runs = compare(speaker, which, [news[i] for i in which], k, args.rounds)
            found += records(case, *runs)
            before, took = (record["median_s"] for record in found[-2:])
            print(f"{case}: {1e3 * before:.1f} ms, with drafts {1e3 * took:.1f} ms", flush=True)
    machine = {"what": "load average, before and after", "load": [load, os.getloadavg()[0]]}
    found.append({"case": machine, "system": "machine"})
    write_result("drafts", found, command="python benchmarks/drafts.py")


if __name__ == "__main__":
    jax.config.update("jax_default_matmul_precision", "highest")
    main()
