"""How many queries, pages and heads are worked on at a time."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from ..record import AttentionCall

__all__ = ["LANES", "SUBLANES", "Config", "aligned_group", "choose_config", "compute_dtype", "up"]

LANES, SUBLANES = 128, 8  # of a vector register
REGISTERS = 32  # of the 64 that there are, for the logits of one strip
TILE_TOKENS = 4 * LANES
PRODUCT_ROWS = 256  # that stream past a piece of K or V in the matrix unit: enough to hide its load
FETCH_BYTES = 2 << 20
QUERY_BYTES = 6 << 20  # of the 16 MiB of VMEM that every chip has, for a tile's queries and sums


@dataclass(frozen=True, slots=True)
class Config:
    """One tiling of the kernel; ValueError if its parts do not go together.

    Attributes:
      queries: new tokens of a row in one step of the grid, with all their heads; a power of two.
      fetch: pages in one of the two buffers; a multiple of `tile`.
      tile: pages that are multiplied at once.
      unroll: pages whose copies are started in one go.
      heads: KV heads whose logits are there together; divides Hk.
      strip: rows of logits (queries x heads) that pass through the registers together.
      cores: cores among which the tiles of queries are dealt out.
    """

    queries: int
    fetch: int
    tile: int
    unroll: int
    heads: int
    strip: int
    cores: int

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {self}")
        if self.queries & (self.queries - 1):
            raise ValueError(f"queries must be a power of two; got {self}")
        if self.fetch % self.tile or self.unroll > self.fetch:
            raise ValueError(f"fetch must be a multiple of tile, and unroll within it; got {self}")


def compute_dtype(call: AttentionCall) -> Any:
    """The dtype of the products: that of q and the pages, or float32 if these differ.

    Over pages of 8 bits it is that of q, which holds their numbers as they are.
    """
    alike = call.k_scales is not None or call.q.dtype == call.k_pages.dtype
    return call.q.dtype if alike else jnp.dtype(jnp.float32)


def aligned_group(call: AttentionCall, queries: int) -> int:
    """Query heads of a KV head, with those that are added to align products of float32."""
    group = call.group
    while compute_dtype(call) == jnp.float32 and group * queries % SUBLANES:
        group += 1
    return group


def choose_config(call: AttentionCall, cores: int) -> Config:
    """Enough bytes on their way to hide the latency of HBM; strips whose logits fit registers.

    What is on its way is one buffer of keys and values: 2 MiB are a microsecond of the fastest of
    these chips. With both buffers that is a quarter of the 16 MiB of VMEM that every chip has.
    Keys and values are read once for a tile of queries, so it is as large as VMEM allows, up to
    what keeps the matrix unit busy.
    """
    exact = compute_dtype(call) == jnp.float32
    queries = _queries(call)
    rows = aligned_group(call, queries) * queries
    heads = _together(call.kv_heads, rows)
    page_bytes = 2 * call.kv_heads * call.page_size * up(call.dim, LANES) * call.itemsize
    fetch = min(max(FETCH_BYTES // page_bytes, 1), call.columns)
    tokens = LANES if exact else TILE_TOKENS
    tile = max(tokens // call.page_size, 1)
    if call.page_size < SUBLANES:  # such a page fills no register: each is moved by itself
        tile = min(tile, 4 * SUBLANES)
    tile = min(tile, fetch)
    fetch = fetch // tile * tile
    strip = min(heads * rows, REGISTERS * SUBLANES * LANES // tokens)
    cores = max(min(cores, call.rows * -(-call.tokens // queries)), 1)
    return Config(queries, fetch, tile, min(8, fetch), heads, strip, cores)


def _queries(call: AttentionCall) -> int:
    """New tokens of a tile, a power of two."""
    dim = up(call.dim, LANES)
    # Two buffers of q and of out, the sums in float32, and two numbers in every lane.
    row_bytes = 4 * dim * call.q.dtype.itemsize + 4 * dim + 8 * LANES
    most = max(min(PRODUCT_ROWS // call.group, QUERY_BYTES // (call.heads * row_bytes)), 1)
    return min(1 << (most.bit_length() - 1), 1 << (call.tokens - 1).bit_length())


def _together(kv_heads: int, rows: int) -> int:
    """How many KV heads, of so many rows of queries each, are multiplied together."""
    parts = [heads for heads in range(1, kv_heads + 1) if kv_heads % heads == 0]
    aligned = [heads for heads in parts if heads == kv_heads or heads * rows % SUBLANES == 0]
    return max((heads for heads in aligned if heads * rows <= PRODUCT_ROWS), default=aligned[0])


def up(number: int, multiple: int) -> int:
    """The smallest multiple that is not less."""
    return -(-number // multiple) * multiple
