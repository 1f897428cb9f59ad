"""From a call to one launch of a kernel: the grid, the constants, the buffers."""

from dataclasses import dataclass, replace
from typing import Any

from ..cards import Card
from ..eight_bits import LARGEST
from ..record import AttentionCall
from .config import FEW_QUERIES, DecodeConfig, TailConfig, choose_config, power

__all__ = ["Plan"]

# Each program scans the lengths of the whole batch; with more rows, or tiles of rows, than this
# none is split.
MAX_SPLIT_ROWS = 4096
# What work.py packs: four counts of programs into one int64, and an item with its first program.
PACKED = 2**16
INT32 = 2**31
MOST_SETS = 8


@dataclass(frozen=True, slots=True)
class Plan:
    """One launch: what jax-triton, the interpreter and the ahead-of-time compiler all need.

    Attributes:
      config: the tiling.
      grid: programs.
      constants: of the kernel, by name.
      counters: that the kernel needs, zeros before and after.
      outputs: shape and dtype of out, lse and two scratches.
    """

    config: DecodeConfig | TailConfig
    grid: int
    constants: dict[str, Any]
    counters: int
    outputs: tuple[tuple[tuple[int, ...], str], ...]

    @classmethod
    def of(
        cls,
        call: AttentionCall,
        card: Card,
        config: DecodeConfig | TailConfig | None = None,
        *,
        append: bool = False,
        slots: bool = False,
        filled: int | None = None,
    ) -> "Plan":
        """The launch of `call` on `card`, by `config` if one is given.

        `append` also writes the newest token of T = 1, of the rows that `slots` name where those
        are given. With `filled`, about how many rows are not empty, tiles of queries leave their
        parts to the caller, who merges: out and lse have one more axis in front.
        """
        config = choose_config(call, card) if config is None else config
        if isinstance(config, TailConfig):
            return _tail(call, config, 1 if filled is None else _sets(call, card, config, filled))
        return _decode(call, card, config, append, slots)


def _decode(
    call: AttentionCall, card: Card, config: DecodeConfig, append: bool, slots: bool
) -> Plan:
    rows, heads = call.rows, call.kv_heads
    block_g, block_d = power(call.group), _block_d(call)
    full = -(-call.capacity // config.tokens)  # tiles of a row that fills its table
    # Every program adds up the tiles of all rows and KV heads in int32.
    fits = rows <= MAX_SPLIT_ROWS and rows * full * heads < INT32
    # Rounding up gives every row at most one program more than its share of the aim.
    fits &= rows + max(config.even, config.ragged) // heads < PACKED
    split = config.even > 0 and fits
    aims = (config.even, config.ragged) if split and rows > 1 else (config.even,)
    items = max(min(rows + aim // heads, rows * full) for aim in aims) if split else 0
    items = max(items, rows)
    size = max(-(-rows * full * heads // max(config.even, 1)), config.min_tiles)
    most = items - rows + 1
    constants = _constants(call) | dict(
        M=max(block_g, 16),
        BLOCK_G=block_g,
        BLOCK_D=block_d,
        TOKENS=config.tokens,
        STAGES=config.stages,
        # Parts that a merge loads before it uses the first. Fewer than 2 would wait for L2 once for
        # each; more than 16 would only make the unrolled loop longer.
        CHUNK=min(max(config.merge * 32 * config.warps // (block_g * block_d), 2), 16, power(most)),
        BLOCK_ROWS=power(rows) if split else 1,
        GUESS=max((full + size // 2) // size, 1) if split else 1,
        EVEN_ITEMS=config.even,
        RAGGED_ITEMS=config.ragged,
        MIN_TILES=config.min_tiles,
        EIGHTHS=config.eighths,
        LEAST=config.least,
        PROCESSORS=card.processors,
        SPLIT=split,
        APPEND=append,
        SLOTS=slots,
    )
    partials = items * heads if most > 1 else 1
    return _plan(call, config, items * heads, constants, rows * heads, (partials, call.group))


def _sets(call: AttentionCall, card: Card, config: TailConfig, filled: int) -> int:
    """Programs for each tile, two for each multiprocessor: to merge more takes longer."""
    tiles = max(filled, 1) * -(-call.tokens * call.group // config.queries)
    sets = min(2 * card.processors // (tiles * call.kv_heads), MOST_SETS)
    return max(min(sets, -(-call.capacity // config.tokens)), 1)


def _tail(call: AttentionCall, config: TailConfig, sets: int) -> Plan:
    heads, m = call.kv_heads, config.queries
    block_d = _block_d(call)
    tiles = -(-call.tokens * call.group // m)
    items = call.rows * tiles
    blocks = -(-call.capacity // config.tokens)
    # Rounding to the nearest gives every tile at most one program more than its share of the aim.
    split = config.aim > 0 and items <= MAX_SPLIT_ROWS and items + config.aim // heads < PACKED
    # The share of a program is a number of blocks, and it is doubled.
    split = split and sets == 1 and 2 * -(-items * blocks * heads // config.aim) < INT32
    programs = min(items + config.aim // heads, items * max(blocks, 1)) if split else items * sets
    # A tile that is cut has 1.5 shares of the work or more, so at most 4/3 programs a share.
    slots = min(programs, config.aim * 4 // (3 * heads) + 2) if split else 0
    constants = _constants(call) | dict(
        T=call.tokens,
        M=m,
        TILES=tiles,
        BLOCK_D=block_d,
        TOKENS=config.tokens,
        STAGES=config.stages,
        CHUNK=_merged_at_once(config, block_d),
        BLOCK_ITEMS=power(items) if split else 1,
        AIM=max(config.aim, 1),
        SPLIT=split,
        SETS=sets,
        QUERY_LENS=call.query_lens is not None,
        TREE=call.tail_mask is not None,
        REGISTERS=config.registers,
    )
    # One that no row fills is none: a position less it stays within int32.
    if constants["WINDOW"] >= call.capacity:
        constants["WINDOW"] = 0
    counters = items * heads if split else 0
    partials = (max(slots * heads, 1), m)
    made = _plan(call, config, programs * heads, constants, counters, partials)
    if sets == 1:
        return made
    (out, dtype), (lse, wide), *scratch = made.outputs
    return replace(made, outputs=(((sets, *out), dtype), ((sets, *lse), wide), *scratch))


def _merged_at_once(config: TailConfig, block_d: int) -> int:
    """Parts of 16 queries that a merge loads before it uses the first, for each wait is for L2:
    as many as the registers of a thread hold that the products of a tile need anyway."""
    registers = 128 if config.queries == FEW_QUERIES and not config.registers else 32
    return min(max(registers * 32 * config.warps // (16 * block_d), 2), 16)


def _block_d(call: AttentionCall) -> int:
    """D as tiles have it: a product is over 16 numbers or more, and over halves of 8 bits."""
    return max(power(call.dim), 16 if call.k_scales is None else 32)


def _constants(call: AttentionCall) -> dict[str, Any]:
    """What every kernel is told of a call. Pointers of what is not given are never followed."""
    return dict(
        ROWS=call.rows,
        COLUMNS=call.columns,
        PAGES=call.pages,
        PAGE=call.page_size,
        KV_HEADS=call.kv_heads,
        GROUP=call.group,
        D=call.dim,
        SCALE=call.scale,
        SOFT_CAP=0.0 if call.soft_cap is None else call.soft_cap,
        WINDOW=0 if call.window is None else call.window,
        STARTS=call.starts is not None,
        SINKS=call.sink is not None,
        SCALED=call.k_scales is not None,
        LARGEST=LARGEST.get(call.k_pages.dtype, 0.0),
    )


def _plan(
    call: AttentionCall,
    config: DecodeConfig | TailConfig,
    grid: int,
    constants: dict[str, Any],
    counters: int,
    partials: tuple[int, int],
) -> Plan:
    outputs = (
        (call.q.shape, str(call.q.dtype)),
        (call.q.shape[:-1], "float32"),
        ((*partials, call.dim), "float32"),
        (partials, "float32"),
    )
    return Plan(config, grid, constants, counters, outputs)
