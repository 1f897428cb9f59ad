"""`paged-decode snapshot inspect|verify|compact FILE`."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from .._text import print_table, printable, say, shown, size_text
from ..snapshot import SnapshotInfo, compact_snapshot, inspect_snapshot, verify_snapshot

__all__ = ["add"]

_PROGRESS_BYTES = 64 << 20  # files below it are done before a bar can be read
_WIDE = 80  # characters of a name that a file chose


def add(subparsers: Any) -> None:
    """Register the subcommand."""
    snapshot = subparsers.add_parser("snapshot", help="look at, check and fold snapshot files")
    actions = snapshot.add_subparsers(required=True, metavar="ACTION")
    for name, run, text in (
        ("inspect", _inspect, "what a file holds; reads no pages"),
        ("verify", _verify, "compare every checksum, of the parents of a delta too"),
        ("compact", _compact, "fold a delta and its parents to one whole file"),
    ):
        action = actions.add_parser(name, help=text, description=text)
        action.add_argument("file", type=Path)
        if name == "compact":
            action.add_argument("-o", "--output", type=Path, help="default: in place of FILE")
        action.set_defaults(run=run)


def _inspect(args: argparse.Namespace) -> int:
    _show(inspect_snapshot(args.file))
    return 0


def _verify(args: argparse.Namespace) -> int:
    with _Progress("verify") as progress:
        info = verify_snapshot(args.file, progress=progress)
    say(f"{printable(args.file)}: sound, {size_text(info.file_bytes)}, every checksum compared")
    return 0


def _compact(args: argparse.Namespace) -> int:
    before = inspect_snapshot(args.file)
    with _Progress("compact") as progress:
        info = compact_snapshot(args.file, args.output, progress=progress)
    sizes = f"{size_text(before.file_bytes)} and its parents -> {size_text(info.file_bytes)}"
    say(f"{printable(info.path)}: {sizes}")
    return 0


class _Progress:
    """One line on a terminal that is redrawn a few times a second; nothing for small files."""

    def __init__(self, what: str):
        self._what, self._last, self._drawn = what, 0.0, False

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if total < _PROGRESS_BYTES or not sys.stderr.isatty() or now - self._last < 0.1:
            return
        self._last, self._drawn = now, True
        part = done / total
        bar = "#" * int(30 * part)
        print(
            f"\r{self._what} [{bar:<30}] {part:4.0%} of {size_text(total)}", end="", file=sys.stderr
        )

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._drawn:
            print("\r" + " " * 70 + "\r", end="", file=sys.stderr)


def _show(info: SnapshotInfo) -> None:
    parent = "none: whole"
    if info.parent is not None:
        parent = f"{printable(info.parent.name, _WIDE)} {info.parent.id.hex()}"
    groups = {}
    if len(info.groups) > 1:
        for number, each in enumerate(info.groups):
            sees = "all tokens" if each.window is None else f"{each.window} tokens"
            layers = f"{len(each.layers)} layers see {sees}" if each.layers else "no layers"
            groups[f"group {number}"] = f"{each.num_pages} pages, {layers}"
    rows = {
        "file": f"{printable(info.path)}, {size_text(info.file_bytes)}",
        "id": info.id.hex(),
        "parent": parent,
        "pages": f"{info.num_pages} of {info.page_size} tokens, {info.own_pages} in this file",
        **groups,
        "sequences": f"{info.sequences} with {info.tokens} tokens",
        "cached pages": str(info.cached_pages),
        "requests": "no engine" if info.requests is None else str(info.requests),
        "fingerprint": printable(info.fingerprint.hex() or "none", _WIDE),
    }
    if info.extra:
        rows["extra arrays"] = f"{len(info.extra)}: {', '.join(map(shown, info.extra))}"
    rows |= {f"metadata {shown(key)}": shown(value) for key, value in info.metadata.items()}
    width = max(map(len, rows))
    for name, value in rows.items():
        say(f"{name:<{width}}  {value}")
    say("")
    print_table(
        ("array", "dtype", "shape", "size"),
        [
            (printable(s.name, _WIDE), s.dtype, _shape_text(s.shape), size_text(s.nbytes))
            for s in info.arrays
        ],
    )


def _shape_text(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"
