"""Sums over a mesh axis where there are no GPUs: the same as `psum`, and why."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from paged_decode import DeviceSum
from paged_decode.kernels import device_sum


def mesh_of(*sizes: int):
    names = ("data", "tensor")[2 - len(sizes) :]
    count = int(np.prod(sizes))
    kinds = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(sizes, names, axis_types=kinds, devices=jax.devices()[:count])


@pytest.mark.parametrize("sizes", [(2,), (2, 2)])
def test_on_a_cpu_it_is_psum_with_the_residual_and_the_norm(sizes):
    mesh = mesh_of(*sizes)
    sums = DeviceSum(mesh, "tensor", width=24, rows=4, dtype=jnp.float32)
    assert sums.refusal == "it runs on NVIDIA GPUs, not on cpu"
    rng = np.random.default_rng(0)
    parts, x, weight = (rng.normal(size=s).astype(np.float32) for s in ((2, 3, 24), (3, 24), 24))
    split, whole = PartitionSpec("tensor"), PartitionSpec()

    def both(part, x, weight):
        return sums(part[0]), *sums.add_and_norm(part[0], x, weight, 1e-5)

    mapped = jax.shard_map(
        both, mesh=mesh, in_specs=(split, whole, whole), out_specs=(whole,) * 3, check_vma=False
    )
    total, added, normed = jax.jit(mapped)(parts, x, weight)
    np.testing.assert_array_equal(total, parts[0] + parts[1])
    np.testing.assert_array_equal(added, x + (parts[0] + parts[1]))
    scale = 1 / np.sqrt(np.mean(np.square(added), -1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(normed, added * scale * weight, rtol=1e-6)


@pytest.mark.parametrize("wrong", [dict(axis="heads"), dict(rows=0), dict(width=0)])
def test_what_names_no_axis_and_no_numbers_is_refused(wrong):
    with pytest.raises(ValueError, match="needs an axis of the mesh"):
        DeviceSum(mesh_of(2), **(dict(axis="tensor", width=8) | wrong))


def _cards(count: int) -> list:
    return [mock.Mock(platform="gpu", process_index=0, local_hardware_id=i) for i in range(count)]


@pytest.mark.parametrize(
    ("count", "dtype", "why"),
    [
        (1, jnp.bfloat16, "one device has nothing to sum"),
        (9, jnp.bfloat16, "up to 8 cards; got 9"),
        (2, jnp.int32, "got int32"),
    ],
)
def test_a_refusal_says_why(count, dtype, why):
    assert why in device_sum._refusal(count, _cards(count), jnp.dtype(dtype))


def test_cards_of_several_processes_are_refused():
    cards = _cards(2)
    cards[1].process_index = 1
    found = device_sum._refusal(2, cards, jnp.dtype(jnp.bfloat16))
    assert found == "the cards belong to several processes"


def test_cards_that_cannot_write_to_each_other_are_refused(monkeypatch):
    def can_access(can, one, other):
        can._obj.value = 0
        return 0

    driver = mock.Mock(cuDeviceCanAccessPeer=can_access)
    monkeypatch.setattr(device_sum.ctypes, "CDLL", lambda name: driver)
    assert device_sum._peers(_cards(2)) == "card 0 cannot write into the memory of card 1"
