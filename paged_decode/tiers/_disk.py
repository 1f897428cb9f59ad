"""The disk tier: chunks of pages in files of the snapshot container."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import SnapshotError
from ..snapshot import Files, OSFiles
from ..snapshot._format import DTYPES, ArraySpec, Header
from ..snapshot._reader import SnapshotFile
from ..snapshot._writer import array_chunks, write_file

__all__ = ["DiskTier"]

_SUFFIX = ".pgt"
Content = tuple[tuple[bytes, ...], tuple[np.ndarray, ...], list[np.ndarray]]


class DiskTier:
    """Chunks that a `HostTier` gave up, one checked file each, the oldest removed first.

    The files are snapshot containers: every byte is covered by a checksum, and nothing is
    unpickled. A file that is damaged, or cannot be written, is as if it had never been. Writing and
    reading block the step that asks for them. The folder is read when the tier is made, so pages
    survive a restart if the allocator has the same `hash_key` and `fingerprint`. They hold the keys
    and values of prompts: protect the folder.

    Args:
      folder: for this tier alone; made if it is not there.
      capacity_bytes: of all files together.
      files: the file operations; for tests.
    """

    def __init__(
        self, folder: str | os.PathLike[str], capacity_bytes: int, *, files: Files | None = None
    ):
        if capacity_bytes < 1:
            raise ValueError(f"capacity_bytes must be positive, got {capacity_bytes}")
        self.folder, self.capacity_bytes = Path(folder), capacity_bytes
        self.num_bytes = 0
        self._files = files or OSFiles()
        self._known: OrderedDict[Path, tuple[int, list[bytes]]] = OrderedDict()  # oldest first
        self._where: dict[bytes, Path] = {}
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(self.folder.glob(f"*{_SUFFIX}"), key=lambda p: p.stat().st_mtime_ns):
            self._enter(path)

    def write(self, keys: Iterable[bytes], tokens: Iterable[np.ndarray], pages: Any) -> bool:
        """Keep a chunk: n keys, and arrays with their pages. Whether it is on the disk now."""
        keys, tokens = tuple(keys), tuple(tokens)
        if all(key in self._where for key in keys):
            return True
        width = max(len(t) for t in tokens)
        padded = np.zeros((len(keys), width), np.int32)
        for row, part in enumerate(tokens):
            padded[row, : len(part)] = part
        arrays = {
            "tier/keys": np.frombuffer(b"".join(keys), np.uint8).reshape(len(keys), -1),
            "tier/filled": np.array([len(t) for t in tokens], np.int32),
            "tier/tokens": padded,
        } | {f"tier/pages/{i}": np.asarray(each) for i, each in enumerate(pages)}
        specs = tuple(ArraySpec(n, str(a.dtype), a.shape) for n, a in arrays.items())
        if any(spec.dtype not in DTYPES for spec in specs):
            return False
        header = Header(
            page_size=1 << (width - 1).bit_length(),
            pages=len(keys),
            fingerprint=b"",
            metadata={},
            parent=None,
            arrays=specs,
        )
        path = self.folder / f"{keys[-1].hex()}-{len(keys)}{_SUFFIX}"
        self._forget(path)
        sources = [array_chunks(a, s) for a, s in zip(arrays.values(), specs, strict=True)]
        try:
            self._trim(sum(spec.nbytes for spec in specs))
            write_file(path, header, sources, files=self._files)
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
        try:
            with SnapshotFile(path) as file:
                keys, filled, tokens = (
                    file.array(f"tier/{name}") for name in ("keys", "filled", "tokens")
                )
                count = len(file.specs) - 3
                pages = [file.array(f"tier/pages/{i}") for i in range(count)]
        except (OSError, SnapshotError, KeyError):
            self._forget(path)
            return None
        parts = tuple(row[:n] for row, n in zip(tokens, filled.tolist(), strict=True))
        self._known.move_to_end(path)
        return tuple(row.tobytes() for row in keys), parts, pages

    def _enter(self, path: Path) -> None:
        """Take up a file; one that is not sound is removed."""
        try:
            with SnapshotFile(path) as file:
                keys = [row.tobytes() for row in file.array("tier/keys")]
                self._known[path] = file.file_bytes, keys
        except (OSError, SnapshotError, KeyError):
            self._forget(path)
            return
        self.num_bytes += self._known[path][0]
        self._where.update(dict.fromkeys(keys, path))

    def _forget(self, path: Path) -> None:
        num_bytes, keys = self._known.pop(path, (0, []))
        self.num_bytes -= num_bytes
        for key in keys:
            if self._where.get(key) == path:  # a later file may have the page, too
                del self._where[key]
        path.unlink(missing_ok=True)

    def _trim(self, needed: int) -> None:
        while self._known and self.num_bytes + needed > self.capacity_bytes:
            self._forget(next(iter(self._known)))
