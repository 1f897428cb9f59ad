"""From the sums of programs to results: store, count arrivals, merge in the order of the tokens."""

import triton
import triton.language as tl

from .. import record
from .tiles import LOG2E, q_rows

__all__ = ["arrive", "merge_parts", "store_result"]

LN2, HUGE = tl.constexpr(record.LN2), tl.constexpr(record.HUGE)


@triton.jit
def store_result(
    out,
    lse,
    at,
    real,
    sinks,
    acc,
    top,
    total,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The results of some queries, from their sums and sinks; `at` counts query heads."""
    dim = tl.arange(0, BLOCK_D)
    extra = tl.minimum(sinks * LOG2E, HUGE)
    base = tl.maximum(top, extra)
    base = tl.where(base == -float("inf"), 0.0, base)
    share = tl.exp2(top - base)
    mass = total * share + tl.exp2(extra - base)
    result = acc * (share / tl.where(mass == 0.0, 1.0, mass))[:, None]
    mask = real[:, None] & (dim < D)[None, :]
    tl.store(out + at[:, None] * D + dim[None, :], result.to(out.dtype.element_ty), mask=mask)
    tl.store(lse + at, (top + tl.log2(total)) * LN2, mask=real)


@triton.jit
def arrive(
    part_acc,
    part_lse,
    slot,
    acc,
    top,
    total,
    counter,
    parts,
    QUERIES: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Store a partial result of QUERIES query heads and count it; true for the one that is last."""
    dim = tl.arange(0, BLOCK_D)
    index, real = q_rows(0, QUERIES, M)
    at = slot.to(tl.int64) * QUERIES + index
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
def merge_parts(
    part_acc,
    part_lse,
    slot0,
    slot_step: tl.constexpr,
    parts,
    begin,
    out,
    lse,
    sink,
    row,
    kv_head,
    T: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    QUERIES: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK: tl.constexpr,
    SINKS: tl.constexpr,
    tile=0,
):
    """Merge the partials in slot0, slot0 + slot_step, ... and store the result.

    Of the QUERIES query heads of a partial BLOCK_M from `begin` on; `tile` says which of the row's
    T * GROUP they are.

    A chunk of partials is loaded before the first is used: one round trip to L2 for all of them.
    They come from L2 (.cg), because this program's L1 knows nothing of what others stored.
    """
    dim = tl.arange(0, BLOCK_D)
    index = begin + tl.arange(0, BLOCK_M)
    query = tile * QUERIES + index
    real = (index < QUERIES) & (query < T * GROUP)
    head = kv_head * GROUP + query % GROUP
    at = (row.to(tl.int64) * T + query // GROUP) * HEADS + head
    sinks = tl.full([BLOCK_M], -float("inf"), tl.float32)
    if SINKS:
        sinks = tl.load(sink + head, mask=real, other=0.0)
    mask = real[:, None] & (dim < D)[None, :]
    from_acc = part_acc + slot0.to(tl.int64) * (QUERIES * D) + index[:, None] * D + dim[None, :]
    from_lse = part_lse + slot0.to(tl.int64) * QUERIES + index
    top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for part in tl.range(0, parts, CHUNK, num_stages=1):
        some = ()
        sums = ()
        new_top = top
        for c in tl.static_range(CHUNK):
            held = real & (part + c < parts)
            sums = sums + (
                tl.load(
                    from_lse + c * (slot_step * QUERIES),
                    mask=held,
                    other=-float("inf"),
                    cache_modifier=".cg",
                ),
            )
        for c in tl.static_range(CHUNK):
            some = some + (
                tl.load(
                    from_acc + c * (slot_step * QUERIES * D),
                    mask=mask & (part + c < parts),
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
        from_acc += CHUNK * slot_step * QUERIES * D
        from_lse += CHUNK * slot_step * QUERIES
    store_result(out, lse, at, real, sinks, acc, top, total, D, BLOCK_D)
