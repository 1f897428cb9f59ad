"""What goes between the scheduler and the runner: host arrays and numbers, nothing of a device.

A visit is up to two plans, carried out in this order, and within each in the order of its fields:

```
scheduler   Prefill ----------> prefill(plan)                 programs are launched, nothing is read
            Decode  ----------> decode(plan) -> Ticket        one program of k steps
            (the next visit: both again)
            book(ticket, result) <---- collect(ticket)        what came out, one visit late
```
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from ..allocator import PageCopies
from .params import Kind, SamplingParams
from .requests import Sample
from .scores import Scored, Scores

__all__ = ["Chunk", "Decode", "Enter", "Prefill", "Result", "Runner", "TableDelta", "Ticket"]


class Enter(NamedTuple):
    """A row begins: by admission, as a fork, or after a restore.

    Attributes:
      slot: where its state lies on the device until it leaves.
      tokens: int32 `[n]`, its tokens so far; the newest one is not in the cache.
      generated: how many of them are behind the prompt.
      sampling: how it is sampled, and the tokens at which it stops.
      masked: whether every step of it has a mask of its own.
    """

    slot: int
    tokens: np.ndarray
    generated: int
    sampling: SamplingParams
    masked: bool = False

    @property
    def kind(self) -> Kind:
        """What it takes to draw its tokens."""
        return Kind.SHAPED if self.masked else self.sampling.kind


class TableDelta(NamedTuple):
    """Entries of page tables that are others now, in one group of layers.

    Attributes:
      slots, columns, pages: int32 `[n]`; no entry is named twice.
    """

    slots: np.ndarray
    columns: np.ndarray
    pages: np.ndarray


class Chunk(NamedTuple):
    """Prefill of positions begin to begin + len(tokens) - 1 of one row; `targets` are the tokens
    behind each, where they are to be scored."""

    slot: int
    begin: int
    tokens: Sequence[int]
    targets: Sequence[int] = ()


class Prefill(NamedTuple):
    """Chunks to compute, in one program of up to `prefill_rows` rows.

    Attributes:
      copies: pages to copy before anything is written, of each group of layers.
      tables: one for each group.
      enter: rows that begin; their tables are in `tables` as a whole.
      width: tokens of a row of the program.
      chunks: its rows. Several may be of one prompt, in their order.
      samples: whose chunks these are: the scheduler's own.
      scored: whether the program says how likely the tokens behind were; it has one row, and
        `Result.scores` of the next decode program says it.
    """

    copies: tuple[PageCopies, ...]
    tables: tuple[TableDelta, ...]
    enter: tuple[Enter, ...]
    width: int
    chunks: tuple[Chunk, ...]
    samples: tuple[Sample, ...]
    scored: bool = False

    @property
    def shared(self) -> Prefill:
        """What is the same in every process."""
        return self._replace(samples=())


class Decode(NamedTuple):
    """Up to k steps of some rows.

    Attributes:
      number: of the visit, from 0.
      copies, tables, enter: as in `Prefill`.
      slots, budgets: int32 `[n]`, the rows and how many tokens each may get; more than 0.
      context: int64 `[n]`, tokens of each row at its first step, for cost models.
      samples: the sample of every row: the scheduler's own.
      scored: what the programs before it have scored, and from which position.
      version: of the weights, as `Engine.version` counts them.
      masks: of rows that have one, which then take one step: slot, and int32 words of bits.
    """

    number: int
    copies: tuple[PageCopies, ...]
    tables: tuple[TableDelta, ...]
    enter: tuple[Enter, ...]
    slots: np.ndarray
    budgets: np.ndarray
    context: np.ndarray
    samples: tuple[Sample, ...]
    masks: tuple[tuple[int, np.ndarray], ...] = ()
    scored: tuple[tuple[Scores, int], ...] = ()
    version: int = 0

    @property
    def shared(self) -> Decode:
        """What is the same in every process."""
        return self._replace(samples=(), scored=())

    def only(self, rows: list[int]) -> Decode:
        """That of some of its rows."""
        return self._replace(
            slots=self.slots[rows],
            budgets=self.budgets[rows],
            context=self.context[rows],
            samples=tuple(self.samples[row] for row in rows),
        )


class Ticket(NamedTuple):
    """A visit that was launched.

    Attributes:
      plan: what was launched; rows may have left their slots since.
      out: what comes out of it, as the runner knows it.
    """

    plan: Decode
    out: Any


class Result(NamedTuple):
    """What came out of a visit, for the rows of its plan in their order.

    Attributes:
      tokens: int32 `[K, n]`.
      counts: int `[n]`, how many of them are real.
      broken: int `[n]`, why no token could be chosen behind them: a `Broken`.
      top_ids, top_logits: `[K, n, top]`; None if the engine keeps none.
      drafted: int `[n]`, how many of the tokens were drafts; None: nobody knows.
      logprobs: float32 `[3, K, n]`: `Drawn.logprob`, `processed_logprob` and `total`; or None.
      scores: one for each of `Decode.scored`.
    """

    tokens: np.ndarray
    counts: np.ndarray
    broken: np.ndarray
    top_ids: np.ndarray | None = None
    top_logits: np.ndarray | None = None
    drafted: np.ndarray | None = None
    logprobs: np.ndarray | None = None
    scores: tuple[Scored, ...] = ()

    def only(self, rows: list[int]) -> Result:
        """That of some of its rows."""
        tops = (None if a is None else a[:, rows] for a in (self.top_ids, self.top_logits))
        drafted = None if self.drafted is None else self.drafted[rows]
        logprobs = None if self.logprobs is None else self.logprobs[:, :, rows]
        parts = self.tokens[:, rows], self.counts[rows], self.broken[rows]
        return Result(*parts, *tops, drafted=drafted, logprobs=logprobs, scores=self.scores)


@runtime_checkable
class Runner(Protocol):
    """Carries out plans: on a device, or in virtual time."""

    def prefill(self, plan: Prefill) -> Any:
        """Launch the programs; nothing is read. Returns what `wait` takes."""
        ...

    def decode(self, plan: Decode) -> Ticket:
        """Launch one program of up to k steps."""
        ...

    def launched(self, out: Any) -> None:
        """Return when it has been launched; what the launch raised is raised here."""
        ...

    def wait(self, out: Any) -> None:
        """Return when what was launched is over: what `prefill` returned, or `Ticket.out`."""
        ...

    def collect(self, ticket: Ticket) -> Result:
        """What came out of it; waits for it."""
        ...

    @property
    def is_lost(self) -> bool:
        """Whether a program failed and took the cache with it."""
        ...

    def restart(self, *, lost: bool) -> None:
        """Begin without rows; with an empty cache, if what it held is lost."""
        ...
