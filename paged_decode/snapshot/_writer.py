"""Writing: arrays come in chunks; one thread computes checksums and writes while others gather."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import numpy as np

from ._crc import crc32
from ._files import Files, replacing, write_all
from ._format import PREFIX, ArraySpec, Header, encode_header, layout, snapshot_id
from ._reader import Progress, as_bytes

__all__ = ["array_chunks", "write_file"]

# Chunks that wait to be written while the next one is gathered. With that one three are in use,
# and the ring of a source has 4 buffers (`_out`).
_AHEAD = 2


def array_chunks(array: np.ndarray, spec: ArraySpec) -> Iterator[np.ndarray]:
    """An array in memory, cut where the format wants it cut."""
    rows = np.atleast_1d(array)
    for first in range(0, spec.num_rows, spec.chunk_rows):
        yield np.ascontiguousarray(rows[first : first + spec.chunk_rows])


def write_file(
    path: str | os.PathLike[str],
    header: Header,
    sources: Sequence[Iterable[np.ndarray]],
    *,
    files: Files,
    progress: Progress | None = None,
) -> bytes:
    """Write a snapshot in place of `path` and return its id.

    `sources` gives for every array of the header its chunks, in order; a chunk may be reused by
    its source when the third one after it is asked for.
    """
    front_bytes = len(encode_header(header))
    offsets, file_bytes = layout(front_bytes - PREFIX.size, header.arrays)
    crcs: list[list[int]] = [[] for _ in header.arrays]
    with replacing(path, files) as file, _Emitter(files, file) as emitter:
        for spec, source, offset, found in zip(header.arrays, sources, offsets, crcs, strict=True):
            for chunk in source if spec.nbytes else ():
                emitter.put(chunk, offset, found)
                offset += chunk.nbytes
                if progress:
                    progress(offset, file_bytes)
        emitter.finish()
        # Last, because it has the checksums; until then the file begins with zeros, which no reader
        # takes for a snapshot, and its name is one that nobody opens.
        front = encode_header(replace(header, crcs=tuple(map(tuple, crcs))))
        ends = [o + s.nbytes for o, s in zip(offsets, header.arrays, strict=True) if s.nbytes]
        end = max([front_bytes, *ends])
        write_all(files, file, memoryview(bytes(file_bytes - end)), end)
        write_all(files, file, memoryview(front), 0)
        if progress:
            progress(file_bytes, file_bytes)
    return snapshot_id(front)


class _Emitter:
    """Two threads: one computes a checksum while the other writes; writes stay in order."""

    def __init__(self, files: Files, file: int):
        self._files, self._file = files, file
        self._threads = ThreadPoolExecutor(2)
        self._pending: deque[Future[None]] = deque()

    def put(self, chunk: np.ndarray, offset: int, crcs: list[int]) -> None:
        """Write the chunk behind those before it, and append its checksum to `crcs`."""
        while len(self._pending) > _AHEAD - 1:
            self._pending.popleft().result()
        last = self._pending[-1] if self._pending else None
        crcs.append(0)
        job = (chunk, offset, crcs, len(crcs) - 1, last)
        try:
            self._pending.append(self._threads.submit(self._emit, *job))
        except RuntimeError:  # no thread is to be had, or the interpreter exits
            self._threads.shutdown()  # what was refused may be in its queue all the same
            self._emit(*job)

    def _emit(
        self, chunk: np.ndarray, offset: int, crcs: list[int], at: int, last: Future[None] | None
    ) -> None:
        data = as_bytes(chunk)
        crcs[at] = crc32(data)
        if last is not None:
            last.result()
        write_all(self._files, self._file, data, offset)

    def finish(self) -> None:
        """Return when everything is written; raises what a write raised."""
        while self._pending:
            self._pending.popleft().result()

    def __enter__(self) -> _Emitter:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(wait=True)
