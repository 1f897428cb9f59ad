"""Pages on their way from the devices to a file, whatever shape the cache has.

```
leaf [N, Hk, S, D] on a device, or some heads of it on each of several
  gather: the pages of a batch, zero behind their tokens     on the accelerator
  send: to page-locked memory, two batches ahead             beside what the device does
  cut: chunks of the format, the pieces of all devices together
  hand over: in one of 4 buffers, while the chunk before is written
```

From a CPU there is nothing to gather or send: NumPy sees the leaf, and takes rows of it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .._devices import bits, pinned_sharding, unbits
from ._format import DTYPES
from ._parts import Part

__all__ = ["BATCH_CHUNKS", "page_chunks"]

_RING = 4  # buffers of a chunk each: see `write_file`
BATCH_CHUNKS = 8  # 32 MiB leave an accelerator together, or arrive there
_AHEAD = 2  # batches on their way, besides the one that is used


def page_chunks(
    cache: Any,
    parts: list[Part],
    pages: Sequence[np.ndarray],
    filled: Sequence[np.ndarray],
    page_size: int,
    *,
    copy: bool,
) -> Iterator[np.ndarray]:
    """The pages `[M]` of every part, those of its group, part after part, in chunks of the format.

    Slots from `filled` on are zero: what lies there may be of another prompt. While a chunk is
    used, the next ones are on their way from an accelerator, those of the next part too. A chunk
    may lie in a ring of 4 buffers.

    Args:
      copy: return when nothing more is read from the cache, instead of reading as chunks are asked
        for. What came from an accelerator stays in page-locked memory until its chunk is asked for.
    """
    batches = _batches(cache, parts, pages, filled, page_size)
    if copy:
        batches = _out_of_the_cache(batches)
    rings = _Rings(copy=False)
    return (chunk for batch in batches for chunk in batch.chunks(rings))


def _out_of_the_cache(batches: Iterator[_Batch]) -> Iterator[_Batch]:
    """Take all of them, those on the host by two threads; none is kept longer than it is used."""
    own, taken, jobs = _Rings(copy=True), deque[_Batch](), []
    with ThreadPoolExecutor(2) as threads:
        for batch in batches:
            taken.append(batch)
            if batch.is_on_host:
                jobs.append(threads.submit(batch.out_of_the_cache, own))
            else:
                batch.out_of_the_cache(own)
        for job in jobs:
            job.result()
    return (taken.popleft() for _ in range(len(taken)))


def _batches(
    cache: Any,
    parts: list[Part],
    pages: Sequence[np.ndarray],
    filled: Sequence[np.ndarray],
    page_size: int,
) -> Iterator[_Batch]:
    """Batches of 32 MiB from an accelerator, of a chunk from the host; some begin ahead."""
    leaves = jax.tree.leaves(cache)
    ahead: deque[_Batch] = deque()
    places: dict[Any, list[_Rows]] = {}  # the same for parts of a group with equally large pages
    for part in parts:
        pieces = _pieces(leaves[part.leaf], part)
        count = part.spec(0).chunk_rows
        if any(piece.pinned is not None for piece in pieces):
            count *= BATCH_CHUNKS
        alike, ids, ends = (part.group, count), pages[part.group], filled[part.group]
        if alike not in places:
            cuts = [slice(first, first + count) for first in range(0, len(ids), count)]
            places[alike] = [_Rows(ids[at], ends[at], page_size) for at in cuts]
        for rows in places[alike]:
            ahead.append(_Batch(part, pieces, rows))
            if len(ahead) > _AHEAD:
                yield ahead.popleft()
    yield from ahead


class _Rings:
    """Memory for chunks: 4 buffers of each kind in turn, or new memory each time."""

    def __init__(self, copy: bool):
        self._copy = copy
        self._rings: dict[Any, Iterator[np.ndarray]] = {}

    def next(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        if self._copy:
            return np.empty(shape, dtype)
        if (shape, dtype) not in self._rings:
            ring = [np.empty(shape, dtype) for _ in range(_RING)]
            self._rings[shape, dtype] = cycle(ring)
        return next(self._rings[shape, dtype])


class _Rows:
    """Some pages, and how many of their slots are filled."""

    def __init__(self, pages: np.ndarray, filled: np.ndarray, page_size: int):
        self.pages, self.filled, self.page_size = pages, filled, page_size
        self._there: dict[Any, tuple[Any, Any]] = {}

    def on(self, device: Any) -> tuple[Any, Any]:
        """Both as int32 on a device, once for all parts; padded with the null page.

        The length is a power of two, so that few programs are compiled.
        """
        if device not in self._there:
            both = np.zeros((2, 1 << (len(self.pages) - 1).bit_length()), np.int32)
            both[0, : len(self.pages)], both[1, : len(self.pages)] = self.pages, self.filled
            self._there[device] = jax.device_put((both[0], both[1]), device)
        return self._there[device]


class _Batch:
    """A few chunks of one part; their way from an accelerator begins when it is made."""

    def __init__(self, part: Part, pieces: list[_Piece], rows: _Rows):
        self._part, self._pieces, self._rows = part, pieces, rows
        self._begun = [piece.begin(rows) for piece in pieces]
        self._taken: list[np.ndarray] | None = None

    @property
    def is_on_host(self) -> bool:
        return all(copy is None for copy in self._begun)

    def out_of_the_cache(self, rings: _Rings) -> None:
        """Wait until the pages are in page-locked memory, or take them where there is none."""
        if all(_is_pinned(copy) for copy in self._begun):
            jax.block_until_ready(self._begun)
        else:
            self._taken = list(self.chunks(rings))

    def chunks(self, rings: _Rings) -> Iterator[np.ndarray]:
        """Wait for the copies. Afterwards nothing of the batch is left on a device."""
        if self._taken is not None:
            yield from self._taken
            return
        arrived = [copy is not None for copy in self._begun]
        sources = [
            piece.host_view() if copy is None else jax.device_get(copy)  # a transfer by intention
            for piece, copy in zip(self._pieces, self._begun, strict=True)
        ]
        self._begun.clear()
        step, dtype = self._part.spec(0).chunk_rows, DTYPES[self._part.dtype]
        every = self._rows
        for first in range(0, len(every.pages), step):
            ids, filled = (a[first : first + step] for a in (every.pages, every.filled))
            places = [slice(first, first + len(ids)) if there else ids for there in arrived]
            if all(arrived) and self._pieces[0].is_whole:
                yield sources[0][places[0]]
                continue
            out = rings.next((min(step, len(every.pages)), *self._part.shape), dtype)[: len(ids)]
            for piece, source, at in zip(self._pieces, sources, places, strict=True):
                piece.take(source, at, out)
            yield _without_tails(out, filled, every.page_size)


@dataclass(frozen=True, slots=True)
class _Piece:
    """What one device has of a part.

    Attributes:
      index: which part of a page it is; () is all of it.
      heads: which of its KV heads to take, the first copy of each; None is all.
      local: the array there, `[N, ...]` or, with a layer, `[L, N, ...]`.
      layer: the layer, or None.
      pinned: where copies rest on their way from an accelerator; None on a CPU.
    """

    index: tuple[slice, ...]
    heads: slice | None
    local: Any
    layer: int | None
    pinned: Any

    @property
    def is_whole(self) -> bool:
        return self.index == () and self.heads is None

    def begin(self, rows: _Rows) -> Any:
        """Begin to copy pages to page-locked memory; None where the host sees them anyway."""
        if self.pinned is None:
            return None
        ids, ends = rows.on(self.local.device)
        layer = self.layer
        if layer is not None:
            layer = jax.device_put(np.int32(layer), self.local.device)
        gathered = _gather(self.local, ids, ends, layer, page_size=rows.page_size)
        try:
            return jax.device_put(gathered, self.pinned)
        except jax.errors.JaxRuntimeError:  # none of it is left: NumPy takes the slow way
            return gathered

    def host_view(self) -> np.ndarray:
        """The array as NumPy sees it, without a copy."""
        view = np.asarray(self.local)
        return view if self.layer is None else view[self.layer]

    def take(self, source: np.ndarray, rows: slice | np.ndarray, out: np.ndarray) -> None:
        """Put rows of `source` `[n, ...]` where they belong in `out`."""
        if self.is_whole and isinstance(rows, np.ndarray) and source.flags.c_contiguous:
            np.take(source, rows, axis=0, out=out, mode="clip")
            return
        chunk = source[rows]
        out[(slice(None), *self.index)] = chunk if self.heads is None else chunk[:, self.heads]


def _is_pinned(copy: Any) -> bool:
    return copy is not None and copy.sharding.memory_kind == "pinned_host"


def _pieces(leaf: Any, part: Part) -> list[_Piece]:
    """The part on each device that holds some of its heads first."""
    layer = part.layer
    if not isinstance(leaf, jax.Array):
        return [_Piece((), None, leaf, layer, None)]
    if not leaf.is_fully_addressable:
        raise NotImplementedError(
            "the cache is spread over several processes; save a replica in each of them, or gather "
            "it to one first"
        )
    front = 0 if layer is None else 1
    pieces = []
    for shard in leaf.addressable_shards:
        if any(
            s.indices(n) != (0, n, 1)
            for s, n in zip(shard.index[: front + 1], leaf.shape, strict=False)
        ):
            raise NotImplementedError("pages or layers are split over devices; only heads may be")
        index, heads = shard.index[front + 1 :], None
        if part.copies > 1:
            begin, end, _ = index[0].indices(part.copies * part.shape[0])
            first, stop = -(-begin // part.copies), -(-end // part.copies)
            index = (slice(first, stop), *index[1:])
            heads = slice(first * part.copies - begin, None, part.copies)
            if first == stop:
                continue
        if shard.replica_id == 0:
            if all(s.indices(n) == (0, n, 1) for s, n in zip(index, part.shape, strict=True)):
                index = ()
            local = shard.data
            pieces.append(_Piece(index, heads, local, layer, pinned_sharding(local)))
    return pieces


@partial(jax.jit, static_argnames="page_size")
def _gather(array: Any, ids: Any, filled: Any, layer: Any, *, page_size: int) -> Any:
    """Pages, zero from `filled` on: on the host that would be a copy more."""
    pages = bits(array)[ids if layer is None else (layer, ids)]
    if _has_slots(pages, page_size):
        slot = lax.broadcasted_iota(jnp.int32, pages.shape, 2)
        ends = filled.reshape(-1, *(1,) * (pages.ndim - 1))
        pages = jnp.where(slot < ends, pages, pages.dtype.type(0))
    return unbits(pages, array.dtype)


def _has_slots(pages: Any, page_size: int) -> bool:
    """Whether pages are `[n, Hk, S, ...]`, which has slots to be cleared."""
    return pages.ndim >= 3 and pages.shape[2] == page_size


def _without_tails(chunk: np.ndarray, filled: np.ndarray, page_size: int) -> np.ndarray:
    """Zero what lies behind the tokens of a page `[Hk, S, ...]`: it may be of another prompt."""
    if not _has_slots(chunk, page_size):
        return chunk
    for row in np.flatnonzero(filled < page_size).tolist():
        chunk[row, :, filled[row] :] = np.zeros((), chunk.dtype)
    return chunk
