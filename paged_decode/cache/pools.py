"""Which arrays a cache is made of: one for every layer, or one stack of layers for every group."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array

from ..allocator import CacheLayout
from ..allocator.arguments import as_count
from ..kernels import Placement
from ..kernels.eight_bits import is_eight_bits
from ..kernels.placement import Axis
from ..kernels.record import POOLS

__all__ = ["Place", "alike", "empty_pages", "layout_of", "place_of"]

T = TypeVar("T")


class Place(NamedTuple):
    """Where the pages of a layer are.

    Attributes:
      group: the number of its group.
      leaf: which array of keys, and of values.
      layer: which layer of a stack, and perhaps traced; None: the array is of one layer.
    """

    group: int
    leaf: int
    layer: Any = None


def layout_of(layout: CacheLayout | None, dtype: Any, **sizes: int | None) -> CacheLayout:
    """The layout, or that of layers which are alike.

    Raises:
      TypeError: a size is missing, or given beside a layout.
    """
    if layout is None:
        for name, size in sizes.items():
            if size is None:
                raise TypeError(f"{name} must be given, or a layout")
        return CacheLayout.uniform(**sizes, dtype=dtype)  # type: ignore[arg-type]
    if any(size is not None for size in sizes.values()):
        raise TypeError("the layout has all sizes: give either it or them")
    return layout


def empty_pages(
    layout: CacheLayout, *, stacked: bool, mesh: Any, head_axis: Axis, data_axis: Axis
) -> tuple[dict[str, tuple[Any, ...]], Placement | None]:
    """Keys, values and the scales of each, and how they lie on the mesh: that of the first group.

    Raises:
      TypeError: there is no such dtype.
      ValueError: a group cannot be split so, or there are axes without a mesh.
    """
    if (mesh is None) != (head_axis is None and data_axis is None):
        raise ValueError(
            f"mesh and head_axis or data_axis go together; got {mesh}, {head_axis!r} and "
            f"{data_axis!r}"
        )
    for group in layout.groups:
        _require_dtype(group.dtype)
    places = [
        mesh
        and Placement.create(
            mesh,
            num_kv_heads=group.num_kv_heads,
            num_pages=group.num_pages,
            head_axis=head_axis,
            data_axis=data_axis,
        )
        for group in layout.groups
    ]

    def zeros(number: int, layers: tuple[int, ...], *, scales: bool) -> Array | None:
        group, place = layout.groups[number], places[number]
        if scales and not is_eight_bits(group.dtype):
            return None
        heads = group.num_kv_heads * (place.kv_copies if place else 1)
        shape = (*layers, group.num_pages, heads, layout.page_size)
        axes = "L, N, Hk, S" if layers else "N, Hk, S"
        if scales:
            return jnp.zeros(shape, jnp.float32, device=place and place.sharding(axes))
        where = place and place.sharding(f"{axes}, D")
        return jnp.zeros((*shape, group.head_dim), group.dtype, device=where)

    leaves = [(number, ()) for number in layout.group_of]
    if stacked:
        leaves = [(number, (len(group.layers),)) for number, group in enumerate(layout.groups)]
    each = {
        name: tuple(zeros(*leaf, scales=name.endswith("scales")) for leaf in leaves)
        for name in POOLS
    }
    return each, places[0]


def _require_dtype(name: str) -> None:
    try:
        jnp.dtype(name)
    except TypeError:
        raise TypeError(
            "dtype must be one of JAX's, such as float32, bfloat16, float16, int8 or "
            f"float8_e4m3fn; got {name!r}"
        ) from None


def alike(name: str, found: dict[int, T]) -> T:
    """What all groups have, of those in `found` by number.

    Raises:
      ValueError: they differ. One of them would be wrong for the layers of the others.
    """
    first, *others = found.values()
    if any(other != first for other in others):
        each = ", ".join(f"{value} in group {number}" for number, value in found.items())
        raise ValueError(f"layers differ in {name}: {each}; see cache.layout.groups[...].{name}")
    return first


def place_of(layer: Any, group: Any, groups: Sequence[Sequence[int]], *, stacked: bool) -> Place:
    """Where a layer is: of all of them, or within a named group, where that of a stack may be
    traced.

    Raises:
      TypeError: layer is no Python int.
      ValueError: there is no such layer or group.
    """
    if group is not None:
        number = as_count("group", group, 0, len(groups) - 1)
        if stacked:
            return Place(number, number, layer)
        layers = groups[number]
        return Place(number, layers[_known(layer, len(layers))])
    if stacked and isinstance(layer, Tracer):
        raise TypeError("a traced layer counts within a group: say which, group=...")
    index = _known(layer, sum(map(len, groups)))
    number = next(i for i, layers in enumerate(groups) if index in layers)
    if stacked:
        return Place(number, number, groups[number].index(index))
    return Place(number, index)


def _known(layer: Any, count: int) -> int:
    """The number of one of so many layers; to a tuple, -1 would be the last one."""
    try:
        index = None if isinstance(layer, bool | np.bool_ | Tracer) else operator.index(layer)
    except TypeError:
        index = None
    if index is None:
        raise TypeError(
            f"layer must be a Python int, because layers are a tuple; got {layer!r}: unroll them, "
            "or scan over a group of a cache that is made with stacked=True (group=...)"
        )
    if not 0 <= index < count:
        raise ValueError(f"layer must be in 0 .. {count - 1}; got {index}")
    return index
