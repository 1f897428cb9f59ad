"""Log-probabilities of a prompt's tokens, whatever runs beside it."""

from __future__ import annotations

import numpy as np
import pytest

from paged_decode import PromptLookup, SamplingParams
from paged_decode.replicas import ReplicaCheck

from ..tiny import PARAMS, VOCAB, dense_logits, every_token, make_engine, model, preempt, prompts
from .test_engine_groups import WINDOWS, layout

P = [*prompts(4, seed=12, low=9, high=30), [7], [3, 4]]
TOP = 3


def params(**asked) -> SamplingParams:
    return SamplingParams(**dict(max_new_tokens=5, prompt_logprobs=TOP) | asked)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())


def expected(prompt: list[int], weights=PARAMS) -> np.ndarray:
    """Float64 log-probabilities `[T - 1, V]` of what comes behind each token but the last."""
    rows = [log_softmax(dense_logits(prompt[: i + 1], weights)) for i in range(len(prompt) - 1)]
    return np.array(rows).reshape(-1, VOCAB)


def check(found, prompt: list[int], top: int = TOP, weights=PARAMS) -> None:
    want = expected(prompt, weights)
    own = [row[token] for row, token in zip(want, prompt[1:], strict=True)]
    np.testing.assert_allclose(found.logprobs, own, atol=1e-4, rtol=0)
    assert len(found.top_logprobs) == (len(prompt) - 1 if top else 0)
    for row, pairs in zip(want, found.top_logprobs, strict=False):
        assert len(pairs) == top
        np.testing.assert_allclose([x for _, x in pairs], np.sort(row)[::-1][:top], atol=1e-4)
        np.testing.assert_allclose([row[i] for i, _ in pairs], [x for _, x in pairs], atol=1e-4)


def scoring(**options):
    drafts = options.pop("drafts", False)
    policies = dict(drafter=PromptLookup(2)) if drafts else dict(score=every_token)
    policies["check"] = ReplicaCheck()
    config = dict(score_chunk=4, top_logits=TOP, num_pages=128, decode_steps=2) | options
    return make_engine(fn=every_token if drafts else model, policies=policies, **config)


@pytest.mark.parametrize("drafts", [False, True])
def test_a_prompt_is_scored_whatever_is_cached_and_whoever_runs_beside_it(drafts):
    engine = scoring(drafts=drafts)
    plain = [each.tokens for each in engine.generate(P, params(prompt_logprobs=None))]
    cases = [params(), params(prompt_logprobs=None), params(prompt_logprobs=0), params()] * 2
    done = engine.generate(P + P[:2], cases)
    assert [each.tokens for each in done] == plain + plain[:2]
    for each, prompt, asked in zip(done, P + P[:2], cases, strict=True):
        if asked.prompt_logprobs is None:
            assert each.prompt_logprobs is None
        else:
            check(each.prompt_logprobs, prompt, asked.prompt_logprobs)
    assert engine.allocator.num_used == 0


@pytest.mark.parametrize("pages", [128, 14])
def test_scores_come_with_the_first_token_through_samples_preemption_and_failure(pages):
    engine = scoring(num_pages=pages)
    ids = [engine.submit(P[i], params(), n=1 + i % 2) for i in range(4)]
    events, visits = [], 0
    while not engine.idle:
        events += engine.step()
        visits += 1
        if visits % 2 == 0:
            preempt(engine)
        if visits == 3:
            with engine._alone():
                engine.loop.discard()  # as after a program that failed
    for i, request in enumerate(ids):
        for sample in range(1 + i % 2):
            mine = [e for e in events if (e.request_id, e.sample) == (request, sample)]
            check(mine[0].prompt_logprobs, P[i])
            assert [e.prompt_logprobs for e in mine[1:]] == [None] * 4
    assert engine.stats.preemptions and engine.allocator.num_used == 0


def test_scores_that_nobody_was_told_are_those_of_the_new_weights():
    engine = scoring()
    other = PARAMS | {"head": PARAMS["head"] * 0.7}
    request = engine.submit(P[0], params())
    engine.step()
    engine.update_params(other)
    events = list(engine.stream())
    assert events[0].request_id == request
    check(events[0].prompt_logprobs, P[0], weights=other)


def test_a_window_group_scores_prompts_longer_than_its_window():
    engine = scoring(layout=layout())
    (done,) = engine.generate([P[0] * 2], params())
    want = [
        log_softmax(dense_logits((P[0] * 2)[: i + 1], windows=WINDOWS))[token]
        for i, token in enumerate((P[0] * 2)[1:])
    ]
    np.testing.assert_allclose(done.prompt_logprobs.logprobs, want, atol=1e-4)


def test_after_warmup_scoring_compiles_nothing():
    engine = scoring()
    engine.warmup()
    before = engine.stats.programs
    engine.generate(P, [params(), params(prompt_logprobs=None)] * 3)
    assert engine.stats.programs == before


def test_who_is_cancelled_while_it_is_scored_harms_nobody():
    engine = scoring(prefill_tokens=4)
    first, second = (engine.submit(P[i], params()) for i in (0, 1))
    engine.step()
    engine.step()
    engine.cancel(first)
    events = list(engine.stream())
    mine = [e for e in events if e.request_id == second]
    check(mine[0].prompt_logprobs, P[1])
    assert engine.allocator.num_used == 0


def test_what_cannot_be_scored_is_refused(unchecked):
    with pytest.raises(ValueError, match="score_chunk needs score"):
        make_engine(score_chunk=4)
    with pytest.raises(TypeError, match="score must be a model function, got int"):
        make_engine(score_chunk=4, policies=dict(score=1))
    with pytest.raises(ValueError, match="score_chunk must be at most prefill_chunk 8, got 9"):
        scoring(score_chunk=9)
    with pytest.raises(ValueError, match="prompt_logprobs needs EngineConfig.score_chunk"):
        make_engine().submit(P[0], params())
    engine = scoring()
    with pytest.raises(ValueError, match="asks for 4 alternatives, but EngineConfig.top_logits is"):
        engine.submit(P[0], params(prompt_logprobs=4))
    request = engine.submit(P[0], params())
    while not len(engine.step()):
        pass
    with pytest.raises(ValueError, match="prompt_logprobs is for submit"):
        engine.fork(request, params(max_new_tokens=9))
    with pytest.raises(ValueError, match="logits must be .B, T, V."):
        make_engine(policies=dict(score=model), score_chunk=4).generate(
            [P[0]], params(prompt_logprobs=0)
        )


@pytest.mark.parametrize("visits", [3, 4, 5])
def test_samples_that_wait_for_a_row_are_scored_again_where_others_have_begun(visits):
    engine = scoring()
    request, events = engine.submit(P[0], params(), n=6), []
    for _ in range(visits):
        events += engine.step()
    engine.update_params(dict(PARAMS))
    events += list(engine.stream())
    for sample in range(6):
        mine = [e for e in events if (e.request_id, e.sample) == (request, sample)]
        assert [e.index for e in mine] == list(range(5))
        check(mine[0].prompt_logprobs, P[0])
    assert engine.allocator.num_used == 0
