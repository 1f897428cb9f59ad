"""The whole sampler against its definition in NumPy, one array operation after the other.

The reference works in float64 on float32 inputs. Float32 is where it must be: the changed logits
are rounded after every step, as what is likeliest hangs on it. What is left of rounding is an
interval around every number, and where such an interval holds a threshold, either side counts.
"""

from __future__ import annotations

import copy
import pickle  # noqa: TID251  (parameters cross process boundaries; nothing comes from outside)
from dataclasses import FrozenInstanceError, fields, replace
from decimal import Decimal
from fractions import Fraction
from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paged_decode import SamplingParams
from paged_decode.engine import sampling
from paged_decode.engine.params import Kind
from paged_decode.engine.sampling import IN_PROMPT, Broken, Drawn, SamplingRows

INF, TINY, HUGE = np.inf, 2.0**-126, float(np.finfo(np.float32).max)
WIDTH = 24  # named tokens of a row
ROWS, VOCABS = 2500, (48, 31)
EDGE = 1e-5  # a threshold as close as this may fall either way
ROUNDING = 4 * 2.0**-24  # of a few float32 operations in a row


class Batch(NamedTuple):
    """Logits `[B, V]`, what their rows ask for, and what these have generated `[B, V]`."""

    logits: np.ndarray
    params: list[SamplingParams]
    index: list[int]
    seen: np.ndarray

    def take(self, rows: np.ndarray) -> Batch:
        params, index = ([each[row] for row in rows] for each in (self.params, self.index))
        return Batch(self.logits[rows], params, index, self.seen[rows])


@partial(jax.jit, static_argnums=3)
def device(logits, rows, seen, most) -> Drawn:
    return sampling.draw(logits, rows, most, lambda: seen)


noise_of = jax.jit(jax.vmap(sampling._gumbel, (0, 0, None)), static_argnums=2)


def drawn(batch: Batch, most: Kind | None = None) -> Drawn:
    """What the device draws."""
    rows = SamplingRows.create(batch.params, batch.index, len(batch.params), WIDTH)
    return Drawn(*map(np.asarray, device(batch.logits, rows, batch.seen, most)))


# What is asked for.


def random_logits(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    size, _ = shape
    normal, kind = rng.standard_normal(shape), rng.random((size, 1))
    whole = rng.integers(-4, 5, shape).astype(float)
    decade = 10.0 ** rng.uniform(-37, 38, (size, 1))
    mixed = normal * 10.0 ** rng.uniform(-30, 38, shape)
    logits = np.select(
        [kind < 0.45, kind < 0.7, kind < 0.9, kind < 0.95, kind < 0.97],
        [normal * 3, whole, normal * decade, mixed, normal * 1e-40],
        np.zeros(shape) + rng.standard_normal((size, 1)),
    ).clip(-HUGE, HUGE)
    logits = logits.astype(np.float32)
    some, often = rng.random((size, 1)), rng.random((size, 1))
    logits[(rng.random(shape) < often) & (some < 0.3)] = -INF
    logits[(rng.random(shape) < 0.05) & (rng.random((size, 1)) < 0.06)] = INF
    logits[(rng.random(shape) < often) & (rng.random((size, 1)) < 0.04)] = np.nan
    logits[rng.random(size) < 0.02] = -INF
    return logits


def random_params(rng: np.random.Generator, scale: float, vocab: int) -> SamplingParams:
    def one_of(*values):
        return values[rng.integers(len(values))]

    def ids(most: int) -> tuple[int, ...]:
        return tuple(rng.integers(0, vocab + 4, rng.integers(0, most + 1)).tolist())

    heat = one_of(
        0.0,
        0.0,
        rng.uniform(0.1, 3),
        rng.uniform(0.1, 3),
        min(scale * rng.uniform(0.2, 3), HUGE),
        min(scale * rng.uniform(0.2, 3), HUGE),
        2.0 ** rng.uniform(-126, 128),
        one_of(TINY, HUGE, 1e-300, 5e-324, 1e308),
    )
    asked = dict(
        temperature=heat,
        seed=int(rng.integers(2**32)),
        top_k=one_of(0, 0, 1, vocab, 2**31 - 1, int(rng.integers(1, vocab))),
        top_p=one_of(1.0, 1.0, 1 - rng.random(), 1 - rng.random(), 10.0 ** -rng.uniform(0, 300)),
        min_p=one_of(0.0, 0.0, 0.0, rng.random(), rng.random(), 10.0 ** -rng.uniform(1, 10)),
    )
    if rng.random() < 0.05:
        asked["top_p"], asked["min_p"] = one_of(0.999, 1 - 2**-24), one_of(0.0, 1e-300, 1.0)
    if rng.random() < 0.4:
        return SamplingParams(**asked)
    if rng.random() < 0.6:
        part = one_of(0.0, 2.0, -2.0, int(rng.integers(-16, 17)) / 8, rng.uniform(-2, 2))
        asked["frequency_penalty"] = part
        asked["presence_penalty"] = one_of(0.0, 2.0, -2.0, rng.uniform(-2, 2))
        wild = 10.0 ** rng.uniform(-37, 38)
        asked["repetition_penalty"] = one_of(1.0, 1.2, 0.5, 2.0, rng.uniform(0.5, 2), wild, TINY)
    if rng.random() < 0.6:
        bias = tuple((t, one_of(rng.normal() * 9, 1.0, -INF, HUGE, -HUGE)) for t in ids(5))
        asked["logit_bias"] = one_of(bias, dict(bias))
    if rng.random() < 0.5:
        asked["bad_tokens"] = ids(5)
    if rng.random() < 0.5:
        asked["stop_tokens"] = ids(4)
        asked["min_new_tokens"] = int(rng.integers(0, 8))
    if rng.random() < 0.3:
        asked["allowed_tokens"] = ids(7)
    try:
        return SamplingParams(**asked)
    except ValueError as error:
        assert "leaves" in str(error)  # what contradicts itself is asked again without
        return SamplingParams(**asked | {"allowed_tokens": None})


@cache
def random_batch(seed: int, size: int, vocab: int) -> Batch:
    rng = np.random.default_rng(seed)
    logits = random_logits(rng, (size, vocab))
    usual = np.where(np.isfinite(logits), logits, 0)
    scale = np.abs(usual).max(axis=1) / 2 + 1e-37
    params = [random_params(rng, float(each), vocab) for each in scale]
    shape = logits.shape
    said = np.where(rng.random(shape) < 0.2, rng.integers(0, 5, shape), 0)
    said = np.where(rng.random(shape) < 0.002, rng.integers(0, 2**20, shape), said)
    prompt = rng.random(shape) < rng.random((size, 1)) * 0.5
    seen = (said + prompt * IN_PROMPT).astype(np.int32)
    return Batch(logits, params, rng.integers(0, 8, size).tolist(), seen)


# The definition.


def single(x: np.ndarray) -> np.ndarray:
    """Rounded to float32; what is beyond is infinite."""
    with np.errstate(over="ignore", invalid="ignore"):
        return x.astype(np.float32).astype(np.float64)


def column(params: list[SamplingParams], name: str) -> np.ndarray:
    """float64 `[B, 1]` of what is taken as float32."""
    return single(np.array([[float(getattr(p, name))] for p in params]).clip(-HUGE, HUGE))


def named(batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """What is added to each logit, and which tokens are forbidden, `[B, V]`."""
    vocab = batch.logits.shape[1]
    bias, forbidden = np.zeros(batch.logits.shape), np.zeros(batch.logits.shape, bool)
    for row, (p, index) in enumerate(zip(batch.params, batch.index, strict=True)):
        never = {*p.bad_tokens} | {token for token, number in p.logit_bias if number == -INF}
        if index < p.min_new_tokens:
            never |= {*p.stop_tokens}
        if p.allowed_tokens is not None:
            never |= {*range(vocab)} - {*p.allowed_tokens}
        forbidden[row, [token for token in never if token < vocab]] = True
        for token, number in p.logit_bias:
            if token < vocab and number != -INF:
                bias[row, token] = number
    return single(bias), forbidden


def changed(batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """The logits after named tokens and penalties: at least and at most, `[B, V]`.

    A device may flush what is too small for a normal number, and may fuse the product of the
    frequency penalty with what it is taken from.
    """
    said, prompt = batch.seen % IN_PROMPT, batch.seen >= IN_PROMPT
    factor = np.where((said > 0) | prompt, column(batch.params, "repetition_penalty"), 1.0)
    part = column(batch.params, "frequency_penalty") * said
    once = np.where(said > 0, column(batch.params, "presence_penalty"), 0.0)
    bias, forbidden = named(batch)

    def one_way(flushed: bool, fused: bool) -> np.ndarray:
        def kept(x: np.ndarray) -> np.ndarray:
            x = single(x)
            return np.where((np.abs(x) < TINY) & flushed, 0.0, x)

        out = kept(kept(batch.logits) + bias)
        out = np.where(forbidden, -INF, out)
        out = kept(np.where(out > 0, out / factor, out * factor))
        return kept(kept(out - (part if fused else kept(part))) - once)

    ways = np.stack(
        [one_way(flushed, fused) for flushed in (False, True) for fused in (False, True)]
    )
    return ways.min(axis=0), ways.max(axis=0)


class Reference(NamedTuple):
    """What each row may draw. `[B, V]`: which tokens, and the log-probability at least and at most.

    `open` `[B]`: rows whose kept set or token is a matter of rounding.
    """

    broken: np.ndarray
    tokens: np.ndarray
    least: np.ndarray
    most: np.ndarray
    open: np.ndarray


def reference(batch: Batch) -> Reference:
    """The definition, every token against every other of its row."""
    with np.errstate(invalid="ignore", over="ignore", divide="ignore", under="ignore"):
        return _reference(batch)


def hopeless(logits: np.ndarray) -> np.ndarray:
    return np.isnan(logits).any(axis=1) | np.isneginf(logits).all(axis=1)


def _reference(batch: Batch) -> Reference:
    params, vocab = batch.params, batch.logits.shape[1]
    low, high = changed(batch)
    broken = np.where(hopeless(high), Broken.FORBIDDEN, Broken.NO)
    broken = np.where(hopeless(batch.logits), Broken.MODEL, broken)

    # Token j `[:, :, j]` is likelier than token i `[:, i]`, or equal and lower: surely, or maybe.
    lower = np.tri(vocab, k=-1, dtype=bool)
    likelier = low[:, None, :] > high[:, :, None]
    sure = likelier | (low[:, None, :] == high[:, :, None]) & lower
    maybe_likelier = high[:, None, :] > low[:, :, None]
    maybe = maybe_likelier | (high[:, None, :] == low[:, :, None]) & lower

    greedy = np.array([[p.temperature == 0] for p in params])
    heat = np.where(greedy, 1.0, np.maximum(column(params, "temperature"), TINY))
    least = over(low, high.max(axis=1, keepdims=True)) / heat * (1 + ROUNDING)
    most = over(high, low.max(axis=1, keepdims=True))
    most = np.where(most > -TINY, 0.0, most) / heat * (1 - ROUNDING)  # flushed, or above the top

    k = np.array([[p.top_k or vocab] for p in params])
    inside = (high > -INF) & (likelier.sum(axis=2) < k)
    surely = (low > -INF) & (maybe_likelier.sum(axis=2) < k)
    share = np.log(column(params, "min_p"))
    edge = EDGE * np.maximum(1.0, np.where(share == -INF, 1.0, -share))
    inside &= most >= share - edge
    surely &= (least == 0) | (least > share + edge)
    # What is before each token in the order of top_p, and what of all is enough.
    part = column(params, "top_p")
    mass_least, mass_most = np.where(surely, np.exp(least), 0), np.where(inside, np.exp(most), 0)
    before_least = np.einsum("bij,bj->bi", sure, mass_least)
    before_most = np.einsum("bij,bj->bi", maybe, mass_most)
    inside &= (part >= 1) | (before_least <= part * mass_most.sum(1, keepdims=True) * (1 + EDGE))
    enough = part * mass_least.sum(1, keepdims=True) * (1 - EDGE)
    surely &= (part >= 1) | (before_most < enough) | ~maybe.any(axis=2)

    seeds, index = (np.array(x) for x in ([p.seed for p in params], batch.index))
    noise = noise_of(seeds.astype(np.uint32), index.astype(np.int32), vocab)
    noise = np.asarray(noise).astype(np.float64)
    score_least = least * (1 + ROUNDING) + noise - ROUNDING * np.abs(noise)
    score_most = most * (1 - ROUNDING) + noise + ROUNDING * np.abs(noise)
    best = np.where(surely, score_least, -INF).max(axis=1, keepdims=True)
    hot = inside & (score_most >= best)
    tokens = np.where(greedy, (high > -INF) & ~sure.any(axis=2), hot)
    open_ = (tokens.sum(axis=1) > 1) | ((inside != surely).any(axis=1) & ~greedy[:, 0])

    all_most, all_least = (
        np.log(np.where(those, np.exp(each), 0).sum(axis=1, keepdims=True))
        for those, each in ((inside, most), (surely, least))
    )
    least, most = least - all_most, np.minimum(most - all_least, 0.0)
    return Reference(broken, tokens, *(np.where(greedy, 0.0, x) for x in (least, most)), open_)


def over(x: np.ndarray, top: np.ndarray) -> np.ndarray:
    """x - top, and 0 where both are infinite."""
    return np.where(x == top, 0.0, x - top)


def log_softmax(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float64 `[B, V]`, and the logarithm of the sum `[B]`."""
    with np.errstate(invalid="ignore", divide="ignore", under="ignore"):
        logits = logits.astype(np.float64)
        top = logits.max(axis=1, keepdims=True)
        below = over(logits, top)
        mass = np.log(np.exp(below).sum(axis=1, keepdims=True))
        return below - mass, (top + mass)[:, 0]


def close(got: np.ndarray, least: np.ndarray, most: np.ndarray | None = None) -> np.ndarray:
    """Between these in float32, give or take 1e-5, or 1e-5 of a large number."""
    most = least if most is None else most
    with np.errstate(invalid="ignore"):
        low = single(least - 1e-5 * np.maximum(1.0, np.abs(least)))
        high = single(most + 1e-5 * np.maximum(1.0, np.abs(most)))
    low, high = np.where(np.isinf(least), least, low), np.where(np.isinf(most), most, high)
    return (low <= got) & (got <= high)


def differing(batch: Batch, got: Drawn) -> tuple[dict[str, list[int]], int]:
    """Rows in which something is not as defined, and how many of normal numbers are left open."""
    want, row = reference(batch), np.arange(len(batch.params))
    fine = want.broken == Broken.NO
    logprob, total = log_softmax(batch.logits)
    at = row, got.tokens
    wrong = {
        "id": (got.tokens < 0) | (got.tokens >= batch.logits.shape[1]),
        "broken": got.broken != want.broken,
        "token": fine & ~want.tokens[at],
        "logprob": fine & ~close(got.logprob, logprob[at]),
        "processed": fine & ~close(got.processed_logprob, want.least[at], want.most[at]),
        "total": fine & ~close(got.total, total),
    }
    found = {name: np.flatnonzero(bad).tolist() for name, bad in wrong.items() if bad.any()}
    normal = ((batch.logits == 0) | (np.abs(batch.logits) >= TINY)).all(axis=1)
    return found, int((want.open & fine & normal).sum())


@pytest.mark.slow
@pytest.mark.parametrize("vocab, seeds", [(VOCABS[0], (0, 1, 2)), (VOCABS[1], (3,))])
def test_every_row_is_as_defined(unchecked, vocab, seeds):
    """10,000 rows of all that can be asked for, together and in part."""
    kinds: set[tuple[int, int]] = set()
    for seed in seeds:
        batch = random_batch(seed, ROWS, vocab)
        got = drawn(batch)
        found, unsure = differing(batch, got)
        assert not found, {
            name: [(row, batch.params[row], batch.index[row]) for row in rows[:3]]
            for name, rows in found.items()
        }
        assert unsure < 0.02 * ROWS, unsure
        kinds |= {(p.kind, int(b)) for p, b in zip(batch.params, got.broken, strict=True)}
    unshaped = {Kind.GREEDY, Kind.WHOLE, Kind.NARROW}
    assert kinds == {(k, b) for k in Kind for b in Broken} - {
        (k, Broken.FORBIDDEN) for k in unshaped
    }


@pytest.fixture(scope="module")
def batch() -> Batch:
    return random_batch(0, ROWS, VOCABS[0])


def assert_same(got: Drawn, want: Drawn, exact: bool = True) -> None:
    """Tokens and reasons are equal; with the same program so are all bits of the rest."""
    fine = want.broken == Broken.NO  # of others there is nothing to know but the reason
    np.testing.assert_array_equal(got.broken, want.broken)
    np.testing.assert_array_equal(got.tokens[fine], want.tokens[fine])
    for one, other in zip(got[2:], want[2:], strict=True):
        if exact:
            np.testing.assert_array_equal(one[fine].view(np.int32), other[fine].view(np.int32))
        else:
            np.testing.assert_allclose(one[fine], other[fine], rtol=2e-6, atol=2e-6)


def test_a_row_that_names_nothing_draws_alone_what_it_draws_beside_all_others(batch):
    """Alone it needs no room for names."""
    whole = drawn(batch)
    for row in [row for row, p in enumerate(batch.params) if not p.named()][:100]:
        some = batch.take(np.array([row]))
        rows = SamplingRows.create(some.params, some.index, 1)
        assert rows.named.shape == rows.until.shape == rows.bias.shape == (1, 0)
        got = Drawn(*map(np.asarray, device(some.logits, rows, some.seen, None)))
        assert_same(got, Drawn(*(each[row : row + 1] for each in whole)), exact=False)


def test_rows_that_ask_for_nothing_get_the_same_bits_beside_those_that_ask_for_all(batch):
    shaped = np.array([p.is_shaped for p in batch.params])
    asked = [p if each else SamplingParams() for p, each in zip(batch.params, shaped, strict=True)]
    plain = [SamplingParams() if each else p for p, each in zip(batch.params, shaped, strict=True)]
    hot = [p if p.kind <= Kind.WHOLE else SamplingParams() for p in batch.params]
    whole, kinds = drawn(batch), np.array([p.kind for p in batch.params])
    for params, same in ((plain, ~shaped), (hot, kinds <= Kind.WHOLE), (asked, shaped)):
        got = drawn(batch._replace(params=params))
        assert_same(*(Drawn(*(each[same] for each in some)) for some in (got, whole)))


@pytest.mark.parametrize("most", Kind)
def test_the_program_of_a_kind_draws_what_the_program_of_all_kinds_draws(batch, most):
    rows = np.flatnonzero([p.kind <= most for p in batch.params])
    some = batch.take(np.resize(rows, ROWS))
    assert_same(drawn(some, most), drawn(some), exact=False)


def test_what_a_row_was_asked_before_does_not_matter_once_it_is_not_shaped(unchecked, batch):
    """The arrays of a slot keep what its last request named."""
    rows = SamplingRows.create(batch.params, batch.index, ROWS, WIDTH)
    still = np.arange(ROWS) % 2 == 0
    stale = replace(rows, shaped=rows.shaped & still)
    got = Drawn(*map(np.asarray, device(batch.logits, stale, batch.seen, None)))
    names = ("temperature", "top_k", "top_p", "min_p", "seed")
    bare = [
        p if each else SamplingParams(**{name: getattr(p, name) for name in names})
        for p, each in zip(batch.params, still, strict=True)
    ]
    assert_same(got, drawn(batch._replace(params=bare)))


GENERATED, PROMPT = {0: 1}, {0: IN_PROMPT}
# Of logits 3, 2, 1, 0, -1 and then -inf: what is asked, before which token, what was seen, and
# which token that gives.
CASES = (
    (dict(logit_bias={0: -INF}), 0, {}, 1),
    (dict(logit_bias=((0, 5.0), (0, -INF))), 0, {}, 1),  # of one id the last counts
    (dict(logit_bias=((0, -INF), (0, 0.0))), 0, {}, 0),
    (dict(logit_bias={5: 100.0}), 0, {}, 0),  # what the model excludes stays so
    (dict(logit_bias={2: 2.0}), 0, {}, 0),  # of equal ones the lowest
    (dict(logit_bias={2: 2.1, VOCABS[1]: 9.0, 2**31 - 1: 9.0}), 0, {}, 2),
    (dict(bad_tokens=(0, 0, 1)), 0, {}, 2),
    (dict(bad_tokens=(VOCABS[1], 40, 2**31 - 1)), 0, {}, 0),
    (dict(bad_tokens=(0,), logit_bias={0: 100.0}), 0, {}, 1),
    (dict(bad_tokens=tuple(range(6))), 0, {}, Broken.FORBIDDEN),
    (dict(allowed_tokens=(3, 3)), 0, {}, 3),
    (dict(allowed_tokens=(3,), bad_tokens=(0,), logit_bias={0: 100.0}), 0, {}, 3),
    (dict(allowed_tokens=(3, 4), logit_bias={4: 2.0}), 0, {}, 4),
    (dict(allowed_tokens=(5,)), 0, {}, Broken.FORBIDDEN),
    (dict(allowed_tokens=(VOCABS[1], 2**31 - 1)), 0, {}, Broken.FORBIDDEN),
    (dict(stop_tokens=(0, VOCABS[1]), min_new_tokens=1), 0, {}, 1),
    (dict(stop_tokens=(0, VOCABS[1]), min_new_tokens=1), 1, {}, 0),
    (dict(stop_tokens=tuple(range(9)), min_new_tokens=1), 0, {}, Broken.FORBIDDEN),
    (dict(stop_tokens=(0,), min_new_tokens=2, allowed_tokens=(0, 3)), 1, {}, 3),
    (dict(stop_tokens=(0,), min_new_tokens=2, allowed_tokens=(0, 3)), 2, {}, 0),
    (dict(stop_sequences=((0,),), min_new_tokens=2), 0, {}, 0),
    (dict(presence_penalty=2.0), 0, GENERATED, 1),
    (dict(presence_penalty=2.0), 0, PROMPT, 0),
    (dict(presence_penalty=0.9), 0, {0: 1000 + IN_PROMPT}, 0),
    (dict(frequency_penalty=0.5), 0, {0: 2}, 0),
    (dict(frequency_penalty=0.5), 0, {0: 3}, 1),
    (dict(frequency_penalty=0.5), 0, {0: IN_PROMPT + 3}, 1),
    (dict(frequency_penalty=-2.0), 0, {3: 2}, 3),
    (dict(frequency_penalty=-2.0), 0, {5: 2}, 0),
    (dict(repetition_penalty=2.0), 0, PROMPT, 1),
    (dict(repetition_penalty=0.5), 0, {1: 1}, 1),
    (dict(repetition_penalty=2.0, logit_bias={3: 4.0}), 0, {3: 1}, 0),  # bias is before it
    (dict(repetition_penalty=2.0, presence_penalty=-2.0), 0, GENERATED, 0),  # and these behind
    (dict(repetition_penalty=HUGE), 0, dict.fromkeys(range(4), 1), 0),
)


def test_what_contradicts_itself_or_is_beyond_the_vocabulary_has_one_meaning():
    vocab = VOCABS[1]
    asked = [SamplingParams(**asked) for asked, *_ in CASES]
    params = [asked[row % len(CASES)] for row in range(ROWS)]
    index, seen = [0] * ROWS, np.zeros((ROWS, vocab), np.int32)
    for row, (_, at, counts, _) in enumerate(CASES):
        index[row] = at
        seen[row, [*counts]] = [*counts.values()]
    logits = np.full((ROWS, vocab), -INF, np.float32)
    logits[:, :5] = 3, 2, 1, 0, -1
    got = drawn(Batch(logits, params, index, seen))
    for row, (*case, want) in enumerate(CASES):
        reason = want if isinstance(want, Broken) else Broken.NO
        assert got.broken[row] == reason, case
        assert reason or got.tokens[row] == want, (case, got.tokens[row])

    logits[:, 0] = INF
    heaviest = [SamplingParams(repetition_penalty=HUGE, presence_penalty=2.0)] * ROWS
    got = drawn(Batch(logits, heaviest, index, np.full_like(seen, IN_PROMPT + 1)))
    assert not got.broken.any() and not got.tokens.any()


# What is no parameter.


class Half:
    def __float__(self) -> float:
        return 0.5


@pytest.mark.parametrize(
    "value",
    [np.array(0.5), np.float16(0.5), jnp.bfloat16(0.5), jnp.float32(0.5), np.longdouble(0.5)]
    + [Decimal("0.5"), Fraction(1, 2), Half()],
    ids=lambda value: type(value).__name__,
)
def test_every_kind_of_number_is_kept_as_a_float(unchecked, value):
    params = SamplingParams(temperature=value, logit_bias={3: value}, min_p=value)
    assert params == SamplingParams(temperature=0.5, logit_bias=((3, 0.5),), min_p=0.5)
    assert type(params.temperature) is type(params.min_p) is type(params.logit_bias[0][1]) is float


@pytest.mark.parametrize(
    "value",
    [True, np.True_, np.array(True), "0.5", b"0.5", np.str_("0.5"), np.bytes_(b"1"), 1j, None]
    + [np.array("0.5"), np.complex64(1), np.datetime64(5, "s"), np.timedelta64(5, "s"), [0.5]]
    + [np.void(b"1234"), np.array(True, object), np.array([0.5]), float, np.float32],
    ids=repr,
)
def test_what_is_no_number_is_refused_by_name(unchecked, value):
    """NumPy's text was taken as the number that it spells."""
    for name in ("temperature", "top_p", "min_p", "presence_penalty", "repetition_penalty"):
        with pytest.raises(TypeError, match=f"{name} must be a number"):
            SamplingParams(**{name: value})
    with pytest.raises(TypeError, match="logit_bias must be a number"):
        SamplingParams(logit_bias={3: value})


@pytest.mark.parametrize(
    "name, value, error",
    [
        (name, bad, TypeError)
        for name in ("allowed_tokens", "bad_tokens")
        for bad in (5, "12", b"12", {1: 2}, [True], [1.0], ["1"], np.array([[1]]), np.array([2.0]))
    ]
    + [
        (name, bad, ValueError)
        for name in ("allowed_tokens", "bad_tokens")
        for bad in ([-1], [2**31])
    ]
    + [
        ("stop_sequences", bad, TypeError)
        for bad in (5, None, "ab", ["ab"], [b"ab"], {1: 2}, [1, 2], [[1.5]], [[True]], [[[1]]])
    ]
    + [("stop_sequences", bad, ValueError) for bad in ([()], [[1], []], [[-1]])]
    + [
        ("logit_bias", bad, TypeError)
        for bad in (
            5,
            None,
            "ab",
            ["ab"],
            [(1,)],
            [(1, 2, 3)],
            [1, 2],
            {True: 1.0},
            {1.0: 1.0},
            {"1": 1.0},
            {(1, 2): 3},
            {1: True},
            {1: "2"},
            np.array([[1.0, 2.5]]),
        )
    ]
    + [
        ("logit_bias", bad, ValueError)
        for bad in ({-1: 1.0}, {2**31: 1.0}, {1: np.nan}, {1: INF}, {1: 3.5e38}, {1: 10**400})
    ]
    + [("bad_tokens", None, TypeError), ("allowed_tokens", (), ValueError)]
    + [("ignore_eos", bad, TypeError) for bad in (1, None, np.True_, "no")]
    + [("logprobs", bad, TypeError) for bad in (True, 1.0, "1")]
    + [("logprobs", bad, ValueError) for bad in (-1, 2**31)]
    + [
        (name, bad, ValueError)
        for name in ("presence_penalty", "frequency_penalty")
        for bad in (-2.1, 2.0000001, np.nan, INF)
    ]
    + [("repetition_penalty", bad, ValueError) for bad in (0, -1, 1e-39, 1e39, np.nan, INF)]
    + [("min_p", bad, ValueError) for bad in (-0.1, 1.1, np.nan, INF)]
    + [("min_new_tokens", bad, ValueError) for bad in (-1, 65)]
    + [("min_new_tokens", True, TypeError)],
)
def test_what_is_asked_beyond_its_range_is_refused_by_name(unchecked, name, value, error):
    with pytest.raises(error, match=name):
        SamplingParams(**{name: value})


@pytest.mark.parametrize(
    "asked, match",
    [
        (dict(allowed_tokens=(1, 2), bad_tokens=(2, 1)), "leaves no token"),
        (dict(allowed_tokens=(1, 2), bad_tokens=(1,), logit_bias={2: -INF}), "leaves no token"),
        (dict(allowed_tokens=(1,), stop_tokens=(1,), min_new_tokens=1), "leaves only stop tokens"),
        (
            dict(allowed_tokens=(1, 2), bad_tokens=(2,), stop_tokens=(1,), min_new_tokens=1),
            "leaves only stop tokens",
        ),
    ],
)
def test_what_leaves_nothing_to_be_drawn_is_refused(asked, match):
    with pytest.raises(ValueError, match=match):
        SamplingParams(**asked)
    whole = SamplingParams(max_new_tokens=9)
    with pytest.raises(ValueError, match=match):
        replace(whole, **asked)


def test_ids_come_as_any_sequence_and_are_kept_once_and_in_order(unchecked):
    want = SamplingParams(
        logit_bias=((1, -2.0), (3, 1.0)),
        allowed_tokens=(1, 3),
        bad_tokens=(2, 4),
        stop_sequences=((2, 1), (2, 1)),
    )
    for kind in (list, iter, np.array, jnp.array, lambda ids: (each for each in ids)):
        got = SamplingParams(
            logit_bias=iter([(3, np.float32(1)), (np.int64(1), -2)]),
            allowed_tokens=kind([3, 1, 3]),
            bad_tokens=kind([4, 2, 4, 4]),
            stop_sequences=(kind([2, 1]) for _ in range(2)),
        )
        assert got == want and hash(got) == hash(want)
    assert SamplingParams(allowed_tokens={3, 1}, bad_tokens=range(2)).bad_tokens == (0, 1)
    for bias in ({3: 1, 1: -2.0}, [[3, 1.0], [1, -2]], np.array([[3, 1], [1, -2]])):
        assert SamplingParams(logit_bias=bias).logit_bias == want.logit_bias


def test_parameters_are_values():
    params = SamplingParams(
        temperature=0.5,
        logit_bias={7: 1.5, 3: -INF},
        allowed_tokens=(9, 7),
        bad_tokens=(4,),
        stop_sequences=((1, 2),),
        min_new_tokens=2,
        logprobs=3,
    )
    again = pickle.loads(pickle.dumps(params))  # noqa: S301
    others = [again, copy.copy(params), copy.deepcopy(params), replace(params)]
    others += [replace(replace(params, top_k=3), top_k=0)]
    others += [SamplingParams(**{each.name: getattr(params, each.name) for each in fields(params)})]
    assert {params, *others} == {params}
    assert SamplingParams(temperature=-0.0, min_p=-0.0) == SamplingParams()
    assert SamplingParams(temperature=-0.0, min_p=-0.0).kind == Kind.GREEDY
    with pytest.raises(FrozenInstanceError):
        params.top_k = 3  # type: ignore[misc]
    with pytest.raises(ValueError, match="min_new_tokens"):
        replace(params, max_new_tokens=1)
