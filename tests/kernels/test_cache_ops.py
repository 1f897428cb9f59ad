"""Writes change exactly their slots, in place; bad ones change nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paged_decode.kernels import append_kv, copy_pages

from .oracle import same_bits

PAGES, HEADS, SIZE, DIM, LAYERS = 6, 2, 4, 8, 3


def pools(dtype="float32", layers=None):
    rng = np.random.default_rng(0)
    shape = (PAGES, HEADS, SIZE, DIM) if layers is None else (layers, PAGES, HEADS, SIZE, DIM)
    return tuple(rng.standard_normal(shape).astype(jnp.dtype(dtype)) for _ in "kv")


def news(*shape):
    rng = np.random.default_rng(1)
    return tuple(rng.standard_normal((*shape, HEADS, DIM)).astype(np.float32) for _ in "kv")


def device(*arrays):
    return tuple(map(jnp.asarray, arrays))


@pytest.mark.parametrize("layer", [None, 1, "traced"])
@pytest.mark.parametrize("shape", [(3,), (3, 2)], ids=["[B]", "[B, T]"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_append_writes_its_slots_and_nothing_else(layer, shape, dtype):
    k_pages, v_pages = pools(dtype, None if layer is None else LAYERS)
    k, v = news(*shape)
    slots = np.array([23, 4, 9, 14, 17, 8][: np.prod(shape)], np.int32).reshape(shape)
    if layer == "traced":
        write = jax.jit(lambda *args, layer: append_kv(*args, layer=layer))
        got = write(*device(k_pages, v_pages, k, v, slots), layer=jnp.array(1, jnp.int32))
    else:
        got = append_kv(*device(k_pages, v_pages), k, v, slots, layer=layer)
    for pool, new in ((k_pages, k), (v_pages, v)):
        target = pool if layer is None else pool[1]
        for index in np.ndindex(*shape):
            target[slots[index] // SIZE, :, slots[index] % SIZE] = new[index].astype(pool.dtype)
    same_bits(got, (k_pages, v_pages))


def test_padding_writes_only_the_null_page():
    k_pages, v_pages = pools()
    k, v = news(3)
    got = append_kv(*device(k_pages, v_pages), k, v, np.zeros(3, np.int32))
    same_bits([pages[1:] for pages in got], [k_pages[1:], v_pages[1:]])


@pytest.mark.parametrize("slot", [-1, -PAGES * SIZE, PAGES * SIZE, 2**31 - 1])
def test_under_jit_a_slot_outside_the_pool_writes_nothing(slot):
    k_pages, v_pages = pools()
    k, v = news(1)
    got = jax.jit(append_kv)(*device(k_pages, v_pages, k, v, np.array([slot], np.int32)))
    same_bits(got, (k_pages, v_pages))


@pytest.mark.parametrize("layer", [-1, LAYERS, 2**32])
def test_under_jit_a_layer_outside_the_pool_writes_nothing(layer):
    k_pages, v_pages = pools(layers=LAYERS)
    with jax.enable_x64(True):
        write = jax.jit(lambda *args, layer: append_kv(*args, layer=layer))
        args = (*device(k_pages, v_pages, *news(1)), np.array([4], np.int32))
        got = write(*args, layer=np.int64(layer))
    same_bits(got, (k_pages, v_pages))


@pytest.mark.parametrize("far", [2**32, -(2**32)])
def test_under_jit_ids_beyond_int32_never_wrap(far):
    k_pages, v_pages = pools()
    with jax.enable_x64(True):
        slots = np.array([4 + SIZE * far, 9], np.int64)  # the page id itself is beyond
        got = jax.jit(append_kv)(*device(k_pages, v_pages, *news(2)), slots)
        ids = np.array([1 + far, 2], np.int64)
        copied = jax.jit(copy_pages)(*device(k_pages, v_pages), np.array([3, 4]), ids)
        filled = jax.jit(copy_pages)(*device(k_pages, v_pages), ids, np.array([3, 4]))
    for pool, new, one, two, three in zip(
        (k_pages, v_pages), news(2), got, copied, filled, strict=True
    ):
        written = pool.copy()
        written[2, :, 1] = new[1]
        same_bits(one, written)
        written = pool.copy()
        written[2] = pool[4]
        same_bits(two, written)
        assert np.isnan(three[3]).all()  # as any page that is not there
        same_bits(three[4], pool[2])


@pytest.mark.parametrize("layers", [None, LAYERS])
def test_copy_pages_reads_all_before_it_writes_any(layers):
    k_pages, v_pages = pools(layers=layers)
    src, dst = np.array([1, 2, 3, 0, 0], np.int32), np.array([2, 3, 5, 0, 0], np.int32)
    got = copy_pages(*device(k_pages, v_pages), src, dst)
    for pool in (k_pages, v_pages):
        pool[..., dst, :, :, :] = pool[..., src, :, :, :]
    same_bits(got, (k_pages, v_pages))


def test_copying_no_pages_changes_nothing():
    k_pages, v_pages = pools()
    none = np.zeros(0, np.int32)
    same_bits(copy_pages(*device(k_pages, v_pages), none, none), (k_pages, v_pages))


@pytest.mark.parametrize("dtype", ["float32", "float16"])  # jax 0.10.2 copies bf16 pools on CPU
def test_copies_are_in_place_when_the_pool_is_donated(dtype):
    pages = jax.ShapeDtypeStruct((4000, HEADS, SIZE, DIM), dtype)
    ids = jax.ShapeDtypeStruct((3,), jnp.int32)
    pool_bytes = 2 * np.prod(pages.shape) * jnp.dtype(dtype).itemsize
    compiled = jax.jit(copy_pages, donate_argnums=(0, 1)).lower(pages, pages, ids, ids).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == pool_bytes
    assert memory.temp_size_in_bytes < pool_bytes / 100


def test_outside_jit_a_write_consumes_the_given_arrays():
    k_pages, v_pages = device(*pools())
    append_kv(k_pages, v_pages, *news(1), np.array([4], np.int32))
    assert k_pages.is_deleted() and v_pages.is_deleted()


def test_pages_that_were_given_away_are_named():
    k_pages, v_pages = device(*pools())
    append_kv(k_pages, v_pages, *news(1), np.array([4], np.int32))
    with pytest.raises(RuntimeError, match="k_pages was deleted: .* use the array that this call"):
        append_kv(k_pages, v_pages, *news(1), np.array([4], np.int32))
    with pytest.raises(RuntimeError, match="k_pages was deleted"):
        copy_pages(k_pages, v_pages, np.array([1], np.int32), np.array([2], np.int32))


@pytest.mark.parametrize(
    "bad,error,message",
    [
        (
            dict(slots=np.array([24, 4, 5], np.int32)),
            ValueError,
            r"slots must be in 0 .. 23; got 24",
        ),
        (
            dict(slots=np.array([3, -1, 5], np.int32)),
            ValueError,
            r"slots must be in 0 .. 23; got -1",
        ),
        (dict(slots=np.array([3.0, 1.0, 5.0])), TypeError, r"slots must be an array of int32"),
        (dict(slots=np.zeros(2, np.int32)), ValueError, r"k must be \[B, Hk, D\] with B = 2"),
        (dict(slots=np.zeros((3, 1), np.int32)), ValueError, r"k must be \[B, T, Hk, D\]; got"),
        (dict(slots=np.zeros((), np.int32)), ValueError, r"slots must be \[B\] or \[B, T\]"),
        (dict(k=news(3)[0][:, :1]), ValueError, r"k must be \[B, Hk, D\] with Hk = 2; got"),
        (dict(v=news(3)[0].astype(np.int32)), TypeError, r"v must be a floating-point array"),
        (dict(layer=0), ValueError, r"k_pages must be \[L, N, Hk, S, D\]; got shape"),
        (dict(v_pages=jnp.zeros((2, 2, 4, 8))), ValueError, r"v_pages must have the shape"),
        (
            dict(
                k_pages=jnp.zeros((6, 2, 4, 8), jnp.int8), v_pages=jnp.zeros((6, 2, 4, 8), jnp.int8)
            ),
            NotImplementedError,
            r"pages of dtype int8 need k_scales and v_scales",
        ),
    ],
)
def test_a_bad_append_says_why_and_consumes_nothing(unchecked, bad, error, message):
    k_pages, v_pages = device(*pools())
    k, v = news(3)
    good = dict(k_pages=k_pages, v_pages=v_pages, k=k, v=v, slots=np.array([4, 5, 6], np.int32))
    with pytest.raises(error, match=message):
        append_kv(**good | bad)
    same_bits((k_pages, v_pages), pools())


@pytest.mark.parametrize(
    "src,dst,error,message",
    [
        (
            np.array([6], np.int32),
            np.array([1], np.int32),
            ValueError,
            r"src must be in 0 .. 5; got 6",
        ),
        (np.array([1], np.int32), np.array([-1], np.int32), ValueError, r"dst must be in 0 .. 5"),
        (
            np.array([1], np.int32),
            np.zeros(2, np.int32),
            ValueError,
            r"dst must be \[C\] with C = 1",
        ),
        (np.array([1.0]), np.array([1], np.int32), TypeError, r"src must be an array of int32"),
    ],
)
def test_a_bad_copy_says_why_and_consumes_nothing(unchecked, src, dst, error, message):
    k_pages, v_pages = device(*pools())
    with pytest.raises(error, match=message):
        copy_pages(k_pages, v_pages, src, dst)
    same_bits((k_pages, v_pages), pools())
