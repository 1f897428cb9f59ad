"""From a call to one launch of a kernel: the tile, the ring, the grid, the buffers."""

from dataclasses import dataclass

from ..cards import Card
from ..record import AttentionCall
from .config import QUERIES, TAIL_KEYS, TAIL_STAGES, ring_stages

__all__ = ["Plan"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """All that is static in a launch.

    Attributes:
      rows, columns, pages, page_size, kv_heads, group, dim: the sizes of the call.
      scale, soft_cap, window: of the call; 0 for no cap and for no window.
      starts, sinks, query_lens: whether the call has them.
      new: T of the call.
      tokens: 1, or T rounded up to whole units: so many are in front of the first one of the call.
      tile: keys of a tile; pages smaller than it are gathered, larger ones are cut.
      stages: tiles of K and of V in flight.
      workers: blocks of the grid where T = 1, one for each multiprocessor.
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
    query_lens: bool
    new: int
    tokens: int
    tile: int
    stages: int
    workers: int
    interpreted: bool

    @classmethod
    def of(cls, call: AttentionCall, card: Card, *, interpreted: bool = False) -> "Plan":
        """The launch of `call` on `card`."""
        tail = call.tokens > 1
        unit = QUERIES * (1 + call.group % 2) if tail else 1
        stages = TAIL_STAGES if tail else ring_stages(call.dim, call.itemsize)
        return cls(
            rows=call.rows,
            columns=call.columns,
            pages=call.pages,
            page_size=call.page_size,
            kv_heads=call.kv_heads,
            group=call.group,
            dim=call.dim,
            scale=call.scale,
            soft_cap=0.0 if call.soft_cap is None else call.soft_cap,
            # One that no row fills is none: a position less it stays within int32.
            window=0 if call.window is None or call.window >= call.capacity else call.window,
            starts=call.starts is not None,
            sinks=call.sink is not None,
            query_lens=call.query_lens is not None,
            new=call.tokens,
            tokens=-(-call.tokens // unit) * unit,
            tile=TAIL_KEYS[call.dim] if tail else QUERIES,
            stages=2 if interpreted else stages,
            workers=card.processors,
            interpreted=interpreted,
        )

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
        """Query heads of a group, to an even number: those of a result on its way (T = 1)."""
        return self.group + self.group % 2

    @property
    def slots(self) -> int:
        """Partial results (T = 1): a block ends at most one it did not begin and begins one it does
        not end."""
        return 2 * self.workers

    @property
    def paired(self) -> bool:
        """Whether the two warpgroups of a unit (T > 1) have two heads of the same tokens."""
        return self.group % 2 == 0

    @property
    def unit_tokens(self) -> int:
        """Tokens of a unit."""
        return QUERIES if self.paired else 2 * QUERIES

    @property
    def units(self) -> int:
        """Units of a row and lane."""
        return self.tokens // self.unit_tokens

    @property
    def lanes(self) -> int:
        """Units of the same tokens: one for each pair of heads, or for each head."""
        return self.kv_heads * self.group // (2 if self.paired else 1)

    @property
    def blocks(self) -> int:
        """Blocks of the grid."""
        return self.workers if self.new == 1 else self.rows * self.units * self.lanes
