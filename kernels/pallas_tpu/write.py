"""New tokens into the pages of a stacked pool, in place: a scatter by XLA for TPU would copy it.

A DMA moves whole tiles of a page, so a token is written by reading its tile, putting the token in,
and writing the tile back. Tokens are sorted by slot first: those of one tile then follow each other
and no two tiles that are under way at the same time are the same. The scales of pages of 8 bits are
a second group of pools in the same launch: their tiles hold more tokens.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Int32

from ..write import Pools
from .config import LANES
from .launch import like
from .work import Scalar

__all__ = ["serves", "write_tokens"]

AHEAD = 4  # tiles that are read before their turn
RING = 2 * AHEAD  # tiles under way: those, this one, and those that are being written


def serves(pools: Pools) -> bool:
    """Whether Mosaic can move tiles of such stacked pools: see `call.refusal` for scales."""
    pages = pools[0]
    return pages.dtype != jnp.float16 and (len(pools) == 2 or pages.shape[-2] % LANES == 0)


def write_tokens(
    pools: Pools,
    new: tuple[Array, ...],
    slots: Int32[Array, "n"],
    layer: Int32[Array, ""],
    *,
    interpret: Any = False,
) -> Pools:
    """The pools with the new tokens in their slots of one layer; slots outside write nothing.

    The pools are stacked, `[L, N, Hk, S, D]`, and `[L, N, Hk, S]` of scales; `new` is for each of
    them `[n, Hk, D]` or `[n, Hk]`, of its dtype. The layer is one of the pool's: the caller has
    made sure.
    """
    count = slots.shape[0]
    if count == 0:
        return pools
    pages, size = pools[0].shape[1], pools[0].shape[3]
    outside = (slots < 0) | (slots >= pages * size)
    slots = jnp.where(outside, jnp.int32(pages * size), slots)
    order = jnp.argsort(slots)
    slots = slots[order]
    scalars, statics = [], []
    for pool in pools[::2]:  # keys and values are alike
        strip = min(32 // pool.dtype.itemsize if pool.ndim == 5 else LANES, size)
        tile = slots // strip
        begins = jnp.concatenate([jnp.ones(1, jnp.bool_), tile[1:] != tile[:-1]])
        run = jnp.cumsum(begins.astype(jnp.int32)) - 1
        tile = jnp.where(slots < pages * size, tile, -1)
        tiles = jnp.full(count + AHEAD, -1, jnp.int32).at[run].set(tile)
        scalars += [run, tiles, slots % strip]
        statics.append(_Static(count, strip, size // strip))
    arrays = [each[order][:, :, None] for each in new]
    scalars.append(layer.reshape(1).astype(jnp.int32))
    with jax.enable_x64(False):
        return _launch(scalars, arrays, pools, statics, interpret)


@dataclass(frozen=True, slots=True)
class _Static:
    """Of one group of pools: keys and values, or their scales."""

    count: int  # tokens
    strip: int  # tokens of a tile
    strips: int  # tiles of a page and head


@dataclass(frozen=True, slots=True)
class _Refs:
    """Of one group of pools; scales have no D."""

    run: Any  # SMEM int32 [n], the run of every token: tokens of one tile
    tiles: Any  # SMEM int32 [n + AHEAD], the tile of every run, page * strips + strip; -1: none
    offsets: Any  # SMEM int32 [n], where in its tile a token lies
    layer: Any  # SMEM int32 [1]
    new: tuple[Any, Any]  # VMEM [Hk, 1, D]: k and v of the token of this step
    pages: tuple[Any, Any]  # HBM [L, N, Hk, S, D]
    ring: Any  # VMEM [2, RING, Hk, strip, D]
    sems: Any  # DMA [2, RING]: reads and writes


def _kernel(refs: _Refs, static: _Static) -> None:
    """One step a token; the tile of a run is read `AHEAD` runs before its turn."""
    step = pl.program_id(0)
    run = refs.run[step]
    final = step == static.count - 1
    begins = (step == 0) | (refs.run[jnp.maximum(step - 1, 0)] != run)
    ends = final | (refs.run[jnp.minimum(step + 1, static.count - 1)] != run)

    @pl.when(step == 0)
    def _() -> None:
        for ahead in range(AHEAD):
            _when_live(refs, ahead, lambda at: _start_read(refs, static, at))

    @pl.when(begins)
    def _() -> None:
        coming = run + AHEAD
        # The tile that had the place in the ring must have left it.
        _when_live(refs, coming - RING, lambda at: _wait_write(refs, static, at))
        _when_live(refs, coming, lambda at: _start_read(refs, static, at))
        _when_live(refs, run, lambda at: _wait_read(refs, static, at))

    place = lax.rem(run, RING)
    for kind in range(2):
        old = refs.ring[kind, place]
        at = lax.broadcasted_iota(jnp.int32, old.shape, 1)
        refs.ring[kind, place] = jnp.where(at == refs.offsets[step], refs.new[kind][...], old)

    @pl.when(ends)
    def _() -> None:
        _when_live(refs, run, lambda at: _start_write(refs, static, at))

    @pl.when(final)
    def _() -> None:
        for behind in range(RING - AHEAD):
            _when_live(refs, run - behind, lambda at: _wait_write(refs, static, at))


def _when_live(refs: _Refs, run: Scalar, do: Any) -> None:
    """`do(run)` if there is such a run and its tile lies in the pool."""
    at = jnp.maximum(run, 0)
    pl.when((run >= 0) & (refs.tiles[at] >= 0))(lambda: do(at))


def _copies(refs: _Refs, static: _Static, run: Scalar, write: bool) -> list[Any]:
    tile, place = refs.tiles[run], lax.rem(jnp.int32(run), RING)
    page, strip = lax.div(tile, static.strips), lax.rem(tile, static.strips)
    rows = pl.ds(pl.multiple_of(strip * static.strip, static.strip), static.strip)
    copies = []
    for kind, pages in enumerate(refs.pages):
        ends = pages.at[refs.layer[0], page, :, rows], refs.ring.at[kind, place]
        source, target = reversed(ends) if write else ends
        copies.append(pltpu.make_async_copy(source, target, refs.sems.at[int(write), place]))
    return copies


def _start_read(refs: _Refs, static: _Static, run: Scalar) -> None:
    for copy in _copies(refs, static, run, False):
        copy.start()


def _wait_read(refs: _Refs, static: _Static, run: Scalar) -> None:
    for copy in _copies(refs, static, run, False):
        copy.wait()


def _start_write(refs: _Refs, static: _Static, run: Scalar) -> None:
    for copy in _copies(refs, static, run, True):
        copy.start()


def _wait_write(refs: _Refs, static: _Static, run: Scalar) -> None:
    for copy in _copies(refs, static, run, True):
        copy.wait()


def _launch(
    scalars: list[Array],
    new: list[Array],
    pools: Pools,
    statics: list[_Static],
    interpret: Any,
) -> Pools:
    count, groups = len(pools), list(enumerate(statics))

    def body(*refs: Any) -> None:
        *by_group, layer = refs[: len(scalars)]
        given, _, written, scratch = (refs[len(scalars) + at * count :][:count] for at in range(4))
        for at, static in groups:
            pair = slice(2 * at, 2 * at + 2)
            run, tiles, offsets = by_group[3 * at : 3 * at + 3]
            mine = run, tiles, offsets, layer, given[pair], written[pair], *scratch[pair]
            _kernel(_Refs(*mine), static)

    def token(array: Array) -> Any:
        zeros = (0,) * (array.ndim - 1)
        return pl.BlockSpec((None, *array.shape[1:]), lambda step, *_: (step, *zeros))

    hbm = pl.BlockSpec(memory_space=pl.ANY)
    scratch = []
    for at, static in groups:
        _, _, heads, _, *dim = pools[2 * at].shape
        ring = (2, RING, heads, static.strip, *dim)
        scratch += [pltpu.VMEM(ring, pools[2 * at].dtype), pltpu.SemaphoreType.DMA((2, RING))]
    call = pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(statics[0].count,),
            in_specs=[*map(token, new), *[hbm] * count],
            out_specs=[hbm] * count,
            scratch_shapes=scratch,
        ),
        out_shape=[like(pool) for pool in pools],
        input_output_aliases={len(scalars) + count + at: at for at in range(count)},
        # `_when_live` keeps every tile in the pool; the checks cost as much as a copy (launch.py).
        compiler_params=pltpu.CompilerParams(disable_bounds_checks=True),
        interpret=interpret,
        name="paged_write",
    )
    return tuple(call(*scalars, *new, *pools))
