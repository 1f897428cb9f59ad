"""A cache and an allocator as a file describes them, for a load that is given neither."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import SupportsIndex

from ..allocator import BlockAllocator, CacheLayout, PageSpec
from ..allocator.arguments import as_count, as_counts
from ..allocator.layout import SMALL
from ..cache import KVCache
from ..errors import SnapshotMismatch
from ._about import about
from ._format import ArraySpec
from ._open import Opened
from ._save import GENERATION

__all__ = ["as_pool_sizes", "new_pools"]

_SCALES = ("kv/k_scales/", "kv/v_scales/")
_ALLOWANCE_BYTES = 1 << 24  # of null pages, which are in no file


def as_pool_sizes(num_pages: SupportsIndex | Iterable[SupportsIndex] | None) -> list[int] | None:
    """`num_pages` of `load_snapshot`, checked but for how many there must be."""
    if num_pages is None:
        return None
    if isinstance(num_pages, Iterable):
        return list(as_counts("num_pages", num_pages, 2))
    return [as_count("num_pages", num_pages, 2)]


def new_pools(
    opened: Opened, sizes: list[int] | None, fingerprint: bytes | None
) -> tuple[KVCache, BlockAllocator]:
    """Empty pools for the pages of a file: of `sizes`, or just large enough.

    Raises:
      SnapshotMismatch: the file is not of a `KVCache`, or claims more pages than it has bytes.
      ValueError: there are other sizes than groups of layers.
    """
    if sizes is not None and len(sizes) not in (1, len(opened.groups)):
        raise ValueError(
            f"num_pages must be one number, or one for each of the {len(opened.groups)} groups of "
            f"layers in the file; got {len(sizes)}"
        )
    with about(opened.chain.files[0].path):
        layout = _layout_of(opened, sizes)
    header = opened.chain.header
    saved = header.fingerprint if fingerprint is None else fingerprint
    own, _, weights = saved.partition(GENERATION)
    plain = len(layout.groups) == 1 and layout.groups[0].dtype not in SMALL
    allocator = (
        BlockAllocator(layout.groups[0].num_pages, layout.page_size, fingerprint=own)
        if plain
        else BlockAllocator(layout, fingerprint=own)
    )
    if weights:
        allocator.new_weights(weights)
    cache = KVCache.create(layout=layout)
    if not any(spec.name.startswith(_SCALES) for spec in opened.kv):  # older than they are
        cache = replace(cache, k_scales=(), v_scales=())
    return cache, allocator


def _layout_of(opened: Opened, sizes: list[int] | None) -> CacheLayout:
    """The groups of layers of the file.

    Raises:
      SnapshotMismatch: as `new_pools`.
    """
    header = opened.chain.header
    problem = "pass a cache and an allocator of your own"
    needed = [max(2, count + 1) for count in header.counts]
    sizes = needed if sizes is None else sizes * (len(needed) // len(sizes))
    groups, nbytes = [], 0
    for saved, arrays, count, size in zip(
        opened.groups, header.arrays_of_groups(), needed, sizes, strict=True
    ):
        nbytes += sum(spec.row_bytes * count for spec in arrays)
        kind, (heads, slots, dim) = _page_of(arrays, saved.layers, header.page_size)
        if slots != header.page_size or min(heads, dim) < 1:
            raise SnapshotMismatch(f"it is not of a KVCache: {problem}")
        groups.append(PageSpec(saved.layers, heads, dim, size, kind, saved.window))
    if nbytes > 2 * sum(each.file_bytes for each in opened.chain.files) + _ALLOWANCE_BYTES:
        raise SnapshotMismatch(
            f"its pages have {nbytes} bytes, far more than its files have: {problem}"
        )
    try:
        return CacheLayout(header.page_size, tuple(groups))
    except (TypeError, ValueError) as error:
        raise SnapshotMismatch(f"no cache can be made of it ({error}): {problem}") from None


def _page_of(
    arrays: list[ArraySpec], layers: Sequence[int], page_size: int
) -> tuple[str, tuple[int, ...]]:
    """Dtype and shape `(Hk, S, D)` of every page of a group; with 0 heads if there is none such."""
    none = "float32", (0, 0, 0)
    if not arrays and not layers:
        return "float32", (1, page_size, 1)  # it only keeps the books
    scales = [spec for spec in arrays if spec.name.startswith(_SCALES)]
    pages = [spec for spec in arrays if spec not in scales]
    kinds = {(spec.dtype, spec.shape[1:]) for spec in pages}
    if _names("pages", layers) != {spec.name for spec in pages} or len(kinds) != 1:
        return none
    dtype, shape = kinds.pop()
    if scales and (
        dtype not in SMALL
        or _names("scales", layers) != {spec.name for spec in scales}
        or {(spec.dtype, spec.shape[1:]) for spec in scales} != {("float32", shape[:-1])}
    ):
        return none
    return dtype, shape if len(shape) == 3 else (0, 0, 0)


def _names(what: str, layers: Sequence[int]) -> set[str]:
    return {f"kv/{kind}_{what}/{layer}" for kind in "kv" for layer in layers}
