"""Tilings for Hopper, and the calls that this kernel serves faster than Triton's."""

from ..record import AttentionCall

__all__ = ["QUERIES", "TAIL_KEYS", "TAIL_STAGES", "prefers", "ring_stages"]

QUERIES = 64  # rows of a product of the matrix unit: of a warpgroup's queries, and keys for T = 1

# T = 1: bytes of K and V on their way to a block, but two tiles at least. More does not come sooner
# on an H100: the blocks next to the memory get ahead of the others, which then end last.
_RING_BYTES = 48 * 1024

# T > 1: keys of a block by D, and blocks of K and of V in shared memory. What a warpgroup holds in
# registers is its sums, 64 x D, and the logits of a block, so D 256 leaves room for 64 keys.
TAIL_KEYS = {64: 128, 128: 128, 256: 64}
TAIL_STAGES = 2

# What the rows need of a multiprocessor each, and tokens of a row that one block attends with in no
# time: twice as many where all rows have blocks enough.
_FULL, _SHORT = 0.7, 1024


def ring_stages(dim: int, itemsize: int) -> int:
    """Tiles of K and of V in flight where T = 1."""
    return max(_RING_BYTES // (2 * QUERIES * dim * itemsize), 2)


def prefers(call: AttentionCall, processors: int) -> bool:
    """Whether this kernel is to serve `call` before Triton's on so many multiprocessors.

    `benchmarks/tails.py` times both on either side of this rule, and a test holds it to the result.

    Its blocks are units of queries, and no row is cut along its keys: where one row is long among
    short ones, its blocks work alone. So one row must have enough of them for the card, or half of
    that beside other rows; or it must be short.
    """
    if call.tokens < QUERIES:
        return False
    blocks = -(-call.tokens // QUERIES) * call.heads // 2  # of one row
    enough = _FULL * processors
    several = blocks * call.rows >= enough and (blocks >= enough / 2 or call.capacity <= 2 * _SHORT)
    return blocks >= enough or several or call.capacity <= _SHORT
