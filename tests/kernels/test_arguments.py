"""Bad arguments get an error that names the argument and its axes; dispatch says who serves."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paged_decode.kernels import (
    append_and_attend,
    backend_status,
    decode_attention,
    merge_attention,
    paged_attention,
)
from paged_decode.kernels import dispatch as dispatching
from paged_decode.kernels.dispatch import Backend
from paged_decode.kernels.record import AttentionCall

I32 = np.int32
GOOD = dict(
    q=np.zeros((2, 4, 8), np.float32),
    k_pages=np.zeros((5, 2, 4, 8), np.float32),
    v_pages=np.zeros((5, 2, 4, 8), np.float32),
    page_table=np.array([[1, 2, 0], [3, 4, 0]], I32),
    seq_lens=np.array([5, 8], I32),
)
STACK = dict(k_pages=np.zeros((3, 5, 2, 4, 8)), v_pages=np.zeros((3, 5, 2, 4, 8)))
STACK = {name: array.astype(np.float32) for name, array in STACK.items()}

WRONG = [
    (
        dict(q=np.zeros((2, 8), np.float32)),
        ValueError,
        r"q must be \[B, Hq, D\] or \[B, T, Hq, D\]",
    ),
    (dict(q=np.zeros((2, 0, 4, 8), np.float32)), ValueError, r"T >= 1"),
    (dict(q=np.zeros((2, 4, 8), I32)), TypeError, r"q must be a floating-point array; got dtype"),
    (dict(q=[[0.0]]), TypeError, r"q must be a floating-point array; got list"),
    (
        dict(q=np.zeros((2, 4, 6), np.float32)),
        ValueError,
        r"same D; got 6 in q .* and 8 in k_pages",
    ),
    (
        dict(q=np.zeros((2, 3, 8), np.float32)),
        ValueError,
        r"Hq must be a multiple of Hk; got Hq = 3",
    ),
    (dict(query_lens=np.ones(3, I32)), ValueError, r"query_lens must be \[B\] with B = 2; got"),
    (dict(query_lens=np.ones(2)), TypeError, r"query_lens must be an array of int32"),
    (dict(query_lens=np.array([1, 2], I32)), ValueError, r"in 0 .. T = 1; got 2 in row 1"),
    (dict(query_lens=np.array([-1, 1], I32)), ValueError, r"in 0 .. T = 1; got -1 in row 0"),
    (
        dict(tail_mask=np.ones((2, 1, 1), I32)),
        TypeError,
        r"tail_mask must be an array of bool; got",
    ),
    (dict(tail_mask=[[[True]]]), TypeError, r"tail_mask must be an array of bool; got list"),
    (
        dict(tail_mask=np.ones((2, 1, 2), bool)),
        ValueError,
        r"tail_mask must be \[B, T, T\] = .*; got shape",
    ),
    (dict(k_pages=None), TypeError, r"k_pages must be an array; got NoneType"),
    (dict(k_pages=np.zeros((5, 2, 8))), ValueError, r"k_pages must be \[N, Hk, S, D\]; got shape"),
    (STACK, ValueError, r"k_pages must be \[N, Hk, S, D\]; got shape \(3, 5, 2, 4, 8\)"),
    (dict(layer=0), ValueError, r"k_pages must be \[L, N, Hk, S, D\]; got shape"),
    (STACK | dict(layer=3), ValueError, r"layer must be in 0 .. 2; got 3"),
    (STACK | dict(layer=np.int32(-1)), ValueError, r"layer must be in 0 .. 2; got -1"),
    (STACK | dict(layer=True), TypeError, r"layer must be an array of int32 or int64; got bool"),
    (STACK | dict(layer=1.0), TypeError, r"layer must be an array of int32 or int64; got float"),
    (STACK | dict(layer=np.zeros(1, I32)), ValueError, r"layer must be a scalar; got shape \(1,\)"),
    (
        dict(v_pages=np.zeros((5, 2, 8, 8), np.float32)),
        ValueError,
        r"v_pages must have the shape and dtype of k_pages, \(5, 2, 4, 8\)",
    ),
    (dict(v_pages=np.zeros((5, 2, 4, 8), np.float16)), ValueError, r"got .* float16"),
    (
        dict(k_pages=np.zeros((0, 2, 4, 8)), v_pages=np.zeros((0, 2, 4, 8))),
        ValueError,
        r"k_pages must have no empty axis",
    ),
    (
        dict(page_table=np.zeros(2, I32)),
        ValueError,
        r"page_table must be \[B, P\]; got shape \(2,\)",
    ),
    (
        dict(page_table=np.zeros((3, 2), I32)),
        ValueError,
        r"\[B, P\] with B = 2; got shape \(3, 2\)",
    ),
    (dict(page_table=np.zeros((2, 0), I32)), ValueError, r"P >= 1 .* got P = 0"),
    (
        dict(page_table=np.broadcast_to(np.int32(0), (2, 2**29 - 1))),
        ValueError,
        r"\(P \+ 1\) \* S < 2\*\*31, .* got P = 536870911 and S = 4",
    ),
    (dict(page_table=np.zeros((2, 3), bool)), TypeError, r"page_table must be an array of int32"),
    (dict(page_table=np.zeros((2, 3))), TypeError, r"page_table must be .* got dtype float64"),
    (dict(page_table=[[1, 2], [3, 4]]), TypeError, r"page_table must be .* got list"),
    (dict(seq_lens=np.zeros(3, I32)), ValueError, r"seq_lens must be \[B\] with B = 2; got"),
    (
        dict(seq_lens=np.array([5.0, 8.0])),
        TypeError,
        r"seq_lens must be an array of int32 or int64",
    ),
    (dict(seq_lens=np.array([5, 8], np.uint8)), TypeError, r"seq_lens must be .* got dtype uint8"),
    (dict(seq_lens=np.array([True, True])), TypeError, r"seq_lens must be .* got dtype bool"),
    (dict(seq_lens=np.array([5, -1], I32)), ValueError, r"0 .. P \* S = 12; got -1 in row 1"),
    (dict(seq_lens=np.array([13, 8], I32)), ValueError, r"0 .. P \* S = 12; got 13 in row 0"),
    (
        dict(page_table=np.array([[1, 2, 9], [3, -1, 9]], I32)),
        ValueError,
        r"0 .. N-1 = 4 as far as seq_lens reaches; got -1 in row 1, column 1 \(length 8\)",
    ),
    (
        dict(page_table=np.array([[5, 2, 9], [3, 1, 9]], I32)),
        ValueError,
        r"got 5 in row 0, column 0",
    ),
    (
        dict(page_table=np.array([[1, 2**32 + 1, 0], [3, 4, 0]])),
        ValueError,
        r"got 4294967297 in row 0, column 1",
    ),
    (dict(starts=np.zeros(3, I32)), ValueError, r"starts must be \[B\] with B = 2; got shape"),
    (dict(starts=np.zeros(2, np.uint8)), TypeError, r"starts must be an array of int32 or int64"),
    (dict(starts=np.array([0, -3], I32)), ValueError, r"starts must be >= 0; got -3 in row 1"),
    (dict(scale="1"), TypeError, r"scale must be a Python float; got str"),
    (dict(scale=True), TypeError, r"scale must be a Python float; got bool"),
    (dict(scale=float("nan")), ValueError, r"scale must be finite; got nan"),
    (dict(soft_cap=0.0), ValueError, r"soft_cap must be finite and > 0; got 0.0"),
    (dict(soft_cap=float("inf")), ValueError, r"soft_cap must be finite and > 0; got inf"),
    (dict(sliding_window=0), ValueError, r"counts the query itself, so it is >= 1; got 0"),
    (dict(sliding_window=(-1, 0)), ValueError, r"\(left, right\) must be >= 0; got \(-1, 0\)"),
    (dict(sliding_window=True), TypeError, r"sliding_window must be an int or a pair .* got bool"),
    (dict(sliding_window=4.0), TypeError, r"sliding_window must be an int or a pair .* got float"),
    (dict(sliding_window=(4, True)), TypeError, r"sliding_window must be .* got \(4, True\)"),
    (dict(sliding_window=(1, 2, 3)), TypeError, r"sliding_window must be .* got tuple"),
    (
        dict(sinks=np.zeros((3, 1), np.float32)),
        ValueError,
        r"\[Hq, K\] with Hk = 2, Hq = 4, K >= 1",
    ),
    (dict(sinks=np.zeros((2, 0), np.float32)), ValueError, r"K >= 1; got shape \(2, 0\)"),
    (
        dict(sinks=np.zeros(4, np.float32)),
        ValueError,
        r"one sink for each head, or 4 that all heads share; for the first pass sinks\[:, None\]",
    ),
    (dict(sinks=np.zeros((), np.float32)), ValueError, r"sinks must be \[K\], \[Hk, K\]"),
    (dict(sinks=np.zeros(2, I32)), TypeError, r"sinks must be a floating-point array"),
    (
        dict(implementation="cuda"),
        ValueError,
        r"some of \[.*'reference', .* got 'cuda'",
    ),
    (dict(implementation=()), ValueError, r"implementation must name some of .* an empty sequence"),
    (dict(implementation=(1,)), TypeError, r"implementation must be a name or a sequence of names"),
]


@pytest.mark.parametrize("bad,error,message", WRONG, ids=[message for _, _, message in WRONG])
def test_a_bad_argument_is_named_with_its_axes(unchecked, bad, error, message):
    with pytest.raises(error, match=message):
        paged_attention(**GOOD | bad)


def test_both_cures_of_sinks_with_two_meanings_give_what_they_say():
    sinks = np.array([0.5, 1.0, -1.0, 2.0], np.float32)
    for cure, same in (
        (sinks[:, None], sinks.reshape(4, 1)),
        (jnp.broadcast_to(sinks, (4, 4)), np.log(np.exp(sinks).sum(keepdims=True))),
    ):
        got, want = (paged_attention(**GOOD, sinks=s) for s in (cure, same))
        np.testing.assert_allclose(got, want, rtol=1e-6)
    with pytest.raises(ValueError, match="one sink for each head, or 4"):
        merge_attention(np.zeros((2, 4, 8), np.float32), np.zeros((2, 4), np.float32), sinks=sinks)
    with pytest.raises(ValueError, match="one sink for each head, or 4"):
        decode_attention(**DENSE, softmax_aux=sinks)
    one = GOOD | dict(
        q=GOOD["q"][:, :1], k_pages=GOOD["k_pages"][:, :1], v_pages=GOOD["v_pages"][:, :1]
    )
    paged_attention(**one, sinks=sinks[:1])  # of one head there is only one meaning


def test_options_that_are_compiled_in_cannot_be_traced(unchecked):
    for name in ("scale", "soft_cap", "sliding_window"):
        with pytest.raises(TypeError, match=name):
            jax.jit(lambda value, name=name: paged_attention(**GOOD | {name: value}))(1)


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_pages_of_8_bits_without_scales_are_refused_by_every_backend(unchecked, dtype):
    pages = jnp.zeros((5, 2, 4, 8), dtype)
    names = [backend.name for backend in dispatching.BACKENDS]
    with pytest.raises(ExceptionGroup) as caught:
        paged_attention(**GOOD | dict(k_pages=pages, v_pages=pages), implementation=names)
    assert all(isinstance(reason, NotImplementedError) for reason in caught.value.exceptions)
    for name in ("xla", "reference"):
        with pytest.raises(NotImplementedError, match=f"dtype {dtype} need k_scales and v_scales"):
            paged_attention(**GOOD | dict(k_pages=pages, v_pages=pages), implementation=name)


DENSE = dict(
    query=np.zeros((2, 1, 4, 8), np.float32),
    key=np.zeros((2, 6, 2, 8), np.float32),
    value=np.zeros((2, 6, 2, 8), np.float32),
    starts=np.array([0, 1], I32),
    ends=np.array([5, 6], I32),
)


@pytest.mark.parametrize(
    "bad,error,message",
    [
        (dict(query=np.zeros((2, 2, 4, 8), np.float32)), ValueError, r"query .* with T = 1; got"),
        (dict(query=np.zeros((4, 8), np.float32)), ValueError, r"query must be \[B, 1, Hq, D\] or"),
        (
            dict(key=np.zeros((2, 6, 8), np.float32)),
            ValueError,
            r"key must be \[B, S, Hk, D\]; got",
        ),
        (dict(key=np.zeros((3, 6, 2, 8), np.float32)), ValueError, r"key .* with B = 2; got"),
        (dict(value=np.zeros((2, 7, 2, 8), np.float32)), ValueError, r"value must have the shape"),
        (dict(value=np.zeros((2, 6, 2, 8), I32)), TypeError, r"value must be a floating-point"),
        (dict(ends=np.array([5, 7], I32)), ValueError, r"ends must be in 0 .. S = 6; got 7"),
        (dict(ends=np.array([-1, 6], I32)), ValueError, r"ends must be in 0 .. S = 6; got -1"),
        (dict(starts=np.array([-1, 6], I32)), ValueError, r"starts must be >= 0; got -1"),
        (dict(starts=np.array([0.0, 6.0])), TypeError, r"starts must be an array of int32"),
        (dict(softmax_scale="1"), TypeError, r"scale must be a Python float"),
    ],
)
def test_a_bad_dense_argument_is_named_with_its_axes(unchecked, bad, error, message):
    with pytest.raises(error, match=message):
        decode_attention(**DENSE | bad)


# --- dispatch ---------------------------------------------------------------------------------


def fake(name, *, refuses=None, raises=None, platforms=("cpu",)):
    """A backend that answers with its own name, refuses or breaks."""

    def attend(call):
        if raises is not None:
            raise raises
        return name, name

    module = types.ModuleType(name)
    module.refusal, module.attend = lambda call: refuses, attend
    return Backend(name, lambda: module, platforms)


def missing(name):
    def load():
        raise ImportError("No module named 'triton'")

    return Backend(name, load, ("cpu",))


@pytest.fixture
def call():
    zeros = jnp.zeros
    lens = zeros(1, jnp.int32)
    return AttentionCall(
        q=zeros((1, 1, 2, 8)),
        k_pages=zeros((1, 2, 1, 4, 8)),
        v_pages=zeros((1, 2, 1, 4, 8)),
        layer=zeros((), jnp.int32),
        page_table=zeros((1, 1), jnp.int32),
        seq_lens=lens,
        starts=lens,
        sink=zeros(2),
        scale=1.0,
        window=None,
        soft_cap=None,
        platform="cpu",
    )


def test_a_refusal_falls_through_to_the_next_backend(unchecked, call):
    backends = (
        fake("first", refuses="no windows"),
        missing("second"),
        fake("elsewhere", platforms=("gpu",)),
        fake("last"),
    )
    assert dispatching.attend(call, backends=backends) == ("last", "last")


def test_when_all_refuse_every_reason_is_told(unchecked, call):
    backends = (fake("first", refuses="no windows"), missing("second"))
    with pytest.raises(ExceptionGroup, match="no backend serves this attention call") as caught:
        dispatching.attend(call, backends=backends)
    assert [str(reason) for reason in caught.value.exceptions] == [
        "first: no windows",
        "second: cannot be imported: No module named 'triton'",
    ]


def test_the_refusal_of_the_only_backend_asked_is_raised_itself(unchecked, call):
    backends = (fake("first", refuses="no windows"), missing("second"), fake("last"))
    with pytest.raises(NotImplementedError, match="^first: no windows$"):
        dispatching.attend(call, ("first",), backends=backends)
    with pytest.raises(NotImplementedError, match="^second: cannot be imported"):
        dispatching.attend(call, ("second",), backends=backends)


@pytest.mark.parametrize("error", [ZeroDivisionError, NotImplementedError])
def test_only_a_refusal_falls_through(unchecked, call, error):
    backends = (fake("broken", raises=error()), fake("fine"))
    with pytest.raises(error):
        dispatching.attend(call, backends=backends)


def test_names_are_tried_in_their_own_order_on_any_platform(unchecked, call):
    backends = (fake("a"), fake("b", platforms=()), fake("c", refuses="no"))
    assert dispatching.attend(call, ("c", "b", "a"), backends=backends)[0] == "b"


def test_status_says_for_every_backend_why_it_is_not_tried(monkeypatch):
    backends = (fake("a"), fake("b", platforms=("gpu", "tpu")), fake("c", platforms=()))
    monkeypatch.setattr(dispatching, "BACKENDS", (*backends, missing("d")))
    status = backend_status("cpu")
    assert status == {
        "a": None,
        "b": "b: serves gpu, tpu, not cpu",
        "c": "c: runs only when named",
        "d": "d: cannot be imported: No module named 'triton'",
    }


def test_every_platform_has_a_backend_that_serves_everything():
    for platform in ("cpu", "gpu", "tpu"):
        assert backend_status(platform)["xla"] is None


@pytest.mark.parametrize("heads", [2, 4], ids=["G = 1", "G = 2"])
@pytest.mark.parametrize("tokens", [(), (1,), (3,)], ids=str)
@pytest.mark.parametrize("stack", [(), (3,)], ids=str)
def test_a_call_that_passes_the_pages_last_is_told_the_order(unchecked, heads, tokens, stack):
    q, new = np.zeros((2, *tokens, heads, 8)), np.zeros((2, *tokens, 2, 8))
    q, new, pages = (x.astype(np.float32) for x in (q, new, np.zeros((*stack, 5, 2, 4, 8))))
    tables = GOOD["page_table"], GOOD["seq_lens"]
    options = dict(slots="all", layer=0 if stack else None)
    with pytest.raises(ValueError, match=r"takes the pages first, \(k_pages, v_pages, q, k, v,"):
        append_and_attend(q, new, new, pages, pages, *tables, **options)
