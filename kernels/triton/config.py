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


# Tilings by (head dim padded to a power of two, kind of call): block_n, warps, stages, pack, and
# how many programs fit on a multiprocessor of the H100 by shared memory and registers.
# Read off one H100 80GB HBM3 (triton 3.6.0) by sweeping them over batches of 1 to 256 rows, 512
# to 128k tokens, even and ragged.
# `few`: at most one row and KV head for each multiprocessor; `many`: more; `long`: rows may be so
# long that lengths may differ a lot, so that short tails count more than anything else.
_TABLE = {
    (64, "few"): (128, 4, 3, 1, 1),
    (64, "few long"): (128, 4, 2, 1, 2),
    (64, "many"): (128, 4, 2, 1, 4),
    (64, "many long"): (128, 4, 2, 1, 4),
    (128, "few"): (128, 4, 3, 1, 1),
    (128, "few long"): (128, 4, 2, 1, 2),  # two are faster than the three that fit
    (128, "many"): (64, 4, 4, 2, 2),
    (128, "many long"): (128, 4, 2, 1, 3),
    (256, "few"): (64, 8, 3, 1, 1),
    (256, "few long"): (64, 8, 3, 1, 1),
    (256, "many"): (64, 8, 3, 1, 1),
    (256, "many long"): (64, 8, 3, 1, 1),
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
    kind = ("few" if few else "many") + (" long" if long else "")
    block_n, warps, stages, pack, fit = _TABLE[dim, kind]
    if shape.kv_heads % pack or shape.group * pack > 16:
        pack = 1
    lanes //= pack
    if not few and lanes <= shape.processors:
        # Packed, they are one program on each multiprocessor: it needs the deep tile of few.
        block_n, warps, stages, _, fit = _TABLE[dim, "few"]
    return Config(
        block_n,
        warps,
        stages,
        even=lanes * _cuts(lanes, fit * shape.processors),
        ragged=(8 if long and not few else 2) * shape.processors,
        pack=pack,
    )


def _cuts(lanes: int, slots: int) -> int:
    """Into how many programs to cut each of `lanes` equal rows, for waves of `slots` programs.

    The fewest that leave no more than a tenth of the slots empty in the last wave, or the best.
    """
    least = max(slots // lanes, 1)

    def full(cuts: int) -> float:
        return lanes * cuts / (-(-lanes * cuts // slots) * slots)

    tries = range(least, least + 8)
    return next((cuts for cuts in tries if full(cuts) >= 0.9), max(tries, key=full))
