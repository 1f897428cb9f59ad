"""Everything that is static in one launch of the kernel."""

from dataclasses import dataclass
from typing import Any

from ..record import AttentionCall
from .config import Config, aligned_group, choose_config, compute_dtype

__all__ = ["Plan"]


@dataclass(frozen=True, slots=True)
class Plan:
    """What is compiled into one kernel.

    An item is a step's work: a tile of `queries` new tokens of a row, number `row * tiles + tile`.
    The tokens of a row are padded in front to `tiles * queries`.

    Attributes:
      config: how much is worked on at a time.
      tokens: T, new tokens of a row.
      tiles: items of a row.
      group: query heads of a KV head, with those that align products of float32.
      steps: items of a core.
      strip: tokens of a page that a DMA can write, at least.
      scaled: whether pages have 8 bits, and scales.
      aligned: whether the queries of a KV head begin at a register's edge in q as it comes.
      compute: the dtype of the products.
    """

    config: Config
    tokens: int
    tiles: int
    kv_heads: int
    group: int
    dim: int
    page_size: int
    pages: int
    columns: int
    steps: int
    strip: int
    scale: float
    window: int | None
    soft_cap: float | None
    starts: bool
    sinks: bool
    query_lens: bool
    scaled: bool
    append: bool
    aligned: bool
    compute: Any

    @classmethod
    def of(
        cls,
        call: AttentionCall,
        cores: int,
        config: Config | None = None,
        *,
        append: bool = False,
    ) -> "Plan":
        """The launch of `call` on a chip of so many cores, by `config` if one is given.

        `append` also writes the newest token of T = 1.
        """
        config = choose_config(call, cores) if config is None else config
        tiles = -(-call.tokens // config.queries)
        group = aligned_group(call, config.queries)
        return cls(
            config=config,
            tokens=call.tokens,
            tiles=tiles,
            kv_heads=call.kv_heads,
            group=group,
            dim=call.dim,
            page_size=call.page_size,
            pages=call.pages,
            columns=call.columns,
            steps=-(-call.rows * tiles // config.cores),
            strip=min(32 // call.itemsize, call.page_size),
            scale=call.scale,
            # One that no row fills is none: a position less it stays within int32.
            window=None if call.window is None or call.window >= call.capacity else call.window,
            soft_cap=call.soft_cap,
            starts=call.starts is not None,
            sinks=call.sink is not None,
            query_lens=call.query_lens is not None,
            scaled=call.k_scales is not None,
            append=append,
            aligned=group * config.queries % (32 // call.q.dtype.itemsize) == 0,
            compute=compute_dtype(call),
        )

    @property
    def head_rows(self) -> int:
        """Rows of q of a KV head: its query heads times the queries of a tile."""
        return self.group * self.config.queries

    @property
    def rows(self) -> int:
        """Rows of q of an item, KV head by KV head and query head by query head."""
        return self.kv_heads * self.head_rows

    @property
    def tile_tokens(self) -> int:
        """Tokens of a tile of pages."""
        return self.config.tile * self.page_size
