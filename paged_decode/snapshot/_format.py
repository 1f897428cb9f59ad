"""The container: prefix, header, arrays. docs/snapshot_format.md is its specification.

Nothing here touches a file or a device. `decode_header` is given bytes that may be hostile: every
size is bounded before something of that size is made, and every field has exactly one type.
"""

from __future__ import annotations

import hashlib
import math
import re
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import msgpack
import numpy as np

from .._text import printable, shown
from ..errors import SnapshotCorrupt, SnapshotVersion
from ._names import EXTRA, MAX_NAME_BYTES, is_extra_name, is_name, is_plain_name, is_text

__all__ = [
    "ArraySpec",
    "Header",
    "Parent",
    "SavedGroup",
    "decode_header",
    "encode_header",
    "layer_of",
    "require",
    "split_prefix",
]

MAGIC = b"\x89PGD\r\n\x1a\n"
# Of one group of layers, of several, with the user's arrays, with more, after new weights.
VERSIONS = (1, 2, 3, 4, 5)
PREFIX = struct.Struct("<8sIQQI")  # magic, version, header bytes, file bytes, CRC
ALIGNMENT = 64
CHUNK_BYTES = 1 << 22  # so few that several wait in memory while one is written
MAX_HEADER_BYTES = 1 << 20  # the only bytes that are read on the word of an unchecked prefix
MAX_DIMENSION = 1 << 31  # products of a few stay Python ints: nothing is made of them unchecked
MAX_AXES = 8
MAX_EXTRA_AXES = 32
MAX_ARRAY_BYTES = 1 << 63  # NumPy counts them in 64 bits, with a sign, even if an axis is 0
MAX_METADATA = 4096  # keys
MAX_PARENTS = 256  # files that are open at once while a chain is read
MAX_GROUPS = 256
KEYS = ["arrays", "fingerprint", "metadata", "page_size", "pages", "parent"]
ASKED_LENGTH = "engine/asked_length"  # it is in the files of versions 4 and 5 and in no others
WEIGHTS = "engine/version"  # it is in the files of version 5 and in no others

DTYPES = {
    str(np.dtype(t)): np.dtype(t).newbyteorder("<")
    for t in ("u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f2", "f4", "f8")
} | {
    name: np.dtype(getattr(ml_dtypes, name))
    for name in (
        "bfloat16",
        "float8_e3m4",
        "float8_e4m3",
        "float8_e4m3b11fnuz",
        "float8_e4m3fn",
        "float8_e4m3fnuz",
        "float8_e5m2",
        "float8_e5m2fnuz",
        "float8_e8m0fnu",
    )
}
EXTRA_DTYPES = DTYPES | {"bool": np.dtype(bool)}
"""What the user's arrays may be, too: nobody reads pages as truth values."""

Scalar = str | int | float | bool | None


@dataclass(frozen=True, slots=True)
class ArraySpec:
    """One array of the file: `dtype` is a key of `EXTRA_DTYPES`."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * EXTRA_DTYPES[self.dtype].itemsize

    @property
    def num_rows(self) -> int:
        """Of axis 0; an array without axes is a row."""
        return self.shape[0] if self.shape else 1

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * EXTRA_DTYPES[self.dtype].itemsize

    @property
    def chunk_rows(self) -> int:
        """Rows (of axis 0) that share one checksum: what fits 4 MiB, at least one."""
        return max(1, CHUNK_BYTES // max(1, self.row_bytes))

    @property
    def num_chunks(self) -> int:
        return -(-self.num_rows // self.chunk_rows) if self.nbytes else 0


@dataclass(frozen=True, slots=True)
class Parent:
    """The snapshot that a delta builds on: its id, its file name and how many pages it has."""

    id: bytes
    name: str
    num_pages: int


@dataclass(frozen=True, slots=True)
class SavedGroup:
    """A group of layers of a snapshot.

    Attributes:
      window: W, the newest tokens that its layers see; None: all.
      num_pages: M, pages of it that the snapshot consists of.
      layers: their numbers; none in a first group that only keeps the books, and none in a
        snapshot of a cache that is no `KVCache`.
    """

    window: int | None
    num_pages: int
    layers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Header:
    """What the header says, all of it checked.

    Attributes:
      page_size: S.
      num_pages: M, pages that the snapshot consists of, those of its parents included; of several
        groups of layers those of the first one.
      fingerprint: of the allocator that was saved.
      metadata: the user's.
      parent: of a delta; None for a whole snapshot.
      arrays: in the order of the file, those of the user among them.
      crcs: per array the CRC-32 of every chunk.
      groups: of layers, if there are several; else none.
    """

    page_size: int
    num_pages: int
    fingerprint: bytes
    metadata: Mapping[str, Scalar]
    parent: Parent | None
    arrays: tuple[ArraySpec, ...]
    crcs: tuple[tuple[int, ...], ...] = ()
    groups: tuple[SavedGroup, ...] = ()

    @property
    def counts(self) -> list[int]:
        """M of every group."""
        return [group.num_pages for group in self.groups] or [self.num_pages]

    @property
    def windows(self) -> list[int | None]:
        """W of every group."""
        return [group.window for group in self.groups] or [None]

    @property
    def extra(self) -> tuple[ArraySpec, ...]:
        """The user's arrays."""
        return tuple(spec for spec in self.arrays if spec.name.startswith(EXTRA))

    @property
    def asks(self) -> bool:
        """Whether its requests ask for more than the first versions hold, or were told more."""
        return any(spec.name == ASKED_LENGTH for spec in self.arrays)

    @property
    def renewed(self) -> bool:
        """Whether it is of an engine whose weights were replaced."""
        return any(spec.name == WEIGHTS for spec in self.arrays)

    @property
    def version(self) -> int:
        """Of the format: the first one that has what is here."""
        older = 3 if self.extra else 2 if self.groups else 1
        return 5 if self.renewed else 4 if self.asks else older

    def arrays_of_groups(self) -> list[list[ArraySpec]]:
        """The arrays of keys and values of every group."""
        found: list[list[ArraySpec]] = [[] for _ in self.counts]
        layers = dict[int | None, int]()
        for number, group in enumerate(self.groups):
            layers |= dict.fromkeys(group.layers, number)
        for spec in self.arrays:
            if spec.name.startswith("kv/"):
                found[layers[layer_of(spec.name)] if self.groups else 0].append(spec)
        return found


def layer_of(name: str) -> int | None:
    """The layer of an array `kv/.../<layer>`; None if the name is another."""
    found = re.fullmatch(r"kv/.*/(0|[1-9][0-9]{0,9})", name, re.ASCII | re.DOTALL)
    return None if found is None else int(found[1])


def aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def layout(header_bytes: int, arrays: tuple[ArraySpec, ...]) -> tuple[list[int], int]:
    """Where each array begins, and where the file ends."""
    # Computed, never read: what is not stored cannot overlap, leave a hole or point elsewhere.
    offsets, end = [], aligned(PREFIX.size + header_bytes)
    for spec in arrays:
        offsets.append(end)
        end = aligned(end + spec.nbytes)
    return offsets, end


def encode_header(header: Header) -> bytes:
    """Prefix and header; as long for any checksums, so that the length is known before the data.

    Raises:
      ValueError: metadata of a type or size that the format does not have.
    """
    check_metadata(header.metadata, ValueError)
    parent = header.parent
    crcs = header.crcs or tuple((0,) * spec.num_chunks for spec in header.arrays)
    groups = [[group.window or 0, group.num_pages, list(group.layers)] for group in header.groups]
    body: Any = msgpack.packb(
        {
            "arrays": [
                [s.name, s.dtype, list(s.shape), struct.pack(f"<{len(c)}I", *c)]
                for s, c in zip(header.arrays, crcs, strict=True)
            ],
            "fingerprint": header.fingerprint,
            **({"groups": groups} if groups else {}),
            "metadata": dict(header.metadata),
            "page_size": header.page_size,
            "pages": header.num_pages,
            "parent": parent and [parent.id, parent.name, parent.num_pages],
        }
    )
    if len(body) > MAX_HEADER_BYTES:
        raise ValueError(
            f"the header would take {len(body)} bytes and may take {MAX_HEADER_BYTES}: "
            "shorten the metadata, or split the sequences over several snapshots"
        )
    end = layout(len(body), header.arrays)[1]
    front = PREFIX.pack(MAGIC, header.version, len(body), end, 0)[:-4]
    return front + struct.pack("<I", zlib.crc32(body, zlib.crc32(front))) + body


def snapshot_id(front: bytes) -> bytes:
    """16 bytes that name a snapshot: BLAKE2b of prefix and header, which holds all checksums."""
    return hashlib.blake2b(front, digest_size=16).digest()


def check_metadata(metadata: Any, error: type[Exception]) -> None:
    """Refuse what is not a map of text to text, integers of 64 bits, floats, booleans or None."""
    if not isinstance(metadata, Mapping):
        raise error(f"metadata must be a map, got {type(metadata).__name__}")
    if len(metadata) > MAX_METADATA:
        raise error(f"metadata may have {MAX_METADATA} keys, got {len(metadata)}")
    for key, value in metadata.items():
        known = type(value) in (str, int, float, bool, type(None))
        if not _is(key, str) or not known:
            raise error(f"metadata must map str to str, int, float, bool or None, got {shown(key)}")
        if not all(is_text(text) for text in (key, value) if _is(text, str)):
            raise error(f"metadata {shown(key)} is not valid Unicode, or its value is not")
        if _is(value, int) and not -(2**63) <= value < 2**63:
            raise error(f"metadata {shown(key)} does not fit 64 bits with a sign")


# ---- reading


def _is(value: Any, kind: type) -> bool:
    """Exactly that type: True is no int here, or two files would say the same."""
    return type(value) is kind


def require(holds: bool | np.bool_, message: str) -> None:
    """Raise SnapshotCorrupt unless a rule holds."""
    if not holds:
        raise SnapshotCorrupt(message)


def split_prefix(front: bytes, file_bytes: int) -> int:
    """How long the header is, by the first 32 bytes of a file with that size."""
    require(front[:8] == MAGIC, f"not a snapshot: it begins with {bytes(front[:8])!r}")
    require(len(front) == PREFIX.size, f"cut within the first {PREFIX.size} bytes")
    _, version, header_bytes, declared, _ = PREFIX.unpack(front)
    if version not in VERSIONS:
        raise SnapshotVersion(
            f"the file has format version {version}, this release reads versions 1 to 5; use "
            "the release that wrote it, or a newer one"
        )
    require(
        0 < header_bytes <= MAX_HEADER_BYTES,
        f"the header claims {header_bytes} bytes; 1 to {MAX_HEADER_BYTES} are allowed",
    )
    require(declared == file_bytes, f"the file has {file_bytes} bytes, its prefix says {declared}")
    require(
        PREFIX.size + header_bytes <= file_bytes,
        f"the header claims {header_bytes} bytes, the file has {file_bytes}",
    )
    return header_bytes


def decode_header(front: bytes) -> Header:
    """Parse prefix and header, which `split_prefix` has bounded.

    Raises:
      SnapshotCorrupt: a rule of the format is broken; the message says which.
    """
    _, version, _, file_bytes, crc = PREFIX.unpack_from(front)
    body = front[PREFIX.size :]
    found = zlib.crc32(body, zlib.crc32(front[: PREFIX.size - 4]))
    require(found == crc, f"the header's checksum is {found:08x}, it should be {crc:08x}")
    fields = _unpack(body)
    require(_is(fields, dict), f"the header is no map but {type(fields).__name__}")
    grouped = version == 2 or (version >= 3 and "groups" in fields)
    keys = sorted([*KEYS, "groups"]) if grouped else KEYS
    require(list(fields) == keys, f"the header's keys are {shown(list(fields))}, not {keys}")
    page_size = _integer("page_size", fields["page_size"], 1, MAX_DIMENSION)
    require(page_size & (page_size - 1) == 0, f"page_size {page_size} is no power of two")
    require(_is(fields["fingerprint"], bytes), "fingerprint is not bytes")
    check_metadata(fields["metadata"], SnapshotCorrupt)
    arrays, crcs = _directory(fields["arrays"])
    header = Header(
        page_size=page_size,
        num_pages=_integer("pages", fields["pages"], 0, MAX_DIMENSION),
        fingerprint=fields["fingerprint"],
        metadata=fields["metadata"],
        parent=_parent(fields["parent"]),
        arrays=arrays,
        crcs=crcs,
        groups=_groups(fields["groups"]) if grouped else (),
    )
    require(
        (version >= 4) == header.asks,
        f"{ASKED_LENGTH} is in a file of version 4 or 5, and in every one",
    )
    require(
        (version == 5) == header.renewed, f"{WEIGHTS} is in a file of version 5, and in every one"
    )
    require(
        (version == 3) == bool(header.extra) or version >= 4,
        "arrays of the user are in a file of version 3, and in every one, or in one of version 4 "
        "or 5",
    )
    if header.groups:
        _require_layers(header)
    end = layout(len(body), arrays)[1]
    require(end == file_bytes, f"the arrays end at byte {end}, the file at {file_bytes}")
    return header


def _unpack(body: bytes) -> Any:
    """Every error of msgpack is one of ours, and only the one shortest form is accepted."""

    def refuse_extension(code: int, data: bytes) -> Any:
        raise ValueError(f"extension type {code}")

    limit = len(body)
    try:
        fields = msgpack.unpackb(
            body,
            raw=False,
            strict_map_key=True,
            ext_hook=refuse_extension,
            max_str_len=limit,
            max_bin_len=limit,
            max_array_len=min(limit, 1 << 16),
            max_map_len=min(limit, MAX_METADATA),
            max_ext_len=0,
        )
        again = msgpack.packb(fields)
    except Exception as error:  # msgpack raises a dozen unrelated classes
        kind = type(error).__name__
        raise SnapshotCorrupt(f"the header is not valid msgpack: {kind}: {error}") from None
    # One meaning, one form: else equal headers could have several ids, and a key that stands twice
    # would be read one way here and another way elsewhere.
    require(again == body, "the header is not in msgpack's shortest form, or names a key twice")
    return fields


def _integer(name: str, value: Any, low: int, high: int) -> int:
    require(_is(value, int), f"{name} is not an integer but {shown(value)}")
    require(low <= value <= high, f"{name} is {value}, outside {low}..{high}")
    return value


def _parent(value: Any) -> Parent | None:
    if value is None:
        return None
    require(_is(value, list) and len(value) == 3, "parent is not [id, name, pages]")
    ident, name, pages = value
    require(_is(ident, bytes) and len(ident) == 16, "the parent's id is not 16 bytes")
    require(
        _is(name, str) and is_plain_name(name),
        f"the parent's name {shown(name)} is not the name of a file in the same folder",
    )
    return Parent(ident, name, _integer("the parent's pages", pages, 0, MAX_DIMENSION))


def _groups(value: Any) -> tuple[SavedGroup, ...]:
    require(
        _is(value, list) and 2 <= len(value) <= MAX_GROUPS,
        f"groups is not a list of 2 to {MAX_GROUPS}",
    )
    groups = []
    for entry in value:
        require(
            _is(entry, list) and len(entry) == 3 and _is(entry[2], list),
            "a group is not [window, pages, layers]",
        )
        window = _integer("a group's window", entry[0], 0, MAX_DIMENSION)
        pages = _integer("a group's pages", entry[1], 0, MAX_DIMENSION)
        layers = [_integer("a group's layer", layer, 0, MAX_DIMENSION) for layer in entry[2]]
        groups.append(SavedGroup(window or None, pages, tuple(layers)))
    return tuple(groups)


def _require_layers(header: Header) -> None:
    """The first group has all tokens, and every layer is in one group and has arrays."""
    groups, first = header.groups, header.groups[0]
    require(
        first.window is None and first.num_pages == header.num_pages,
        "the first group has a window, or other pages than the header",
    )
    layers = [layer for group in groups for layer in group.layers]
    known = set(layers)
    require(
        len(known) == len(layers) and known == set(range(len(known))) and bool(known),
        "the groups have not the layers 0 to L-1, each once",
    )
    found = {layer_of(spec.name) for spec in header.arrays if spec.name.startswith("kv/")}
    require(found == known, "the arrays of keys and values are not those of the groups' layers")


def _directory(value: Any) -> tuple[tuple[ArraySpec, ...], tuple[tuple[int, ...], ...]]:
    require(_is(value, list), "arrays is not a list")
    entries = [_array(entry) for entry in value]
    names = [spec.name for spec, _ in entries]
    require(len(set(names)) == len(names), "two arrays have one name")
    return tuple(spec for spec, _ in entries), tuple(crcs for _, crcs in entries)


def _array(entry: Any) -> tuple[ArraySpec, tuple[int, ...]]:
    require(_is(entry, list) and len(entry) == 4, "an array is not [name, dtype, shape, checksums]")
    name, dtype, shape, crcs = entry
    require(
        _is(name, str) and is_name(name),
        f"an array's name is not text of 1 to {MAX_NAME_BYTES} bytes",
    )
    title, extra = printable(name), name.startswith(EXTRA)
    require(not extra or is_extra_name(name), f"{title}: the name of a user's array is a path")
    known = EXTRA_DTYPES if extra else DTYPES
    require(_is(dtype, str) and dtype in known, f"{title}: unknown dtype {shown(dtype)}")
    low, high = (0, MAX_EXTRA_AXES) if extra else (1, MAX_AXES)
    require(
        _is(shape, list) and low <= len(shape) <= high,
        f"{title}: the shape is not a list of {low} to {high} axes",
    )
    for size in shape:
        _integer(f"{title}: an axis", size, 0, MAX_DIMENSION)
    spec = ArraySpec(name, dtype, tuple(shape))
    require(not extra or _fits_numpy(spec), f"{title}: no array can have these axes")
    require(_is(crcs, bytes), f"{title}: the checksums are not bytes")
    require(
        len(crcs) == 4 * spec.num_chunks,
        f"{title}: {len(crcs)} bytes of checksums for {spec.num_chunks} chunks",
    )
    return spec, struct.unpack(f"<{spec.num_chunks}I", crcs)


def _fits_numpy(spec: ArraySpec) -> bool:
    """Whether there can be such an array: NumPy multiplies the axes that are not 0."""
    nonzero = math.prod(max(1, size) for size in spec.shape)
    return nonzero * EXTRA_DTYPES[spec.dtype].itemsize < MAX_ARRAY_BYTES
