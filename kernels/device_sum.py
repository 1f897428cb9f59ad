"""The sum of a block's parts over the devices of a mesh axis, beside what a decoder does next.

`jax.lax.psum` is right everywhere. Between the GPUs of one process the sums of a decode step are a
few kilobytes, and their latency is what a second GPU costs; there a kernel writes straight into the
other cards' memory, where a workspace is kept for it.
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from .add_norm import add_and_norm
from .checks import check_twins
from .dispatch import default_platform

__all__ = ["DeviceSum"]

MOST_CARDS = 8
HEAD = 16  # bytes to which the counters of a workspace are padded
WAIT = 1 << 26  # looks at an empty place, each about a microsecond


class DeviceSum:
    """Sums over one axis of a mesh, for use inside a `shard_map` over the whole mesh.

    Up to `rows` rows of `width` numbers are summed by one launch on every card, which writes into
    the memory of the others. More rows, another width or dtype, and everything where `refusal`
    says why, is `jax.lax.psum`. Every device gets the same bits.

    The sums of one program must depend on each other, as those of a decoder do, and programs must
    reach all devices in the same order, as those of one thread do. A program keeps the addresses of
    the workspaces: keep this object as long as the program. A card that waits about a minute for
    another one ends with NaN, then and in every later sum.

    Attributes:
      axis: of the mesh.
      refusal: why every sum is a `psum`; None where there are workspaces.
    """

    def __init__(
        self, mesh: Mesh, axis: str, *, width: int, rows: int = 128, dtype: Any = jnp.bfloat16
    ):
        """Reserve the workspaces, `6 * devices * rows * width` bytes on each card in bfloat16.

        Raises:
          ValueError: the mesh has no such axis, or rows or width is below 1.
        """
        if axis not in mesh.shape or rows < 1 or width < 1:
            raise ValueError(
                f"needs an axis of the mesh, which has {dict(mesh.shape)}, and at least one row "
                f"of one number; got axis={axis!r}, rows={rows}, width={width}"
            )
        self.axis, self._mesh, self._rows, self._width = axis, mesh, rows, width
        self._dtype = jnp.dtype(dtype)
        self.refusal = _refusal(mesh.shape[axis], list(mesh.devices.flat), self._dtype)
        if self.refusal is None:
            self._workspaces, self._table = self._reserve()
            self._load()

    def __call__(self, part: Float[Array, "*M E"]) -> Float[Array, "*M E"]:
        """The sum of every device's part, like `jax.lax.psum`."""
        if not self._serves(part):
            return jax.lax.psum(part, self.axis)
        return self._launch(part, None, None, 0.0)[0]

    def add_and_norm(
        self,
        part: Float[Array, "*M E"],
        residual: Float[Array, "*M E"],
        weight: Float[Array, " E"],
        eps: float,
    ) -> tuple[Float[Array, "*M E"], Float[Array, "*M E"]]:
        """`x = residual + sum of part`, and x divided by its root mean square, times weight.

        The mean is of float32 squares, to which eps is added; both results have the dtype of part,
        whatever that of weight is.

        Raises:
          ValueError: the residual has another shape or dtype.
        """
        check_twins("residual", residual, "part", part)
        if not self._serves(part):
            return add_and_norm(residual, jax.lax.psum(part, self.axis), weight, eps)
        # Models keep such weights in float32; one dtype is one kernel, which `_load` has loaded.
        x, normed = self._launch(part, residual, weight.astype(jnp.float32), eps)
        return x, normed

    def _serves(self, part: Array) -> bool:
        rows = part.size // max(part.shape[-1], 1)
        manual = jax.sharding.get_abstract_mesh().manual_axes
        return (
            self.refusal is None
            and part.dtype == self._dtype
            and part.shape[-1] == self._width
            and 1 <= rows <= self._rows
            and all(size == 1 or name in manual for name, size in self._mesh.shape.items())
        )

    def _launch(
        self, part: Array, residual: Array | None, weight: Array | None, eps: float
    ) -> list[Array]:
        addresses: Any = jnp.asarray(self._table)
        for name, size in self._mesh.shape.items():
            addresses = addresses[jax.lax.axis_index(name) if size > 1 else 0]
        return self._kernel(part, addresses, residual, weight, eps)

    def _kernel(
        self,
        part: Array,
        addresses: Array,
        residual: Array | None,
        weight: Array | None,
        eps: float,
    ) -> list[Array]:
        """One launch; what is not given is not read, and any other array stands in for it."""
        from .triton import launch
        from .triton.device_sum import PLACES, device_sum_kernel

        whole = jax.ShapeDtypeStruct(part.shape, part.dtype)
        none = jax.ShapeDtypeStruct((1,), part.dtype)
        block = 1 << (self._width - 1).bit_length()
        return launch.launch(
            device_sum_kernel,
            (
                part,
                addresses,
                part if residual is None else residual,
                part if weight is None else weight,
                np.float32(eps),
            ),
            [whole, none if weight is None else whole],
            grid=part.size // self._width,
            warps=min(max(block // 512, 1), 16),
            stages=1,
            name="device_sum",
            constants=dict(
                ROWS=self._rows,
                WIDTH=self._width,
                BLOCK=block,
                CARDS=self._mesh.shape[self.axis],
                PLACES=PLACES,
                BITS=8 * self._dtype.itemsize,
                EMPTY=_empty(self._dtype),
                HEAD=_head(self._rows),
                RESIDUAL=int(residual is not None),
                NORM=int(weight is not None),
                WAIT=WAIT,
            ),
        )

    def _load(self) -> None:
        """Load the kernels on every card: CUDA may wait with that until running ones have ended,
        and those of another card could be waiting for this one."""
        nowhere = np.full((self._mesh.shape[self.axis] + 1, 2), -1, np.int32)
        row, weight = np.zeros((1, self._width), self._dtype), np.zeros(self._width, np.float32)

        @jax.jit
        def both(row: Array, weight: Array, addresses: Array) -> list[Array]:
            plain = self._kernel(row, addresses, None, None, 0.0)
            return plain + self._kernel(row, addresses, row, weight, 0.0)

        for device in self._mesh.devices.flat:
            jax.block_until_ready(both(*jax.device_put((row, weight, nowhere), device)))

    def _reserve(self) -> tuple[list[Array], np.ndarray]:
        """The workspaces, and for every device the addresses that its launches are told."""
        from .triton.device_sum import PLACES

        cards = self._mesh.shape[self.axis]
        words = PLACES * cards * self._rows * self._width * self._dtype.itemsize // 4
        begin = np.zeros(_head(self._rows) // 4, np.uint32)
        empty = np.full(4 // self._dtype.itemsize, -0.0, self._dtype).view(np.uint32)[0]

        def made(device: Any) -> Array:
            with jax.default_device(device):
                array = jnp.concatenate([begin, jnp.full(words, empty, jnp.uint32)])
            return jax.device_put(array, device)

        devices = self._mesh.devices
        spaces = [made(device) for device in devices.flat]
        jax.block_until_ready(spaces)
        found = np.array([space.unsafe_buffer_pointer() for space in spaces], np.int64)
        found = found.reshape(devices.shape)
        at = list(self._mesh.axis_names).index(self.axis)
        table = np.zeros((*devices.shape, cards + 1, 2), np.int32)
        for index in np.ndindex(*devices.shape):
            around = [
                found[(*index[:at], (index[at] + i) % cards, *index[at + 1 :])]
                for i in range(cards)
            ]
            table[index][:cards] = np.array(around, np.int64).view(np.int32).reshape(cards, 2)
            table[index][cards] = index[at], 0
        return spaces, table


def _empty(dtype: Any) -> int:
    """-0.0 of a floating dtype as an integer of its size."""
    return -(1 << (8 * jnp.dtype(dtype).itemsize - 1))


def _head(rows: int) -> int:
    """Bytes of the counters of so many rows."""
    return -(-4 * rows // HEAD) * HEAD


def _refusal(cards: int, devices: Sequence[Any], dtype: Any) -> str | None:
    """Why sums over so many of these devices are a `psum`."""
    if cards == 1:
        return "one device has nothing to sum"
    if cards > MOST_CARDS:
        return f"it serves up to {MOST_CARDS} cards; got {cards}"
    if default_platform(devices[0].platform) != "gpu":
        return f"it runs on NVIDIA GPUs, not on {devices[0].platform}"
    if any(device.process_index != jax.process_index() for device in devices):
        return "the cards belong to several processes"
    if dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"it sums bfloat16, float16 and float32; got {dtype}"
    launch = importlib.import_module(".triton.launch", __package__)
    return launch.problem() or _peers(devices)


def _peers(devices: Sequence[Any]) -> str | None:
    """Why these cards cannot write into each other's memory, which JAX enables where it can."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        return f"the driver cannot be asked about the cards: {error}"
    numbers = [device.local_hardware_id for device in devices]
    for one in numbers:
        for other in numbers:
            can = ctypes.c_int(0)
            if one != other and (
                driver.cuDeviceCanAccessPeer(ctypes.byref(can), one, other) or not can.value
            ):
                return f"card {one} cannot write into the memory of card {other}"
    return None
