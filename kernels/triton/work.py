"""Which program does what: every program finds its own place from the lengths of the batch.

```
rows      [==== row 0 ====][= row 1 =][======== row 2 ========]
share      1.6 of a program  0.4         2.5
programs   [0, 1 of row 0] [0, 1, 2 of row 2] [0 of row 1]         cut rows first, then by halves
```

Nothing is planned on the host, and the grid depends on shapes alone: a program without a place ends
at once. Here a unit is a row (T = 1) or a tile of the queries of a row (T > 1).
"""

import triton
import triton.language as tl

__all__ = ["padding_of", "place_of_row", "place_of_tile", "visible_of_row", "visible_of_tile"]


@triton.jit
def _ends_in_order(cuts, work, size):
    """Where the programs of each unit end, if the longest come first: what is cut, then by halves.

    `cuts` are the programs of each unit and `work` what it has, about `size` for one
    program. One scan counts all four kinds, in 16 bits of an int64 each: `plan` splits no batch
    whose programs of a KV head could reach 2**16.
    """
    kind = (work * 2 <= size).to(tl.int64) + (work * 4 <= size).to(tl.int64) + 1
    shift = tl.where(cuts > 1, 0, kind) * 16
    places = cuts.to(tl.int64) << shift
    ends = tl.cumsum(places, 0)
    every = tl.sum(places, 0)
    longer = tl.where(shift > 0, every & 0xFFFF, 0)
    longer += tl.where(shift > 16, (every >> 16) & 0xFFFF, 0)
    longer += tl.where(shift > 32, (every >> 32) & 0xFFFF, 0)
    return ((ends >> shift) & 0xFFFF) + longer


@triton.jit
def visible_of_row(
    row, seq_lens, starts, CAPACITY: tl.constexpr, WINDOW: tl.constexpr, STARTS: tl.constexpr
):
    """`first, end` of the visible tokens of a row, and whether its length breaks the contract."""
    length = tl.load(seq_lens + row)
    first = length * 0
    if STARTS:
        first = tl.maximum(tl.load(starts + row), 0)
    end = tl.minimum(length, CAPACITY)
    if WINDOW > 0:
        first = tl.maximum(first, length - WINDOW)
    return tl.minimum(first, CAPACITY), end, length > CAPACITY


@triton.jit
def _even_items(lanes, PROCESSORS: tl.constexpr, LEAST: tl.constexpr):
    """Programs for `lanes` equal rows and KV heads: `cuts` of config.py for part of a batch."""
    cuts = tl.maximum(tl.cdiv(LEAST, lanes), 1)
    for _ in tl.static_range(8):
        items = lanes * cuts
        full = items * 10 >= tl.cdiv(items, PROCESSORS) * PROCESSORS * 9
        cuts = tl.where(full, cuts, cuts + 1)
    return lanes * cuts


@triton.jit
def _cuts(tiles, size, eighths):
    """Programs for rows of so many tiles, about `size` for each; config.py tells of `eighths`."""
    return tl.maximum((tiles * 8 + eighths * size - 1) // (size * 8), 1)


@triton.jit
def place_of_row(
    item,
    seq_lens,
    starts,
    ROWS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    CAPACITY: tl.constexpr,
    WINDOW: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    EVEN_ITEMS: tl.constexpr,
    RAGGED_ITEMS: tl.constexpr,
    MIN_TILES: tl.constexpr,
    EIGHTHS: tl.constexpr,
    LEAST: tl.constexpr,
    PROCESSORS: tl.constexpr,
    STARTS: tl.constexpr,
):
    """`row, place of the row's first program, programs of the row` for one program of a KV head.

    A batch is even if its longest row is at most a quarter longer than the mean of those that are
    not empty. Long programs come first, whatever the order of the rows: the short ones fill the
    gaps at the end. Rows of equally many tiles lie in their own order, which takes no scan to see.
    """
    rows = tl.arange(0, BLOCK_ROWS)
    length = tl.load(seq_lens + rows, mask=rows < ROWS, other=0)
    first = tl.zeros([BLOCK_ROWS], tl.int32)
    if STARTS:
        first = tl.maximum(tl.load(starts + rows, mask=rows < ROWS, other=0), 0)
    if WINDOW > 0:
        first = tl.maximum(first, length - WINDOW)
    tiles = tl.cdiv(tl.minimum(length, CAPACITY), TOKENS) - first // TOKENS
    tiles = tl.maximum(tiles, 0)
    # One reduction for both, in 40 and 24 bits: `plan` keeps tiles below 2**31 and rows up to
    # 4096.
    sums = tl.sum(tiles.to(tl.int64) + ((tiles > 0).to(tl.int64) << 40), 0)
    total, live = (sums & 0xFFFFFFFF).to(tl.int32), (sums >> 40).to(tl.int32)
    most = tl.max(tiles, 0)
    if total == most * ROWS:
        size = tl.maximum(tl.cdiv(total * KV_HEADS, EVEN_ITEMS), MIN_TILES)
        parts = _cuts(most, size, 4)
        row = item // parts
        base = row * parts
        parts = tl.where(row < ROWS, parts, 0)
    else:
        goal = live * 0 + EVEN_ITEMS
        if live < ROWS:  # rows that only pad the batch
            goal = tl.minimum(_even_items(live * KV_HEADS, PROCESSORS, LEAST), EVEN_ITEMS)
        even = most.to(tl.int64) * live * 4 <= (total + live - 1).to(tl.int64) * 5
        goal = tl.where(even, goal, RAGGED_ITEMS)
        size = tl.maximum(tl.cdiv(total * KV_HEADS, goal), MIN_TILES)
        cuts = tl.where(rows < ROWS, _cuts(tiles, size, tl.where(even, 4, EIGHTHS)), 0)
        ends = _ends_in_order(cuts, tiles, size).to(tl.int32)
        here = (ends - cuts <= item) & (item < ends)
        # One sum instead of three: row, base and parts of the only row that is here, all below
        # 2**16, as `plan` keeps them.
        found = rows.to(tl.int64) | ((ends - cuts).to(tl.int64) << 16) | (cuts.to(tl.int64) << 32)
        found = tl.sum(tl.where(here, found, 0), 0)
        row = (found & 0xFFFF).to(tl.int32)
        base = ((found >> 16) & 0xFFFF).to(tl.int32)
        parts = (found >> 32).to(tl.int32)
    return tl.minimum(row, ROWS - 1), base, parts


@triton.jit
def padding_of(query_len, real, T: tl.constexpr):
    """How many of the T queries of a row are in front of its own."""
    own = tl.load(query_len, mask=real, other=0)
    return T - tl.minimum(tl.maximum(own, 0), T)


@triton.jit
def visible_of_tile(
    tile,
    length,
    start,
    padding,
    T: tl.constexpr,
    GROUP: tl.constexpr,
    M: tl.constexpr,
    WINDOW: tl.constexpr,
    CAPACITY: tl.constexpr,
    QUERY_LENS: tl.constexpr,
    TREE: tl.constexpr,
):
    """`first, end` of what the queries of a tile see together; where its first and last one sit.

    `padding` queries of the row are in front of its own; a tile of nothing else has `end` 0.
    """
    lowest = length - T + tile * M // GROUP
    highest = length - T + tl.minimum((tile * M + M - 1) // GROUP, T - 1)
    if QUERY_LENS:
        lowest = tl.maximum(lowest, length - T + padding)
    first = start
    if WINDOW > 0:
        nearest = lowest
        if TREE:  # any query may stand where the row's own begin
            nearest = tl.maximum(length - T + padding, 0)
        first = tl.maximum(first, nearest - WINDOW + 1)
    end = tl.minimum(tl.maximum(highest + 1, 0), CAPACITY)
    if QUERY_LENS:
        end = tl.where(highest >= lowest, end, 0)
    return tl.minimum(first, CAPACITY), end, lowest, highest


@triton.jit
def place_of_tile(
    place,
    seq_lens,
    starts,
    query_lens,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
    T: tl.constexpr,
    GROUP: tl.constexpr,
    M: tl.constexpr,
    KV_HEADS: tl.constexpr,
    CAPACITY: tl.constexpr,
    WINDOW: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_ITEMS: tl.constexpr,
    AIM: tl.constexpr,
    STARTS: tl.constexpr,
    QUERY_LENS: tl.constexpr,
    TREE: tl.constexpr,
):
    """`item, place of its first program, programs of it` for one program of a KV head.

    An item is a tile of a row; the last tiles of all rows come first, because they see most. Then
    the order is that of the T = 1 kernel: what is cut, then by halves of the work.
    """
    item = tl.arange(0, BLOCK_ITEMS)
    real = item < ROWS * TILES
    row = item % ROWS
    length = tl.load(seq_lens + row, mask=real, other=0)
    length = tl.minimum(tl.maximum(length, 0), CAPACITY + 1)
    start = tl.zeros([BLOCK_ITEMS], tl.int32)
    if STARTS:
        start = tl.load(starts + row, mask=real, other=0)
        start = tl.minimum(tl.maximum(start, 0), CAPACITY)
    padding = row * 0
    if QUERY_LENS:
        padding = padding_of(query_lens + row, real, T)
    first, end, _, _ = visible_of_tile(
        TILES - 1 - item // ROWS, length, start, padding, T, GROUP, M, WINDOW, CAPACITY,
        QUERY_LENS, TREE,
    )  # fmt: skip
    blocks = tl.maximum(tl.cdiv(end, TOKENS) - first // TOKENS, 0)
    blocks = tl.where(real, blocks, 0)
    total = tl.sum(blocks.to(tl.int64), 0)
    # `plan` keeps twice the share below 2**31.
    size = tl.maximum(tl.cdiv(total * KV_HEADS, AIM), 1).to(tl.int32)
    cuts = tl.maximum((blocks.to(tl.int64) * 2 + size) // (size * 2), 1)
    cuts = tl.where(real, cuts, 0)
    ends = _ends_in_order(cuts, blocks, size)
    here = (ends - cuts <= place) & (place < ends)
    # The only item that is here, its first program and their number, all below 2**16.
    found = item.to(tl.int64) | ((ends - cuts) << 16) | (cuts << 32)
    found = tl.sum(tl.where(here, found, 0), 0)
    return (
        (found & 0xFFFF).to(tl.int32),
        ((found >> 16) & 0xFFFF).to(tl.int32),
        (found >> 32).to(tl.int32),
    )
