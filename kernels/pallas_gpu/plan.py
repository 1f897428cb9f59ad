"""From a call's static sizes to one launch of the kernel: the tile, the ring, the buffers."""

from dataclasses import dataclass

__all__ = ["Plan", "plan"]

# Of K and V on their way to a block, but two tiles at least. More does not come sooner on an H100:
# the blocks next to the memory get ahead of the others, which then end last.
RING_BYTES = 48 * 1024
TILE = 64  # tokens
QUERY_ROWS = 64  # rows of a product of the matrix unit; the query heads of a group fill some


@dataclass(frozen=True, slots=True)
class Plan:
    """All that is static in a launch.

    Attributes:
      rows, columns, pages, page_size, kv_heads, group, dim: the sizes of the call.
      scale, soft_cap, window: of the call; 0 for no cap and for no window.
      starts, sinks: whether the call has them.
      tile: tokens of a tile; pages smaller than it are gathered, larger ones are cut.
      stages: tiles of K and of V in flight.
      workers: blocks of the grid, one for each multiprocessor.
      interpreted: for the interpreter, which has neither atomics nor products of registers: parts
        are merged by a launch of its own, and operands pass through shared memory.
    """

    rows: int
    columns: int
    pages: int
    page_size: int
    kv_heads: int
    group: int
    dim: int
    scale: float
    soft_cap: float
    window: int
    starts: bool
    sinks: bool
    tile: int
    stages: int
    workers: int
    interpreted: bool

    @property
    def capacity(self) -> int:
        """Tokens that a row can hold."""
        return self.columns * self.page_size

    @property
    def piece(self) -> int:
        """Tokens of one copy: a page, or the part of it that is in a tile."""
        return min(self.page_size, self.tile)

    @property
    def pieces(self) -> int:
        """Copies that fill a tile."""
        return self.tile // self.piece

    @property
    def lines(self) -> int:
        """Query heads of a group, to an even number: those of a result on its way."""
        return self.group + self.group % 2

    @property
    def slots(self) -> int:
        """Partial results: a block ends at most one it did not begin and begins one it does not
        end."""
        return 2 * self.workers


def plan(
    *,
    rows: int,
    columns: int,
    pages: int,
    page_size: int,
    kv_heads: int,
    group: int,
    dim: int,
    itemsize: int,
    scale: float,
    soft_cap: float | None,
    window: int | None,
    starts: bool,
    sinks: bool,
    processors: int = 132,
    interpreted: bool = False,
) -> Plan:
    """The launch for a call of these sizes on a card with so many multiprocessors."""
    return Plan(
        rows=rows,
        columns=columns,
        pages=pages,
        page_size=page_size,
        kv_heads=kv_heads,
        group=group,
        dim=dim,
        scale=scale,
        soft_cap=0.0 if soft_cap is None else soft_cap,
        window=0 if window is None else window,
        starts=starts,
        sinks=sinks,
        tile=TILE,
        stages=2 if interpreted else max(RING_BYTES // (2 * TILE * dim * itemsize), 2),
        workers=processors,
        interpreted=interpreted,
    )
