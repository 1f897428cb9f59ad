"""The raw kernel: one query token a row against its pages, split over programs, merged in place.

```
rows      [==== row 0 ====][= row 1 =][======== row 2 ========]
tiles      0 1 2 0 1 2 0 1  0 0 0 0    0 1 2 3 4 0 1 2 3 4 0 1      which program of the row has it
programs   [0, 1, 2 of row 0] [0, 1, 2, 3, 4 of row 2] [0 of row 1]
```

Every program reads the lengths of the batch and finds its own place from them: a row is cut into
programs of about equal work, tiles dealt out like cards. Rows that are cut come first, so that
their merges overlap with other work and the short programs are left for the end, when they fill the
gaps. The grid does not depend on the lengths; a program without a place ends at once. Each program
guesses its place as if all rows were full and fetches the page ids for that while the lengths are
still on their way: an even batch starts without waiting twice.

A program that has all the tokens of a row stores the result. Otherwise it stores a partial one,
float32 and normalised, with its log-sum, and counts itself; the last to arrive merges all partials
of the row in the order of the tokens, so the result does not depend on who was last.
"""

import triton
import triton.language as tl

from .merge import arrive, merge_parts, store_result
from .tiles import append_newest, attend_tiles, page_ids, q_rows

__all__ = ["decode_kernel"]


@triton.jit
def _range(
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
def _find_place(
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
    # One reduction for both: `plan` keeps tiles below 2**31 and rows below 2**13.
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
        # The longest programs first: cut rows, then by halves. One scan counts all four kinds,
        # in 16 bits each: `plan` keeps the programs of a KV head below 2**16.
        kind = (tiles * 2 <= size).to(tl.int64) + (tiles * 4 <= size).to(tl.int64) + 1
        shift = tl.where(cuts > 1, 0, kind) * 16
        places = cuts.to(tl.int64) << shift
        ends = tl.cumsum(places, 0)
        every = tl.sum(places, 0)
        longer = tl.where(shift > 0, every & 0xFFFF, 0)
        longer += tl.where(shift > 16, (every >> 16) & 0xFFFF, 0)
        longer += tl.where(shift > 32, (every >> 32) & 0xFFFF, 0)
        ends = (((ends >> shift) & 0xFFFF) + longer).to(tl.int32)
        here = (ends - cuts <= item) & (item < ends)
        # One sum instead of three: row, base and parts of the only row that is here.
        found = rows.to(tl.int64) | ((ends - cuts).to(tl.int64) << 16) | (cuts.to(tl.int64) << 32)
        found = tl.sum(tl.where(here, found, 0), 0)
        row = (found & 0xFFFF).to(tl.int32)
        base = ((found >> 16) & 0xFFFF).to(tl.int32)
        parts = (found >> 32).to(tl.int32)
    return tl.minimum(row, ROWS - 1), base, parts


@triton.jit
def decode_kernel(
    q,
    k_pages,
    v_pages,
    layer,
    page_table,
    seq_lens,
    starts,
    sink,
    counters,
    new_k,
    new_v,
    slots,
    out,
    lse,
    part_acc,
    part_lse,
    k_written,
    v_written,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PAGES: tl.constexpr,
    PAGE: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    SCALE: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    WINDOW: tl.constexpr,
    M: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TOKENS: tl.constexpr,
    STAGES: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    GUESS: tl.constexpr,
    EVEN_ITEMS: tl.constexpr,
    RAGGED_ITEMS: tl.constexpr,
    MIN_TILES: tl.constexpr,
    EIGHTHS: tl.constexpr,
    LEAST: tl.constexpr,
    PROCESSORS: tl.constexpr,
    SPLIT: tl.constexpr,
    STARTS: tl.constexpr,
    SINKS: tl.constexpr,
    APPEND: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """One call of one layer.

    Pointers: q, out `[ROWS, Hq, D]`; pages `[L, PAGES, KV_HEADS, PAGE, D]`; layer `[]`;
    page_table `[ROWS, COLUMNS]`; seq_lens, starts `[ROWS]`; sink `[Hq]`; counters, one for each
    row and KV head, zeros before and after; lse `[ROWS, Hq]`; part_acc `[slots, GROUP, D]` and
    part_lse `[slots, GROUP]`, anything before and after.

    With APPEND the newest token of a row is not in its page yet: new_k and new_v
    `[ROWS, KV_HEADS, D]` are written there, and k_written and v_written are the pages once more,
    as outputs. With SLOTS, slots `[ROWS]` in the null page say that a row has no new token.
    Without APPEND all five are never touched.
    """
    HEADS: tl.constexpr = KV_HEADS * GROUP
    CAPACITY: tl.constexpr = COLUMNS * PAGE
    HEAD_STRIDE: tl.constexpr = PAGE * D
    PAGE_STRIDE: tl.constexpr = KV_HEADS * HEAD_STRIDE
    kv_head = tl.program_id(0) % KV_HEADS
    item = tl.program_id(0) // KV_HEADS
    column = tl.arange(0, TOKENS)
    dim = tl.arange(0, BLOCK_D)

    guess = tl.minimum(item // GUESS, ROWS - 1)
    begin = (item % GUESS) * TOKENS
    ids = page_ids(
        page_table + guess.to(tl.int64) * COLUMNS, begin + column, begin + column < CAPACITY, PAGE
    )
    offset = tl.load(layer).to(tl.int64) * (PAGES * PAGE_STRIDE) + kv_head * HEAD_STRIDE
    head, real = q_rows(kv_head, GROUP, M)
    q_mask = real[:, None] & (dim < D)[None, :]
    q_at = head[:, None] * D + dim[None, :]
    q_tile = tl.load(q + guess.to(tl.int64) * (HEADS * D) + q_at, mask=q_mask, other=0.0)
    sinks = tl.full([M], -float("inf"), tl.float32)
    if SINKS:
        sinks = tl.load(sink + head, mask=real, other=0.0)
    if ROWS == 1:
        # Without it the compiler moves the loads above behind the wait for the length.
        tl.debug_barrier()
    row = guess
    base = item
    parts = 1
    if SPLIT and ROWS > 1:
        row, base, parts = _find_place(
            item, seq_lens, starts, ROWS, KV_HEADS, CAPACITY, WINDOW, TOKENS, BLOCK_ROWS,
            EVEN_ITEMS, RAGGED_ITEMS, MIN_TILES, EIGHTHS, LEAST, PROCESSORS, STARTS,
        )  # fmt: skip
    first, end, broken = _range(row, seq_lens, starts, CAPACITY, WINDOW, STARTS)
    tile0 = first // TOKENS
    if SPLIT and ROWS == 1:
        base = 0
        tiles = tl.maximum(tl.cdiv(end, TOKENS) - tile0, 0)
        size = tl.maximum(tl.cdiv(tiles * KV_HEADS, EVEN_ITEMS), MIN_TILES)
        parts = tl.maximum((tiles + size // 2) // size, 1)
        parts = tl.where(item < parts, parts, 0)

    if parts > 0:
        table = page_table + row.to(tl.int64) * COLUMNS
        order = item - base
        if tile0 > 0:
            order = (order + parts - tile0 % parts) % parts
        if (row != guess) | ((tile0 + order) * TOKENS != begin):
            token = (tile0 + order) * TOKENS + column
            ids = page_ids(table, token, token < end, PAGE)
            q_tile = tl.load(q + row.to(tl.int64) * (HEADS * D) + q_at, mask=q_mask, other=0.0)
        begin = (tile0 + order) * TOKENS
        if APPEND:
            new = end > 0
            if SLOTS:
                new = new & (tl.load(slots + row) >= PAGE)
            end -= new.to(tl.int32)  # where the newest token is, if there is one
            page = tl.load(table + tl.maximum(tl.minimum(end, CAPACITY - 1), 0) // PAGE)
        acc, top, total = attend_tiles(
            q_tile, k_pages + offset, v_pages + offset, table, ids, begin, first, end, broken,
            parts * TOKENS, PAGES, PAGE, D, PAGE_STRIDE, SCALE, SOFT_CAP, M, BLOCK_D, TOKENS,
            STAGES,
        )  # fmt: skip
        if APPEND:
            if (order == 0) & new:
                acc, top, total = append_newest(
                    q_tile, k_pages + offset, v_pages + offset, new_k, new_v, page, row, kv_head,
                    end, first, broken, acc, top, total, PAGES, PAGE, KV_HEADS, D, PAGE_STRIDE,
                    SCALE, SOFT_CAP, M, BLOCK_D,
                )  # fmt: skip
        if parts == 1:
            at = row.to(tl.int64) * HEADS + head
            store_result(out, lse, at, real, sinks, acc, top, total, D, BLOCK_D)
        else:
            slot0 = base * KV_HEADS + kv_head
            if arrive(
                part_acc, part_lse, slot0 + order * KV_HEADS, acc, top, total,
                counters + row * KV_HEADS + kv_head, parts, GROUP, D, M, BLOCK_D,
            ):  # fmt: skip
                merge_parts(
                    part_acc, part_lse, slot0, KV_HEADS, parts, 0, out, lse, sink, row, kv_head,
                    1, HEADS, GROUP, GROUP, D, BLOCK_G, BLOCK_D, CHUNK, SINKS,
                )  # fmt: skip
