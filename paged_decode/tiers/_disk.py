"""The disk tier: chunks of pages in files of the snapshot container."""

from __future__ import annotations

import os
import stat
from collections import OrderedDict
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ..allocator.arguments import as_count
from ..errors import SnapshotCorrupt, SnapshotError
from ..snapshot import _files
from ..snapshot._format import DTYPES, ArraySpec, Header
from ..snapshot._reader import SnapshotFile
from ..snapshot._writer import array_chunks, write_file

__all__ = ["DiskTier"]

_SUFFIX = ".pgt"
_MAX_KEY_BYTES = 128  # a digest that names a file in hexadecimal digits has fewer
_T = TypeVar("_T")
Content = tuple[tuple[bytes, ...], tuple[np.ndarray, ...], list[np.ndarray]]


class DiskTier:
    """Chunks that a `HostTier` gave up, one checked file each, the oldest removed first.

    The files are snapshot containers: every byte is covered by a checksum, and nothing is
    unpickled. A file that is damaged, is no chunk, or cannot be written, is as if it had never
    been: a regular one with the tier's suffix is removed then, all else in the folder is left.
    Writing and reading block the step that asks for them. The folder is read when the tier is made,
    so pages survive a restart if the allocator has the same `hash_key` and `fingerprint`. They hold
    the keys and values of prompts, and are believed: protect the folder.

    Args:
      folder: for this tier alone; made if it is not there.
      capacity_bytes: of all files together.
    """

    def __init__(self, folder: str | os.PathLike[str], capacity_bytes: int):
        self.folder = Path(folder)
        self.capacity_bytes = as_count("capacity_bytes", capacity_bytes, 1)
        self.num_bytes = 0
        self._known: OrderedDict[Path, tuple[int, list[bytes]]] = OrderedDict()  # oldest first
        self._where: dict[bytes, Path] = {}
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in self._files_by_age():
            self._enter(path)
        self._trim(0)

    def _files_by_age(self) -> list[Path]:
        """The files that may be chunks, the oldest first; links, folders and pipes are none."""
        found = []
        with os.scandir(self.folder) as entries:
            for entry in entries:
                with suppress(OSError):  # gone meanwhile
                    if entry.name.endswith(_SUFFIX) and entry.is_file(follow_symlinks=False):
                        age = entry.stat(follow_symlinks=False).st_mtime_ns
                        found.append((age, entry.name))
        return [self.folder / name for _, name in sorted(found)]

    def write(self, keys: Iterable[bytes], tokens: Iterable[np.ndarray], pages: Any) -> bool:
        """Keep a chunk: n keys, and arrays with their pages. Whether it is on the disk now."""
        keys, tokens = tuple(keys), tuple(tokens)
        if all(key in self._where for key in keys):
            return True
        if len(set(map(len, keys))) > 1:  # a digest of one's own may be of any length
            return False
        arrays = _arrays(keys, tokens, pages)
        specs = tuple(ArraySpec(n, str(a.dtype), a.shape) for n, a in arrays.items())
        header = Header(
            page_size=_page_size(specs[2].shape[1]),
            num_pages=len(keys),
            fingerprint=b"",
            metadata={},
            parent=None,
            arrays=specs,
        )
        path = self.folder / f"{keys[-1].hex()}-{len(keys)}{_SUFFIX}"
        if any(spec.dtype not in DTYPES for spec in specs) or not _is_chunk(header):
            return False
        self._forget(path)  # of other keys that end alike: its name will be the new one's
        sources = [array_chunks(a, s) for a, s in zip(arrays.values(), specs, strict=True)]
        try:
            if os.path.lexists(path) and not stat.S_ISREG(os.lstat(path).st_mode):
                return False  # a link, say: what it leads to is not ours to replace
            self._trim(sum(spec.nbytes for spec in specs))
            write_file(path, header, sources, files=_files.DEFAULT)
        except OSError:
            return False
        self._enter(path)
        self._trim(0)
        return path in self._known

    def read(self, key: bytes) -> Content | None:
        """Keys, tokens and pages of the chunk with that page, or None."""
        path = self._where.get(key)
        if path is None:
            return None
        content = self._open(path, _read_content)
        if content is None:
            return None
        if key not in content[0]:  # another chunk lies there since
            self._leave(path)
            self._enter(path)
            return None
        self._known.move_to_end(path)
        return content

    def forget(self, keys: Iterable[bytes]) -> None:
        """Remove the chunks with any of these pages."""
        for path in {self._where[key] for key in keys if key in self._where}:
            self._forget(path)

    def clear(self) -> None:
        """Remove every chunk."""
        for path in list(self._known):
            self._forget(path)

    def _enter(self, path: Path) -> None:
        """Take up a file."""
        found = self._open(path, lambda file: (file.file_bytes, _read_keys(file)))
        if found is not None:
            self._known[path] = found[0], list(found[1])
            self.num_bytes += found[0]
            self._where.update(dict.fromkeys(found[1], path))

    def _open(self, path: Path, read: Callable[[SnapshotFile], _T]) -> _T | None:
        """Read a file; one that is no sound chunk is removed, one that cannot be read is left."""
        try:
            with SnapshotFile(path, follow=False) as file:
                if file.file_bytes > self.capacity_bytes or not _is_chunk(file.header):
                    raise SnapshotCorrupt("it is no chunk of this tier")
                return read(file)
        except SnapshotError:
            self._forget(path)
        except (OSError, MemoryError):
            self._leave(path)
        return None

    def _leave(self, path: Path) -> None:
        """Know nothing of a file any more."""
        num_bytes, keys = self._known.pop(path, (0, []))
        self.num_bytes -= num_bytes
        for key in keys:
            if self._where.get(key) == path:  # a later file may have the page, too
                del self._where[key]

    def _forget(self, path: Path) -> None:
        """Know nothing of a file, and remove it, if a file it is."""
        self._leave(path)
        with suppress(OSError):
            if stat.S_ISREG(os.lstat(path).st_mode):
                os.unlink(path)

    def _trim(self, needed: int) -> None:
        while self._known and self.num_bytes + needed > self.capacity_bytes:
            self._forget(next(iter(self._known)))


def _arrays(
    keys: tuple[bytes, ...], tokens: tuple[np.ndarray, ...], pages: Any
) -> dict[str, np.ndarray]:
    padded = np.zeros((len(keys), max(map(len, tokens))), np.int32)
    for row, part in enumerate(tokens):
        padded[row, : len(part)] = part
    return {
        "tier/keys": np.frombuffer(b"".join(keys), np.uint8).reshape(len(keys), len(keys[0])),
        "tier/filled": np.array([len(t) for t in tokens], np.int32),
        "tier/tokens": padded,
    } | {f"tier/pages/{i}": np.asarray(each) for i, each in enumerate(pages)}


def _page_size(width: int) -> int:
    return 1 << (width - 1).bit_length()


def _is_chunk(header: Header) -> bool:
    """Whether the arrays are those of n pages: keys, tokens, and rows of keys and values."""
    specs, count = {spec.name: spec for spec in header.arrays}, header.num_pages
    if count < 1 or header.parent is not None or len(specs) < 4:
        return False
    names = [f"tier/pages/{i}" for i in range(len(specs) - 3)]
    if specs.keys() != {"tier/keys", "tier/filled", "tier/tokens", *names}:
        return False
    keys, filled, tokens = (specs[f"tier/{n}"] for n in ("keys", "filled", "tokens"))
    kinds = [(s.dtype, len(s.shape), s.shape[0]) for s in (keys, filled, tokens)]
    return (
        kinds == [("uint8", 2, count), ("int32", 1, count), ("int32", 2, count)]
        and 1 <= keys.shape[1] <= _MAX_KEY_BYTES
        and tokens.shape[1] >= 1
        and header.page_size == _page_size(tokens.shape[1])
        and all(_has_rows_for(count, specs[name].shape) for name in names)
    )


def _has_rows_for(count: int, shape: tuple[int, ...]) -> bool:
    """Whether as many rows for each page: layers that travel together are one array."""
    return len(shape) > 0 and shape[0] > 0 and shape[0] % count == 0


def _read_keys(file: SnapshotFile) -> tuple[bytes, ...]:
    keys = tuple(row.tobytes() for row in file.array("tier/keys"))
    if len(set(keys)) != len(keys):
        raise SnapshotCorrupt("it has a page twice")
    return keys


def _read_content(file: SnapshotFile) -> Content:
    keys, filled, tokens = _read_keys(file), file.array("tier/filled"), file.array("tier/tokens")
    if (filled < 1).any() or (filled > tokens.shape[1]).any():
        raise SnapshotCorrupt("it has a page of more tokens than fit it, or of none")
    parts = tuple(row[:n] for row, n in zip(tokens, filled.tolist(), strict=True))
    pages = [file.array(f"tier/pages/{i}") for i in range(len(file.specs) - 3)]
    return keys, parts, pages
