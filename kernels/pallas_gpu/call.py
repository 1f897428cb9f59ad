"""From one attention call to one launch of the kernel."""

import importlib.util

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .. import cards
from ..record import AttentionCall
from .plan import Plan, plan

__all__ = ["attend", "plan_of", "refusal", "run"]

DIMS = (64, 128)
MAX_GROUP = 64  # rows of a product of the matrix unit
MIN_PAGE = 8  # rows of a swizzled block of shared memory
_INDEX = 2**31


def refusal(call: AttentionCall) -> str | None:
    """Why this backend cannot serve `call`, or None."""
    if call.platform != "gpu":
        return f"it runs on NVIDIA Hopper GPUs, not on {call.platform}"
    if (card := cards.compute_capability()) != "9.0":
        return f"it is built for compute capability 9.0 (Hopper), not {card}"
    return shape_refusal(call) or _missing()


def shape_refusal(call: AttentionCall) -> str | None:
    """Why the kernel cannot be built for the shapes and dtypes of `call`, or None."""
    if (reason := call.decode_refusal()) is not None:
        return reason
    if call.q.dtype == jnp.float32:
        return "float32 is not served: the matrix unit of Hopper would round it to tf32"
    if (dim := call.q.shape[3]) not in DIMS:
        return f"it serves D in {DIMS}; got D = {dim}"
    if call.group > MAX_GROUP:
        return f"it serves up to {MAX_GROUP} query heads a KV head; got {call.group}"
    if call.page_size < MIN_PAGE or call.page_size & (call.page_size - 1):
        return f"it serves powers of two from {MIN_PAGE} on as page sizes; got {call.page_size}"
    if call.k_pages.size // dim >= _INDEX:
        return f"the pool has {call.k_pages.size // dim} rows of D; a copy counts them in int32"
    made = plan_of(call)
    if made.rows * made.kv_heads * (-(-made.capacity // made.tile) + 1) * made.workers >= _INDEX:
        return "the page table holds more tiles than blocks can count in int32"
    return None


def attend(call: AttentionCall) -> tuple[Float[Array, "B 1 Hq D"], Float[Array, "B 1 Hq"]]:
    """Serve `call` in one launch."""
    return run(call, plan_of(call))


def run(
    call: AttentionCall, made: Plan, interpret: object = None
) -> tuple[Float[Array, "B 1 Hq D"], Float[Array, "B 1 Hq"]]:
    """`call` by this plan; `interpret` of `pallas_call`."""
    # Only here: a jax without Mosaic GPU must be able to import this module and refuse.
    from .launch import launch
    from .merge import Inputs

    inputs = Inputs(
        q=call.q[:, 0],
        k=call.k_pages.reshape(-1, made.dim),
        v=call.v_pages.reshape(-1, made.dim),
        layer=call.layer.reshape(1),
        page_table=call.page_table,
        seq_lens=call.seq_lens,
        # What is not there is not read.
        starts=call.seq_lens if call.starts is None else call.starts,
        sink=call.seq_lens if call.sink is None else jnp.pad(call.sink, (0, call.group % 2)),
        counters=cards.zero_counters(made.rows * made.kv_heads),
    )

    # A batch of launches would count arrivals in the same counters: one after the other.
    @jax.custom_batching.sequential_vmap
    def launched(*arrays: Array) -> tuple[Array, Array]:
        return launch(made, Inputs(*arrays), interpret)

    out, lse = launched(*inputs)
    return out[:, None], lse[:, None]


def plan_of(
    call: AttentionCall, *, interpreted: bool = False, processors: int | None = None
) -> Plan:
    """The plan of `call` on the card it runs on, or on one with so many multiprocessors."""
    return plan(
        rows=call.q.shape[0],
        columns=call.page_table.shape[1],
        pages=call.k_pages.shape[1],
        page_size=call.page_size,
        kv_heads=call.k_pages.shape[2],
        group=call.group,
        dim=call.q.shape[3],
        itemsize=call.k_pages.dtype.itemsize,
        scale=call.scale,
        soft_cap=call.soft_cap,
        window=call.window,
        starts=call.starts is not None,
        sinks=call.sink is not None,
        processors=cards.processors() if processors is None else processors,
        interpreted=interpreted,
    )


def _missing() -> str | None:
    """Why this jax cannot build the kernel, or None."""
    if importlib.util.find_spec("jax.experimental.pallas.mosaic_gpu") is None or (
        jax.__version_info__ < (0, 11)
    ):
        return f"it needs Pallas Mosaic GPU as in jax 0.11; this is jax {jax.__version__}"
    return None
