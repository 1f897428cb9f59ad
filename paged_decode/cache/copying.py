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

__all__ = ["Leaves", "copied"]

Leaves = tuple[Array, ...]


def copied(
    k_pages: Leaves,
    v_pages: Leaves,
    copies: PageCopies,
    *,
    num_pages: int,
    placement: Placement | None,
) -> tuple[Leaves, Leaves]:
    """The pages of one group after its copies; donates them. `num_pages` is N of the group.

    Copies are padded to a power of two, null page onto null page, so that few programs are
    compiled: their number differs at nearly every step.
    """
    for name, ids in zip(("copies.src", "copies.dst"), copies, strict=True):
        check_range(name, ids, num_pages)
    check_live("k_pages", k_pages[0])
    shards = placement.data_shards if placement else 1
    if shards > 1:
        padded = tuple(split_copies(copies, shards=shards, pages_per_shard=num_pages // shards))
    else:
        both = np.zeros((2, 1 << (len(copies.src) - 1).bit_length()), np.int32)
        both[:, : len(copies.src)] = copies
        padded = tuple(both)
    return _copy(k_pages, v_pages, *put_beside(k_pages[0], padded), placement)


@partial(jax.jit, donate_argnums=(0, 1), static_argnums=4)
def _copy(
    k_pages: Leaves,
    v_pages: Leaves,
    src: Int[Array, " C"],
    dst: Int[Array, " C"],
    placement: Placement | None,
) -> tuple[Leaves, Leaves]:
    """One program for all layers: a launch for each would cost more than the copies."""
    pairs = zip(k_pages, v_pages, strict=True)
    done = [copy_pages(k, v, src, dst, placement=placement) for k, v in pairs]
    return tuple(k for k, _ in done), tuple(v for _, v in done)
