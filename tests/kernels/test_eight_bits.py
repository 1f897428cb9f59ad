"""Pages of 8 bits with a scale for each token and KV head: read, written, copied, refused."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paged_decode.kernels import append_and_attend, append_kv, copy_pages, paged_attention
from paged_decode.kernels.record import POOLS

from .oracle import COMPILED, LSE_TOLERANCE, NAMES, TOLERANCE, Case, build, check, same_bits

DTYPES = ("int8", "float8_e4m3fn")
LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0}
every_backend = pytest.mark.parametrize("backend", NAMES)
every_dtype = pytest.mark.parametrize("pages", DTYPES)

READ = {
    "float32": Case((0, 1, 15, 16, 17, 48), 2, 3, 64, 16, 3),
    "bfloat16, D = 80": Case((33, 0, 1, 64), 1, 4, 80, 32, 2, dtype="bfloat16"),
    "float16, T = 3": Case((3, 20, 0, 40), 2, 2, 64, 16, 3, tokens=3, dtype="float16"),
    "bfloat16, T = 24": Case((48, 0, 24, 40), 2, 3, 64, 16, 3, tokens=24, dtype="bfloat16"),
    "T = 5, options": Case(
        (0, 1, 15, 16, 17, 48),
        2,
        3,
        64,
        16,
        3,
        tokens=5,
        starts=(0, 1, 2, 0, 5, 9),
        query_lens=(5, 1, 4, 2, 5, 3),
        sinks=(2,),
        options=dict(sliding_window=7, soft_cap=1.5, scale=0.3),
    ),
    "pages of 128": Case((0, 1, 127, 128, 129, 300), 2, 3, 64, 128, 3, sinks=(2,)),
    "pages of 128, bfloat16": Case((257, 0, 128), 3, 4, 128, 128, 3, dtype="bfloat16"),
    "pages of 128, T = 5, options": Case(
        (3, 0, 130, 256, 300),
        2,
        3,
        64,
        128,
        3,
        tokens=5,
        starts=(0, 1, 2, 120, 0),
        query_lens=(5, 1, 4, 2, 5),
        sinks=(2,),
        options=dict(sliding_window=9, soft_cap=1.5, scale=0.3),
    ),
}


def one_dtype(names: dict, *also: tuple[str, str]) -> pytest.MarkDecorator:
    """Every name with the dtypes by turns, or as `also` says; and with the other one for CI."""
    now = {(name, DTYPES[place % 2]) for place, name in enumerate(names)} | {*also}
    return pytest.mark.parametrize(
        ("name", "pages"),
        [
            pytest.param(name, pages, marks=() if (name, pages) in now else pytest.mark.long)
            for name in names
            for pages in DTYPES
        ],
    )


@every_backend
@one_dtype(READ, ("pages of 128, T = 5, options", "int8"))
def test_numbers_times_scales_are_what_is_attended_to(backend, pages, name):
    check(backend, replace(READ[name], pages=pages))


UNSEEN = {
    "one query": (None, 4),
    "T = 3": (3, 4),
    "T = 3, pages of 128": (3, 128),
    "one query, pages of 128": (None, 128),
}


@every_backend
@one_dtype(UNSEEN)
def test_poison_that_no_query_sees_changes_no_bit(backend, pages, name):
    tokens, size = UNSEEN[name]
    lens = (0, 1, 3, 9, 16) if size == 4 else (0, 3, 130)
    options = dict(sliding_window=5)
    case = Case(lens, page_size=size, tokens=tokens, pages=pages, options=options)
    clean, loud = build(case), build(case, fill=np.nan)
    for row, length in enumerate(case.lens):
        loud.poison(row, range(max(length - 4 - (tokens or 1), 0)), np.inf)
    if pages != "int8":  # its numbers may be NaN as well
        unseen = ~np.isfinite(loud.scales["k_scales"])
        loud.k_pages[unseen] = loud.v_pages[unseen] = np.nan
    same_bits(loud.call(backend), clean.call(backend))


# --- what is written --------------------------------------------------------------------------


def empty(pages: str, *, num_pages: int = 9, heads: int = 2, size: int = 4, dim: int = 64):
    """Pools by name, with something loud in every slot."""
    shape = (num_pages, heads, size, dim)
    numbers = jnp.full(shape, 72, jnp.dtype(pages))
    scales = jnp.full(shape[:-1], np.nan, jnp.float32)
    return dict(k_pages=numbers, v_pages=numbers + 0, k_scales=scales, v_scales=scales + 0)


def tokens_of(count: int, heads: int = 2, dim: int = 64, dtype: str = "float32") -> list:
    """Keys and values of all magnitudes."""
    rng = np.random.default_rng(3)
    sizes = 10.0 ** rng.integers(-6, 5, (2, count, heads, 1))
    return list((rng.standard_normal((2, count, heads, dim)) * sizes).astype(jnp.dtype(dtype)))


def stand_for(numbers, scales) -> np.ndarray:
    with np.errstate(invalid="ignore"):  # 0 times infinity
        return np.asarray(numbers, np.float64) * np.asarray(scales, np.float64)[..., None]


@every_dtype
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_each_token_has_the_scale_of_its_largest_number(pages, dtype):
    new, slots = tokens_of(5, dtype=dtype), np.array([4, 9, 6, 35, 31], np.int32)
    out = append_kv(k=new[0], v=new[1], slots=slots, **empty(pages))
    for numbers, scales, x in zip(out[:2], out[2:], new, strict=True):
        numbers, scales = (np.asarray(a)[slots // 4, :, slots % 4] for a in (numbers, scales))
        x = np.asarray(x, np.float64)
        top = np.abs(x).max(axis=-1)
        np.testing.assert_allclose(scales, top / LARGEST[pages], rtol=3e-7)
        error = np.abs(stand_for(numbers, scales) - x)
        half = scales[..., None] / 2  # of a step of int8
        if pages != "int8":  # 3 bits behind the first one, and steps of 2**-9 near 0
            half = np.maximum(np.abs(x) / 16, scales[..., None] * 2.0**-10)
        assert (error <= half * 1.001).all()
    held = np.isfinite(np.asarray(out[2]))
    assert held.sum() == 10 and (np.asarray(out[0]).astype(np.float32)[~held] == 72).all()


@every_dtype
@pytest.mark.parametrize("fixed", [False, True], ids=["own scales", "fixed scales"])
def test_a_token_of_zeros_is_zeros_and_a_loud_one_stays_loud(pages, fixed):
    k, v = tokens_of(4)
    k[0], k[1, 0, 5], k[2, 1, 7], v[3] = 0, np.nan, np.inf, 1e-42
    given = dict(fixed_scales=(np.ones(2, np.float32),) * 2) if fixed else {}
    out = append_kv(k=k, v=v, slots=np.arange(4, 8, dtype=np.int32), **given, **empty(pages))
    k_of, v_of = (
        stand_for(numbers[1], scales[1]) for numbers, scales in zip(out[:2], out[2:], strict=True)
    )
    assert (k_of[:, 0] == 0).all() and np.abs(v_of[:, 3]).max() < 1e-30
    assert np.isnan(k_of[0, 1]).all() and np.isfinite(k_of[1, 1]).all()
    assert not np.isfinite(k_of[1, 2]).any() and np.isfinite(k_of[0, 2]).all()


@every_dtype
def test_fixed_scales_are_taken_for_all_tokens(pages):
    k, v = tokens_of(3)
    fixed = (np.array([0.5, 2], np.float32), np.array([1e-3, 30], np.float32))
    slots = np.array([4, 5, 11], np.int32)
    out = append_kv(k=k, v=v, slots=slots, fixed_scales=fixed, **empty(pages))
    for numbers, scales, x, own in zip(out[:2], out[2:], (k, v), fixed, strict=True):
        numbers, scales = (np.asarray(a)[slots // 4, :, slots % 4] for a in (numbers, scales))
        assert (scales == own).all()
        most = LARGEST[pages] * own[:, None]
        step = np.maximum(own[:, None] / 2, 0 if pages == "int8" else np.abs(x) / 16)
        assert (np.abs(stand_for(numbers, scales) - np.clip(x, -most, most)) <= step).all()


WRITE = {
    "one token": Case((0, 1, 15, 16, 17, 48), 2, 3, 64, 16, 3),
    "one token, bfloat16": Case((33, 0, 1, 64), 2, 4, 128, 16, 4, dtype="bfloat16"),
    "ragged T": Case((0, 2, 3, 17, 48), 2, 3, 64, 16, 3, tokens=3, query_lens=(0, 1, 3, 2, 0)),
    "pages of 128": Case((0, 1, 128, 129, 34), 2, 3, 64, 128, 2),
    "pages of 128, bfloat16": Case((33, 0, 256), 3, 4, 128, 128, 2, dtype="bfloat16"),
    "pages of 128, ragged T": Case(
        (0, 2, 130, 17), 2, 3, 64, 128, 2, tokens=3, query_lens=(0, 1, 3, 2)
    ),
}
WRITE["fixed scales"] = WRITE["one token"]
WRITE["fixed scales, ragged T"] = WRITE["ragged T"]


@every_backend
@one_dtype(WRITE, ("ragged T", "float8_e4m3fn"), ("pages of 128, ragged T", "int8"))
def test_append_and_attend_is_append_and_then_attend(backend, pages, name):
    """To the last bit in the pools, whichever kernel writes them."""
    case, fixed = replace(WRITE[name], pages=pages), name.startswith("fixed")
    inputs = build(case, fill=np.nan)
    rows, tokens, size = len(case.lens), case.tokens or 1, case.page_size
    k, v = tokens_of(rows * tokens, case.kv_heads, case.dim, case.dtype)
    k, v = (x.reshape(rows, tokens, *x.shape[1:]) for x in (k, v))
    slots = np.full((rows, tokens), -1, np.int32)
    own = case.query_lens or (tokens,) * rows
    for row, t in np.ndindex(rows, tokens):
        place = case.lens[row] - tokens + t
        if t >= tokens - own[row] and place >= 0:
            slots[row, t] = inputs.page_table[row, place // size] * size + place % size
    options = {name: x for name, x in inputs.options.items() if "scales" not in name}
    scales = (np.full(case.kv_heads, 0.02, np.float32), np.full(case.kv_heads, 0.01, np.float32))
    given = dict(fixed_scales=scales) if fixed else {}

    def pools():
        both = dict(k_pages=inputs.k_pages, v_pages=inputs.v_pages, **inputs.scales)
        return {name: jnp.array(pool) for name, pool in both.items()}

    shape = (k, v) if case.tokens else (k[:, 0], v[:, 0])
    tables = dict(page_table=inputs.page_table, seq_lens=inputs.seq_lens)
    out, lse, *got = append_and_attend(
        q=inputs.q, k=shape[0], v=shape[1], implementation=backend, return_lse=True,
        slots=None if "query_lens" in options else "all", **tables, **pools(), **options, **given,
    )  # fmt: skip
    want = jax.jit(append_kv)(k=k, v=v, slots=slots, **pools(), **given)
    same_bits(got, want)
    named = dict(zip(POOLS, want, strict=True))
    plain, plain_lse = paged_attention(
        q=inputs.q, implementation="reference", return_lse=True, **tables, **named, **options
    )
    rtol, atol = TOLERANCE[case.dtype]
    wide = [np.asarray(x, np.float64) for x in (out, plain)]
    most = np.maximum(np.abs(wide[1]).max(axis=-1, keepdims=True), 1)  # values are of any size
    np.testing.assert_allclose(wide[0] / most, wide[1] / most, rtol=rtol, atol=atol)
    np.testing.assert_allclose(lse, plain_lse, rtol=LSE_TOLERANCE[0], atol=1e-3)


@every_backend
@every_dtype
@pytest.mark.parametrize("size", [4, pytest.param(128, marks=pytest.mark.long)])
def test_one_layer_of_a_stack_is_written_and_read(backend, pages, size):
    inputs = build(Case((7, 16, 2), page_size=size, pages=pages))
    k, v = tokens_of(3, dim=16)
    tables = dict(page_table=inputs.page_table, seq_lens=inputs.seq_lens)
    one = dict(k_pages=inputs.k_pages, v_pages=inputs.v_pages, **inputs.scales)
    three = {name: jnp.stack([pool, pool, pool]) for name, pool in one.items()}
    one = {name: jnp.array(pool) for name, pool in one.items()}
    call = dict(q=inputs.q, k=k, v=v, implementation=backend, **tables)
    want, got = append_and_attend(**call, **one), append_and_attend(**call, **three, layer=1)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5, atol=1e-6)  # two programs
    same_bits([pool[1] for pool in got[1:]], want[1:])
    old = (inputs.k_pages, inputs.v_pages, *inputs.scales.values())
    same_bits([pool[2] for pool in got[1:]], old)
    outside = jax.jit(lambda layer, pools: append_and_attend(**call, **pools, layer=layer))
    three = {name: jnp.stack([pool] * 2) for name, pool in zip(three, old, strict=True)}
    out, *left = outside(np.int32(2), three)
    assert np.isnan(out).all()
    same_bits([pool[1] for pool in left], old)


@every_dtype
def test_copied_pages_take_their_scales_along(pages):
    k, v = tokens_of(9)
    out = append_kv(k=k, v=v, slots=np.arange(8, 17, dtype=np.int32), **empty(pages))
    named = dict(zip(empty(pages), out, strict=True))
    ids = np.array([2, 3, 0], np.int32), np.array([5, 2, 0], np.int32)
    before = [np.asarray(pool) for pool in named.values()]
    after = copy_pages(src=ids[0], dst=ids[1], **named)
    same_bits([pool[[5, 2, 3]] for pool in map(np.asarray, after)], [b[[2, 3, 3]] for b in before])


@every_dtype
@pytest.mark.parametrize("backend", [name for name in COMPILED if name != "reference"])
def test_no_step_copies_a_pool(backend, pages):
    if jax.default_backend() == "cpu" and pages != "int8":
        return  # XLA for CPU widens pools of small floats, bfloat16 as well
    shape = (2**12, 2, 16, 64)
    numbers, scales = (
        jax.ShapeDtypeStruct(*x) for x in ((shape, jnp.dtype(pages)), (shape[:-1], np.float32))
    )
    pools = dict(k_pages=numbers, v_pages=numbers, k_scales=scales, v_scales=scales)
    table, lens = np.zeros((4, 4), np.int32), np.full(4, 4, np.int32)

    def step(pools, q):
        for _ in range(2):
            new = q[:, ::2]
            out, *pools = append_and_attend(
                q=q, k=new, v=new, page_table=table, seq_lens=lens, implementation=backend, **pools
            )
            q, pools = q + out, dict(zip(POOLS, pools, strict=True))
        return pools, q

    q = jax.ShapeDtypeStruct((4, 4, 64), np.float32)
    memory = jax.jit(step, donate_argnums=0).lower(pools, q).compile().memory_analysis()
    size = int(np.prod(shape))
    assert memory.alias_size_in_bytes == 2 * size + 8 * size // 64
    assert memory.temp_size_in_bytes < size / 4


# --- what is refused --------------------------------------------------------------------------


def call(**changes):
    inputs = build(Case((7, 16, 2), pages="int8"))
    given = dict(q=inputs.q, k_pages=inputs.k_pages, v_pages=inputs.v_pages, **inputs.scales)
    given |= dict(page_table=inputs.page_table, seq_lens=inputs.seq_lens) | changes
    return paged_attention(**given)


def test_scales_that_do_not_fit_are_refused_with_what_was_expected(unchecked):
    good = build(Case((7, 16, 2), pages="int8"))
    scales = good.options["k_scales"]
    floats = good.k_pages.astype(np.float32)
    for error, words, changes in (
        (ValueError, "go together; v_scales is missing", dict(v_scales=None)),
        (TypeError, "v_scales must be an array of float32", dict(v_scales=scales.astype("f2"))),
        (ValueError, r"without their last axis, \(", dict(k_scales=scales[:, :1])),
        (ValueError, "pages of dtype float32", dict(k_pages=floats, v_pages=floats)),
    ):
        with pytest.raises(error, match=words):
            call(**changes)
    with pytest.raises(NotImplementedError, match="int8 need k_scales and v_scales"):
        call(k_scales=None, v_scales=None, implementation="xla")
    wrong = np.zeros(2, np.float32), np.ones(2, np.float32)
    pools, (k, v) = empty("int8"), tokens_of(1)
    for error, words, fixed in (
        (ValueError, "finite and > 0", wrong),
        (ValueError, r"must be \[Hk\] with Hk = 2", (wrong[1][:1],) * 2),
        (TypeError, "must be a tuple of two arrays, .* got a ndarray", wrong[1]),
        (TypeError, "got 3 things", (wrong[1],) * 3),
    ):
        with pytest.raises(error, match=words):
            append_kv(k=k, v=v, slots=np.array([4]), fixed_scales=fixed, **pools)
    plain = jnp.zeros((9, 2, 4, 64)), jnp.zeros((9, 2, 4, 64))
    with pytest.raises(ValueError, match="fixed_scales are for pages of 8 bits"):
        append_kv(*plain, k, v, np.array([4]), fixed_scales=wrong)


@pytest.mark.parametrize("dtype", ["float8_e5m2", "int16", "uint8"])
def test_other_small_dtypes_are_refused_by_name(unchecked, dtype):
    pages = np.zeros((32, 2, 4, 16), jnp.dtype(dtype))
    scales = np.zeros((32, 2, 4), np.float32)
    with pytest.raises(ValueError, match=f"int8 or float8_e4m3fn; got pages of dtype {dtype}"):
        call(k_pages=pages, v_pages=pages, k_scales=scales, v_scales=scales)
    with pytest.raises(NotImplementedError, match=f"k_pages of dtype {dtype} is not served"):
        call(k_pages=pages, v_pages=pages, k_scales=None, v_scales=None, implementation="xla")
    (k, v), pages = tokens_of(1, dim=16), jnp.asarray(pages)
    with pytest.raises(NotImplementedError, match=f"pages of dtype {dtype} are not served"):
        append_kv(pages, pages, k, v, np.array([4]))
    with pytest.raises(NotImplementedError, match=f"pages of dtype {dtype} are not served"):
        copy_pages(pages, pages, np.array([1]), np.array([2]))
