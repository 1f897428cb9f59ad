"""The device programs of the engine: what changed, one prefill chunk, k decode steps.

They are compiled once per model function and shape, whatever the number of engines, and live as
long as the model function does (a method, and what cannot be referred to weakly, as long as its
engine).
"""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from ..cache import DecodeBatch, GroupBatch, KVCache
from .apart import call_model_apart
from .drafting import Drafter
from .model import Model, call_model
from .params import Kind
from .processing import ProcessLogits, processed
from .rows import MessageSizes, RowState, apply_detail, apply_masks, apply_message, take_rows
from .sampling import IN_PROMPT, Broken, Drawn, draw, log_probability

__all__ = ["DecodeOut", "Programs", "ScoreOut", "detail", "masks", "update"]


class DecodeOut(NamedTuple):
    """What k steps produced, for B rows.

    Attributes:
      packed: int32 `[4 * K + 3, B]`: the tokens, the bits of `Drawn.logprob`, `processed_logprob`
        and `total`, how many of them are real, why no token could be chosen behind those (a
        `Broken`), and how many tokens were drafts.
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
            partial(_prefill, model),
            donate_argnames="cache",
            static_argnames=("drafter", "apart"),
        )
        self.score = jax.jit(
            partial(_score, model), donate_argnames="cache", static_argnames=("top", "apart")
        )
        self.decode = jax.jit(
            partial(_decode, model),
            donate_argnames=("cache", "state"),
            static_argnames=("steps", "top", "known", "drafter", "process", "share", "apart"),
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


@partial(jax.jit, donate_argnames=("table", "state"))
def detail(
    table: Int[Array, "G B P"], state: RowState, message: Int[Array, " M"]
) -> tuple[Array, RowState]:
    """What few rows have, as `detail_message` packs it for one; donates as `update`."""
    return table, apply_detail(state, message)


@partial(jax.jit, donate_argnames=("table", "state"))
def masks(
    table: Int[Array, "G B P"], state: RowState, message: Int[Array, "8 W"]
) -> tuple[Array, RowState]:
    """The masks of a step, as `mask_messages` packs them; donates as `update`."""
    return table, apply_masks(state, message)


def _prefill(
    model: Callable[[], Model],
    cache: KVCache,
    table: Int[Array, "G B P"],
    params: Any,
    message: Int[Array, "R C"],
    *,
    drafter: Drafter | None = None,
    apart: int = 0,
) -> tuple[KVCache, Array]:
    """Compute one chunk of every row, only to fill the cache. Donates the cache.

    `message` has slot, begin and end of each row, and its tokens, right-aligned. No logits come
    back: the newest token of a prompt is left to `decode`, so that sampling has one home and forks
    of a prompt need nothing special. The number beside the cache is there when the program is over.

    `apart`: the model runs over so many rows of one token in each shard; 0: over the batch.
    """
    batch = _chunks(cache, table, message)
    with jax.named_scope("paged_decode.prefill"):
        done = _call(apart)(model(), params, cache, batch, every=drafter is not None)[1]
    return done, jnp.int32(0)


def _call(apart: int) -> Callable[..., tuple[Array, KVCache]]:
    """How the model is called."""
    return partial(call_model_apart, rows=apart) if apart else call_model


def _chunks(cache: KVCache, table: Int[Array, "G B P"], message: Int[Array, "R C"]) -> DecodeBatch:
    """The batch of a message that has slot, begin and end of each row, and its tokens."""
    slot, begin, end = message[:, :3].T
    groups = _groups(cache, table, slot)
    return _tail(groups, cache.page_size, message[:, 3:], begin, end)


class ScoreOut(NamedTuple):
    """What a program says of the tokens behind T positions of R rows, right-aligned.

    Attributes:
      logprobs: float32 `[R, T]`.
      ids, likely: the likeliest tokens and their log-probabilities, `[R, T, top]`.
    """

    logprobs: Any
    ids: Any
    likely: Any


def _score(
    model: Callable[[], Model],
    cache: KVCache,
    table: Int[Array, "G B P"],
    params: Any,
    message: Int[Array, "R C"],
    *,
    top: int,
    apart: int = 0,
) -> tuple[KVCache, ScoreOut]:
    """`_prefill`, and how likely the token behind each was. Donates the cache.

    `message` has slot, begin and end of each row, its tokens, and as many that are behind them.
    """
    behind = (message.shape[1] + 3) // 2
    batch, targets = _chunks(cache, table, message[:, :behind]), message[:, behind:]
    with jax.named_scope("paged_decode.score"):
        logits, cache = _call(apart)(model(), params, cache, batch, every=True)
        if cache.placement is not None:
            logits = cache.placement.untyped(logits)
        flat = logits.astype(jnp.float32).reshape(-1, logits.shape[-1])
        logprobs, total = log_probability(flat, targets.reshape(-1))
        highest, ids = lax.top_k(flat, top)
        found = logprobs, ids.astype(jnp.int32), highest - total[:, None]
        out = ScoreOut(*(each.reshape(*targets.shape, *each.shape[1:]) for each in found))
    return cache, out if cache.placement is None else cache.placement.whole(out)


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
    drafter: Drafter | None = None,
    process: ProcessLogits | None = None,
    share: int = 0,
    apart: int = 0,
) -> tuple[KVCache, RowState, DecodeOut]:
    """Run up to `steps` tokens of the rows in some slots without the host. Donates the cache.

    `message` has their slots and how many tokens each may get (0 pads the batch). A row stops
    there, with a stop token, or before a token that cannot be chosen, and the loop ends with its
    last living row. Every page that the steps may write is in the table.

    A step checks the newest token and the drafts behind it, and takes what `_accepted` says. No
    draft lies behind the last token that a row may get, so every row gets as many tokens as without
    drafts, in fewer steps.

    With `known`, the greatest kind of sampling among the rows, the device decides nothing: all
    steps are run, and a launch returns before they are. `Kind.NARROW` only says that no row is
    shaped: the device asks for all else, and for the end of the loop.

    Pages that rows begin with in common are read once for them where that saves reading `share`
    tokens; 0: never. `apart` as in `_prefill`.
    """
    where, budget = message
    size, every = where.shape[0], drafter is not None
    has_text = every or known is None or process is not None  # for nobody else looks at it
    held = state if has_text else replace(state, text=state.text[:, :0])
    if known is not None:  # nobody has a mask either
        held = replace(held, sampling=replace(held.sampling, bits=state.sampling.bits[:, :0]))
    rows = replace(take_rows(replace(held, text=None), where), text=held.text)  # that of all slots
    groups, function = _groups(cache, table, where), model()
    if share and size > 1:
        lens = jnp.where(rows.alive & (budget > 0), rows.length, 0)
        begun = DecodeBatch(rows.newest[:, None], lens, lens[:, None], groups)
        groups = cache.share_prefixes(begun, min_tokens=share).groups
    out = DecodeOut(
        packed=jnp.zeros((4, steps, size), jnp.int32),
        top_ids=jnp.zeros((steps, size, top), jnp.int32),
        top_logits=jnp.zeros((steps, size, top), jnp.float32),
    )
    none = jnp.zeros(size, jnp.int32)
    begin = jnp.int32(0), cache, rows, _Tally(none, none, none), out

    def living(loop: tuple) -> Array:
        return (loop[0] < steps) & jnp.any(loop[2].alive & (loop[3].counts < budget))

    def step(loop: tuple) -> tuple:
        i, cache, rows, tally, out = loop
        texts = partial(take_rows, rows.text, where)  # of these rows, for whoever looks at them
        left = jnp.where(rows.alive, budget - tally.counts, 0)
        asked, number = _asked(drafter, rows, texts, left)
        first = jnp.where(number > 0, rows.length - 1, 0)
        now = _tail(groups, cache.page_size, _right(asked, number), first, first + number)
        with jax.named_scope("paged_decode.decode"):
            logits, cache = _call(apart)(function, params, cache, now, every=every)
        if cache.placement is not None:
            logits = cache.placement.untyped(logits)
        logits = _left(logits.reshape(*asked.shape, -1), number)
        with jax.named_scope("paged_decode.sample"):
            drawn = _draw(logits, rows, texts, asked, known, process)
        got, stopped, failed = _accepted(asked, number, drawn, rows.sampling.stop_tokens)
        out = _written(out, tally.counts, got, drawn, logits)
        over = stopped | (failed != Broken.NO)
        rows = _advanced(rows, where, got, drawn.tokens, over)
        tally = tally.plus(got, failed)
        return i + 1, cache, rows, tally, out

    if known is None or known >= Kind.NARROW:
        end = lax.while_loop(living, step, begin)
    else:
        end = lax.fori_loop(0, steps, lambda _, loop: step(loop), begin)
    _, cache, rows, tally, out = end

    def put(old: Array, new: Array) -> Array:
        return old.at[where].set(new, mode="drop")

    state = RowState(
        newest=put(state.newest, rows.newest),
        length=put(state.length, rows.length),
        alive=put(state.alive, rows.alive),
        sampling=replace(state.sampling, index=put(state.sampling.index, rows.sampling.index)),
        text=rows.text if has_text else state.text,
    )
    packed = jnp.concatenate([*out.packed, *(each[None].astype(jnp.int32) for each in tally)])
    out = out._replace(packed=packed)
    return cache, state, out if cache.placement is None else cache.placement.whole(out)


class _Tally(NamedTuple):
    """Of each row `[B]`: tokens, why there are no more (a `Broken`), how many were drafts."""

    counts: Any
    broken: Any
    drafted: Any

    def plus(self, got: Bool[Array, "B T"], failed: Int[Array, " B"]) -> _Tally:
        """With those of one more step."""
        more = jnp.sum(got, axis=1, dtype=jnp.int32)
        drafted = self.drafted + jnp.maximum(more - 1, 0)
        return _Tally(self.counts + more, jnp.maximum(self.broken, failed), drafted)


def _written(
    out: DecodeOut,
    counts: Int[Array, " B"],
    got: Bool[Array, "B T"],
    drawn: Drawn,
    logits: Array,
) -> DecodeOut:
    """What each row got, and the largest logits behind it, after what it had."""
    size, width = got.shape
    steps, _, top = out.top_ids.shape
    values, ids = lax.top_k(logits.astype(jnp.float32), top)
    place = counts[:, None] + jnp.arange(width, dtype=jnp.int32)
    at = jnp.where(got, place, steps), jnp.arange(size, dtype=jnp.int32)[:, None]
    numbers = (drawn.logprob, drawn.processed_logprob, drawn.total)
    bits = (lax.bitcast_convert_type(each, jnp.int32) for each in numbers)
    return DecodeOut(
        packed=out.packed.at[:, *at].set(jnp.stack([drawn.tokens, *bits]), mode="drop"),
        top_ids=out.top_ids.at[at].set(ids.astype(jnp.int32), mode="drop"),
        top_logits=out.top_logits.at[at].set(values, mode="drop"),
    )


def _advanced(
    rows: RowState,
    where: Int[Array, " B"],
    got: Bool[Array, "B T"],
    chosen: Int[Array, "B T"],
    over: Bool[Array, " B"],
) -> RowState:
    """The rows, whose texts lie in these slots, with the tokens that they got; some are over."""
    more = jnp.sum(got, axis=1, dtype=jnp.int32)
    last = jnp.take_along_axis(chosen, jnp.maximum(more - 1, 0)[:, None], axis=1)[:, 0]
    text = rows.text
    if places := text.shape[1]:  # somebody looks at it
        place = rows.length[:, None] + jnp.arange(got.shape[1], dtype=jnp.int32)
        text = text.at[where[:, None], jnp.where(got, place, places)].set(chosen, mode="drop")
    return RowState(
        newest=jnp.where(more > 0, last, rows.newest),
        length=rows.length + more,
        alive=rows.alive & ~over,
        sampling=replace(rows.sampling, index=rows.sampling.index + more),
        text=text,
    )


def _asked(
    drafter: Drafter | None, rows: RowState, texts: Callable[[], Array], left: Int[Array, " B"]
) -> tuple[Int[Array, "B T"], Int[Array, " B"]]:
    """The newest token of each row and its drafts, and how many these are: as many tokens as may
    come of it, 0 for a row that gets none."""
    newest = rows.newest[:, None]
    if drafter is None:
        return newest, jnp.minimum(left, 1)
    drafts = drafter(texts(), rows.length)
    offered = jnp.sum(jnp.cumprod(drafts >= 0, axis=1, dtype=jnp.int32), axis=1, dtype=jnp.int32)
    tokens = jnp.concatenate([newest, jnp.maximum(drafts, 0)], axis=1)
    return tokens, jnp.minimum(left, 1 + offered)


def _right(tokens: Int[Array, "B T"], number: Int[Array, " B"]) -> Int[Array, "B T"]:
    """The first `number` of each row at its end, as a batch has them."""
    if (width := tokens.shape[1]) == 1:
        return tokens
    from_ = jnp.arange(width, dtype=jnp.int32) - (width - number)[:, None]
    return jnp.where(from_ < 0, 0, jnp.take_along_axis(tokens, jnp.maximum(from_, 0), axis=1))


def _left(logits: Array, number: Int[Array, " B"]) -> Array:
    """`[B, T, V]`: the last `number` of each row at its beginning, and anything behind them."""
    if (width := logits.shape[1]) == 1:
        return logits
    from_ = jnp.minimum(jnp.arange(width, dtype=jnp.int32) + (width - number)[:, None], width - 1)
    return jnp.take_along_axis(logits, from_[:, :, None], axis=1)


def _draw(
    logits: Array,
    rows: RowState,
    texts: Callable[[], Array],
    asked: Int[Array, "B T"],
    known: Kind | None,
    process: ProcessLogits | None,
) -> Drawn:
    """`draw` of logits `[B, T, V]`, each with its own place in the stream of its row: `[B, T]`.

    A token is drawn as behind the drafts before it, if these were right.
    """
    size, width, vocab = logits.shape
    each = jax.tree.map(lambda a: jnp.repeat(a, width, axis=0), rows.sampling)
    ahead = jnp.tile(jnp.arange(width, dtype=jnp.int32), size)
    each = replace(each, index=each.index + ahead)
    counts, most = partial(_counts, rows, texts, asked, vocab), known
    if known is not None and known >= Kind.NARROW:
        most = None
    flat = logits.reshape(-1, vocab)
    change = None
    if process is not None:
        change = partial(processed, process, rows=replace(rows, text=texts()), asked=asked)
    numbers = jnp.any(each.told) if known is None else None
    plain = known is not None
    drawn = draw(flat, each, most, counts, plain=plain, process=change, numbers=numbers)
    return Drawn(*(a.reshape(size, width) for a in drawn))


def _counts(
    rows: RowState, texts: Callable[[], Array], asked: Int[Array, "B T"], vocab: int
) -> Int[Array, "BT V"]:
    """How often each row has generated each token, and `IN_PROMPT` more if its prompt has it; with
    the drafts up to each of the tokens asked for."""
    text = texts()
    (size, width), places = asked.shape, text.shape[1]
    place, prompt = jnp.arange(places, dtype=jnp.int32), rows.length - rows.sampling.index
    row, in_prompt = jnp.arange(size, dtype=jnp.int32)[:, None], place < prompt[:, None]
    generated = ~in_prompt & (place < rows.length[:, None])
    none = jnp.zeros((size, vocab), jnp.int32)
    seen = none.at[row, jnp.where(in_prompt, text, vocab)].set(IN_PROMPT, mode="drop")
    seen = seen.at[row, jnp.where(generated, text, vocab)].add(1, mode="drop")
    each = [seen]
    for draft in asked[:, 1:].T:
        each.append(each[-1].at[row[:, 0], draft].add(1, mode="drop"))
    return jnp.stack(each, axis=1).reshape(size * width, vocab)


def _accepted(
    asked: Int[Array, "B T"],
    number: Int[Array, " B"],
    drawn: Drawn,
    stop_tokens: Int[Array, "B S"],
) -> tuple[Bool[Array, "B T"], Bool[Array, " B"], Int[Array, " B"]]:
    """Which of the chosen tokens are those of decoding one by one; which rows stop, why one fails.

    A token counts if all drafts before it are what was chosen in their place, greedily or drawn,
    and none of those is a stop token or could not be chosen.
    """
    chosen, broken = drawn.tokens, drawn.broken != Broken.NO
    stop = jnp.any(stop_tokens[:, None] == chosen[:, :, None], axis=-1)
    wrong = asked[:, 1:] != chosen[:, :-1]
    over = jnp.cumsum(wrong | (stop | broken)[:, :-1], axis=1, dtype=jnp.int32) > 0
    over = jnp.pad(over, ((0, 0), (1, 0)))
    reached = ~over & (jnp.arange(asked.shape[1], dtype=jnp.int32) < number[:, None])
    got = reached & ~broken
    failed = jnp.max(jnp.where(reached, drawn.broken, Broken.NO), axis=1)
    return got, jnp.any(got & stop, axis=1), failed


def _tail(
    groups: Sequence[GroupBatch],
    page_size: int,
    tokens: Int[Array, "B T"],
    begin: Int[Array, " B"],
    end: Int[Array, " B"],
) -> DecodeBatch:
    """The batch of the positions begin to end - 1 of each row, whose tokens are right-aligned."""
    width = tokens.shape[1]
    positions = end[:, None] - width + jnp.arange(width, dtype=jnp.int32)
    valid = positions >= begin[:, None]
    positions = jnp.maximum(positions, 0)

    def place(group: GroupBatch) -> GroupBatch:
        pages = jnp.take_along_axis(group.page_table, positions // page_size, axis=1)
        slots = jnp.where(valid, pages * page_size + positions % page_size, 0)
        if group.window is None or width == 1:  # one token has no padding that sees more than it
            return replace(group, slots=slots)
        starts = jnp.maximum(begin - group.window + 1, 0)  # what is before may be another's
        return replace(group, slots=slots, starts=starts)

    own = None if width == 1 else end - begin
    return DecodeBatch(tokens, end, positions, tuple(place(group) for group in groups), own)


def _groups(cache: KVCache, table: Array, where: Array) -> tuple[GroupBatch, ...]:
    """The tables of the rows in some slots, in every group of layers; of no token yet."""
    none, shards = jnp.zeros((where.shape[0], 1), jnp.int32), cache.data_shards
    return tuple(
        GroupBatch(take_rows(ids, where), none, None, cache.page_size, pages // shards, window)
        for ids, (pages, window) in zip(table, cache.pools, strict=True)
    )
