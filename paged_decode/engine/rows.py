"""What the device knows of every row between visits, and the messages by which it learns more."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from .records import Enter, TableDelta
from .sampling import MAX_STOP_TOKENS, SamplingRows

__all__ = [
    "MessageSizes",
    "RowState",
    "apply_message",
    "empty_message",
    "messages",
    "take_rows",
    "text_message",
]

_ENTER_FIELDS = 8 + MAX_STOP_TOKENS


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class RowState:
    """Rows by slot, `R * max_rows` of them.

    Attributes:
      newest: int32 `[B]`, the token that the next step writes and continues.
      length: int32 `[B]`, tokens with it.
      alive: bool `[B]`, whether it goes on: it had no stop token and no broken logits.
      sampling: parameters and place in the stream.
      text: int32 `[B, L]`, their tokens, for a drafter; L is 0 without one.
    """

    newest: Any
    length: Any
    alive: Any
    sampling: SamplingRows
    text: Any

    @classmethod
    def empty(cls, rows: int, places: int) -> RowState:
        """Host arrays of rows that nobody has entered, with so many places for the text of each."""
        newest, length, text = (np.zeros(s, np.int32) for s in (rows, rows, (rows, places)))
        return cls(newest, length, np.zeros(rows, bool), SamplingRows.create([], [], rows), text)


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


def text_message(slot: int, tokens: np.ndarray, places: int) -> np.ndarray:
    """int32 `[1 + places]`: what the row in a slot has for text."""
    message = np.zeros(1 + places, np.int32)
    message[0], message[1 : 1 + len(tokens)] = slot, tokens
    return message


def _packed(enter: Iterable[Enter]) -> np.ndarray:
    """int32 `[n, fields]`; floats and the seed by their bits."""
    enter = list(enter)
    rows = SamplingRows.create(
        [e.sampling for e in enter], [e.generated for e in enter], len(enter)
    )
    columns = (
        np.array([e.slot for e in enter], np.int32),
        np.array([e.tokens[-1] for e in enter], np.int32),
        np.array([len(e.tokens) for e in enter], np.int32),
        rows.index,
        rows.top_k,
        rows.temperature.view(np.int32),
        rows.top_p.view(np.int32),
        rows.seed.view(np.int32),
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
    slot, newest, length, index, top_k, *rest = (rows[:, i] for i in range(8))
    temperature, top_p = (jax.lax.bitcast_convert_type(bits, jnp.float32) for bits in rest[:2])
    seed = jax.lax.bitcast_convert_type(rest[2], jnp.uint32)
    sampling = SamplingRows(temperature, top_p, top_k, index, seed, rows[:, 8:])
    text = jnp.zeros((size.enters, state.text.shape[1]), jnp.int32)  # which its own message has
    entering = RowState(newest, length, jnp.ones(size.enters, bool), sampling, text)

    def put(old: Array, new: Array) -> Array:
        return old.at[slot].set(new, mode="drop")

    state = jax.tree.map(put, state, entering)
    table = table.at[:, slot].set(0, mode="drop")
    flat = table.reshape(-1).at[places].set(pages, mode="drop")
    return flat.reshape(table.shape), state
