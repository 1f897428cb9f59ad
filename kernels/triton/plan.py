"""From a config to one launch of a kernel: the grid, the constants, the buffers."""

from dataclasses import dataclass
from typing import Any

from .config import Config, Shape, TailConfig, power

__all__ = ["Launch", "plan", "plan_tail"]

# Each program scans the lengths of the whole batch; with more rows than this none is split.
MAX_SPLIT_ROWS = 4096


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch: what jax-triton, the interpreter and the ahead-of-time compiler all need."""

    grid: int
    warps: int
    stages: int
    constants: dict[str, Any]
    counters: int
    outputs: tuple[tuple[tuple[int, ...], str], ...]  # (shape, dtype) of out, lse, two scratches


def plan(
    shape: Shape,
    config: Config,
    *,
    dtype: str,
    pages: int,
    columns: int,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    starts: bool = True,
    sinks: bool = True,
    append: bool = False,
    slots: bool = False,
) -> Launch:
    """The launch of `config` for a call of this shape; `append` also writes the newest token.

    Without `starts`, `sinks` or `slots` their pointers are never followed.
    """
    heads = shape.kv_heads
    block_g, block_d = power(shape.group), max(power(shape.dim), 16)
    full = -(-shape.capacity // config.tokens)  # tiles of a row that fills its table
    # Every program adds up the tiles of all rows and KV heads in int32, counts programs of four
    # kinds in 16 bits each of one int64, and packs a row and its first program into 16 bits each.
    fits = shape.rows * full * heads < 2**31
    fits &= shape.rows + max(config.even, config.ragged) // heads < 2**16
    split = config.even > 0 and shape.rows <= MAX_SPLIT_ROWS and fits
    aims = (config.even, config.ragged) if split and shape.rows > 1 else (config.even,)
    # Rounding up gives every row at most one program more than its share of the aim.
    items = max(min(shape.rows + aim // heads, shape.rows * full) for aim in aims) if split else 0
    items = max(items, shape.rows)
    size = max(-(-shape.rows * full * heads // max(config.even, 1)), config.min_tiles)
    most = items - shape.rows + 1
    constants = dict(
        ROWS=shape.rows,
        COLUMNS=columns,
        PAGES=pages,
        PAGE=shape.page_size,
        KV_HEADS=shape.kv_heads,
        GROUP=shape.group,
        D=shape.dim,
        SCALE=scale,
        SOFT_CAP=0.0 if soft_cap is None else soft_cap,
        WINDOW=0 if window is None else window,
        M=max(block_g, 16),
        BLOCK_G=block_g,
        BLOCK_D=block_d,
        TOKENS=config.tokens,
        STAGES=config.stages,
        # Parts that a merge loads before it uses the first. Fewer than 2 would wait for L2 once for
        # each; more than 16 would only make the unrolled loop longer.
        CHUNK=min(max(config.merge * 32 * config.warps // (block_g * block_d), 2), 16, power(most)),
        BLOCK_ROWS=power(shape.rows) if split else 1,
        GUESS=max((full + size // 2) // size, 1) if split else 1,
        EVEN_ITEMS=config.even,
        RAGGED_ITEMS=config.ragged,
        MIN_TILES=config.min_tiles,
        EIGHTHS=config.eighths,
        LEAST=config.least,
        PROCESSORS=shape.processors,
        SPLIT=split,
        STARTS=starts,
        SINKS=sinks,
        APPEND=append,
        SLOTS=slots,
    )
    partials = items * heads if most > 1 else 1
    return Launch(
        grid=items * heads,
        warps=config.warps,
        stages=config.stages,
        constants=constants,
        counters=shape.rows * heads,
        outputs=(
            ((shape.rows, heads * shape.group, shape.dim), dtype),
            ((shape.rows, heads * shape.group), "float32"),
            ((partials, shape.group, shape.dim), "float32"),
            ((partials, shape.group), "float32"),
        ),
    )


def plan_tail(
    shape: Shape,
    config: TailConfig,
    *,
    dtype: str,
    pages: int,
    columns: int,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    starts: bool = True,
    sinks: bool = True,
) -> Launch:
    """The launch of `config` for a call of this shape, T > 1."""
    heads, m = shape.kv_heads, config.queries
    block_d = max(power(shape.dim), 16)
    tiles = -(-shape.tokens * shape.group // m)
    items = shape.rows * tiles
    # The kernel counts programs of four kinds in 16 bits each, and items in 16.
    split = config.aim > 0 and items <= MAX_SPLIT_ROWS and items + config.aim // heads < 2**16
    blocks = -(-shape.capacity // config.tokens)
    # Rounding to the nearest gives every tile at most one program more than its share of the aim.
    programs = min(items + config.aim // heads, items * max(blocks, 1)) if split else items
    # A tile that is cut has 1.5 shares of the work or more, so at most 4/3 programs a share.
    slots = min(programs, config.aim * 4 // (3 * heads) + 2) if split else 0
    constants = dict(
        ROWS=shape.rows,
        COLUMNS=columns,
        PAGES=pages,
        PAGE=shape.page_size,
        KV_HEADS=heads,
        GROUP=shape.group,
        T=shape.tokens,
        D=shape.dim,
        SCALE=scale,
        SOFT_CAP=0.0 if soft_cap is None else soft_cap,
        # One that no row fills is none: a position less it stays within int32.
        WINDOW=0 if window is None or window >= shape.capacity else window,
        M=m,
        TILES=tiles,
        BLOCK_D=block_d,
        TOKENS=config.tokens,
        STAGES=config.stages,
        CHUNK=min(max(32 * 32 * config.warps // (16 * block_d), 2), 16),  # 32 registers a thread
        BLOCK_ITEMS=power(items) if split else 1,
        AIM=max(config.aim, 1),
        SPLIT=split,
        STARTS=starts,
        SINKS=sinks,
        REGISTERS=config.registers,
    )
    return Launch(
        grid=programs * heads,
        warps=config.warps,
        stages=config.stages,
        constants=constants,
        counters=items * heads if split else 0,
        outputs=(
            ((shape.rows, shape.tokens, heads * shape.group, shape.dim), dtype),
            ((shape.rows, shape.tokens, heads * shape.group), "float32"),
            ((max(slots * heads, 1), m, shape.dim), "float32"),
            ((max(slots * heads, 1), m), "float32"),
        ),
    )
