"""Tables of attention and of what is built on it, mostly on a GPU."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from _tables import OURS, head, heading, line, load
from decode_grid import EIGHT_BITS, PALLAS, by_point, means, peers_of, read_ceiling
from decode_grid import OURS as TRITON

from paged_decode.kernels.pallas_gpu.config import prefers
from paged_decode.kernels.record import AttentionCall

__all__ = [
    "BRIEFLY",
    "attention_xla",
    "decode_grid",
    "decode_means",
    "decode_models",
    "decode_step",
    "eight_bits",
    "eight_bits_time",
    "hopper",
    "prefill",
    "tails",
    "tpu_static",
]

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

BRIEFLY = (SHOWN[1], SHOWN[4], SHOWN[6], SHOWN[8], SHOWN[10], SHOWN[11])


def decode_grid(shown: Sequence[tuple[str, int, int]] = SHOWN) -> Iterator[str]:
    """Times of the points that are `shown`."""
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
    yield head("rows x tokens, page", "ours", "TB/s", *names, "best peer / ours")
    for key in shown:
        systems = points[key]
        ours, peers = systems["paged-decode/triton"], peers_of(systems)
        cells = [f"{peers[name] * 1e6:.1f}" if name in peers else "" for name in names]
        rate = ours["bytes"] / ours["median_s"] / 1e12
        cells = [f"{ours['median_s'] * 1e6:.1f}", f"{rate:.2f}", *cells]
        best = f"{min(peers.values()) / ours['median_s']:.2f}x"
        yield line(f"{key[1]} x {key[0]}, {key[2]}", *cells, best)
    yield "\n"


def decode_means() -> Iterator[str]:
    """What all points of the grid come to, and its picture."""
    result = load("decode_grid")
    yield "Geometric mean (worst point) of a peer's time over ours, every point of the file:\n\n"
    yield head("batches", "points", "best peer", "flashinfer", "flash-attention-3", "ejkernel")
    found = means(result["records"])
    most = means(result["records"], read_ceiling(result["records"]))
    peers = ("best", "flashinfer", "flash-attention-3", "ejkernel")
    for kind in ("uniform", "ragged"):
        cells = ["{:.2f}x ({:.2f}x)".format(*found[kind, name][:2]) for name in peers]
        yield line(kind, str(found[kind, "best"][2]), *cells)
        cells = [f"{most[kind, name][0]:.2f}x" for name in peers]
        yield line(f"{kind}, at the read ceiling from the first to the last byte", "", *cells)
    yield "\n![TB/s over context](decode_grid.png)\n\n"


def takes_pallas_gpu(case: dict[str, Any]) -> bool:
    """Whether the dispatch serves a case of `tails.py` by `pallas_gpu`, on 132 processors."""
    sizes = {name: case[name] for name in ("rows", "tokens", "kv_heads", "columns")}
    call = AttentionCall.of_sizes(
        **sizes, group=case["heads"] // case["kv_heads"], dim=128, page_size=16
    )
    return prefers(call, processors=132)


def tails() -> Iterator[str]:
    result = load("tails")
    yield from heading(
        "T > 1 new tokens over pages on a GPU, 32/8 heads of 128, bfloat16, pages of 16, cold L2, "
        "microseconds",
        result,
        ("jax", "triton", "torch", "flashinfer-python"),
    )
    peers = ["flashinfer/fa3", "flashinfer/fa2", "torch/dense"]
    kernels = [f"{OURS}/triton", f"{OURS}/pallas_gpu"]
    yield head(
        "rows x new tokens of all",
        *("`triton`", "`pallas_gpu`", "TFLOP/s", *peers, "best paged / ours", "ours / T = 1"),
    )
    cases: dict[str, dict[str, Any]] = {}
    for r in result["records"]:
        case = r["case"]
        lengths = case["lengths"].strip("[]").replace("'", "")
        if len(set(lengths.split(", ")) - {"..."}) == 1:
            lengths = lengths.split(",")[0]
        name = f"{case['rows']} x {case['tokens']} of {lengths}"
        cases.setdefault(name, {})[r["system"]] = r
    ratios = []
    for name, found in cases.items():
        ours = found[kernels[takes_pallas_gpu(found[kernels[0]]["case"])]]
        took = {peer: found.get(peer, {}).get("median_s") for peer in peers}
        paged = [t for peer, t in took.items() if t and peer.startswith("flashinfer")]
        ratios += [min(paged) / ours["median_s"]] if paged else []
        times = {kernel: f"{found[kernel]['median_s'] * 1e6:.1f}" for kernel in kernels}
        yield line(
            name,
            *(f"**{t}**" if found[k] is ours else t for k, t in times.items()),
            f"{ours['flops'] / ours['median_s'] / 1e12:.0f}",
            *(f"{t * 1e6:.1f}" if t else "" for t in took.values()),
            f"{ratios[-1]:.2f}x" if paged else "",
            f"{ours['median_s'] / found[f'{OURS}/T = 1']['median_s']:.2f}x",
        )
    mean = math.exp(statistics.fmean(map(math.log, ratios)))
    yield "\nBold is what the dispatch takes. "
    yield f"FlashInfer's best over ours, geometric mean: {mean:.2f}x.\n\n"


def prefill() -> Iterator[str]:
    """Prompts into the cache through the Engine, and through a loop in torch."""
    result = load("prefill")
    yield from heading(
        "Prefill of Llama-3.1-8B's shapes in bfloat16, tokens per second",
        result,
        ("jax", "torch", "flashinfer-python"),
    )
    yield head("prompts x tokens", "rows x tokens of a launch", "Engine", "torch loop", "ratio")
    for ours, peer in zip(result["records"][::2], result["records"][1::2], strict=True):
        case, rates = ours["case"], [r["tokens_per_s"] for r in (ours, peer)]
        yield line(
            f"{case['prompts']} x {case['length']}",
            f"{case['rows']} x {case['chunk']}",
            *(f"{rate:,.0f}" for rate in rates),
            f"{rates[0] / rates[1]:.2f}x",
        )
    yield "\nThe loop has cuBLAS's products and FlashInfer's kernels, with the same chunks.\n\n"


def decode_models() -> Iterator[str]:
    result = load("decode_grid_models")
    yield from heading(
        "Other heads, bfloat16, pages of 16, cold L2, microseconds",
        result,
        ("jax", "triton", "flash-attn3-jax", "ejkernel"),
    )
    names = [TRITON, PALLAS, "flash-attention-3", "ejkernel", "jax/pallas"]
    yield head("query/KV heads/D, rows x tokens", *names, "best peer / Triton")
    for case, systems in by_point(result["records"]):
        times = {name: record["median_s"] for name, record in systems.items()}
        cells = [f"{times[name] * 1e6:.1f}" if name in times else "" for name in names]
        heads = f"{case['heads']}/{case['kv_heads']}/{case['dim']}"
        best = f"{min(peers_of(systems).values()) / times[TRITON]:.2f}x"
        yield line(f"{heads}, {case['rows']} x {case['lengths']}", *cells, best)
    yield "\n"


def hopper() -> Iterator[str]:
    result = load("decode_grid_pallas")
    yield from heading(
        "`pallas_gpu` beside `triton`, 32/8 heads of 128, bfloat16, cold L2, microseconds",
        result,
        ("jax", "triton"),
    )
    points = [
        (case, systems[TRITON]["median_s"], systems[PALLAS]["median_s"])
        for case, systems in by_point(result["records"])
        if PALLAS in systems and case["order"] == "permuted"
    ]
    yield head("rows x tokens, page", "`pallas_gpu`", "`triton`", "`triton` / `pallas_gpu`")
    for case, triton, pallas in points:
        if (case["lengths"], case["rows"], case["page_size"]) in SHOWN:
            times = [f"{seconds * 1e6:.1f}" for seconds in (pallas, triton)]
            name = f"{case['rows']} x {case['lengths']}, {case['page_size']}"
            yield line(name, *times, f"{triton / pallas:.2f}x")
    yield "\nEvery point of the file:\n\n"
    yield head("pages", "points", "geometric mean", "worst", "best")
    for size in (16, 64):
        ratios = [triton / pallas for case, triton, pallas in points if case["page_size"] == size]
        found = (statistics.geometric_mean(ratios), min(ratios), max(ratios))
        yield line(f"of {size} tokens", str(len(ratios)), *(f"{ratio:.3f}x" for ratio in found))
    yield "\n"


def decode_step() -> Iterator[str]:
    result = load("decode_step")
    yield from heading(
        "A decode step of 32 layers, 16 rows of 1024 tokens, on a GPU, microseconds (over floor)",
        result,
        ("jax", "triton"),
    )
    yield head("pages", "append", "stepped by the host", "looped on the device")
    cells: dict[tuple[str, str], dict[bool, str]] = {}
    for record in result["records"]:
        case, over = record["case"], record["median_s"] / record["floor_s"]
        cell = f"{record['median_s'] * 1e6:.0f} ({over:.2f}x)"
        cells.setdefault((case["layout"], case["append"]), {})[case["device_loop"]] = cell
    for (layout, append), found in cells.items():
        yield line(layout, append, found[False], found[True])
    yield "\n"


def attention_xla() -> Iterator[str]:
    result = load("attention_xla")
    yield from heading(
        "Attention of one layer on a CPU, 9/3 heads of 64, float32, microseconds (median)",
        result,
        ("jax",),
    )
    systems = list(dict.fromkeys(r["system"] for r in result["records"]))
    yield head("case", *systems)
    names = list(dict.fromkeys(r["case"]["name"] for r in result["records"]))
    for name in names:
        times = {r["system"]: r["median_s"] for r in result["records"] if r["case"]["name"] == name}
        yield line(name, *(f"{times[s] * 1e6:.0f}" if s in times else "" for s in systems))
    yield "\n"


def tpu_static() -> Iterator[str]:
    result = load("tpu_static")
    yield from heading(
        "Instructions of a TPU core for each page (bundles, all KV heads), with T > 1 for each of "
        "its queries, read from compiled code",
        result,
        ("jax", "libtpu"),
    )
    rows: dict[tuple[str, str], dict[str, float]] = {}
    for record in result["records"]:
        case = record["case"]
        found = rows.setdefault((case["shape"], case["generation"]), {})
        if "bundles_per_page" in record:
            name = record["system"].split(",")[0]  # the better of a peer's blocks
            bundles = record.get("bundles_per_page_and_query", record["bundles_per_page"])
            found[name] = min(bundles, found.get(name, float("inf")))
    names = ["paged-decode/pallas_tpu", "jax/paged_attention", "jax/ragged_paged_attention"]
    yield head("shape", "TPU", "ours", *names[1:], "ours / best")
    for (shape, generation), found in sorted(rows.items()):
        digits = 1 if " T = " in shape else 0
        missing = "T = 1 only" if digits else "does not compile"
        cells = [f"{found[name]:.{digits}f}" if name in found else missing for name in names]
        best = min(found[name] for name in names[1:] if name in found)
        yield line(shape, generation, *cells, f"{found[names[0]] / best:.2f}x")
    yield "\n"


def eight_bits() -> Iterator[str]:
    """Tokens that pages of each dtype choose as pages of float32 do."""
    result = load("eight_bits")
    yield from heading(
        "SmolLM2-135M in float32, teacher-forced, pages of each dtype beside those of float32",
        result,
        ("jax",),
    )
    yield head("pages", "same next token", "mean error of its log-probability")
    for record in result["records"]:
        if record["case"]["part"] == "agree":
            same = f"{record['same']} of {record['tokens']}"
            yield line(record["case"]["pages"], same, f"{record['mean_logprob_error']:.4f}")
    needles = [r for r in result["records"] if r["case"]["part"] == "needle"]
    if needles:
        tried = {r["case"]["depth"] for r in needles}
        context = needles[0]["case"]["context"]
        yield f"\nA sentence in a text of {context} tokens, at {len(tried)} depths, was found over "
        yield "pages of "
        dtypes = dict.fromkeys(r["case"]["pages"] for r in needles)
        found = {d: sum(r["found"] for r in needles if r["case"]["pages"] == d) for d in dtypes}
        yield ", ".join(f"{d} {count} of {len(tried)} times" for d, count in found.items()) + ".\n"
    yield "\n"


def eight_bits_time() -> Iterator[str]:
    """What attention takes over pages of each dtype, and FlashInfer's over fp8 ones."""
    result = load("decode_grid_8bit")
    yield from heading(
        "Paged decode attention on a GPU, 32/8 heads of 128, pages of 16, cold L2, microseconds",
        result,
        ("jax", "triton", "flashinfer-python"),
    )
    points = by_point(result["records"])
    yield head(
        "rows x tokens", "MB in bfloat16", "bfloat16", *EIGHT_BITS, "bfloat16 / int8", "fp8 / int8"
    )
    for case, systems in points:
        plain, *others = (systems[name]["median_s"] for name in (TRITON, *EIGHT_BITS))
        yield line(
            f"{case['rows']} x {case['lengths']}",
            f"{systems[TRITON]['bytes'] / 1e6:.0f}",
            *(f"{seconds * 1e6:.1f}" for seconds in (plain, *others)),
            f"{plain / others[0]:.2f}x",
            f"{others[2] / others[0]:.2f}x",
        )
    names: dict[str, str] = dict(
        zip((TRITON, *EIGHT_BITS), ("bfloat16", "int8", "float8_e4m3fn", "fp8"), strict=True)
    )
    yield "\nOver the points of the file, geometric mean and worst point:\n\n"
    for above, below in ((TRITON, EIGHT_BITS[0]), (TRITON, EIGHT_BITS[1]), EIGHT_BITS[2::-2]):
        ratios = [systems[above]["median_s"] / systems[below]["median_s"] for _, systems in points]
        yield f"- {names[above]} / {names[below]}: {statistics.geometric_mean(ratios):.2f}x, "
        yield f"{min(ratios):.2f}x\n"
    yield "\n"
