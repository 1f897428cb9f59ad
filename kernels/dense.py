"""EasyDeL's dense decode call, as a view over the paged op."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, TypeAlias, overload

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .annotations import Backends, Implementation, Lengths, Sinks, Window
from .arguments import backend_names
from .checks import AnyArray, check_axes, check_float, check_index, check_twins, concrete
from .op import paged_attention

__all__ = ["decode_attention"]

Query: TypeAlias = Float[AnyArray, "B 1 Hq D"] | Float[AnyArray, "B Hq D"]
Dense: TypeAlias = Float[AnyArray, "B S Hk D"]


@overload
def decode_attention(
    query: Query, key: Dense, value: Dense, starts: Lengths, ends: Lengths, *,
    softmax_scale: float | None = None, sliding_window: Window | None = None,
    logits_soft_cap: float | None = None, softmax_aux: Sinks | None = None,
    return_lse: Literal[False] = False, implementation: Backends | None = None,
) -> Array: ...  # fmt: skip
@overload
def decode_attention(
    query: Query, key: Dense, value: Dense, starts: Lengths, ends: Lengths, *,
    softmax_scale: float | None = None, sliding_window: Window | None = None,
    logits_soft_cap: float | None = None, softmax_aux: Sinks | None = None,
    return_lse: Literal[True], implementation: Backends | None = None,
) -> tuple[Array, Array]: ...  # fmt: skip
@overload
def decode_attention(
    query: Query, key: Dense, value: Dense, starts: Lengths, ends: Lengths, *,
    softmax_scale: float | None = None, sliding_window: Window | None = None,
    logits_soft_cap: float | None = None, softmax_aux: Sinks | None = None,
    return_lse: bool, implementation: Backends | None = None,
) -> Array | tuple[Array, Array]: ...  # fmt: skip
def decode_attention(
    query: Query,
    key: Dense,
    value: Dense,
    starts: Lengths,
    ends: Lengths,
    *,
    softmax_scale: float | None = None,
    sliding_window: Window | None = None,
    logits_soft_cap: float | None = None,
    softmax_aux: Sinks | None = None,
    return_lse: bool = False,
    implementation: Implementation | Sequence[str] | None = None,
) -> Array | tuple[Array, Array]:
    """One query token per row over a dense cache: the tokens `starts[b] <= i < ends[b]`.

    The contract is that of `paged_attention`. The cache is not copied: `[B, S, Hk, D]` is read as
    B * S pages of one token.

    Args:
      query: `[B, 1, Hq, D]` or `[B, Hq, D]`, at position `ends[b] - 1`.
      key: `[B, S, Hk, D]`.
      value: like `key`.
      starts: int32 `[B]`, first visible token, 0 or more.
      ends: int32 `[B]`, end of the range, `0 .. S`; a row with `ends <= starts` gives zeros.
      softmax_scale: None: `D ** -0.5`.
      sliding_window: an int W, the W newest tokens with the query's own; or `(left, right)`, left
        + 1 tokens. **EasyDeL's int w means (w, w)**, one token more than an int here.
      logits_soft_cap: c > 0; logits become `c * tanh(logits / c)`.
      softmax_aux: sinks `[K]`, `[Hk, K]` or `[Hq, K]`, in the denominator only; one axis of length
        Hq > 1 is refused, as in `paged_attention`.
      return_lse: also return the natural-log sums without sinks, float32 `[B, Hq]`, with the T
        axis of `query` where it has one.
      implementation: as in `paged_attention`.

    Returns:
      out like `query`, or `(out, lse)`.

    Raises:
      TypeError, ValueError, NotImplementedError, ExceptionGroup: as `paged_attention`.

    Examples:
      >>> import jax.numpy as jnp
      >>> cache = jnp.ones((2, 16, 1, 8))
      >>> starts, ends = jnp.array([0, 3]), jnp.array([16, 7])
      >>> decode_attention(jnp.ones((2, 1, 4, 8)), cache, cache, starts, ends).shape
      (2, 1, 4, 8)
    """
    check_float("query", query)
    check_float("key", key)
    check_float("value", value)
    if len(query.shape) not in (3, 4):
        raise ValueError(f"query must be [B, 1, Hq, D] or [B, Hq, D]; got shape {query.shape}")
    check_axes("query", query, "B, Hq, D" if len(query.shape) == 3 else "B, T, Hq, D", T=1)
    rows, dim = query.shape[0], query.shape[-1]
    check_axes("key", key, "B, S, Hk, D", B=rows, D=dim)
    check_axes("value", value, "B, S, Hk, D", B=rows, D=dim)
    check_twins("value", value, "key", key)
    _check_bounds("starts", starts, rows, None)
    _check_bounds("ends", ends, rows, key.shape[1])
    return _attend(
        query,
        key,
        value,
        starts,
        ends,
        softmax_aux,
        scale=softmax_scale,
        sliding_window=sliding_window,
        soft_cap=logits_soft_cap,
        return_lse=return_lse,
        implementation=backend_names(implementation),
    )


def _check_bounds(name: str, index: Any, rows: int, tokens: int | None) -> None:
    check_index(name, index)
    check_axes(name, index, "B", B=rows)
    values = concrete(index)
    if values is None or not values.size:
        return
    if tokens is None and values.min() < 0:
        raise ValueError(f"{name} must be >= 0; got {values.min()}")
    if tokens is not None and not (0 <= values.min() and values.max() <= tokens):
        wrong = values.min() if values.min() < 0 else values.max()
        raise ValueError(f"{name} must be in 0 .. S = {tokens}; got {wrong}")


# Compiled as one, because the reshapes are views only inside a compiled function.
@partial(
    jax.jit,
    static_argnames=("scale", "sliding_window", "soft_cap", "return_lse", "implementation"),
)
def _attend(
    query: Array,
    key: Array,
    value: Array,
    starts: Array,
    ends: Array,
    sinks: Array | None,
    **options: Any,
) -> Array | tuple[Array, Array]:
    rows, tokens, heads, dim = key.shape
    pool = (rows * tokens, heads, 1, dim)
    table = jnp.arange(rows * tokens, dtype=jnp.int32).reshape(rows, tokens)
    return paged_attention(
        query,
        key.reshape(pool),
        value.reshape(pool),
        table,
        ends,
        starts=starts,
        sinks=sinks,
        **options,
    )
