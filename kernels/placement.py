"""Where a pool lies on a mesh of devices, and the one place where operations meet that mesh."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

__all__ = ["Axis", "Placement"]

Axis = str | tuple[str, ...] | None
"""One mesh axis, several that act as one, or none."""


@dataclass(frozen=True, slots=True)
class Placement:
    """How pages are split: KV heads over `head_axis`, the pages themselves over `data_axis`.

    ```
                      head_axis (2)
                  heads 0-1     heads 2-3
    data_axis   +------------+------------+
      shard 0   | pages 0-63 | pages 0-63 |   rows 0 .. B/2-1, page ids local to the shard
      shard 1   | pages 0-63 | pages 0-63 |   rows B/2 .. B-1
                +------------+------------+
    ```
    Axes of the mesh that are not named here hold copies. Every operation runs per device, under
    `jax.shard_map` over the whole mesh: a kernel that is a custom call cannot be partitioned by
    the compiler. Inside the caller's own `shard_map` over these axes the arrays are local already
    and nothing is wrapped.

    Attributes:
      mesh: the caller's mesh; an `AbstractMesh` will do for lowering.
      head_axis: mesh axis, or several, over which KV heads are split; None: not split.
      data_axis: mesh axis, or several, over which rows and pages are split; None: not split.
      kv_copies: how many devices hold each KV head, where there are more devices than heads.
    """

    mesh: Any
    head_axis: Axis = None
    data_axis: Axis = None
    kv_copies: int = 1

    @classmethod
    def create(
        cls,
        mesh: Mesh | AbstractMesh,
        *,
        num_kv_heads: int,
        num_pages: int,
        head_axis: Axis = None,
        data_axis: Axis = None,
    ) -> Placement:
        """Check that heads and pages can be split so.

        Raises:
          ValueError: no such axis, one axis used twice, or numbers that do not divide.
        """
        named = [*_names(head_axis), *_names(data_axis)]
        unknown = [name for name in named if name not in mesh.shape]
        if unknown or len(set(named)) != len(named) or not named:
            raise ValueError(
                f"head_axis and data_axis must name different axes of the mesh, which has "
                f"{dict(mesh.shape)}; got head_axis={head_axis!r} and data_axis={data_axis!r}"
            )
        heads, shards = _size(mesh, head_axis), _size(mesh, data_axis)
        if num_kv_heads % heads and heads % num_kv_heads:
            raise ValueError(
                f"{num_kv_heads} KV heads cannot be split over the {heads} devices of "
                f"{head_axis!r}: one number must divide the other; use a head_axis of one of "
                f"{[n for n in range(1, num_kv_heads + 1) if num_kv_heads % n == 0]} devices, or "
                f"of a multiple of {num_kv_heads}"
            )
        if num_pages % shards or num_pages < 2 * shards:
            raise ValueError(
                f"num_pages must be a multiple of the {shards} shards of {data_axis!r}, with at "
                f"least 2 pages in each (one of them is its null page); got {num_pages}"
            )
        made = cls(mesh, head_axis, data_axis)
        return replace(made, kv_copies=made.copies_of(num_kv_heads))

    def copies_of(self, num_kv_heads: int) -> int:
        """How many devices hold each of so many KV heads."""
        return max(_size(self.mesh, self.head_axis) // num_kv_heads, 1)

    @property
    def head_shards(self) -> int:
        """Into how many parts heads are split here; 1 where they are local."""
        return math.prod(self.mesh.shape[name] for name in self._open(self.head_axis))

    @property
    def data_shards(self) -> int:
        """Into how many parts rows and pages are split here; 1 where they are local."""
        return math.prod(self.mesh.shape[name] for name in self._open(self.data_axis))

    @property
    def platform(self) -> str | None:
        """Platform of the devices; None if the mesh is abstract."""
        devices = getattr(self.mesh, "devices", None)
        return None if devices is None else devices.flat[0].platform

    def spec(self, axes: str) -> PartitionSpec:
        """The partition of an array whose axes are named, e.g. "N, Hk, S, D" or "B, P"."""
        owner = dict(B=self.data_axis, N=self.data_axis, Hk=self.head_axis, Hq=self.head_axis)
        names = axes.split(", ") if axes else ()
        return PartitionSpec(*map(owner.get, names))

    def sharding(self, axes: str) -> NamedSharding:
        """`spec` on this mesh."""
        return NamedSharding(self.mesh, self.spec(axes))

    def run(
        self, fun: Callable[..., Any], inputs: Iterable[str], outputs: Iterable[str], *args: Any
    ) -> Any:
        """`fun(*args)` on every device's own part; `inputs` and `outputs` name their axes."""
        if not (self._open(self.head_axis) or self._open(self.data_axis)):
            return fun(*args)
        context = jax.sharding.get_abstract_mesh()
        mesh = context if context.manual_axes else self.mesh
        free = [name for name in mesh.axis_names if name not in context.manual_axes]
        into = tuple(self._only(self.spec(axes), free) for axes in inputs)
        out = tuple(self._only(self.spec(axes), free) for axes in outputs)
        types = zip(mesh.axis_names, mesh.axis_types, strict=True)
        if explicit := [name for name, kind in types if kind == AxisType.Explicit and name in free]:
            args = tuple(
                jax.sharding.reshard(arg, NamedSharding(mesh, self._only(spec, explicit)))
                for arg, spec in zip(args, into, strict=True)
            )
        # check_vma would ask every kernel to state over which axes its results vary.
        mapped = jax.shard_map(
            fun, mesh=mesh, in_specs=into, out_specs=out, axis_names=set(free), check_vma=False
        )
        return mapped(*args)

    def untyped(self, tree: Any) -> Any:
        """Arrays of a program without this mesh in their types, which Explicit axes put there.

        Rows that were split over such an axis are gathered; over automatic axes nothing moves.
        """
        if AxisType.Explicit not in self.mesh.axis_types:
            return tree
        nowhere = NamedSharding(self.mesh, PartitionSpec())
        return jax.tree.map(lambda a: jax.sharding.reshard(a, nowhere), tree)

    def whole(self, tree: Any) -> Any:
        """The same values on every device, as any process of several can read them."""
        if set(self.mesh.axis_types) == {AxisType.Explicit}:
            return self.untyped(tree)
        return jax.device_put(self.untyped(tree), NamedSharding(self.mesh, PartitionSpec()))

    def check(self, rows: int, heads: int | None = None) -> None:
        """Raise ValueError unless so many rows, and query heads, can be split."""
        if rows % self.data_shards:
            raise ValueError(
                f"B = {rows} rows cannot be split over the {self.data_shards} shards of "
                f"{self.data_axis!r}; pad the batch to a multiple"
            )
        if heads is not None and heads % self.head_shards:
            raise ValueError(
                f"Hq = {heads} query heads cannot be split over the {self.head_shards} devices of "
                f"{self.head_axis!r}; use a head_axis whose size divides Hq"
            )

    def _open(self, axis: Axis) -> list[str]:
        """The axes of `axis` over which arrays are still global here."""
        manual = jax.sharding.get_abstract_mesh().manual_axes
        return [name for name in _names(axis) if name not in manual]

    @staticmethod
    def _only(spec: PartitionSpec, names: list[str]) -> PartitionSpec:
        kept = (tuple(n for n in _names(axis) if n in names) or None for axis in spec)
        return PartitionSpec(*kept)


def _names(axis: Axis) -> tuple[str, ...]:
    if axis is None:
        return ()
    return (axis,) if isinstance(axis, str) else tuple(axis)


def _size(mesh: Any, axis: Axis) -> int:
    return math.prod(mesh.shape[name] for name in _names(axis))
