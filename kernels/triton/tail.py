"""The raw kernel for T > 1: tiles of queries against the pages of their row, split where it pays.

```
row b      [........ cached ........|0 1 2 3 4 5 6 7]    T = 8 new tokens, G = 4 heads a KV head
queries    t0g0 t0g1 t0g2 t0g3 t1g0 ... t7g3             T * G rows of a matrix, M to a tile
tile 1     [=========================\\]                  causal: masked at its end
```

All query heads of a KV head share a tile, so its keys and values are read once for them, and a few
tokens of a row (speculative drafts) fill a tile as a chunk of a prompt fills many. Tiles are what
the T = 1 kernel calls rows: every program reads the lengths of the batch, counts the work of all
tiles and finds its own place, the longest first. A tile with more than its share of the work is cut
along its keys, and the last program to arrive merges the parts in their order. The grid depends on
shapes alone. A tile of nothing but padding, in front of the row or of its own queries, reads
nothing and is no work.

The blocks of keys of a tile are of three kinds: those that all its queries see, which take no mask;
those that some see, at either end; and with a `tail_mask` those that hold new tokens of the row.
"""

import triton
import triton.language as tl

from .merge import arrive, merge_parts, store_result
from .numbers import (
    ROOM,
    add_values,
    begin_sums,
    end_sums,
    keys_times,
    numbers,
    powers,
    query_parts,
    scales_of,
)
from .tiles import LOG2E, page_ids, scaled
from .work import padding_of, place_of_tile, visible_of_tile

__all__ = ["tail_kernel"]


@triton.jit
def _attend_blocks(
    begin,
    stop,
    step,
    q,
    of_q,
    k_head,
    v_head,
    k_scales,
    v_scales,
    table,
    ids,
    first,
    last,
    low,
    end,
    sums,
    top,
    total,
    wrong,
    tree,
    MASKED: tl.constexpr,
    TREE: tl.constexpr,
    LOW: tl.constexpr,
    PAGES: tl.constexpr,
    PAGE: tl.constexpr,
    D: tl.constexpr,
    PAGE_STRIDE: tl.constexpr,
    SCALE: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TOKENS: tl.constexpr,
    STAGES: tl.constexpr,
    SCALED: tl.constexpr,
):
    """Online softmax over the blocks of keys at `begin, begin + step, ...` below `stop`.

    Query m sees the tokens `first[m] .. last[m]`, with TREE those of them that `tree` lets it see;
    without MASKED all of a block's tokens, which leaves only products and exponentials. With LOW
    there may be tokens in front of `low`, the least `first`. Nobody may see those, and a weight of
    0 does not hide a NaN, so they are not read. Page ids are carried as in the T = 1 kernel.
    Returns where the next block begins, its page ids, the sums and which ids lay outside the pool.
    """
    TYPE: tl.constexpr = k_head.dtype.element_ty
    WIDE: tl.constexpr = q[0].dtype if SCALED else q.dtype
    column = tl.arange(0, TOKENS)
    # The scale is folded into the exponent, one multiplication less a logit, where it keeps order.
    FOLDED: tl.constexpr = SOFT_CAP == 0 and SCALE > 0 and not SCALED
    FACTOR: tl.constexpr = SCALE * LOG2E if FOLDED else 1.0
    for block in tl.range(begin, stop, step, num_stages=STAGES):
        token = block + column
        known = (ids >= 0) & (ids < PAGES)
        page = tl.where(known, ids, 0).to(tl.int64)
        slot = page * (PAGE_STRIDE // D) + token % PAGE
        mask = token >= 0
        if MASKED:
            mask = token < end
            if LOW:
                mask = mask & (token >= low)
            if TREE:
                live = (token[None, :] >= first[:, None]) & (token[None, :] <= last[:, None])
                live = live & _branch(token, end, tree, WINDOW)
                mask = mask & (tl.max(live.to(tl.int32), 0) > 0)
            wrong = wrong | ((token < end) & (known == 0)).to(tl.int32)
        else:
            wrong = wrong | (known == 0).to(tl.int32)
        k = numbers(k_head, slot, mask, MASKED, D, BLOCK_D, SCALED)
        v = numbers(v_head, slot, mask, MASKED, D, BLOCK_D, SCALED)
        if SCALED:
            of_k = scales_of(k_scales, slot, mask)
            of_v = scales_of(v_scales, slot, mask)
        after = token + step
        ids = page_ids(table, after, after < end, PAGE)
        logits = keys_times(q, k, TYPE, SCALED)
        if SCALED:
            logits = logits * of_q[:, None] * of_k[None, :]
        if SOFT_CAP > 0 or not (FOLDED or SCALED):
            logits = scaled(logits, SCALE, SOFT_CAP)
        if SCALED:
            _, inverse, exponent = powers(of_v)
            logits += exponent[None, :]
        if MASKED:
            if not TREE:
                live = (token[None, :] >= first[:, None]) & (token[None, :] <= last[:, None])
            logits = tl.where(live, logits, -float("inf"))
        highest = tl.max(logits, 1) * FACTOR
        if SCALED:
            highest -= ROOM
        new_top = tl.maximum(top, highest)
        base = new_top
        if MASKED:
            base = tl.where(new_top == -float("inf"), 0.0, new_top)
        weight = tl.exp2(logits * FACTOR - base[:, None])
        decay = tl.exp2(top - base)
        if SCALED:
            total = total * decay + tl.sum(weight * inverse[None, :], 1)
            weight = weight * (of_v * inverse)[None, :]
        else:
            total = total * decay + tl.sum(weight, 1)
        sums = add_values(sums, decay, weight, v, TYPE, WIDE, SCALED)
        top = new_top
    begin += tl.maximum(tl.cdiv(stop - begin, step), 0) * step
    return begin, ids, sums, top, total, wrong


@triton.jit
def _branch(token, end, tree, WINDOW: tl.constexpr):
    """Which of these tokens each query sees, as far as its row's `tail_mask` says.

    `tree` is, for each query, where its line of the mask begins, where it stands and whether it is
    its row's own; and for the row where the positions of its queries lie, which of its tokens is
    the first of the T, and how many of those are padding.
    """
    line, stand, own, stands, tail, padding = tree
    new = token - tail
    fresh = (new >= padding) & (token < end)
    seen = own[:, None] & fresh[None, :]
    seen = seen & (tl.load(line[:, None] + new[None, :], mask=seen, other=0) != 0)
    if WINDOW > 0:
        theirs = tl.load(stands + new, mask=fresh, other=0)
        seen = seen & (stand[:, None] - theirs[None, :] < WINDOW)
    return seen | (new < padding)[None, :]


@triton.jit
def _heads(row, query, kv_head, T: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr):
    """Where the query heads of queries of a row are among all, `[ROWS, T, HEADS]`."""
    return (row.to(tl.int64) * T + query // GROUP) * HEADS + kv_head * GROUP + query % GROUP


@triton.jit
def _any_outside(table, length, PAGES: tl.constexpr, PAGE: tl.constexpr, CHUNK: tl.constexpr):
    """Whether a row's table names a page outside the pool, of those that its length reaches."""
    column = tl.arange(0, CHUNK)
    wrong = tl.zeros([CHUNK], tl.int32)
    used = tl.cdiv(length, PAGE)
    for at in tl.range(0, used, CHUNK, num_stages=1):
        ids = tl.load(table + at + column, mask=at + column < used, other=0)
        wrong = wrong | ((ids < 0) | (ids >= PAGES)).to(tl.int32)
    return tl.max(wrong, 0) > 0


@triton.jit
def tail_kernel(
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
    query_lens,
    tail_mask,
    positions,
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
    T: tl.constexpr,
    D: tl.constexpr,
    SCALE: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    WINDOW: tl.constexpr,
    M: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TOKENS: tl.constexpr,
    STAGES: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_ITEMS: tl.constexpr,
    AIM: tl.constexpr,
    SPLIT: tl.constexpr,
    SETS: tl.constexpr,
    STARTS: tl.constexpr,
    SINKS: tl.constexpr,
    QUERY_LENS: tl.constexpr,
    TREE: tl.constexpr,
    REGISTERS: tl.constexpr,
    SCALED: tl.constexpr,
    LARGEST: tl.constexpr,
):
    """One call of one layer over pages that hold the new tokens already.

    Pointers: q, out `[ROWS, T, Hq, D]`; pages `[L, PAGES, KV_HEADS, PAGE, D]`; layer `[]`;
    page_table `[ROWS, COLUMNS]`; seq_lens, starts, query_lens `[ROWS]`; sink `[Hq]`; counters, one
    for each row, tile and KV head, zeros before and after; tail_mask `[ROWS, T, T]`, and positions
    `[ROWS, T]` for its windows; lse `[ROWS, T, Hq]`; part_acc `[slots, M, D]` and
    part_lse `[slots, M]`, anything before and after. With SCALED, pages are of 8 bits, and k_scales
    and v_scales `[L, PAGES, KV_HEADS, PAGE]`. REGISTERS is for `launch.py` alone.

    With SETS > 1 the blocks of every tile are dealt out to so many programs, and nobody merges
    them: out and lse have an axis SETS in front. Where lse is -inf, out may be anything.
    """
    HEADS: tl.constexpr = KV_HEADS * GROUP
    CAPACITY: tl.constexpr = COLUMNS * PAGE
    LOW: tl.constexpr = WINDOW > 0 or STARTS
    PAGE_STRIDE: tl.constexpr = KV_HEADS * PAGE * D
    BLOCK_M: tl.constexpr = 16  # rows of a tile that are merged at a time
    kv_head = tl.program_id(0) % KV_HEADS
    place = tl.program_id(0) // KV_HEADS
    item = place
    base = place
    parts = 1
    if SETS > 1:
        item = place // SETS
        base = item * SETS
    elif SPLIT:
        item, base, parts = place_of_tile(
            place, seq_lens, starts, query_lens, ROWS, TILES, T, GROUP, M, KV_HEADS, CAPACITY,
            WINDOW, TOKENS, BLOCK_ITEMS, AIM, STARTS, QUERY_LENS, TREE,
        )  # fmt: skip
    sets = parts  # of the blocks of the tile, and which of them is ours
    mine = place - base
    busy = parts > 0
    if SETS > 1:  # most parts of a plan are empty: their programs say so, and have ended
        sets = SETS
        held = tl.load(seq_lens + item % ROWS)
        busy = mine * TOKENS < held
        if mine * TOKENS >= held:
            query = (TILES - 1 - item // ROWS) * M + tl.arange(0, M)
            at = _heads(item % ROWS, query, kv_head, T, GROUP, HEADS)
            at += mine.to(tl.int64) * (ROWS * T * HEADS)
            nothing = tl.full([M], -float("inf"), tl.float32)
            tl.store(lse + at, nothing, mask=query < T * GROUP)
    if busy:
        row = item % ROWS
        tile = TILES - 1 - item // ROWS
        length = tl.load(seq_lens + row)
        length = tl.minimum(tl.maximum(length, 0), CAPACITY + 1)
        start = row * 0
        if STARTS:
            start = tl.minimum(tl.maximum(tl.load(starts + row), 0), CAPACITY)
        padding = row * 0
        if QUERY_LENS:
            padding = padding_of(query_lens + row, row < ROWS, T)
        begin, end, lowest, highest = visible_of_tile(
            tile, length, start, padding, T, GROUP, M, WINDOW, CAPACITY, QUERY_LENS, TREE
        )
        table = page_table + row.to(tl.int64) * COLUMNS
        broken = length > CAPACITY
        if TILES > 1:  # a single tile looks at every page that its row sees
            held = tl.minimum(length, CAPACITY)
            if QUERY_LENS:
                held = tl.where(end > 0, held, 0)
            broken = broken | _any_outside(table, held, PAGES, PAGE, 512)

        query = tile * M + tl.arange(0, M)
        position = length - T + query // GROUP
        real = query < T * GROUP
        own = real
        if QUERY_LENS:
            own = real & (query // GROUP >= padding)
        last = tl.where(own, position, -1)
        first = last * 0 + start
        clear = start  # all queries see the tokens from here to `lowest`
        stand = position
        if WINDOW > 0:
            if TREE:
                stands = positions + row.to(tl.int64) * T
                stand = tl.load(stands + query // GROUP, mask=own, other=0)
            first = tl.maximum(first, stand - WINDOW + 1)
            clear = tl.maximum(clear, highest - WINDOW + 1)
        dim = tl.arange(0, BLOCK_D)
        at = _heads(row, query, kv_head, T, GROUP, HEADS)
        q_mask = own[:, None] & (dim < D)[None, :]
        q_tile = tl.load(q + at[:, None] * D + dim[None, :], mask=q_mask, other=0.0)

        step = sets * TOKENS
        low = begin
        begin = (begin // TOKENS + mine) * TOKENS
        token = begin + tl.arange(0, TOKENS)
        ids = page_ids(table, token, token < end, PAGE)
        head = (tl.load(layer).to(tl.int64) * (PAGES * KV_HEADS) + kv_head) * PAGE
        k_head = k_pages + head * D
        v_head = v_pages + head * D
        k_scales += head
        v_scales += head
        q_parts, of_q = query_parts(q_tile, M, BLOCK_D, SCALE, SOFT_CAP, SCALED)
        sums = begin_sums(M, BLOCK_D, SCALED)
        top = tl.full([M], -float("inf"), tl.float32)
        total = tl.zeros([M], tl.float32)
        wrong = tl.zeros([TOKENS], tl.int32)
        tree = (tail_mask, stand, own, positions, length, padding)
        fresh = end  # from here on blocks hold new tokens of the row
        if TREE:
            tail = length - T
            fresh = tl.maximum(tail + padding, 0) // TOKENS * TOKENS
            line = tail_mask + (row.to(tl.int64) * T + query // GROUP) * T
            tree = (line, stand, own, positions + row.to(tl.int64) * T, tail, padding)
        if LOW:
            stop = tl.minimum(tl.cdiv(clear, TOKENS) * TOKENS, end)
            if TREE:
                stop = tl.minimum(stop, fresh)
            begin, ids, sums, top, total, wrong = _attend_blocks(
                begin, stop, step, q_parts, of_q, k_head, v_head, k_scales, v_scales, table, ids,
                first, last, low, end, sums, top, total, wrong, tree, True, False, LOW, PAGES, PAGE,
                D, PAGE_STRIDE, SCALE, SOFT_CAP, WINDOW, BLOCK_D, TOKENS, STAGES, SCALED,
            )  # fmt: skip
        stop = tl.minimum(tl.maximum(lowest + 1, 0), end) // TOKENS * TOKENS
        if TREE:
            stop = tl.minimum(stop, fresh)
        begin, ids, sums, top, total, wrong = _attend_blocks(
            begin, stop, step, q_parts, of_q, k_head, v_head, k_scales, v_scales, table, ids, first,
            last, low, end, sums, top, total, wrong, tree, False, False, LOW, PAGES, PAGE, D,
            PAGE_STRIDE, SCALE, SOFT_CAP, WINDOW, BLOCK_D, TOKENS, STAGES, SCALED,
        )  # fmt: skip
        # Those with new tokens are few, and their mask decides what is read: nothing to pipeline.
        LAST_STAGES: tl.constexpr = 1 if TREE else STAGES
        begin, ids, sums, top, total, wrong = _attend_blocks(
            begin, end, step, q_parts, of_q, k_head, v_head, k_scales, v_scales, table, ids, first,
            last, low, end, sums, top, total, wrong, tree, True, TREE, LOW, PAGES, PAGE, D,
            PAGE_STRIDE, SCALE, SOFT_CAP, WINDOW, BLOCK_D, TOKENS, LAST_STAGES, SCALED,
        )  # fmt: skip
        acc = end_sums(sums, M, BLOCK_D, SCALED)
        broken = broken | (tl.max(wrong, 0) > 0)
        total = tl.where(broken, float("nan"), total)
        if QUERY_LENS:  # padding in a tile beside own queries; it has seen what all of these see
            acc = tl.where(own[:, None], acc, 0.0)
            top = tl.where(own, top, -float("inf"))
            total = tl.where(own, total, 0.0)

        if parts == 1:
            sinks = tl.full([M], -float("inf"), tl.float32)
            if SINKS:
                sinks = tl.load(sink + kv_head * GROUP + query % GROUP, mask=real, other=0.0)
            if SETS > 1:
                at += mine.to(tl.int64) * (ROWS * T * HEADS)
            store_result(out, lse, at, real, sinks, acc, top, total, D, BLOCK_D)
        else:
            slot0 = base * KV_HEADS + kv_head
            if arrive(
                part_acc, part_lse, slot0 + mine * KV_HEADS, acc, top, total,
                counters + item * KV_HEADS + kv_head, parts, M, D, M, BLOCK_D,
            ):  # fmt: skip
                for some in tl.range(0, M, BLOCK_M, num_stages=1):
                    merge_parts(
                        part_acc, part_lse, slot0, KV_HEADS, parts, some, out, lse, sink, row,
                        kv_head, T, HEADS, GROUP, M, D, BLOCK_M, BLOCK_D, CHUNK, SINKS, tile,
                    )  # fmt: skip
