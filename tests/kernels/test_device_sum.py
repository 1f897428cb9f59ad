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


@pytest.fixture
def told(monkeypatch):
    """What launches are told, where devices of a CPU stand for cards; they give each card's place,
    and what it was told of the last number."""
    pytest.importorskip("triton", reason="has no wheel for this platform")
    from paged_decode.kernels.triton import launch

    calls = []

    def launched(kernel, inputs, outputs, **options):
        calls.append((inputs, options))
        made = [jnp.zeros(out.shape, out.dtype) for out in outputs]
        return [made[0] + inputs[1][-1, 0].astype(made[0].dtype), *made[1:]]

    monkeypatch.setattr(device_sum, "_refusal", lambda *_: None)
    monkeypatch.setattr(DeviceSum, "_load", lambda self: None)
    monkeypatch.setattr(launch, "launch", launched)
    return calls


def test_every_card_knows_its_own_workspace_and_those_of_its_group(told):
    mesh = mesh_of(2, 2)
    sums = DeviceSum(mesh, "tensor", width=8, rows=3)
    addresses = sums._table[..., :2, :].copy().view(np.int64)[..., 0]
    own = np.array([a.unsafe_buffer_pointer() for a in sums._workspaces]).reshape(2, 2)
    np.testing.assert_array_equal(addresses[..., 0], own)
    np.testing.assert_array_equal(addresses[..., 1], own[:, ::-1])
    np.testing.assert_array_equal(sums._table[..., 2, 0], [[0, 1], [0, 1]])
    for space, device in zip(sums._workspaces, mesh.devices.flat, strict=True):
        assert space.devices() == {device}
        assert not np.asarray(space[:4]).any() and space.nbytes == 16 + 3 * 2 * 3 * 8 * 2
        np.testing.assert_array_equal(np.asarray(space[4:]), 0x80008000)


def test_what_fits_is_one_launch_and_all_else_is_psum(told):
    mesh = mesh_of(2, 2)
    sums = DeviceSum(mesh, "tensor", width=8, rows=3)
    split = PartitionSpec(("data", "tensor"))

    def run(fun, *shape: int, dtype=jnp.bfloat16):
        told.clear()
        mapped = jax.shard_map(fun, mesh=mesh, in_specs=split, out_specs=split, check_vma=False)
        return np.asarray(jax.jit(mapped)(jnp.ones((4, *shape), dtype)).astype(jnp.float32))

    found = run(lambda part: sums(part[0])[None], 3, 8)
    np.testing.assert_array_equal(found[:, 0, 0], [0, 1, 0, 1])
    (_, options), *rest = told
    assert not rest and options["grid"] == 3
    assert options["constants"]["CARDS"] == 2 and not options["constants"]["NORM"]
    for kept_as in (jnp.bfloat16, jnp.float32):  # as checkpoints are loaded, it is float32
        one = jnp.ones(8, kept_as)
        run(lambda part, one=one: sums.add_and_norm(part[0], part[0], one, 1e-5)[0][None], 2, 8)
        ((inputs, options),) = told
        assert options["constants"]["NORM"] and options["constants"]["RESIDUAL"]
        assert inputs[3].dtype == jnp.float32 and inputs[4] == np.float32(1e-5)
    for shape, dtype in (((4, 8), jnp.bfloat16), ((3, 4), jnp.bfloat16), ((3, 8), jnp.float32)):
        found = run(lambda part: sums(part[0])[None], *shape, dtype=dtype)
        assert not told and (found == 2).all()
