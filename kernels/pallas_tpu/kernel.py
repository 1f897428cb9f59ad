"""The decode kernel for TPUs (Mosaic): one step of the grid attends with one row."""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int32, Num

from ..record import HUGE, LN2, LOG2E

Scalar = Int32[Array, ""] | int
Flag = Bool[Array, ""]

__all__ = ["LANES", "Refs", "Static", "decode_kernel"]

LANES = 128


@dataclass(frozen=True, slots=True)
class Static:
    """What is compiled into one kernel.

    Attributes:
      fetch: pages that are on their way together, one buffer of two; a multiple of `tile`.
      tile: pages that are multiplied at once.
      group: query heads of a KV head; a multiple of 8 for products of float32.
      unroll: pages whose copies are started in one go.
      steps: rows of a core.
      strip: tokens of a page that a DMA can write, at least.
    """

    kv_heads: int
    group: int
    dim: int
    page_size: int
    pages: int
    columns: int
    fetch: int
    tile: int
    unroll: int
    steps: int
    strip: int
    scale: float
    window: int | None
    soft_cap: float | None
    starts: bool
    sinks: bool
    append: bool
    compute: Any

    @property
    def heads(self) -> int:
        """Hq."""
        return self.kv_heads * self.group

    @property
    def tokens(self) -> int:
        """Tokens of a tile."""
        return self.tile * self.page_size


@dataclass(frozen=True, slots=True)
class Refs:
    """The memory of one kernel, in the order in which Pallas hands it over.

    SMEM holds the scalars and two rows of the page table, this row's and the next one's, so the
    table may be as large as HBM. K and V stay there too; two buffers of pages take turns.
    """

    rows: Any  # SMEM int32 [cores * steps], the row of every step
    following: Any  # SMEM int32 [cores * steps], the next row of that core with pages, or -1
    seq_lens: Any  # SMEM int32 [B]
    starts: Any  # SMEM int32 [B]
    writes: Any  # SMEM int32 [B], whether the newest token is to be written
    layer: Any  # SMEM int32 [1]
    tables: Any  # SMEM int32 [1, 2 * P]: the page tables of this row and of the following one
    q: Any  # VMEM [Hq, D]
    sink: Any  # VMEM float32 [Hq, 1]
    new_k: Any  # VMEM [Hk, 1, D]
    new_v: Any
    out: Any  # VMEM [Hq, D]
    lse: Any  # VMEM float32 [Hq, 1]
    k_pages: Any  # HBM [L, N, Hk, S, D]
    v_pages: Any
    k_buf: Any  # VMEM [2, fetch, Hk, S, D]
    v_buf: Any
    sems: Any  # DMA [2, 2]: K and V of either buffer
    strips: Any  # VMEM [2, Hk, strip, D]: the tile of the newest token on its way back
    write_sems: Any  # DMA [2]
    state: Any  # SMEM int32 [3]: the buffer of the next block; page ids of either buffer are wrong
    q32: Any  # VMEM float32 [Hq, D]
    logits: Any  # VMEM float32 [Hq, tokens of a tile]
    acc: Any  # VMEM float32 [Hq, D]
    top: Any  # VMEM float32 [Hq, 128], the same number in every lane
    total: Any


def decode_kernel(refs: Refs, static: Static) -> None:
    """Attend with the row of this step; its first pages are already on their way.

    ```
    step          row 3                      row 0 (no pages)   row 7
    in flight     [block 0][block 1][b. 2]                      [block 0]...
    multiplied             [block 0][b. 1][block 2]                      [block 0]
                                          ^ starts block 0 of row 7, the next that has pages
    ```
    """
    step = pl.program_id(1)
    at = pl.program_id(0) * static.steps + step
    row, following = refs.rows[at], refs.following[at]
    span = _span(refs, static, row)
    first = step == 0
    # A step that repeats the row of the one before pads the shorter core; its output stands.
    repeated = ~first & (row == refs.rows[jnp.maximum(at - 1, 0)])

    @pl.when(first)
    def _() -> None:
        refs.state[0] = 0

    @pl.when(~repeated)
    def _() -> None:
        refs.q32[...] = refs.q[...].astype(jnp.float32)
        refs.acc[...] = jnp.zeros_like(refs.acc)
        refs.top[...] = jnp.full_like(refs.top, -jnp.inf)
        refs.total[...] = jnp.zeros_like(refs.total)

        def block(index: Scalar, broken: Scalar) -> Scalar:
            return broken | _block(refs, static, span, row, following, index)

        # Nobody has sent the very first block of a core: block -1 is there to do it.
        begin = jnp.where(first, -1, 0)
        _finish(refs, static, lax.fori_loop(begin, span.blocks, block, span.too_long))


class _Span(NamedTuple):
    """Which tokens of a row are visible, and which pages hold them; int32 scalars."""

    first: Scalar
    end: Scalar
    first_page: Scalar
    count: Scalar  # pages
    blocks: Scalar
    too_long: Scalar  # 1 if the row is longer than its table


def _span(refs: Refs, static: Static, row: Scalar) -> _Span:
    size = static.page_size
    length = refs.seq_lens[row]
    fits = length <= static.columns * size
    end = jnp.where(fits, jnp.maximum(length, 0), 0)
    first = jnp.maximum(refs.starts[row], 0) if static.starts else jnp.int32(0)
    if static.window is not None:
        first = jnp.maximum(first, end - static.window)
    end_page = lax.div(end + (size - 1), size)
    first_page = lax.div(first, size)
    if static.append:  # the page of the newest token is needed even if nothing in it is visible
        first_page = jnp.minimum(first_page, jnp.maximum(end_page - 1, 0))
    count = jnp.where((first < end) | static.append, end_page - first_page, 0)
    blocks = lax.div(count + (static.fetch - 1), static.fetch)
    return _Span(first, end, first_page, count, blocks, (~fits).astype(jnp.int32))


def _either(condition: Flag, yes: _Span, no: _Span) -> _Span:
    return _Span(*map(partial(jnp.where, condition), yes, no))


def _known(page: Scalar, static: Static) -> Scalar:
    """The page, or another one of the pool if there is no such page."""
    last = jnp.uint32(static.pages - 1)
    return jnp.minimum(page.astype(jnp.uint32), last).astype(jnp.int32)


def _copies(
    refs: Refs, static: Static, page: Scalar, slot: Scalar, place: Scalar
) -> tuple[Any, Any]:
    """One page of all KV heads on its way into a buffer, keys and values."""
    return tuple(
        pltpu.make_async_copy(
            pages.at[refs.layer[0], page], buffer.at[slot, place], refs.sems.at[kind, slot]
        )
        for kind, (pages, buffer) in enumerate(
            ((refs.k_pages, refs.k_buf), (refs.v_pages, refs.v_buf))
        )
    )  # type: ignore


def _in_block(static: Static, span: _Span, block: Scalar) -> Scalar:
    """How many pages a block has."""
    return jnp.minimum(span.count - block * static.fetch, static.fetch)


def _start(
    refs: Refs, static: Static, span: _Span, which: Scalar, block: Scalar, slot: Scalar
) -> None:
    """Send the pages of a block on their way. A wrong id is noted, and another page comes."""
    begin = which * static.columns + span.first_page + block * static.fetch
    count = _in_block(static, span, block)

    def page(place: Scalar, wrong: Scalar) -> Scalar:
        given = refs.tables[0, begin + place]
        known = _known(given, static)
        for copy in _copies(refs, static, known, slot, place):
            copy.start()
        return wrong | (given ^ known)

    def several(index: Scalar, wrong: Scalar) -> Scalar:
        # One by one, each would wait for the address of the one before.
        for place in range(static.unroll):
            wrong = page(index * static.unroll + place, wrong)
        return wrong

    whole = lax.div(count, static.unroll)
    wrong = lax.fori_loop(0, whole, several, jnp.int32(0))
    if static.unroll > 1:
        wrong = lax.fori_loop(whole * static.unroll, count, page, wrong)
    refs.state[1 + slot] = wrong


def _wait(refs: Refs, static: Static, slot: Scalar, count: Scalar) -> None:
    """Wait for all pages of a block."""

    def wait(*place: Scalar) -> None:
        for kind, buffer in enumerate((refs.k_buf, refs.v_buf)):
            ref = buffer.at[(slot, *place)]
            pltpu.make_async_copy(ref, ref, refs.sems.at[kind, slot]).wait()

    pl.when(count == static.fetch)(wait)

    @pl.when(count < static.fetch)
    def _() -> None:
        lax.fori_loop(0, count, lambda place, _: wait(place), None)


def _block(
    refs: Refs, static: Static, span: _Span, row: Scalar, following: Scalar, block: Scalar
) -> Scalar:
    """Send the next block on its way, and multiply this one; not 0 if a page id was wrong."""
    free = refs.state[0]
    slot = 1 - free
    refs.state[0] = slot
    last = block + 1 == span.blocks

    @pl.when(~last | (following >= 0))
    def _() -> None:
        other = _span(refs, static, jnp.maximum(following, 0))
        which = last.astype(jnp.int32)
        after = jnp.where(last, 0, block + 1)
        _start(refs, static, _either(last, other, span), which, after, free)

    arrived = block >= 0
    pl.when(arrived)(lambda: _multiply(refs, static, span, row, block, slot, last))
    return jnp.where(arrived, refs.state[1 + slot], 0)


def _multiply(
    refs: Refs, static: Static, span: _Span, row: Scalar, block: Scalar, slot: Scalar, last: Flag
) -> None:
    """Wait for the pages of a block, and add them to the sums of the row."""
    count = _in_block(static, span, block)
    _wait(refs, static, slot, count)
    token = (span.first_page + block * static.fetch) * static.page_size
    tiles = lax.div(count + (static.tile - 1), static.tile)
    written = jnp.bool_(False)
    if static.append:
        written = _append(refs, static, span, row, slot, count - 1, last)
    hidden = (span.first > token) | (token + tiles * static.tokens > span.end)
    pl.when(hidden)(lambda: _clear(refs, static, span, slot, token, tiles * static.tile))

    def tile(index: Scalar, _: None) -> None:
        _tile(refs, static, span, slot, index * static.tile, token + index * static.tokens)

    lax.fori_loop(0, tiles, tile, None)

    if static.append:

        @pl.when(written)
        def _() -> None:
            for copy in _write_copies(refs, static, 0, 0):  # any slice of that size
                copy.wait()


def _clear(
    refs: Refs, static: Static, span: _Span, slot: Scalar, token: Scalar, pages: Scalar
) -> None:
    """Zero the values that are not visible: their weight is 0, but 0 * NaN is NaN."""

    def head(index: Scalar, _: None) -> None:
        place = lax.div(index, static.kv_heads)
        begin = token + place * static.page_size

        @pl.when((begin < span.first) | (begin + static.page_size > span.end))
        def _() -> None:
            where = (slot, place, lax.rem(index, static.kv_heads))
            values = refs.v_buf[where]
            at = begin + lax.broadcasted_iota(jnp.int32, values.shape, 0)
            seen = (at >= span.first) & (at < span.end)
            refs.v_buf[where] = jnp.where(seen, values, jnp.zeros_like(values))

    lax.fori_loop(0, pages * static.kv_heads, head, None)


def _tile(
    refs: Refs, static: Static, span: _Span, slot: Scalar, place: Scalar, token: Scalar
) -> None:
    """One step of the online softmax over a tile of pages, all heads at once."""
    pages = pl.ds(place, static.tile)
    exact = static.compute == jnp.float32
    precision = lax.Precision.HIGHEST if exact else None

    def rows(head: Scalar) -> Any:
        first = head * static.group
        return pl.ds(first if isinstance(head, int) else pl.multiple_of(first, 8), static.group)

    def load(buffer: Any, head: Scalar) -> Num[Array, "C D"]:
        return buffer[slot, pages, head].reshape(static.tokens, static.dim).astype(static.compute)

    def multiply_keys(head: Scalar, _: None = None) -> None:
        refs.logits[rows(head)] = lax.dot_general(
            refs.q32[rows(head)].astype(static.compute),
            load(refs.k_buf, head),
            (((1,), (1,)), ((), ())),
            precision=precision,
            preferred_element_type=jnp.float32,
        )

    def multiply_values(head: Scalar, _: None = None) -> None:
        refs.acc[rows(head)] += jnp.dot(
            refs.logits[rows(head)].astype(static.compute),
            load(refs.v_buf, head),
            precision=precision,
            preferred_element_type=jnp.float32,
        )

    def each_head(multiply: Any) -> None:
        if exact:  # its many partial products of several heads at once would not fit the registers
            lax.fori_loop(0, static.kv_heads, multiply, None)
        else:
            for head in range(static.kv_heads):
                multiply(head)

    each_head(multiply_keys)
    at = token + lax.broadcasted_iota(jnp.int32, (1, static.tokens), 1)
    seen = (at >= span.first) & (at < span.end)
    logits = jnp.where(seen, _scaled(refs.logits[...], static), -jnp.inf)
    old = refs.top[...]
    top = jnp.maximum(old, jnp.max(logits, axis=1, keepdims=True))
    base = jnp.where(top == -jnp.inf, 0.0, top)
    weights = jnp.exp2(logits - _lanes(base, static.tokens))
    decay = jnp.exp2(old - base)
    refs.top[...] = top
    refs.total[...] = refs.total[...] * decay + jnp.sum(weights, axis=1, keepdims=True)
    refs.logits[...] = weights
    refs.acc[...] = refs.acc[...] * _lanes(decay, static.dim)
    each_head(multiply_values)


def _scaled(products: Float[Array, "Hq C"], static: Static) -> Float[Array, "Hq C"]:
    """Logits in base 2 from q.k."""
    if static.soft_cap is None:
        return products * (static.scale * LOG2E)
    return jnp.tanh(products * (static.scale / static.soft_cap)) * (static.soft_cap * LOG2E)


def _lanes(x: Float[Array, "Hq 128"], width: int) -> Float[Array, "Hq width"]:
    """An array whose lanes are all equal, made wider or narrower."""
    if width <= LANES:
        return x[:, :width]
    return jnp.concatenate([x] * pl.cdiv(width, LANES), axis=1)[:, :width]


def _finish(refs: Refs, static: Static, broken: Scalar) -> None:
    """The result of a row from its sums and its sinks."""
    top, total = refs.top[...], refs.total[...]
    share, mass = jnp.ones_like(total), total
    if static.sinks:
        extra = jnp.minimum(refs.sink[...] * LOG2E, HUGE)
        base = jnp.maximum(top, extra)
        base = jnp.where(base == -jnp.inf, 0.0, base)
        share = jnp.exp2(top - base)
        mass = total * share + jnp.exp2(extra - base)
    share = share / jnp.where(mass == 0, 1.0, mass)
    lse = jnp.where(total == 0, -jnp.inf, top * LN2 + jnp.log(jnp.where(total == 0, 1.0, total)))
    nan = jnp.where(broken != 0, jnp.nan, 0.0)
    out = refs.acc[...] * _lanes(share, static.dim) + nan
    refs.out[...] = out.astype(refs.out.dtype)
    refs.lse[...] = (lse + nan)[:, :1]


def _append(
    refs: Refs, static: Static, span: _Span, row: Scalar, slot: Scalar, place: Scalar, last: Flag
) -> Flag:
    """Put the newest token into its page, here and in HBM; whether there was one to put.

    HBM takes whole tiles of a page, so the tile goes back as it came but for the token. It leaves
    from a buffer of its own: in the page, tokens that nobody sees are about to be cleared.
    """
    offset = lax.rem(span.end - 1, static.page_size)
    strip = pl.multiple_of(lax.div(offset, static.strip) * static.strip, static.strip)
    given = refs.tables[0, span.first_page + span.count - 1]
    known = _known(given, static)
    live = last & (refs.writes[row] != 0) & (given == known)

    def put(head: Scalar, _: None) -> None:
        for kind, (buffer, new) in enumerate(((refs.k_buf, refs.new_k), (refs.v_buf, refs.new_v))):
            where = (slot, place, head, pl.ds(strip, static.strip))
            old = buffer[where]
            at = strip + lax.broadcasted_iota(jnp.int32, old.shape, 0)
            merged = jnp.where(at == offset, new[head], old)
            buffer[where] = merged
            refs.strips[kind, head] = merged

    @pl.when(live)
    def _() -> None:
        lax.fori_loop(0, static.kv_heads, put, None)
        for copy in _write_copies(refs, static, known, strip):
            copy.start()

    return live


def _write_copies(refs: Refs, static: Static, page: Scalar, strip: Any) -> tuple[Any, ...]:
    rows = pl.ds(strip, static.strip)
    return tuple(
        pltpu.make_async_copy(
            refs.strips.at[kind],
            pages.at[refs.layer[0], page, :, rows],
            refs.write_sems.at[kind],
        )
        for kind, pages in enumerate((refs.k_pages, refs.v_pages))
    )
