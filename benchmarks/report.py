"""Write the README's tables from benchmarks/results/*.json.

python benchmarks/report.py            # rewrites the part of README.md between the marks
python benchmarks/report.py --check    # fails if that would change anything
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from _result import RESULTS
from decode_grid import by_point, means, peers_of

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- results: made by benchmarks/report.py -->\n", "<!-- end of results -->\n"
OURS = "paged-decode"


def load(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def heading(title: str, result: dict[str, Any], packages: tuple[str, ...]) -> Iterator[str]:
    versions = result["versions"] | result["records"][-1].get("versions", {})
    used = ", ".join(f"{p} {versions[p]}" for p in packages if p in versions)
    made = f"{result['device']}; {used}; {result['date'][:10]}; `{result['command']}`"
    yield f"**{title}** ({made})\n\n"


def cpu_decode() -> Iterator[str]:
    result = load("cpu_decode")
    yield from heading(
        "SmolLM2-135M, float32, decode on a CPU, tokens/s",
        result,
        ("jax", "torch", "transformers"),
    )
    yield "| batch | paged-decode | transformers, its best of four ways | ratio |\n"
    yield "|---|---|---|---|\n"
    records = [r for r in result["records"] if r["case"]["phase"] == "decode"]
    for batch in sorted({r["case"]["batch"] for r in records}):
        here = [r for r in records if r["case"]["batch"] == batch]
        ours = next(r for r in here if r["system"].startswith(OURS))
        best = max((r for r in here if r is not ours), key=lambda r: r["tokens_per_s"])
        name = best["system"].split("/", 1)[1]
        ratio = ours["tokens_per_s"] / best["tokens_per_s"]
        label = "1" if batch == 1 else f"{batch}, ragged"
        yield f"| {label} | {ours['tokens_per_s']:.1f} | {best['tokens_per_s']:.1f} ({name}) | "
        yield f"{ratio:.2f}x |\n"
    yield "\n"


def allocator_step() -> Iterator[str]:
    result = load("allocator_step")
    yield from heading(
        "Allocator, one token for each of 256 sequences, 16 new pages, microseconds",
        result,
        ("python", "numpy"),
    )
    yield "| system | median | min |\n|---|---|---|\n"
    for record in result["records"]:
        case = record["case"]
        if case["call"] == "advance" and case.get("page_crossings"):
            name = f"{record['system']}, handles in a {case['handles']}"
            yield f"| {name} | {record['median_s'] * 1e6:.0f} | {record['min_s'] * 1e6:.0f} |\n"
    yield "\n"


def attention_xla() -> Iterator[str]:
    result = load("attention_xla")
    yield from heading(
        "Attention of one layer on a CPU, 9/3 heads of 64, float32, microseconds (median)",
        result,
        ("jax",),
    )
    systems = list(dict.fromkeys(r["system"] for r in result["records"]))
    yield f"| case | {' | '.join(systems)} |\n|---|{'---|' * len(systems)}\n"
    names = list(dict.fromkeys(r["case"]["name"] for r in result["records"]))
    for name in names:
        times = {r["system"]: r["median_s"] for r in result["records"] if r["case"]["name"] == name}
        cells = (f"{times[s] * 1e6:.0f}" if s in times else "" for s in systems)
        yield f"| {name} | {' | '.join(cells)} |\n"
    yield "\n"


SHOWN = [  # (lengths, rows, page size)
    ("1024", 1, 16),
    ("4096", 1, 16),
    ("32768", 1, 16),
    ("1024", 16, 16),
    ("4096", 16, 16),
    ("512", 64, 16),
    ("4096", 64, 16),
    ("4096", 64, 64),
    ("1024", 256, 16),
    ("16384", 16, 16),
    ("log-normal, mean 2147", 64, 16),
    ("uniform 1 to 4096", 64, 16),
    ("63 of 256, one of 65536", 64, 16),
    ("4500, 45000, 1800, 1800", 4, 16),
]


def decode_grid() -> Iterator[str]:
    result = load("decode_grid")
    yield from heading(
        "Paged decode attention on a GPU, 32/8 heads of 128, bfloat16, cold L2, microseconds",
        result,
        ("jax", "triton", "flashinfer-python", "flash-attn3-jax", "ejkernel"),
    )
    points = {
        (case["lengths"], case["rows"], case["page_size"]): systems
        for case, systems in by_point(result["records"])
        if case["order"] == "permuted"
    }
    names = ["flashinfer", "flash-attention-3", "ejkernel", "jax/pallas"]
    yield f"| rows x tokens, page | ours | TB/s | {' | '.join(names)} | best peer / ours |\n"
    yield f"|---|---|---|{'---|' * len(names)}---|\n"
    for key in SHOWN:
        systems = points[key]
        ours, peers = systems["paged-decode/triton"], peers_of(systems)
        cells = [f"{peers[name] * 1e6:.1f}" if name in peers else "" for name in names]
        rate = ours["bytes"] / ours["median_s"] / 1e12
        yield f"| {key[1]} x {key[0]}, {key[2]} | {ours['median_s'] * 1e6:.1f} | {rate:.2f} | "
        yield f"{' | '.join(cells)} | {min(peers.values()) / ours['median_s']:.2f}x |\n"
    yield "\nGeometric mean (worst point) of a peer's time over ours, every point of the file:\n\n"
    yield "| batches | points | best peer | flashinfer | flash-attention-3 | ejkernel |\n"
    yield "|---|---|---|---|---|---|\n"
    found = means(result["records"])
    for kind in ("uniform", "ragged"):
        cells = [
            "{:.2f}x ({:.2f}x)".format(*found[kind, name][:2])
            for name in ("best", "flashinfer", "flash-attention-3", "ejkernel")
        ]
        yield f"| {kind} | {found[kind, 'best'][2]} | {' | '.join(cells)} |\n"
    yield "\n![TB/s over context](benchmarks/results/decode_grid.png)\n\n"


def decode_step() -> Iterator[str]:
    result = load("decode_step")
    yield from heading(
        "A decode step of 32 layers, 16 rows of 1024 tokens, on a GPU, microseconds (over floor)",
        result,
        ("jax", "triton"),
    )
    yield "| pages | append | stepped by the host | looped on the device |\n|---|---|---|---|\n"
    cells: dict[tuple[str, str], dict[bool, str]] = {}
    for record in result["records"]:
        case, over = record["case"], record["median_s"] / record["floor_s"]
        cell = f"{record['median_s'] * 1e6:.0f} ({over:.2f}x)"
        cells.setdefault((case["layout"], case["append"]), {})[case["device_loop"]] = cell
    for (layout, append), found in cells.items():
        yield f"| {layout} | {append} | {found[False]} | {found[True]} |\n"
    yield "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    text = README.read_text()
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    parts = (decode_grid, decode_step, cpu_decode, allocator_step, attention_xla)
    tables = "".join("".join(part()) for part in parts)
    new = before + BEGIN + "\n" + tables + END + after
    if args.check and new != text:
        sys.exit("README.md differs from the results: run python benchmarks/report.py")
    README.write_text(new)


if __name__ == "__main__":
    main()
