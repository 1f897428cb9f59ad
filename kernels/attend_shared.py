"""Attention of rows that share a prefix: its pages are read once for all of them.

```
part     [==== pages that rows 0, 2, 3 share ====]           one row of R * G heads a KV head
row 0                                            [= tail =]  rows as they are, with `starts`
row 1    [================ shares nothing ================]
row 2                                            [== tail ==]
row 3                                            [tail]
```

The queries of R rows that see the same tokens are queries of one row with R times as many heads: a
call as every backend serves it, without a mask. Its result and that of the tails are merged by
their log-sums, which is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from . import dispatch
from .annotations import FixedScales
from .record import POOLS, AttentionCall
from .shared_prefix import SharedPrefix

__all__ = ["append_and_attend", "attend", "shares"]

QUERIES = 64  # of a KV head that every kernel takes at once


def shares(call: AttentionCall) -> bool:
    """Whether rows that share pages see the same tokens of them, whatever their lengths are."""
    return call.one_token and call.window is None and call.starts is None


def attend(
    call: AttentionCall, shared: SharedPrefix | None, names: Sequence[str] | None
) -> tuple[Float[Array, "B T Hq D"], Float[Array, "B T Hq"]]:
    """`dispatch.attend`, with a plan or without."""
    if (held := _held(call, shared)) is None:
        return dispatch.attend(call, names)
    return _merged(call, held, dispatch.attend(_tails(call, held), names), names)


def append_and_attend(
    call: AttentionCall,
    k: Float[Array, "B T Hk D"],
    v: Float[Array, "B T Hk D"],
    slots: Int32[Array, "B T"] | None,
    shared: SharedPrefix | None,
    *,
    fixed_scales: FixedScales | None,
    names: Sequence[str] | None,
) -> tuple[Array, ...]:
    """`dispatch.append_and_attend`, with a plan or without."""
    own: dict[str, Any] = dict(fixed_scales=fixed_scales, names=names)
    if (held := _held(call, shared)) is None:
        return dispatch.append_and_attend(call, k, v, slots, **own)
    # The tails come first, for they write: a read of the old pages would have them copied.
    out, lse, *pools = dispatch.append_and_attend(_tails(call, held), k, v, slots, **own)
    call = replace(call, **dict(zip(POOLS, pools, strict=False)))
    return *_merged(call, held, (out, lse), names), *pools


def _held(call: AttentionCall, shared: SharedPrefix | None) -> SharedPrefix | None:
    """The plan as far as it is true of this call: a row that has ended shares nothing, nor does one
    that has no tail. None: there is nothing to share."""
    if shared is None or not shares(call) or call.group > QUERIES // 2:
        return None
    if call.batch_invariant:  # what is merged of a row would follow from who else is there
        return None
    nowhere = shared.members.size
    if call.rows < 2 or nowhere == 0:
        return None
    true = call.seq_lens > shared.starts
    return replace(
        shared,
        place=jnp.where(true, shared.place, nowhere),
        starts=jnp.where(true, shared.starts, 0),
    )


def _tails(call: AttentionCall, shared: SharedPrefix) -> AttentionCall:
    return replace(call, starts=shared.starts, sink=None)


def _merged(
    call: AttentionCall,
    shared: SharedPrefix,
    tails: tuple[Array, Array],
    names: Sequence[str] | None,
) -> tuple[Array, Array]:
    """The attention of each row, from that over its tail and over what it shares."""
    with jax.named_scope("paged_decode.shared_prefix"):
        parts, members = shared.members.shape
        filled = min(parts, -(-call.rows // members)) * _cuts(call, members)
        own: dict[str, Any] = dict(filled=filled, place=shared.place, tails=tails, sink=call.sink)
        return dispatch.attend_joined(_prefixes(call, shared), names, **own)


def _prefixes(call: AttentionCall, shared: SharedPrefix) -> AttentionCall:
    """The call of the parts: T = 1, and the heads of their rows beside each other, KV head by KV
    head. Parts of too many heads for a kernel are cut."""
    parts, members = shared.members.shape
    cuts = _cuts(call, members)
    size = members // cuts
    seats = shared.members.reshape(parts * cuts, size)
    q = call.q[:, 0].at[seats.reshape(-1)].get(mode="fill", fill_value=0)
    q = q.reshape(parts * cuts, size, call.kv_heads, call.group, call.dim)
    q = jnp.swapaxes(q, 1, 2).reshape(parts * cuts, 1, -1, call.dim)
    table, lens = shared.page_table, shared.seq_lens
    if cuts > 1:
        table, lens = jnp.repeat(table, cuts, axis=0), jnp.repeat(lens, cuts)
        lens = jnp.where(jnp.any(seats < call.rows, axis=1), lens, 0)
    return replace(call, q=q, page_table=table, seq_lens=lens, starts=None, sink=None)


def _cuts(call: AttentionCall, members: int) -> int:
    """Into how many a part of so many rows is cut, so that a tile holds each."""
    rows = max(QUERIES // call.group, 1)
    return next(n for n in range(1, members + 1) if members % n == 0 and members // n <= rows)
