"""What every backend is given: one checked, canonical attention call."""

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32, Num

from .annotations import FixedScales
from .eight_bits import is_eight_bits
from .placement import Placement
from .write import Pools, write_tokens

__all__ = ["HUGE", "LN2", "LOG2E", "POOLS", "AttentionCall", "StaticOptions"]

POOLS = ("k_pages", "v_pages", "k_scales", "v_scales")
"""The names of what a layer keeps, in the order in which all functions take and return it."""

# Kernels keep logits in base 2: the hardware has exp2, and exp would be a multiplication more.
LOG2E, LN2 = math.log2(math.e), math.log(2)
# The largest sink in base 2 that still gives a finite difference to any logit.
HUGE = 3.0e38


@dataclass(frozen=True, slots=True)
class StaticOptions:
    """All of a checked call that is compiled into its program: one static argument of `jit`.

    Attributes:
      scale: multiplies q.k.
      window: newest tokens that a query sees, itself included; None: all.
      soft_cap: logits become `soft_cap * tanh(logits / soft_cap)`; None: unchanged.
      implementation: names of backends to try in order; None: those of the platform.
      platform: where it will run, "cpu", "gpu" or "tpu".
      placement: how the pool lies on a mesh; None: on one device.
      batch_invariant: whether a row's bits may depend on nothing but itself and on shapes.
    """

    scale: float
    window: int | None
    soft_cap: float | None
    implementation: tuple[str, ...] | None
    platform: str
    placement: Placement | None
    batch_invariant: bool = False


# A call that is only planned or refused has the shapes of arrays.
Given = Array if TYPE_CHECKING else Array | jax.ShapeDtypeStruct


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """One call of `paged_attention` in the single form that backends see.

    The public op has removed every alternative spelling: q always has a T axis, pages always have
    a layer axis, a window is a count of tokens, and all the sinks of a head are one number.
    Made under `jax.jit` only, so the reshapes behind it cost nothing.

    Attributes:
      q: `[B, T, Hq, D]`; query t of row b sits at position `seq_lens[b] - T + t`.
      k_pages: `[L, N, Hk, S, D]`. Index `[layer, page]` together; a slice of one layer is a copy.
      v_pages: like `k_pages`.
      layer: int32 scalar.
      page_table: int32 `[B, P]`; entries past a row's last page may hold anything.
      seq_lens: int32 `[B]`.
      starts: int32 `[B]`, first token that is visible; None: 0.
      sink: float32 `[Hq]`, log of the mass that joins the denominator; None: no mass.
      scale: multiplies q.k.
      window: newest tokens that a query sees, itself included; None: all.
      soft_cap: logits become `soft_cap * tanh(logits / soft_cap)`; None: unchanged.
      platform: where it will run, "cpu", "gpu" or "tpu".
      stacked: whether the caller's pages have a layer axis; without, L is 1.
      query_lens: int32 `[B]`, how many of the T queries of a row are its own, the last ones: any
        number, taken as the nearest in `0 .. T`. None: all T. The op leaves it out where T = 1.
      tail_mask: bool `[B, T, T]`, which of its row's own new tokens each of them sees, beside those
        in front; only `u < t` and the diagonal count. None: all up to itself.
      k_scales: float32 `[L, N, Hk, S]`, what the numbers of each key are multiplied by, where pages
        have 8 bits. None: they are the keys.
      v_scales: the same of values.
      batch_invariant: whether the bits of a row may depend on nothing but the row and on shapes.
        The op asks for it with one query a row.
    """

    q: Float[Given, "B T Hq D"]
    k_pages: Num[Given, "L N Hk S D"]
    v_pages: Num[Given, "L N Hk S D"]
    layer: Int32[Given, ""]
    page_table: Int32[Given, "B P"]
    seq_lens: Int32[Given, "B"]
    starts: Int32[Given, "B"] | None
    sink: Float[Given, "Hq"] | None
    scale: float
    window: int | None
    soft_cap: float | None
    platform: str
    stacked: bool = True
    query_lens: Int32[Given, "B"] | None = None
    tail_mask: Bool[Given, "B T T"] | None = None
    k_scales: Float[Given, "L N Hk S"] | None = None
    v_scales: Float[Given, "L N Hk S"] | None = None
    batch_invariant: bool = False

    @property
    def pools(self) -> Pools:
        """The pages, and their scales if they have some."""
        if self.k_scales is None or self.v_scales is None:
            return self.k_pages, self.v_pages
        return self.k_pages, self.v_pages, self.k_scales, self.v_scales

    @property
    def rows(self) -> int:
        """B."""
        return self.q.shape[0]

    @property
    def tokens(self) -> int:
        """T, query tokens of a row."""
        return self.q.shape[1]

    @property
    def heads(self) -> int:
        """Hq, query heads."""
        return self.q.shape[2]

    @property
    def dim(self) -> int:
        """D, numbers of a head."""
        return self.q.shape[3]

    @property
    def pages(self) -> int:
        """N, pages of a layer in the pool."""
        return self.k_pages.shape[1]

    @property
    def kv_heads(self) -> int:
        """Hk."""
        return self.k_pages.shape[2]

    @property
    def page_size(self) -> int:
        """S, tokens in a page."""
        return self.k_pages.shape[3]

    @property
    def itemsize(self) -> int:
        """Bytes of a number in the pages."""
        return self.k_pages.dtype.itemsize

    @property
    def group(self) -> int:
        """G, query heads that read one KV head."""
        return self.heads // self.kv_heads

    @property
    def columns(self) -> int:
        """P, pages that a row can have."""
        return self.page_table.shape[1]

    @property
    def capacity(self) -> int:
        """P * S, tokens that a row can hold."""
        return self.columns * self.page_size

    @classmethod
    def of_sizes(
        cls,
        *,
        rows: int,
        kv_heads: int,
        group: int,
        dim: int,
        page_size: int,
        columns: int,
        tokens: int = 1,
        pages: int = 2,
        layers: int = 1,
        dtype: Any = jnp.bfloat16,
        q_dtype: Any = None,  # None: that of the pages, or bfloat16 over pages of 8 bits
        starts: bool = False,
        sinks: bool = False,
        scale: float = 1.0,
        window: int | None = None,
        soft_cap: float | None = None,
        query_lens: bool = False,
        tail_mask: bool = False,
        batch_invariant: bool = False,
        platform: str = "gpu",
    ) -> "AttentionCall":
        """A call without its arrays: for refusals, and for plans of a card that is not here."""
        array = jax.ShapeDtypeStruct
        pool = array((layers, pages, kv_heads, page_size, dim), dtype)
        lens = array((rows,), jnp.int32)
        scaled = is_eight_bits(dtype)
        scales = array(pool.shape[:-1], jnp.float32) if scaled else None
        if q_dtype is None:
            q_dtype = jnp.bfloat16 if scaled else dtype
        arrays: dict[str, Any] = dict(
            q=array((rows, tokens, kv_heads * group, dim), q_dtype),
            k_pages=pool,
            v_pages=pool,
            layer=array((), jnp.int32),
            page_table=array((rows, columns), jnp.int32),
            seq_lens=lens,
            starts=lens if starts else None,
            sink=array((kv_heads * group,), jnp.float32) if sinks else None,
            query_lens=lens if query_lens else None,
            tail_mask=array((rows, tokens, tokens), jnp.bool) if tail_mask else None,
            k_scales=scales,
            v_scales=scales,
        )
        static: dict[str, Any] = dict(
            scale=scale, window=window, soft_cap=soft_cap, batch_invariant=batch_invariant
        )
        return cls(**arrays, **static, platform=platform)

    @property
    def one_token(self) -> bool:
        """Whether each row has one query token, T = 1, and no mask: what the fastest kernels do."""
        return self.tokens == 1 and self.tail_mask is None

    def visible(self) -> tuple[Int32[Array, "B T"], Int32[Array, "B T"]]:
        """The tokens that each query may see, as a half-open range `first, end`.

        ```
        token      0 . . . first . . . . . place | end ...      place = seq_lens - T + t
        seen by t          [============== = =====)
        first = max(starts, position - window + 1, 0)           end = place + 1
        ```
        Place and position are one but for a `tail_mask`, which also hides some of the new tokens in
        the range: `sees` tells which. A query in front of its sequence (place < 0), or of the row's
        own, has `end <= 0 <= first`: it sees nothing. No query begins before the row's first does.
        """
        starts = jnp.int32(0) if self.starts is None else jnp.maximum(self.starts, 0)[:, None]
        first = jnp.broadcast_to(starts, (self.rows, self.tokens))
        if self.window is not None:
            first = jnp.maximum(first, self.positions() - (self.window - 1))
        end = self.places() + 1
        return first, end if self.query_lens is None else jnp.where(self.own(), end, 0)

    def sees(self, token: Int32[Array, "B C"]) -> Bool[Array, "B T C"]:
        """Whether each query sees the tokens at these places of its row."""
        first, end = (edge[..., None] for edge in self.visible())
        seen = (first <= token[:, None]) & (token[:, None] < end)
        if self.tail_mask is None:
            return seen
        mask = self.tail_mask
        if self.window is not None:
            position = self.positions()
            mask &= position[:, :, None] - position[:, None, :] < self.window
        new = token[:, None] - self.places()[:, :1, None]  # which of the T tokens it is
        picked = jnp.take_along_axis(mask, jnp.clip(new, 0, self.tokens - 1), axis=2)
        return seen & (picked | (new < self._padding()[..., None]))

    def places(self) -> Int32[Array, "B T"]:
        """Where each query's token lies in its sequence; below 0 in front of it. A length below 0
        is 0."""
        lens = jnp.maximum(self.seq_lens, 0)[:, None]
        return lens - self.tokens + jnp.arange(self.tokens, dtype=jnp.int32)

    def positions(self) -> Int32[Array, "B T"]:
        """Where each query stands, as windows count: its place, or with a `tail_mask` the number of
        tokens in front of it on its own branch. Padding stands where the row's own begin."""
        places = self.places()
        begin = places[:, :1] + self._padding()
        if self.tail_mask is None:
            return jnp.maximum(places, begin)
        t = jnp.arange(self.tokens, dtype=jnp.int32)
        new = self.own() & (places >= 0)
        before = self.tail_mask & (t < t[:, None]) & new[:, None]
        depth = jnp.sum(before, axis=2, dtype=jnp.int32)
        return jnp.maximum(begin, 0) + jnp.where(new, depth, 0)

    def own(self) -> Bool[Array, "B T"]:
        """Which queries are their row's own: not those that `query_lens` leaves in front."""
        return jnp.arange(self.tokens, dtype=jnp.int32) >= self._padding()

    def _padding(self) -> Int32[Array, "B 1"]:
        """How many queries in front of a row's own."""
        if self.query_lens is None:
            return jnp.zeros((self.rows, 1), jnp.int32)
        return self.tokens - jnp.clip(self.query_lens, 0, self.tokens)[:, None]

    def broken(self) -> Bool[Array, "B T"]:
        """The queries of rows that break the contract: a page id outside the pool, or too few
        columns.

        Values cannot raise under `jit`. Such a row must come out as NaN, never as the data of
        another sequence, which is what clamped or wrapped indices would read.
        """
        used = jnp.arange(self.columns, dtype=jnp.int32) * self.page_size < self.seq_lens[:, None]
        outside = (self.page_table < 0) | (self.page_table >= self.pages)
        rows = jnp.any(used & outside, axis=1) | (self.seq_lens > self.capacity)
        return rows[:, None] & self.own()

    def with_newest(
        self,
        k: Float[Array, "B T Hk D"],
        v: Float[Array, "B T Hk D"],
        slots: Int32[Array, "B T"] | None,
        fixed_scales: FixedScales | None = None,
    ) -> "AttentionCall":
        """This call over pages in which row b's tokens `seq_lens[b] - T + t` are k and v.

        A token in front of its sequence or of the row's own, beyond its table or with its slot in
        the null page is written nowhere.
        """
        page_size, place = self.page_size, self.places()
        column = jnp.clip(place // page_size, 0, self.columns - 1)
        page = jnp.take_along_axis(self.page_table, column, axis=1)
        nowhere = (place < 0) | ~self.own() | (self.seq_lens[:, None] > self.capacity)
        nowhere |= (page < 0) | (page >= self.pages)
        if slots is not None:
            nowhere |= slots < page_size
        where = jnp.where(nowhere, -1, page * page_size + place % page_size)
        begin = 0 if self.stacked else 1
        written = write_tokens(
            tuple(pool.reshape(pool.shape[begin:]) for pool in self.pools),
            k,
            v,
            where,
            self.layer if self.stacked else None,
            fixed_scales=fixed_scales,
            platform=self.platform,
        )
        pools = [new.reshape(old.shape) for new, old in zip(written, self.pools, strict=True)]
        return replace(self, **dict(zip(POOLS, pools, strict=False)))

    def pages_refusal(self, *, mixed: bool = False, scales: bool = False) -> str | None:
        """Why a kernel over pages of the dtype of q, unless `mixed`, cannot serve; None if not.
        `scales` says that it reads pages of 8 bits."""
        if (reason := self.pool_refusal(scales=scales)) is not None:
            return reason
        if not mixed and self.k_scales is None and self.q.dtype != self.k_pages.dtype:
            return (
                f"q of dtype {self.q.dtype} over pages of dtype {self.k_pages.dtype} is not served"
            )
        return None

    def pool_refusal(self, *, scales: bool = True) -> str | None:
        """Why these arrays cannot be read as K and V; None if they can. `scales` says that the
        backend reads pages of 8 bits."""
        served = (jnp.float32, jnp.bfloat16, jnp.float16)
        if self.q.dtype not in served:
            return f"q of dtype {self.q.dtype} is not served, only float32, bfloat16 and float16"
        dtype = self.k_pages.dtype
        if self.k_scales is not None:
            return None if scales else f"it does not read pages of 8 bits ({dtype})"
        if is_eight_bits(dtype):
            return f"pages of dtype {dtype} need k_scales and v_scales"
        if dtype not in served:
            return (
                f"k_pages of dtype {dtype} is not served, only float32, bfloat16, float16, and "
                "int8 and float8_e4m3fn with scales"
            )
        return None
