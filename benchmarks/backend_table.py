"""Write the table of docs/backends.md: every backend is asked what it serves.

python benchmarks/backend_table.py            # rewrites the part of the page between the marks
python benchmarks/backend_table.py --check    # fails if that would change anything
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

from paged_decode.kernels import BACKENDS
from paged_decode.kernels.dispatch import Backend
from paged_decode.kernels.record import AttentionCall

PAGE = Path(__file__).parents[1] / "docs" / "backends.md"
BEGIN, END = "<!-- table: made by benchmarks/backend_table.py -->\n", "<!-- end of table -->\n"


PLAIN: dict[str, Any] = dict(
    rows=4, kv_heads=2, group=4, dim=128, page_size=16, columns=8, pages=9, layers=2
)
ASKS: dict[str, dict[str, Any]] = {
    "one new token a row (T = 1)": {},
    "several (T = 5): prefill, drafts": dict(tokens=5),
    "ragged T (`query_lens`)": dict(tokens=5, query_lens=True),
    "trees of drafts (`tail_mask`)": dict(tokens=5, tail_mask=True),
    "float32": dict(dtype="float32"),
    "bfloat16": {},
    "float16": dict(dtype="float16"),
    "float32 queries over bfloat16 pages": dict(q_dtype="float32"),
    "int8 or float8_e4m3fn with scales, pages of 16": dict(dtype="int8"),
    "the same, pages of 128": dict(dtype="float8_e4m3fn", page_size=128),
    "float32 queries over those": dict(dtype="int8", page_size=128, q_dtype="float32"),
    **{f"D = {dim}": dict(dim=dim) for dim in (64, 80, 96, 128, 256, 512)},
    **{f"G = {group}": dict(group=group) for group in (1, 3, 16, 128)},
    **{f"pages of {size}": dict(page_size=size) for size in (1, 16, 256, 24)},
    "sliding window, starts, soft cap, sinks": dict(
        window=100, starts=True, soft_cap=20.0, sinks=True
    ),
    "a table of 256 rows and 1024 columns": dict(rows=256, columns=1024),
    "rows of a million tokens": dict(columns=2**16),
}


def answer(backend: Backend, module: ModuleType, ask: dict[str, Any]) -> str | None:
    """Why `module` refuses `ask` on the platform that it is for, or None."""
    platform = "gpu" if backend.name == "pallas_gpu" else next(iter(backend.platforms), "cpu")
    return module.refusal(AttentionCall.of_sizes(**PLAIN | ask, platform=platform))


@contextlib.contextmanager
def _packages() -> Iterator[None]:
    """As if the packages of the GPU were those that work: the table is about the kernels."""
    from paged_decode.kernels.pallas_gpu import call as hopper
    from paged_decode.kernels.triton import launch

    with (
        mock.patch.object(launch, "problem", lambda: None),
        mock.patch.object(hopper, "_missing", lambda: None),
    ):
        yield


def table() -> str:
    """The table, and below it the backends' own words."""
    reasons: list[str] = []

    def cell(reason: str | None) -> str:
        if reason is None:
            return "yes"
        if reason not in reasons:
            reasons.append(reason)
        return f"no ({reasons.index(reason) + 1})"

    with _packages():
        modules = {backend: backend.load() for backend in BACKENDS}
        lines = [f"| | {' | '.join(f'`{backend.name}`' for backend in BACKENDS)} |"]
        lines.append(f"|---|{'---|' * len(BACKENDS)}")
        where = (", ".join(backend.platforms) or "by name" for backend in BACKENDS)
        lines.append(f"| tried on | {' | '.join(where)} |")
        for name, ask in ASKS.items():
            cells = (cell(answer(backend, module, ask)) for backend, module in modules.items())
            lines.append(f"| {name} | {' | '.join(cells)} |")
        fused = ("yes" if hasattr(m, "append_and_attend") else "no" for m in modules.values())
        lines.append(f"| `append_and_attend` in one launch where T = 1 | {' | '.join(fused)} |")
    notes = [f"{at}. {reason}" for at, reason in enumerate(reasons, 1)]
    return "\n".join([*lines, "", *notes, ""])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    text = PAGE.read_text()
    before, rest = text.split(BEGIN)
    new = before + BEGIN + "\n" + table() + "\n" + END + rest.split(END)[1]
    if args.check and new != text:
        sys.exit("docs/backends.md differs from the code: run python benchmarks/backend_table.py")
    PAGE.write_text(new)


if __name__ == "__main__":
    main()
