"""From one attention call to one launch of a kernel."""

import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..cards import Card, compute_capability, processors, zero_counters
from ..record import AttentionCall
from . import config
from .plan import Plan

__all__ = ["attend", "prefers", "refusal", "run"]

DECODE_DIMS = (64, 128)
MAX_GROUP = 64  # rows of a product of the matrix unit
MIN_PAGE = 8  # rows of a swizzled block of shared memory
_INDEX = 2**31


def refusal(call: AttentionCall) -> str | None:
    """Why this backend cannot serve `call`, or None."""
    if call.platform != "gpu":
        return f"it runs on NVIDIA Hopper GPUs, not on {call.platform}"
    if (card := compute_capability()) != "9.0":
        return f"it is built for compute capability 9.0 (Hopper), not {card}"
    return shape_refusal(call) or _missing() or _widening_refusal(call)


def shape_refusal(call: AttentionCall) -> str | None:
    """Why no kernel can be built for the shapes and dtypes of `call`, or None."""
    if (reason := call.pages_refusal(scales=call.tokens > 1)) is not None:
        return reason
    if call.tail_mask is not None:
        return "it does not serve tail_mask (draft trees)"
    if call.batch_invariant:
        return "it cuts the tiles of all rows into equal parts: a row's bits follow from the others"
    if call.q.dtype == jnp.float32:
        return "float32 is not served: the matrix unit of Hopper would round it to tf32"
    dims = DECODE_DIMS if call.tokens == 1 else tuple(config.TAIL_KEYS)
    if call.dim not in dims:
        return f"it serves D in {dims}; got D = {call.dim}"
    if call.tokens == 1 and call.group > MAX_GROUP:
        return f"it serves up to {MAX_GROUP} query heads a KV head; got {call.group}"
    if call.page_size < MIN_PAGE or call.page_size & (call.page_size - 1):
        return f"it serves powers of two from {MIN_PAGE} on as page sizes; got {call.page_size}"
    if call.k_pages.size // call.dim >= _INDEX:
        return (
            f"the pool has {call.k_pages.size // call.dim} rows of D; a copy counts them in int32"
        )
    plan = Plan.of(call, Card.here())
    tiles = call.rows * call.kv_heads * (-(-call.capacity // plan.tile) + 1)
    if (tiles * plan.workers if call.tokens == 1 else plan.blocks) >= _INDEX:
        return "the call has more tiles than blocks can count in int32"
    return None


def prefers(call: AttentionCall) -> bool:
    """Whether this backend serves `call`, and is to come before Triton."""
    # The shape first: whether Mosaic GPU is there costs an import that most calls need not pay for.
    return config.prefers(call, processors()) and refusal(call) is None


def attend(call: AttentionCall) -> tuple[Float[Array, "B T Hq D"], Float[Array, "B T Hq"]]:
    """Serve `call` in one launch, and one before it where pages have 8 bits."""
    if call.k_scales is not None:
        from ..triton.widen import widened

        call = widened(call)
    return run(call, Plan.of(call, Card.here()))


def run(
    call: AttentionCall, plan: Plan, interpret: object = None
) -> tuple[Float[Array, "B T Hq D"], Float[Array, "B T Hq"]]:
    """`call` by this plan; `interpret` of `pallas_call`."""
    arrays: dict[str, Any] = dict(
        k=call.k_pages.reshape(-1, plan.dim),
        v=call.v_pages.reshape(-1, plan.dim),
        layer=call.layer.reshape(1),
        page_table=call.page_table,
        seq_lens=call.seq_lens,
        # What is not there is not read.
        starts=call.seq_lens if call.starts is None else call.starts,
        sink=call.seq_lens if call.sink is None else call.sink,
    )
    serve = _decode if call.tokens == 1 else _tail
    return serve(call, plan, arrays, interpret)


def _decode(call: AttentionCall, plan: Plan, arrays: dict[str, Any], interpret: object) -> Any:
    # Only here: a jax without Mosaic GPU must be able to import this module and refuse.
    from .launch import launch
    from .merge import Inputs

    if plan.sinks:
        arrays["sink"] = jnp.pad(call.sink, (0, call.group % 2))
    inputs = Inputs(q=call.q[:, 0], counters=zero_counters(plan.rows * plan.kv_heads), **arrays)

    # A batch of launches would count arrivals in the same counters: one after the other.
    @jax.custom_batching.sequential_vmap
    def launched(*inputs: Array) -> tuple[Array, Array]:
        return launch(plan, Inputs(*inputs), interpret)

    out, lse = launched(*inputs)
    return out[:, None], lse[:, None]


def _tail(call: AttentionCall, plan: Plan, arrays: dict[str, Any], interpret: object) -> Any:
    from .launch import launch_tail
    from .tail import Inputs

    before = plan.tokens - plan.new
    q = jnp.pad(call.q, ((0, 0), (before, 0), (0, 0), (0, 0))) if before else call.q

    @jax.custom_batching.sequential_vmap
    def launched(*inputs: Array) -> tuple[Array, Array]:
        return launch_tail(plan, Inputs(*inputs), interpret)

    query_lens = call.seq_lens if call.query_lens is None else call.query_lens
    out, lse = launched(*Inputs(q=q, query_lens=query_lens, **arrays))
    return out[:, before:], jnp.swapaxes(lse, 1, 2)[:, before:]


def _widening_refusal(call: AttentionCall) -> str | None:
    """Why pages of 8 bits cannot be widened for this kernel, or None."""
    if call.k_scales is None:
        return None
    try:
        from ..triton import launch, widen
    except ImportError as error:
        return f"pages of 8 bits are widened by Triton: {error}"
    return widen.problem(call) or launch.problem()


def _missing() -> str | None:
    """Why this jax cannot build the kernel, or None."""
    if importlib.util.find_spec("jax.experimental.pallas.mosaic_gpu") is None or (
        jax.__version_info__ < (0, 11)
    ):
        return f"it needs Pallas Mosaic GPU as in jax 0.11; this is jax {jax.__version__}"
    return None
