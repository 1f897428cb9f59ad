"""The attention op: from a public call to one canonical record per device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, Unpack, overload

import jax
import jax.numpy as jnp
from jaxtyping import Array

from . import attend_shared
from .annotations import (
    AttentionOptions,
    FixedScales,
    Implementation,
    Layer,
    Lengths,
    NewTokens,
    Pages,
    PageTable,
    Queries,
    Scales,
    Sinks,
    Slots,
    TailMask,
    Window,
)
from .arguments import (
    check_call,
    check_fixed_scales,
    check_order,
    known_layer,
    new_slots,
    static_options,
)
from .checks import check_axes, check_float, narrow
from .merge import sink_mass
from .placement import Placement
from .record import POOLS, AttentionCall, StaticOptions
from .shared_prefix import PLAN_AXES, SharedPrefix
from .write import Pools

__all__ = ["append_and_attend", "paged_attention"]


@overload
def paged_attention(
    q: Queries, k_pages: Pages, v_pages: Pages, page_table: PageTable, seq_lens: Lengths, *,
    k_scales: Scales | None = None, v_scales: Scales | None = None,
    layer: Layer | None = None, placement: Placement | None = None,
    return_lse: Literal[False] = False, **options: Unpack[AttentionOptions],
) -> Array: ...  # fmt: skip
@overload
def paged_attention(
    q: Queries, k_pages: Pages, v_pages: Pages, page_table: PageTable, seq_lens: Lengths, *,
    k_scales: Scales | None = None, v_scales: Scales | None = None,
    layer: Layer | None = None, placement: Placement | None = None,
    return_lse: Literal[True], **options: Unpack[AttentionOptions],
) -> tuple[Array, Array]: ...  # fmt: skip
@overload
def paged_attention(
    q: Queries, k_pages: Pages, v_pages: Pages, page_table: PageTable, seq_lens: Lengths, *,
    k_scales: Scales | None = None, v_scales: Scales | None = None,
    layer: Layer | None = None, placement: Placement | None = None,
    return_lse: bool, **options: Unpack[AttentionOptions],
) -> Array | tuple[Array, Array]: ...  # fmt: skip
def paged_attention(
    q: Queries,
    k_pages: Pages,
    v_pages: Pages,
    page_table: PageTable,
    seq_lens: Lengths,
    *,
    k_scales: Scales | None = None,
    v_scales: Scales | None = None,
    layer: Layer | None = None,
    starts: Lengths | None = None,
    scale: float | None = None,
    sliding_window: Window | None = None,
    soft_cap: float | None = None,
    sinks: Sinks | None = None,
    query_lens: Lengths | None = None,
    tail_mask: TailMask | None = None,
    shared: SharedPrefix | None = None,
    batch_invariant: bool = False,
    return_lse: bool = False,
    implementation: Implementation | Sequence[str] | None = None,
    placement: Placement | None = None,
) -> Array | tuple[Array, Array]:
    """Causal attention of the newest T tokens of every row over its pages.

    Row b's query t sits at position `p = seq_lens[b] - T + t` and sees the tokens i with
    `max(starts[b], p - left) <= i <= p`. Token i lies in page `page_table[b, i // S]` at offset
    `i % S`. Logits are `scale * q.k`, then soft-capped, then a float32 softmax. A query that sees
    nothing (an empty row, or padding in front of a short one) gives zeros and lse -inf.

    What lies in unused slots, free pages, the null page and the table entries past a row's last
    page changes no bit of the result.

    Args:
      q: `[B, Hq, D]`, the newest token of each row, or `[B, T, Hq, D]`, the newest T.
      k_pages: `[N, Hk, S, D]`, or `[L, N, Hk, S, D]` with `layer`; float32, bfloat16 or float16; or
        int8 or float8_e4m3fn, with scales.
      v_pages: like `k_pages`.
      page_table: int32 `[B, P]`, page ids in `0 .. N-1` as far as `seq_lens` reaches.
      seq_lens: int32 `[B]`, tokens in the cache including the T new ones, `0 .. P * S`.
      k_scales: float32 `[N, Hk, S]`, or with L in front: the keys of pages of 8 bits are their
        numbers times these, one for each token and KV head.
      v_scales: like `k_scales`, for the values.
      layer: which layer of a stacked pool, a Python int or an int32 scalar (it may be traced).
      starts: int32 `[B]`, first visible token of each row; None: 0.
      scale: None: `D ** -0.5`.
      sliding_window: an int W >= 1, the W newest tokens **with the query itself** (Mistral,
        Gemma); or EasyDeL's pair `(left, right)`, left + 1 tokens, where right has no effect on
        causal attention.
      soft_cap: c > 0; logits become `c * tanh(logits / c)`.
      sinks: extra logits of the denominator, neither scaled nor capped: `[K]` for all heads,
        `[Hk, K]` or `[Hq, K]`. One axis of length Hq > 1 is refused: checkpoints with one sink for
        each head (gpt-oss) have it, and mean `[Hq, 1]`.
      query_lens: int32 `[B]`, `0 .. T`: how many of the T queries of a row are its own, the last
        ones. Those in front are padding: they cost no work, and give zeros and lse -inf. None: T.
      tail_mask: bool `[B, T, T]`, for trees of drafts: `tail_mask[b, t, u]` says whether new token
        t sees new token u of its row, where `u <= t`. The tokens in front of the row's own new
        ones stay visible; and a window counts along the branch (docs/attention.md). None: all are.
      shared: which rows begin with the same pages (`shared_prefix_plan`): these are read once for
        all of them. The result is the same but for rounding. With T > 1, `starts`, `sliding_window`
        or more than 32 query heads a KV head, rows read alone.
      batch_invariant: the bits of a row follow from its query, its tokens and the shapes of the
        call: not from other rows, from where in the batch it is, or from page ids. For T = 1.
      return_lse: also return the natural log of the softmax denominator **without sinks**, so
        that parts over disjoint tokens merge exactly (`merge_attention`).
      implementation: a backend name, or several to try in order; None: the platform's own list.
      placement: how the pool lies on a mesh (`KVCache` passes its own); every device then attends
        with its own heads, and with a data axis over its own rows and pages. No device talks.

    Returns:
      out like `q`, or `(out, lse)` with lse float32 `[B, Hq]` or `[B, T, Hq]`.

    Raises:
      TypeError: an array or option of the wrong type, such as float lengths.
      ValueError: shapes that disagree; and, where values are concrete, lengths outside `0 .. P * S`
        or page ids outside the pool. Under `jit` such a row comes out as NaN (one of a length below
        0 as an empty one), and so do all rows of a call whose traced `layer` is outside the pool.
      NotImplementedError: differentiation, because this op is for inference; and a call that the
        only backend asked for does not serve, with its reason.
      ExceptionGroup: none of several backends serves the call; it holds the reason of each.

    Examples:
      >>> import jax.numpy as jnp
      >>> pages = jnp.ones((3, 1, 4, 8))  # 3 pages, 1 KV head, 4 tokens a page, D = 8
      >>> table, lens = jnp.array([[2, 1]]), jnp.array([5])
      >>> paged_attention(jnp.ones((1, 2, 8)), pages, pages, table, lens).shape
      (1, 2, 8)
    """
    pools = (k_pages, v_pages, k_scales, v_scales)
    arrays = dict(
        q=q, page_table=page_table, seq_lens=seq_lens, layer=layer, starts=starts, sinks=sinks,
        query_lens=query_lens, tail_mask=tail_mask, shared=shared,
    )  # fmt: skip
    options = _checked(
        pools, arrays, placement, scale=scale, sliding_window=sliding_window, soft_cap=soft_cap,
        implementation=implementation, batch_invariant=batch_invariant,
    )  # fmt: skip
    out, lse = _attend(_held(pools), arrays, options)
    return (out, lse) if return_lse else out


@overload
def append_and_attend(
    k_pages: Pages, v_pages: Pages, q: Queries, k: NewTokens, v: NewTokens,
    page_table: PageTable, seq_lens: Lengths, *, slots: Slots | Literal["all"] | None = None,
    k_scales: None = None, v_scales: None = None, fixed_scales: None = None,
    layer: Layer | None = None, placement: Placement | None = None,
    return_lse: Literal[False] = False, **options: Unpack[AttentionOptions],
) -> tuple[Array, Array, Array]: ...  # fmt: skip
@overload
def append_and_attend(
    k_pages: Pages, v_pages: Pages, q: Queries, k: NewTokens, v: NewTokens,
    page_table: PageTable, seq_lens: Lengths, *, slots: Slots | Literal["all"] | None = None,
    k_scales: None = None, v_scales: None = None, fixed_scales: None = None,
    layer: Layer | None = None, placement: Placement | None = None,
    return_lse: Literal[True], **options: Unpack[AttentionOptions],
) -> tuple[Array, Array, Array, Array]: ...  # fmt: skip
@overload
def append_and_attend(
    k_pages: Pages, v_pages: Pages, q: Queries, k: NewTokens, v: NewTokens,
    page_table: PageTable, seq_lens: Lengths, *, slots: Slots | Literal["all"] | None = None,
    k_scales: Scales | None = None, v_scales: Scales | None = None,
    fixed_scales: FixedScales | None = None,
    layer: Layer | None = None, placement: Placement | None = None,
    return_lse: bool = False, **options: Unpack[AttentionOptions],
) -> tuple[Array, ...]: ...  # fmt: skip
def append_and_attend(
    k_pages: Pages,
    v_pages: Pages,
    q: Queries,
    k: NewTokens,
    v: NewTokens,
    page_table: PageTable,
    seq_lens: Lengths,
    *,
    slots: Slots | Literal["all"] | None = None,
    k_scales: Scales | None = None,
    v_scales: Scales | None = None,
    fixed_scales: FixedScales | None = None,
    layer: Layer | None = None,
    starts: Lengths | None = None,
    scale: float | None = None,
    sliding_window: Window | None = None,
    soft_cap: float | None = None,
    sinks: Sinks | None = None,
    query_lens: Lengths | None = None,
    tail_mask: TailMask | None = None,
    shared: SharedPrefix | None = None,
    batch_invariant: bool = False,
    return_lse: bool = False,
    implementation: Implementation | Sequence[str] | None = None,
    placement: Placement | None = None,
) -> tuple[Array, ...]:
    """`append_kv` and `paged_attention` of the same tokens as one operation; donates the pages.

    K and V of the newest T tokens of row b go to the positions `seq_lens[b] - T + t`, found through
    the page table; then q attends as in `paged_attention`. With T = 1 on GPU and TPU both are one
    launch. Padding (a row of length 0, a position in front of its sequence, a token in front of
    those that `query_lens` counts) is written nowhere, nor is a token whose slot lies in the null
    page: there q attends to what the cache already holds. Inside `jit` it updates in place when the
    caller donates the pool; outside, the given pages are consumed.

    Args:
      k_pages: `[N, Hk, S, D]`, or `[L, N, Hk, S, D]` with `layer`.
      v_pages: like `k_pages`.
      q: `[B, Hq, D]`, or `[B, T, Hq, D]`.
      k: `[B, Hk, D]`, with the T axis of `q` where it has one; converted to the pages' dtype, or
        quantised to it.
      v: like `k`.
      page_table: int32 `[B, P]`. The pages that are written belong to one row only.
      seq_lens: int32 `[B]`, tokens of each row, the new ones included.
      slots: int32 `[B]` or `[B, T]` as for `append_kv`: which of the tokens are new, `slots >= S`;
        where those lie, the page table says. "all": every one is. None says the same where T = 1 or
        with `query_lens`, which leave a row's padding out; else it is refused, because a row that
        brings fewer than T tokens would have older ones of its own overwritten by its padding.
      k_scales: float32 `[N, Hk, S]`, of pages of 8 bits; the new tokens get theirs, their largest
        number over that of the dtype. Donated, as the pages are.
      v_scales: like `k_scales`.
      fixed_scales: two float32 `[Hk]`, of keys and of values: what has been calibrated, for all
        tokens, instead of what follows from each. It costs a launch.

    All other arguments are those of `paged_attention`.

    Returns:
      `(out, k_pages, v_pages)`, or `(out, lse, k_pages, v_pages)`; with scales these follow,
      `(..., k_scales, v_scales)`.

    Raises:
      TypeError, ValueError, NotImplementedError, ExceptionGroup: as `paged_attention`; nothing is
        written then.

    Examples:
      >>> import jax.numpy as jnp
      >>> pages = jnp.zeros((3, 1, 4, 8))
      >>> new, table, lens = jnp.ones((1, 1, 8)), jnp.array([[2, 1]]), jnp.array([5])
      >>> out, k, v = append_and_attend(pages, pages + 0, new, new, new, table, lens)
      >>> float(k[1, 0, 0, 0]), round(float(out[0, 0, 0]), 3)
      (1.0, 0.809)
    """
    check_order(k_pages, v_pages, q, k, v)
    pools = (k_pages, v_pages, k_scales, v_scales)
    arrays = dict(
        q=q, page_table=page_table, seq_lens=seq_lens, layer=layer, starts=starts, sinks=sinks,
        query_lens=query_lens, tail_mask=tail_mask, shared=shared,
    )  # fmt: skip
    options = _checked(
        pools, arrays, placement, scale=scale, sliding_window=sliding_window, soft_cap=soft_cap,
        implementation=implementation, batch_invariant=batch_invariant,
    )  # fmt: skip
    axes = "B, Hk, D" if len(q.shape) == 3 else "B, T, Hk, D"
    sizes = dict(B=q.shape[0], T=q.shape[1], Hk=k_pages.shape[-3], D=q.shape[-1])
    for name, new in (("k", k), ("v", v)):
        check_float(name, new)
        check_axes(name, new, axes, **{axis: sizes[axis] for axis in axes.split(", ")})
    if slots is None and query_lens is not None:
        slots = "all"  # of a row's own tokens
    slots = new_slots(slots, axes.removesuffix(", Hk, D"), sizes)
    check_fixed_scales(fixed_scales, k_pages, k_scales)
    new = dict(k=k, v=v, slots=slots, fixed_scales=fixed_scales)
    out, lse, *written = _append_and_attend(_held(pools), new, arrays, options)
    return (out, lse, *written) if return_lse else (out, *written)


def _checked(
    pools: tuple[Any, ...], arrays: dict[str, Any], placement: Placement | None, **options: Any
) -> StaticOptions:
    """The static options of a call that keeps the contract; what does not is raised."""
    check_call(*pools, **arrays, placement=placement)
    q, table, page_size = arrays["q"], arrays["page_table"], pools[0].shape[-2]
    return static_options(q, table, page_size, placement=placement, **options)


def _held(pools: tuple[Any, ...]) -> tuple[Any, ...]:
    """Those that there are."""
    return tuple(pool for pool in pools if pool is not None)


# The arrays of an `AttentionCall` and their axes, which say how each is split on a mesh. Those of
# pools have no L where the caller's have none.
_AXES = dict(
    q="B, T, Hq, D",
    k_pages="L, N, Hk, S, D",
    v_pages="L, N, Hk, S, D",
    k_scales="L, N, Hk, S",
    v_scales="L, N, Hk, S",
    layer="",
    page_table="B, P",
    seq_lens="B",
    starts="B",
    sink="Hq",
    query_lens="B",
    tail_mask="B, T, T",
)
_SHARED = "shared_"  # before the names of the arrays of a plan
_AXES |= {_SHARED + name: axes for name, axes in PLAN_AXES.items()}
# Those of the new tokens, which of them are new, and their fixed scales.
_NEW_AXES = dict(k="B, T, Hk, D", v="B, T, Hk, D", slots="B, T", k_fixed="Hk", v_fixed="Hk")


# One compiled function for eager calls, one cached trace for a model's many equal layers.
@partial(jax.jit, static_argnames="options")
def _attend(pools: Pools, given: dict[str, Any], options: StaticOptions) -> tuple[Array, Array]:
    arrays, q = _canonical(pools, **given), given["q"]

    # XLA would differentiate its backend without a word, and no kernel can: all refuse alike.
    @jax.custom_jvp
    def run(arrays: dict[str, Array]) -> tuple[Array, Array]:
        def local(*own: Array) -> tuple[Array, Array]:
            return attend_shared.attend(*_record(arrays, own, options), options.implementation)

        return _placed(options.placement, local, arrays, {})

    run.defjvp(_no_derivative)
    out, lse = run(arrays)
    return out.reshape(q.shape), lse.reshape(q.shape[:-1])


@partial(jax.jit, static_argnames="options", donate_argnames="pools")
def _append_and_attend(
    pools: Pools, tokens: dict[str, Any], given: dict[str, Any], options: StaticOptions
) -> tuple[Array, ...]:
    arrays, q = _canonical(pools, **given), given["q"]
    new = _new_tokens(arrays, **tokens)

    @jax.custom_jvp
    def run(arrays: dict[str, Array], new: dict[str, Array]) -> tuple[Array, ...]:
        def local(*own: Array) -> tuple[Array, ...]:
            call, shared = _record(arrays, own[: len(arrays)], options)
            newest = dict(zip(new, own[len(arrays) :], strict=True))
            fixed = (newest["k_fixed"], newest["v_fixed"]) if "k_fixed" in newest else None
            out, lse, *written = attend_shared.append_and_attend(
                call,
                newest["k"],
                newest["v"],
                newest.get("slots"),
                shared,
                fixed_scales=fixed,
                names=options.implementation,
            )
            written = [pool.reshape(pool.shape[not call.stacked :]) for pool in written]
            # Else XLA lets a later write into these pages begin before the loop that reads them,
            # and copies the pool for it (openxla/xla 45912).
            return jax.lax.optimization_barrier((out, lse, *written))

        return _placed(options.placement, local, arrays, new)

    run.defjvp(_no_derivative)
    out, lse, *written = run(arrays, new)
    return out.reshape(q.shape), lse.reshape(q.shape[:-1]), *written


def _record(
    names: dict[str, Array], own: tuple[Array, ...], options: StaticOptions
) -> tuple[AttentionCall, SharedPrefix | None]:
    """The call of one device, from its parts of the arrays, and which of its rows share a prefix;
    what was not given is None."""
    given: dict[str, Any] = dict.fromkeys(_AXES) | dict(zip(names, own, strict=True))
    plan = {name: given.pop(_SHARED + name) for name in PLAN_AXES}
    shared = None if plan["place"] is None else SharedPrefix(**plan)
    stacked = given["layer"] is not None
    if not stacked:
        given["layer"] = jnp.int32(0)
        held = {name: given[name] for name in POOLS if given[name] is not None}
        given |= {name: pool.reshape(1, *pool.shape) for name, pool in held.items()}
    call = AttentionCall(
        **given,
        scale=options.scale,
        window=options.window,
        soft_cap=options.soft_cap,
        platform=options.platform,
        stacked=stacked,
        batch_invariant=options.batch_invariant,
    )
    return call, shared


def _placed(
    placement: Placement | None,
    local: Callable[..., Any],
    arrays: dict[str, Array],
    new: dict[str, Array],
) -> Any:
    """`local` of the arrays and the new tokens, on every device of the mesh if there is one."""
    args = (*arrays.values(), *new.values())
    if placement is None:
        return local(*args)
    axes = _AXES | _NEW_AXES
    if "layer" not in arrays:
        axes |= {name: axes[name].removeprefix("L, ") for name in POOLS}
    inputs = [axes[name] for name in (*arrays, *new)]
    written = [axes[name] for name in POOLS if new and name in arrays]
    return placement.run(local, inputs, ("B, T, Hq, D", "B, T, Hq", *written), *args)


def _canonical(
    pools: Pools,
    q: Array,
    page_table: Array,
    seq_lens: Array,
    layer: Array | None,
    starts: Array | None,
    sinks: Array | None,
    query_lens: Array | None,
    tail_mask: Array | None,
    shared: SharedPrefix | None,
) -> dict[str, Array]:
    """The arrays of the record; what is not given is left out, so that no backend computes it.

    Numbers of int64 are brought into the range of int32, and outside stays outside. If the layer is
    outside the pool, every length becomes `P * S + 1`: too long for the table, so every backend
    gives NaN and writes nothing. With T = 1 a row without a query is an empty row. Arrays of int32
    stay as they are; an operation more before a launch of a few microseconds would be felt.
    """
    pages, page_size = pools[0].shape[-4], pools[0].shape[-2]
    capacity = page_table.shape[1] * page_size
    lens = narrow(seq_lens, capacity + 1)
    arrays = dict(q=q if q.ndim == 4 else q[:, None], **dict(zip(POOLS, pools, strict=False)))
    if layer is not None:
        arrays["layer"], outside = known_layer(layer, pools[0].shape[0])
        lens = jnp.where(outside, capacity + 1, lens)
    tokens = arrays["q"].shape[1]
    if query_lens is not None and tokens == 1:
        lens, query_lens = jnp.where(query_lens > 0, lens, 0), None
    arrays |= dict(page_table=narrow(page_table, pages), seq_lens=lens)
    if starts is not None:
        arrays["starts"] = narrow(starts, capacity + 1)
    if sinks is not None:
        arrays["sink"] = sink_mass(sinks, q.shape[-2])
    if query_lens is not None:
        arrays["query_lens"] = narrow(query_lens, tokens + 1)
    if tail_mask is not None:
        arrays["tail_mask"] = jnp.asarray(tail_mask)
    if shared is not None:
        arrays |= {_SHARED + name: jnp.asarray(getattr(shared, name)) for name in PLAN_AXES}
    return arrays


def _new_tokens(
    arrays: dict[str, Array], k: Array, v: Array, slots: Array | None, fixed_scales: Any
) -> dict[str, Array]:
    """The new tokens as backends take them; what is not given is left out."""
    pages, scaled = arrays["k_pages"], "k_scales" in arrays
    shape = (*arrays["q"].shape[:2], *k.shape[-2:])
    k, v = (x.reshape(shape) if scaled else x.reshape(shape).astype(pages.dtype) for x in (k, v))
    new = dict(k=k, v=v)
    if slots is not None:
        new["slots"] = narrow(slots.reshape(shape[:2]), pages.shape[-4] * pages.shape[-2])
    if fixed_scales is not None:
        each = (scales.astype(jnp.float32) for scales in fixed_scales)
        new |= dict(zip(("k_fixed", "v_fixed"), each, strict=True))
    return new


def _no_derivative(primals: Any, tangents: Any) -> Any:
    raise NotImplementedError(
        "paged_attention has no derivative: it reads a cache at inference; use "
        "jax.lax.stop_gradient on its inputs, or a dense attention for training"
    )
