"""Copy-on-write carried out: pages onto pages, in all layers of a group."""

from __future__ import annotations

from functools import partial

import jax
import numpy as np
from jaxtyping import Array, Int

from .._devices import put_beside
from ..allocator import PageCopies
from ..kernels import Placement, copy_pages
from ..kernels.checks import check_live, check_range
from ..sharding import split_copies

__all__ = ["Layers", "copied"]

Layers = tuple[dict[str, Array], ...]
"""The pools of each layer by their names."""


def copied(
    layers: Layers,
    copies: PageCopies,
    *,
    num_pages: int,
    placement: Placement | None,
) -> tuple[tuple[Array, ...], ...]:
    """The pools of each layer of a group after its copies, in the order of their names; donates
    them. `num_pages` is N of the group.

    Copies are padded to a power of two, null page onto null page, so that few programs are
    compiled: their number differs at nearly every step.
    """
    for name, ids in zip(("copies.src", "copies.dst"), copies, strict=True):
        check_range(name, ids, num_pages)
    first = layers[0]["k_pages"]
    check_live("k_pages", first)
    shards = placement.data_shards if placement else 1
    if shards > 1:
        padded = tuple(split_copies(copies, shards=shards, pages_per_shard=num_pages // shards))
    else:
        both = np.zeros((2, 1 << (len(copies.src) - 1).bit_length()), np.int32)
        both[:, : len(copies.src)] = copies
        padded = tuple(both)
    return _copy(layers, *put_beside(first, padded), placement)


@partial(jax.jit, donate_argnums=0, static_argnums=3)
def _copy(
    layers: Layers,
    src: Int[Array, " C"],
    dst: Int[Array, " C"],
    placement: Placement | None,
) -> tuple[tuple[Array, ...], ...]:
    """One program for all layers: a launch for each would cost more than the copies."""
    return tuple(copy_pages(src=src, dst=dst, placement=placement, **each) for each in layers)
