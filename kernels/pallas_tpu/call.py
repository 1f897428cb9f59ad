"""From one attention call to one launch of the kernel."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int32

from ..record import AttentionCall
from .config import Config, Shape, choose_config
from .kernel import Static
from .launch import launch

__all__ = ["append_and_attend", "attend", "refusal"]

MAX_DIM = 256
SMEM_BYTES = 3 << 18  # of the 1 MiB that every chip has; the rest is the compiler's
VMEM_BYTES = 8 << 20  # of 16 MiB, for the buffers of pages


def refusal(call: AttentionCall) -> str | None:
    """Why this backend cannot serve `call`, or None."""
    if call.platform != "tpu":
        return f"it runs on TPUs, not on {call.platform}"
    if (reason := call.decode_refusal(mixed=True)) is not None:
        return reason
    if jnp.float16 in (call.q.dtype, call.k_pages.dtype):
        return "a TPU has no float16; use bfloat16 or float32"
    if call.q.shape[3] > MAX_DIM:
        return f"it serves D up to {MAX_DIM}; got D = {call.q.shape[3]}"
    return _too_large(call)


def _too_large(call: AttentionCall) -> str | None:
    """Why the on-chip memory cannot hold what one step of `call` needs, or None."""
    rows, columns = call.page_table.shape
    scalars = 4 * (5 * rows + 4 * columns)  # two steps have their page tables there at once
    if scalars > SMEM_BYTES:
        return f"B = {rows} rows with P = {columns} columns need {scalars} bytes of scalar memory"
    _, _, kv_heads, page_size, dim = call.k_pages.shape
    buffers = 4 * kv_heads * page_size * -(-dim // 128) * 128 * call.k_pages.dtype.itemsize
    if buffers > VMEM_BYTES:
        return f"two pages of keys and values take {buffers} bytes, more than {VMEM_BYTES}"
    return None


def attend(
    call: AttentionCall, *, interpret: Any = False
) -> tuple[Float[Array, "B 1 Hq D"], Float[Array, "B 1 Hq"]]:
    """Serve `call` in one launch."""
    out, lse = _run(call, None, None, interpret)
    return out.reshape(call.q.shape), lse.reshape(call.q.shape[:-1])


def append_and_attend(
    call: AttentionCall,
    k: Float[Array, "B 1 Hk D"],
    v: Float[Array, "B 1 Hk D"],
    slots: Int32[Array, "B 1"] | None,
    *,
    interpret: Any = False,
) -> tuple[Array, Array, Array, Array]:
    """Write k and v at the newest position of every row and serve `call`, in one launch."""
    out, lse, k_pages, v_pages = _run(call, (k, v), slots, interpret)
    return out.reshape(call.q.shape), lse.reshape(call.q.shape[:-1]), k_pages, v_pages


def _run(
    call: AttentionCall,
    newest: tuple[Array, Array] | None,
    slots: Int32[Array, "B 1"] | None,
    interpret: Any,
) -> tuple[Array, ...]:
    config, append = choose_config(shape_of(call)), newest is not None
    rows, following = deal(call, config.cores, append)
    scalars = dict(rows=rows, following=following, seq_lens=call.seq_lens)
    if call.starts is not None:
        scalars["starts"] = call.starts
    if append:
        new = call.seq_lens > 0
        if slots is not None:
            new &= slots[:, 0] >= call.page_size
        scalars["writes"] = new.astype(jnp.int32)
    scalars["layer"] = call.layer.reshape(1)
    table = call.page_table if config.cores == 1 else call.page_table[rows]
    tables = jnp.concatenate([table, call.page_table[jnp.maximum(following, 0)]], axis=1)
    static = static_of(call, config, rows.shape[0] // config.cores, append)
    arrays = dict(tables=tables[:, None], q=_widen(call.q[:, 0], call.group, static.group))
    if call.sink is not None:
        arrays["sink"] = _widen(call.sink.reshape(1, -1, 1), call.group, static.group)[0]
    if newest is None:
        arrays |= dict(k_pages=call.k_pages, v_pages=call.v_pages)
    else:
        new_k, new_v = (jnp.moveaxis(new, 1, 2) for new in newest)  # [B, Hk, 1, D]
        arrays |= dict(new_k=new_k, new_v=new_v, k_in=call.k_pages, v_in=call.v_pages)
    with jax.enable_x64(False):  # the kernel has no 64-bit number, and Mosaic no 64-bit integer
        out, lse, *written = launch(scalars, arrays, static, config.cores, interpret)
    out, lse = (_narrow(x, call.group, static.group) for x in (out, lse))
    return out, lse, *written


def _widen(x: Float[Array, "B Hq d"], group: int, wanted: int) -> Float[Array, "B heads d"]:
    """Zero heads added to every group, for the alignment of float32 products."""
    if group == wanted:
        return x
    grouped = x.reshape(x.shape[0], -1, group, x.shape[2])
    wide = jnp.pad(grouped, ((0, 0), (0, 0), (0, wanted - group), (0, 0)))
    return wide.reshape(x.shape[0], -1, x.shape[2])


def _narrow(x: Float[Array, "B heads d"], group: int, given: int) -> Float[Array, "B Hq d"]:
    """The heads without those that `_widen` added."""
    if group == given:
        return x
    return x.reshape(x.shape[0], -1, given, x.shape[2])[:, :, :group].reshape(
        x.shape[0], -1, x.shape[2]
    )


def shape_of(call: AttentionCall) -> Shape:
    """The static sizes of `call` and of the chip it runs on."""
    return Shape(
        rows=call.q.shape[0],
        kv_heads=call.k_pages.shape[2],
        group=call.group,
        dim=call.q.shape[3],
        page_size=call.page_size,
        columns=call.page_table.shape[1],
        itemsize=call.k_pages.dtype.itemsize,
        exact=_compute(call) == jnp.float32,
        cores=_cores(),
    )


def _compute(call: AttentionCall) -> Any:
    """The dtype of the products."""
    return call.q.dtype if call.q.dtype == call.k_pages.dtype else jnp.dtype(jnp.float32)


def _cores() -> int:
    """Tensor cores of the chip that is compiled for; 1 where nothing says which it is."""
    try:
        return pltpu.get_tpu_info().num_cores
    except ValueError:  # interpreted on another platform
        return 1


def static_of(call: AttentionCall, config: Config, steps: int, append: bool) -> Static:
    """What is compiled into the kernel for `call`."""
    _, pages, kv_heads, page_size, dim = call.k_pages.shape
    compute = _compute(call)
    return Static(
        kv_heads=kv_heads,
        group=-(-call.group // 8) * 8 if compute == jnp.float32 else call.group,
        dim=dim,
        page_size=page_size,
        pages=pages,
        columns=call.page_table.shape[1],
        fetch=config.fetch,
        tile=config.tile,
        unroll=config.unroll,
        steps=steps,
        strip=min(32 // call.k_pages.dtype.itemsize, page_size),
        scale=call.scale,
        window=call.window,
        soft_cap=call.soft_cap,
        starts=call.starts is not None,
        sinks=call.sink is not None,
        append=append,
        compute=compute,
    )


def deal(
    call: AttentionCall, cores: int, append: bool
) -> tuple[Int32[Array, "G"], Int32[Array, "G"]]:
    """The row of every step of every core, and the next one of that core that has pages, or -1.

    On two cores the longest rows are dealt out like cards, back and forth, so that the sums of
    their lengths differ by less than the longest row. A core that is one short repeats its last.

    ```
    lengths 90 70 50 40 30      core 0: 90 40 30      core 1: 70 50 (50 again: not computed)
    ```
    """
    batch = call.q.shape[0]
    steps = -(-batch // cores)
    first, end = (edge[:, 0] for edge in call.visible())
    end = jnp.where(end <= call.page_table.shape[1] * call.page_size, end, 0)
    rows = order = jnp.arange(batch, dtype=jnp.int32).reshape(1, -1)
    if cores > 1:
        order = jnp.argsort(first - end).astype(jnp.int32)
        order = jnp.concatenate([order, jnp.full(steps * cores - batch, -1, jnp.int32)])
        order = order.reshape(steps, cores)
        order = jnp.where(jnp.arange(steps)[:, None] % 2 == 1, order[:, ::-1], order).T
        rows = order.at[:, -1].set(jnp.where(order[:, -1] < 0, order[:, -2], order[:, -1]))
    live = (end > 0) if append else (end > jnp.maximum(first, 0))
    step = jnp.where(live[rows] & (order >= 0), jnp.arange(steps, dtype=jnp.int32), steps)
    later = jax.lax.cummin(step, axis=1, reverse=True)
    later = jnp.concatenate([later[:, 1:], jnp.full((cores, 1), steps, jnp.int32)], axis=1)
    found = jnp.take_along_axis(rows, jnp.minimum(later, steps - 1), axis=1)
    return rows.reshape(-1), jnp.where(later < steps, found, -1).reshape(-1)
