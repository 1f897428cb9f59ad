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
        array = np.ascontiguousarray(array)
        raw, row = array.tobytes(), array.nbytes // max(1, len(array))
        chunk = max(1, 4194304 // max(1, row)) * row
        sums = [zlib.crc32(raw[i : i + chunk]) for i in range(0, len(raw), max(1, chunk))]
        entries.append(
            [name, str(array.dtype), list(array.shape), struct.pack(f"<{len(sums)}I", *sums)]
        )
        data += raw.ljust(independent_reader.up(len(raw)), b"\0")
    fields = dict(fields, arrays=entries)
    if change:
        fields = change(fields) or fields
    return pack(msgpack.packb(fields), data)


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
