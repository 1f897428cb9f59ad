"""Attention of rows, from that of the parts that they share and that of their tails.

```
part n     [ set 0 ][ set 1 ][ set 2 ]     R rows; where row b sits among those of all: place[b]
row b                              + [ tail ]
```

A program for every row and KV head gathers its own of every set and merges them in their order.
"""

import jax
import triton
import triton.language as tl
from jaxtyping import Array, Float, Int32

from . import launch
from .config import power
from .merge import store_result
from .tiles import LOG2E

__all__ = ["join", "join_kernel"]


def join(
    outs: Float[Array, "*S N 1 M D"],
    lses: Float[Array, "*S N 1 M"],
    place: Int32[Array, " B"],
    tails: tuple[Float[Array, "B 1 Hq D"], Float[Array, "B 1 Hq"]],
    sink: Float[Array, " Hq"] | None,
    kv_heads: int,
) -> tuple[Float[Array, "B 1 Hq D"], Float[Array, "B 1 Hq"]]:
    """`merge.join`, of parts whose tokens may be those of several sets."""
    (*sets, parts, _, many, dim), (rows, _, heads) = outs.shape, tails[1].shape
    group = heads // kv_heads
    block_g, block_d = power(group), power(dim)
    out, lse = launch.looped(
        join_kernel,
        (outs, lses, place, *tails, place if sink is None else sink),
        [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in tails],
        grid=rows * kv_heads,
        warps=min(max(block_g * block_d // 256, 1), 8),
        stages=1,
        name="paged_join",
        constants=dict(
            SETS=sets[0] if sets else 1,
            PARTS=parts,
            MEMBERS=many // heads,
            KV_HEADS=kv_heads,
            GROUP=group,
            D=dim,
            BLOCK_G=block_g,
            BLOCK_D=block_d,
            SINKS=sink is not None,
        ),
    )
    return out, lse


@triton.jit
def join_kernel(
    outs,
    lses,
    place,
    tail_out,
    tail_lse,
    sink,
    out,
    lse,
    SETS: tl.constexpr,
    PARTS: tl.constexpr,
    MEMBERS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SINKS: tl.constexpr,
):
    """One row and KV head.

    Pointers: outs `[SETS, PARTS, KV_HEADS * MEMBERS * GROUP, D]` and lses without D; place `[B]`;
    tail_out and out `[B, Hq, D]`, tail_lse and lse `[B, Hq]`; sink `[Hq]`.
    """
    STEP: tl.constexpr = PARTS * KV_HEADS * MEMBERS * GROUP  # heads of a set
    kv_head = tl.program_id(0) % KV_HEADS
    row = (tl.program_id(0) // KV_HEADS).to(tl.int64)
    group = tl.arange(0, BLOCK_G)
    dim = tl.arange(0, BLOCK_D)
    real = group < GROUP
    head = kv_head * GROUP + group
    at = row * (KV_HEADS * GROUP) + head
    seat = tl.load(place + row)
    shares = real & (seat < PARTS * MEMBERS)
    lane = (seat // MEMBERS).to(tl.int64) * KV_HEADS + kv_head
    from_part = (lane * MEMBERS + seat % MEMBERS) * GROUP + group
    from_tail = at[:, None] * D + dim[None, :]
    mask = (dim < D)[None, :]

    logs = (tl.load(tail_lse + at, mask=real, other=-float("inf")),)
    values = (tl.load(tail_out + from_tail, mask=real[:, None] & mask, other=0.0),)
    for s in tl.static_range(SETS):
        heads = s * STEP + from_part
        logs = logs + (tl.load(lses + heads, mask=shares, other=-float("inf")),)
        values = values + (
            tl.load(
                outs + heads[:, None] * D + dim[None, :], mask=shares[:, None] & mask, other=0.0
            ),
        )
    top = tl.full([BLOCK_G], -float("inf"), tl.float32)
    for s in tl.static_range(SETS + 1):
        top = tl.maximum(top, logs[s] * LOG2E)
    base = tl.where(top == -float("inf"), 0.0, top)
    total = tl.zeros([BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    for s in tl.static_range(SETS + 1):
        weight = tl.exp2(logs[s] * LOG2E - base)
        total += weight
        acc += tl.where(weight[:, None] > 0, weight[:, None] * values[s].to(tl.float32), 0.0)
    sinks = tl.full([BLOCK_G], -float("inf"), tl.float32)
    if SINKS:
        sinks = tl.load(sink + head, mask=real, other=0.0)
    store_result(out, lse, at, real, sinks, acc, top, total, D, BLOCK_D)
