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

__all__ = ["decode_kernel"]

LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)
# The largest sink in base 2 that still gives a finite difference to any logit.
HUGE = tl.constexpr(3.0e38)


@triton.jit
def _range(row, seq_lens, starts, CAPACITY: tl.constexpr, WINDOW: tl.constexpr):
    """`first, end` of the visible tokens of a row, and whether its length breaks the contract."""
    length = tl.load(seq_lens + row)
    first = tl.maximum(tl.load(starts + row), 0)
    end = tl.minimum(length, CAPACITY)
    if WINDOW > 0:
        first = tl.maximum(first, length - WINDOW)
    return tl.minimum(first, CAPACITY), end, length > CAPACITY


@triton.jit
def _page_ids(table, token, mask, PAGE: tl.constexpr):
    return tl.load(table + token // PAGE, mask=mask, other=0)


@triton.jit
def _q_rows(
    lane,
    GROUP: tl.constexpr,
    BLOCK_G: tl.constexpr,
    PACK: tl.constexpr,
    M: tl.constexpr,
):
    """The query head in each row of the tile of a lane, and whether there is one."""
    m = tl.arange(0, M)
    packed = m // BLOCK_G
    g = m % BLOCK_G
    return (lane * PACK + packed) * GROUP + g, (g < GROUP) & (packed < PACK)


@triton.jit
def _attend_tiles(
    q,
    k_head,
    v_head,
    table,
    ids,
    begin,
    first,
    end,
    broken,
    step,
    PAGES: tl.constexpr,
    PAGE: tl.constexpr,
    D: tl.constexpr,
    PAGE_STRIDE: tl.constexpr,
    SCALE: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    M: tl.constexpr,
    BLOCK_G: tl.constexpr,
    PACK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    DOT_F32: tl.constexpr,
):
    """Online softmax over the tiles at `begin, begin + step, ...`; `ids` are those of the first.

    A tile holds BLOCK_N // PACK tokens of each of PACK KV heads, which lie side by side in a page:

    ```
                  tokens of head 0 | tokens of head 1
    q of head 0   [    logits     ][     -inf       ]     the matrix unit works on 16 rows anyway,
    q of head 1   [     -inf      ][    logits      ]     so the other half costs nothing
    ```
    The page ids of the next tile are loaded while this one is computed and carried in the loop.
    A load of ids inside the same iteration would make K and V indirect loads, which Triton gives
    a fraction of the buffers.
    """
    TOKENS: tl.constexpr = BLOCK_N // PACK
    column = tl.arange(0, BLOCK_N)
    packed = column // TOKENS
    dim = tl.arange(0, BLOCK_D)
    own = (tl.arange(0, M) // BLOCK_G)[:, None] == packed[None, :]
    acc = tl.zeros([M, BLOCK_D], tl.float32)
    top = tl.full([M], -float("inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    for tile in tl.range(begin, end, step, num_stages=STAGES):
        token = tile + column % TOKENS
        live = (token >= first) & (token < end)
        # A page id outside the pool must not be read, and its row comes out as NaN.
        known = (ids >= 0) & (ids < PAGES)
        page = tl.where(known, ids, 0).to(tl.int64)
        at = page * PAGE_STRIDE + (packed * PAGE + token % PAGE) * D
        at = at[:, None] + dim[None, :]
        # What is not visible is never loaded: NaN there cannot reach a sum.
        mask = live[:, None]
        if D < BLOCK_D:
            mask = mask & (dim < D)[None, :]
        k = tl.load(k_head + at, mask=mask, other=0.0)
        v = tl.load(v_head + at, mask=mask, other=0.0)
        after = token + step
        ids = _page_ids(table, after, after < end, PAGE)
        if DOT_F32:
            k = k.to(tl.float32)
            v = v.to(tl.float32)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee")
        if SOFT_CAP > 0:
            # tanh(x) = 1 - 2 / (1 + e^2x), which is right at both ends
            grown = tl.exp2(logits * (2 * SCALE / SOFT_CAP * LOG2E))
            logits = (1.0 - 2.0 / (1.0 + grown)) * (SOFT_CAP * LOG2E)
        else:
            logits = logits * (SCALE * LOG2E)
        bias = tl.where(known & (broken == 0), 0.0, float("nan"))
        logits += tl.where(live, bias, -float("inf"))[None, :]
        if PACK > 1:
            logits = tl.where(own, logits, -float("inf"))
        new_top = tl.maximum(top, tl.max(logits, 1))
        base = tl.where(new_top == -float("inf"), 0.0, new_top)
        weight = tl.exp2(logits - base[:, None])
        decay = tl.exp2(top - base)
        total = total * decay + tl.sum(weight, 1)
        acc = acc * decay[:, None]
        acc = tl.dot(weight.to(v.dtype), v, acc, input_precision="ieee")
        top = new_top
    return acc, top, total


@triton.jit
def _store_result(
    out,
    lse,
    row,
    head,
    real,
    sinks,
    acc,
    top,
    total,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The result of a row, from its sums and its sinks."""
    dim = tl.arange(0, BLOCK_D)
    extra = tl.minimum(sinks * LOG2E, HUGE)
    base = tl.maximum(top, extra)
    base = tl.where(base == -float("inf"), 0.0, base)
    share = tl.exp2(top - base)
    mass = total * share + tl.exp2(extra - base)
    result = acc * (share / tl.where(mass == 0.0, 1.0, mass))[:, None]
    at = row.to(tl.int64) * HEADS + head
    mask = real[:, None] & (dim < D)[None, :]
    tl.store(out + at[:, None] * D + dim[None, :], result.to(out.dtype.element_ty), mask=mask)
    tl.store(lse + at, (top + tl.log2(total)) * LN2, mask=real)


@triton.jit
def _arrive(
    part_acc,
    part_lse,
    slot,
    acc,
    top,
    total,
    counter,
    parts,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    BLOCK_G: tl.constexpr,
    PACK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Store a partial result and count it; true for the program that completes the count."""
    dim = tl.arange(0, BLOCK_D)
    index, real = _q_rows(0, GROUP, BLOCK_G, PACK, M)
    at = slot.to(tl.int64) * (PACK * GROUP) + index
    mask = real[:, None] & (dim < D)[None, :]
    value = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(part_acc + at[:, None] * D + dim[None, :], value, mask=mask)
    tl.store(part_lse + at, top + tl.log2(total), mask=real)
    # All threads have stored; the atomic releases that, and acquires what the others stored.
    tl.debug_barrier()
    arrived = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
    tl.debug_barrier()
    last = arrived == parts - 1
    if last:
        tl.store(counter, 0)
    return last


@triton.jit
def _merge_parts(
    part_acc,
    part_lse,
    slot0,
    slot_step: tl.constexpr,
    parts,
    out,
    lse,
    sink,
    row,
    lane,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_G: tl.constexpr,
    PACK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Merge the partials in slot0, slot0 + slot_step, ... and store the result.

    A chunk of partials is loaded before the first is used: one round trip to L2 for all of them.
    They come from L2 (.cg), because this program's L1 knows nothing of what others stored.
    """
    ROWS_M: tl.constexpr = BLOCK_G * PACK
    WIDTH: tl.constexpr = GROUP * PACK
    dim = tl.arange(0, BLOCK_D)
    index, real = _q_rows(0, GROUP, BLOCK_G, PACK, ROWS_M)
    head, real = _q_rows(lane, GROUP, BLOCK_G, PACK, ROWS_M)
    sinks = tl.load(sink + head, mask=real, other=0.0)
    mask = real[:, None] & (dim < D)[None, :]
    from_acc = part_acc + slot0.to(tl.int64) * (WIDTH * D) + index[:, None] * D + dim[None, :]
    from_lse = part_lse + slot0.to(tl.int64) * WIDTH + index
    top = tl.full([ROWS_M], -float("inf"), tl.float32)
    total = tl.zeros([ROWS_M], tl.float32)
    acc = tl.zeros([ROWS_M, BLOCK_D], tl.float32)
    for at in tl.range(0, parts, CHUNK, num_stages=1):
        some = ()
        sums = ()
        new_top = top
        for c in tl.static_range(CHUNK):
            held = real & (at + c < parts)
            sums = sums + (
                tl.load(
                    from_lse + c * (slot_step * WIDTH),
                    mask=held,
                    other=-float("inf"),
                    cache_modifier=".cg",
                ),
            )
        for c in tl.static_range(CHUNK):
            some = some + (
                tl.load(
                    from_acc + c * (slot_step * WIDTH * D),
                    mask=mask & (at + c < parts),
                    other=0.0,
                    cache_modifier=".cg",
                ),
            )
        for c in tl.static_range(CHUNK):
            new_top = tl.maximum(new_top, sums[c])
        base = tl.where(new_top == -float("inf"), 0.0, new_top)
        decay = tl.exp2(top - base)
        total = total * decay
        acc = acc * decay[:, None]
        for c in tl.static_range(CHUNK):
            weight = tl.exp2(sums[c] - base)
            total += weight
            acc += weight[:, None] * some[c]
        top = new_top
        from_acc += CHUNK * slot_step * WIDTH * D
        from_lse += CHUNK * slot_step * WIDTH
    _store_result(out, lse, row, head, real, sinks, acc, top, total, HEADS, D, BLOCK_D)


@triton.jit
def _find_place(
    item,
    seq_lens,
    starts,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    CAPACITY: tl.constexpr,
    WINDOW: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    EVEN_ITEMS: tl.constexpr,
    RAGGED_ITEMS: tl.constexpr,
    MIN_TILES: tl.constexpr,
):
    """`row, place of the row's first program, programs of the row` for one program of a lane.

    A batch is even if its longest row is at most a quarter longer than the mean. Long programs
    come first, whatever the order of the rows: the short ones fill the gaps at the end.
    """
    rows = tl.arange(0, BLOCK_ROWS)
    length = tl.load(seq_lens + rows, mask=rows < ROWS, other=0)
    first = tl.maximum(tl.load(starts + rows, mask=rows < ROWS, other=0), 0)
    if WINDOW > 0:
        first = tl.maximum(first, length - WINDOW)
    tiles = tl.cdiv(tl.minimum(length, CAPACITY), TOKENS) - first // TOKENS
    tiles = tl.maximum(tiles, 0)
    total = tl.sum(tiles, 0)
    even = tl.max(tiles, 0) <= tl.cdiv(total, ROWS) * 5 // 4
    goal = tl.where(even, EVEN_ITEMS, RAGGED_ITEMS)
    size = tl.maximum(tl.cdiv(total * LANES, goal), MIN_TILES)
    parts = tl.where(rows < ROWS, tl.maximum((tiles + size // 2) // size, 1), 0)
    # The longest programs first: cut rows, then by halves. One scan counts all four kinds.
    kind = (tiles * 2 <= size).to(tl.int64) + (tiles * 4 <= size).to(tl.int64) + 1
    shift = tl.where(parts > 1, 0, kind) * 16
    ends = tl.cumsum(parts.to(tl.int64) << shift, 0)
    every = tl.max(ends, 0)
    longer = tl.where(shift > 0, every & 0xFFFF, 0)
    longer += tl.where(shift > 16, (every >> 16) & 0xFFFF, 0)
    longer += tl.where(shift > 32, (every >> 32) & 0xFFFF, 0)
    ends = (((ends >> shift) & 0xFFFF) + longer).to(tl.int32)
    base = ends - parts
    here = (base <= item) & (item < ends)
    # One sum instead of three: row, base and parts of the only row that is here.
    found = rows.to(tl.int64) | (base.to(tl.int64) << 16) | (parts.to(tl.int64) << 32)
    found = tl.sum(tl.where(here, found, 0), 0)
    return (
        (found & 0xFFFF).to(tl.int32),
        ((found >> 16) & 0xFFFF).to(tl.int32),
        (found >> 32).to(tl.int32),
    )


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
    out,
    lse,
    part_acc,
    part_lse,
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
    PACK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    GUESS: tl.constexpr,
    EVEN_ITEMS: tl.constexpr,
    RAGGED_ITEMS: tl.constexpr,
    MIN_TILES: tl.constexpr,
    SPLIT: tl.constexpr,
    DOT_F32: tl.constexpr,
):
    """One call of one layer.

    Pointers: q, out `[ROWS, Hq, D]`; pages `[L, PAGES, KV_HEADS, PAGE, D]`; layer `[]`;
    page_table `[ROWS, COLUMNS]`; seq_lens, starts `[ROWS]`; sink `[Hq]`; counters, one for each
    row and lane, zeros before and after; lse `[ROWS, Hq]`; part_acc `[slots, PACK * GROUP, D]`
    and part_lse `[slots, PACK * GROUP]`, anything before and after. A lane is PACK KV heads.
    """
    HEADS: tl.constexpr = KV_HEADS * GROUP
    LANES: tl.constexpr = KV_HEADS // PACK
    CAPACITY: tl.constexpr = COLUMNS * PAGE
    HEAD_STRIDE: tl.constexpr = PAGE * D
    PAGE_STRIDE: tl.constexpr = KV_HEADS * HEAD_STRIDE
    TOKENS: tl.constexpr = BLOCK_N // PACK
    lane = tl.program_id(0) % LANES
    item = tl.program_id(0) // LANES
    column = tl.arange(0, BLOCK_N) % TOKENS
    dim = tl.arange(0, BLOCK_D)

    guess = tl.minimum(item // GUESS, ROWS - 1)
    begin = (item % GUESS) * TOKENS
    ids = _page_ids(
        page_table + guess.to(tl.int64) * COLUMNS, begin + column, begin + column < CAPACITY, PAGE
    )
    offset = tl.load(layer).to(tl.int64) * (PAGES * PAGE_STRIDE) + lane * (PACK * HEAD_STRIDE)
    head, real = _q_rows(lane, GROUP, BLOCK_G, PACK, M)
    q_mask = real[:, None] & (dim < D)[None, :]
    q_at = head[:, None] * D + dim[None, :]
    q_tile = tl.load(q + guess.to(tl.int64) * (HEADS * D) + q_at, mask=q_mask, other=0.0)
    sinks = tl.load(sink + head, mask=real, other=0.0)
    row = guess
    base = item
    parts = 1
    if SPLIT and ROWS > 1:
        row, base, parts = _find_place(
            item, seq_lens, starts, ROWS, LANES, CAPACITY, WINDOW, TOKENS, BLOCK_ROWS, EVEN_ITEMS,
            RAGGED_ITEMS, MIN_TILES,
        )  # fmt: skip
    first, end, broken = _range(row, seq_lens, starts, CAPACITY, WINDOW)
    tile0 = first // TOKENS
    if SPLIT and ROWS == 1:
        base = 0
        tiles = tl.maximum(tl.cdiv(end, TOKENS) - tile0, 0)
        size = tl.maximum(tl.cdiv(tiles * LANES, EVEN_ITEMS), MIN_TILES)
        parts = tl.maximum((tiles + size // 2) // size, 1)
        parts = tl.where(item < parts, parts, 0)

    if parts > 0:
        table = page_table + row.to(tl.int64) * COLUMNS
        order = item - base
        if tile0 > 0:
            order = (order + parts - tile0 % parts) % parts
        if (row != guess) | ((tile0 + order) * TOKENS != begin):
            token = (tile0 + order) * TOKENS + column
            ids = _page_ids(table, token, token < end, PAGE)
            q_tile = tl.load(q + row.to(tl.int64) * (HEADS * D) + q_at, mask=q_mask, other=0.0)
        begin = (tile0 + order) * TOKENS
        if DOT_F32:
            q_tile = q_tile.to(tl.float32)
        acc, top, total = _attend_tiles(
            q_tile, k_pages + offset, v_pages + offset, table, ids, begin, first, end, broken,
            parts * TOKENS, PAGES, PAGE, D, PAGE_STRIDE, SCALE, SOFT_CAP, M, BLOCK_G, PACK,
            BLOCK_D, BLOCK_N, STAGES, DOT_F32,
        )  # fmt: skip
        if parts == 1:
            _store_result(out, lse, row, head, real, sinks, acc, top, total, HEADS, D, BLOCK_D)
        else:
            slot0 = base * LANES + lane
            if _arrive(
                part_acc, part_lse, slot0 + order * LANES, acc, top, total,
                counters + row * LANES + lane, parts, GROUP, D, M, BLOCK_G, PACK, BLOCK_D,
            ):  # fmt: skip
                _merge_parts(
                    part_acc, part_lse, slot0, LANES, parts, out, lse, sink, row, lane, HEADS,
                    GROUP, D, BLOCK_G, PACK, BLOCK_D, CHUNK,
                )  # fmt: skip
