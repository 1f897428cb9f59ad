"""Which shape of kernel serves a call: a table from the card, and a default for the rest."""

from dataclasses import dataclass

__all__ = ["Config", "Shape", "TailConfig", "choose_config", "choose_tail_config", "power"]


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
    tokens: int = 1  # T, query tokens of a row


@dataclass(frozen=True, slots=True)
class Config:
    """One tiling of the kernel.

    Attributes:
      tokens: of a tile.
      warps: warps of a program.
      stages: depth of the software pipeline; K and V get `stages - 1` buffers each.
      even: programs to aim at for a batch of about equal lengths; 0: never split.
      ragged: programs to aim at for any other batch.
      min_tiles: no program gets fewer tiles, unless its row has no more.
      eighths: a ragged row gets one program more for what is left over, if that is more than
        `8 - eighths` eighths of a program: 4 rounds to the nearest number, 8 up.
      least: programs that an even batch is cut into at least, where some rows are empty.
      merge: registers a thread gives to partials on their way; more merge faster, fewer leave
        room for more programs on a multiprocessor.
    """

    tokens: int
    warps: int
    stages: int
    even: int = 0
    ragged: int = 0
    min_tiles: int = 1
    eighths: int = 4
    least: int = 1
    merge: int = 32


# Tilings by (head dim padded to a power of two, kind of call): tokens, warps, stages, and how many
# programs of an even batch a multiprocessor gets at least. Read off one H100 80GB HBM3 (triton
# 3.6.0) with benchmarks/tune_triton.py.
# `few`: at most one row and KV head for each multiprocessor; `many`: more. `few long`: there is
# work for several programs a multiprocessor; `many long`: lengths may differ a lot.
_TABLE = {
    (64, "few"): (128, 4, 3, 1),
    (64, "few long"): (128, 4, 2, 3),
    (64, "many"): (128, 4, 2, 3),
    (64, "many long"): (128, 4, 2, 2),
    (128, "few"): (128, 4, 3, 1),
    (128, "few long"): (64, 4, 2, 3),
    (128, "many"): (64, 4, 2, 3),
    (128, "many long"): (128, 4, 2, 2),
    (256, "few"): (64, 8, 3, 1),
    (256, "few long"): (64, 8, 3, 1),
    (256, "many"): (64, 8, 3, 1),
    (256, "many long"): (64, 8, 3, 1),
}
_LONG_ROW = {"few": 1024, "many": 8192}  # tokens of capacity above which a batch is `long`
_LONG_BATCH = 2**17  # and the tokens times KV heads, where it has few rows, but not one
_BIG_SHARED_MEMORY = (80, 90, 100, 103)  # generations with at least 160 KiB a multiprocessor
_WARPGROUPS = (90, 100, 103)  # and those whose matrix unit takes operands from there


def choose_config(shape: Shape) -> Config:
    """The config of a call: from the table, or a small tiling that fits every card."""
    lanes = shape.rows * shape.kv_heads
    processors = shape.processors
    twice = 2 * lanes * max(processors // lanes, 1)
    if shape.itemsize == 4:
        # Exact float32 products do not use the matrix unit: small tiles, many programs.
        return Config(16, 4, 2, even=twice, ragged=4 * processors, least=2 * processors)
    if shape.generation not in _BIG_SHARED_MEMORY:
        tokens = 64 if shape.dim <= 128 else 32
        return Config(tokens, 4, 2, even=twice, ragged=8 * processors, least=2 * processors)
    kind = "few" if lanes <= processors else "many"
    long = shape.capacity > _LONG_ROW[kind]
    if kind == "few":
        long = long and shape.rows > 1 and lanes * shape.capacity >= _LONG_BATCH
    dim = 64 if shape.dim <= 64 else 128 if shape.dim <= 128 else 256
    tokens, warps, stages, programs = _TABLE[dim, kind + " long" * long]
    least = programs * processors * 19 // 20  # a wave may be a little short of full
    return Config(
        tokens,
        warps,
        stages,
        even=lanes * _cuts(lanes, processors, least),
        ragged=max(programs, 2) * processors,
        eighths=4 if kind == "few" else 8,
        least=least,
    )


@dataclass(frozen=True, slots=True)
class TailConfig:
    """One tiling of the kernel for T > 1.

    Attributes:
      queries: of a tile: T * G query heads of a KV head, cut into so many.
      tokens: of a block of keys.
      warps: warps of a program.
      stages: depth of the software pipeline.
      aim: programs to cut the work into, if no tile has less than its share; 0: never cut.
      registers: of a thread, at most; 0: what the compiler takes. Half of what it would take lets
        two programs share a multiprocessor: one computes exponentials while the other multiplies.
    """

    queries: int
    tokens: int
    warps: int
    stages: int
    aim: int = 0
    registers: int = 0


# Tilings of full tiles by head dim padded to a power of two: queries, tokens, warps, stages and
# registers. And of a few queries (drafts, up to FEW_QUERIES a KV head), where reading takes the
# time as it does for T = 1, by head dim and tile: tokens, warps, stages. Read off one H200.
_TAILS = {
    64: (128, 64, 8, 3, 128),
    128: (128, 64, 8, 2, 128),
    256: (128, 64, 8, 2, 0),
}
_DRAFTS = {
    (64, 16): (128, 4, 2),
    (64, 32): (128, 4, 2),
    (64, 64): (128, 4, 2),
    (128, 16): (32, 4, 3),
    (128, 32): (128, 4, 2),
    (128, 64): (64, 4, 3),
    (256, 16): (64, 4, 2),
    (256, 32): (64, 4, 2),
    (256, 64): (64, 8, 3),
}
FEW_QUERIES = 64


def choose_tail_config(shape: Shape) -> TailConfig:
    """The config of a call of T > 1: from the tables, or a small tiling that fits every card."""
    queries = max(power(shape.tokens * shape.group), 16)
    processors = shape.processors
    if shape.itemsize == 4:
        # Exact float32 products do not use the matrix unit: small tiles, many programs.
        return TailConfig(16, 16, 4, 2, aim=4 * processors)
    dim = 64 if shape.dim <= 64 else 128 if shape.dim <= 128 else 256
    if shape.generation not in _WARPGROUPS:
        most, tokens = (64, 64) if shape.dim <= 128 else (32, 32)
        return TailConfig(min(queries, most), tokens, 4, 2, aim=4 * processors)
    if queries <= FEW_QUERIES:
        tokens, warps, stages = _DRAFTS[dim, queries]
        return TailConfig(queries, tokens, warps, stages, aim=2 * processors)
    queries, tokens, warps, stages, registers = _TAILS[dim]
    tiles = shape.rows * shape.kv_heads * -(-shape.tokens * shape.group // queries)
    if tiles <= processors:  # one wave of half tiles is shorter than half a wave of whole ones
        queries, tokens, warps, stages, registers = 64, 64, 4 if dim <= 128 else 8, 3, 0
    return TailConfig(queries, tokens, warps, stages, aim=2 * processors, registers=registers)


def _cuts(lanes: int, processors: int, least: int) -> int:
    """Into how many programs to cut each of `lanes` equal rows, `least` programs or more in all.

    The fewest that leave no more than a tenth of the multiprocessors without their last program,
    or the best.
    """
    first = max(-(-least // lanes), 1)

    def full(cuts: int) -> float:
        return lanes * cuts / (-(-lanes * cuts // processors) * processors)

    tries = range(first, first + 8)
    return next((cuts for cuts in tries if full(cuts) >= 0.9), max(tries, key=full))


def power(n: int) -> int:
    """The least power of two from n on."""
    return 1 << max(n - 1, 0).bit_length()
