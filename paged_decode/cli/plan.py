"""`paged-decode plan`: pages, rows and tokens that fit, and the roofline of a decode step."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, fields, replace
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from .._text import print_table, printable, say, size_text
from ..planning.files import read_model
from ..planning.layouts import ITEM_BYTES, Plan, plan_layout
from ..planning.roofline import CARDS, DecodeStep, decode_step
from ..planning.shapes import ModelShape

__all__ = ["add", "parse_size"]

_UNITS = {
    "": 1,
    "B": 1,
    **{f"{letter}B": 1000**power for power, letter in enumerate("kMGT", start=1)},
    **{f"{letter}iB": 1024**power for power, letter in enumerate("KMGT", start=1)},
}
_TEXT = "how many pages, rows and tokens fit a memory, and the least time of a decode step"
_MORE = """\
Two of the memory, --rows and --context say the third. The memory is --cache-bytes, or what
--utilisation of a --card or of --memory leaves beside the weights. Sizes are bytes, such as
80GB, 1.5GiB or 16e9; all are those of one device."""


def add(subparsers: Any) -> None:
    """Register the subcommand."""
    parser = subparsers.add_parser("plan", help=_TEXT, description=f"{_TEXT}. {_MORE}")
    model = parser.add_argument_group("the model: a file, or sizes")
    model.add_argument(
        "model", type=Path, nargs="?", help="a .gguf file, a config.json, or a folder with one"
    )
    model.add_argument("--layers", type=int)
    model.add_argument("--heads", type=int, help="query heads")
    model.add_argument("--kv-heads", type=int)
    model.add_argument("--head-dim", type=int)
    model.add_argument("--window", type=int, help="newest tokens that layers see")
    model.add_argument("--full-every", type=int, help="the last of so many layers sees all tokens")
    model.add_argument("--weights-bytes", type=parse_size, help="default: the file's")
    memory = parser.add_argument_group("the memory of a device")
    memory.add_argument("--cache-bytes", type=parse_size, help="for pages alone")
    memory.add_argument("--memory", type=parse_size, help="all of it")
    memory.add_argument("--card", choices=CARDS, help="its memory and bandwidth, by data sheet")
    memory.add_argument("--utilisation", type=_part, default=Decimal("0.9"), help="default: 0.9")
    _add_rows(parser.add_argument_group("rows"))
    step = parser.add_argument_group("the roofline of a decode step")
    step.add_argument("--bandwidth", type=parse_size, help="bytes per second, such as 3.35TB")
    step.add_argument("--length", type=int, help="tokens of every row; default: the context")
    step.add_argument(
        "--read-bytes",
        type=parse_size,
        help="of weights that a step reads, over all devices; default: all",
    )
    parser.add_argument("--json", action="store_true", help="print an object instead of tables")
    parser.set_defaults(run=_run)


def _add_rows(rows: Any) -> None:
    rows.add_argument("--rows", type=int, help="sequences at once, over all devices")
    rows.add_argument("--context", type=int, help="the most tokens of a row")
    rows.add_argument("--page-size", type=int, default=16, help="tokens; default: 16")
    rows.add_argument("--dtype", choices=ITEM_BYTES, default="bfloat16", help="default: bfloat16")
    rows.add_argument("--chunk", type=int, default=128, help="tokens of a prompt; default: 128")
    rows.add_argument(
        "--steps", type=int, default=8, help="decode steps of a visit, two in flight; default: 8"
    )
    rows.add_argument("--cached-tails", type=int, help="windows kept of old rows; default: rows")
    rows.add_argument("--head-shards", type=int, default=1, help="devices that share KV heads")
    rows.add_argument("--data-shards", type=int, default=1, help="parts of the rows")


def parse_size(text: str) -> int:
    """Bytes: a number, and perhaps kB, MB, GB, TB (1000) or KiB, MiB, GiB, TiB (1024).

    Raises:
      argparse.ArgumentTypeError: it is anything else, or no whole number of bytes.

    Examples:
      >>> parse_size("1.5GiB"), parse_size("16e9")
      (1610612736, 16000000000)
    """
    number = text.rstrip("kKMGTiB")
    try:
        if not number.isascii() or number.strip() != number or "_" in number:
            raise InvalidOperation
        size = Decimal(number) * _UNITS[text[len(number) :]]
        if 0 <= size < 2**63 and size % 1 == 0:
            return int(size)
    except (ArithmeticError, KeyError):  # no number, not a number, too large; no such unit
        pass
    raise argparse.ArgumentTypeError(
        f"expected bytes, such as 80GB, 1.5GiB or 16e9, got {text!r:.40}"
    )


def _part(text: str) -> Decimal:
    try:
        part = Decimal(text)
        if 0 < part <= 1:
            return part
    except InvalidOperation:  # not a number, or one that has no order
        pass
    raise argparse.ArgumentTypeError(f"expected a part of the memory, 0 to 1, got {text!r:.40}")


def _run(args: argparse.Namespace) -> int:
    try:
        model = _model(args)
        cache_bytes = _cache_bytes(args, model)
        plan = plan_layout(
            model,
            cache_bytes=cache_bytes,
            rows=args.rows,
            context=args.context,
            page_size=args.page_size,
            dtype=args.dtype,
            tokens_in_flight=max(args.chunk, 2 * args.steps),
            cached_tails=args.cached_tails,
            head_shards=args.head_shards,
            data_shards=args.data_shards,
        )
        step = _step(args, model, plan)
    except (ValueError, NotImplementedError) as error:
        print(f"paged-decode plan: {printable(str(error))}", file=sys.stderr)
        return 1
    if args.json:
        print(json.dumps(_object(model, plan, cache_bytes, step), indent=1, allow_nan=False))
    else:
        _print(model, plan, cache_bytes, step)
    return 0


def _model(args: argparse.Namespace) -> ModelShape:
    sizes = (args.layers, args.kv_heads, args.head_dim)
    others = (args.heads, args.window, args.full_every)
    if args.model is None:
        if None in sizes:
            raise ValueError("expected a file, or --layers, --kv-heads and --head-dim")
        model = ModelShape.of_sizes(
            args.layers,
            num_kv_heads=args.kv_heads,
            head_dim=args.head_dim,
            window=args.window,
            full_every=args.full_every,
            num_heads=args.heads,
        )
    elif (*sizes, *others).count(None) < 6:
        raise ValueError("expected a file or sizes, got both: leave one of them out")
    else:
        model = read_model(args.model)
    if args.weights_bytes is not None:
        model = replace(model, weights_bytes=args.weights_bytes)
    return model


def _cache_bytes(args: argparse.Namespace, model: ModelShape) -> int | None:
    """For pages on each device; None: as much as they need."""
    memory = args.memory
    if args.cache_bytes is not None:
        if memory is not None:
            raise ValueError("expected --cache-bytes or --memory, got both: leave one of them out")
        return args.cache_bytes
    if memory is None and args.card:
        memory = CARDS[args.card].memory_bytes
    if memory is None:
        return None
    if model.weights_bytes is None:
        raise ValueError(
            "expected --weights-bytes, as the file does not say how large they are; or give "
            "--cache-bytes, for the pages alone"
        )
    used = int(memory * args.utilisation)
    left = used + -model.weights_bytes // args.head_shards
    if left <= 0:
        raise ValueError(
            f"{model.weights_bytes} bytes of weights on {args.head_shards} devices do not fit "
            f"{used} bytes ({args.utilisation} of {memory}): more devices (--head-shards)?"
        )
    return left


def _step(args: argparse.Namespace, model: ModelShape, plan: Plan) -> DecodeStep | None:
    """None where the bandwidth or the weights are not known."""
    bandwidth = args.bandwidth
    if bandwidth is None and args.card:
        bandwidth = CARDS[args.card].bandwidth_bytes
    weights = model.weights_bytes if args.read_bytes is None else args.read_bytes
    if bandwidth is None or weights is None:
        return None
    return decode_step(plan, weights_bytes=weights, bandwidth_bytes=bandwidth, length=args.length)


def _object(
    model: ModelShape, plan: Plan, cache_bytes: int | None, step: DecodeStep | None
) -> dict[str, Any]:
    """What `--json` prints: the fields of the records, and the sums of their properties."""
    about = {field.name: getattr(model, field.name) for field in fields(model)}
    sums = {"tokens": plan.tokens, "group_bytes": plan.group_bytes, "nbytes": plan.nbytes}
    return {
        "model": about | {"layers": len(model.layers)},
        "cache_bytes": cache_bytes,
        "plan": asdict(plan) | sums,
        "step": step and asdict(step) | {"tokens_per_second": step.tokens_per_second},
    }


def _print(model: ModelShape, plan: Plan, cache_bytes: int | None, step: DecodeStep | None) -> None:
    size, devices = plan.layout.page_size, plan.head_shards * plan.data_shards
    each = "" if devices == 1 else " on each device"
    say(f"{printable(model.name, 80)}: {len(model.layers)} layers")
    if devices > 1:
        say(f"{devices} devices: heads over {plan.head_shards}, rows over {plan.data_shards}")
    rows = f"{plan.rows} rows of {plan.context} tokens in pages of {size}"
    if any(group.window for group in plan.layout.groups):
        rows += f"; {plan.tokens_in_flight} tokens in flight, {plan.cached_tails} cached tails"
    say(f"{rows}\n")
    pairs = zip(plan.layout.groups, plan.group_bytes, strict=True)
    print_table(
        ("layers", "see", "KV heads", "head dim", "dtype", "pages", f"size{each}"),
        [
            (
                str(len(group.layers)) if group.layers else "none: books on the host",
                f"{group.window} tokens" if group.window else "all",
                str(group.num_kv_heads),
                str(group.head_dim),
                group.dtype,
                str(group.num_pages),
                size_text(nbytes),
            )
            for group, nbytes in pairs
        ],
    )
    of = "" if cache_bytes is None else f" of {size_text(cache_bytes)}"
    say(f"\npages: {size_text(plan.nbytes)}{of}{each}, for {plan.tokens} tokens in all")
    if step is not None:
        _print_step(model, step, each)


def _print_step(model: ModelShape, step: DecodeStep, each: str) -> None:
    say(
        f"decode step, {step.rows} rows of {step.length} tokens: "
        f"{size_text(step.weights_bytes)} of weights and {size_text(step.kv_bytes)} of pages{each}"
    )
    say(f"roofline: {step.seconds * 1e3:.3g} ms, {step.tokens_per_second:.4g} tokens/s")
    if model.num_experts:
        say(
            f"of {model.num_experts} experts a layer, all are counted as read unless --read-bytes "
            "says less"
        )
