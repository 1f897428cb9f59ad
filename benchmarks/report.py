"""Write the tables of README and docs from benchmarks/results/*.json.

python benchmarks/report.py            # rewrites what stands between the marks
python benchmarks/report.py --check    # fails if that would change anything
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

import _attention_tables as attention
import _model_tables as models
import _other_tables as other

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- results: made by benchmarks/report.py -->\n", "<!-- end of results -->\n"

NEXT = None  # among the parts of a page: what follows is in its next block


PAGES = {
    "README.md": (partial(attention.decode_grid, attention.BRIEFLY),),
    "docs/benchmarks.md": (
        attention.decode_grid,
        attention.decode_means,
        attention.tails,
        attention.prefill,
        attention.decode_step,
        models.example_models,
        models.experts,
        attention.tpu_static,
        other.cpu_decode,
        other.allocator_step,
        attention.attention_xla,
        other.snapshot,
    ),
    "docs/eight_bits.md": (attention.eight_bits, NEXT, attention.eight_bits_time),
    "docs/embedding.md": (other.drafts,),
    "docs/training.md": (models.rollouts, models.shared_prefix, NEXT, models.trainer_rollouts),
    "docs/attention.md": (attention.decode_models, attention.hopper),
    "docs/snapshots.md": (other.snapshot, other.snapshot_gpu),
    "docs/planning.md": (other.memory,),
    "docs/pressure.md": (
        other.tier,
        NEXT,
        other.pressure_speed,
        NEXT,
        other.pressure_error,
        NEXT,
        other.pressure_capacity,
    ),
    "docs/sharding.md": (
        other.sharding_gpus,
        NEXT,
        other.sharding_cost,
        other.sharding_talk,
        other.sharding_memory,
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    for name, parts in PAGES.items():
        path = ROOT / name
        text = path.read_text()
        blocks = [""]
        for part in parts:
            if part is NEXT:
                blocks.append("")
            else:
                blocks[-1] += "".join(part())
        first, *places = text.split(BEGIN)
        after = [place.split(END)[1] for place in places]
        pairs = zip(blocks, after, strict=True)
        new = first + "".join(f"{BEGIN}\n{tables}{END}{rest}" for tables, rest in pairs)
        if args.check and new != text:
            sys.exit(f"{name} differs from the results: run python benchmarks/report.py")
        path.write_text(new)


if __name__ == "__main__":
    main()
