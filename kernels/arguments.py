"""What an attention call may say: its arguments, checked once for every backend."""

from typing import Any, TypeAlias

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Int32

from . import dispatch
from .checks import (
    check_axes,
    check_float,
    check_index,
    check_live,
    check_number,
    check_twins,
    concrete,
)
from .eight_bits import is_eight_bits
from .merge import check_sinks
from .placement import Placement
from .record import StaticOptions
from .shared_prefix import SharedPrefix

__all__ = [
    "backend_names",
    "check_call",
    "check_fixed_scales",
    "check_layer",
    "check_order",
    "check_scales",
    "known_layer",
    "new_slots",
    "static_options",
]

Axes: TypeAlias = tuple[int, ...]


def new_slots(slots: Any, axes: str, sizes: dict[str, int]) -> Any:
    """`slots` as an array of these axes, or None where all tokens are new."""
    if slots is None and axes == "B, T" and sizes["T"] > 1:
        raise ValueError(
            f"slots must say which of the T = {sizes['T']} tokens of each row are new: a row that "
            "brings fewer would have older tokens overwritten; pass slots [B, T], such as those of "
            'a DecodeBatch, or query_lens [B], or slots="all" where every row brings T new tokens'
        )
    if slots is None or (isinstance(slots, str) and slots == "all"):
        return None
    if isinstance(slots, str):
        raise ValueError(f'slots must be an array or "all"; got {slots!r}')
    check_index("slots", slots)
    check_axes("slots", slots, axes, B=sizes["B"], T=sizes["T"])
    return slots


def check_order(k_pages: Any, v_pages: Any, q: Any, k: Any, v: Any) -> None:
    """Raise ValueError if these five are in fact q, k, v, k_pages and v_pages, in that order.

    With T > 1 the ranks are alike, so what is wrong would be told of axes that nobody passed.
    """
    pages, pages_twin, queries, new, new_twin = map(np.shape, (k_pages, v_pages, q, k, v))
    if _fit(pages, pages_twin, queries, new, new_twin):
        return
    if _fit(new, new_twin, pages, pages_twin, queries):
        raise ValueError(
            "append_and_attend takes the pages first, (k_pages, v_pages, q, k, v, page_table, "
            f"seq_lens); got k_pages of shape {pages}, q of shape {queries} and k of shape {new}, "
            "which fit the order (q, k, v, k_pages, v_pages, ...)"
        )


def _fit(k_pages: Axes, v_pages: Axes, q: Axes, k: Axes, v: Axes) -> bool:
    """Whether these can be the shapes of one call."""
    return (
        len(k_pages) in (4, 5)
        and len(q) in (3, 4)
        and (k_pages, k) == (v_pages, v)
        and k == (*q[:-2], k_pages[-3], k_pages[-1])
    )


def static_options(
    q: Any,
    page_table: Any,
    page_size: int,
    *,
    scale: Any,
    sliding_window: Any,
    soft_cap: Any,
    implementation: Any,
    batch_invariant: Any,
    placement: Placement | None,
) -> StaticOptions:
    """The options of a call whose arrays are checked, in the one form that is compiled."""
    window = _window(sliding_window)
    if not isinstance(batch_invariant, bool):
        raise TypeError(f"batch_invariant must be a bool; got {type(batch_invariant).__name__}")
    if batch_invariant and q.ndim == 4 and q.shape[1] > 1:
        raise NotImplementedError(
            f"batch_invariant serves one query a row, T = 1; got T = {q.shape[1]}: a kernel for "
            "several rounds otherwise than that for one. Give each token a row of its own, with "
            "its sequence's pages and the length up to it"
        )
    return StaticOptions(
        scale=q.shape[-1] ** -0.5 if scale is None else check_number("scale", scale),
        # A window as wide as the table hides nothing; without it no sum can overflow int32.
        window=None if window is None or window >= page_table.shape[1] * page_size else window,
        soft_cap=None if soft_cap is None else check_number("soft_cap", soft_cap, positive=True),
        implementation=backend_names(implementation),
        # Part of the key of the compiled program: the same shapes may run on CPU and GPU.
        platform=dispatch.default_platform(placement.platform if placement else None),
        placement=placement,
        batch_invariant=batch_invariant,
    )


def check_call(
    k_pages: Any,
    v_pages: Any,
    k_scales: Any,
    v_scales: Any,
    *,
    q: Any,
    page_table: Any,
    seq_lens: Any,
    layer: Any,
    starts: Any,
    sinks: Any,
    query_lens: Any,
    tail_mask: Any,
    shared: Any,
    placement: Placement | None,
) -> None:
    """Raise unless the arrays of a call keep the contract."""
    _check_arrays(q, k_pages, v_pages, layer, placement)
    check_scales(k_pages, k_scales, v_scales)
    pages, kv_heads, page_size = k_pages.shape[-4:-1]
    _check_tables(page_table, seq_lens, starts, q.shape[0], page_size)
    if placement is not None:
        pages //= placement.data_shards  # ids are local to a shard
    _check_values(page_table, seq_lens, starts, pages, page_size)
    if sinks is not None:
        check_sinks(sinks, q.shape[-2], kv_heads)
    _check_new(query_lens, tail_mask, q.shape[0], q.shape[1] if q.ndim == 4 else 1)
    if shared is not None:
        _check_shared(shared, page_table)


def _check_shared(shared: Any, page_table: Any) -> None:
    """Raise unless this is a plan for rows and tables of these shapes."""
    if not isinstance(shared, SharedPrefix):
        raise TypeError(f"shared must be a SharedPrefix; got {type(shared).__name__}")
    rows, columns = page_table.shape
    parts, members = np.shape(shared.members)
    for name, want in (
        ("page_table", (parts, columns)),
        ("seq_lens", (parts,)),
        ("members", (parts, members)),
        ("place", (rows,)),
        ("starts", (rows,)),
    ):
        array = getattr(shared, name)
        check_index(f"shared.{name}", array)
        if np.shape(array) != want:
            raise ValueError(
                f"shared.{name} must be {list(want)} for a page_table [B, P] = [{rows}, {columns}];"
                f" got shape {np.shape(array)}: make the plan of this page_table"
            )


def _check_new(query_lens: Any, tail_mask: Any, rows: int, tokens: int) -> None:
    """Raise unless what is said of the T new tokens of a row keeps the contract."""
    if query_lens is not None:
        check_index("query_lens", query_lens)
        check_axes("query_lens", query_lens, "B", B=rows)
        values = concrete(query_lens)
        if values is not None and values.size and not 0 <= values.min() <= values.max() <= tokens:
            row = int(((values < 0) | (values > tokens)).argmax())
            raise ValueError(
                f"query_lens must be in 0 .. T = {tokens}; got {values[row]} in row {row}"
            )
    if tail_mask is not None:
        dtype = getattr(tail_mask, "dtype", None)
        if dtype != np.bool:
            came = type(tail_mask).__name__ if dtype is None else f"dtype {dtype}"
            raise TypeError(
                f"tail_mask must be an array of bool; got {came}: convert it with "
                "np.asarray(x, bool)"
            )
        if tuple(tail_mask.shape) != (want := (rows, tokens, tokens)):
            raise ValueError(f"tail_mask must be [B, T, T] = {want}; got shape {tail_mask.shape}")


def _check_arrays(
    q: Any, k_pages: Any, v_pages: Any, layer: Any, placement: Placement | None
) -> None:
    check_float("q", q)
    for name, array in (("k_pages", k_pages), ("v_pages", v_pages)):
        if getattr(array, "dtype", None) is None:
            raise TypeError(f"{name} must be an array; got {type(array).__name__}")
    if q.ndim not in (3, 4) or (q.ndim == 4 and q.shape[1] == 0):
        raise ValueError(f"q must be [B, Hq, D] or [B, T, Hq, D] with T >= 1; got shape {q.shape}")
    if layer is None:
        check_axes("k_pages", k_pages, "N, Hk, S, D")
    else:
        check_axes("k_pages", k_pages, "L, N, Hk, S, D")
        check_layer(layer, k_pages.shape[0])
    check_twins("v_pages", v_pages, "k_pages", k_pages)
    check_live("k_pages", k_pages)
    check_live("v_pages", v_pages)
    if 0 in k_pages.shape:
        raise ValueError(f"k_pages must have no empty axis; got shape {k_pages.shape}")
    heads, kv_heads = q.shape[-2], k_pages.shape[-3]
    if q.shape[-1] != k_pages.shape[-1]:
        raise ValueError(
            f"q and k_pages must have the same D; got {q.shape[-1]} in q {q.shape} and "
            f"{k_pages.shape[-1]} in k_pages {k_pages.shape}"
        )
    if placement is not None:
        placement.check(q.shape[0], heads)
    if heads == 0 or heads % kv_heads:
        raise ValueError(
            f"Hq must be a multiple of Hk; got Hq = {heads} in q {q.shape} and Hk = {kv_heads} "
            f"in k_pages {k_pages.shape}"
        )


def check_scales(k_pages: Any, k_scales: Any, v_scales: Any) -> None:
    """Raise unless pages of 8 bits, and no others, have scales: float32, one for each token."""
    if k_scales is None and v_scales is None:
        return
    if not is_eight_bits(k_pages.dtype):
        raise ValueError(
            f"k_scales and v_scales are for pages of int8 or float8_e4m3fn; got pages of dtype "
            f"{k_pages.dtype}"
        )
    for name, scales in (("k_scales", k_scales), ("v_scales", v_scales)):
        if scales is None:
            raise ValueError(f"k_scales and v_scales go together; {name} is missing")
        if getattr(scales, "dtype", None) != np.float32:
            got = getattr(scales, "dtype", type(scales).__name__)
            raise TypeError(f"{name} must be an array of float32; got {got}")
        if scales.shape != (want := k_pages.shape[:-1]):
            raise ValueError(
                f"{name} must be the pages without their last axis, {want}; got shape "
                f"{scales.shape}"
            )
        check_live(name, scales)


def check_fixed_scales(fixed_scales: Any, k_pages: Any, k_scales: Any) -> None:
    """Raise unless these are a pair of float32 `[Hk]`, for pages that have scales."""
    if fixed_scales is None:
        return
    if k_scales is None:
        raise ValueError("fixed_scales are for pages of 8 bits, which have k_scales and v_scales")
    if not isinstance(fixed_scales, tuple) or len(fixed_scales) != 2:
        got = type(fixed_scales).__name__
        got = f"{len(fixed_scales)} things" if isinstance(fixed_scales, tuple) else f"a {got}"
        raise TypeError(f"fixed_scales must be a tuple of two arrays, for keys, values; got {got}")
    for name, scales in zip(("fixed_scales[0]", "fixed_scales[1]"), fixed_scales, strict=True):
        check_float(name, scales)
        check_axes(name, scales, "Hk", Hk=k_pages.shape[-3])
        values = concrete(scales)
        if values is not None and not (np.isfinite(values) & (values > 0)).all():
            raise ValueError(f"{name} must be finite and > 0; got {values}")


def check_layer(layer: Any, layers: int) -> None:
    """Raise unless `layer` is a Python int in `0 .. layers-1` or an integer scalar array."""
    python_int = isinstance(layer, int) and not isinstance(layer, bool)
    if not python_int:
        check_index("layer", layer)
        if np.shape(layer):
            raise ValueError(f"layer must be a scalar; got shape {np.shape(layer)}")
    value = layer if python_int else concrete(layer)
    if value is not None and not 0 <= int(value) < layers:
        raise ValueError(f"layer must be in 0 .. {layers - 1}; got {int(value)}")


def known_layer(layer: Int[Array, ""], layers: int) -> tuple[Int32[Array, ""], Bool[Array, ""]]:
    """`layer` as int32 in `0 .. layers-1`, and whether the one given was outside.

    A traced number cannot raise, and no backend may follow one that leads out of the pool.
    """
    inside = jnp.clip(layer, 0, layers - 1)
    return inside.astype(jnp.int32), inside != layer


def _check_tables(page_table: Any, seq_lens: Any, starts: Any, rows: int, page_size: int) -> None:
    check_index("page_table", page_table)
    check_axes("page_table", page_table, "B, P", B=rows)
    if page_table.shape[1] == 0 or (page_table.shape[1] + 1) * page_size >= 2**31:
        raise ValueError(
            f"page_table must be [B, P] with P >= 1 and (P + 1) * S < 2**31, so that positions fit "
            f"int32; got P = {page_table.shape[1]} and S = {page_size}"
        )
    check_index("seq_lens", seq_lens)
    check_axes("seq_lens", seq_lens, "B", B=rows)
    if starts is not None:
        check_index("starts", starts)
        check_axes("starts", starts, "B", B=rows)


def _check_values(page_table: Any, seq_lens: Any, starts: Any, pages: int, page_size: int) -> None:
    if starts is not None and (values := concrete(starts)) is not None and (values < 0).any():
        raise ValueError(f"starts must be >= 0; got {values.min()} in row {values.argmin()}")
    lens = concrete(seq_lens)
    if lens is None:
        return
    capacity = page_table.shape[1] * page_size
    wrong = (lens < 0) | (lens > capacity)
    if wrong.any():
        row = int(wrong.argmax())
        raise ValueError(
            f"seq_lens must be in 0 .. P * S = {capacity}; got {lens[row]} in row {row}"
        )
    table = concrete(page_table)
    if table is None:
        return
    # Only what a row's length reaches: allocators leave anything in the entries past it.
    used = np.arange(table.shape[1]) * page_size < lens[:, None]
    wrong = used & ((table < 0) | (table >= pages))
    if wrong.any():
        row, column = (int(i[0]) for i in np.nonzero(wrong))
        raise ValueError(
            f"page_table must hold page ids in 0 .. N-1 = {pages - 1} as far as seq_lens reaches; "
            f"got {table[row, column]} in row {row}, column {column} (length {lens[row]})"
        )


def _window(window: Any) -> int | None:
    """`sliding_window` as a count of tokens, the query's own included."""
    if window is None:
        return None
    pair = isinstance(window, tuple) and len(window) == 2
    numbers: tuple[Any, ...] = window if pair else (window,)
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, int | np.integer):
            raise TypeError(
                "sliding_window must be an int or a pair (left, right) of ints; got "
                f"{window if pair else type(window).__name__}"
            )
    if pair and min(numbers) < 0:
        raise ValueError(f"sliding_window (left, right) must be >= 0; got {window}")
    if not pair and numbers[0] < 1:
        raise ValueError(f"sliding_window counts the query itself, so it is >= 1; got {window}")
    return int(numbers[0]) + 1 if pair else int(numbers[0])


def backend_names(implementation: Any) -> tuple[str, ...] | None:
    """`implementation` as a tuple, which `jit` can take as a static argument."""
    if implementation is None:
        return None
    names = (implementation,) if isinstance(implementation, str) else tuple(implementation)
    if not all(isinstance(name, str) for name in names):
        raise TypeError(f"implementation must be a name or a sequence of names; got {names}")
    return names
