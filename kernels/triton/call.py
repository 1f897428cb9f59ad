"""From one attention call to one launch of a kernel."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from ..cards import compute_capability, processors, zero_counters
from ..record import AttentionCall
from . import compat
from .config import Shape, choose_config, choose_tail_config
from .kernel import decode_kernel
from .plan import Launch, plan, plan_tail
from .tail import tail_kernel

__all__ = ["append_and_attend", "attend", "refusal"]

MAX_DIM = 256
MAX_GROUP = 64


def refusal(call: AttentionCall) -> str | None:
    """Why this backend cannot serve `call`, or None."""
    if call.platform != "gpu":
        return f"it runs on NVIDIA GPUs, not on {call.platform}"
    if not (generation := compute_capability()).replace(".", "").isdigit():
        return f"it runs on NVIDIA GPUs, not on {generation}"
    if (reason := call.pages_refusal()) is not None:
        return reason
    if call.q.shape[3] > MAX_DIM:
        return f"it serves D up to {MAX_DIM}; got D = {call.q.shape[3]}"
    if call.group > MAX_GROUP:
        return f"it serves up to {MAX_GROUP} query heads a KV head; got {call.group}"
    if call.page_size & (call.page_size - 1):
        return f"it serves page sizes that are powers of two; got {call.page_size}"
    return compat.problem()


def attend(call: AttentionCall) -> tuple[Float[Array, "B T Hq D"], Float[Array, "B T Hq"]]:
    """Serve `call` in one launch."""
    out, lse, *_ = run(call) if call.q.shape[1] == 1 else run_tail(call)
    return out.reshape(call.q.shape), lse.reshape(call.q.shape[:-1])


def append_and_attend(
    call: AttentionCall,
    k: Float[Array, "B T Hk D"],
    v: Float[Array, "B T Hk D"],
    slots: Int32[Array, "B T"] | None,
) -> tuple[Array, Array, Array, Array]:
    """Write k and v at the newest positions of every row and serve `call`.

    One launch where T = 1; else a scatter goes before it.
    """
    if call.q.shape[1] > 1:
        written = call.with_newest(k, v, slots)
        return *attend(written), written.k_pages, written.v_pages
    out, lse, _, _, k_pages, v_pages = run(call, (k, v, slots))
    return out.reshape(call.q.shape), lse.reshape(call.q.shape[:-1]), k_pages, v_pages


def run(
    call: AttentionCall, newest: tuple[Array, Array, Array | None] | None = None
) -> list[Array]:
    """The launch as a custom call: out, lse, two scratches and the pages, if they are written."""
    shape = shape_of(call)
    append, (k, v, slots) = newest is not None, newest or (None, None, None)
    config, given = choose_config(shape), slots is not None
    launch = plan(shape, config, **_options(call), append=append, slots=given)
    inputs = (
        *_inputs(call, launch),
        call.q if k is None else k,
        call.q if v is None else v,
        call.seq_lens if slots is None else slots,
    )
    written = dict(rewritten=("k_written", "v_written"), aliases=(1, 2) if append else ())
    return _launched(decode_kernel, inputs, launch, "paged_decode", written)


def run_tail(call: AttentionCall) -> list[Array]:
    """The launch for T > 1 as a custom call: out, lse and two scratches."""
    shape = shape_of(call)
    launch = plan_tail(shape, choose_tail_config(shape), **_options(call))
    return _launched(tail_kernel, _inputs(call, launch), launch, "paged_tail", {})


def _options(call: AttentionCall) -> dict[str, Any]:
    """What every plan is told of a call beside its shape."""
    return dict(
        dtype=str(call.q.dtype),
        pages=call.k_pages.shape[1],
        columns=call.page_table.shape[1],
        scale=call.scale,
        window=call.window,
        soft_cap=call.soft_cap,
        starts=call.starts is not None,
        sinks=call.sink is not None,
    )


def _inputs(call: AttentionCall, launch: Launch) -> tuple[Array, ...]:
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
        zero_counters(launch.counters),
    )


def _launched(
    kernel: Any, inputs: Sequence[Array], launch: Launch, name: str, written: dict[str, Any]
) -> list[Array]:
    launch_one = compat.launch  # taken now: under `vmap` the call below is traced later

    # A batch of launches would count arrivals in the same counters: one after the other.
    @jax.custom_batching.sequential_vmap
    def launched(*arrays: Array) -> list[Array]:
        return launch_one(
            kernel,
            arrays,
            [jax.ShapeDtypeStruct(size, jnp.dtype(dtype)) for size, dtype in launch.outputs],
            grid=launch.grid,
            warps=launch.warps,
            stages=launch.stages,
            name=name,
            constants=launch.constants,
            **written,
        )

    return launched(*inputs)


def shape_of(call: AttentionCall) -> Shape:
    """The static sizes of `call` and of the card it runs on."""
    return Shape(
        rows=call.q.shape[0],
        kv_heads=call.k_pages.shape[2],
        group=call.group,
        dim=call.q.shape[3],
        page_size=call.page_size,
        capacity=call.page_table.shape[1] * call.page_size,
        itemsize=call.k_pages.dtype.itemsize,
        processors=processors(),
        generation=int(compute_capability().replace(".", "")),
        tokens=call.q.shape[1],
    )
