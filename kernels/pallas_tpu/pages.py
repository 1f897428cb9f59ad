"""The memory of one kernel, and its pages on their way in and out of it."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .plan import Plan
from .work import Flag, Scalar, Span

__all__ = ["Refs", "append", "clear", "in_block", "start", "wait", "wait_written"]


@dataclass(frozen=True, slots=True)
class Refs:
    """The memory of one kernel, in the order in which Pallas hands it over.

    SMEM holds the scalars and two rows of the page table, this item's and the next one's, so the
    table may be as large as HBM. K and V stay there too; two buffers of pages take turns. `rows`
    are those of the plan: the query heads of an item times its queries.
    """

    items: Any  # SMEM int32 [cores * steps], the item of every step
    following: Any  # SMEM int32 [cores * steps], the next item of that core with pages, or -1
    seq_lens: Any  # SMEM int32 [B]
    starts: Any  # SMEM int32 [B]
    query_lens: Any  # SMEM int32 [B]
    writes: Any  # SMEM int32 [B], whether the newest token is to be written
    layer: Any  # SMEM int32 [1]
    table: Any  # SMEM int32 [1, P]: the page table of this item's row
    next_table: Any  # SMEM int32 [1, P]: that of the following item
    q: Any  # VMEM [rows, D]
    sink: Any  # VMEM float32 [rows, 1]
    new_k: Any  # VMEM [Hk, 1, D]
    new_v: Any
    new_k_scales: Any  # VMEM float32 [Hk, 1], where pages have 8 bits, as all scales
    new_v_scales: Any
    out: Any  # VMEM [rows, D]
    lse: Any  # VMEM float32 [1, rows]
    k_pages: Any  # HBM [L, N, Hk, S, D]
    v_pages: Any
    k_scales: Any  # HBM float32 [L, N, Hk, S]
    v_scales: Any
    k_buf: Any  # VMEM [2, fetch, Hk, S, D]
    v_buf: Any
    k_scale_buf: Any  # VMEM float32 [2, fetch, Hk, S]
    v_scale_buf: Any
    sems: Any  # DMA [pools, 2]: those of either buffer
    strips: Any  # VMEM [2, Hk, strip, D]: the tile of the newest token on its way back
    scale_strips: Any  # VMEM float32 [2, Hk, S]: the scales of its page
    write_sems: Any  # DMA [pools]
    state: Any  # SMEM int32 [3]: the buffer of the next block; page ids of either buffer are wrong
    q32: Any  # VMEM float32 [rows, D], where the heads of q are not aligned
    logits: Any  # VMEM float32 [rows of some heads, tokens of a tile]
    acc: Any  # VMEM float32 [rows, D]
    top: Any  # VMEM float32 [rows, 128], the same number in every lane
    total: Any  # VMEM float32 [rows, 128], whose lanes add up to the total

    @property
    def pools(self) -> tuple[tuple[Any, Any], ...]:
        """What pages are copied from, and to: keys, values and their scales, if they have some."""
        both = (self.k_pages, self.k_buf), (self.v_pages, self.v_buf)
        if self.k_scales is None:
            return both
        return *both, (self.k_scales, self.k_scale_buf), (self.v_scales, self.v_scale_buf)


def in_block(plan: Plan, span: Span, block: Scalar) -> Scalar:
    """How many pages a block has."""
    return jnp.minimum(span.count - block * plan.config.fetch, plan.config.fetch)


def _known(page: Scalar, plan: Plan) -> Scalar:
    """The page, or another one of the pool if there is no such page."""
    last = jnp.uint32(plan.pages - 1)
    return jnp.minimum(page.astype(jnp.uint32), last).astype(jnp.int32)


def _copies(refs: Refs, page: Scalar, slot: Scalar, place: Scalar) -> tuple[Any, ...]:
    """One page of all KV heads on its way into the buffers of each pool."""
    return tuple(
        pltpu.make_async_copy(
            pages.at[refs.layer[0], page], buffer.at[slot, place], refs.sems.at[kind, slot]
        )
        for kind, (pages, buffer) in enumerate(refs.pools)
    )


def start(refs: Refs, plan: Plan, span: Span, table: Any, block: Scalar, slot: Scalar) -> None:
    """Send the pages of a block on their way. A wrong id is noted, and another page comes."""
    begin = span.first_page + block * plan.config.fetch
    count, unroll = in_block(plan, span, block), plan.config.unroll

    def page(place: Scalar, wrong: Scalar) -> Scalar:
        given = table[0, begin + place]
        known = _known(given, plan)
        for copy in _copies(refs, known, slot, place):
            copy.start()
        return wrong | (given ^ known)

    def several(index: Scalar, wrong: Scalar) -> Scalar:
        # One by one, each would wait for the address of the one before.
        for place in range(unroll):
            wrong = page(index * unroll + place, wrong)
        return wrong

    whole = lax.div(count, unroll)
    wrong = lax.fori_loop(0, whole, several, jnp.int32(0))
    if unroll > 1:
        wrong = lax.fori_loop(whole * unroll, count, page, wrong)
    refs.state[1 + slot] = wrong


def wait(refs: Refs, plan: Plan, slot: Scalar, count: Scalar) -> None:
    """Wait for all pages of a block."""

    def wait_for(*place: Scalar) -> None:
        for kind, (_, buffer) in enumerate(refs.pools):
            ref = buffer.at[(slot, *place)]
            pltpu.make_async_copy(ref, ref, refs.sems.at[kind, slot]).wait()

    pl.when(count == plan.config.fetch)(wait_for)

    @pl.when(count < plan.config.fetch)
    def _() -> None:
        lax.fori_loop(0, count, lambda place, _: wait_for(place), None)


def clear(refs: Refs, plan: Plan, span: Span, slot: Scalar, token: Scalar, pages: Scalar) -> None:
    """Zero the values and scales that nobody sees: their weight is 0, but 0 * NaN is NaN."""

    def zero(buffer: Any, place: Scalar, *index: Scalar) -> None:
        begin = token + place * plan.page_size

        @pl.when((begin < span.first) | (begin + plan.page_size > span.end))
        def _() -> None:
            where = (slot, place, *(lax.rem(each, plan.kv_heads) for each in index))
            values = buffer[where]
            at = begin + lax.broadcasted_iota(jnp.int32, values.shape, 1 - len(index))
            seen = (at >= span.first) & (at < span.end)
            buffer[where] = jnp.where(seen, values, jnp.zeros_like(values))

    def head(index: Scalar, _: None) -> None:
        zero(refs.v_buf, lax.div(index, plan.kv_heads), index)

    if jnp.issubdtype(refs.v_buf.dtype, jnp.floating):  # an int8 is no NaN
        lax.fori_loop(0, pages * plan.kv_heads, head, None)
    if plan.scaled:
        lax.fori_loop(0, pages, lambda place, _: zero(refs.v_scale_buf, place), None)


def append(
    refs: Refs, plan: Plan, span: Span, row: Scalar, slot: Scalar, place: Scalar, last: Flag
) -> Flag:
    """Put the newest token into its page, here and in HBM; whether there was one to put.

    HBM takes whole tiles of a page, so the tile goes back as it came but for the token, and so do
    all scales of the page. They leave from buffers of their own: in the page, tokens that nobody
    sees are about to be cleared.
    """
    offset = lax.rem(span.end - 1, plan.page_size)
    strip = pl.multiple_of(lax.div(offset, plan.strip) * plan.strip, plan.strip)
    given = refs.table[0, span.first_page + span.count - 1]
    known = _known(given, plan)
    live = last & (refs.writes[row] != 0) & (given == known)

    scales = (refs.k_scale_buf, refs.new_k_scales), (refs.v_scale_buf, refs.new_v_scales)
    scales = scales if plan.scaled else ()

    def put(head: Scalar, _: None) -> None:
        for kind, (buffer, new) in enumerate(((refs.k_buf, refs.new_k), (refs.v_buf, refs.new_v))):
            where = (slot, place, head, pl.ds(strip, plan.strip))
            old = buffer[where]
            at = strip + lax.broadcasted_iota(jnp.int32, old.shape, 0)
            merged = jnp.where(at == offset, new[head], old)
            buffer[where] = merged
            refs.strips[kind, head] = merged

    @pl.when(live)
    def _() -> None:
        lax.fori_loop(0, plan.kv_heads, put, None)
        for kind, (buffer, new) in enumerate(scales):
            old = buffer[slot, place]
            at = lax.broadcasted_iota(jnp.int32, old.shape, 1)
            merged = jnp.where(at == offset, new[...], old)
            buffer[slot, place] = merged
            refs.scale_strips[kind] = merged
        for copy in _write_copies(refs, plan, known, strip):
            copy.start()

    return live


def wait_written(refs: Refs, plan: Plan) -> None:
    """Wait for what `append` sent."""
    for copy in _write_copies(refs, plan, 0, 0):  # any slice of that size
        copy.wait()


def _write_copies(refs: Refs, plan: Plan, page: Scalar, strip: Any) -> tuple[Any, ...]:
    layer, rows = refs.layer[0], pl.ds(strip, plan.strip)
    ends = [
        (refs.strips.at[kind], pages.at[layer, page, :, rows])
        for kind, pages in enumerate((refs.k_pages, refs.v_pages))
    ]
    if plan.scaled:
        ends += [
            (refs.scale_strips.at[kind], scales.at[layer, page])
            for kind, scales in enumerate((refs.k_scales, refs.v_scales))
        ]
    return tuple(
        pltpu.make_async_copy(source, target, refs.write_sems.at[kind])
        for kind, (source, target) in enumerate(ends)
    )
