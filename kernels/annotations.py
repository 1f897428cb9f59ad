"""The types of public signatures, under names short enough for `help()` to be read."""

from __future__ import annotations

from typing import Literal, TypeAlias, TypedDict

from jaxtyping import Bool, Float, Int, Num

from .checks import AnyArray
from .shared_prefix import SharedPrefix

__all__ = [
    "AttentionOptions",
    "Backends",
    "FixedScales",
    "Implementation",
    "Layer",
    "Lengths",
    "NewTokens",
    "PageIds",
    "PageTable",
    "Pages",
    "Queries",
    "Scales",
    "Sinks",
    "Slots",
    "TailMask",
    "Window",
]

Pages: TypeAlias = Num[AnyArray, "N Hk S D"] | Num[AnyArray, "L N Hk S D"]
Queries: TypeAlias = Float[AnyArray, "B Hq D"] | Float[AnyArray, "B T Hq D"]
NewTokens: TypeAlias = Float[AnyArray, "B Hk D"] | Float[AnyArray, "B T Hk D"]
PageTable: TypeAlias = Int[AnyArray, "B P"]
Lengths: TypeAlias = Int[AnyArray, " B"]
Slots: TypeAlias = Int[AnyArray, " B"] | Int[AnyArray, "B T"]
PageIds: TypeAlias = Int[AnyArray, " C"]
Scales: TypeAlias = Float[AnyArray, "N Hk S"] | Float[AnyArray, "L N Hk S"]
FixedScales: TypeAlias = tuple[Float[AnyArray, " Hk"], Float[AnyArray, " Hk"]]
"""Of keys and of values, for all tokens."""
TailMask: TypeAlias = Bool[AnyArray, "B T T"]
Sinks: TypeAlias = Float[AnyArray, "*heads K"]
Layer: TypeAlias = int | Int[AnyArray, ""]
"""Which layer of a stacked pool: a Python int, or an int32 scalar, which may be traced."""
Window: TypeAlias = int | tuple[int, int]

Implementation: TypeAlias = Literal["triton", "pallas_tpu", "pallas_gpu", "xla", "reference"]
"""The name of a backend."""
Backends: TypeAlias = Implementation | tuple[str, ...] | list[str]
"""A backend, or several to try in order.

Sequences hold any names, because a name may be known at run time only. They are no `Sequence[str]`:
a `str` is one, so a checker would take any misspelt name.
"""


class AttentionOptions(TypedDict, total=False):
    """The options of `paged_attention` that `KVCache.attend` and `append_and_attend` hand on.

    Those that a cache has of its own are not among them: the layer and the placement. Nor is
    `return_lse`, on which the type of the result depends.

    Examples:
      >>> options = AttentionOptions(sliding_window=128, soft_cap=50.0)
      >>> sorted(options)
      ['sliding_window', 'soft_cap']
    """

    starts: Lengths | None
    scale: float | None
    sliding_window: Window | None
    soft_cap: float | None
    sinks: Sinks | None
    query_lens: Lengths | None
    tail_mask: TailMask | None
    shared: SharedPrefix | None
    batch_invariant: bool
    implementation: Backends | None
