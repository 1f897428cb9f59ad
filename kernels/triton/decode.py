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
from .work import place_of_row, visible_of_row

__all__ = ["decode_kernel"]


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
    k_scales,
    v_scales,
    new_k,
    new_v,
    slots,
    out,
    lse,
    part_acc,
    part_lse,
    k_written,
    v_written,
    k_scales_written,
    v_scales_written,
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
    SCALED: tl.constexpr,
    LARGEST: tl.constexpr,
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

    With SCALED, pages are of 8 bits, whose largest number is LARGEST, and k_scales and v_scales
    `[L, PAGES, KV_HEADS, PAGE]` are what their numbers are multiplied by.
    """
    HEADS: tl.constexpr = KV_HEADS * GROUP
    CAPACITY: tl.constexpr = COLUMNS * PAGE
    PAGE_STRIDE: tl.constexpr = KV_HEADS * PAGE * D
    kv_head = tl.program_id(0) % KV_HEADS
    item = tl.program_id(0) // KV_HEADS
    column = tl.arange(0, TOKENS)
    dim = tl.arange(0, BLOCK_D)

    guess = tl.minimum(item // GUESS, ROWS - 1)
    begin = (item % GUESS) * TOKENS
    ids = page_ids(
        page_table + guess.to(tl.int64) * COLUMNS, begin + column, begin + column < CAPACITY, PAGE
    )
    place = (tl.load(layer).to(tl.int64) * (PAGES * KV_HEADS) + kv_head) * PAGE
    offset = place * D
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
        row, base, parts = place_of_row(
            item, seq_lens, starts, ROWS, KV_HEADS, CAPACITY, WINDOW, TOKENS, BLOCK_ROWS,
            EVEN_ITEMS, RAGGED_ITEMS, MIN_TILES, EIGHTHS, LEAST, PROCESSORS, STARTS,
        )  # fmt: skip
    first, end, broken = visible_of_row(row, seq_lens, starts, CAPACITY, WINDOW, STARTS)
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
            q_tile, k_pages + offset, v_pages + offset, k_scales + place, v_scales + place, table,
            ids, begin, first, end, broken, parts * TOKENS, PAGES, PAGE, D, PAGE_STRIDE, SCALE,
            SOFT_CAP, M, BLOCK_D, TOKENS, STAGES, SCALED,
        )  # fmt: skip
        if APPEND:
            if (order == 0) & new:
                acc, top, total = append_newest(
                    q_tile, k_pages + offset, v_pages + offset, k_scales + place, v_scales + place,
                    new_k, new_v, page, row, kv_head, end, first, broken, acc, top, total, PAGES,
                    PAGE, KV_HEADS, D, PAGE_STRIDE, SCALE, SOFT_CAP, M, BLOCK_D, SCALED, LARGEST,
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
