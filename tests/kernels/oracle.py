"""The contract once more, in float64 NumPy loops, and seeded inputs to try it on.

It shares no code with the library, so the library's own reference is on trial as well.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paged_decode.kernels import BACKENDS, paged_attention
from paged_decode.kernels.dispatch import default_platform

from .pallas_tpu.interpret import NAME as TPU
from .triton.interpret import INSTALLED
from .triton.interpret import NAME as INTERPRETED

# The library's backends that can run here; `test_refusals.py` has the others' reasons. They compile
# into the program they are called from. The interpreted kernel is a call back into Python, which
# copies its arrays: memory and aliasing are not tested on it, everything else is.
COMPILED = [
    backend.name
    for backend in BACKENDS
    if default_platform() in (backend.platforms or ("cpu", "gpu", "tpu"))
]
# On a CPU these, and the kernels for GPU and TPU, interpreted.
NAMES: list[Any] = list(COMPILED)
if default_platform() == "cpu":
    missing = pytest.mark.skipif(not INSTALLED, reason="triton has no wheel for this platform")
    NAMES += [TPU, pytest.param(INTERPRETED, marks=missing)]
# What a backend may refuse in this suite, by its own words; `conftest.py` counts those calls apart,
# as neither passed nor skipped. Any other refusal fails. `xla` and `reference` serve everything.
_TRITON = ("q of dtype float32 over pages of dtype",)
_TREES = "does not serve tail_mask"
_PAGES = "pages of 8 bits need a page size that is a multiple of 128"
_TPU = (_TREES, _PAGES, "a TPU has no float16", "the interpreter of Pallas needs shard_map")
MAY_REFUSE = {
    "triton": _TRITON,
    INTERPRETED: _TRITON,
    "pallas_tpu": _TPU,
    TPU: _TPU,
    "pallas_gpu": (
        _TREES, "tf32", "q of dtype", "got D =", "page sizes; got", "pages of 8 bits",
    ),
}  # fmt: skip

# (rtol, atol) of outputs against the float64 oracle; the inputs are already rounded to the dtype.
TOLERANCE = {
    "float32": (2e-5, 4e-6),  # sums of up to 512 products in float32, exp near 1 ulp
    "float16": (2e-3, 1e-3),  # the output is rounded to 11 bits: half an ulp is 5e-4 of it
    "bfloat16": (1e-2, 8e-3),  # the output is rounded to 8 bits: half an ulp is 4e-3 of it
}
SCALES = ("k_scales", "v_scales")
LSE_TOLERANCE = (2e-5, 2e-5)  # float32 for every dtype: logits are summed in float32


@dataclass(frozen=True)
class Case:
    """The shape of one call; `build` makes its arrays."""

    lens: tuple[int, ...]
    kv_heads: int = 2
    group: int = 3
    dim: int = 16
    page_size: int = 4
    columns: int = 4
    tokens: int | None = None  # None: q is [B, Hq, D]
    dtype: str = "float32"
    pages: str | None = None  # their dtype; None: that of q
    starts: tuple[int, ...] | None = None
    query_lens: tuple[int, ...] | None = None
    tail_mask: Any = None  # bool [B, T, T], or the share of random ones
    sinks: tuple[int, ...] | None = None  # a shape
    options: dict[str, Any] = field(default_factory=dict)
    spare_pages: int = 4
    seed: int = 0

    @property
    def heads(self) -> int:
        return self.kv_heads * self.group


@dataclass
class Inputs:
    """Arguments of one call, as NumPy, pages scrambled, every unused slot `fill`ed."""

    q: np.ndarray
    k_pages: np.ndarray
    v_pages: np.ndarray
    page_table: np.ndarray
    seq_lens: np.ndarray
    options: dict[str, Any]

    @property
    def scales(self) -> dict[str, np.ndarray]:
        """Those of pages of 8 bits, which are options of a call."""
        return {name: self.options[name] for name in SCALES if name in self.options}

    def poison(self, row: int, tokens: Iterable[int], fill: float) -> None:
        """Write `fill` over the keys and values of some tokens of a row."""
        size = self.k_pages.shape[2]
        for token in tokens:
            page, slot = self.page_table[row, token // size], token % size
            for pool in self.scales.values() or (self.k_pages, self.v_pages):
                pool[page, :, slot] = fill

    def call(self, backend: str) -> tuple[np.ndarray, np.ndarray]:
        """`(out, lse)` of one backend."""
        out, lse = self.call_traced(backend)
        return np.asarray(out), np.asarray(lse)

    def call_traced(self, backend: str) -> tuple[jax.Array, jax.Array]:
        """The same where some of the arguments are traced."""
        arrays = map(jnp.asarray, (self.q, self.k_pages, self.v_pages))
        tables = self.page_table, self.seq_lens
        options = dict(return_lse=True, implementation=backend)
        return paged_attention(*arrays, *tables, **options, **self.options)

    def keys_and_values(self, rounded: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """What the pages stand for, in float64; those of 8 bits `rounded` to the dtype of q."""
        pages = self.k_pages, self.v_pages
        wide = [each.astype(np.float32 if rounded else np.float64) for each in pages]
        for each, scales in zip(wide, self.scales.values(), strict=False):
            each *= scales[..., None]
        if rounded:
            wide = [each.astype(self.q.dtype).astype(np.float64) for each in wide]
        return wide[0], wide[1]


def build(case: Case, *, fill: float = 0.0, order: int = 0) -> Inputs:
    """Seeded arrays of `case`; the same tokens whatever `fill` and the `order` of the pages are."""
    rng = np.random.default_rng(case.seed)
    rows, dtype, size = len(case.lens), jnp.dtype(case.dtype), case.page_size
    tokens = () if case.tokens is None else (case.tokens,)
    q = rng.standard_normal((rows, *tokens, case.heads, case.dim))
    capacity = case.columns * size
    k, v = rng.standard_normal((2, rows, capacity, case.kv_heads, case.dim))
    options = dict(case.options)
    if case.starts is not None:
        options["starts"] = np.array(case.starts, np.int32)
    if case.query_lens is not None:
        options["query_lens"] = np.array(case.query_lens, np.int32)
    if case.tail_mask is not None:
        share = np.random.default_rng(case.seed + 1).random((rows, *(tokens or (1,)) * 2))
        mask = case.tail_mask
        options["tail_mask"] = share < mask if isinstance(mask, float) else np.array(mask)
    if case.sinks is not None:
        options["sinks"] = rng.standard_normal(case.sinks).astype(np.float32)

    need = [-(-length // size) for length in case.lens]
    pages = sum(need) + 1 + case.spare_pages
    if case.spare_pages:  # at least so many: pools of one size make programs of one shape
        pages = -(-pages // 32) * 32
    ids = iter(np.random.default_rng(order).permutation(np.arange(1, pages)))
    pools = np.full((2, pages, case.kv_heads, size, case.dim), fill)
    table = np.zeros((rows, case.columns), np.int32)
    for row, length in enumerate(case.lens):
        table[row, : need[row]] = [next(ids) for _ in range(need[row])]
        for token in range(length):
            page, slot = table[row, token // size], token % size
            pools[0, page, :, slot], pools[1, page, :, slot] = k[row, token], v[row, token]
    lens = np.array(case.lens, np.int32)
    if case.pages is None:
        return Inputs(q.astype(dtype), *pools.astype(dtype), table, lens, options)
    both = [quantised(pool, case.pages) for pool in pools]
    options |= dict(zip(SCALES, (scales for _, scales in both), strict=True))
    return Inputs(q.astype(dtype), both[0][0], both[1][0], table, lens, options)


def quantised(x: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of 8 bits, and the float32 scale of each token and head; a loud token has a loud
    scale."""
    largest = {"int8": 127.0, "float8_e4m3fn": 448.0}[dtype]
    scales = np.abs(x).max(axis=-1) / largest
    silent = np.where(np.isfinite(scales) & (scales > 0), scales, 1)
    numbers = np.nan_to_num(x / silent[..., None], nan=largest, posinf=largest, neginf=-largest)
    numbers = np.clip(numbers if dtype != "int8" else np.rint(numbers), -largest, largest)
    return numbers.astype(jnp.dtype(dtype)), scales.astype(np.float32)


def attend(backend: str, *args: Any, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """`paged_attention` with its lse on one backend."""
    out, lse = paged_attention(*args, return_lse=True, implementation=backend, **options)
    return np.asarray(out), np.asarray(lse)


def expected(inputs: Inputs, rounded: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """`(out, lse)` in float64, query by query and head by head; see `keys_and_values`."""
    q = inputs.q.astype(np.float64)
    q = q[:, None] if q.ndim == 3 else q
    rows, tokens, heads, dim = q.shape
    group = heads // inputs.k_pages.shape[1]
    both = inputs.keys_and_values(rounded)
    options = inputs.options
    scale = options.get("scale", dim**-0.5)
    cap = options.get("soft_cap")
    starts = options.get("starts", np.zeros(rows, int))
    sinks = _sinks_per_head(options.get("sinks"), heads)
    out, lse = np.zeros(q.shape), np.full(q.shape[:-1], -np.inf)
    for row, query in np.ndindex(rows, tokens):
        places = seen(inputs, row, query)
        places = places[places >= starts[row]]
        if not places.size:
            continue
        k, v = (_tokens(pages, inputs, row, places) for pages in both)
        for head in range(heads):
            logits = scale * (k[:, head // group] @ q[row, query, head])
            logits = logits if cap is None else cap * np.tanh(logits / cap)
            top = max(logits.max(), *sinks[head]) if len(sinks[head]) else logits.max()
            mass = np.exp(logits - top).sum() + np.exp(sinks[head] - top).sum()
            out[row, query, head] = np.exp(logits - top) @ v[:, head // group] / mass
            lse[row, query, head] = np.log(np.exp(logits - logits.max()).sum()) + logits.max()
    return out.reshape(inputs.q.shape), lse.reshape(inputs.q.shape[:-1])


def seen(inputs: Inputs, row: int, query: int) -> np.ndarray:
    """The places of the tokens that a query sees, but for `starts`."""
    length, options = int(inputs.seq_lens[row]), inputs.options
    tokens, window = inputs.q.shape[1] if inputs.q.ndim == 4 else 1, options.get("sliding_window")
    width = window[0] + 1 if isinstance(window, tuple) else window
    own = min(int(options.get("query_lens", inputs.seq_lens * 0 + tokens)[row]), length)
    mask = options.get("tail_mask", np.ones((len(inputs.seq_lens), tokens, tokens), bool))[row]
    if query < tokens - own:
        return np.zeros(0, int)

    def branch(t: int) -> list[int]:
        return [u for u in range(tokens - own, t) if mask[t, u]]

    prefix, depth = length - own, len(branch(query))
    far = -1 if width is None else prefix + depth - width  # the last token behind the window
    new = [*branch(query), *([query] if mask[query, query] else [])]
    new = [u for u in new if width is None or depth - len(branch(u)) < width]
    return np.array([*range(max(far + 1, 0), prefix), *(length - tokens + u for u in new)], int)


def check(backend: str, case: Case, tolerance: tuple[float, float] | None = None) -> None:
    """One backend against the oracle, output and lse, in the tolerance of the dtype."""
    inputs = build(case)
    out, lse = inputs.call(backend)
    want, want_lse = expected(inputs, rounded=_widens(backend, case))
    rtol, atol = tolerance or TOLERANCE[case.dtype]
    assert out.dtype == inputs.q.dtype and lse.dtype == np.float32
    np.testing.assert_allclose(out.astype(np.float64), want, rtol=rtol, atol=atol)
    np.testing.assert_allclose(lse, want_lse, *LSE_TOLERANCE)


def _widens(backend: str, case: Case) -> bool:
    """Whether a backend makes pages of 8 bits such of bfloat16 first: a GPU, for many queries."""
    many = (case.tokens or 1) * (case.heads // case.kv_heads) > 64
    on_gpu = backend.startswith(("triton", "pallas_gpu"))
    return on_gpu and many and case.pages is not None and case.dtype == "bfloat16"


def same_bits(got: Any, want: Any) -> None:
    """Equal to the last bit, NaNs included."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert a.dtype == b.dtype and a.tobytes() == b.tobytes()


def _tokens(pages: np.ndarray, inputs: Inputs, row: int, seen: np.ndarray) -> np.ndarray:
    size = pages.shape[2]
    return pages[inputs.page_table[row, seen // size], :, seen % size]


def _sinks_per_head(sinks: np.ndarray | None, heads: int) -> np.ndarray:
    if sinks is None:
        return np.zeros((heads, 0))
    sinks = np.atleast_2d(np.asarray(sinks, np.float64))
    return np.repeat(sinks, heads // len(sinks), axis=0)
