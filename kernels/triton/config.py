"""Which tiling serves a call: tables of what was measured, and a default for other cards."""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from ..cards import Card
from ..record import AttentionCall

__all__ = ["BIG_SHARED_MEMORY", "DecodeConfig", "TailConfig", "by_tiles", "choose_config", "power"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeConfig:
    """One tiling of the kernel for T = 1.

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

    def __post_init__(self) -> None:
        _check_tiling(self.tokens, self.warps, self.stages)
        if min(self.even, self.ragged) < 0 or min(self.min_tiles, self.least, self.merge) < 1:
            raise ValueError(
                "even and ragged must be >= 0, and min_tiles, least and merge >= 1; got "
                f"{self.even=}, {self.ragged=}, {self.min_tiles=}, {self.least=}, {self.merge=}"
            )
        if not 1 <= self.eighths <= 8:
            raise ValueError(f"eighths must be in 1 .. 8; got {self.eighths=}")


@dataclass(frozen=True, slots=True, kw_only=True)
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

    def __post_init__(self) -> None:
        _check_tiling(self.tokens, self.warps, self.stages)
        if self.queries < 16 or self.queries & (self.queries - 1) or self.aim < 0:
            raise ValueError(
                "queries must be a power of two, 16 or more, and aim >= 0; got "
                f"{self.queries=}, {self.aim=}"
            )
        if self.registers and not (24 <= self.registers <= 255):
            raise ValueError(f"registers must be 0 or in 24 .. 255; got {self.registers=}")


def _check_tiling(tokens: int, warps: int, stages: int) -> None:
    """Raise unless Triton can multiply such tiles."""
    if tokens < 16 or tokens & (tokens - 1) or warps not in (1, 2, 4, 8, 16) or stages < 1:
        raise ValueError(
            "tokens must be a power of two, 16 or more, warps one up to 16, stages >= 1; got "
            f"{tokens=}, {warps=}, {stages=}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tiling:
    """What a table says of T = 1; `programs` of an even batch a multiprocessor gets at least."""

    tokens: int
    warps: int
    stages: int
    programs: int

    def __post_init__(self) -> None:
        _check_tiling(self.tokens, self.warps, self.stages)
        if self.programs < 1:
            raise ValueError(f"programs must be >= 1; got {self.programs=}")


_Key = TypeVar("_Key", bound=Hashable)
_Found = TypeVar("_Found")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tuned(Generic[_Key, _Found]):
    """Tilings with the card and the command behind them; the commands store their results."""

    card: str
    command: str
    tilings: Mapping[_Key, _Found]


# By the head dim padded to a power of two and the kind of call.
# `few`: at most one row and KV head for each multiprocessor; `many`: more. `few long`: there is
# work for several programs a multiprocessor; `many long`: lengths may differ a lot.
_DECODE = _Tuned(
    card="NVIDIA H100 80GB HBM3",
    command="python benchmarks/tune_triton.py",
    tilings={
        (64, "few"): _Tiling(tokens=128, warps=4, stages=3, programs=1),
        (64, "few long"): _Tiling(tokens=128, warps=4, stages=2, programs=3),
        (64, "many"): _Tiling(tokens=128, warps=4, stages=2, programs=3),
        (64, "many long"): _Tiling(tokens=128, warps=4, stages=2, programs=2),
        (128, "few"): _Tiling(tokens=128, warps=4, stages=3, programs=1),
        (128, "few long"): _Tiling(tokens=64, warps=4, stages=2, programs=3),
        (128, "many"): _Tiling(tokens=64, warps=4, stages=2, programs=3),
        (128, "many long"): _Tiling(tokens=128, warps=4, stages=2, programs=2),
        (256, "few"): _Tiling(tokens=64, warps=8, stages=3, programs=1),
        (256, "few long"): _Tiling(tokens=64, warps=8, stages=3, programs=1),
        (256, "many"): _Tiling(tokens=64, warps=8, stages=3, programs=1),
        (256, "many long"): _Tiling(tokens=64, warps=8, stages=3, programs=1),
    },
)
# The same of pages of 8 bits, for all kinds of call: half as many bytes to fetch at a time, and
# more to do with each.
_EIGHT_BITS = _Tuned(
    card="NVIDIA H200",
    command="python benchmarks/tune_triton.py --dtype int8 --name tune_triton_8bit",
    tilings={
        64: _Tiling(tokens=128, warps=4, stages=3, programs=3),
        128: _Tiling(tokens=128, warps=4, stages=3, programs=2),
        256: _Tiling(tokens=64, warps=4, stages=3, programs=2),
    },
)
# Full tiles, by head dim.
_TAILS = _Tuned(
    card="NVIDIA H200",
    command="python benchmarks/tune_tails.py",
    tilings={
        64: TailConfig(queries=128, tokens=64, warps=8, stages=3, registers=128),
        128: TailConfig(queries=128, tokens=64, warps=8, stages=2, registers=128),
        256: TailConfig(queries=128, tokens=64, warps=8, stages=2),
    },
)
# A few queries (drafts), where reading takes the time as it does for T = 1: by head dim and tile.
_DRAFTS = _Tuned(
    card="NVIDIA H200",
    command="python benchmarks/tune_tails.py",
    tilings={
        (64, 16): TailConfig(queries=16, tokens=128, warps=4, stages=2),
        (64, 32): TailConfig(queries=32, tokens=128, warps=4, stages=2),
        (64, 64): TailConfig(queries=64, tokens=128, warps=4, stages=2),
        (128, 16): TailConfig(queries=16, tokens=32, warps=4, stages=3),
        (128, 32): TailConfig(queries=32, tokens=128, warps=4, stages=2),
        (128, 64): TailConfig(queries=64, tokens=64, warps=4, stages=3),
        (256, 16): TailConfig(queries=16, tokens=64, warps=4, stages=2),
        (256, 32): TailConfig(queries=32, tokens=64, warps=4, stages=2),
        (256, 64): TailConfig(queries=64, tokens=64, warps=8, stages=3),
    },
)
SPLIT_TOKENS = 2048  # of a program, where only its row may say how many it gets
FEW_QUERIES = 64  # the largest tile of drafts
_LONG_ROW = {"few": 1024, "many": 8192}  # tokens of capacity above which a batch is `long`
_LONG_BATCH = 2**17  # and the tokens times KV heads, where it has few rows, but not one
BIG_SHARED_MEMORY = (80, 90, 100, 103)  # generations with at least 160 KiB a multiprocessor
_WARPGROUPS = (90, 100, 103)  # and those whose matrix unit takes operands from there


def choose_config(call: AttentionCall, card: Card) -> DecodeConfig | TailConfig:
    """The config of a call: from the tables, or a small tiling that fits every card."""
    if by_tiles(call):
        return _tail_config(call, card)
    config = _decode_config(call, card)
    return of_row_alone(call, config) if call.batch_invariant else config


def by_tiles(call: AttentionCall) -> bool:
    """Whether the kernel of T > 1 serves a call: those, and T = 1 with so many query heads a KV
    head that they are a tile, as the shared part of many rows is. That kernel computes them with
    fewer registers, and takes any number of heads."""
    tile = call.group > 32 and call.q.dtype.itemsize == 2 == call.itemsize
    return not call.one_token or (tile and not call.batch_invariant)


def of_row_alone(call: AttentionCall, config: DecodeConfig) -> DecodeConfig:
    """The same tiles, and programs of a row that follow from its own length: one for about every
    `SPLIT_TOKENS`. The aims are what a batch of full rows gets then, so no batch asks for less."""
    tiles = max(SPLIT_TOKENS // config.tokens, 1)
    full = call.rows * call.kv_heads * -(-call.capacity // config.tokens)
    aim = max(-(-full // tiles), 1)
    return replace(config, even=aim, ragged=aim, least=aim, min_tiles=tiles, eighths=4)


def _decode_config(call: AttentionCall, card: Card) -> DecodeConfig:
    lanes = call.rows * call.kv_heads
    processors = card.processors
    twice = 2 * lanes * max(processors // lanes, 1)
    small = dict(even=twice, least=2 * processors)
    if call.q.dtype.itemsize == 4:
        # Exact float32 products do not use the matrix unit: small tiles, many programs.
        return DecodeConfig(tokens=16, warps=4, stages=2, ragged=4 * processors, **small)
    if card.generation not in BIG_SHARED_MEMORY:
        tokens = 64 if call.dim <= 128 else 32
        return DecodeConfig(tokens=tokens, warps=4, stages=2, ragged=8 * processors, **small)
    kind = "few" if lanes <= processors else "many"
    long = call.capacity > _LONG_ROW[kind]
    if kind == "few":
        long = long and call.rows > 1 and lanes * call.capacity >= _LONG_BATCH
    elif call.starts is not None:  # behind what rows share they are short, and alike
        long = False
    dim = _table_dim(call)
    found = _DECODE.tilings[dim, kind + " long" * long]
    if call.itemsize == 1:
        found = _EIGHT_BITS.tilings[dim]
    least = found.programs * processors * 19 // 20  # a wave may be a little short of full
    return DecodeConfig(
        tokens=found.tokens,
        warps=found.warps,
        stages=found.stages,
        even=lanes * _cuts(lanes, processors, least),
        ragged=max(found.programs, 2) * processors,
        eighths=4 if kind == "few" else 8,
        least=least,
    )


def _tail_config(call: AttentionCall, card: Card) -> TailConfig:
    queries = max(power(call.tokens * call.group), 16)
    processors, dim = card.processors, _table_dim(call)
    if call.q.dtype.itemsize == 4:
        # Exact float32 products do not use the matrix unit: small tiles, many programs.
        return TailConfig(queries=16, tokens=16, warps=4, stages=2, aim=4 * processors)
    if card.generation not in _WARPGROUPS:
        most, tokens = (64, 64) if dim <= 128 else (32, 32)
        queries = min(queries, most)
        return TailConfig(queries=queries, tokens=tokens, warps=4, stages=2, aim=4 * processors)
    if queries <= FEW_QUERIES:
        return replace(_DRAFTS.tilings[dim, queries], aim=2 * processors)
    found = replace(_TAILS.tilings[dim], aim=2 * processors)
    tiles = call.rows * call.kv_heads * -(-call.tokens * call.group // found.queries)
    if tiles <= processors:  # one wave of half tiles is shorter than half a wave of whole ones
        warps = 4 if dim <= 128 else 8
        return replace(found, queries=64, tokens=64, warps=warps, stages=3, registers=0)
    return found


def _table_dim(call: AttentionCall) -> int:
    return 64 if call.dim <= 64 else 128 if call.dim <= 128 else 256


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
