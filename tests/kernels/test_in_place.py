"""No step copies the pool: both writers, T = 1 and more, both layouts, one device and two."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from paged_decode.kernels import Placement, append_and_attend, append_kv

from ..devices import first_devices
from .test_attention import SHAPES

POOL_BYTES = 2**27  # of one layer, keys or values; nothing of it is allocated
# KV heads, page size, head dim: those of the suite, and every axis of length 1.
SIZES = sorted({(heads, size, dim) for _, heads, dim, size, *_ in SHAPES}) + [
    ones for ones in itertools.product((1, 2), (1, 4), (1, 8)) if 1 in ones
]
LAYERS = {"tuple": None, "stack of 1": 1, "stack of 3": 3}
CASES = [
    (sizes, layout)
    for sizes, layout in itertools.product(SIZES, LAYERS)
    if layout != "stack of 1" or 1 in sizes
]


def memory(sizes, tokens, layers, placement=None, kind="float32"):
    """Bytes of the pools, of what is aliased, and of temporaries, on each device."""
    heads, page_size, dim = sizes
    shards = placement.data_shards if placement else 1
    pages = max(POOL_BYTES // (4 * heads * page_size * dim), 8) // shards * shards
    shape, axes = (pages, heads, page_size, dim), "N, Hk, S, D"
    if layers is not None:
        shape, axes = (layers, *shape), "L, " + axes
    pool = jax.ShapeDtypeStruct(
        shape, kind, sharding=placement.sharding(axes) if placement else None
    )
    rows, t = 4, () if tokens is None else (tokens,)
    q = jnp.zeros((rows, *t, 2 * heads, dim), kind)
    table, slots = np.zeros((rows, 4), np.int32), np.zeros((rows, *t), np.int32)
    options = dict(placement=placement, layer=None if layers is None else layers - 1)

    def steps(k_pages, v_pages, q, lens):
        """Written by both, read in a loop, and all of that again, four times."""

        def step(_, state):
            k, v, q = state
            new = q[..., ::2, :]  # depends on what was read before, as in a model
            k, v = append_kv(k, v, new, new, slots, **options)
            out, k, v = append_and_attend(
                q, new, new, k, v, table, lens, slots=slots, implementation="xla", **options
            )
            return k, v, q + out

        return jax.lax.fori_loop(0, 4, step, (k_pages, v_pages, q))

    lens = np.full(rows, 5, np.int32)
    program = jax.jit(steps, donate_argnums=(0, 1)).lower(pool, pool, q, lens).compile()
    found = program.memory_analysis()
    devices = placement.mesh.size if placement else 1
    whole = 2 * int(np.prod(shape)) * jnp.dtype(kind).itemsize
    return whole // devices, found.alias_size_in_bytes, found.temp_size_in_bytes


@pytest.mark.parametrize("tokens", [None, 3], ids=["T=1", "T=3"])
@pytest.mark.parametrize("sizes, layout", CASES, ids=str)
def test_no_shape_copies_the_pool(sizes, layout, tokens):
    pool, aliased, temporary = memory(sizes, tokens, LAYERS[layout])
    assert aliased == pool and temporary < pool / 4


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="its XLA orders them by data alone")
def test_writes_that_do_not_depend_on_the_reads_between_them_copy_nothing():
    """Update, a loop that reads, and an update again: openxla/xla 45912."""
    pool, new = jax.ShapeDtypeStruct((2**14, 2, 4, 8), np.float32), jnp.ones((4, 2, 8))
    table, lens = np.zeros((4, 4), np.int32), np.full(4, 5, np.int32)

    def steps(k_pages, v_pages, q):
        for _ in range(3):
            out, k_pages, v_pages = append_and_attend(q, new, new, k_pages, v_pages, table, lens)
            q = q + out
        return k_pages, v_pages, q

    program = jax.jit(steps, donate_argnums=(0, 1)).lower(pool, pool, jnp.ones((4, 4, 8)))
    assert program.compile().memory_analysis().temp_size_in_bytes < 2**20


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda k: k.name)
@pytest.mark.parametrize("layout", ["tuple", "stack of 3"])
@pytest.mark.parametrize("tokens", [None, 3], ids=["T=1", "T=3"])
@pytest.mark.parametrize("axis", ["heads", "data"])
def test_no_device_of_two_copies_its_part(axis, tokens, layout, kind):
    """Two heads over two devices leave one on each, as 8 over 8 do."""
    mesh = jax.make_mesh((2,), (axis,), axis_types=(kind,), devices=first_devices(2))
    over = {"heads": dict(head_axis="heads"), "data": dict(data_axis="data")}[axis]
    heads = 2 if axis == "heads" else 1
    placement = Placement.create(mesh, num_kv_heads=heads, num_pages=2**12, **over)
    pool, aliased, temporary = memory((heads, 4, 8), tokens, LAYERS[layout], placement)
    assert aliased == pool and temporary < pool / 4
