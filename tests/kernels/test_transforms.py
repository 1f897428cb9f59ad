"""Under jit, scan, vmap, x64, shard_map, strict promotion and -O; and what memory it takes."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paged_decode.kernels import append_kv, paged_attention

from .oracle import NAMES, Case, build, same_bits

every_backend = pytest.mark.parametrize("backend", NAMES)
CASE = Case((7, 16, 2), sinks=(6, 2), starts=(1, 0, 0), options=dict(soft_cap=3.0))


def arrays(case: Case = CASE):
    """`(function of the arrays, arrays)`, with the options of the case closed over."""
    inputs = build(case)
    named = (inputs.q, inputs.k_pages, inputs.v_pages, inputs.page_table, inputs.seq_lens)

    def call(backend):
        return lambda *args: paged_attention(
            *args, return_lse=True, implementation=backend, **inputs.options
        )

    return call, tuple(map(jnp.asarray, named))


def same_values(got, want):
    """Equal but for the last bits: XLA fuses another program in another order."""
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@every_backend
def test_jit_gives_the_same(backend):
    call, args = arrays()
    same_values(jax.jit(call(backend))(*args), call(backend)(*args))


@every_backend
def test_vmap_is_a_loop_over_calls(backend):
    call, (q, k, v, table, lens) = arrays()
    queries, lengths = jnp.stack([q, 2 * q]), jnp.stack([lens, lens - 1])
    mapped = jax.vmap(call(backend), in_axes=(0, None, None, None, 0))
    got = mapped(queries, k, v, table, lengths)
    for i in range(2):
        want = call(backend)(queries[i], k, v, table, lengths[i])
        same_values([array[i] for array in got], want)


@every_backend
def test_x64_gives_the_same_and_widens_nothing(backend):
    call, args = arrays()
    want = call(backend)(*args)
    with jax.enable_x64(True):
        wide = tuple(np.asarray(a, np.int64) if a.dtype == np.int32 else a for a in args)
        same_values(call(backend)(*args), want)
        same_values(jax.jit(call(backend))(*wide), want)


@every_backend
def test_a_derivative_is_refused_with_a_reason(backend):
    call, (q, *rest) = arrays()
    for derive in (jax.grad, jax.jacfwd):
        with pytest.raises(NotImplementedError, match="paged_attention has no derivative"):
            derive(lambda q: jnp.sum(call(backend)(q, *rest)[0]))(q)


@every_backend
def test_a_stopped_gradient_passes(backend):
    call, (q, *rest) = arrays()
    grad = jax.grad(lambda q: jnp.sum(q * call(backend)(jax.lax.stop_gradient(q), *rest)[0]))(q)
    assert grad.shape == q.shape


@every_backend
def test_shard_map_with_its_checks_gives_the_same(backend):
    case = Case((7, 16, 2))
    call, args = arrays(case)
    mesh = jax.make_mesh((1,), ("tp",), axis_types=(jax.sharding.AxisType.Auto,))
    heads, whole = jax.P(None, "tp"), jax.P()
    sharded = jax.shard_map(
        call(backend), mesh=mesh, in_specs=(heads, heads, heads, whole, whole), out_specs=heads
    )
    same_values(jax.jit(sharded)(*args), call(backend)(*args))


@every_backend
@pytest.mark.parametrize("fault", ["page id N", "page id -1", "length past the table"])
def test_under_jit_a_broken_row_is_nan_and_the_others_keep_their_bits(backend, fault):
    call, (q, k, v, table, lens) = arrays(Case((7, 16, 2), tokens=2))
    compiled = jax.jit(call(backend))
    out, lse = compiled(q, k, v, table, lens)
    if fault == "length past the table":
        lens = lens.at[1].set(17)
    else:
        table = table.at[1, 2].set(-1 if "-1" in fault else k.shape[0])
    broken, broken_lse = compiled(q, k, v, table, lens)
    assert np.isnan(broken[1]).all() and np.isnan(broken_lse[1]).all()
    others = np.array([0, 2])
    same_bits((broken[others], broken_lse[others]), (out[others], lse[others]))


@every_backend
@pytest.mark.parametrize("layer", [-1, 2, 2**31 - 1, -(2**31)])
def test_a_traced_layer_outside_the_pool_is_nan(backend, layer):
    call, (q, k, v, table, lens) = arrays(Case((7, 16, 2)))
    k, v = (jnp.stack([pages, pages]) for pages in (k, v))

    @jax.jit
    def compiled(layer):
        options = dict(layer=layer, return_lse=True, implementation=backend)
        return paged_attention(q, k, v, table, lens, **options)

    out, lse = compiled(jnp.int32(layer))
    assert np.isnan(out).all() and np.isnan(lse).all()
    same_values(compiled(jnp.int32(1)), call(backend)(q, k[1], v[1], table, lens))


@every_backend
@pytest.mark.parametrize("far", [2**32, -(2**32), 2**33 + 7])
def test_numbers_beyond_int32_are_outside_and_never_wrap(backend, far):
    """Of rows 0 to 2 the page id, the length and the first token are `far` off; row 3 is well.

    A length below 0 counts as 0.
    """
    call, (q, k, v, table, lens) = arrays(Case((7, 16, 2, 5)))
    starts = np.zeros(4, np.int64)
    wide = np.array(table, np.int64), np.array(lens, np.int64), starts
    wide[0][0, 1] += far
    wide[1][1] += far
    starts[2] += abs(far)
    with jax.enable_x64(True):
        options = dict(return_lse=True, implementation=backend)
        compiled = jax.jit(lambda t, n, s: paged_attention(q, k, v, t, n, starts=s, **options))
        out, lse = compiled(*wide)
    assert np.isnan(out[0]).all() and np.isnan(lse[0]).all()
    assert (np.isnan(out[1]) if far > 0 else np.asarray(out[1]) == 0).all()
    assert (np.asarray(out[2]) == 0).all() and (np.asarray(lse[2]) == -np.inf).all()
    want = call(backend)(q, k, v, table, lens)
    same_values([x[3] for x in (out, lse)], [x[3] for x in want])


@every_backend
@pytest.mark.parametrize("tokens", [None, 2], ids=["T=1", "T=2"])
@pytest.mark.parametrize("length", [-1, -(2**31), 2**31 - 1])
def test_under_jit_a_length_at_the_end_of_int32_is_nan_and_one_below_0_is_0(
    backend, length, tokens
):
    call, (q, k, v, table, lens) = arrays(Case((7, 16, 2), tokens=tokens))
    out, lse = map(np.asarray, jax.jit(call(backend))(q, k, v, table, lens.at[1].set(length)))
    if length < 0:
        assert (out[1] == 0).all() and (lse[1] == -np.inf).all()
    else:
        assert np.isnan(out[1]).all() and np.isnan(lse[1]).all()
    assert np.isfinite(out[[0, 2]]).all()


def test_memory_does_not_grow_with_the_width_of_the_table():
    call, (q, k, v, _, lens) = arrays(Case((7, 16, 2), page_size=16, columns=1))

    def temp_bytes(columns):
        table = jnp.zeros((3, columns), jnp.int32)
        compiled = jax.jit(call("xla")).lower(q, k, v, table, lens).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    narrow, wide = temp_bytes(64), temp_bytes(4096)
    gathered_bytes = 3 * (4096 - 64) * k[0].nbytes
    assert wide - narrow < gathered_bytes / 100


def test_a_call_that_decodes_many_steps_compiles_once():
    call, (q, k, v, table, _) = arrays(Case((16, 16, 16)))
    compiled = jax.jit(call("xla"))
    for length in range(1, 17):
        compiled(q, k, v, table, jnp.full(3, length, jnp.int32))
    assert compiled._cache_size() == 1


# --- one step of a model: append, then attend, in place ---------------------------------------

LAYERS, PAGES = 3, 2000


def one_layer(k_pages, v_pages, q, table, lens, slots, layer):
    new = q[:, :2]  # depends on the layer before, as in a model
    k_pages, v_pages = append_kv(k_pages, v_pages, new, new, slots, layer=layer)
    return k_pages, v_pages, paged_attention(q, k_pages, v_pages, table, lens, layer=layer)


def scanned(k_pages, v_pages, q, table, lens, slots):
    def body(carry, layer):
        return one_layer(*carry, table, lens, slots, layer), None

    layers = jnp.arange(LAYERS, dtype=jnp.int32)
    return jax.lax.scan(body, (k_pages, v_pages, q), layers)[0]


def unrolled(k_pages, v_pages, q, table, lens, slots):
    for layer in range(LAYERS):
        k_pages, v_pages, q = one_layer(k_pages, v_pages, q, table, lens, slots, layer)
    return k_pages, v_pages, q


def tuples(k_pages, v_pages, q, table, lens, slots):
    k_pages, v_pages = list(k_pages), list(v_pages)
    for i in range(LAYERS):
        k_pages[i], v_pages[i], q = one_layer(k_pages[i], v_pages[i], q, table, lens, slots, None)
    return tuple(k_pages), tuple(v_pages), q


def step_arguments(dtype):
    inputs = build(Case((7, 16, 2)))
    slots = np.array([inputs.page_table[b, (n - 1) // 4] * 4 + (n - 1) % 4 for b, n in
                      enumerate((7, 16, 2))], np.int32)  # fmt: skip
    rng = np.random.default_rng(0)
    k, v = (rng.standard_normal((LAYERS, PAGES, 2, 4, 16)).astype(dtype) for _ in "kv")
    return k, v, (jnp.asarray(inputs.q), inputs.page_table, inputs.seq_lens, slots)


@pytest.mark.parametrize("dtype", ["float32", "float16"])  # jax 0.10.2 copies bf16 pools on CPU
@pytest.mark.parametrize("step", [scanned, unrolled, tuples])
def test_a_step_updates_the_donated_pool_in_place(step, dtype):
    k, v, rest = step_arguments(dtype)
    k, v = (tuple(k), tuple(v)) if step is tuples else (k, v)
    pool_bytes = sum(a.nbytes for a in jax.tree.leaves((k, v)))
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(k, v, *rest).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == pool_bytes
    assert memory.temp_size_in_bytes < pool_bytes / 20


def test_scan_over_a_stack_equals_separate_layers():
    k, v, rest = step_arguments("float32")
    ks, vs, q = jax.jit(scanned)(k, v, *rest)
    k_tuple, v_tuple, q_tuple = jax.jit(tuples)(tuple(k), tuple(v), *rest)
    for got, want in ((ks, jnp.stack(k_tuple)), (vs, jnp.stack(v_tuple)), (q, q_tuple)):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


# --- other interpreters -----------------------------------------------------------------------


def test_optimised_python_still_checks_its_arguments():
    program = """
import jax.numpy as jnp, numpy as np
from paged_decode.kernels import append_kv, paged_attention
assert False, "-O is not in effect"
pages = jnp.zeros((2, 1, 4, 8))
call = lambda **bad: paged_attention(**({"q": jnp.zeros((1, 1, 8)), "k_pages": pages,
    "v_pages": pages, "page_table": np.ones((1, 2), np.int32),
    "seq_lens": np.ones(1, np.int32)} | bad))
call()
for bad in ({"seq_lens": np.full(1, 9, np.int32)}, {"page_table": np.full((1, 2), 2, np.int32)},
            {"q": jnp.zeros((1, 8))}, {"seq_lens": np.ones(1)}):
    try:
        call(**bad)
    except (ValueError, TypeError) as error:
        print(type(error).__name__)
"""
    done = subprocess.run(
        [sys.executable, "-O", "-W", "error", "-c", program], capture_output=True, text=True
    )
    assert done.stdout.split() == ["ValueError", "ValueError", "ValueError", "TypeError"], done


def test_importing_the_kernels_touches_no_device_and_no_backend():
    program = """
import sys, paged_decode.kernels
from jax._src import xla_bridge
print(xla_bridge.backends_are_initialized(), "paged_decode.kernels.xla" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.split() == ["False", "False"], done
