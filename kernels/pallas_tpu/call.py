"""From one attention call to one launch of the kernel."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int32

from ..record import POOLS, AttentionCall
from ..write import as_stored
from .config import LANES, SUBLANES, up
from .launch import NEW, TO_WRITE, launch
from .plan import Plan
from .work import deal

__all__ = ["append_and_attend", "attend", "refusal"]

MAX_DIM = 256
SMEM_BYTES = 3 << 18  # of the 1 MiB that every chip has; the rest is the compiler's
VMEM_BYTES = 8 << 20  # of 16 MiB, for the buffers of pages


def refusal(call: AttentionCall) -> str | None:
    """Why this backend cannot serve `call`, or None."""
    if call.platform != "tpu":
        return f"it runs on TPUs, not on {call.platform}"
    if (reason := call.pages_refusal(mixed=True, scales=True)) is not None:
        return reason
    if call.tail_mask is not None:
        return "it does not serve tail_mask (draft trees)"
    if jnp.float16 in (call.q.dtype, call.k_pages.dtype):
        return "a TPU has no float16; use bfloat16 or float32"
    if call.dim > MAX_DIM:
        return f"it serves D up to {MAX_DIM}; got D = {call.dim}"
    if call.k_scales is not None and call.page_size % LANES:
        return (
            f"pages of 8 bits need a page size that is a multiple of {LANES}, so that their scales "
            f"fill the lanes of a TPU; got {call.page_size}"
        )
    return _too_large(call)


def _too_large(call: AttentionCall) -> str | None:
    """Why the on-chip memory cannot hold what one step of `call` needs, or None."""
    items = call.rows * Plan.of(call, 1).tiles
    # For a step its item and the next; for a row its length and more; two steps' tables at once.
    scalars = 4 * (2 * items + 3 * call.rows + 4 * call.columns)
    if scalars > SMEM_BYTES:
        return (
            f"B = {call.rows} rows of T = {call.tokens} with P = {call.columns} columns need "
            f"{scalars} bytes of scalar memory"
        )
    buffers = 4 * call.kv_heads * call.page_size * up(call.dim, LANES) * call.itemsize
    if call.k_scales is not None:
        buffers += 16 * up(call.kv_heads, SUBLANES) * call.page_size
    if buffers > VMEM_BYTES:
        return f"two pages of keys and values take {buffers} bytes, more than {VMEM_BYTES}"
    return None


def attend(
    call: AttentionCall, *, interpret: Any = False
) -> tuple[Float[Array, "B T Hq D"], Float[Array, "B T Hq"]]:
    """Serve `call` in one launch."""
    out, lse = _run(call, None, None, interpret)
    return out, lse


def append_and_attend(
    call: AttentionCall,
    k: Float[Array, "B T Hk D"],
    v: Float[Array, "B T Hk D"],
    slots: Int32[Array, "B T"] | None,
    *,
    interpret: Any = False,
) -> tuple[Array, ...]:
    """Write k and v at the newest positions of every row and serve `call`.

    One launch where T = 1; else one that writes goes before it. XLA quantises what goes to pages of
    8 bits, a few operations on `[B, Hk, D]` before the launch: so its bits are those of any other
    way to write, though Mosaic may round a division otherwise.
    """
    if call.tokens > 1:
        written = call.with_newest(k, v, slots)
        return *attend(written, interpret=interpret), *written.pools
    return _run(call, as_stored(call.pools, k, v), slots, interpret)


def _run(
    call: AttentionCall,
    newest: tuple[Array, ...] | None,
    slots: Int32[Array, "B 1"] | None,
    interpret: Any,
) -> tuple[Array, ...]:
    plan = Plan.of(call, _cores(), append=newest is not None)
    items, following = deal(call, plan)
    scalars = dict(items=items, following=following, seq_lens=call.seq_lens)
    if call.starts is not None:
        scalars["starts"] = call.starts
    if call.query_lens is not None:
        scalars["query_lens"] = call.query_lens
    if newest is not None:
        new = call.seq_lens > 0
        if slots is not None:
            new &= slots[:, 0] >= call.page_size
        scalars["writes"] = new.astype(jnp.int32)
    scalars["layer"] = call.layer.reshape(1)
    table = call.page_table[:, None]
    arrays = dict(table=table, next_table=table, q=_packed(call.q, plan))
    if call.sink is not None:
        sink = jnp.broadcast_to(call.sink[:, None], (1, plan.config.queries, call.heads, 1))
        arrays["sink"] = _packed(sink, plan)[0]
    if newest is not None:
        tokens = [jnp.moveaxis(new, 1, 2) for new in newest]  # [B, Hk, 1, D], scales [B, Hk, 1]
        arrays |= dict(zip(NEW, tokens, strict=False))
    names = POOLS if newest is None else TO_WRITE
    arrays |= dict(zip(names, call.pools, strict=False))
    with jax.enable_x64(False):  # the kernel has no 64-bit number, and Mosaic no 64-bit integer
        out, lse, *written = launch(scalars, arrays, plan, interpret)
    out, lse = (_unpacked(x, call, plan) for x in (out, lse))
    if call.query_lens is not None:  # some padding shares a tile with queries of its row
        own = call.own()[:, :, None, None]
        out, lse = jnp.where(own, out, jnp.zeros_like(out)), jnp.where(own, lse, -jnp.inf)
    return out, lse[..., 0], *written


def _packed(x: Float[Array, "B T Hq d"], plan: Plan) -> Float[Array, "items rows d"]:
    """Tiles of queries, KV head by KV head and query head by query head.

    Queries are added in front to fill the first tile, and heads to align products of float32.
    """
    queries = plan.config.queries
    rows, tokens, heads, width = x.shape
    group = heads // plan.kv_heads
    x = jnp.pad(x, ((0, 0), (-tokens % queries, 0), (0, 0), (0, 0)))
    x = x.reshape(-1, queries, plan.kv_heads, group, width)
    x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, plan.group - group), (0, 0)))
    return jnp.moveaxis(x, 1, 3).reshape(-1, plan.rows, width)


def _unpacked(
    x: Float[Array, "items ..."], call: AttentionCall, plan: Plan
) -> Float[Array, "B T Hq d"]:
    """The inverse of `_packed`, without what it added."""
    queries = plan.config.queries
    x = x.reshape(-1, plan.kv_heads, plan.group, queries, x.size // (len(x) * plan.rows))
    x = jnp.moveaxis(x[:, :, : call.group], 3, 1)
    x = x.reshape(call.rows, plan.tiles * queries, call.heads, -1)
    return x[:, -call.tokens :]


def _cores() -> int:
    """Tensor cores of the chip that is compiled for; 1 where nothing says which it is."""
    try:
        return pltpu.get_tpu_info().num_cores
    except ValueError:  # interpreted on another platform
        return 1
