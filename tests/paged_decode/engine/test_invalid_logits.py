"""A row whose next token cannot be chosen ends, says so, and takes nobody with it."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from paged_decode import SamplingParams
from paged_decode.engine.records import TableDelta
from paged_decode.faults import FaultPlan, Faults
from paged_decode.tiers import DiskTier, HostTier

from ..tiny import PARAMS, VOCAB, Wrapped, dense_greedy, make_engine, prompts
from .test_engine import assert_empty

LONG = SamplingParams(max_new_tokens=12)
BAD = 60  # a token whose embedding is NaN, as are its keys, values and logits
BROKEN = PARAMS | dict(embed=np.where(np.arange(VOCAB)[:, None] == BAD, np.nan, PARAMS["embed"]))
BROKEN["embed"] = BROKEN["embed"].astype(np.float32)


def broken_engine(**options):
    engine = make_engine(**options)
    engine.params = BROKEN
    return engine


def clean(count: int, seed: int, low: int, high: int) -> list[list[int]]:
    """Prompts that never meet the bad token, nor do their greedy answers."""
    many = prompts(4 * count, seed=seed, low=low, high=high)
    fine = [p for p in many if BAD not in p and BAD not in dense_greedy(p, 12)]
    return fine[:count]


def leading_to_bad() -> tuple[list[int], tuple[int, ...]]:
    """A prompt without the bad token, and its greedy answer, which comes to it in mid-visit."""
    for prompt in prompts(300, seed=7, low=3, high=9):
        answer = dense_greedy(prompt, 7)
        if BAD not in prompt and BAD in answer[4:6]:
            return prompt, answer[: answer.index(BAD) + 1]
    raise AssertionError("no prompt found")


def test_tokens_before_the_broken_step_are_delivered_and_the_others_go_on():
    """NaN logits became token 0 up to the length."""
    bad, want = leading_to_bad()
    others = clean(3, seed=2, low=5, high=20)
    engine = broken_engine(top_logits=2)
    done = engine.generate([others[0], bad, *others[1:]], LONG)
    ended = done.pop(1)
    assert (ended.tokens, ended.finish_reason) == (want, "invalid_logits")
    assert len(ended.top_logits) == len(want) and np.isfinite(ended.top_logits).all()
    assert [c.tokens for c in done] == [dense_greedy(p, 12) for p in others]
    assert {c.finish_reason for c in done} == {"length"}
    assert engine.stats.decode_tokens == len(want) + 36
    assert_empty(engine)


def test_the_event_has_no_token_and_the_place_of_the_one_that_is_missing():
    engine = broken_engine()
    seen = []
    request = engine.submit([1, 2, BAD], LONG, on_token=seen.append)
    events = list(engine.stream())
    assert events == seen
    (event,) = events
    assert (event.request_id, event.index, event.token) == (request, 0, None)
    assert (event.finish_reason, event.top_logits) == ("invalid_logits", ())
    assert_empty(engine)


@pytest.mark.parametrize("stop", [(), (BAD,), (0,)])
@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 1.0}, {"temperature": 0.5, "top_k": 3, "top_p": 0.9}], ids=str
)
def test_rows_of_every_sampling_end_so_and_change_no_draw_beside_them(sampling, stop):
    """Also where the last token of the prompt is a stop token, or token 0 is."""
    params = SamplingParams(max_new_tokens=9, seed=5, **sampling, stop_tokens=stop)
    others = clean(2, seed=4, low=4, high=12)
    hot = SamplingParams(max_new_tokens=9, temperature=0.05, seed=1)
    alone = make_engine().generate(others, hot)
    engine = broken_engine()
    done = engine.generate([others[0], [5, 6, 7, BAD], others[1]], [hot, params, hot])
    assert done.pop(1).finish_reason == "invalid_logits"
    assert all(BAD not in c.tokens for c in alone)
    assert [c.tokens for c in done] == [c.tokens for c in alone]
    assert_empty(engine)


def test_siblings_of_a_broken_prompt_all_end_and_what_waits_behind_them_runs():
    (fine,) = clean(1, seed=2, low=5, high=20)
    engine = broken_engine(num_pages=24)
    broken = engine.submit([BAD, *range(1, 20)], LONG, n=7)
    good = engine.submit(fine, LONG)
    events = list(engine.stream())
    ends = {e.sample: e.finish_reason for e in events if e.request_id == broken}
    assert ends == dict.fromkeys(range(7), "invalid_logits")
    assert tuple(e.token for e in events if e.request_id == good) == dense_greedy(fine, 12)
    assert_empty(engine)


def test_a_broken_request_leaves_no_page_in_the_prefix_cache():
    """Prefill had published its pages, full of NaN: whoever shared the prefix ended likewise."""
    prompt = [1, BAD, *range(2, 20)]
    engine = broken_engine()
    (done,) = engine.generate([prompt], LONG)
    assert done.finish_reason == "invalid_logits"
    assert engine.allocator.match_prefix(prompt) == 0
    engine.params = PARAMS
    (done,) = engine.generate([prompt], LONG)
    assert done.tokens == dense_greedy(prompt, 12)
    assert_empty(engine)


@pytest.mark.parametrize("disk", [False, True], ids=["host", "disk"])
def test_a_broken_request_leaves_no_page_in_the_tiers(tmp_path, disk):
    """It was swapped out, full of NaN, before it came to decode: its prompt was dead for good."""
    folder = DiskTier(tmp_path, 2**20) if disk else None
    tier = HostTier(1 if disk else 64, disk=folder)
    engine = make_engine(prefill_chunk=4, policies=dict(tier=tier))
    Faults(FaultPlan(preempt_every=3)).install(engine)
    engine.update_params(BROKEN, keep_cached=True)
    prompt = [1, BAD, *range(2, 20)]
    (done,) = engine.generate([prompt], LONG)
    assert done.finish_reason == "invalid_logits" and engine.stats.swaps and tier.stats.stored
    assert tier.num_pages == 0 and not list(tmp_path.iterdir())
    tier.check_invariants()
    engine.update_params(PARAMS, keep_cached=True)
    (done,) = engine.generate([prompt], LONG)
    assert done.tokens == dense_greedy(prompt, 12)


def test_a_prefix_that_others_use_stays_theirs():
    """The broken request read the same first pages; the other one publishes them again."""
    (shared,) = clean(1, seed=9, low=16, high=16)
    engine = broken_engine()
    fine = engine.submit(shared, LONG)
    events = engine.step()
    broken = engine.submit([*shared, BAD], LONG)
    events += engine.stream()
    assert [e.finish_reason for e in events if e.request_id == broken] == ["invalid_logits"]
    assert tuple(e.token for e in events if e.request_id == fine) == dense_greedy(shared, 12)
    assert engine.allocator.match_prefix([*shared, 1]) == 16
    assert_empty(engine)


def test_the_reason_survives_a_snapshot(tmp_path):
    def fail(event):
        raise RuntimeError("callback")

    engine = broken_engine()
    (fine,) = clean(1, seed=2, low=2, high=4)
    engine.submit(fine, LONG, on_token=fail)
    broken = engine.submit([3, BAD], LONG)
    assert engine.step() == []  # tokens come one visit late
    with pytest.raises(RuntimeError, match="callback"):
        engine.step()
    engine.save(tmp_path / "saved")
    other = broken_engine()
    ids = other.restore(tmp_path / "saved")
    ends = [e.finish_reason for e in other.stream() if e.request_id == ids[broken]]
    assert ends == ["invalid_logits"]


def test_a_page_table_that_is_wrong_is_an_alarm():
    """The kernels answer NaN where a row's table names pages outside the pool."""
    engine = make_engine()
    runner = engine.runner

    def wrong(plan):
        runner._table = jnp.full_like(runner._table, 10**6)
        return runner.decode(plan._replace(tables=(TableDelta(*np.empty((3, 0), np.int32)),)))

    engine.loop.runner = Wrapped(runner, decode=wrong)
    (done,) = engine.generate([[1, 2, 3]], LONG)
    assert (done.tokens, done.finish_reason) == ((), "invalid_logits")
    assert_empty(engine)
