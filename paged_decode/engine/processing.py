"""The user's own change of the logits, inside the compiled step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .rows import RowState

__all__ = ["LogitsRows", "ProcessLogits", "check_process", "processed"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class LogitsRows:
    """What a `ProcessLogits` may know of B rows.

    Attributes:
      tokens: int32 `[B, L]`, prompt and generated tokens of each row, and anything behind them.
      length: int32 `[B]`, how many there are; 0 for a row that nobody has.
      generated: int32 `[B]`, how many of them are behind the prompt.
      seed: uint32 `[B]`, `SamplingParams.seed` of the row.
      args: float32 `[B, A]`, its `SamplingParams.logits_args`, and 0 behind them.
    """

    tokens: Any
    length: Any
    generated: Any
    seed: Any
    args: Any


@runtime_checkable
class ProcessLogits(Protocol):
    """Changes the logits of the next token: a function which JAX traces.

    It sees every row of the engine; what it makes of a row should follow from that row alone, so
    that no request depends on what else is in the batch. Functions that are equal share their
    compiled programs.
    """

    def __call__(self, logits: Float[Array, "B V"], rows: LogitsRows, /) -> Float[Array, "B V"]:
        """Logits of the same shape; -inf forbids a token.

        A row that has no token left, or a NaN, ends with "no_allowed_token".

        Args:
          logits: float32 `[B, V]`, as the model gave them.
          rows: whose they are.
        """
        ...


def check_process(process: ProcessLogits) -> None:
    """Refuse what JAX could not call, before anything is traced.

    Raises:
      TypeError: it is no function, or has no hash, by which its programs are found.
    """
    if not callable(process):
        raise TypeError(f"process_logits must be a function, got {type(process).__name__}")
    try:
        hash(process)
    except TypeError as error:
        raise TypeError(f"process_logits must be hashable: {error}") from None


def processed(
    process: ProcessLogits, logits: Array, rows: RowState, asked: Int[Array, "B T"]
) -> Array:
    """What the function makes of float32 logits `[B * T, V]`: of T tokens of each row, each behind
    the drafts before it.

    Raises:
      TypeError: it returned no floating-point array of that shape.
    """
    size, width = asked.shape
    text, drafts = rows.text, jnp.arange(1, width, dtype=jnp.int32)
    if width > 1:
        place = rows.length[:, None] + drafts - 1
        text = text.at[jnp.arange(size)[:, None], place].set(asked[:, 1:], mode="drop")
    ahead = jnp.tile(jnp.arange(width, dtype=jnp.int32), size)

    def each(array: Array) -> Array:
        return jnp.repeat(array, width, axis=0)

    own = rows.sampling
    told = LogitsRows(
        each(text), each(rows.length) + ahead, each(own.index) + ahead, each(own.seed),
        each(own.args),
    )  # fmt: skip
    out = process(logits, told)
    shape, dtype = getattr(out, "shape", None), getattr(out, "dtype", None)
    if shape != logits.shape or dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        got = type(out).__name__ if shape is None else f"{dtype}{list(shape)}"
        raise TypeError(
            f"process_logits must return floating-point logits {list(logits.shape)}, got {got}"
        )
    return out.astype(jnp.float32)
