"""The work of one program: online softmax over its tiles, and the newest token from registers."""

import triton
import triton.language as tl

from .. import eight_bits, record

__all__ = ["LOG2E", "append_newest", "attend_tiles", "page_ids", "q_rows", "quantised", "scaled"]

LOG2E = tl.constexpr(record.LOG2E)
LEAST = tl.constexpr(eight_bits.LEAST)


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
def quantised(x, fixed, FIXED: tl.constexpr, LARGEST: tl.constexpr, TYPE: tl.constexpr):
    """Each row of x `[n, D]` as numbers of 8 bits, and its scale: to the last bit what
    `eight_bits.quantise` says. With FIXED, pointers `fixed [n]` have the scales."""
    x = x.to(tl.float32)
    top = tl.maximum(tl.max(tl.abs(x), 1), LEAST)
    # A maximum leaves NaN out.
    top = tl.where(tl.max((x != x).to(tl.int32), 1) > 0, float("nan"), top)
    if FIXED:
        scale = tl.where(top < float("inf"), tl.load(fixed), float("nan"))
    else:
        scale = top * (1 / LARGEST)
    parts = x * tl.div_rn(1.0, scale)[:, None]
    parts = tl.where(parts == parts, tl.minimum(tl.maximum(parts, -LARGEST), LARGEST), 0.0)
    if TYPE == tl.int8:
        parts = (parts + 12582912.0) - 12582912.0  # 1.5 * 2**23: to the nearest, halves to even
    return parts.to(TYPE), scale


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

    With SCALED, numbers are multiplied as they are, in the dtype of q, and what they are multiplied
    by is taken from logits and weights.

    The page ids of the next tile are loaded while this one is computed and carried in the loop.
    A load of ids inside the same iteration would make K and V indirect loads, which Triton gives
    a fraction of the buffers.
    """
    column = tl.arange(0, TOKENS)
    dim = tl.arange(0, BLOCK_D)
    acc = tl.zeros([M, BLOCK_D], tl.float32)
    top = tl.full([M], -float("inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    for tile in tl.range(begin, end, step, num_stages=STAGES):
        token = tile + column
        live = (token >= first) & (token < end)
        # A page id outside the pool must not be read, and its row comes out as NaN.
        known = (ids >= 0) & (ids < PAGES)
        page = tl.where(known, ids, 0).to(tl.int64)
        slot = page * (PAGE_STRIDE // D) + token % PAGE
        at = slot[:, None] * D + dim[None, :]
        # What is not visible is never loaded: NaN there cannot reach a sum.
        mask = live[:, None]
        if D < BLOCK_D:
            mask = mask & (dim < D)[None, :]
        k = tl.load(k_head + at, mask=mask, other=0.0)
        v = tl.load(v_head + at, mask=mask, other=0.0)
        if SCALED:
            of_k = tl.load(k_scales + slot, mask=live, other=0.0)
            of_v = tl.load(v_scales + slot, mask=live, other=0.0)
            k = k.to(tl.float32).to(q.dtype)  # not at once: sm_89 has no way
            v = v.to(tl.float32).to(q.dtype)
        after = token + step
        ids = page_ids(table, after, after < end, PAGE)
        products = tl.dot(q, tl.trans(k), input_precision="ieee")
        if SCALED:
            products = products * of_k[None, :]
        logits = scaled(products, SCALE, SOFT_CAP)
        bias = tl.where(known & (broken == 0), 0.0, float("nan"))
        logits += tl.where(live, bias, -float("inf"))[None, :]
        new_top = tl.maximum(top, tl.max(logits, 1))
        base = tl.where(new_top == -float("inf"), 0.0, new_top)
        weight = tl.exp2(logits - base[:, None])
        decay = tl.exp2(top - base)
        total = total * decay + tl.sum(weight, 1)
        acc = acc * decay[:, None]
        if SCALED:
            weight = weight * of_v[None, :]
        acc = tl.dot(weight.to(v.dtype), v, acc, input_precision="ieee")
        top = new_top
    return acc, top, total


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
    slot = tl.where(known, page, 0).to(tl.int64) * (PAGE_STRIDE // D) + newest % PAGE
    if SCALED:
        TYPE: tl.constexpr = k_head.dtype.element_ty
        k_numbers, k_scale = quantised(k[None, :], k_scales, False, LARGEST, TYPE)
        v_numbers, v_scale = quantised(v[None, :], v_scales, False, LARGEST, TYPE)
        k = tl.reshape(k_numbers, [BLOCK_D])
        v = tl.reshape(v_numbers, [BLOCK_D])
        of_k = tl.sum(k_scale, 0)
        of_v = tl.sum(v_scale, 0)
        tl.store(k_scales + slot, of_k, mask=known)
        tl.store(v_scales + slot, of_v, mask=known)
    tl.store(k_head + slot * D + dim, k, mask=(dim < D) & known)
    tl.store(v_head + slot * D + dim, v, mask=(dim < D) & known)
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
