"""What the Hopper kernel does not serve, and that it says so before anything runs."""

import jax
import jax.numpy as jnp
import pytest

from paged_decode.kernels import dispatch, paged_attention

REFUSED = {
    "T = 2": (dict(tokens=2), "T = 1; got T = 2"),
    "float32": (dict(dtype=jnp.float32), "tf32"),
    "q wider than pages": (dict(q_dtype=jnp.float32), "q of dtype float32 over pages of dtype"),
    "8-bit pages": (dict(dtype=jnp.int8, q_dtype=jnp.bfloat16), "int8 is not served"),
    "D 80": (dict(dim=80), "got D = 80"),
    "a group of 65": (dict(group=65), "up to 64 query heads a KV head; got 65"),
    "pages of 4": (dict(page_size=4), "page sizes; got 4"),
    "pages of 24": (dict(page_size=24), "page sizes; got 24"),
    "a pool beyond int32": (dict(pages=2**26), "counts them in int32"),
    "a table beyond int32": (dict(rows=2**12, columns=2**12), "tiles than blocks can count"),
}


def call(
    rows=3,
    tokens=1,
    group=2,
    dim=128,
    page_size=64,
    pages=9,
    columns=4,
    dtype=jnp.bfloat16,
    q_dtype=None,
):
    of = jax.ShapeDtypeStruct
    pool = of((pages, 2, page_size, dim), dtype)
    args = (
        of((rows, tokens, 2 * group, dim), q_dtype or dtype),
        pool,
        pool,
        of((rows, columns), jnp.int32),
        of((rows,), jnp.int32),
    )
    return jax.eval_shape(lambda *a: paged_attention(*a, implementation="pallas_gpu"), *args)


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


def test_nobody_gets_it_without_asking():
    for platform in ("cpu", "gpu", "tpu"):
        assert "runs only when named" in str(dispatch.backend_status(platform)["pallas_gpu"])
