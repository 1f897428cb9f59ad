"""Files that are sound but for one thing: their lengths and checksums are right."""

from __future__ import annotations

import struct
import zlib

import msgpack
import numpy as np

from . import independent_reader


def pack(
    body: bytes, arrays: bytes = b"", *, version: int = 1, magic=b"\x89PGD\r\n\x1a\n", **claims
):
    """A file around any header bytes, prefix and checksum right unless claimed otherwise."""
    offset = independent_reader.up(32 + len(body))
    size = claims.get("file_bytes", offset + len(arrays))
    front = struct.pack("<8sIQQ", magic, version, claims.get("header_bytes", len(body)), size)
    checksum = struct.pack("<I", zlib.crc32(front + body))
    return (front + checksum + body).ljust(offset, b"\0") + arrays


def build(fields: dict, arrays: dict[str, np.ndarray], change=None) -> bytes:
    """A file of these fields and arrays; `change(fields)` has the last word on the header."""
    entries, data = [], b""
    for name, array in arrays.items():
        raw, row = array.tobytes(), array.nbytes // max([1, *array.shape[:1]])
        chunk = max(1, 4194304 // max(1, row)) * row
        sums = [zlib.crc32(raw[i : i + chunk]) for i in range(0, len(raw), max(1, chunk))]
        entries.append(
            [name, str(array.dtype), list(array.shape), struct.pack(f"<{len(sums)}I", *sums)]
        )
        data += raw.ljust(independent_reader.up(len(raw)), b"\0")
    fields = dict(fields, arrays=entries)  # in its place, if it has one
    if change:
        fields = change(fields) or fields
    version = 2 if isinstance(fields, dict) and "groups" in fields else 1
    version = 3 if any(name.startswith("extra/") for name in arrays) else version
    version = 4 if "engine/asked_length" in arrays else version
    version = 5 if "engine/version" in arrays else version
    return pack(msgpack.packb(fields), data, version=version)


def put(name, at, value):
    def change(arrays):
        arrays[name] = arrays[name].copy()
        arrays[name][at] = value

    return change


def swap(name, a, b):
    def change(arrays):
        arrays[name] = arrays[name].copy()
        arrays[name][[a, b]] = arrays[name][[b, a]]

    return change


def replace(name, value, dtype=None):
    def change(arrays):
        arrays[name] = np.asarray(value, dtype or arrays[name].dtype)

    return change


def plain(page_size: int, pages: int, lengths=(), table=(), **arrays) -> tuple[dict, dict]:
    """Fields and arrays of a file of sequences, all computed, without salt, and no prefix cache."""
    count = len(lengths)
    fields = {"arrays": [], "fingerprint": b"", "metadata": {}}
    fields |= {"page_size": page_size, "pages": pages, "parent": None}
    return fields, {
        "sequence/length": np.array(lengths, np.int64),
        "sequence/computed": np.array(lengths, np.int64),
        "sequence/cached": np.zeros(count, np.int64),
        "sequence/salt": np.zeros(count, np.int32),
        "sequence/pages": np.array(table, np.int32),
        "entry/page": np.zeros(0, np.int32),
        "entry/parent": np.zeros(0, np.int32),
        "entry/evictable": np.zeros(0, np.int32),
        "salt/length": np.array([1], np.int64),
        "salt/bytes": np.zeros(1, np.uint8),
        "page/tokens": np.zeros((pages, page_size), np.int32),
    } | arrays


def with_requests(arrays: dict, running: int, waiting: int = 0) -> dict:
    """The arrays of `plain`, and requests: a running one has a token more than its sequence."""
    lengths = np.concatenate([arrays["sequence/length"] + 1, np.ones(waiting, np.int64)])
    count = running + waiting
    int64 = lambda value: np.full(count, value, np.int64)  # noqa: E731
    columns = {
        "next_id": np.array([count], np.int64),
        "running": np.array([running], np.int64),
        "request": np.arange(count),
        "sample": int64(0),
        "sibling_of": int64(-1),
        "prompt_length": lengths,
        "length": lengths,
        "tokens": np.zeros(lengths.sum(), np.int32),
        "preemptions": int64(0),
        "max_new_tokens": int64(9),
        "temperature": np.zeros(count),
        "top_k": int64(0),
        "top_p": np.ones(count),
        "seed": int64(0),
        "stop_tokens": np.full((count, 8), -1, np.int32),
        "salt_length": int64(1),
        "salt_bytes": np.zeros(count, np.uint8),
    }
    columns |= {f"event_{name}": np.zeros(0, np.int64) for name in ("request", "sample", "index")}
    columns |= {f"event_{name}": np.zeros(0, np.int64) for name in ("token", "reason")}
    columns |= {"event_shown": np.zeros(0, np.uint8), "event_top_length": np.zeros(0, np.int64)}
    columns |= {"event_top_ids": np.zeros(0, np.int32)}
    columns |= {"event_top_logits": np.zeros(0, np.float32)}
    return arrays | {f"engine/{name}": column for name, column in columns.items()}
