"""Keys and values as the kernels multiply them: as they are, or from numbers of 8 bits.

A matrix unit has no use for single bytes: its operands come from shared memory in units of 16 bits.
So two neighbours of D are read as one number of 16 bits and taken apart in registers: into the even
and the odd ones, in the dtype of the products, which is float16 where q has 16 bits and holds all
numbers of both dtypes. A product over D is then the sum of two that are half as long, and sums of
values are two halves until the end.

float16 has a narrow range, so what multiplies those numbers is kept near 1 by powers of two, which
lose nothing: rows of q are divided by theirs, and that of a value's scale is added to the logit
that its weight comes from, and taken away again from what weights add up to.
"""

import triton
import triton.language as tl

from .. import eight_bits, record

__all__ = [
    "ROOM", "add_values", "begin_sums", "end_sums", "keys_times", "numbers", "powers", "quantised",
    "query_parts", "scales_of",
]  # fmt: skip

LEAST = tl.constexpr(eight_bits.LEAST)
LOG2E = tl.constexpr(record.LOG2E)
# The greatest weight is 2**15 and not 2: the least that float16 tells from 0 is 2**-24.
ROOM = tl.constexpr(14.0)
# Inline assembler is for the card; the interpreter does the same in Triton's own words.
ON_CARD = tl.constexpr(not triton.knobs.runtime.interpret)


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
def powers(x):
    """The power of two at or below each |x|, its inverse and its exponent; 2**-80 at least.

    Of what is no number they are those of 1.
    """
    bits = x.to(tl.int32, bitcast=True) & 0x7F800000
    bits = tl.where(bits == 0x7F800000, 127 << 23, bits)
    bits = tl.minimum(tl.maximum(bits, 47 << 23), 253 << 23)
    inverse = ((254 << 23) - bits).to(tl.float32, bitcast=True)
    return bits.to(tl.float32, bitcast=True), inverse, (bits >> 23).to(tl.float32) - 127.0


@triton.jit
def query_parts(
    q,
    M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SCALE: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    SCALED: tl.constexpr,
):
    """A tile of q as `keys_times` takes it, and what to multiply its products by, `[M]`.

    With SCALED, each row is divided by a power of two, which goes with what makes logits in base 2
    of products, but for a soft cap.
    """
    if SCALED:
        UNIT: tl.constexpr = 1.0 if SOFT_CAP > 0 else SCALE * LOG2E
        wide = q.to(tl.float32)
        power, inverse, _ = powers(tl.max(tl.abs(wide), 1))
        wide = wide * inverse[:, None]
        if q.dtype != tl.float32:
            wide = wide.to(tl.float16)
        return tl.split(tl.reshape(wide, [M, BLOCK_D // 2, 2])), power * UNIT
    else:
        return q, tl.full([M], 1.0, tl.float32)


@triton.jit
def numbers(
    head,
    slot,
    live,
    MASKED: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SCALED: tl.constexpr,
):
    """Keys or values in these slots of a KV head; of 8 bits, two neighbours of D in 16 bits.

    With MASKED, only of those that are `live`.
    """
    if SCALED:
        head = head.to(tl.pointer_type(tl.int16), bitcast=True)
        WIDTH: tl.constexpr = D // 2
        BLOCK: tl.constexpr = BLOCK_D // 2
    else:
        WIDTH: tl.constexpr = D
        BLOCK: tl.constexpr = BLOCK_D
    dim = tl.arange(0, BLOCK)
    at = slot[:, None] * WIDTH + dim[None, :]
    if MASKED:
        mask = live[:, None]
        if WIDTH < BLOCK:
            mask = mask & (dim < WIDTH)[None, :]
        return tl.load(head + at, mask=mask, other=0)
    elif WIDTH < BLOCK:
        return tl.load(head + at, mask=(dim < WIDTH)[None, :], other=0)
    else:
        return tl.load(head + at)


@triton.jit
def scales_of(head, slot, live):
    """What `numbers` in these slots are multiplied by.

    The sum of one number each keeps Triton from loading them in the layout of the products, where
    every thread would copy those of all tokens.
    """
    return tl.sum(tl.load(head + slot[:, None], mask=live[:, None], other=0.0), 1)


@triton.jit
def _even_and_odd(pairs, TYPE: tl.constexpr, WIDE: tl.constexpr):
    """The lower and the upper numbers of `pairs`, in WIDE."""
    if ON_CARD and WIDE == tl.float16:
        if TYPE == tl.int8:
            # x + 128 as the last bits of a float16 that is 1024 without them
            high = tl.full(pairs.shape, 0x6464, tl.int16)
            zero = tl.full(pairs.shape, 0x6480, tl.int16)
            return tl.inline_asm_elementwise(
                """{
                .reg .b32 biased, wide;
                xor.b32 biased, $2, 0x80808080;
                prmt.b32 wide, biased, $3, 0x5250;
                sub.f16x2 $0, wide, $4;
                prmt.b32 wide, biased, $3, 0x5351;
                sub.f16x2 $1, wide, $4;
                }""",
                "=r,=r,r,r,r",
                [pairs, high, zero],
                dtype=(tl.float16, tl.float16),
                is_pure=True,
                pack=2,
            )
        else:
            return tl.inline_asm_elementwise(
                """{
                .reg .b32 sorted;
                .reg .b16 even, odd;
                prmt.b32 sorted, $2, 0, 0x3120;
                mov.b32 {even, odd}, sorted;
                cvt.rn.f16x2.e4m3x2 $0, even;
                cvt.rn.f16x2.e4m3x2 $1, odd;
                }""",
                "=r,=r,r",
                [pairs],
                dtype=(tl.float16, tl.float16),
                is_pure=True,
                pack=2,
            )
    else:
        even = (pairs & 0xFF).to(tl.int8).to(TYPE, bitcast=True)
        odd = (pairs >> 8).to(tl.int8).to(TYPE, bitcast=True)
        return even.to(tl.float32).to(WIDE), odd.to(tl.float32).to(WIDE)


@triton.jit
def keys_times(q, k, TYPE: tl.constexpr, SCALED: tl.constexpr):
    """Products of `query_parts` and `numbers` of keys in TYPE: `[M, TOKENS]` in float32."""
    if SCALED:
        even, odd = _even_and_odd(k, TYPE, q[0].dtype)
        products = tl.dot(q[0], tl.trans(even), input_precision="ieee")
        return tl.dot(q[1], tl.trans(odd), products, input_precision="ieee")
    else:
        return tl.dot(q, tl.trans(k), input_precision="ieee")


@triton.jit
def begin_sums(M: tl.constexpr, BLOCK_D: tl.constexpr, SCALED: tl.constexpr):
    """Sums of values before the first."""
    if SCALED:
        return tl.zeros([M, BLOCK_D // 2], tl.float32), tl.zeros([M, BLOCK_D // 2], tl.float32)
    else:
        return tl.zeros([M, BLOCK_D], tl.float32)


@triton.jit
def add_values(
    sums, decay, weight, v, TYPE: tl.constexpr, WIDE: tl.constexpr, SCALED: tl.constexpr
):
    """`sums`, which have decayed, and weighted `numbers` of values in TYPE."""
    if SCALED:
        even, odd = _even_and_odd(v, TYPE, WIDE)
        weight = weight.to(WIDE)
        return (
            tl.dot(weight, even, sums[0] * decay[:, None], input_precision="ieee"),
            tl.dot(weight, odd, sums[1] * decay[:, None], input_precision="ieee"),
        )
    else:
        return tl.dot(weight.to(v.dtype), v, sums * decay[:, None], input_precision="ieee")


@triton.jit
def end_sums(sums, M: tl.constexpr, BLOCK_D: tl.constexpr, SCALED: tl.constexpr):
    """Sums of values in the order of D, `[M, BLOCK_D]`."""
    if SCALED:
        return tl.reshape(tl.join(sums[0], sums[1]), [M, BLOCK_D])
    else:
        return sums
