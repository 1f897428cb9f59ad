"""Masks of the host and logits that the user changes: whatever runs beside them."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from paged_decode import PromptLookup, SamplingParams
from paged_decode.engine.masks import Constraint
from paged_decode.replicas import ReplicaCheck

from ..tiny import VOCAB, dense_logits, every_token, make_engine, model, preempt, prompts, texts

P = prompts(5, seed=8, low=3, high=12)
WORDS = -(-VOCAB // 32)


class Residues:
    """Token i of a text must be i (mod `by`), and so tokens count up in their residues."""

    def __init__(self, by: int = 5):
        self.by, self.text, self.fills = by, [], 0

    def fill(self, bits: np.ndarray) -> None:
        assert bits.dtype == np.int32 and bits.shape == (WORDS,) and not bits.any()
        self.fills += 1
        for token in range(len(self.text) % self.by, VOCAB, self.by):
            bits.view(np.uint32)[token // 32] |= np.uint32(1 << token % 32)

    def accept(self, token: int) -> None:
        assert type(token) is int and token % self.by == len(self.text) % self.by
        self.text.append(token)


def params(**asked) -> SamplingParams:
    return SamplingParams(**dict(max_new_tokens=9) | asked)


def expected(prompt: list[int], by: int | None = 5, count: int = 9, shift=0.0) -> tuple[int, ...]:
    text = list(prompt)
    for place in range(count):
        logits = dense_logits(text) + shift
        if by is not None:
            logits[[t for t in range(VOCAB) if t % by != place % by]] = -np.inf
        text.append(int(np.argmax(logits)))
    return tuple(text[len(prompt) :])


def masked_engine(**config):
    policies = dict(check=ReplicaCheck()) | config.pop("policies", {})
    config["policies"] = policies
    return make_engine(**dict(token_masks=True, vocab_size=VOCAB, num_pages=128) | config)


MASKED = [expected(p) for p in P]
PLAIN = [expected(p, None) for p in P]


def test_a_masked_row_takes_a_step_a_visit_while_the_others_take_several():
    engine = masked_engine(decode_steps=3)
    ids = [engine.submit(P[i], params(), mask=Residues if i % 2 else None) for i in range(4)]
    seen: list[dict[int, int]] = []
    events = []
    while not engine.idle:
        new = list(engine.step())
        events += new
        seen.append({i: sum(e.request_id == i for e in new) for i in ids})
    got = texts(events)
    assert [got[i, 0] for i in ids] == [MASKED[i] if i % 2 else PLAIN[i] for i in range(4)]
    assert max(visit[ids[1]] for visit in seen) == 1  # and in every visit from the first one on:
    first = next(at for at, visit in enumerate(seen) if visit[ids[1]])
    assert [visit[ids[1]] for visit in seen[first : first + 9]] == [1] * 9
    assert max(visit[ids[0]] for visit in seen) == 3
    assert engine.allocator.num_used == 0


@pytest.mark.parametrize("pages", [pytest.param(128, marks=pytest.mark.long), 12])
def test_masks_hold_through_preemption_samples_and_forks(pages):
    engine = masked_engine(num_pages=pages, decode_steps=2)
    ids = [engine.submit(P[i], params(), mask=Residues, n=1 + i % 2) for i in range(3)]
    events, child, visits = [], None, 0
    while not engine.idle:
        events += engine.step()
        visits += 1
        if visits % 3 == 0:
            preempt(engine)
        counts = sum(e.request_id == ids[0] for e in events)
        if child is None and pages == 128 and 0 < counts < 9:
            child = engine.fork(ids[0], params()), counts
    got = texts(events)
    assert [got[i, 0] for i in ids] == MASKED[:3] and got[ids[1], 1] == MASKED[1]
    if child is not None:
        assert got[child[0], 0] == MASKED[0][child[1] :]
    assert engine.stats.preemptions and engine.allocator.num_used == 0


def test_masks_hold_where_drafts_are_checked():
    engine = masked_engine(fn=every_token, policies=dict(drafter=PromptLookup(3)))
    ids = [engine.submit(P[i], params(), mask=Residues if i else None) for i in range(3)]
    got = texts(list(engine.stream()))
    assert [got[i, 0] for i in ids] == [PLAIN[0], *MASKED[1:3]]


class Failing(Residues):
    def accept(self, token: int) -> None:
        if len(self.text) == 4:
            raise LookupError("no such word")
        super().accept(token)


class Refusing(Residues):
    def accept(self, token: int) -> bool:
        return len(self.text) < 4 and super().accept(token) is None


class Zero(Residues):
    def accept(self, token: int) -> int:
        return int(len(self.text) < 4 and super().accept(token) is None)


class Forbidding(Residues):
    def fill(self, bits: np.ndarray) -> None:
        if len(self.text) < 5:
            super().fill(bits)


@pytest.mark.parametrize(
    "mask, reason, detail",
    [
        (Failing, "mask_failed", "LookupError: no such word"),
        (Refusing, "mask_failed", "ValueError: the mask does not accept token"),
        (Zero, "mask_failed", "ValueError: the mask does not accept token"),
        (Forbidding, "no_allowed_token", ""),
    ],
)
def test_a_mask_that_fails_ends_its_own_request_and_no_other(mask, reason, detail):
    engine = masked_engine()
    bad = engine.submit(P[0], params(), mask=mask)
    good = [engine.submit(P[i], params(), mask=Residues if i == 2 else None) for i in (1, 2)]
    events = list(engine.stream())
    last = [e for e in events if e.request_id == bad][-1]
    assert (last.token, last.finish_reason, last.index) == (None, reason, 5)
    assert last.detail.startswith(detail) and bool(last.detail) == bool(detail)
    got = texts(events)
    assert got[bad, 0] == MASKED[0][:5]
    assert [got[i, 0] for i in good] == [PLAIN[1], MASKED[2]]
    assert engine.allocator.num_used == 0


def test_a_mask_that_was_cut_off_is_made_again_and_reads_the_whole_text():
    made = []

    def make():
        made.append(Residues())
        if len(made) == 1:  # an interrupt comes in the middle of a call
            made[0].accept = lambda token: (_ for _ in ()).throw(KeyboardInterrupt)
        return made[-1]

    constraint = Constraint(make)
    constraint.bits([], WORDS)
    with pytest.raises(KeyboardInterrupt):
        constraint.bits([0], WORDS)
    constraint.bits([0, 1], WORDS)
    constraint.bits([0, 1, 2], WORDS)
    assert len(made) == 2 and made[1].text == [0, 1, 2]
    constraint.bits([5, 1], WORDS)  # another text
    assert len(made) == 3 and made[2].text == [5, 1]


def test_the_bits_mean_the_same_for_every_id_and_a_larger_vocabulary_is_forbidden():
    from paged_decode.engine.sampling import SamplingRows, draw

    rng = np.random.default_rng(0)
    wide, vocab = 3, 90  # the model has more than the mask's 64
    for _ in range(20):
        allowed = rng.random((wide, 64)) < 0.2
        bits = np.packbits(allowed, axis=1, bitorder="little").view(np.int32)
        rows = SamplingRows.create([params()] * wide, [0] * wide, wide, 0, 0, 2)
        rows.shaped[:] = rows.masked[:] = True
        rows.masked[1] = False
        rows.bits[:] = bits
        logits = rng.standard_normal((wide, vocab)).astype(np.float32)
        logits[:, 64:] += 10
        want = np.where(np.pad(allowed, ((0, 0), (0, 26))), logits, -np.inf)
        want[1] = logits[1]
        assert (
            np.asarray(draw(jnp.asarray(logits), rows).tokens).tolist() == want.argmax(1).tolist()
        )


@pytest.mark.parametrize(
    "mask, config, error, message",
    [
        (Residues(), {}, TypeError, "must be a function that makes a TokenMask, got Residues"),
        (lambda: 5, {}, TypeError, "must make an object with fill.*got int"),
        (Residues, dict(token_masks=False), ValueError, "EngineConfig.token_masks=True"),
    ],
)
def test_what_is_no_mask_is_refused_at_submit(unchecked, mask, config, error, message):
    engine = masked_engine(**config)
    with pytest.raises(error, match=message):
        engine.submit(P[0], params(), mask=mask)
    assert engine.idle


def test_masks_need_the_size_of_the_vocabulary():
    with pytest.raises(ValueError, match="token_masks needs vocab_size"):
        make_engine(token_masks=True)


# ---- logits that the user changes


def toward(logits, rows):
    """Adds the first argument to the tokens of the residue in the second, and half as much to the
    newest token of the text."""
    force, residue = rows.args[:, :1], rows.args[:, 1:]
    token = jnp.arange(logits.shape[1])
    newest = jnp.take_along_axis(rows.tokens, jnp.maximum(rows.length - 1, 0)[:, None], axis=1)
    out = logits + jnp.where(token % 7 == residue.astype(jnp.int32), force, 0)
    return out + jnp.where(token == newest, force / 2, 0)


def toward_one(prompt: list[int], force: float, residue: int, count: int = 9) -> tuple[int, ...]:
    text = list(prompt)
    for _ in range(count):
        logits = dense_logits(text)
        logits[residue::7] += force
        logits[text[-1]] += force / 2
        text.append(int(np.argmax(logits)))
    return tuple(text[len(prompt) :])


@pytest.mark.parametrize("drafts", [pytest.param(False, marks=pytest.mark.long), True])
def test_process_logits_sees_each_row_with_its_text_and_its_arguments(drafts):
    policies = dict(process_logits=toward) | (dict(drafter=PromptLookup(3)) if drafts else {})
    fn = every_token if drafts else model
    engine = make_engine(fn=fn, policies=policies, logits_args=2, num_pages=128, decode_steps=3)
    meant = [(0.0, 0.0), (4.0, 3.0), (2.0, 0.0), (-3.0, 5.0)]
    asked = [(), *meant[1:]]
    ids = [engine.submit(P[i], params(logits_args=a, logprobs=0)) for i, a in enumerate(asked)]
    events, visits = [], 0
    while not engine.idle:
        events += engine.step()
        visits += 1
        if visits % 2 == 0:
            preempt(engine)
    want = [toward_one(P[i], force, int(place)) for i, (force, place) in enumerate(meant)]
    got = texts(events)
    assert [got[i, 0] for i in ids] == want
    event = next(e for e in events if e.request_id == ids[1] and e.index == 0)
    logits = dense_logits(P[1])  # `logprob` is the model's own
    assert event.logprob == pytest.approx(
        logits[event.token] - np.log(np.exp(logits).sum()), abs=1e-4
    )


def test_what_a_request_asks_for_comes_behind_process_logits():
    def only_odd(logits, rows):
        return jnp.where(jnp.arange(logits.shape[1]) % 2 == 1, logits, -jnp.inf)

    engine = make_engine(policies=dict(process_logits=only_odd), num_pages=128)
    cases = [
        params(),
        params(bad_tokens=tuple(range(1, VOCAB, 4))),
        params(allowed_tokens=(2, 4, 6)),
        params(temperature=1.0, seed=3),
    ]
    done = engine.generate([P[0]] * 4, cases)
    assert all(token % 2 for each in done for token in each.tokens)
    assert [len(each.tokens) for each in done] == [9, 9, 0, 9]
    assert done[2].finish_reason == "no_allowed_token"
    assert {t % 4 for t in done[1].tokens} == {3}


class Unhashable:
    __hash__ = None

    def __call__(self, logits, rows):
        return logits


@pytest.mark.parametrize(
    "process, error, message",
    [
        (lambda logits, rows: logits[:, :-1], TypeError, "must return floating-point logits"),
        (lambda logits, rows: None, TypeError, "got NoneType"),
        (lambda logits, rows: logits.astype(int), TypeError, "got int32"),
        (5, TypeError, "process_logits must be a function"),
        (Unhashable(), TypeError, "hashable"),
    ],
)
def test_a_slip_in_process_logits_is_named(unchecked, process, error, message):
    with pytest.raises(error, match=message):
        make_engine(policies=dict(process_logits=process)).generate([P[0]])


@pytest.mark.parametrize(
    "value, error", [(5, TypeError), ("12", TypeError), (("a",), TypeError), ((1e39,), ValueError)]
    + [((float("nan"),), ValueError), ((float("inf"),), ValueError)],
)  # fmt: skip
def test_arguments_that_are_no_numbers_are_refused(unchecked, value, error):
    with pytest.raises(error, match="logits_args"):
        SamplingParams(logits_args=value)


def test_more_arguments_than_the_engine_has_room_for_are_refused_at_submit():
    engine = make_engine(logits_args=1)
    with pytest.raises(ValueError, match="logits_args has 2 numbers.*logits_args is 1"):
        engine.submit(P[0], params(logits_args=(1.0, 2.0)))


def test_after_warmup_masks_and_arguments_compile_nothing():
    engine = masked_engine(logits_args=2, policies=dict(process_logits=toward))
    engine.warmup()
    before = engine.stats.programs
    for i in range(4):
        engine.submit(
            P[i], params(logits_args=(1.0, float(i))), mask=Residues if i % 2 else None, n=2
        )
    list(engine.stream())
    assert engine.stats.programs == before
