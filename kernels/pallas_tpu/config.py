"""How many pages are fetched and multiplied at a time."""

from dataclasses import dataclass

__all__ = ["Config", "Shape", "choose_config"]

LANES, SUBLANES = 128, 8  # of a vector register
REGISTERS = 32  # of the 64 that there are, for the logits of one tile
FETCH_BYTES = 2 << 20


@dataclass(frozen=True, slots=True)
class Shape:
    """What the choice may depend on: all of it is static under `jit`."""

    rows: int
    kv_heads: int
    group: int
    dim: int
    page_size: int
    columns: int
    itemsize: int  # bytes of a number in the pages
    exact: bool = False  # products of float32, which the matrix unit makes of several bfloat16
    cores: int = 1  # tensor cores behind one device: two on v4 and v5p


@dataclass(frozen=True, slots=True)
class Config:
    """One tiling of the kernel.

    Attributes:
      fetch: pages in one of the two buffers; a multiple of `tile`.
      tile: pages that are multiplied at once.
      unroll: pages whose copies are started in one go.
      cores: cores among which the rows are dealt out.
    """

    fetch: int
    tile: int
    unroll: int
    cores: int


def choose_config(shape: Shape) -> Config:
    """Enough bytes on their way to hide the latency of HBM; tiles whose logits stay in registers.

    What is on its way is one buffer of keys and values: 2 MiB are a microsecond of the fastest of
    these chips. With both buffers that is a quarter of the 16 MiB of VMEM that every chip has.
    """
    heads = shape.kv_heads * shape.group
    page_bytes = 2 * shape.kv_heads * shape.page_size * _up(shape.dim, LANES) * shape.itemsize
    fetch = min(max(FETCH_BYTES // page_bytes, 1), shape.columns)
    tokens = LANES * max(REGISTERS * SUBLANES // _up(heads, SUBLANES), 1)
    tokens = min(tokens, (1 if shape.exact else 4) * LANES)
    tile = max(tokens // shape.page_size, 1)
    if shape.page_size < SUBLANES:  # such a page fills no register: each is moved by itself
        tile = min(tile, 4 * SUBLANES)
    tile = min(tile, fetch)
    fetch = fetch // tile * tile
    return Config(fetch, tile, min(8, fetch), min(shape.cores, shape.rows))


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
