"""What the Hopper kernel does not serve, and that it says so before anything runs."""

import importlib

import jax
import jax.numpy as jnp
import pytest

from paged_decode.kernels import dispatch, paged_attention
from paged_decode.kernels.eight_bits import is_eight_bits

REFUSED = {
    "float32": (dict(dtype=jnp.float32), "tf32"),
    "q wider than pages": (dict(q_dtype=jnp.float32), "q of dtype float32 over pages of dtype"),
    "8-bit pages": (
        dict(dtype=jnp.int8, q_dtype=jnp.bfloat16),
        "does not read pages of 8 bits (int8)",
    ),
    "D 80": (dict(dim=80), "got D = 80"),
    "D 256 where T = 1": (dict(dim=256), "D in (64, 128); got D = 256"),
    "D 80 where T = 2": (dict(dim=80, tokens=2), "D in (64, 128, 256); got D = 80"),
    "a group of 65": (dict(group=65), "up to 64 query heads a KV head; got 65"),
    "pages of 4": (dict(page_size=4), "page sizes; got 4"),
    "pages of 24": (dict(page_size=24), "page sizes; got 24"),
    "a pool beyond int32": (dict(pages=2**26), "counts them in int32"),
    "a table beyond int32": (dict(rows=2**12, columns=2**12), "tiles than blocks can count"),
    "units beyond int32": (dict(rows=2**12, tokens=2**24), "tiles than blocks can count"),
}


def call(
    rows=3,
    tokens=1,
    group=2,
    kv_heads=2,
    dim=128,
    page_size=64,
    pages=9,
    columns=4,
    dtype=jnp.bfloat16,
    q_dtype=None,
    implementation="pallas_gpu",
):
    of = jax.ShapeDtypeStruct
    pool = of((pages, kv_heads, page_size, dim), dtype)
    args = (
        of((rows, tokens, kv_heads * group, dim), q_dtype or dtype),
        pool,
        pool,
        of((rows, columns), jnp.int32),
        of((rows,), jnp.int32),
    )
    scales = of(pool.shape[:-1], jnp.float32) if is_eight_bits(dtype) else None

    def attend(scales, *args):
        options = dict(k_scales=scales, v_scales=scales, implementation=implementation)
        return paged_attention(*args, **options)

    return jax.eval_shape(attend, scales, *args)


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_cannot_serve_is_refused_with_the_reason(name, monkeypatch):
    monkeypatch.setattr(dispatch, "default_platform", lambda platform=None: "gpu")
    changed, reason = REFUSED[name]
    with pytest.raises(NotImplementedError) as refused:
        call(**changed)
    assert reason in str(refused.value)


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="about machines without a GPU")
def test_it_is_refused_where_it_cannot_run():
    with pytest.raises(NotImplementedError, match="not on cpu"):
        call()


@pytest.mark.parametrize(
    ("tokens", "columns", "first"),
    [
        (1, 64, "triton"),
        (512, 64, "pallas_gpu"),  # enough queries of one row for every multiprocessor
        (64, 8, "pallas_gpu"),  # so few that no row can be long
        (64, 64, "triton"),  # which cuts a long row along its keys
        (16, 8, "triton"),
    ],
)
def test_it_comes_first_where_it_is_faster(tokens, columns, first, monkeypatch):
    """And Triton's kernel, which serves all of these, where it is not."""
    monkeypatch.setattr(dispatch, "default_platform", lambda platform=None: "gpu")
    served = []
    for name in ("triton", "pallas_gpu"):
        module = importlib.import_module(f"paged_decode.kernels.{name}.call")
        package = importlib.import_module(f"paged_decode.kernels.{name}")
        monkeypatch.setattr(package, "refusal", lambda call: None)
        if name == "pallas_gpu":
            monkeypatch.setattr(module, "_missing", lambda: None)

        def attend(call, name=name):
            served.append(name)
            return call.q, jnp.zeros(call.q.shape[:-1], jnp.float32)

        monkeypatch.setattr(package, "attend", attend)
    call(tokens=tokens, columns=columns, group=4, kv_heads=8, implementation=None)
    assert served == [first]
