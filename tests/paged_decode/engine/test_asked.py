"""What a request asks for, from `submit` to the last event: whatever runs beside it."""

from __future__ import annotations

import numpy as np
import pytest

from paged_decode import PromptLookup, SamplingParams
from paged_decode.engine.events import gather

from ..tiny import VOCAB, dense_logits, every_token, make_engine, model, preempt, prompts, texts
from ..toy_text import decode
from .test_masks import Residues, toward

P = prompts(6, seed=5, low=3, high=12)
ASKED = [
    dict(frequency_penalty=1.5),
    dict(presence_penalty=2.0),
    dict(repetition_penalty=1.7),
    dict(repetition_penalty=0.6),
    dict(logit_bias={3: 4.0, 7: -9.0, 11: float("-inf")}),
    dict(allowed_tokens=tuple(range(0, VOCAB, 3))),
    dict(bad_tokens=tuple(range(1, VOCAB, 2)), presence_penalty=-1.0),
    dict(min_new_tokens=6, stop_tokens=tuple(range(40))),
    dict(
        frequency_penalty=0.7, presence_penalty=-0.4, repetition_penalty=1.2, min_new_tokens=3,
        stop_tokens=(5, 17, 60), logit_bias={5: 6.0}, bad_tokens=(2, 44),
    ),
]  # fmt: skip


def greedy(**asked) -> SamplingParams:
    return SamplingParams(**dict(max_new_tokens=12) | asked)


def shaped(logits: np.ndarray, text: list[int], prompt: int, params: SamplingParams) -> np.ndarray:
    """The definition, on float64 logits of the next token of a text with so long a prompt."""
    out = logits.copy()
    if params.allowed_tokens is not None:
        out[[i for i in range(VOCAB) if i not in params.allowed_tokens]] = -np.inf
    for token, bias in params.bias_pairs:
        out[token] += bias
    out[list(params.bad_tokens)] = -np.inf
    if len(text) - prompt < params.min_new_tokens:
        out[list(params.stop_tokens)] = -np.inf
    for token in set(text):
        out[token] *= params.repetition_penalty ** (-1 if out[token] > 0 else 1)
    for token in set(text[prompt:]):
        said = text[prompt:].count(token)
        out[token] -= params.presence_penalty + said * params.frequency_penalty
    return out


def expected(prompt: list[int], params: SamplingParams) -> tuple[int, ...]:
    text = list(prompt)
    while len(text) < len(prompt) + params.max_new_tokens:
        text.append(int(np.argmax(shaped(dense_logits(text), text, len(prompt), params))))
        if text[-1] in params.stop_tokens:
            break
    return tuple(text[len(prompt) :])


WANT = [expected(P[i % len(P)], greedy(**asked)) for i, asked in enumerate(ASKED)]


def submit_all(engine) -> list[int]:
    return [engine.submit(P[i % len(P)], greedy(**asked)) for i, asked in enumerate(ASKED)]


@pytest.mark.slow
def test_requests_get_what_they_ask_for_though_they_lose_their_pages():
    assert len(set(WANT)) == len(ASKED)
    for pages, every in ((64, 0), (64, 3), (12, 0)):
        engine = make_engine(num_pages=pages, decode_steps=2)
        ids, events, visits = submit_all(engine), [], 0
        while not engine.idle:
            events += engine.step()
            visits += 1
            if every and visits % every == 0:
                preempt(engine)
        got = texts(events)
        assert [got[request, 0] for request in ids] == WANT
        assert engine.stats.preemptions or (pages, every) == (64, 0)
        assert engine.allocator.num_used == 0


def test_forks_and_samples_have_the_text_before_them():
    params = greedy(frequency_penalty=1.5, repetition_penalty=1.3)
    want = expected(P[0], params)
    engine = make_engine(decode_steps=2)
    parent = engine.submit(P[0], params, n=2)
    events = []
    while not events:
        events += engine.step()
    child = engine.fork(parent, params, sample=0)
    before = sum(e.request_id == parent and e.sample == 0 for e in events)
    got = texts([*events, *engine.stream()])
    assert got[parent, 0] == got[parent, 1] == want
    assert 0 < before < len(want) and got[child, 0] == want[before:]


def test_drafts_are_drawn_as_behind_each_other():
    engine = make_engine(fn=every_token, num_pages=128, policies=dict(drafter=PromptLookup(3)))
    repeated = [[*p, *p, *p[:2]] for p in P]
    params = [greedy(**asked) for asked in ASKED]
    ids = [engine.submit(repeated[i % len(P)], p) for i, p in enumerate(params)]
    got = texts(list(engine.stream()))
    assert engine.stats.draft_tokens
    for i, (request, p) in enumerate(zip(ids, params, strict=True)):
        assert got[request, 0] == expected(repeated[i % len(P)], p)


def mix(rng: np.random.Generator) -> SamplingParams:
    """Anything, hot or not."""
    some = rng.integers(0, VOCAB, 6).tolist()
    asked: dict = dict(max_new_tokens=int(rng.integers(1, 25)), seed=int(rng.integers(9)))
    for name, value in (
        ("temperature", float(rng.choice([0.5, 1.0, 2.0]))),
        ("top_k", int(rng.integers(1, 9))),
        ("top_p", float(rng.uniform(0.2, 1))),
        ("min_p", float(rng.uniform(0, 0.5))),
        ("presence_penalty", float(rng.uniform(-2, 2))),
        ("frequency_penalty", float(rng.uniform(-2, 2))),
        ("repetition_penalty", float(rng.uniform(0.5, 2))),
        ("logit_bias", {some[0]: 3.0, some[1]: float("-inf")}),
        ("bad_tokens", tuple(some[2:4])),
        ("allowed_tokens", tuple(range(int(rng.integers(0, 20)), VOCAB))),
        ("stop_tokens", tuple(rng.integers(0, VOCAB, int(rng.integers(1, 12))).tolist())),
        ("stop_sequences", tuple(tuple(rng.integers(0, 12, 2).tolist()) for _ in range(20))),
        ("logprobs", 2),
        ("prompt_logprobs", 1),
        ("logits_args", (float(rng.uniform(-4, 4)), float(rng.integers(0, 7)))),
        ("stop", tuple(decode(rng.integers(0, VOCAB, 2).tolist()) or "zz" for _ in range(20))),
    ):
        if rng.random() < 0.3:
            asked[name] = value
    asked["min_new_tokens"] = int(rng.integers(0, asked["max_new_tokens"] + 1))
    return SamplingParams(**asked)


@pytest.mark.slow
@pytest.mark.parametrize(
    "count, straight",
    [(40, True), *(pytest.param(n, False, marks=pytest.mark.long) for n in (40, 500))],
)
def test_a_request_in_any_mix_gets_the_tokens_that_it_gets_alone(count, straight, compiled):
    rng = np.random.default_rng(count)
    engine = make_engine(
        num_pages=11,
        decode_steps=4,
        top_logits=2,
        named_tokens=80,
        logits_args=2,
        score_chunk=4,
        token_masks=True,
        vocab_size=VOCAB,
        policies=dict(detokenize=decode, score=every_token, process_logits=toward),
    )
    engine.runner.straight = straight
    engine.warmup()
    compiled.clear()
    asked = [
        (P[int(rng.integers(len(P)))], mix(rng), Residues if rng.random() < 0.15 else None)
        for _ in range(count)
    ]
    ids = [
        engine.submit(prompt, params, mask=mask, priority=int(rng.integers(-2, 3)))
        for prompt, params, mask in asked
    ]
    got = {each.request_id: each for each in gather(list(engine.stream()))}
    assert engine.allocator.num_used == 0 and engine.stats.preemptions
    reasons = set()
    for request, (prompt, params, mask) in zip(ids, asked, strict=True):
        (alone,) = engine.generate([prompt], params, mask=mask)
        mine = got[request]
        assert mine.tokens == alone.tokens, params
        assert (mine.finish_reason, mine.text) == (alone.finish_reason, alone.text), params
        assert (mine.prompt_logprobs is None) == (params.prompt_logprobs is None)
        if alone.prompt_logprobs is not None and mine.prompt_logprobs is not None:
            pair = (each.prompt_logprobs.logprobs for each in (mine, alone))
            np.testing.assert_allclose(*pair, atol=1e-5)
        reasons.add(alone.finish_reason)
    assert reasons >= {"stop", "length"} and not compiled


# ---- log-probabilities


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


def test_log_probabilities_are_those_of_the_models_logits_and_of_what_is_drawn_from():
    engine = make_engine(top_logits=VOCAB)
    params = dict(max_new_tokens=9, logprobs=3)
    hot = dict(temperature=1.7, min_p=0.01, top_k=20, top_p=0.9, presence_penalty=1.0, seed=4)
    ids = [engine.submit(P[1], SamplingParams(**params, **more)) for more in ({}, hot)]
    plain = engine.submit(P[2], SamplingParams(max_new_tokens=4))
    events = list(engine.stream())
    for event in events:
        if event.request_id == plain:
            assert event.logprob is event.processed_logprob is None and not event.top_logprobs
            continue
        logits = np.empty(VOCAB)
        logits[[i for i, _ in event.top_logits]] = [x for _, x in event.top_logits]
        own = log_softmax(logits)
        assert event.logprob == pytest.approx(own[event.token], abs=1e-5)
        likeliest = [i for i, _ in event.top_logits[:3]]
        assert [i for i, _ in event.top_logprobs] == likeliest
        assert [x for _, x in event.top_logprobs] == pytest.approx(own[likeliest], abs=1e-5)
        if event.request_id == ids[0]:
            assert event.processed_logprob == 0
            continue
        text = [e.token for e in events if e.request_id == ids[1]][: event.index]
        changed = shaped(logits, [*P[1], *text], len(P[1]), SamplingParams(**hot)) / 1.7
        order = np.argsort(-changed)[:20]
        order = order[changed[order] >= changed.max() + np.log(0.01)]
        mass = np.exp(changed[order] - changed.max())
        left = order[np.cumsum(mass) - mass < 0.9 * mass.sum()]
        drawn = np.full(VOCAB, -np.inf)
        drawn[left] = log_softmax(changed[left])
        assert event.processed_logprob == pytest.approx(drawn[event.token], abs=1e-5)
    first, second = (next(c for c in gather(events) if c.request_id == i) for i in ids)
    assert len(first.logprobs) == len(first.top_logprobs) == 9
    assert len(second.processed_logprobs) == 9 and min(second.processed_logprobs) < -0.1


def test_log_probabilities_stay_through_preemption_prefix_hits_and_forks():
    params, prompt = SamplingParams(max_new_tokens=10, logprobs=0), [*P[3], *P[4], *P[5]]
    engine = make_engine(decode_steps=2)

    def right(prompt, completion):
        text = list(prompt)
        for token, logprob in zip(completion.tokens, completion.logprobs, strict=True):
            assert logprob == pytest.approx(log_softmax(dense_logits(text))[token], abs=1e-4)
            text.append(token)

    for _ in range(2):  # the second finds the prefix
        request, events, visits = engine.submit(prompt, params, n=2), [], 0
        while not engine.idle:
            events += engine.step()
            visits += 1
            if visits == 2:
                preempt(engine)
        for completion in gather(events):
            assert completion.request_id == request
            right(prompt, completion)
    assert engine.stats.preemptions and engine.stats.prefix_hit_tokens


# ---- how a request ends


@pytest.mark.slow
def test_any_number_of_stop_tokens_and_runs_of_ids_end_a_request_in_the_middle_of_a_visit():
    (free,) = make_engine().generate([P[0]], greedy(max_new_tokens=30))
    text = list(free.tokens)
    others = [token for token in range(VOCAB) if token not in text]

    def first_of(run: list[int]) -> int:
        ends = range(len(run), len(text) + 1)
        return next(end for end in ends if text[end - len(run) : end] == run)

    for steps in (1, 4, 7):
        engine = make_engine(decode_steps=steps)
        for at in range(2, 14):
            run = text[at - 2 : at]
            by_run = greedy(max_new_tokens=30, stop_sequences=((*run[::-1], 0), tuple(run)))
            by_token = greedy(max_new_tokens=30, stop_tokens=(*others[:20], text[at]))
            beside = engine.submit(P[1], greedy(max_new_tokens=20))
            ids = [engine.submit(P[0], params) for params in (by_run, by_token)]
            events = list(engine.stream())
            got = texts(events)
            assert list(got[ids[0], 0]) == text[: first_of(run)]
            assert list(got[ids[1], 0]) == text[: text.index(text[at]) + 1]
            ends = {e.request_id: e.finish_reason for e in events if e.finish_reason}
            assert ends == {beside: "length", ids[0]: "stop", ids[1]: "stop"}
            assert len(got[beside, 0]) == 20 and engine.allocator.num_used == 0
    late = greedy(max_new_tokens=30, stop_sequences=(tuple(text[3:5]),), min_new_tokens=20)
    (done,) = engine.generate([P[0]], late)
    ends = [n for n in range(20, 31) if text[n - 2 : n] == text[3:5]]
    assert list(done.tokens) == text[: min([*ends, 30])]


def test_a_prompt_holds_no_part_of_a_stop():
    (free,) = make_engine().generate([P[0]], greedy())
    run = [P[0][-1], free.tokens[0]]
    (done,) = make_engine().generate([P[0]], greedy(stop_sequences=(tuple(run),)))
    seen = list(free.tokens)
    ends = [n for n in range(2, len(seen) + 1) if seen[n - 2 : n] == run]
    assert len(done.tokens) == min([*ends, len(seen)])


def test_stop_tokens_of_the_engine_are_those_of_every_request_that_does_not_ignore_them():
    (free,) = make_engine().generate([P[0]], greedy())
    end = free.tokens[4]
    engine = make_engine(stop_tokens=(end,))
    stopped, other, through = engine.generate(
        [P[0]] * 3, [greedy(), greedy(stop_tokens=(VOCAB - 1,)), greedy(ignore_eos=True)]
    )
    assert stopped.tokens == other.tokens == free.tokens[: free.tokens.index(end) + 1]
    assert through.tokens == free.tokens


def test_what_may_not_be_drawn_ends_a_row_with_a_reason_and_leaves_the_others():
    def closed(params, cache, tokens, batch):
        logits, cache = model(params, cache, tokens, batch)
        return logits.at[:, 5].set(-np.inf), cache

    engine = make_engine(fn=closed)
    ids = [engine.submit(P[i], p) for i, p in enumerate([greedy(allowed_tokens=(5,)), greedy()])]
    events = list(engine.stream())
    (end,) = [e for e in events if e.request_id == ids[0]]
    assert end.token is None and end.finish_reason == "no_allowed_token"
    assert len(texts(events)[ids[1], 0]) == 12
    assert engine.allocator.num_evictable and engine.allocator.num_used == 0


@pytest.mark.parametrize(
    "asked, config, message",
    [
        (dict(logit_bias={VOCAB: 1.0}), {}, "names the id 61, but vocab_size is 61"),
        (dict(stop_sequences=((3, 99),)), {}, "names the id 99"),
        (
            dict(allowed_tokens=tuple(range(9))),
            dict(named_tokens=8),
            "names 9 tokens.*named_tokens is 8",
        ),
        (dict(logprobs=3), dict(top_logits=2), "asks for 3 alternatives.*top_logits is 2"),
    ],
)
def test_what_an_engine_cannot_serve_is_refused_at_submit(asked, config, message):
    engine = make_engine(vocab_size=VOCAB, **config)
    with pytest.raises(ValueError, match=message):
        engine.submit(P[0], SamplingParams(**asked))
    request = engine.submit(P[0], greedy())
    while not any(event.token is not None for event in engine.step()):
        pass
    with pytest.raises(ValueError, match=message):
        engine.fork(request, SamplingParams(**asked))
    assert len(texts(list(engine.stream())))


def test_the_first_tokens_stop_by_nothing_and_the_next_by_anything():
    """Stop tokens, runs of ids and strings count the same."""
    engine = make_engine(policies=dict(detokenize=decode), num_pages=128)
    always = dict(max_new_tokens=9, allowed_tokens=(7, 8), logit_bias={7: 60.0})
    for least in range(4):
        stops = dict(stop_tokens=(7,)), dict(stop_sequences=((7,),)), dict(stop=decode([7]))
        params = [SamplingParams(**always, **stop, min_new_tokens=least) for stop in stops]
        done = engine.generate([P[0]] * 3, params)
        assert [len(each.tokens) for each in done] == [least + 1] * 3
        assert done[1].tokens == done[2].tokens == (7,) * (least + 1)
        assert done[2].text == decode([7]) * least
