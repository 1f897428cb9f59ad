"""The device programs of the engine: what changed, one prefill chunk, k decode steps.

They are compiled once per model function and shape, whatever the number of engines, and live as
long as the model function does (a method, and what cannot be referred to weakly, as long as its
engine).
"""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from ..cache import DecodeBatch, GroupBatch, KVCache, one_token_batch
from .rows import MessageSizes, RowState, apply_message, take_rows
from .sampling import Kind, draw

__all__ = ["DecodeOut", "Model", "Programs", "update"]


@runtime_checkable
class Model(Protocol):
    """What an engine asks of a model: one function, which JAX traces.

    It writes the keys and values of every token and attends, with
    `cache.append_and_attend(layer, q, k, v, batch)`, and returns the cache that this gave.
    Arguments are passed by place, so their names are free.
    """

    def __call__(
        self, params: Any, cache: KVCache, tokens: Array, batch: DecodeBatch, /
    ) -> tuple[Array, KVCache]:
        """Logits `[B, V]` of the last token of each row, and the cache.

        Args:
          params: a pytree, as the engine was given it.
          cache: the pool.
          tokens: int32 `[B, T]`; T is 1 in a decode step, and more in a prefill chunk.
          batch: where they lie, and their positions.
        """
        ...


class DecodeOut(NamedTuple):
    """What k steps produced, for B rows.

    Attributes:
      packed: int32 `[K + 2, B]`: the tokens, how many of them are real, and whether the logits
        behind those were such that no token can be chosen.
      top_ids, top_logits: the largest logits of every step, `[K, B, top]`; top may be 0.
    """

    packed: Any
    top_ids: Any
    top_logits: Any


class Programs:
    """The programs of one model function."""

    def __init__(self, model: Callable[[], Model]):
        """`model()` is the function; it is asked for while a program is traced."""
        self.prefill = jax.jit(
            partial(_prefill, model), donate_argnames="cache", static_argnames=()
        )
        self.decode = jax.jit(
            partial(_decode, model),
            donate_argnames=("cache", "state"),
            static_argnames=("steps", "top", "known"),
        )

    @classmethod
    def of(cls, model: Model) -> Programs:
        """Those of the function: the same ones for every engine that has it."""
        if isinstance(model, types.MethodType):  # a new object at every access
            return cls(lambda: model)
        try:
            if (programs := _known.get(model)) is None:
                programs = _known[model] = cls(_required(weakref.ref(model)))
            return programs
        except TypeError:
            return cls(lambda: model)


_known: weakref.WeakKeyDictionary[Model, Programs] = weakref.WeakKeyDictionary()
"""What was compiled for each function that is still there."""


def _required(model: Callable[[], Model | None]) -> Callable[[], Model]:
    def required() -> Model:
        if (found := model()) is None:
            raise RuntimeError("the model function is gone")
        return found

    return required


@partial(jax.jit, donate_argnames=("table", "state"), static_argnames="size")
def update(
    table: Int[Array, "G B P"], state: RowState, message: Int[Array, " M"], *, size: MessageSizes
) -> tuple[Array, RowState]:
    """What a message says; donates what it changes."""
    return apply_message(table, state, message, size)


def _prefill(
    model: Callable[[], Model],
    cache: KVCache,
    table: Int[Array, "G B P"],
    params: Any,
    message: Int[Array, "R C"],
) -> tuple[KVCache, Array]:
    """Compute one chunk of every row, only to fill the cache. Donates the cache.

    `message` has slot, begin and end of each row, and its tokens, right-aligned. No logits come
    back: the newest token of a prompt is left to `decode`, so that sampling has one home and forks
    of a prompt need nothing special. The number beside the cache is there when the program is over.
    """
    slot, begin, end, tokens = message[:, 0], message[:, 1], message[:, 2], message[:, 3:]
    positions = end[:, None] - tokens.shape[1] + jnp.arange(tokens.shape[1], dtype=jnp.int32)
    valid = positions >= begin[:, None]
    positions, size = jnp.maximum(positions, 0), cache.page_size

    def place(group: GroupBatch) -> GroupBatch:
        pages = jnp.take_along_axis(group.page_table, positions // size, axis=1)
        slots = jnp.where(valid, pages * size + positions % size, 0)
        if group.window is None:
            return replace(group, slots=slots)
        starts = jnp.maximum(begin - group.window + 1, 0)  # what is before may be another's
        return replace(group, slots=slots, starts=starts)

    groups = tuple(place(group) for group in _groups(cache, table, slot))
    batch = DecodeBatch(tokens, end, positions, groups)
    with jax.named_scope("paged_decode.prefill"):
        return _call(model(), params, cache, batch)[1], jnp.int32(0)


def _decode(
    model: Callable[[], Model],
    cache: KVCache,
    state: RowState,
    table: Int[Array, "G B P"],
    params: Any,
    message: Int[Array, "2 n"],
    *,
    steps: int,
    top: int,
    known: Kind | None = None,
) -> tuple[KVCache, RowState, DecodeOut]:
    """Run up to `steps` tokens of the rows in some slots without the host. Donates the cache.

    `message` has their slots and how many tokens each may get (0 pads the batch). A row stops
    there, with a stop token, or before a token that cannot be chosen, and the loop ends with its
    last living row. Every page that the steps may write is in the table.

    With `known`, the greatest kind of sampling among the rows, the device decides nothing: all
    steps are run, and a launch returns before they are.
    """
    where, budget = message
    rows, size = take_rows(state, where), where.shape[0]
    none = jnp.zeros((size, 1), jnp.int32)
    batch = DecodeBatch(none, rows.length, none, _groups(cache, table, where))
    function = model()
    out = DecodeOut(
        packed=jnp.zeros((steps, size), jnp.int32),
        top_ids=jnp.zeros((steps, size, top), jnp.int32),
        top_logits=jnp.zeros((steps, size, top), jnp.float32),
    )

    def living(loop: tuple) -> Array:
        return (loop[0] < steps) & jnp.any(loop[2].alive & (loop[3] < budget))

    def step(loop: tuple) -> tuple:
        i, cache, rows, counts, invalid, out = loop
        alive = rows.alive & (counts < budget)
        now = one_token_batch(batch, rows.newest, jnp.where(alive, rows.length, 0))
        with jax.named_scope("paged_decode.decode"):
            logits, cache = _call(function, params, cache, now)
        if cache.placement is not None:
            logits = cache.placement.untyped(logits)
        with jax.named_scope("paged_decode.sample"):
            chosen, broken = draw(logits, rows.sampling, known)
        broken &= alive
        got = alive & ~broken
        stopped = jnp.any(rows.sampling.stop_tokens == chosen[:, None], axis=-1) & got
        more = got.astype(jnp.int32)
        values, ids = lax.top_k(logits.astype(jnp.float32), top)
        rows = RowState(
            newest=jnp.where(got, chosen, rows.newest),
            length=rows.length + more,
            alive=rows.alive & ~stopped & ~broken,
            sampling=replace(rows.sampling, index=rows.sampling.index + more),
        )
        out = DecodeOut(
            packed=out.packed.at[i].set(chosen),
            top_ids=out.top_ids.at[i].set(ids.astype(jnp.int32)),
            top_logits=out.top_logits.at[i].set(values),
        )
        return i + 1, cache, rows, counts + more, invalid | broken, out

    begin = (jnp.int32(0), cache, rows, jnp.zeros(size, jnp.int32), jnp.zeros(size, bool), out)
    if known is None:
        end = lax.while_loop(living, step, begin)
    else:
        end = lax.fori_loop(0, steps, lambda _, loop: step(loop), begin)
    _, cache, rows, counts, invalid, out = end
    state = jax.tree.map(lambda a, new: a.at[where].set(new, mode="drop"), state, rows)
    packed = jnp.concatenate([out.packed, counts[None], invalid[None].astype(jnp.int32)])
    out = out._replace(packed=packed)
    return cache, state, out if cache.placement is None else cache.placement.whole(out)


def _groups(cache: KVCache, table: Array, where: Array) -> tuple[GroupBatch, ...]:
    """The tables of the rows in some slots, in every group of layers; of no token yet.

    What one token sees of a window needs no `starts`: it has no padding that sees more.
    """
    none, shards = jnp.zeros((where.shape[0], 1), jnp.int32), cache.data_shards
    return tuple(
        GroupBatch(take_rows(ids, where), none, None, cache.page_size, pages // shards, window)
        for ids, (pages, window) in zip(table, cache.pools, strict=True)
    )


def _call(model: Model, params: Any, cache: KVCache, batch: DecodeBatch) -> tuple[Array, KVCache]:
    """What the model returns, checked while it is traced: its slips compile without a word."""
    tokens = batch.tokens
    out = model(params, cache, tokens, batch)
    if not isinstance(out, tuple | list) or len(out) != 2 or not isinstance(out[1], KVCache):
        kinds = [type(each).__name__ for each in (out if isinstance(out, tuple | list) else [out])]
        raise TypeError(f"the model must return (logits, cache); got {', '.join(kinds)}")
    logits, after = out
    shape, dtype = getattr(logits, "shape", None), getattr(logits, "dtype", None)
    if shape is None or dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        kind = type(logits).__name__ if dtype is None else f"dtype {dtype}"
        raise TypeError(f"the model's logits must be a floating-point array [B, V]; got {kind}")
    if len(shape) != 2 or shape[0] != len(tokens) or shape[1] == 0:
        cure = ": return those of column T-1, logits[:, -1]" if len(shape) == 3 else ""
        raise ValueError(
            f"the model's logits must be [B, V] with B = {len(tokens)}; got shape {shape}{cure}"
        )
    old, new = jax.tree.leaves(cache), jax.tree.leaves(after)
    if [(a.shape, a.dtype) for a in old] != [(a.shape, a.dtype) for a in new]:
        raise ValueError("the model must return a cache of the shapes and dtypes that it was given")
    if all(a is b for a, b in zip(old, new, strict=True)):
        raise ValueError(
            "the model returned the cache that it was given, without the new keys and values: "
            "return what cache.append or cache.append_and_attend returned last"
        )
    return logits, after
