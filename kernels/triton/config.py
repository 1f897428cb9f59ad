"""Which shape of kernel serves a call: a table from the card, and a default for the rest."""

from dataclasses import dataclass

__all__ = ["Config", "Shape", "choose_config"]


@dataclass(frozen=True, slots=True)
class Shape:
    """What the choice may depend on: all of it is static under `jit`."""

    rows: int
    kv_heads: int
    group: int
    dim: int
    page_size: int
    capacity: int  # P * S, tokens that a row can hold
    itemsize: int  # bytes of a number in the pages
    processors: int = 132  # streaming multiprocessors of the card
    generation: int = 90  # compute capability, 10 * major + minor


@dataclass(frozen=True, slots=True)
class Config:
    """One tiling of the kernel.

    Attributes:
      block_n: rows of a tile: tokens times `pack`.
      warps: warps of a program.
      stages: depth of the software pipeline; K and V get `stages - 1` buffers each.
      even: programs to aim at for a batch of about equal lengths; 0: never split.
      ragged: programs to aim at for any other batch.
      pack: KV heads that share a tile.
      min_tiles: no program gets fewer tiles, unless its row has no more.
      merge: registers a thread gives to partials on their way; more merge faster, fewer leave
        room for more programs on a multiprocessor.
    """

    block_n: int
    warps: int
    stages: int
    even: int = 0
    ragged: int = 0
    pack: int = 1
    min_tiles: int = 1
    merge: int = 32


# Tilings by (head dim padded to a power of two, kind of call): block_n, warps, stages, pack.
# Read off one H100 80GB HBM3 (triton 3.6.0) by sweeping them over batches of 1 to 256 rows, 512
# to 128k tokens, even and ragged.
# `few`: at most one row and KV head for each multiprocessor; `many`: more; `long`: rows may be so
# long that lengths may differ a lot, so that short tails count more than anything else.
_TABLE = {
    (64, "few"): (128, 4, 3, 1),
    (64, "many"): (128, 4, 2, 1),
    (64, "long"): (128, 4, 2, 1),
    (128, "few"): (128, 4, 3, 1),
    (128, "many"): (64, 4, 4, 2),
    (128, "long"): (128, 4, 2, 1),
    (256, "few"): (64, 8, 3, 1),
    (256, "many"): (64, 8, 3, 1),
    (256, "long"): (64, 8, 3, 1),
}
_LONG_ROW = 8192  # tokens of capacity from which a batch of many rows counts as `long`
_LONG_BATCH = 2**20  # tokens times KV heads from which a batch of few rows does
_BIG_SHARED_MEMORY = (80, 90, 100, 103)  # generations with at least 160 KiB a multiprocessor


def choose_config(shape: Shape) -> Config:
    """The config of a call: from the table, or a small tiling that fits every card."""
    lanes = shape.rows * shape.kv_heads
    waves = max(shape.processors // lanes, 1)
    if shape.itemsize == 4:
        # Exact float32 products do not use the matrix unit: small tiles, many programs.
        return Config(16, 4, 2, even=2 * lanes * waves, ragged=4 * shape.processors)
    if shape.generation not in _BIG_SHARED_MEMORY:
        block_n = 64 if shape.dim <= 128 else 32
        return Config(block_n, 4, 2, even=2 * lanes * waves, ragged=8 * shape.processors)
    few = lanes <= shape.processors
    if few:
        long = shape.rows > 1 and lanes * shape.capacity >= _LONG_BATCH
    else:
        long = shape.capacity > _LONG_ROW
    dim = 64 if shape.dim <= 64 else 128 if shape.dim <= 128 else 256
    block_n, warps, stages, pack = _TABLE[dim, "long" if long else "few" if few else "many"]
    if shape.kv_heads % pack or shape.group * pack > 16:
        pack = 1
    if lanes // pack <= shape.processors:
        # One program on each multiprocessor: it needs the deep tile of few.
        block_n, warps, stages, _ = _TABLE[dim, "few"]
    if few:
        return Config(
            block_n,
            warps,
            stages,
            even=lanes * (2 * shape.processors // lanes if long else waves),
            ragged=2 * shape.processors,
        )
    return Config(
        block_n, warps, stages, even=lanes // pack, ragged=8 * shape.processors, pack=pack
    )
