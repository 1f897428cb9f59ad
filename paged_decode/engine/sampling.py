"""Choosing the next token on the device: greedy, temperature, top-k, top-p, one seed a request."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from ..allocator.arguments import as_count, as_counts

__all__ = ["MAX_STOP_TOKENS", "Kind", "SamplingParams", "SamplingRows", "draw", "sample"]

MAX_STOP_TOKENS = 8  # width of the device's stop table; a wider one would compile anew

_TINY = float(np.finfo(np.float32).tiny)  # devices flush what is smaller to zero
_HUGE = float(np.finfo(np.float32).max)


Drawn = Callable[[], Array]


class Kind(IntEnum):
    """What it takes to draw a token, in order of cost; a batch takes what one of its rows does."""

    GREEDY = 0
    WHOLE = 1  # from all tokens
    NARROW = 2  # from those that top_k and top_p leave


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one request is sampled and when it ends.

    Numbers may be Python's or NumPy's; they are kept as Python ints and floats.

    Attributes:
      max_new_tokens: upper bound of generated tokens, at least 1.
      temperature: 0 is greedy; otherwise logits are divided by it. Taken as float32, at least
        2**-126, which is greedy but for equal logits; its largest makes all but equally likely.
      top_k: keep the k most likely tokens (ties with the k-th stay in); 0 keeps all.
      top_p: of those, keep the smallest set of most likely tokens whose probability reaches it, in
        (0, 1]; of equal ones the lower ids. Taken as float32; 1 keeps all.
      seed: 0 <= seed < 2**32. Token i of a request depends on (seed, i) and the logits alone,
        never on what else is in the batch, so preemption and batching change nothing.
      stop_tokens: at most 8 ids; the request ends with the first of them, which is kept.

    Raises:
      ValueError: a value is out of its range.
      TypeError: a value is of the wrong kind.

    Examples:
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
        top = 2**31 - 1
        stops = as_counts("stop_tokens", self.stop_tokens, 0, top)
        checked = dict(
            max_new_tokens=as_count("max_new_tokens", self.max_new_tokens, 1, top),
            temperature=_as_float("temperature", self.temperature),
            top_k=as_count("top_k", self.top_k, 0, top),
            top_p=_as_float("top_p", self.top_p),
            seed=as_count("seed", self.seed, 0, 2**32 - 1),
            stop_tokens=stops,
        )
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature must be finite and at least 0, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if len(stops) > MAX_STOP_TOKENS:
            raise ValueError(f"stop_tokens must be at most {MAX_STOP_TOKENS} ids, got {len(stops)}")

    @property
    def kind(self) -> Kind:
        """What it takes to draw its tokens."""
        if not self.temperature:
            return Kind.GREEDY
        return Kind.NARROW if self.top_k or self.top_p < 1 else Kind.WHOLE


def _as_float(name: str, value: Any) -> float:
    """One Python float, of whatever kind of number; a bool or text is a TypeError."""
    kind = getattr(value, "dtype", None)
    several = getattr(value, "ndim", 0) > 0
    if isinstance(value, bool) or kind == np.bool_ or several or not hasattr(value, "__float__"):
        raise TypeError(f"{name} must be a number, got {value!r} of type {type(value).__name__}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} must fit a float, got an integer beyond it") from None


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class SamplingRows:
    """`SamplingParams` of B rows as arrays, plus where each row is in its stream.

    Attributes:
      temperature, top_p: float32 `[B]`; 0 or normal numbers.
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
            out.temperature[row] = p.temperature and min(max(p.temperature, _TINY), _HUGE)
            out.top_p[row], out.top_k[row] = max(p.top_p, _TINY), p.top_k
            out.seed[row], out.index[row] = p.seed, index
            out.stop_tokens[row, : len(p.stop_tokens)] = p.stop_tokens
        return out


def sample(logits: Float[Array, "B V"], rows: SamplingRows) -> Int[Array, " B"]:
    """Draw one token per row; a batch in which every row is greedy pays for an argmax only.

    A logit of -inf is never drawn, one of +inf always is. A row without a choice, which has a NaN
    or nothing but -inf, gets an id that means nothing; `draw` tells which ones these are.
    """
    return draw(logits, rows)[0]


def draw(
    logits: Float[Array, "B V"], rows: SamplingRows, most: Kind | None = None
) -> tuple[Int[Array, " B"], Bool[Array, " B"]]:
    """`sample`, and which rows have no token to choose: their model or its cache is broken.

    Args:
      logits: of the next token.
      rows: how it is drawn.
      most: the greatest kind among the rows, where the caller knows it while it traces. Otherwise
        the device finds out, for which a GPU asks the host at every call.
    """
    logits = logits.astype(jnp.float32)
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)  # the place of a NaN, if there is one
    top = jnp.take_along_axis(logits, greedy[:, None], axis=-1)
    invalid = (jnp.isnan(top) | (top == -jnp.inf))[:, 0]
    hot = rows.temperature > 0
    narrow = hot & ((rows.top_k > 0) | (rows.top_p < 1))
    heat = jnp.where(hot, rows.temperature, jnp.float32(1))[:, None]

    def drawn() -> Array:
        kept = at_least(Kind.NARROW, jnp.any(narrow), narrowed, lambda: logits)
        noise = jax.vmap(_gumbel, (0, 0, None))(rows.seed, rows.index, logits.shape[-1])
        choice = jnp.argmax(_cooled(kept, top, heat) + noise, axis=-1).astype(jnp.int32)
        return jnp.where(hot, choice, greedy)

    def narrowed() -> Array:
        return jnp.where(~narrow[:, None] | _kept(logits, top, heat, rows), logits, -jnp.inf)

    def at_least(kind: Kind, found: Array, then: Drawn, otherwise: Drawn) -> Array:
        if most is None:
            return lax.cond(found, then, otherwise)
        return then() if most >= kind else otherwise()

    return at_least(Kind.WHOLE, jnp.any(hot), drawn, lambda: greedy), invalid


def _gumbel(seed: Array, index: Array, width: int) -> Array:
    # The key is the same for all and the seed is data: one program draws for every request.
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), seed), index)
    return jax.random.gumbel(key, (width,), jnp.float32)


def _cooled(logits: Array, top: Array, heat: Array) -> Array:
    """(logits - top) / heat for any float32: 0 at the top, never NaN or above 0.

    Above a heat of 1 a quarter of everything is taken: differences do not overflow, nor is a
    divisor above 2**126, where a GPU's division may give NaN.
    """
    part = jnp.where(heat >= 1, jnp.float32(0.25), jnp.float32(1))
    return jnp.where(logits == top, 0, (logits * part - top * part) / (heat * part))


def _kept(logits: Array, top: Array, heat: Array, rows: SamplingRows) -> Array:
    """Bool `[B, V]`: what top-k and then top-p leave.

    Ranks are those of the logits, because heat can make different ones equal.
    """
    width = logits.shape[-1]
    ordered = -jnp.sort(-logits, axis=-1)
    last = jnp.where(rows.top_k > 0, jnp.minimum(rows.top_k, width), width) - 1
    within = ordered >= jnp.take_along_axis(ordered, last[:, None], axis=-1)
    weight = jnp.where(within, jnp.exp(_cooled(ordered, top, heat)), 0)
    reached = jnp.cumsum(weight, axis=-1)
    before = jnp.pad(reached[:, :-1], ((0, 0), (1, 0)))  # weight of everything likelier
    goal = rows.top_p[:, None] * reached[:, -1:]
    short = within & ((before < goal) | (rows.top_p[:, None] >= 1))
    count = jnp.sum(short, axis=-1, keepdims=True, dtype=jnp.int32)
    floor = jnp.take_along_axis(ordered, jnp.maximum(count - 1, 0), axis=-1)
    above = jnp.sum(ordered > floor, axis=-1, keepdims=True, dtype=jnp.int32)
    tie = logits == floor
    place = jnp.cumsum(tie, axis=-1, dtype=jnp.int32)  # of equal ones the lower ids stay
    return (logits > floor) | (tie & (place <= count - above))
