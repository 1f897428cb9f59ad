"""The sum over the cards of one process in one launch: every card writes into the others' memory.

A program has one row. It writes its part of the row to every other card, waits until their parts
have come, adds all parts in the order of the cards, and may go on with what a decoder does next:
the residual sum and the norm over the row. No number is in memory twice, and no other launch is
needed.

A place that is empty holds -0.0, which no part that is sent contains; so the numbers are their own
signal, and a wait ends when none of a row's places is empty. There are three such places for every
row and card. Launch g uses the place g % 3 and empties the place of launch g - 1, which has been
read. The place that another card writes next is always empty: it writes launch g + 2 only after it
has read g + 1 of this card, which this card sends after launch g, in which it emptied that place.

```
                card 0's memory                        card 1's memory
place 0   from 0: -    from 1: row parts        from 0: row parts    from 1: -
place 1   ...                                   ...
place 2   ...                                   ...
count     launches of each row so far           the same
```
"""

import triton
import triton.language as tl

__all__ = ["PLACES", "device_sum_kernel"]

PLACES = 3


@triton.jit
def device_sum_kernel(
    part,
    addresses,
    residual,
    weight,
    eps,
    total,
    normed,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    CARDS: tl.constexpr,
    PLACES: tl.constexpr,
    BITS: tl.constexpr,
    EMPTY: tl.constexpr,
    HEAD: tl.constexpr,
    RESIDUAL: tl.constexpr,
    NORM: tl.constexpr,
    WAIT: tl.constexpr,
):
    """One row of the sum of `part` over CARDS.

    Pointers: part, residual, total and normed `[rows, WIDTH]` of one dtype; weight `[WIDTH]` of
    any; addresses int32 `[CARDS + 1, 2]`, the low and high half of where the workspaces begin, this
    card's first and the others' as they follow it around, and then which card this is. A number
    below 0 there only loads the kernel. eps is a float32.

    A number has BITS bits, those of EMPTY where a place is empty.
    A workspace has ROWS counters, int32, in its first HEAD bytes, and then the places
    `[PLACES, CARDS, ROWS, WIDTH]`. After WAIT looks at an empty place the row becomes NaN, and so
    does every later one: its counter stays below 0.
    """
    row = tl.program_id(0)
    dtype = part.dtype.element_ty
    whole = tl.int32 if BITS == 32 else tl.int16
    size = ROWS * WIDTH
    column = tl.arange(0, BLOCK)
    mask = column < WIDTH
    out = row.to(tl.int64) * WIDTH + column
    here = _address(addresses, 0)
    counter = here.to(tl.pointer_type(tl.int32)) + row
    me = tl.load(addresses + 2 * CARDS)
    count = tl.load(counter, mask=me >= 0, other=0)
    own = tl.load(part + out, mask=mask, other=0.0).to(tl.float32)
    own = tl.where(own == 0, 0.0, own).to(dtype)
    if me < 0:
        return
    place = count % PLACES
    if count >= 0:
        for i in tl.static_range(1, CARDS):
            at = _row(_address(addresses, i), place * CARDS + me, row * WIDTH, size, BITS, HEAD)
            tl.store(at + column, own.to(whole, bitcast=True), mask=mask, cache_modifier=".wt")
    if RESIDUAL:
        before = tl.load(residual + out, mask=mask, other=0.0).to(tl.float32)
    if NORM:
        by = tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
    looks = tl.where(count >= 0, WAIT, 0)
    broken = count < 0
    summed = tl.zeros([BLOCK], tl.float32)
    for card in tl.static_range(CARDS):
        if card == me:
            summed += own.to(tl.float32)
        else:
            at = _row(here, place * CARDS + card, row * WIDTH, size, BITS, HEAD)
            found = tl.load(at + column, mask=mask, other=0, volatile=True)
            empty = tl.max((found == EMPTY).to(tl.int32), 0)
            while (empty > 0) & (looks > 0):
                found = tl.load(at + column, mask=mask, other=0, volatile=True)
                empty = tl.max((found == EMPTY).to(tl.int32), 0)
                looks -= 1
            broken = broken | (empty > 0)
            summed += found.to(dtype, bitcast=True).to(tl.float32)
            free = (place + PLACES - 1) % PLACES * CARDS + card
            free = _row(here, free, row * WIDTH, size, BITS, HEAD)
            tl.store(free + column, tl.full([BLOCK], EMPTY, whole), mask=mask)
    tl.debug_barrier()  # every thread has read the counter
    tl.store(counter, tl.where(broken, -1, (count + 1) % (PLACES << 20)))
    if RESIDUAL:
        # As written one after the other: the sum is rounded before it is added.
        summed = summed.to(dtype).to(tl.float32) + before
    summed = tl.where(broken, float("nan"), summed)
    rounded = summed.to(dtype)
    tl.store(total + out, rounded, mask=mask)
    if NORM:
        wide = rounded.to(tl.float32)
        scale = tl.rsqrt(tl.sum(tl.where(mask, wide * wide, 0.0), 0) / WIDTH + eps)
        tl.store(normed + out, (wide * scale * by).to(dtype), mask=mask)


@triton.jit
def _address(addresses, index):
    """Where one workspace begins."""
    low = tl.load(addresses + 2 * index).to(tl.int64) & 0xFFFFFFFF
    return tl.multiple_of((tl.load(addresses + 2 * index + 1).to(tl.int64) << 32) | low, 16)


@triton.jit
def _row(begin, block, offset, size, BITS: tl.constexpr, HEAD: tl.constexpr):
    """A pointer to a number of one block of `size`, of those behind a workspace's counters."""
    whole = tl.int32 if BITS == 32 else tl.int16
    first = tl.multiple_of((begin + HEAD).to(tl.pointer_type(whole)), 16)
    return first + (block.to(tl.int64) * size + offset)
