"""A second reader, made of docs/snapshot_format.md alone: it shares no code with the library."""

from __future__ import annotations

import hashlib
import math
import struct
import zlib
from pathlib import Path

import ml_dtypes  # noqa: F401  (teaches NumPy the names of the small floats)
import msgpack
import numpy as np


def read(path: Path) -> tuple[dict, dict[str, np.ndarray], bytes]:
    """Header, arrays and id."""
    data = path.read_bytes()
    magic, version, header_bytes, file_bytes, checksum = struct.unpack_from("<8sIQQI", data)
    assert magic == bytes.fromhex("89504744 0d0a1a0a") and version in (1, 2, 3)
    assert file_bytes == len(data) and 1 <= header_bytes <= 1048576
    header = data[32 : 32 + header_bytes]
    assert zlib.crc32(data[:28] + header) == checksum
    fields = msgpack.unpackb(header)
    keys = ["arrays", "fingerprint", "metadata", "page_size", "pages", "parent"]
    grouped = version == 2 or (version == 3 and "groups" in fields)
    assert list(fields) == ([*keys[:2], "groups", *keys[2:]] if grouped else keys)
    names = [name for name, *_ in fields["arrays"]]
    assert any(name.startswith("extra/") for name in names) == (version == 3)
    arrays, offset = {}, up(32 + header_bytes)
    assert not any(data[32 + header_bytes : offset])
    for name, dtype, shape, checksums in fields["arrays"]:
        own = name.startswith("extra/")
        assert len(shape) <= 32 if own else 1 <= len(shape) <= 8
        assert dtype != "bool" or own
        assert not own or name[6:] not in ("", ".", "..") and not set(name[6:]) & set("/\\:\0")
        kind = np.dtype(dtype)
        size = math.prod(shape) * kind.itemsize
        row = math.prod(shape[1:]) * kind.itemsize
        chunk = max(1, 4194304 // max(1, row)) * row
        raw = data[offset : offset + size]
        found = [zlib.crc32(raw[i : i + chunk]) for i in range(0, size, max(1, chunk))]
        assert struct.unpack(f"<{len(found)}I", checksums) == tuple(found)
        arrays[name] = np.frombuffer(raw, kind).reshape(shape)
        if dtype == "bool":
            arrays[name] = np.frombuffer(raw, np.uint8).reshape(shape) != 0
        assert not any(data[offset + size : up(offset + size)])
        offset = up(offset + size)
    assert offset == len(data)
    return fields, arrays, hashlib.blake2b(data[: 32 + header_bytes], digest_size=16).digest()


def up(size: int) -> int:
    return (size + 63) // 64 * 64


def pages(path: Path, name: str) -> np.ndarray:
    """One array of keys or values, all pages of its group, through the parents."""
    fields, arrays, _ = read(path)
    if fields["parent"] is None:
        return arrays[name]
    ident, parent, count = fields["parent"]
    older = pages(path.parent / parent, name)
    of_parent, _, id_of_parent = read(path.parent / parent)
    assert id_of_parent == ident and of_parent["pages"] == count
    group = group_of(fields, name)
    source = arrays[f"group/{group}/source" if group else "pages/source"]
    return np.stack([arrays[name][r] if r >= 0 else older[-1 - r] for r in source])


def group_of(fields: dict, name: str) -> int:
    """The group of an array of keys or values: its last part is the layer."""
    layer = int(name.rsplit("/", 1)[1])
    groups = fields.get("groups", [[0, fields["pages"], [layer]]])
    return next(i for i, (_, _, layers) in enumerate(groups) if layer in layers)


def held(path: Path, group: int) -> list[tuple[int, list[int]]]:
    """For every sequence its first column in a group, and its pages from there on."""
    _, arrays, _ = read(path)
    if group == 0:
        return [(0, table) for _, _, table in sequences(path)]
    found, begin = [], 0
    names = [f"group/{group}/{name}" for name in ("first", "end")]
    for first, end in zip(*(arrays[name].tolist() for name in names), strict=True):
        found.append((first, arrays[f"group/{group}/pages"][begin:][: end - first].tolist()))
        begin += end - first
    return found


def sequences(path: Path) -> list[tuple[list[int], bytes, list[int]]]:
    """Tokens, salt and pages of every sequence."""
    fields, arrays, _ = read(path)
    size, begin, out = fields["page_size"], 0, []
    ends = np.cumsum(arrays["salt/length"])
    salts = [
        arrays["salt/bytes"][e - n : e].tobytes()
        for e, n in zip(ends, arrays["salt/length"], strict=True)
    ]
    for length, salt in zip(arrays["sequence/length"], arrays["sequence/salt"], strict=True):
        held = arrays["sequence/pages"][begin : begin + -(-length // size)]
        begin += len(held)
        tokens = arrays["page/tokens"][held].reshape(-1)[:length]
        out.append((tokens.tolist(), salts[salt], held.tolist()))
    return out
