"""Heads over a mesh: the same numbers as on one device, and no collective in attention."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from paged_decode import BlockAllocator, Engine, EngineConfig, KVCache, PageCopies, SamplingParams
from paged_decode.kernels import append_and_attend

from ..devices import first_devices
from . import tiny

COLLECTIVES = r"all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
SIZES = dict(num_layers=1, num_pages=12, page_size=4, head_dim=8)
KINDS = [AxisType.Auto, AxisType.Explicit]


def make_mesh(heads: int, kind: AxisType = AxisType.Auto, other: int = 1):
    return jax.make_mesh(
        (other, heads),
        ("expert", "tensor"),
        axis_types=(kind,) * 2,
        devices=first_devices(heads * other),
    )


def step(cache, q, k, v, batch, sinks, implementation="xla"):
    """Write, then read."""
    cache = cache.append(0, k, v, batch.slots)
    options = dict(sinks=sinks, return_lse=True, implementation=implementation)
    return cache, cache.attend(0, q, batch, **options)


def inputs(kv_heads: int, heads: int, dim: int = 8, num_pages: int = SIZES["num_pages"]):
    rng = np.random.default_rng(0)
    allocator = BlockAllocator(num_pages, SIZES["page_size"])
    rows = [allocator.allocate(rng.integers(0, 9, n)) for n in (5, 9, 2)]
    batch = allocator.batch(rows, [0] * 3, [5, 9, 2], tokens_per_row=9)
    q, k, v = (
        rng.standard_normal((3, 9, n, dim)).astype(np.float32) for n in (heads, kv_heads, kv_heads)
    )
    return q, k, v, batch, rng.standard_normal((heads, 1)).astype(np.float32)


def run(args, kv_heads, implementation="xla", **where):
    cache = KVCache.create(**SIZES, num_kv_heads=kv_heads, **where)
    jitted = jax.jit(step, donate_argnums=0, static_argnames="implementation")
    return jitted(cache, *args, implementation=implementation)


FITTING = [(hk, n) for hk in (1, 2, 3, 8) for n in (1, 2, 4, 8) if hk % n == 0 or n % hk == 0]


@pytest.mark.parametrize(
    ("implementation", "kv_heads"),
    [
        *(("xla", 1), ("reference", 2), ("xla", 3), ("xla", 8)),
        *(
            pytest.param(*each, marks=pytest.mark.long)
            for each in (("reference", 1), ("xla", 2), ("reference", 3), ("reference", 8))
        ),
    ],
)
def test_attention_on_a_mesh_equals_one_device(kv_heads, implementation):
    """To the last bit in the reference, where no head's arithmetic depends on how many there are.

    XLA for CPU multiplies matrices in another order when a device has one or two heads.
    """
    args = inputs(kv_heads, 24 if kv_heads == 3 else 8)
    _, want = run(args, kv_heads, implementation)
    for devices in (n for hk, n in FITTING if hk == kv_heads):
        for kind in KINDS if devices > 1 else KINDS[:1]:
            mesh = make_mesh(devices, kind)
            cache, got = run(args, kv_heads, implementation, mesh=mesh, head_axis="tensor")
            for one, many in zip(want, got, strict=True):
                if implementation == "reference":
                    np.testing.assert_array_equal(many, one)
                np.testing.assert_allclose(many, one, rtol=1e-6, atol=1e-6)
            spec = cache.k_pages[0].sharding.spec
            assert devices == 1 or tuple(spec)[:2] == (None, "tensor")


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.name)
@pytest.mark.parametrize("kv_heads, devices", [(2, 2), (2, 8), (8, 4)])
def test_append_and_attend_on_a_mesh_equals_one_after_the_other(kv_heads, devices, kind):
    q, k, v, batch, sinks = inputs(kv_heads, 8)

    def fused(cache, q, k, v, batch, sinks):
        k, v = (jnp.repeat(new, cache.placement.kv_copies, axis=-2) for new in (k, v))
        pools = cache.k_pages[0], cache.v_pages[0]
        options = dict(slots="all", sinks=sinks, placement=cache.placement)
        return append_and_attend(*pools, q, k, v, batch.page_table, batch.seq_lens, **options)

    _, (want, _) = run((q, k, v, batch, sinks), kv_heads)
    mesh = make_mesh(devices, kind)
    cache = KVCache.create(**SIZES, num_kv_heads=kv_heads, mesh=mesh, head_axis="tensor")
    program = jax.jit(fused, donate_argnums=0).lower(cache, q, k, v, batch, sinks).compile()
    assert not re.search(r"all-gather|all-reduce", program.as_text())
    got, k_pages, v_pages = program(cache, q, k, v, batch, sinks)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)
    other = KVCache.create(**SIZES, num_kv_heads=kv_heads, mesh=mesh, head_axis="tensor")
    appended = other.append(0, k, v, batch.slots)
    # Page 0 takes the padding of `append`; the other writes it nowhere.
    np.testing.assert_array_equal(k_pages[1:], appended.k_pages[0][1:])
    np.testing.assert_array_equal(v_pages[1:], appended.v_pages[0][1:])


@pytest.mark.parametrize("kind", KINDS)
def test_other_axes_of_the_mesh_are_kept_and_hold_copies(kind):
    args = inputs(2, 6)
    _, want = run(args, 2)
    mesh = make_mesh(2, kind, other=4)
    with jax.set_mesh(mesh):
        cache, got = run(args, 2, mesh=mesh, head_axis="tensor")
    np.testing.assert_allclose(got[0], want[0], rtol=1e-6, atol=1e-6)
    assert cache.k_pages[0].sharding.mesh.axis_names == ("expert", "tensor")


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.name)
@pytest.mark.parametrize("own", [{"tensor"}, {"expert", "tensor"}, {"expert"}])
def test_inside_the_callers_own_shard_map_local_heads_stay_local(own, kind):
    args = inputs(2, 6)
    _, want = run(args, 2)
    mesh = make_mesh(2, kind, other=2)
    cache = KVCache.create(**SIZES, num_kv_heads=2, mesh=mesh, head_axis="tensor")
    heads = "tensor" if "tensor" in own else None
    pages, four = PartitionSpec(None, heads), PartitionSpec(None, None, heads)
    none = PartitionSpec()
    mapped = jax.shard_map(
        step,
        mesh=mesh,
        in_specs=(pages, four, four, four, none, PartitionSpec(heads)),
        out_specs=(pages, (four, four)),
        axis_names=own,
        check_vma=False,
    )
    specs = (four, four, four, none, PartitionSpec(heads))
    # Explicit axes want the arguments of a shard_map to lie as it says.
    args = jax.device_put(args, tuple(NamedSharding(mesh, spec) for spec in specs))
    _, (out, _) = jax.jit(mapped, donate_argnums=0)(cache, *args)
    np.testing.assert_allclose(out, want[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.name)
@pytest.mark.parametrize("kv_heads, devices", [(2, 2), (2, 8), (8, 8)])
def test_a_step_has_no_collective_and_does_not_copy_the_pool(kv_heads, devices, kind):
    """q and K, V come split by heads, as column-split projections leave them."""
    mesh = make_mesh(devices, kind)
    split = NamedSharding(mesh, PartitionSpec(None, None, "tensor"))
    q, k, v, batch, sinks = inputs(kv_heads, 8, num_pages=1024)
    k, v = (np.repeat(new, max(devices // kv_heads, 1), axis=-2) for new in (k, v))
    q, k, v = (jax.device_put(a, split) for a in (q, k, v))
    sizes = SIZES | dict(num_pages=1024)
    cache = KVCache.create(**sizes, num_kv_heads=kv_heads, mesh=mesh, head_axis="tensor")
    args = (cache, q, k, v, batch, sinks)
    program = jax.jit(step, donate_argnums=0).lower(*args).compile()
    assert not re.findall(COLLECTIVES, program.as_text())
    pool = sum(a.nbytes for a in jax.tree.leaves(cache)) // devices
    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes == pool and memory.temp_size_in_bytes < pool / 2


@pytest.mark.parametrize("kv_heads, devices", [(3, 2), (3, 4), (3, 8), (8, 3), (2, 3)])
def test_heads_that_do_not_divide_are_refused_with_the_numbers(kv_heads, devices):
    with pytest.raises(ValueError, match=f"{kv_heads} KV heads .* {devices} devices"):
        KVCache.create(**SIZES, num_kv_heads=kv_heads, mesh=make_mesh(devices), head_axis="tensor")


def test_query_heads_that_do_not_divide_and_unknown_axes_are_refused():
    cache = KVCache.create(**SIZES, num_kv_heads=1, mesh=make_mesh(2), head_axis="tensor")
    q, _, _, batch, _ = inputs(1, 3)
    with pytest.raises(ValueError, match="Hq = 3 .* 2 devices"):
        cache.attend(0, q, batch)
    with pytest.raises(ValueError, match="'expert': 1, 'tensor': 2"):
        KVCache.create(**SIZES, num_kv_heads=2, mesh=make_mesh(2), head_axis="model")
    with pytest.raises(ValueError, match="go together"):
        KVCache.create(**SIZES, num_kv_heads=2, mesh=make_mesh(2))


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.name)
def test_copies_reach_every_device(kind):
    cache = KVCache.create(**SIZES, num_kv_heads=2, mesh=make_mesh(2, kind), head_axis="tensor")
    rng = np.random.default_rng(0)
    cache = jax.tree.map(
        lambda a: jax.device_put(rng.standard_normal(a.shape).astype(np.float32), a.sharding), cache
    )
    before = np.array(cache.k_pages[0])
    after = cache.copy_pages(PageCopies(np.array([1, 2], np.int32), np.array([2, 3], np.int32)))
    np.testing.assert_array_equal(after.k_pages[0][1:4], before[[1, 1, 2]])
    assert after.placement == cache.placement and cache.is_deleted


@pytest.mark.parametrize(
    "devices, kind",
    [
        *((2, KINDS[1]), (4, KINDS[0])),
        *(pytest.param(*each, marks=pytest.mark.long) for each in ((1, KINDS[0]), (4, KINDS[1]))),
    ],
)
def test_the_engine_gives_the_tokens_of_one_device_with_forks_prefixes_and_preemption(
    devices, kind
):
    """tiny has Hk = 2, so on 4 devices every KV head has two copies."""
    pages = 14  # too few for all at once
    cache = KVCache.create(
        num_layers=tiny.LAYERS,
        num_pages=pages,
        num_kv_heads=tiny.KV_HEADS,
        page_size=4,
        head_dim=tiny.DIM,
        mesh=make_mesh(devices, kind),
        head_axis="tensor",
    )
    allocator = BlockAllocator(pages, 4, hash_key=b"test")
    shapes = EngineConfig(max_rows=4, row_buckets=(4,), prefill_chunk=8, decode_steps=4)
    engine = Engine(tiny.model, jax.tree.map(jnp.asarray, tiny.PARAMS), cache, allocator, shapes)
    prompts = tiny.prompts(4, low=8, high=14)
    prompts.append(prompts[0])  # a prefix hit
    done = engine.generate(prompts, SamplingParams(max_new_tokens=12), n=2)
    for i, completion in enumerate(done):
        assert completion.tokens == tiny.dense_greedy(prompts[i // 2], 12)
    assert engine.stats.preemptions and engine.stats.prefix_hit_tokens
    assert allocator.stats().copies
    engine.allocator.check_invariants()
