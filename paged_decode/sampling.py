"""Choosing the next token on the device: greedy, temperature, top-k, top-p, one seed a request."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

__all__ = ["MAX_STOP_TOKENS", "SamplingParams", "SamplingRows", "sample"]

MAX_STOP_TOKENS = 8  # width of the device's stop table; a wider one would compile anew


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one request is sampled and when it ends.

    Attributes:
      max_new_tokens: upper bound of generated tokens, at least 1.
      temperature: 0 is greedy; otherwise logits are divided by it.
      top_k: keep the k most likely tokens (ties with the k-th stay in); 0 keeps all.
      top_p: keep the smallest set of most likely tokens whose probability reaches it, in (0, 1].
      seed: 0 <= seed < 2**32. Token i of a request depends on (seed, i) and the logits alone,
        never on what else is in the batch, so preemption and batching change nothing.
      stop_tokens: at most 8 ids; the request ends with the first of them, which is kept.

    Raises:
      ValueError: a value is out of its range.
      TypeError: a value is of the wrong kind.

    Example:
      >>> SamplingParams(max_new_tokens=16, temperature=0.8, top_p=0.95, seed=7).top_k
      0
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop_tokens: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name, low, high in (
            ("max_new_tokens", 1, 2**31),
            ("top_k", 0, 2**31),
            ("seed", 0, 2**32),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | np.integer):
                raise TypeError(f"{name} must be an int, got {value!r}")
            if not low <= value < high:
                raise ValueError(f"{name} must be in [{low}, {high}), got {value}")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature must be finite and at least 0, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        object.__setattr__(self, "stop_tokens", tuple(int(t) for t in self.stop_tokens))
        in_range = all(0 <= t < 2**31 for t in self.stop_tokens)
        if len(self.stop_tokens) > MAX_STOP_TOKENS or not in_range:
            raise ValueError(
                f"stop_tokens must be at most {MAX_STOP_TOKENS} ids, none negative, all below "
                f"2**31, got {self.stop_tokens}"
            )


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class SamplingRows:
    """`SamplingParams` of B rows as arrays, plus where each row is in its stream.

    Attributes:
      temperature, top_p: float32 `[B]`.
      top_k, index: int32 `[B]`; `index` counts the tokens generated so far.
      seed: uint32 `[B]`.
      stop_tokens: int32 `[B, 8]`, padded with -1.
    """

    temperature: Any
    top_p: Any
    top_k: Any
    index: Any
    seed: Any
    stop_tokens: Any

    @classmethod
    def create(
        cls, params: Sequence[SamplingParams], indices: Sequence[int], rows: int
    ) -> SamplingRows:
        """Pack parameters into arrays of `rows` rows; the rest pads as greedy."""
        out = cls(
            temperature=np.zeros(rows, np.float32),
            top_p=np.ones(rows, np.float32),
            top_k=np.zeros(rows, np.int32),
            index=np.zeros(rows, np.int32),
            seed=np.zeros(rows, np.uint32),
            stop_tokens=np.full((rows, MAX_STOP_TOKENS), -1, np.int32),
        )
        for row, (p, index) in enumerate(zip(params, indices, strict=True)):
            out.temperature[row], out.top_p[row], out.top_k[row] = p.temperature, p.top_p, p.top_k
            out.seed[row], out.index[row] = p.seed, index
            out.stop_tokens[row, : len(p.stop_tokens)] = p.stop_tokens
        return out


def sample(logits: Float[Array, "B V"], rows: SamplingRows) -> Int[Array, " B"]:
    """Draw one token per row; a batch in which every row is greedy pays for an argmax only."""
    logits = logits.astype(jnp.float32)
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def drawn() -> Array:
        heat = jnp.where(rows.temperature > 0, rows.temperature, jnp.float32(1))
        scaled = logits / heat[:, None]
        narrow = jnp.any((rows.temperature > 0) & ((rows.top_k > 0) | (rows.top_p < 1)))
        scaled = lax.cond(narrow, lambda: _restrict(scaled, rows), lambda: scaled)
        noisy = scaled + jax.vmap(_gumbel, (0, 0, None))(rows.seed, rows.index, logits.shape[-1])
        choice = jnp.argmax(noisy, axis=-1).astype(jnp.int32)
        return jnp.where(rows.temperature > 0, choice, greedy)

    return lax.cond(jnp.any(rows.temperature > 0), drawn, lambda: greedy)


def _gumbel(seed: Array, index: Array, width: int) -> Array:
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), seed), index)
    return jax.random.gumbel(key, (width,), jnp.float32)


def _restrict(scaled: Array, rows: SamplingRows) -> Array:
    """Set what top-k and then top-p exclude to -inf."""
    width = scaled.shape[-1]
    ordered = -jnp.sort(-scaled, axis=-1)
    rank = jnp.arange(width, dtype=jnp.int32)[None]
    keep = (rank < rows.top_k[:, None]) | (rows.top_k[:, None] == 0)
    mass = jax.nn.softmax(jnp.where(keep, ordered, -jnp.inf), axis=-1)
    before = jnp.cumsum(mass, axis=-1) - mass  # probability of everything likelier
    keep &= (before < rows.top_p[:, None]) | (rank == 0)
    floor = jnp.min(jnp.where(keep, ordered, jnp.inf), axis=-1)
    return jnp.where(scaled >= floor[:, None], scaled, -jnp.inf)
