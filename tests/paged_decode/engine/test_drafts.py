"""An engine with a drafter: the same tokens in fewer steps."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from paged_decode import Engine, PromptLookup, SamplingParams
from paged_decode.replicas import ReplicaCheck
from paged_decode.tiers import HostTier

from ..tiny import VOCAB, every_token, make_engine, model, preempt, prompts
from .test_engine import assert_empty
from .test_engine_groups import layout

PLACES, DRAFTS = 80, 3
P = [[7], *prompts(4, seed=3, low=2, high=30)]
P.append(P[3][:12] + [5, 6])  # shares full pages with another one
REQUESTS = [
    (P[0], SamplingParams(max_new_tokens=30), 1),
    (P[1], SamplingParams(max_new_tokens=17, temperature=0.7, seed=3), 2),
    (P[2], SamplingParams(max_new_tokens=1), 1),
    (P[3], SamplingParams(max_new_tokens=26), 1),
    (P[4], SamplingParams(max_new_tokens=21, temperature=1.0, top_k=5, top_p=0.9, seed=1), 1),
    (P[5], SamplingParams(max_new_tokens=24), 1),
]


@dataclass(frozen=True, eq=False)
class Known:
    """Drafts of 0 to k tokens from answers that are known; every sixth token of them is wrong."""

    texts: Any

    def __call__(self, text, length):
        known = jnp.asarray(self.texts)
        places = jnp.arange(PLACES)
        same = (known[None] == text[:, None]) | (places >= length[:, None, None])
        mine = known[jnp.argmax(jnp.all(same, axis=-1), axis=1)]
        ahead = length[:, None] + jnp.arange(DRAFTS)
        drafts = jnp.take_along_axis(mine, jnp.minimum(ahead, PLACES - 1), axis=1)
        drafts = jnp.where(ahead % 6 == 0, (drafts + 1) % VOCAB, drafts)
        return jnp.where(jnp.arange(DRAFTS) < length[:, None] % (DRAFTS + 1), drafts, -1)


def engine_of(drafter=None, **options) -> Engine:
    fn = model if drafter is None else every_token
    options.setdefault("policies", {})["drafter"] = drafter
    return make_engine(fn=fn, max_sequence_tokens=PLACES, **options)


def answers(engine: Engine, requests=REQUESTS, forced: int = 0):
    """Tokens, reasons and events of every sample; `forced` preempts every so many visits."""
    events: dict = {}
    ids, visit = [engine.submit(prompt, sampling, n=n) for prompt, sampling, n in requests], 0
    while not engine.idle:
        visit += 1
        for event in engine.step():
            key = ids.index(event.request_id), event.sample
            events.setdefault(key, []).append(event)
        if forced and visit % forced == 0:
            preempt(engine)
        engine.allocator.check_invariants()
    assert_empty(engine)
    tokens = {key: [e.token for e in found] for key, found in events.items()}
    return tokens, {key: found[-1].finish_reason for key, found in events.items()}, events


def known_from(tokens: dict) -> Known:
    """A drafter that knows what was said to `REQUESTS`."""
    texts = np.full((len(tokens), PLACES), VOCAB, np.int32)
    for row, ((request, _), said) in zip(texts, tokens.items(), strict=True):
        text = [*REQUESTS[request][0], *said]
        row[: len(text)] = text
    return Known(texts)


@pytest.fixture(scope="module")
def plain_engine():
    return engine_of(top_logits=2)


@pytest.fixture(scope="module")
def plain(plain_engine):
    return answers(plain_engine)


@pytest.fixture(scope="module")
def drafted(plain):
    """An engine with a drafter: what is not for one test alone, for every program takes seconds."""
    drafter = known_from(plain[0])
    engine = engine_of(drafter, top_logits=2, policies=dict(check=ReplicaCheck()))
    engine.warmup()
    programs = engine.stats.programs
    yield engine
    assert engine.stats.programs == programs  # nothing was compiled after the warm-up


def test_greedy_and_drawn_requests_get_the_same_tokens_reasons_and_logits(plain, drafted):
    """Forks, a shared prefix, a prompt of one token."""
    before = drafted.stats.decode_tokens, drafted.stats.draft_tokens
    tokens, reasons, events = answers(drafted)
    assert (tokens, reasons) == plain[:2]
    assert drafted.stats.prefix_hit_tokens
    generated = sum(map(len, tokens.values()))
    assert drafted.stats.decode_tokens - before[0] == generated
    assert generated / 4 < drafted.stats.draft_tokens - before[1] < generated
    for key, found in events.items():
        for event, want in zip(found, plain[2][key], strict=True):
            assert [i for i, _ in event.top_logits] == [i for i, _ in want.top_logits]
            got, logits = ([x for _, x in e.top_logits] for e in (event, want))
            np.testing.assert_allclose(got, logits, atol=1e-4)


def test_a_stop_token_inside_the_drafts_ends_a_sample_there(plain, drafted):
    requests, ends = [], {}
    for number, (prompt, sampling, n) in enumerate(REQUESTS):
        said = plain[0][number, 0]
        stop = said[len(said) // 2]
        requests.append((prompt, replace(sampling, stop_tokens=(stop,)), n))
        for sample in range(n):
            said = plain[0][number, sample]
            ends[number, sample] = said[: said.index(stop) + 1] if stop in said else said
    tokens, reasons, _ = answers(drafted, requests)
    assert tokens == ends and "stop" in reasons.values()


def test_samples_that_lose_their_pages_get_the_same_tokens(plain, drafted):
    before = drafted.stats.preemptions
    assert answers(drafted, forced=2)[:2] == plain[:2]
    assert drafted.stats.preemptions > before + 3


@pytest.mark.long
@pytest.mark.parametrize("tier", [None, HostTier(64)])
def test_a_pool_that_is_too_small_for_all_changes_no_token(plain, tier):
    engine = engine_of(known_from(plain[0]), num_pages=24, policies=dict(tier=tier))
    assert answers(engine, forced=3)[:2] == plain[:2]
    assert engine.stats.preemptions > 3 and engine.stats.draft_tokens
    assert bool(engine.stats.swapped_in_pages) == (tier is not None)


def test_requests_in_flight_pass_from_an_engine_with_drafts_to_one_without(
    plain, plain_engine, drafted, tmp_path
):
    ids = [drafted.submit(prompt, sampling, n=n) for prompt, sampling, n in REQUESTS]
    events = [event for _ in range(4) for event in drafted.step()]
    drafted.save(tmp_path / "s")
    for request in ids:
        with suppress(KeyError):
            drafted.cancel(request)
    list(drafted.stream())
    back = {new: old for old, new in plain_engine.restore(tmp_path / "s").items()}
    events += [e._replace(request_id=back[e.request_id]) for e in plain_engine.stream()]
    tokens: dict = {}
    for event in events:
        tokens.setdefault((ids.index(event.request_id), event.sample), []).append(event.token)
    assert tokens == plain[0]


def test_a_check_sees_the_window_that_a_step_sees():
    """Pages that a window has passed are given back, and taken again by rows that begin anew."""
    want = answers(make_engine(layout=layout(), max_sequence_tokens=PLACES))[:2]
    engine = engine_of(known_from(want[0]), layout=layout())
    assert answers(engine, forced=5)[:2] == want
    assert engine.stats.draft_tokens


# ---- the drafter


def test_prompt_lookup_takes_the_longest_run_that_is_nearest_and_goes_round():
    cases = [
        ([1, 2, 3, 4, 1, 2], [3, 4, 1]),
        ([1, 2, 1, 2], [1, 2, 1]),  # goes round
        ([7, 1, 2, 5, 8, 1, 2, 6, 7, 1, 2], [5, 8, 1]),  # three alike, before two that are nearer
        ([8, 1, 2, 5, 9, 1, 2, 6, 7, 1, 2], [6, 7, 1]),  # two alike: the nearest
        ([5, 5, 5], [5, 5, 5]),
        ([1, 2, 3, 2], [-1] * 3),  # one alike says little
        ([4], [-1] * 3),
        ([0, 0], [-1] * 3),
        ([], [-1] * 3),
    ]
    text = np.zeros((len(cases), 16), np.int32)  # behind a text there may be anything
    for row, (tokens, _) in zip(text, cases, strict=True):
        row[: len(tokens)] = tokens
    lengths = np.array([len(tokens) for tokens, _ in cases], np.int32)
    assert PromptLookup(3)(jnp.asarray(text), jnp.asarray(lengths)).tolist() == [
        drafts for _, drafts in cases
    ]


@pytest.mark.parametrize(
    ("drafter", "error", "words"),
    [
        (4, TypeError, "hashable function of .text, length., got 4"),
        (PromptLookup, TypeError, "PromptLookup is a class"),
        (lambda text, length: text[:, :2].astype(float), TypeError, "int32 .*got float32"),
        (lambda text, length: text[:, 0], ValueError, r"\[B, k\] .* got \(2,\)"),
        (lambda text, length: text[:, :0], ValueError, r"k >= 1, got \(2, 0\)"),
    ],
)
def test_what_is_no_drafter_is_refused(unchecked, drafter, error, words):
    with pytest.raises(error, match=words):
        engine_of(drafter)


def test_a_model_of_the_last_token_is_told_that_drafts_need_every_one():
    engine = make_engine(fn=model, policies=dict(drafter=PromptLookup(2)))
    engine.submit([1], SamplingParams(max_new_tokens=2))
    with pytest.raises(ValueError, match=r"\[B, T, V\] with B, T = \(4, 3\), for the drafter"):
        engine.step()


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        (dict(drafts=0), "drafts must be from 1"),
        (dict(longest=1), "longest must be at least"),
    ],
)
def test_sizes_of_prompt_lookup_that_make_no_sense_are_refused(sizes, words):
    with pytest.raises(ValueError, match=words):
        PromptLookup(**sizes)
