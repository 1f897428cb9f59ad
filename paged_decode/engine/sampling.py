"""Choosing the next token on the device, from the logits and what its request asks for.

```
logits -- named tokens -- penalties -- / heat -- min_p, top_k, top_p -- noise of (seed, i) -> token
        |<-------- shaped -------->|          |<----- narrow ------>|
```
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from .params import HUGE, MAX_STOP_TOKENS, TINY, Kind, SamplingParams

__all__ = ["IN_PROMPT", "Broken", "Drawn", "SamplingRows", "draw", "log_probability", "sample"]

IN_PROMPT = 2**30  # added to how often a token was generated, where the prompt has it


class Broken(IntEnum):
    """Why a row has no token to choose."""

    NO = 0
    MODEL = 1  # a NaN, or nothing but -inf: its weights or its pages are broken
    FORBIDDEN = 2  # what the request allows has no chance in these logits


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class SamplingRows:
    """`SamplingParams` of B rows as arrays, plus where each row is in its stream.

    Attributes:
      temperature, top_p, min_p: float32 `[B]`; 0 or normal numbers.
      top_k, index: int32 `[B]`; `index` counts the tokens generated so far.
      seed: uint32 `[B]`.
      stop_tokens: int32 `[B, 8]`, padded with -1.
      shaped: bool `[B]`, whether what follows holds for the row.
      only: bool `[B]`, whether no token can be drawn that is not named.
      presence, frequency, repetition: float32 `[B]`, the penalties.
      named, until: int32 `[B, W]`: ids, and the token from which on each is not named; 0 pads.
      bias: float32 `[B, W]`, added to the logits of those.
      args: float32 `[B, A]`, for the user's own function.
      told: bool `[B]`, whether somebody asks for log-probabilities.
      masked: bool `[B]`, whether no token can be drawn whose bit is not set.
      bits: int32 `[B, M]`: those, token t at t % 32 of word t // 32; M is 0 without masks.
    """

    temperature: Any
    top_p: Any
    min_p: Any
    top_k: Any
    index: Any
    seed: Any
    stop_tokens: Any
    shaped: Any
    only: Any
    presence: Any
    frequency: Any
    repetition: Any
    named: Any
    until: Any
    bias: Any
    args: Any
    told: Any
    masked: Any
    bits: Any

    @classmethod
    def create(
        cls,
        params: Sequence[SamplingParams],
        indices: Sequence[int],
        rows: int,
        width: int | None = None,
        args: int = 0,
        words: int = 0,
    ) -> SamplingRows:
        """Pack parameters into arrays of `rows` rows, with room for `width` named tokens in each
        (None: as many as there are) and `args` numbers; more are left out. There is room for masks
        of so many words, but no mask. The rest pads as greedy."""
        named = [p.named() for p in params]
        width = max(map(len, named), default=0) if width is None else width
        floats, ints, flags = (
            [np.zeros(rows, dtype) for _ in range(count)]
            for dtype, count in ((np.float32, 6), (np.int32, 2), (bool, 2))
        )
        out = cls(
            *floats[:3],
            *ints,
            seed=np.zeros(rows, np.uint32),
            stop_tokens=np.full((rows, MAX_STOP_TOKENS), -1, np.int32),
            shaped=flags[0],
            only=flags[1],
            presence=floats[3],
            frequency=floats[4],
            repetition=floats[5],
            named=np.zeros((rows, width), np.int32),
            until=np.zeros((rows, width), np.int32),
            bias=np.zeros((rows, width), np.float32),
            args=np.zeros((rows, args), np.float32),
            told=np.zeros(rows, bool),
            masked=np.zeros(rows, bool),
            bits=np.zeros((rows, words), np.int32),
        )
        out.top_p[:], out.repetition[:] = 1, 1
        for row, (p, index) in enumerate(zip(params, indices, strict=True)):
            out.temperature[row] = p.temperature and min(max(p.temperature, TINY), HUGE)
            out.top_p[row], out.top_k[row] = max(p.top_p, TINY), p.top_k
            out.min_p[row] = p.min_p and max(p.min_p, TINY)
            out.seed[row], out.index[row] = p.seed, index
            stops = p.stop_tokens[:MAX_STOP_TOKENS]
            out.stop_tokens[row, : len(stops)] = stops
            out.told[row] = p.logprobs is not None
            out.shaped[row], out.only[row] = p.is_shaped, p.allowed_tokens is not None
            out.presence[row], out.frequency[row] = p.presence_penalty, p.frequency_penalty
            out.repetition[row] = p.repetition_penalty
            own = p.logits_args[:args]
            out.args[row, : len(own)] = own
            for place, (token, bias, until) in enumerate(named[row][:width]):
                out.named[row, place], out.until[row, place] = token, until
                out.bias[row, place] = bias
        return out


class Drawn(NamedTuple):
    """One token of each row `[B]`, and how likely it was.

    Attributes:
      tokens: int32; they mean nothing where `broken`.
      broken: int32, a `Broken`.
      logprob: float32, by the model's own distribution.
      processed_logprob: float32, by the one that it was drawn from; 0 for a greedy row.
      total: float32, the log of the sum of the exponentials of the model's logits.
    """

    tokens: Any
    broken: Any
    logprob: Any
    processed_logprob: Any
    total: Any


Counts = Callable[[], Int[Array, "B V"]]


def sample(logits: Float[Array, "B V"], rows: SamplingRows) -> Int[Array, " B"]:
    """Draw one token per row; a batch in which every row is greedy pays for an argmax only.

    A logit of -inf is never drawn, one of +inf always is. A row without a choice, which has a NaN
    or nothing but -inf, gets an id that means nothing; `draw` tells which ones these are.
    """
    return draw(logits, rows).tokens


def draw(
    logits: Float[Array, "B V"],
    rows: SamplingRows,
    most: Kind | None = None,
    counts: Counts | None = None,
    *,
    plain: bool = False,
    process: Callable[[Array], Array] | None = None,
    numbers: Array | None = None,
) -> Drawn:
    """`sample`, with what else is known of the tokens.

    Args:
      logits: of the next token.
      rows: how it is drawn.
      most: the greatest kind among the rows, where the caller knows it while it traces. Otherwise
        the device finds out, for which a GPU asks the host at every call.
      counts: gives int32 `[B, V]`, how often each row has generated a token so far, and `IN_PROMPT`
        more if its prompt has it; asked for where a row has penalties. None: not once.
      plain: whether the caller knows that no row is shaped: the device is not asked.
      process: changes the logits before all else; they are the model's own no more.
      numbers: whether somebody wants log-probabilities; the device is asked, and otherwise they are
        0. None: yes, and it is not asked.
    """
    own = logits.astype(jnp.float32)  # the model's
    base = own if process is None else process(own)
    failed, first, highest = _likeliest(own)
    unshaped = base, *((failed, first, highest) if process is None else _likeliest(base))
    hot = rows.temperature > 0
    narrow = hot & ((rows.top_k > 0) | (rows.top_p < 1) | (rows.min_p > 0))
    heat = jnp.where(hot, rows.temperature, jnp.float32(1))[:, None]
    none = jnp.zeros(len(own), jnp.float32)

    def of(kind: Kind) -> Drawn:
        logits, without, tokens, top = unshaped
        if kind == Kind.SHAPED:
            logits = _shaped(base, rows, counts)
            without, tokens, top = _likeliest(logits)

        def kept() -> Array:
            return jnp.where(~narrow[:, None] | _kept(logits, top, heat, rows), logits, -jnp.inf)

        cooled = None
        if kind != Kind.GREEDY:
            left = logits
            if kind == Kind.NARROW:
                left = kept()
            elif kind == Kind.SHAPED:  # where nothing may be sorted
                left = lax.cond(jnp.any(narrow), kept, lambda: logits)
            cooled = _cooled(left, top, heat)
            noise = jax.vmap(_gumbel, (0, 0, None))(rows.seed, rows.index, logits.shape[-1])
            drawn = jnp.argmax(cooled + noise, axis=-1).astype(jnp.int32)
            tokens = jnp.where(hot, drawn, tokens)

        def likely() -> tuple[Array, ...]:
            logprob, total = _log_probability(own, highest, tokens)
            if cooled is None:
                return logprob, none, total
            processed, _ = _log_probability(cooled, jnp.zeros_like(top), tokens)
            return logprob, jnp.where(hot, processed, jnp.float32(0)), total

        if numbers is None:
            wanted = likely()
        else:
            wanted = lax.cond(numbers, likely, lambda: (none, none, none))
        broken = jnp.where(without, jnp.int32(Broken.FORBIDDEN), jnp.int32(Broken.NO))
        return Drawn(tokens, jnp.where(failed, jnp.int32(Broken.MODEL), broken), *wanted)

    if most is not None:
        return of(most)
    found = jnp.int32(Kind.GREEDY)
    for kind, rows_of in ((Kind.WHOLE, hot), (Kind.NARROW, narrow), (Kind.SHAPED, rows.shaped)):
        found = jnp.where(jnp.any(rows_of), jnp.int32(kind), found)
    kinds = [kind for kind in Kind if kind != Kind.SHAPED or not plain]
    return lax.switch(found, [partial(of, kind) for kind in kinds])


def _likeliest(logits: Array) -> tuple[Array, Array, Array]:
    """Which rows have no token to choose, and the likeliest token and its logit `[B, 1]`."""
    first = jnp.argmax(logits, axis=-1).astype(jnp.int32)  # the place of a NaN, if there is one
    top = jnp.take_along_axis(logits, first[:, None], axis=-1)
    return (jnp.isnan(top) | (top == -jnp.inf))[:, 0], first, top


def log_probability(logits: Array, tokens: Array) -> tuple[Array, Array]:
    """Of these tokens `[B]` by float32 logits `[B, V]`, and what was taken from their logits; NaN
    where the logits have one."""
    return _log_probability(logits, _likeliest(logits)[2], tokens)  # XLA's max may lose a NaN


def _log_probability(logits: Array, highest: Array, tokens: Array) -> tuple[Array, Array]:
    """Of these tokens, and what was taken from their logits; none is above `highest` `[B, 1]`."""

    def below(logits: Array) -> Array:
        return jnp.where(logits == highest, 0, logits - highest)  # at infinity, too

    mine = below(jnp.take_along_axis(logits, tokens[:, None], axis=-1))
    mass = jnp.log(_summed(jnp.exp(below(logits))))
    return (mine - mass)[:, 0], (highest + mass)[:, 0]


def _summed(shares: Array) -> Array:
    """The sum `[B, 1]` of numbers `[B, V]` from 0 to 1, to 2**-36 of each.

    Integers are added, digit by digit: a sum of floats rounds by its order, which XLA chooses by
    the program around it, and a token that is scored has the bits of one that was drawn.
    """
    bits = 30 - shares.shape[-1].bit_length()  # the sum of a digit stays within int32
    total, unit = jnp.float32(0), 1.0
    for _ in range(-(-36 // bits)):
        shares, unit = shares * 2.0**bits, unit / 2.0**bits
        digit = jnp.floor(shares)
        shares -= digit
        digits = jnp.sum(digit.astype(jnp.int32), axis=-1, keepdims=True)
        total += digits.astype(jnp.float32) * jnp.float32(unit)
    return total


def _shaped(logits: Array, rows: SamplingRows, counts: Counts | None) -> Array:
    """The logits with what rows name, and with their penalties."""
    (size, vocab), own = logits.shape, logits
    row = jnp.arange(size, dtype=jnp.int32)[:, None]
    named = jnp.where(rows.index[:, None] < rows.until, rows.named, vocab)
    forbidden = jnp.where(rows.bias == -jnp.inf, named, vocab)
    allowed = jnp.zeros(logits.shape, bool).at[row, named].set(True, mode="drop")
    allowed |= ~rows.only[:, None]
    if rows.bits.shape[1]:
        allowed &= _unpacked(rows.bits, vocab) | ~rows.masked[:, None]
    logits = jnp.where(allowed, logits, -jnp.inf)
    logits = logits.at[row, named].add(jnp.where(rows.bias == -jnp.inf, 0, rows.bias), mode="drop")
    logits = logits.at[row, forbidden].set(-jnp.inf, mode="drop")
    penalized = (rows.presence != 0) | (rows.frequency != 0) | (rows.repetition != 1)

    def punished() -> Array:
        seen = jnp.zeros(logits.shape, jnp.int32) if counts is None else counts()
        said = seen & (IN_PROMPT - 1)
        factor = jnp.where(seen > 0, rows.repetition[:, None], jnp.float32(1))
        part = jnp.where(factor >= 1, jnp.float32(0.25), jnp.float32(1))  # as in `_cooled`
        out = jnp.where(logits > 0, (logits * part) / (factor * part), logits * factor)
        out -= rows.frequency[:, None] * said.astype(jnp.float32)
        return out - jnp.where(said > 0, rows.presence[:, None], 0)

    logits = lax.cond(jnp.any(penalized & rows.shaped), punished, lambda: logits)
    return jnp.where(rows.shaped[:, None], logits, own)


def _unpacked(bits: Any, vocab: int) -> Array:
    """Bool `[B, V]`: whether the bit of each token is set in int32 words `[B, M]`; of those behind
    the words none is."""
    token = jnp.arange(vocab, dtype=jnp.int32)
    word = jnp.take(bits, token // 32, axis=1, mode="fill", fill_value=0)
    return (word >> (token % 32)) & 1 != 0


def _gumbel(seed: Array, index: Array, width: int) -> Array:
    # The key is the same for all and the seed is data: one program draws for every request.
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), seed), index)
    return jax.random.gumbel(key, (width,), jnp.float32)


def _cooled(logits: Array, top: Array, heat: Array) -> Array:
    """(logits - top) / heat for any float32: 0 at the top, never NaN or above 0.

    Above a heat of 1 a quarter of everything is taken: differences do not overflow, nor is a
    divisor above 2**126, where a GPU's division may give NaN.
    """
    part = jnp.where(heat >= 1, jnp.float32(0.25), jnp.float32(1))
    return jnp.where(logits == top, 0, (logits * part - top * part) / (heat * part))


def _kept(logits: Array, top: Array, heat: Array, rows: SamplingRows) -> Array:
    """Bool `[B, V]`: what min-p and top-k, and then top-p leave.

    Ranks are those of the logits, because heat can make different ones equal.
    """
    width = logits.shape[-1]
    ordered = -jnp.sort(-logits, axis=-1)
    last = jnp.where(rows.top_k > 0, jnp.minimum(rows.top_k, width), width) - 1
    cooled = _cooled(ordered, top, heat)
    within = ordered >= jnp.take_along_axis(ordered, last[:, None], axis=-1)
    within &= (cooled >= jnp.log(rows.min_p)[:, None]) | (rows.min_p == 0)[:, None]
    weight = jnp.where(within, jnp.exp(cooled), 0)
    reached = jnp.cumsum(weight, axis=-1)
    before = jnp.pad(reached[:, :-1], ((0, 0), (1, 0)))  # weight of everything likelier
    goal = rows.top_p[:, None] * reached[:, -1:]
    short = within & ((before < goal) | (rows.top_p[:, None] >= 1))
    count = jnp.sum(short, axis=-1, keepdims=True, dtype=jnp.int32)
    floor = jnp.take_along_axis(ordered, jnp.maximum(count - 1, 0), axis=-1)
    above = jnp.sum(ordered > floor, axis=-1, keepdims=True, dtype=jnp.int32)
    tie = logits == floor
    place = jnp.cumsum(tie, axis=-1, dtype=jnp.int32)  # of equal ones the lower ids stay
    return (logits > floor) | (tie & (place <= count - above))
