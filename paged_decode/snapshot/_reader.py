"""Reading: one file, or a delta with its chain of parents. Files are read, never mapped."""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

from .._text import printable
from ..errors import SnapshotCorrupt, SnapshotMismatch
from ._about import about
from ._crc import crc32
from ._files import open_for_reading
from ._format import (
    DTYPES,
    EXTRA_DTYPES,
    MAX_PARENTS,
    PREFIX,
    ArraySpec,
    Header,
    Parent,
    aligned,
    decode_header,
    layout,
    snapshot_id,
    split_prefix,
)

__all__ = [
    "Chain",
    "Counter",
    "Progress",
    "Read",
    "SnapshotFile",
    "as_bytes",
    "chunk_bytes",
    "fresh_arrays",
    "read_all",
    "source_name",
]

Progress = Callable[[int, int], None]
"""Called with the bytes done and the bytes there are, which are equal in the last call."""


class Read(NamedTuple):
    """Reads one chunk into its place and compares its checksum; any thread may run it."""

    num_bytes: int  # that it puts there
    run: Callable[[], None]


_THREADS = 2  # one waits for the disk or for memory while the other computes a checksum
# A chunk is read in pieces and not at once: its memory is written, and summed up right after.
_PIECE_BYTES = 1 << 20  # so few that the checksum finds them in the cache of its core


class SnapshotFile:
    """One open file whose prefix, header and padding are in order; arrays are checked when read.

    As text it is its path, for messages; `real` is where it lies, behind any symbolic links.

    Raises:
      SnapshotCorrupt, SnapshotVersion: what is wrong with it.
      OSError: it cannot be opened or read.
    """

    def __init__(self, path: str | os.PathLike[str], *, follow: bool = True):
        self.path, self.real = Path(path), Path(os.path.realpath(path))
        self._file = open_for_reading(path, follow=follow)
        try:
            with about(path):
                self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        self.file_bytes = os.fstat(self._file).st_size
        # Of the open file, not of its name: what stands there may be replaced meanwhile.
        prefix = os.pread(self._file, PREFIX.size, 0)
        header_bytes = split_prefix(prefix, self.file_bytes)
        front = self._read(PREFIX.size + header_bytes, 0)
        self.header: Header = decode_header(front)
        self.id = snapshot_id(front)
        self.specs = {spec.name: spec for spec in self.header.arrays}
        offsets, _ = layout(header_bytes, self.header.arrays)
        self._offsets = dict(zip(self.specs, offsets, strict=True))
        self._crcs = dict(zip(self.specs, self.header.crcs, strict=True))
        ends = [o + s.nbytes for o, s in zip(offsets, self.header.arrays, strict=True)]
        for end in (len(front), *ends):
            if any(self._read(aligned(end) - end, end)):
                raise SnapshotCorrupt(f"the padding after byte {end} is not zero")

    def _read(self, size: int, offset: int) -> bytes:
        data = bytearray(size)
        self._read_into(memoryview(data), offset)
        return bytes(data)

    def _read_into(self, data: memoryview, offset: int) -> None:
        while len(data):
            got = os.preadv(self._file, [data], offset)
            if got == 0:
                raise SnapshotCorrupt(f"the file ended early, at byte {offset}")
            data, offset = data[got:], offset + got

    def array(self, name: str) -> np.ndarray:
        """The whole array, its checksums compared."""
        spec = self.specs[name]
        out = np.empty(spec.shape, EXTRA_DTYPES[spec.dtype])
        for read in self.reads(name, out):
            read.run()
        return out

    def read_chunk(self, name: str, chunk: int, data: memoryview) -> None:
        """Read one chunk, as long as `data`, and compare its checksum."""
        spec = self.specs[name]
        begin, crc = self._offsets[name] + chunk * spec.chunk_rows * spec.row_bytes, 0
        with about(self.path):
            for at in range(0, len(data), _PIECE_BYTES):
                piece = data[at : at + _PIECE_BYTES]
                self._read_into(piece, begin + at)
                crc = crc32(piece, crc)
            if crc != self._crcs[name][chunk]:
                raise SnapshotCorrupt(f"{printable(name)}: chunk {chunk} is not what was written")

    def reads(self, name: str, out: np.ndarray) -> Iterator[Read]:
        """What reads the array into `out`, a chunk each, in the order of the file."""
        spec, data = self.specs[name], as_bytes(out)
        for chunk in range(spec.num_chunks):
            begin = chunk * spec.chunk_rows * spec.row_bytes
            part = data[begin : begin + chunk_bytes(spec, chunk)]
            yield Read(len(part), partial(self.read_chunk, name, chunk, part))

    def verify(self, counter: Counter | None = None) -> None:
        """Compare every checksum."""
        for name, spec in self.specs.items():
            for chunk in range(spec.num_chunks):
                data = bytearray(chunk_bytes(spec, chunk))
                self.read_chunk(name, chunk, memoryview(data))
                if counter is not None:
                    counter.add(len(data))

    def __str__(self) -> str:
        return printable(self.path)

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> SnapshotFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class Chain:
    """A snapshot and its parents, opened together: `files[0]` is the newest.

    A parent is looked for under its name in the folder in which its child lies, behind any symbolic
    links, and must have the id that the child names.

    Attributes:
      places: of every group of layers int64 `[M, 2]`: for each page which of the files holds it,
        and as which of its rows.
      groups: in which group the pages of every array of keys or values are.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.files: list[SnapshotFile] = []
        try:
            self.files.append(SnapshotFile(path))
            while (wanted := self.files[-1].header.parent) is not None:
                if len(self.files) > MAX_PARENTS:
                    with about(path):
                        raise SnapshotCorrupt(f"it has more than {MAX_PARENTS} parents")
                with about(self.files[-1].path):
                    self.files.append(_parent_of(self.files[-1], wanted))
            self.groups = self._groups()
            self.places = self._place_pages()
        except BaseException:
            self.close()
            raise

    @property
    def header(self) -> Header:
        return self.files[0].header

    @property
    def id(self) -> bytes:
        return self.files[0].id

    def _groups(self) -> dict[str, int]:
        """Those of all files, whose groups are the same but for the pages in them."""
        header = self.header
        for file in self.files[1:]:
            theirs = [(group.window, group.layers) for group in file.header.groups]
            if theirs != [(group.window, group.layers) for group in header.groups]:
                with about(file.path):
                    raise SnapshotMismatch("this parent has other groups of layers than its delta")
        each = enumerate(header.arrays_of_groups())
        return {spec.name: number for number, specs in each for spec in specs}

    def _place_pages(self) -> list[np.ndarray]:
        for file in self.files:  # before a number of pages is believed
            with about(file.path):
                _require_tokens(file)
        kv = [file.header.arrays_of_groups() for file in self.files]
        places = []
        for group in range(len(self.header.counts)):
            places.append(self._place_group(group, [specs[group] for specs in kv]))
        return places

    def _place_group(self, group: int, kv: list[list[ArraySpec]]) -> np.ndarray:
        name = source_name(group)
        place = np.zeros((0, 2), np.int64)
        for at in reversed(range(len(self.files))):
            with about(self.files[at].path):
                source = _sources_of(self.files[at], name, group, len(place), kv[at])
            here = np.stack([np.full_like(source, at), source], axis=1)
            older = source < 0
            if older.any():
                here[older] = place[-1 - source[older]]
            place = here
        return place

    def reads(self, name: str, kept: np.ndarray, out: np.ndarray) -> Iterator[Read]:
        """What reads pages `kept` `[m]` of one array of keys or values, in this order, to `out`."""
        place = self.places[self.groups[name]][kept]
        for at, file in enumerate(self.files):
            mine = np.flatnonzero(place[:, 0] == at)
            rows = place[mine, 1]
            spec = file.specs[name]
            if len(mine) == 0 or spec.row_bytes == 0:
                continue
            whole = len(rows) == spec.shape[0] == len(out) and (rows == np.arange(len(rows))).all()
            if whole:
                yield from file.reads(name, out)
                continue
            chunk_of = rows // spec.chunk_rows
            order = chunk_of.argsort(kind="stable")
            begins = np.flatnonzero(np.diff(chunk_of[order]))
            for here in np.split(order, begins + 1):
                chunk = int(chunk_of[here[0]])
                first = chunk * spec.chunk_rows
                run = partial(_pick, file, spec, chunk, rows[here] - first, mine[here], out)
                yield Read(len(here) * spec.row_bytes, run)

    def close(self) -> None:
        for file in self.files:
            file.close()

    def __enter__(self) -> Chain:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def _parent_of(child: SnapshotFile, wanted: Parent) -> SnapshotFile:
    """The file that a delta names, which is that one still."""
    path, name = child.real.parent / wanted.name, printable(wanted.name)
    try:
        parent = SnapshotFile(path)
    except FileNotFoundError:
        raise SnapshotMismatch(
            f"it is a delta of {name}, which is not in {printable(path.parent)}; put it there, or "
            "compact the chain where it is whole"
        ) from None
    try:
        if parent.id != wanted.id:
            raise SnapshotMismatch(
                f"it is a delta of {name} with id {wanted.id.hex()}, but the file of that name has "
                f"id {parent.id.hex()}: it was replaced since"
            )
        if parent.header.num_pages != wanted.num_pages:
            raise SnapshotCorrupt(
                f"its parent {name} has {parent.header.num_pages} pages, not {wanted.num_pages}"
            )
    except BaseException:
        parent.close()
        raise
    return parent


def _require_tokens(file: SnapshotFile) -> None:
    """Every file, a parent too, has the tokens of all its pages: so many there can be."""
    found, header = file.specs.get("page/tokens"), file.header
    if found is None:
        raise SnapshotCorrupt("array page/tokens is missing")
    if (found.dtype, found.shape) != ("int32", (header.num_pages, header.page_size)):
        raise SnapshotCorrupt("page/tokens is not int32 [pages, page_size]")
    for number, group in enumerate(header.groups[1:], 1):  # every page is named by one of these
        named = [file.specs.get(f"group/{number}/{name}") for name in ("pages", "entry_page")]
        counts = [spec.shape[0] for spec in named if spec is not None and len(spec.shape) == 1]
        if group.num_pages > sum(counts):
            raise SnapshotCorrupt(f"group {number} has more pages than it names")


def _sources_of(
    file: SnapshotFile, name: str, group: int, older: int, kv: list[ArraySpec]
) -> np.ndarray:
    """int64 `[M]`: of each page of a group the row here, or -1 - p of the parent's `older` ones."""
    own, count = file.specs.get(name), file.header.counts[group]
    if (own is None) != (file.header.parent is None):
        raise SnapshotCorrupt(f"a delta, and only a delta, has {name}")
    if own is None:
        _require_rows(file, count, kv)
        return np.arange(count)
    if (own.dtype, own.shape) != ("int32", (count,)):
        raise SnapshotCorrupt(f"{name} is not int32 [pages]")
    source = file.array(name).astype(np.int64)
    new = source >= 0
    if (source < -older).any() or (source[new] != np.arange(new.sum())).any():
        raise SnapshotCorrupt(f"{name} names a page that is not there")
    _require_rows(file, int(new.sum()), kv)
    return source


def source_name(group: int) -> str:
    """The array of a delta that says where the pages of a group are."""
    return f"group/{group}/source" if group else "pages/source"


def _require_rows(file: SnapshotFile, pages: int, kv: list[ArraySpec]) -> None:
    """Every array of keys and values has a row for each of the pages that lie in this file."""
    if file.header.num_pages and not kv and not file.header.groups:
        raise SnapshotCorrupt("there are pages, but no array of keys and values")
    for spec in kv:
        if spec.shape[0] != pages:
            raise SnapshotCorrupt(
                f"{printable(spec.name)} has {spec.shape[0]} rows for {pages} pages that lie in "
                "this file"
            )


def _pick(
    file: SnapshotFile,
    spec: ArraySpec,
    chunk: int,
    rows: np.ndarray,
    where: np.ndarray,
    out: np.ndarray,
) -> None:
    """Read a chunk, and put some of its rows where they belong."""
    count = chunk_bytes(spec, chunk) // spec.row_bytes
    buffer = np.empty((count, *spec.shape[1:]), DTYPES[spec.dtype])
    file.read_chunk(spec.name, chunk, as_bytes(buffer))
    out[where] = buffer[rows]


def read_all(reads: Iterable[Read], progress: Progress | None = None) -> None:
    """Run them, by a few threads; raises what a broken one, or `progress`, raised.

    Each thread has a stretch of its own: the system reads ahead of those who read in order.
    """
    reads = list(reads)
    bounds = [len(reads) * i // _THREADS for i in range(_THREADS + 1)]
    counter = Counter(progress, sum(read.num_bytes for read in reads))

    def stretch(begin: int, end: int) -> None:
        for read in reads[begin:end]:
            read.run()
            counter.add(read.num_bytes)

    with ThreadPoolExecutor(_THREADS) as threads:
        list(threads.map(stretch, bounds[:-1], bounds[1:]))


class Counter:
    """Tells a `Progress` of what threads have done, one call at a time."""

    def __init__(self, progress: Progress | None, total: int):
        self._progress, self._total, self._done = progress, total, 0
        self._lock = threading.Lock()

    def add(self, num_bytes: int) -> None:
        if self._progress is None:
            return
        with self._lock:
            self._done += num_bytes
            self._progress(self._done, self._total)


def chunk_bytes(spec: ArraySpec, chunk: int) -> int:
    rows = min(spec.chunk_rows, spec.num_rows - chunk * spec.chunk_rows)
    return rows * spec.row_bytes


def as_bytes(array: Any) -> memoryview:
    """The memory of a contiguous array."""
    return memoryview(array.reshape(-1).view(np.uint8))


def fresh_arrays(shapes: Iterable[tuple[tuple[int, ...], np.dtype]]) -> list[np.ndarray]:
    """Arrays whose memory was never used, so that it is taken from the system as it is filled.

    They share one mapping in pages of 2 MiB, where the system has them: filling memory in pages of
    4 KiB takes three times as long as reading a cached file. Each begins at a multiple of 64
    bytes, so that JAX on a CPU need not copy it.
    """
    shapes = list(shapes)
    sizes = [int(np.prod(shape, dtype=np.int64)) * dtype.itemsize for shape, dtype in shapes]
    block: Any = _private_mapping(max(1, sum(map(aligned, sizes))))
    memory, arrays, begin = np.frombuffer(block, np.uint8), [], 0
    for (shape, dtype), size in zip(shapes, sizes, strict=True):
        arrays.append(memory[begin : begin + size].view(dtype).reshape(shape))
        begin += aligned(size)
    return arrays


def _private_mapping(nbytes: int) -> Any:
    if not hasattr(mmap, "MAP_PRIVATE"):  # Windows
        return np.empty(nbytes, np.uint8)
    try:
        block = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"there are no {nbytes} bytes to read the pages into") from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            block.madvise(mmap.MADV_HUGEPAGE)
    return block
