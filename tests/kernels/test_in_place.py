"""No step copies the pool: both writers, T = 1 and more, both layouts, one device and two."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from paged_decode.kernels import (
    Placement,
    append_and_attend,
    append_kv,
    shared_prefix_plan,
)

from ..devices import first_devices
from .test_attention import SHAPES

POOL_BYTES = 2**27  # of one layer, keys or values; nothing of it is allocated
# KV heads, page size, head dim: every axis of length 1, and those of the suite, most for CI alone.
SIZES = [ones for ones in itertools.product((1, 2), (1, 4), (1, 8)) if 1 in ones] + [
    pytest.param(sizes, marks=pytest.mark.long if place % 5 else ())
    for place, sizes in enumerate(sorted({(h, size, dim) for _, h, dim, size, *_ in SHAPES}))
]
LAYERS = (None, 1, 3)  # a tuple's layer, and stacks
ROWS, TABLE, LENS = 4, np.zeros((4, 4), np.int32), np.full(4, 4, np.int32)


def steps(pools, q, layers, placement, **own):
    """Written by both, read in a loop, and all of that again, four times.

    What is written depends on what was read before, as in a model.
    """

    def step(_, state):
        k, v, q = state
        options = dict(placement=placement, layer=None if layers is None else layers - 1)
        new, slots = q[..., ::2, :], np.zeros(q.shape[:-2], np.int32)
        k, v = append_kv(k, v, new, new, slots, **options)
        out, k, v = append_and_attend(
            k, v, q, new, new, TABLE, LENS, slots=slots, implementation="xla", **options, **own
        )
        return k, v, q + out

    return jax.lax.fori_loop(0, 4, step, (*pools, q))


def check(sizes, layouts, placement=None):
    """One program of every layout, with T = 1 and T = 3: its temporaries are no pool."""
    heads, page_size, dim = sizes
    shards = placement.data_shards if placement else 1
    pages = max(POOL_BYTES // (4 * heads * page_size * dim), 8) // shards * shards
    pools = []
    for layers in layouts:
        shape, axes = (pages, heads, page_size, dim), "N, Hk, S, D"
        if layers is not None:
            shape, axes = (layers, *shape), "L, " + axes
        where = placement.sharding(axes) if placement else None
        pools.append((jax.ShapeDtypeStruct(shape, np.float32, sharding=where),) * 2)
    one = jax.ShapeDtypeStruct((ROWS, 2 * heads, dim), np.float32)
    many = jax.ShapeDtypeStruct((ROWS, 3, 2 * heads, dim), np.float32)

    def program(pools, one, many):
        done = []
        for each, layers in zip(pools, layouts, strict=True):
            *each, one = steps(each, one, layers, placement)
            *each, many = steps(each, many, layers, placement)
            done.append(each)
        return done, one, many

    compiled = jax.jit(program, donate_argnums=0).lower(pools, one, many).compile()
    memory, devices = compiled.memory_analysis(), placement.mesh.size if placement else 1
    sizes_bytes = [8 * int(np.prod(k.shape)) // devices for k, _ in pools]
    assert memory.alias_size_in_bytes == sum(sizes_bytes)
    assert memory.temp_size_in_bytes < min(sizes_bytes) / 4


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("name", ["shared", "batch_invariant"])
def test_no_option_copies_the_pool(name, layers):
    shape = (2**15, 2, 4, 16)
    shape = shape if layers is None else (layers, *shape)
    pools = (jax.ShapeDtypeStruct(shape, np.float32),) * 2
    q = jax.ShapeDtypeStruct((ROWS, 4, 16), np.float32)

    def program(pools, q):
        own = dict(batch_invariant=True)
        if name == "shared":
            table = np.tile(np.arange(1, 5, dtype=np.int32), (ROWS, 1))
            own = dict(shared=shared_prefix_plan(table, 4 * LENS, page_size=4, min_tokens=1))
        return steps(pools, q, layers, None, **own)

    memory = jax.jit(program, donate_argnums=0).lower(pools, q).compile().memory_analysis()
    assert memory.alias_size_in_bytes == 8 * int(np.prod(shape))
    assert memory.temp_size_in_bytes < memory.alias_size_in_bytes / 4


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_no_shape_copies_the_pool(sizes):
    check(sizes, LAYERS)


@pytest.mark.parametrize("layers", LAYERS)
def test_a_step_of_one_row_copies_no_pool(layers):
    shape = (2**14, 2, 4, 8) if layers is None else (layers, 2**14, 2, 4, 8)
    pool, q = jax.ShapeDtypeStruct(shape, np.float32), jax.ShapeDtypeStruct((1, 4, 8), np.float32)
    options = dict(layer=None if layers is None else layers - 1, implementation="xla")

    def program(k, v, q, table, lens):
        return append_and_attend(k, v, q, q[:, :2], q[:, 2:], table, lens, **options)

    lowered = jax.jit(program, donate_argnums=(0, 1)).lower(pool, pool, q, TABLE[:1], LENS[:1])
    assert lowered.compile().memory_analysis().temp_size_in_bytes < 2**16


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda k: k.name)
@pytest.mark.parametrize("axis", ["heads", "data"])
def test_no_device_of_two_copies_its_part(axis, kind):
    """Two heads over two devices leave one on each, as 8 over 8 do."""
    mesh = jax.make_mesh((2,), (axis,), axis_types=(kind,), devices=first_devices(2))
    heads = 2 if axis == "heads" else 1
    placement = Placement.create(
        mesh, num_kv_heads=heads, num_pages=2**12, **{f"{axis.removesuffix('s')}_axis": axis}
    )
    check((heads, 4, 8), LAYERS, placement)


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="its XLA orders them by data alone")
def test_writes_that_do_not_depend_on_the_reads_between_them_copy_nothing():
    """Update, a loop that reads, and an update again: openxla/xla 45912."""
    pool, new = jax.ShapeDtypeStruct((2**14, 2, 4, 8), np.float32), jnp.ones((4, 2, 8))

    def program(k_pages, v_pages, q):
        for _ in range(3):
            out, k_pages, v_pages = append_and_attend(k_pages, v_pages, q, new, new, TABLE, LENS)
            q = q + out
        return k_pages, v_pages, q

    compiled = jax.jit(program, donate_argnums=(0, 1)).lower(pool, pool, jnp.ones((4, 4, 8)))
    assert compiled.compile().memory_analysis().temp_size_in_bytes < 2**20
