"""From the host's page ids to those of each data shard: the one place where they meet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from .allocator import DecodeBatch, GroupBatch, PageCopies
from .errors import PageTableError

__all__ = ["Spread", "rank_within", "split_batch", "split_copies"]


@dataclass(frozen=True, slots=True)
class Spread:
    """Where the rows of a host batch lie among the rows of all shards.

    ```
    host rows     a(shard 1)  b(shard 0)  (length 0)  c(shard 1)  padding
    device rows   [ b  .  |  a  c ]        2 rows a shard;  rows = [2, 0, 3], total 4
    ```

    Attributes:
      rows: int64 `[n]`, the device row of each living host row; None where pages are not split
        and host and device rows are the same.
      total: device rows, R times the rows of a shard.
      host_rows: rows of the host batch, its padding included.
      living: int64 `[n]`, which of them have a length above 0; those alone are on the device.
    """

    rows: np.ndarray | None
    total: int
    host_rows: int
    living: np.ndarray | None = None

    def put(self, tree: Any) -> Any:
        """Host arrays `[B, ...]` as device arrays `[total, ...]`; other rows are 0."""

        rows = self.rows
        if rows is None:
            return tree

        def one(array: Any) -> np.ndarray:
            out = np.zeros((self.total, *array.shape[1:]), array.dtype)
            out[rows] = array[self.living]
            return out

        return jax.tree.map(one, tree)

    def take(self, array: Any, axis: int = 0) -> np.ndarray:
        """What the device computed, in the rows of the host batch; padding is 0."""
        if self.rows is None:
            return np.asarray(array)
        moved = np.moveaxis(np.asarray(array), axis, 0)
        out = np.zeros((self.host_rows, *moved.shape[1:]), moved.dtype)
        out[self.living] = moved[self.rows]
        return np.moveaxis(out, 0, axis)


def split_batch(
    batch: DecodeBatch,
    *,
    shards: int,
    pages_per_shard: int | Sequence[int],
    page_size: int,
    sizes: tuple[int, ...],
) -> tuple[DecodeBatch, Spread]:
    """Sort the rows of a host batch by shard and make their ids local.

    Args:
      batch: NumPy arrays with ids of the whole pool, as `ShardedAllocator` makes them.
      shards: R, data shards.
      pages_per_shard: N / R, of every group. The first one, which is full, says where a row is.
      page_size: S.
      sizes: rows that a shard may have, ascending; the least that serves is taken. A batch of
        padding only keeps its number of rows.

    Raises:
      PageTableError: a row's pages or slots lie on several shards, or on a shard's null page.
      ValueError: one shard has more rows than the last of `sizes`.
    """
    living = np.flatnonzero(batch.seq_lens)
    each = [pages_per_shard] if isinstance(pages_per_shard, int) else list(pages_per_shard)
    first_pages = np.asarray(batch.groups[0].page_table)[living, 0]
    count, shard = len(living), first_pages // each[0]
    pairs = zip(batch.groups, each, strict=True)
    groups = [_localised(group, living, shard, shards, n, page_size) for group, n in pairs]
    most = int(np.bincount(shard, minlength=1).max()) if count else len(batch.seq_lens)
    if most > sizes[-1] and count:
        raise ValueError(f"one shard has {most} rows, but a program has {sizes[-1]} at most")
    size = next((s for s in sizes if s >= most), most)
    spread = Spread(shard * size + rank_within(shard), shards * size, len(batch.seq_lens), living)
    here = Spread(spread.rows, spread.total, count, np.arange(count))
    local = replace(
        batch,
        tokens=None if batch.tokens is None else batch.tokens[living],
        seq_lens=batch.seq_lens[living],
        positions=batch.positions[living],
        groups=tuple(groups),
        query_lens=None if batch.query_lens is None else batch.query_lens[living],
    )
    return here.put(local), spread


def _localised(
    group: GroupBatch, living: np.ndarray, shard: np.ndarray, shards: int, pages: int, size: int
) -> GroupBatch:
    """The living rows of a group, with ids of their shard of so many pages."""
    table, slots = np.asarray(group.page_table)[living], np.asarray(group.slots)[living]
    _refuse_foreign("page", table, shard, pages, shards)
    _refuse_foreign("page of slot", slots // size, shard, pages, shards)
    first = (shard * pages)[:, None].astype(np.int32)
    return replace(
        group,
        page_table=np.where(table, table - first, 0),
        slots=np.where(slots >= size, slots - first * size, 0),
        starts=None if group.starts is None else group.starts[living],
        num_pages=pages,
    )


def rank_within(shard: np.ndarray) -> np.ndarray:
    """int64 `[n]`: which of the rows of its shard each row is, in the order given."""
    order = np.argsort(shard, kind="stable")
    rank = np.empty(len(shard), np.int64)
    rank[order] = np.arange(len(shard)) - np.searchsorted(shard[order], shard[order])
    return rank


def split_copies(copies: PageCopies, *, shards: int, pages_per_shard: int) -> PageCopies:
    """Every shard's copies together, padded to one power of two each, with local ids.

    Raises:
      PageTableError: a page would be copied from one shard to another.
    """
    src, dst = (np.asarray(ids, np.int32) for ids in copies)
    shard = src // pages_per_shard
    if (dst // pages_per_shard != shard).any():
        at = int((dst // pages_per_shard != shard).argmax())
        raise PageTableError(
            f"page {src[at]} cannot be copied to page {dst[at]}: they lie on different shards of "
            f"{pages_per_shard} pages; a sequence lives on one shard"
        )
    counts = np.bincount(shard, minlength=shards)
    width = 1 << max(int(counts.max()) - 1, 0).bit_length()
    out = PageCopies(*(np.zeros((shards, width), np.int32) for _ in range(2)))
    for i in range(shards):
        for ids, into in ((src, out.src), (dst, out.dst)):
            into[i, : counts[i]] = ids[shard == i] - i * pages_per_shard
    return PageCopies(out.src.reshape(-1), out.dst.reshape(-1))


def _refuse_foreign(
    what: str, pages: np.ndarray, shard: np.ndarray, pages_per_shard: int, shards: int
) -> None:
    """Entries of 0 are padding; every other must be a page of the row's shard, not its null."""
    home = shard[:, None]
    foreign = (pages != 0) & ((pages // pages_per_shard != home) | (pages % pages_per_shard == 0))
    foreign |= (home >= shards) | (home < 0)
    if foreign.any():
        row, column = (int(i[0]) for i in np.nonzero(foreign))
        raise PageTableError(
            f"{what} {pages[row, column]} in row {row} is not local to the row's shard "
            f"{shard[row]} of {shards}, whose pages are {shard[row] * pages_per_shard + 1} to "
            f"{(shard[row] + 1) * pages_per_shard - 1}; use a ShardedAllocator with as many shards"
        )
