"""From one attention call to one launch of a kernel."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from ..cards import Card, compute_capability, zero_counters
from ..record import AttentionCall
from . import launch, widen
from .config import FEW_QUERIES, by_tiles
from .decode import decode_kernel
from .join import join
from .plan import Plan
from .tail import tail_kernel
from .write import WRITTEN

__all__ = ["append_and_attend", "attend", "attend_joined", "refusal"]

POOLS_AT = (1, 2, 9, 10)  # where the pools are among the inputs
FLOAT8 = 8.9  # the first compute capability that converts it
MAX_DIM = 256
MAX_GROUP = 64


def refusal(call: AttentionCall) -> str | None:
    """Why this backend cannot serve `call`, or None."""
    if call.platform != "gpu":
        return f"it runs on NVIDIA GPUs, not on {call.platform}"
    if not (generation := compute_capability()).replace(".", "").isdigit():
        return f"it runs on NVIDIA GPUs, not on {generation}"
    if (reason := call.pages_refusal(scales=True)) is not None:
        return reason
    if call.k_pages.dtype == jnp.float8_e4m3fn and float(generation) < FLOAT8:
        return f"a card of compute capability {generation} has no float8_e4m3fn; use int8"
    if call.dim > MAX_DIM:
        return f"it serves D up to {MAX_DIM}; got D = {call.dim}"
    if call.k_scales is not None and call.dim % 2:
        return f"it reads pages of 8 bits by pairs of numbers; got D = {call.dim}"
    if call.group > MAX_GROUP and not by_tiles(call):
        return f"it serves up to {MAX_GROUP} query heads a KV head; got {call.group}"
    if call.page_size & (call.page_size - 1):
        return f"it serves page sizes that are powers of two; got {call.page_size}"
    return launch.problem()


def attend(call: AttentionCall) -> tuple[Float[Array, "B T Hq D"], Float[Array, "B T Hq"]]:
    """Serve `call` in one launch."""
    out, lse, *_ = run(call, Card.here())
    return out, lse


def attend_joined(
    call: AttentionCall,
    filled: int,
    place: Int32[Array, " B"],
    tails: tuple[Float[Array, "B 1 Hq D"], Float[Array, "B 1 Hq"]],
    sink: Float[Array, " Hq"] | None,
) -> tuple[Float[Array, "B 1 Hq D"], Float[Array, "B 1 Hq"]]:
    """Serve a call of parts in one launch, and in another merge them with the tails of rows."""
    outs, lses, *_ = run(call, Card.here(), filled=filled)
    return join(outs, lses, place, tails, sink, call.kv_heads)


def append_and_attend(
    call: AttentionCall,
    k: Float[Array, "B T Hk D"],
    v: Float[Array, "B T Hk D"],
    slots: Int32[Array, "B T"] | None,
) -> tuple[Array, ...]:
    """Write k and v at the newest positions of every row and serve `call`.

    One launch, or of the kernel for T > 1 two: one that writes goes before it.
    """
    if by_tiles(call):
        written = call.with_newest(k, v, slots)
        return *attend(written), *written.pools
    out, lse, _, _, *pools = run(call, Card.here(), (k, v, slots))
    return out, lse, *pools


def run(
    call: AttentionCall,
    card: Card,
    newest: tuple[Array, Array, Array | None] | None = None,
    filled: int | None = None,
) -> list[Array]:
    """The launch as a custom call: out, lse, two scratches and the pages, if they are written."""
    if call.k_scales is not None and not call.one_token and _many_queries(call):
        call = widen.widened(call)
    append, (k, v, slots) = newest is not None, newest or (None, None, None)
    plan = Plan.of(call, card, append=append, slots=slots is not None, filled=filled)
    inputs = _inputs(call, plan)
    if by_tiles(call):
        inputs += _new_tokens(call, plan)
        return _launched(tail_kernel, inputs, plan, "paged_tail", {})
    inputs += (
        call.q if k is None else k,
        call.q if v is None else v,
        call.seq_lens if slots is None else slots,
    )
    count = len(call.pools)
    written = dict(rewritten=WRITTEN[:count], aliases=POOLS_AT[:count] if append else ())
    written["constants"] = plan.constants | dict.fromkeys(WRITTEN[count:], 0)
    return _launched(decode_kernel, inputs, plan, "paged_decode", written)


def _many_queries(call: AttentionCall) -> bool:
    """Whether so many queries share keys and values that taking bytes apart for each tile of them
    costs more than doing it once."""
    return call.tokens * call.group > FEW_QUERIES and widen.problem(call) is None


def _inputs(call: AttentionCall, plan: Plan) -> tuple[Array, ...]:
    """The arrays that every kernel begins with.

    What is not given is not read: any other array stands in for it.
    """
    return (
        call.q,
        call.k_pages,
        call.v_pages,
        call.layer,
        call.page_table,
        call.seq_lens,
        call.seq_lens if call.starts is None else call.starts,
        call.q if call.sink is None else call.sink,
        zero_counters(plan.counters),
        call.seq_lens if call.k_scales is None else call.k_scales,
        call.seq_lens if call.v_scales is None else call.v_scales,
    )


def _new_tokens(call: AttentionCall, plan: Plan) -> tuple[Array, ...]:
    """What the kernel of T > 1 is told beside: as `_inputs`."""
    windowed_tree = call.tail_mask is not None and plan.constants["WINDOW"] > 0
    return (
        call.seq_lens if call.query_lens is None else call.query_lens,
        call.seq_lens if call.tail_mask is None else call.tail_mask,
        call.positions() if windowed_tree else call.seq_lens,
    )


def _launched(
    kernel: Any, inputs: Sequence[Array], plan: Plan, name: str, written: dict[str, Any]
) -> list[Array]:
    return launch.looped(
        kernel,
        inputs,
        [jax.ShapeDtypeStruct(size, jnp.dtype(dtype)) for size, dtype in plan.outputs],
        grid=plan.grid,
        warps=plan.config.warps,
        stages=plan.config.stages,
        name=name,
        **(dict(constants=plan.constants) | written),
    )
