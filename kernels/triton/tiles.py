"""The work of one program: online softmax over its tiles, and the newest token from registers."""

import triton
import triton.language as tl

from .. import record
from .numbers import (
    ROOM,
    add_values,
    begin_sums,
    end_sums,
    keys_times,
    numbers,
    powers,
    quantised,
    query_parts,
    scales_of,
)

__all__ = ["LOG2E", "append_newest", "attend_tiles", "page_ids", "q_rows", "scaled"]

LOG2E = tl.constexpr(record.LOG2E)


@triton.jit
def page_ids(table, token, mask, PAGE: tl.constexpr):
    return tl.load(table + token // PAGE, mask=mask, other=0)


@triton.jit
def q_rows(kv_head, GROUP: tl.constexpr, M: tl.constexpr):
    """The query head in each row of the tile of a KV head, and whether there is one."""
    m = tl.arange(0, M)
    return kv_head * GROUP + m, m < GROUP


@triton.jit
def scaled(products, SCALE: tl.constexpr, SOFT_CAP: tl.constexpr):
    """Logits in base 2 from q.k."""
    if SOFT_CAP > 0:
        # tanh(x) = 1 - 2 / (1 + e^2x), which is right at both ends
        grown = tl.exp2(products * (2 * SCALE / SOFT_CAP * LOG2E))
        return (1.0 - 2.0 / (1.0 + grown)) * (SOFT_CAP * LOG2E)
    else:
        return products * (SCALE * LOG2E)


@triton.jit
def attend_tiles(
    q,
    k_head,
    v_head,
    k_scales,
    v_scales,
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
    BLOCK_D: tl.constexpr,
    TOKENS: tl.constexpr,
    STAGES: tl.constexpr,
    SCALED: tl.constexpr,
):
    """Online softmax over the tiles at `begin, begin + step, ...`; `ids` are those of the first.

    The page ids of the next tile are loaded while this one is computed and carried in the loop.
    A load of ids inside the same iteration would make K and V indirect loads, which Triton gives
    a fraction of the buffers.
    """
    TYPE: tl.constexpr = k_head.dtype.element_ty
    column = tl.arange(0, TOKENS)
    q, of_q = query_parts(q, M, BLOCK_D, SCALE, SOFT_CAP, SCALED)
    WIDE: tl.constexpr = q[0].dtype if SCALED else q.dtype
    sums = begin_sums(M, BLOCK_D, SCALED)
    top = tl.full([M], -float("inf"), tl.float32)
    if SCALED:
        total = tl.zeros([M, TOKENS], tl.float32)  # summed at the end: warps need not meet for it
    else:
        total = tl.zeros([M], tl.float32)
    for tile in tl.range(begin, end, step, num_stages=STAGES):
        token = tile + column
        live = (token >= first) & (token < end)
        # A page id outside the pool must not be read, and its row comes out as NaN.
        known = (ids >= 0) & (ids < PAGES)
        page = tl.where(known, ids, 0).to(tl.int64)
        slot = page * (PAGE_STRIDE // D) + token % PAGE
        # What is not visible is never loaded: NaN there cannot reach a sum.
        k = numbers(k_head, slot, live, True, D, BLOCK_D, SCALED)
        v = numbers(v_head, slot, live, True, D, BLOCK_D, SCALED)
        if SCALED:
            of_k = scales_of(k_scales, slot, live)
            of_v = scales_of(v_scales, slot, live)
        after = token + step
        ids = page_ids(table, after, after < end, PAGE)
        products = keys_times(q, k, TYPE, SCALED)
        if SCALED:
            products = products * of_q[:, None] * of_k[None, :]
        logits = products
        if SOFT_CAP > 0 or not SCALED:
            logits = scaled(products, SCALE, SOFT_CAP)
        bias = tl.where(known & (broken == 0), 0.0, float("nan"))
        if SCALED:
            _, inverse, exponent = powers(of_v)
            bias += exponent
        logits += tl.where(live, bias, -float("inf"))[None, :]
        highest = tl.max(logits, 1)
        if SCALED:
            highest -= ROOM
        new_top = tl.maximum(top, highest)
        base = tl.where(new_top == -float("inf"), 0.0, new_top)
        weight = tl.exp2(logits - base[:, None])
        decay = tl.exp2(top - base)
        if SCALED:
            total = total * decay[:, None] + weight * inverse[None, :]
            weight = weight * (of_v * inverse)[None, :]
        else:
            total = total * decay + tl.sum(weight, 1)
        sums = add_values(sums, decay, weight, v, TYPE, WIDE, SCALED)
        top = new_top
    if SCALED:
        total = tl.sum(total, 1)
    return end_sums(sums, M, BLOCK_D, SCALED), top, total


@triton.jit
def append_newest(
    q,
    k_head,
    v_head,
    k_scales,
    v_scales,
    new_k,
    new_v,
    page,
    row,
    kv_head,
    newest,
    first,
    broken,
    acc,
    top,
    total,
    PAGES: tl.constexpr,
    PAGE: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    PAGE_STRIDE: tl.constexpr,
    SCALE: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SCALED: tl.constexpr,
    LARGEST: tl.constexpr,
):
    """Write the newest token into its page and add it to the sums, from registers.

    Nobody reads the slot in this launch, so nobody has to wait for the write.
    """
    dim = tl.arange(0, BLOCK_D)
    at = (row.to(tl.int64) * KV_HEADS + kv_head) * D + dim
    k = tl.load(new_k + at, mask=dim < D, other=0.0)
    v = tl.load(new_v + at, mask=dim < D, other=0.0)
    known = (page >= 0) & (page < PAGES) & (broken == 0)
    page = tl.where(known, page, 0).to(tl.int64)
    at = page * PAGE_STRIDE + newest % PAGE * D + dim
    if SCALED:
        slot = page * (PAGE_STRIDE // D) + newest % PAGE
        TYPE: tl.constexpr = k_head.dtype.element_ty
        k_numbers, k_scale = quantised(k[None, :], k_scales, False, LARGEST, TYPE)
        v_numbers, v_scale = quantised(v[None, :], v_scales, False, LARGEST, TYPE)
        k = tl.reshape(k_numbers, [BLOCK_D])
        v = tl.reshape(v_numbers, [BLOCK_D])
        of_k = tl.sum(k_scale, 0)
        of_v = tl.sum(v_scale, 0)
        tl.store(k_scales + slot, of_k, mask=known)
        tl.store(v_scales + slot, of_v, mask=known)
    tl.store(k_head + at, k, mask=(dim < D) & known)
    tl.store(v_head + at, v, mask=(dim < D) & known)
    products = tl.sum(q.to(tl.float32) * k.to(tl.float32)[None, :], 1)
    v = v.to(tl.float32)
    if SCALED:
        products = products * of_k
        v = v * of_v
    logits = scaled(products, SCALE, SOFT_CAP)
    logits = tl.where(newest >= first, tl.where(known, logits, float("nan")), -float("inf"))
    new_top = tl.maximum(top, logits)
    base = tl.where(new_top == -float("inf"), 0.0, new_top)
    weight = tl.exp2(logits - base)
    decay = tl.exp2(top - base)
    total = total * decay + weight
    acc = acc * decay[:, None] + weight[:, None] * v[None, :]
    return acc, new_top, total
