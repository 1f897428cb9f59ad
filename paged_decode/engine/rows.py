"""What the device knows of every row between visits, and the messages by which it learns more."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from .params import MAX_STOP_TOKENS, SamplingParams
from .records import Enter, TableDelta
from .sampling import SamplingRows

__all__ = [
    "MASKS",
    "MessageSizes",
    "RowSizes",
    "RowState",
    "apply_detail",
    "apply_masks",
    "apply_message",
    "detail_message",
    "empty_message",
    "mask_messages",
    "messages",
    "take_rows",
]

_ENTER_FIELDS = 10 + MAX_STOP_TOKENS
MASKS = 8  # of one message
_DETAIL_FIELDS = 5  # before what is named and the text


class RowSizes(NamedTuple):
    """How much there is of what few rows have: places for a text, for named tokens, for
    `logits_args`, and words of a mask."""

    text: int
    named: int
    args: int
    words: int


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class RowState:
    """Rows by slot, `R * max_rows` of them.

    Attributes:
      newest: int32 `[B]`, the token that the next step writes and continues.
      length: int32 `[B]`, tokens with it.
      alive: bool `[B]`, whether it goes on: it had no stop token and no broken logits.
      sampling: parameters and place in the stream.
      text: int32 `[B, L]`, their tokens, for a drafter and for penalties; of rows that have
        neither it says nothing.
    """

    newest: Any
    length: Any
    alive: Any
    sampling: SamplingRows
    text: Any

    @classmethod
    def empty(cls, rows: int, sizes: RowSizes) -> RowState:
        """Host arrays of rows that nobody has entered."""
        places = sizes.text
        newest, length, text = (np.zeros(s, np.int32) for s in (rows, rows, (rows, places)))
        sampling = SamplingRows.create([], [], rows, sizes.named, sizes.args, sizes.words)
        return cls(newest, length, np.zeros(rows, bool), sampling, text)


def take_rows(tree: Any, slots: Int[Array, " n"]) -> Any:
    """The rows in these slots; zeros for a slot that there is not, which pads."""
    return jax.tree.map(lambda a: jnp.take(a, slots, axis=0, mode="fill", fill_value=0), tree)


# ---- messages: int32 [E * fields + D * 2], one transfer each


@dataclass(frozen=True, slots=True)
class MessageSizes:
    """How many rows and table entries a message has room for; a program is compiled for each."""

    enters: int
    entries: int

    @property
    def length(self) -> int:
        return self.enters * _ENTER_FIELDS + 2 * self.entries


def messages(
    enter: Sequence[Enter],
    tables: Sequence[TableDelta],
    sizes: Sequence[MessageSizes],
    *,
    shape: tuple[int, int, int],
) -> Iterator[tuple[MessageSizes, np.ndarray]]:
    """What a plan says of rows and of the tables of each group, in as few messages as hold it.

    Padding names a slot, or an entry of the flat table of this `shape`, that there is not.
    """
    _, slots, columns = shape
    places = [
        (group * slots + each.slots.astype(np.int64)) * columns + each.columns
        for group, each in enumerate(tables)
    ]
    rows = _packed(enter) if enter else np.empty((0, _ENTER_FIELDS), np.int32)
    pages = np.concatenate([each.pages for each in tables])
    entries = np.stack([np.concatenate(places), pages], axis=1).astype(np.int32)
    while len(rows) or len(entries):
        fits = (s for s in sizes if len(rows) <= s.enters and len(entries) <= s.entries)
        size = next(fits, sizes[-1])
        message, head, tail = empty_message(size, shape)
        head[: len(rows)], tail[: len(entries)] = rows[: size.enters], entries[: size.entries]
        rows, entries = rows[size.enters :], entries[size.entries :]
        yield size, message


def empty_message(
    size: MessageSizes, shape: tuple[int, int, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A message that says nothing, and its two parts: rows `[E, fields]`, entries `[D, 2]`."""
    message = np.zeros(size.length, np.int32)
    head = message[: size.enters * _ENTER_FIELDS].reshape(size.enters, _ENTER_FIELDS)
    tail = message[size.enters * _ENTER_FIELDS :].reshape(size.entries, 2)
    head[:, 0], tail[:, 0] = shape[1], math.prod(shape)
    return message, head, tail


def detail_message(
    slot: int, tokens: np.ndarray, sampling: SamplingParams, sizes: RowSizes
) -> np.ndarray:
    """int32 `[5 + 3 * named + args + text]`: what few rows have, this one among them."""
    row = SamplingRows.create([sampling], [0], 1, sizes.named, sizes.args)
    text = np.zeros(sizes.text, np.int32)
    text[: len(tokens)] = tokens
    floats = np.concatenate([row.presence, row.frequency, row.repetition, row.bias[0], row.args[0]])
    bits = floats.view(np.int32)
    head = np.concatenate([np.array([slot], np.int32), row.only, bits[:3]])
    return np.concatenate([head, row.named[0], row.until[0], bits[3:], text]).astype(np.int32)


def apply_detail(state: RowState, message: Int[Array, " M"]) -> RowState:
    """The rows with what such a message says of one."""
    sizes = [state.sampling.named.shape[1]] * 3 + [state.sampling.args.shape[1]]
    slot, ends = message[0], np.cumsum([_DETAIL_FIELDS, *sizes]).tolist()
    named, until, bias, args = (message[a:b] for a, b in pairwise(ends))

    def number(bits: Array) -> Array:
        return jax.lax.bitcast_convert_type(bits, jnp.float32)

    new = dict(only=message[1] != 0, named=named, until=until, bias=number(bias))
    names = ("presence", "frequency", "repetition")
    new |= dict(zip(names, number(message[2:_DETAIL_FIELDS]), strict=True), args=number(args))
    put = {
        name: getattr(state.sampling, name).at[slot].set(value, mode="drop")
        for name, value in new.items()
    }
    text = state.text.at[slot].set(message[ends[-1] :], mode="drop")
    return replace(state, sampling=replace(state.sampling, **put), text=text)


def mask_messages(
    masks: Sequence[tuple[int, np.ndarray]], slots: int, words: int
) -> Iterator[np.ndarray]:
    """int32 `[8, 1 + words]` each: slots, `slots` for nobody, and the masks of their rows."""
    for begin in range(0, len(masks), MASKS):
        message = np.zeros((MASKS, 1 + words), np.int32)
        message[:, 0] = slots
        for row, (slot, bits) in zip(message, masks[begin : begin + MASKS], strict=False):
            row[0], row[1:] = slot, bits
        yield message


def apply_masks(state: RowState, message: Int[Array, "8 W"]) -> RowState:
    """The rows with the masks of such a message."""
    bits = state.sampling.bits.at[message[:, 0]].set(message[:, 1:], mode="drop")
    return replace(state, sampling=replace(state.sampling, bits=bits))


def _packed(enter: Iterable[Enter]) -> np.ndarray:
    """int32 `[n, fields]`; floats and the seed by their bits."""
    enter = list(enter)
    rows = SamplingRows.create(
        [e.sampling for e in enter], [e.generated for e in enter], len(enter), 0
    )
    masked = np.array([e.masked for e in enter], bool)  # a mask shapes the logits, too
    columns = (
        np.array([e.slot for e in enter], np.int32),
        np.array([e.tokens[-1] for e in enter], np.int32),
        np.array([len(e.tokens) for e in enter], np.int32),
        rows.index,
        rows.top_k,
        rows.temperature.view(np.int32),
        rows.top_p.view(np.int32),
        rows.min_p.view(np.int32),
        rows.seed.view(np.int32),
        (rows.shaped | masked) + 2 * masked + 4 * rows.told,
    )
    return np.concatenate([np.stack(columns, axis=1), rows.stop_tokens], axis=1)


def apply_message(
    table: Int[Array, "G B P"],
    state: RowState,
    message: Int[Array, " M"],
    size: MessageSizes,
) -> tuple[Array, RowState]:
    """Enter rows, whose tables are empty then, and set entries of tables."""
    split = size.enters * _ENTER_FIELDS
    rows = message[:split].reshape(size.enters, _ENTER_FIELDS)
    places, pages = message[split:].reshape(size.entries, 2).T
    slot, newest, length, index, top_k, *rest = (rows[:, i] for i in range(10))

    def put(old: Array, new: Array) -> Array:
        return old.at[slot].set(new, mode="drop")

    numbers = [jax.lax.bitcast_convert_type(bits, jnp.float32) for bits in rest[:3]]
    fields = dict(zip(("temperature", "top_p", "min_p"), numbers, strict=True))
    fields |= dict(top_k=top_k, index=index, stop_tokens=rows[:, 10:])
    flags = (rest[4][:, None] >> jnp.arange(3, dtype=jnp.int32)) & 1 != 0
    fields |= dict(zip(("shaped", "masked", "told"), flags.T, strict=True))
    fields |= dict(seed=jax.lax.bitcast_convert_type(rest[3], jnp.uint32))
    old = state.sampling  # the rest of it, and the text, has a message of its own
    sampling = replace(old, **{name: put(getattr(old, name), x) for name, x in fields.items()})
    state = RowState(
        put(state.newest, newest),
        put(state.length, length),
        put(state.alive, jnp.ones(size.enters, bool)),
        sampling,
        state.text,
    )
    table = table.at[:, slot].set(0, mode="drop")
    flat = table.reshape(-1).at[places].set(pages, mode="drop")
    return flat.reshape(table.shape), state
