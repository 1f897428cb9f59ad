"""Drafts: tokens that are guessed on the device, so that one step can check several of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from ..allocator.arguments import as_count

__all__ = ["Drafter", "PromptLookup", "check_drafter"]


@runtime_checkable
class Drafter(Protocol):
    """Guesses what comes next: a function of the tokens so far, which JAX traces.

    No guess changes a token; one that is right saves a step. Drafters that are equal share their
    compiled programs.
    """

    def __call__(self, text: Int[Array, "B L"], length: Int[Array, " B"], /) -> Int[Array, "B k"]:
        """Up to k tokens that may follow each text, k at least 1 and the same for all.

        Args:
          text: int32 `[B, L]`, the tokens of each row, and anything behind them.
          length: int32 `[B]`, how many there are; 0 for a row that nobody has.

        Returns:
          int32 `[B, k]`, ids of the vocabulary; the drafts of a row end before the first that is
          negative, so a row without any has -1.
        """
        ...


@dataclass(frozen=True, slots=True, weakref_slot=True)  # `jax.jit` refers to it weakly
class PromptLookup:
    """Looks for the newest tokens earlier in the text, and guesses what followed them there.

    The longest run of equal tokens counts, the nearest one of those; where its text ends, it goes
    round. It needs no second model, and pays where answers repeat what is there.

    Attributes:
      drafts: k, tokens to guess.
      shortest, longest: newest tokens that must be alike, and that are looked at.

    Raises:
      ValueError: one is less than 1, or longest is less than shortest.

    Examples:
      >>> look_up = PromptLookup(2)
      >>> look_up(jnp.array([[1, 2, 3, 4, 1, 2, 0, 0]]), jnp.array([6]))
      Array([[3, 4]], dtype=int32)
    """

    drafts: int = 4
    shortest: int = 2
    longest: int = 3

    def __post_init__(self) -> None:
        for name in ("drafts", "shortest", "longest"):
            object.__setattr__(self, name, as_count(name, getattr(self, name), 1, 2**15))
        if self.longest < self.shortest:
            raise ValueError(
                f"longest must be at least shortest, {self.shortest}, got {self.longest}"
            )

    def __call__(self, text: Int[Array, "B L"], length: Int[Array, " B"]) -> Int[Array, "B k"]:
        """The guesses; `text` and `length` as in `Drafter`."""
        newest, places = length[:, None] - 1, jnp.arange(text.shape[1], dtype=jnp.int32)
        alike = jnp.broadcast_to((places < newest), text.shape)
        run = jnp.zeros(text.shape, jnp.int32)  # how many tokens up to here are as the newest ones
        for back in range(min(self.longest, text.shape[1])):
            before = jnp.pad(text, ((0, 0), (back, 0)))[:, : text.shape[1]]
            own = jnp.take_along_axis(text, jnp.maximum(newest - back, 0), axis=1)
            alike &= (before == own) & (places >= back)
            run += alike.astype(jnp.int32)
        best = jnp.max(jnp.where(run >= self.shortest, run, 0), axis=1, keepdims=True)
        place = jnp.max(jnp.where((run == best) & (best > 0), places, -1), axis=1, keepdims=True)
        ahead = jnp.arange(self.drafts, dtype=jnp.int32) % jnp.maximum(newest - place, 1)
        return jnp.where(place >= 0, jnp.take_along_axis(text, place + 1 + ahead, axis=1), -1)


def check_drafter(drafter: Drafter, places: int) -> None:
    """Refuse what cannot draft for texts of so many places.

    Raises:
      TypeError: it is no hashable function, or a class, or does not return int32.
      ValueError: it returns another shape than `[B, k]` with k at least 1.
    """
    if not callable(drafter) or getattr(drafter, "__hash__", None) is None:
        raise TypeError(f"drafter must be a hashable function of (text, length), got {drafter!r}")
    if isinstance(drafter, type):
        raise TypeError(
            f"drafter must be a function; {drafter.__name__} is a class, make one of it"
        )
    text, length = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((2, places), (2,)))
    out = jax.eval_shape(lambda *given: drafter(*given), text, length)
    shape, dtype = getattr(out, "shape", None), getattr(out, "dtype", None)
    if shape is None or dtype != jnp.int32:
        came = dtype or type(out).__name__
        raise TypeError(f"the drafter must return int32 [B, k], got {came}; use .astype(jnp.int32)")
    if len(shape) != 2 or shape[0] != 2 or shape[1] < 1:
        raise ValueError(f"the drafter must return [B, k] with B = 2 and k >= 1, got {shape}")
