"""Tables of everything around attention: allocator, snapshots, tiers, meshes, simulations."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from _tables import OURS, head, heading, line, load, measured

__all__ = [
    "allocator_step",
    "cpu_decode",
    "drafts",
    "memory",
    "pressure_capacity",
    "pressure_error",
    "pressure_speed",
    "sharding_cost",
    "sharding_gpus",
    "sharding_memory",
    "sharding_talk",
    "snapshot",
    "snapshot_gpu",
    "tier",
]


def cpu_decode() -> Iterator[str]:
    result = load("cpu_decode")
    yield from heading(
        "SmolLM2-135M, float32, decode on a CPU, tokens/s",
        result,
        ("jax", "torch", "transformers"),
    )
    yield head("batch", "paged-decode", "transformers, its best of four ways", "ratio")
    records = [r for r in result["records"] if r["case"]["phase"] == "decode"]
    for batch in sorted({r["case"]["batch"] for r in records}):
        here = [r for r in records if r["case"]["batch"] == batch]
        ours = next(r for r in here if r["system"].startswith(OURS))
        best = max((r for r in here if r is not ours), key=lambda r: r["tokens_per_s"])
        name = best["system"].split("/", 1)[1]
        ratio = ours["tokens_per_s"] / best["tokens_per_s"]
        label = "1" if batch == 1 else f"{batch}, ragged"
        best_rate = f"{best['tokens_per_s']:.1f} ({name})"
        yield line(label, f"{ours['tokens_per_s']:.1f}", best_rate, f"{ratio:.2f}x")
    yield "\n"


def allocator_step() -> Iterator[str]:
    result = load("allocator_step")
    yield from heading(
        "Allocator, one token for each of 256 sequences, 16 new pages, microseconds",
        result,
        ("python", "numpy"),
    )
    yield head("system", "median", "min")
    for record in result["records"]:
        case = record["case"]
        if case["call"] == "advance" and case.get("page_crossings"):
            name = f"{record['system']}, handles in a {case['handles']}"
            yield line(name, *(f"{record[key] * 1e6:.0f}" for key in ("median_s", "min_s")))
    yield "\n"


def snapshot() -> Iterator[str]:
    result = load("snapshot")
    found = _by_what(result)
    yield from _snapshot_rates("Snapshots", result)
    before, after = found["machine", "load average, before and after"]["load"]
    yield f"\nLoad average of the machine: {before:.1f} before, {after:.1f} after. Other work on "
    yield "its cores slows what uses several threads most; repeat the command on a quiet one.\n"
    yield "\nProcessor time of all threads, least of the rounds: "
    yield "; ".join(
        f"{label} {', '.join(_cpu(found[case, name]) for name in (OURS, 'raw', 'safetensors'))} ms"
        for case, label in (("write", "writing"), ("read, cached", "reading a cached file"))
    )
    yield " (in the order of the table).\n"
    peaks = [
        f"{name} {found[f'memory, {name}', OURS]['peak_bytes'] / 2**20:.0f} MiB"
        for name in ("save", "save_async", "load")
    ]
    first = found["first load of a process", OURS]["median_s"]
    ours, copy = (found["pause", name]["min_s"] for name in (OURS, "copy alone"))
    yield f"\nPeak memory above the cache: {', '.join(peaks)}. `save_snapshot_async` holds the "
    yield f"loop up for {ours * 1e3:.0f} ms; copying the same pages out takes {copy * 1e3:.0f} ms. "
    yield f"The first load of a process compiles, and takes {first * 1e3:.0f} ms.\n\n"


def _by_what(result: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(r["case"]["what"], r["system"]): r for r in result["records"]}


def _snapshot_rates(title: str, result: dict[str, Any]) -> Iterator[str]:
    found = _by_what(result)
    yield from heading(
        f"{title} of {result['records'][0]['case']['mib']} MiB of pages, GB/s, best of interleaved "
        "rounds (median)",
        result,
        ("jax", "safetensors", "isal"),
    )
    yield head("", "paged-decode", "raw", "safetensors", "of raw", "of safetensors")
    for case, label in (
        ("write", "write and sync"),
        ("read, dropped", "read from the disk"),
        ("read, cached", "read, file cached"),
    ):
        rates = [found[case, name] for name in (OURS, "raw", "safetensors")]
        cells = [f"{r['best_gb_per_s']:.2f} ({r['gb_per_s']:.2f})" for r in rates]
        cells += [f"{rates[0]['best_gb_per_s'] / r['best_gb_per_s']:.2f}x" for r in rates[1:]]
        yield line(label, *cells)


def snapshot_gpu() -> Iterator[str]:
    result = load("snapshot_gpu")
    found = _by_what(result)
    yield from _snapshot_rates("Snapshots of a cache on a GPU,", result)
    pause, copy, plain = (
        _spread_ms(found["pause", name]) for name in (OURS, "copy alone", "copy alone, np.asarray")
    )
    first = found["first load of a process", OURS]["median_s"]
    held = {how: found[f"first pause, {how}", OURS]["seconds"] for how in ("plain", "reserved")}
    yield f"\n`save_snapshot_async` holds the loop up for {pause} ms; copying the same pages out "
    yield f"takes {copy} ms through page-locked memory and {plain} ms by `np.asarray`. The first "
    yield f"one of a process takes {held['plain'] * 1e3:.0f} ms, with memory reserved "
    yield f"{held['reserved'] * 1e3:.0f} ms; the first load, which compiles, {first * 1e3:.0f} ms."
    yield "\n\n"
    yield "From pool to pool, each restored from the file that the one before it saved; every bit "
    yield "is equal, and so is every byte of the files:\n\n"
    yield head("GPUs", "pages of the pool", "load", "save and sync")
    for r in (r for r in result["records"] if r["case"]["what"] == "moved"):
        cells = [str(r["case"]["devices"]), str(r["case"]["pages"])]
        cells += [f"{r[key] * 1e3:.0f} ms" for key in ("load_s", "save_s")]
        yield line(*cells)
    yield "\n"


def _spread_ms(record: dict[str, Any]) -> str:
    return f"{record['min_s'] * 1e3:.0f} to {record['max_s'] * 1e3:.0f}"


def tier() -> Iterator[str]:
    result = load("tier_gpu")
    records = result["records"]
    yield from heading("Pages to host memory and back, median", result, ("jax",))
    yield head("", "out", "GB/s", "in", "GB/s")
    names: dict[str, dict[str, Any]] = {}
    for r in records:
        what, case = r["case"]["what"], r["case"]
        if what in ("link, out", "link, in"):
            name = f"one array of {r['bytes'] >> 20} MiB"
        elif what in ("copy out", "copy in") and case["memory"] == "pinned_host":
            name = f"{case['pages']} pages, {r['bytes'] >> 20} MiB"
        else:
            continue
        names.setdefault(name, {})[what.split()[-1]] = r
    for name, ways in names.items():
        cells = [
            cell
            for way in ("out", "in")
            for cell in (f"{ways[way]['median_s'] * 1e3:.2f} ms", f"{ways[way]['gb_per_s']:.1f}")
        ]
        yield line(name, *cells)
    plain = next(r for r in records if r["case"]["what"] == "link, np.asarray")
    yield f"\n`np.asarray` of the array takes {plain['median_s'] * 1e3:.0f} ms "
    yield f"({plain['gb_per_s']:.1f} GB/s). Pages of {', '.join(_dtypes(records))} came back bit "
    yield "for bit, although their places were written again while the copy was in flight.\n\n"
    yield head("", "visit", "copy", "both", "hidden")
    for r in (r for r in records if r["case"]["what"] == "overlap"):
        name = "two arrays at a time" if r["system"] == OURS else r["system"]
        cells = [f"{r[key] * 1e3:.1f} ms" for key in ("visit_s", "copy_s", "both_s")]
        yield line(name, *cells, f"{r['hidden']:.0%} of the copy")
    yield "\n"
    what = ("pages", "seconds", "preemptions", "swapped in", "computed twice", "tokens")
    yield head("float32, the same requests", *what)
    for r in (r for r in records if r["case"]["what"] == "pressure"):
        cells = [r["system"], str(r["case"]["pages"]), f"{r['seconds']:.2f}"]
        cells += [str(r[key]) for key in ("preemptions", "swapped_in_pages", "recomputed_tokens")]
        equal = "equal" if r["tokens_equal"] else "other"
        yield line(*cells, f"{r['tokens']}, {equal}")
    compiled = sum(r.get("compilations", 0) for r in records)
    yield f"\nPrograms compiled after the warm-up, in all of this: {compiled}.\n\n"


def _dtypes(records: list[dict[str, Any]]) -> list[str]:
    bits = [r for r in records if r["case"]["what"] == "bits" and r["bits_equal"]]
    return [r["case"]["dtype"] for r in bits]


def _cpu(record: dict[str, Any]) -> str:
    return f"{record['min_cpu_s'] * 1e3:.0f}"


def sharding_gpus() -> Iterator[str]:
    """Steps on one card and on two, for each model that two cards have measured."""
    for name in ("tensor_parallel", "tensor_parallel_70b"):
        if measured(name):
            yield from _on_two_gpus(load(name))


def _on_two_gpus(result: dict[str, Any]) -> Iterator[str]:
    title = "A decode step on two GPUs against one"
    yield from heading(title, result, ("jax", "triton", "jax-triton"))
    yield head("model", "rows", "GPUs", "step", "of one GPU", "attention, a layer", "a sum")
    for record in (r for r in result["records"] if r["case"]["part"] == "step"):
        case, sums = record["case"], record.get("sum_median_s")
        yield line(
            f"{case['model']}, {case['layers']} layers",
            str(case["B"]),
            record["system"],
            f"{record['median_s'] * 1e3:.2f} ms",
            f"{record['of_one']:.2f}",
            f"{record['attention_layer_s'] * 1e6:.1f} us",
            f"{sums * 1e6:.1f} us" if sums else "",
        )
    yield "\nA sum of two cards with the residual and the norm behind it, from one to the next:\n\n"
    yield head("width", "rows", "`psum`", "`DeviceSum`")
    found: dict[tuple[int, int], dict[str, float]] = {}
    for record in (r for r in result["records"] if r["case"]["part"] == "sum"):
        key = record["case"]["width"], record["case"]["B"]
        found.setdefault(key, {})[record["system"]] = record["min_s"]
    for (width, rows), times in found.items():
        cells = (f"{times[name] * 1e6:.1f} us" for name in ("psum", "DeviceSum"))
        yield line(str(width), str(rows), *cells)
    yield "\n"


def sharding_cost() -> Iterator[str]:
    result = load("sharding")
    records = result["records"]
    yield from heading(
        "A decode step on a mesh against the same step without, time ratio", result, ("jax",)
    )
    yield head("devices of one CPU", "rows", "what", "ratio")
    for record in records:
        case = record["case"]
        if "ratio" not in record or record["system"].endswith("no mesh"):
            continue
        what = record["system"].removeprefix(f"{OURS}, ").replace(OURS, case["measure"])
        yield line(str(case["devices"]), str(case["B"]), what, f"{record['ratio']:.3f}")
    yield "\n"


def sharding_talk() -> Iterator[str]:
    result, slices = load("sharding"), load("sharding_tpu")
    yield from heading("Sums over devices in one decode step", result, ("jax",))
    yield head("model", "devices", "rows a shard", "all-reduces", "bytes of their results")
    groups: dict[tuple[Any, ...], list[int]] = {}
    for record in (r for r in result["records"] if r["case"]["measure"] == "talk"):
        case, (calls, total) = record["case"], _only_sums(record)
        key = case["model"], case["dtype"], case["rows_per_shard"], calls, total
        groups.setdefault(key, []).append(case["devices"])
    for (model, dtype, rows, calls, total), devices in groups.items():
        span = f"{min(devices)} to {max(devices)}"
        yield line(f"{model}, {dtype}", span, str(rows), str(calls), f"{total / 1e6:.1f} MB")
    yield "\n"
    yield from heading("The same, compiled for slices of TPUs", slices, ("jax", "libtpu"))
    yield head("slice", "head shards x data shards", "rows a shard", "all-reduces", "bytes")
    for record in slices["records"]:
        case, (calls, total) = record["case"], _only_sums(record)
        shards, rows = f"{case['head_shards']} x {case['data_shards']}", case["rows_per_shard"]
        name = f"{case['slice']}, {case['model']}, {case['dtype']}"
        yield line(name, shards, str(rows), str(calls), f"{total / 1e6:.1f} MB")
    yield "\n"


def _only_sums(record: dict[str, Any]) -> tuple[int, int]:
    """How many all-reduces, and their bytes; anything else would need another table."""
    if set(record["calls"]) != {"all-reduce"}:
        sys.exit(f"collectives that the table has no column for: {record}")
    return record["calls"]["all-reduce"], record["bytes_per_step"]["all-reduce"]


def sharding_memory() -> Iterator[str]:
    result = load("sharding")
    records = [r for r in result["records"] if r["case"]["measure"] == "arithmetic"]
    rows = "{B} rows of {tokens}".format(**records[0]["read_case"])
    yield "**Memory of GPUs with 80 GB**, of which 90 % are used, in bfloat16: arithmetic from the "
    yield "models' sizes, nothing of it was run.\n\n"
    yield head(
        "model",
        "GPUs",
        "weights on each",
        "KV of a token on each",
        "tokens that fit",
        f"bytes that each reads in a step, {rows}",
    )
    for r in records:
        cells = [r["case"]["model"], str(r["case"]["devices"])]
        cells.append(f"{r['weight_bytes_per_device'] / 1e9:.1f} GB")
        cells.append(f"{r['kv_bytes_per_token_per_device']:,} B")
        fits = r["tokens_that_fit"]
        cells.append(f"{fits:,}" if fits else "does not fit")
        cells.append(f"{r['read_bytes_per_step'] / 1e9:.1f} GB" if fits else "")
        yield line(*cells)
    yield "\n"


def memory() -> Iterator[str]:
    result = load("memory")
    case = result["records"][0]["case"]
    yield from heading(
        "What {rows} rows of {tokens} tokens hold, {dtype}, pages of {page_size}, prompts in "
        "chunks of {chunk}".format(**case),
        result,
        ("python", "numpy"),
    )
    yield head("layers", "laid out as", "pages", "GB", "of the floor", "most in prefill")
    layers: dict[str, str] = {}
    for r in result["records"]:
        model, window = r["case"]["model"], r["case"]["window"]
        if len(r.get("layers", [])) == 2:
            layers[model] = "{} full, {} of a window of {}".format(*r["layers"], window)
    for r in result["records"]:
        model = r["case"]["model"]
        cells = [f"{model}: {layers[model]}", r["system"].removeprefix(f"{OURS}/")]
        if r["system"] == "floor":
            yield line(cells[0], "what layers see", "", f"{r['bytes'] / 1e9:.2f}", "", "")
            continue
        pages = r["pages"] if isinstance(r["pages"], list) else [r["pages"]]
        if "groups" in r:
            cells[1] += f": {r['groups']} groups of {r['layers_of_a_group']} layers"
            cells[1] += f", {r['padding_layers']} of them padding" if r["padding_layers"] else ""
        over = [f"{r[key] / r['floor_bytes']:.3f}x" for key in ("bytes", "peak_bytes")]
        yield line(*cells, " + ".join(map(str, pages)), f"{r['bytes'] / 1e9:.2f}", *over)
    yield "\n"


def drafts() -> Iterator[str]:
    result = load("drafts")
    records = [r for r in result["records"] if "rows" in r["case"]]
    yield from heading(
        "SmolLM2-135M, float32, drafts by prompt lookup beside the same loop without",
        result,
        ("jax",),
    )
    columns = ("tokens", "tokens of a row a step", "drafts right", "ms a token", "without")
    yield head("prompt", "k", *columns, "speed-up")
    for plain, drafted in zip(records[::2], records[1::2], strict=True):
        if not drafted["tokens_equal"]:
            sys.exit(f"drafts changed tokens: {drafted['case']}")
        case, row_steps = drafted["case"], drafted["tokens"] - drafted["accepted"]
        times = [record["median_s"] for record in (drafted, plain)]
        yield line(
            case["prompt"],
            str(case["k"]),
            str(drafted["tokens"]),
            f"{drafted['tokens'] / row_steps:.2f}",
            f"{drafted['accepted']} of {drafted['offered']}",
            *(f"{seconds * 1e3:.1f}" for seconds in times),
            f"{times[1] / times[0]:.2f}x",
        )
    before, after = result["records"][-1]["case"]["load"]
    yield f"\nLoad average of the machine: {before:.1f} before, {after:.1f} after.\n\n"


def pressure_speed() -> Iterator[str]:
    result = load("pressure_speed")
    yield from heading(
        "The whole Mooncake conversation trace simulated on one core, in a pool of 2**20 tokens",
        result,
        ("jax",),
    )
    yield head("tokens of a page", "seconds", "seconds of the core", "peak memory", "evictions")
    for record in result["records"]:
        yield line(
            str(record["case"]["page_size"]),
            f"{record['seconds']:.1f}",
            f"{record['cpu_seconds']:.1f}",
            f"{record['peak_rss_mib']:.0f} MiB",
            f"{record['evictions']:,}",
        )
    yield "\n"


def pressure_capacity() -> Iterator[str]:
    result = load("pressure_capacity")
    records = result["records"]
    yield from heading("Blocks found, one prompt after another", result, ("numpy",))
    systems = list(dict.fromkeys(r["system"] for r in records))
    yield head("workload", "pages", *systems)
    for case in {tuple(r["case"].items()): r["case"] for r in records}.values():
        rates = {r["system"]: f"{r['hit_rate']:.1%}" for r in records if r["case"] == case}
        name = case["workload"].partition(",")[0]
        yield line(name, f"{case['pages']:,}", *(rates[system] for system in systems))
    yield "\n"


ERRORS = {
    "output_tokens_per_second": ("output tokens/s", 1.0, "{:.0f}"),
    "ttft_seconds_p50": ("first token p50, ms", 1e3, "{:.0f}"),
    "ttft_seconds_p99": ("p99", 1e3, "{:.0f}"),
    "per_token_seconds_p50": ("per token p50, ms", 1e3, "{:.2f}"),
    "per_token_seconds_p99": ("p99", 1e3, "{:.2f}"),
}
"""Figures of which the error counts: a word, a factor and a form."""


def pressure_error() -> Iterator[str]:
    """Engine and simulation side by side, and how well the measured programs fit; nothing, as long
    as no card has measured it."""
    if not measured("pressure_error"):
        return
    result = load("pressure_error")
    calibration, *runs = result["records"]
    title = "The engine and its simulation, and the error of the simulation"
    yield from heading(title, result, ("jax",))
    yield head("workload", *(word for word, _, _ in ERRORS.values()))
    for run in runs:
        cells = []
        for name, (_, factor, form) in ERRORS.items():
            both = (form.format(factor * run[side][name]) for side in ("real", "simulated"))
            word = f"{run['errors'][name]:+.1%}"
            cells.append(f"{', '.join(both)}: {word if run['within'][name] else f'**{word}**'}")
        yield line(f"{run['case']['workload']}, {run['case']['requests']} requests", *cells)
    inside = sum(sum(run["within"].values()) for run in runs)
    count = sum(len(run["within"]) for run in runs)
    yield f"\n{inside} of {count} errors are within 5% (throughput), 7% (p50) and 12% (p99); those "
    yield "that are not are bold.\n\n"
    columns = ("seconds", "preemptions", "prompt tokens found", "computed again", "pool in use")
    yield head("workload", *columns, "pages over time, mean difference", "requests alike")
    for run in runs:
        forms = dict(seconds="{:.1f}", preemptions="{:.0f}", hit_rate="{:.1%}")
        forms |= dict(recompute_tax="{:.1%}", utilisation="{:.1%}")
        cells = [
            ", ".join(form.format(run[side][name]) for side in ("real", "simulated"))
            for name, form in forms.items()
        ]
        cells += [f"{run['pages_error']:.1%} of the most"]
        cells += [f"{run['alike']} of {run['case']['requests']}"]
        yield line(run["case"]["workload"], *cells)
    yield "\nAlike are requests with as many prompt tokens found and as many preemptions on both "
    yield "sides.\n"
    yield "\n![pages in use over time, of the engine and of its simulation](pressure_error.png)\n"
    yield f"\nCalibrated in {calibration['seconds']:.0f} s:\n\n"
    yield head("program", "points", "mean residual", "largest")
    for fit in calibration["programs"]:
        shape = {
            "decode": f"{fit['rows']} rows, {fit['width'] or 'fewer'} steps",
            "prefill": f"{fit['rows']} rows of {fit['width']} tokens",
        }.get(fit["kind"], "pages")
        residuals = (f"{fit[name]:.1%}" for name in ("mean_residual", "max_residual"))
        yield line(f"{fit['kind']}, {shape}", str(fit["points"]), *residuals)
    yield "\n"
