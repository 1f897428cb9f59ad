"""From a model and a memory to the layout of a cache: pages of each group, rows and tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import SupportsIndex

from ..allocator.arguments import as_count
from ..allocator.layout import SMALL, CacheLayout, PageSpec
from ..allocator.pool import check_pool_size
from ..allocator.windows import most_pages
from .shapes import LayerShape, ModelShape

__all__ = ["Plan", "plan_layout"]

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, **dict.fromkeys(SMALL, 1)}
SCALE_BYTES = 4  # of a token and KV head, for keys and for values, where these have 8 bits
_MOST_SLOTS = 2**31  # slots of a pool fit int32


@dataclass(frozen=True, slots=True)
class Plan:
    """A layout, and what fits it.

    Attributes:
      layout: for `KVCache.create(layout=)` and `BlockAllocator`; pages over all shards of rows.
      rows: B, over all devices.
      context: tokens that every row can have at once, those included that it is prepared for.
      tokens_in_flight: n, for how many tokens behind the computed ones a row has pages.
      cached_tails: windows of sequences that have ended which stay cached, beside those of rows.
      head_shards: A, devices over which KV heads are split.
      data_shards: R, parts into which rows and pages are split; A * R devices in all.
      token_bytes: of the keys and values of one token, on each device, for every group.
    """

    layout: CacheLayout
    rows: int
    context: int
    tokens_in_flight: int
    cached_tails: int
    head_shards: int
    data_shards: int
    token_bytes: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """That all sequences can have together, those in the prefix cache too."""
        usable = self.layout.groups[0].num_pages - self.data_shards  # a null page in each
        return usable * self.layout.page_size

    @property
    def group_bytes(self) -> tuple[int, ...]:
        """Of each group's pages, on each device."""
        size = self.layout.page_size
        return tuple(
            token_bytes * size * (group.num_pages // self.data_shards)
            for group, token_bytes in zip(self.layout.groups, self.token_bytes, strict=True)
        )

    @property
    def nbytes(self) -> int:
        """Of all pages, on each device."""
        return sum(self.group_bytes)


def plan_layout(
    model: ModelShape,
    *,
    cache_bytes: SupportsIndex | None = None,
    rows: SupportsIndex | None = None,
    context: SupportsIndex | None = None,
    page_size: SupportsIndex = 16,
    dtype: str = "bfloat16",
    tokens_in_flight: SupportsIndex = 128,
    cached_tails: SupportsIndex | None = None,
    head_shards: SupportsIndex = 1,
    data_shards: SupportsIndex = 1,
) -> Plan:
    """Pages of every group of layers, such that no row of the plan ever waits for one.

    Two of `cache_bytes`, `rows` and `context` say the third. A window's pool is as large as its
    rows need; layers that see all tokens get what is left of `cache_bytes`, at least `context`
    tokens for each row, and keep prefixes in the rest.

    ```
    pages of a window   rows x most_pages(W, n, S)   what rows hold
                      + tails x ceil((W - 1) / S)    what ended sequences leave to the prefix cache
                      + 1                            the null page
    ```
    A model whose layers all have windows gets a first group without layers, which has pages on the
    host alone: the books of all tokens.

    Args:
      model: its layers.
      cache_bytes: for the pages on each device; None: as much as rows and context need.
      rows: B, sequences at once; None: as many as fit.
      context: the most tokens of a row, those included that it is prepared for; None: as many as
        fit every row, but not more than the model was made for. Where all layers have windows,
        None is what it was made for.
      page_size: S, in tokens, a power of two.
      dtype: of keys and values: float32, bfloat16 or float16; or int8 or float8_e4m3fn, with their
        scales.
      tokens_in_flight: n: a chunk of a prompt, or 2k where k steps are launched before the last k
        are read; the larger one. Of an engine, `EngineConfig.tokens_ahead`.
      cached_tails: as in `Plan`; None: as many as rows.
      head_shards: A, devices over which KV heads are split. Hk / A lie on each, or one where there
        are more devices than heads.
      data_shards: R, shards of rows and of pages, on A devices each.

    Raises:
      TypeError: a size is no integer.
      ValueError: a size is out of range, heads cannot be split so, or it does not fit.

    Examples:
      >>> model = ModelShape.of_sizes(18, num_kv_heads=1, head_dim=256, window=512, full_every=6)
      >>> plan = plan_layout(model, rows=16, context=32768, cached_tails=0)
      >>> [(len(group.layers), group.num_pages) for group in plan.layout.groups]
      [(3, 32769), (15, 657)]
    """
    costs = _Costs.create(model, page_size, dtype, tokens_in_flight, head_shards, data_shards)
    limit, count, most, tails = (
        None if value is None else as_count(name, value, least)
        for name, value, least in (
            ("cache_bytes", cache_bytes, 0),
            ("rows", rows, 1),
            ("context", context, 1),
            ("cached_tails", cached_tails, 0),
        )
    )
    if most is None and costs.ledger:
        most = model.context
    if (limit, count, most).count(None) > 1 or (most is None and costs.ledger):
        raise ValueError(
            "expected two of cache_bytes, rows and context, which say the third (context, where "
            f"all layers have windows); got {cache_bytes=}, {rows=}, {context=}"
        )
    columns = 1 if most is None else -(-most // costs.page_size)
    if count is None:
        count = costs.most_rows(limit or 0, columns, tails)
    tails = count if tails is None else tails
    own = -(-count // costs.data_shards)
    pages = costs.least(own, columns, -(-tails // costs.data_shards), bounded=most is not None)
    if limit is not None:
        what = f"{count} rows" if most is None else f"{count} rows of {most} tokens"
        pages = costs.grown(pages, limit, what)
    if most is None:
        most = (pages[0] - 1) // own * costs.page_size
        most = min(most, model.context or most)
    return Plan(
        layout=costs.layout(pages, dtype),
        rows=count,
        context=most,
        tokens_in_flight=costs.tokens_in_flight,
        cached_tails=tails,
        head_shards=costs.head_shards,
        data_shards=costs.data_shards,
        token_bytes=tuple(map(costs.token_bytes, costs.groups)),
    )


@dataclass(frozen=True, slots=True)
class _Costs:
    """What pages of a model cost on one device, and how many its rows need in one shard of rows."""

    groups: dict[LayerShape, tuple[int, ...]]
    page_size: int
    dtype: str
    tokens_in_flight: int
    head_shards: int
    data_shards: int

    @classmethod
    def create(
        cls,
        model: ModelShape,
        page_size: SupportsIndex,
        dtype: str,
        tokens_in_flight: SupportsIndex,
        head_shards: SupportsIndex,
        data_shards: SupportsIndex,
    ) -> _Costs:
        """Check what does not depend on the memory."""
        _, size = check_pool_size(2, page_size)
        if dtype not in ITEM_BYTES:
            raise ValueError(f"dtype must be one of {', '.join(ITEM_BYTES)}, got {dtype!r}")
        heads = as_count("head_shards", head_shards, 1)
        for shape in model.groups:
            _check_heads(shape.num_kv_heads, heads)
        if model.num_heads is not None and model.num_heads % heads:
            raise ValueError(
                f"head_shards must divide the {model.num_heads} query heads of {model.name}, got "
                f"{heads}; split rows over the other devices (data_shards)"
            )
        groups = model.groups
        first = next(iter(groups))
        if first.window is not None:  # the books of all tokens: a first group without layers
            groups = {replace(first, window=None): (), **groups}
        return cls(
            groups,
            size,
            dtype,
            as_count("tokens_in_flight", tokens_in_flight, 1),
            heads,
            as_count("data_shards", data_shards, 1),
        )

    @property
    def ledger(self) -> bool:
        """Whether the first group has no layers."""
        return not next(iter(self.groups.values()))

    def token_bytes(self, shape: LayerShape) -> int:
        """Keys and values of a token in the layers of a group, on one device."""
        heads = max(shape.num_kv_heads // self.head_shards, 1)
        numbers = shape.head_dim * ITEM_BYTES[self.dtype]
        return len(self.groups[shape]) * 2 * heads * (numbers + SCALE_BYTES * (self.dtype in SMALL))

    def least(self, rows: int, columns: int, tails: int, *, bounded: bool = True) -> list[int]:
        """Pages of every group, the null page included; no row has more columns, if bounded."""

        def one(shape: LayerShape) -> int:
            if shape.window is None:
                return rows * columns + 1
            held = most_pages(shape.window, self.tokens_in_flight, self.page_size)
            tail = most_pages(shape.window, 1, self.page_size) - 1  # the newest page is the next's
            if bounded:
                held, tail = min(held, columns), min(tail, columns)
            return rows * held + tails * tail + 1

        return list(map(one, self.groups))

    def nbytes(self, pages: Sequence[int]) -> int:
        """Of so many pages in every group, on one device."""
        pairs = zip(self.groups, pages, strict=True)
        return sum(count * self.page_size * self.token_bytes(shape) for shape, count in pairs)

    def most_rows(self, limit: int, columns: int, tails: int | None) -> int:
        """How many rows fit, over all shards; what they need grows by the same with each."""
        none, one = (
            self.nbytes(
                self.least(n, columns, n if tails is None else -(-tails // self.data_shards))
            )
            for n in (0, 1)
        )
        if limit < one:
            raise ValueError(
                f"one row of {columns} pages of {self.page_size} tokens needs {one} bytes on each "
                f"device, got {limit}: give more memory, a shorter context, smaller chunks, or "
                "more devices"
            )
        return (limit - none) // (one - none) * self.data_shards

    def grown(self, pages: list[int], limit: int, what: str) -> list[int]:
        """The same, with all that is left of the memory in the groups that see all tokens."""
        if (spent := self.nbytes(pages)) > limit:
            raise ValueError(
                f"{what} need {spent} bytes of pages on each device, got {limit}: give more "
                "memory, fewer rows, a shorter context, smaller chunks, or more devices"
            )
        full = [shape.window is None for shape in self.groups]
        if page_bytes := self.nbytes([int(each) for each in full]):
            more = (limit - spent) // page_bytes
            most = _MOST_SLOTS // self.page_size // self.data_shards
            more = max(min(more, most - pages[0]), 0)
            pages = [count + more * each for count, each in zip(pages, full, strict=True)]
        return pages

    def layout(self, pages: Sequence[int], dtype: str) -> CacheLayout:
        """Of so many pages in each shard."""
        specs = (
            PageSpec(
                layers,
                shape.num_kv_heads,
                shape.head_dim,
                count * self.data_shards,
                dtype,
                shape.window,
            )
            for (shape, layers), count in zip(self.groups.items(), pages, strict=True)
        )
        return CacheLayout(self.page_size, tuple(specs))


def _check_heads(num_kv_heads: int, devices: int) -> None:
    """The rule of `Placement.create`."""
    if num_kv_heads % devices and devices % num_kv_heads:
        raise ValueError(
            f"{num_kv_heads} KV heads cannot be split over head_shards={devices} devices: one "
            "number must divide the other; split rows over the other devices (data_shards)"
        )
