"""What the GPU kernels ask of the card, and the counters that they leave as they found them."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32

__all__ = ["Card", "compute_capability", "processors", "zero_counters"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """What a plan depends on beside the call: the card that will run it, an H100 by default.

    Attributes:
      processors: streaming multiprocessors.
      generation: compute capability, 10 * major + minor.
    """

    processors: int = 132
    generation: int = 90

    @classmethod
    def here(cls) -> "Card":
        """The NVIDIA card of this process."""
        return cls(processors=processors(), generation=int(compute_capability().replace(".", "")))


def compute_capability() -> str:
    """Such as "9.0"; where a call is only lowered, there may be no card to ask."""
    return str(getattr(jax.devices()[0], "compute_capability", "9.0"))


def processors() -> int:
    """Streaming multiprocessors; those of an H100 where there is no card to ask."""
    return getattr(jax.devices()[0], "core_count", 132)


def zero_counters(count: int) -> Int32[Array, " count_and_one"]:
    """Zeros that a kernel counts in and leaves as zeros, as a constant of the program.

    A zeroed output, or `jnp.zeros`, would cost a memset in every call. The last number keeps XLA
    from turning the constant into just that. Programs of one device run one after the other, so
    no two launches count in it at the same time.
    """
    return jnp.asarray(np.append(np.zeros(count, np.int32), np.int32(1)))
