"""Folding a delta and its parents to one whole file."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from typing import Any

import numpy as np

from .._text import printable
from . import _files
from ._format import DTYPES, ArraySpec, encode_header
from ._open import Opened, SnapshotInfo, inspect_snapshot
from ._reader import Chain, Progress, chunk_bytes, source_name
from ._writer import array_chunks, write_file

__all__ = ["compact_snapshot"]


def compact_snapshot(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    progress: Progress | None = None,
) -> SnapshotInfo:
    """Fold a delta and its parents to one whole snapshot, in place of `path` or at `out`.

    Deltas of `path` name its old content: after folding in place they are refused.

    Metadata and arrays of the user's are those of the newest file.

    Raises:
      SnapshotCorrupt, SnapshotVersion, SnapshotMismatch, OSError: as `load_snapshot`; OSError also
        if `out` is one of the parents, or cannot be written, or its header would be too long.
    """
    target = path if out is None else out
    with Opened(path) as opened:
        header, chain = opened.chain.header, opened.chain
        real = os.path.realpath(target)
        if any(str(parent.real) == real for parent in chain.files[1:]):
            text = f"this is a parent of {printable(path)}; others may need it: name another file"
            raise OSError(errno.EINVAL, text, str(target))
        specs, sources, counts = [], [], header.counts
        old = {source_name(group) for group in range(len(counts))}
        for spec in header.arrays:
            if spec.name in old:
                continue
            if spec.name.startswith("kv/"):
                rows = counts[chain.groups[spec.name]]
                whole = ArraySpec(spec.name, spec.dtype, (rows, *spec.shape[1:]))
                sources.append(_kv_chunks(chain, whole))
            else:
                whole = spec
                sources.append(array_chunks(chain.files[0].array(spec.name), spec))
            specs.append(whole)
        folded = replace(header, parent=None, arrays=tuple(specs), crcs=())
        try:
            encode_header(folded)  # the checksums of all pages may be too many for it
        except ValueError as error:
            raise OSError(errno.EFBIG, f"it cannot be folded: {error}", str(target)) from None
        write_file(target, folded, sources, files=_files.DEFAULT, progress=progress)
    return inspect_snapshot(target)


def _kv_chunks(chain: Chain, spec: ArraySpec) -> Any:
    for chunk in range(spec.num_chunks):
        first = chunk * spec.chunk_rows
        count = chunk_bytes(spec, chunk) // spec.row_bytes
        out = np.empty((count, *spec.shape[1:]), DTYPES[spec.dtype])
        for read in chain.reads(spec.name, np.arange(first, first + count), out):
            read.run()
        yield out
