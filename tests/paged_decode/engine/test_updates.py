"""Other weights under requests in flight: kept pages, pages computed again, ends; and versions."""

from __future__ import annotations

import gc
from collections import defaultdict

import jax
import numpy as np
import pytest

from paged_decode import SamplingParams, inspect_snapshot
from paged_decode.engine.events import gather
from paged_decode.tiers import HostTier

from ..snapshot.test_asked import agree, version_of
from ..tiny import (
    DIM,
    HEADS,
    KV_HEADS,
    LAYERS,
    PARAMS,
    dense_greedy,
    every_token,
    make_engine,
    make_params,
    preempt,
    prompts,
)

OTHER, THIRD = make_params(seed=7), make_params(seed=8)
GREEDY, LONG = (SamplingParams(max_new_tokens=count) for count in (12, 24))
PROMPTS = prompts(3, low=9, high=20)


class Loop:
    """Float64 attention over kept keys and values, a token at a time, by whatever weights."""

    def __init__(self):
        self.pages = [([], []) for _ in range(LAYERS)]

    def __call__(self, token: int, params) -> int:
        p = {name: value.astype(np.float64) for name, value in params.items()}
        x = p["embed"][token] + p["place"][len(self.pages[0][0])]
        for layer, (keys, values) in enumerate(self.pages):
            q = (x @ p[f"q{layer}"]).reshape(KV_HEADS, HEADS // KV_HEADS, DIM)
            keys.append((x @ p[f"k{layer}"]).reshape(KV_HEADS, DIM))
            values.append((x @ p[f"v{layer}"]).reshape(KV_HEADS, DIM))
            scores = np.einsum("kgd,skd->kgs", q, np.array(keys)) * DIM**-0.5
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            seen = np.einsum("kgs,skd->kgd", weights, np.array(values)).reshape(-1)
            x = x + np.tanh(seen @ p[f"o{layer}"])
        return int(np.argmax(x @ p["head"]))


def kept(prompt, versions) -> tuple[int, ...]:
    """Greedy tokens over pages that stay, each drawn by the weights of its version."""
    loop, by = Loop(), [(PARAMS, OTHER, THIRD)[version] for version in versions]
    for token in prompt[:-1]:
        loop(token, by[0])
    tokens = [prompt[-1]]
    for params in by:
        tokens.append(loop(tokens[-1], params))
    return tuple(tokens[1:])


def step_until(engine, enough) -> list:
    """Events up to where that holds of their number."""
    events = []
    while not enough(len(events)):
        events += engine.step()
    return events


def streams(events) -> dict:
    found = defaultdict(list)
    for event in events:
        if event.token is not None:
            found[event.request_id, event.sample].append((event.token, event.version))
    return found


@pytest.fixture(scope="module")
def warm():
    """An engine that has nothing to compile."""
    engine = make_engine(decode_steps=2, num_pages=128)
    engine.warmup()
    return engine


@pytest.fixture(scope="module")
def fresh():
    """Another one."""
    return make_engine(decode_steps=2, num_pages=128)


@pytest.fixture
def engine(warm):
    """The same, with the first weights and nothing to do; versions count from where they are."""
    warm.update_params(PARAMS, in_flight="end")
    list(warm.stream())
    yield warm
    warm.allocator.check_invariants()
    assert not warm.allocator.num_used or warm.scheduler.pins.samples


def test_kept_pages_are_of_the_old_weights_and_every_event_says_its_version(engine, compiled):
    base = engine.version
    ids = [engine.submit(p, GREEDY, n=2 if at == 0 else 1) for at, p in enumerate(PROMPTS)]
    events = step_until(engine, lambda count: count >= 9)
    compiled.clear()
    engine.update_params(OTHER, in_flight="keep")
    events += step_until(engine, lambda count: count >= 10)
    engine.update_params(THIRD, in_flight="keep")
    events += engine.stream()
    assert not compiled and engine.version == base + 2
    for (request, _), pairs in streams(events).items():
        tokens, versions = zip(*pairs, strict=True)
        versions = [version - base for version in versions]
        assert versions == sorted(versions) and set(versions) == {0, 1, 2}
        prompt = PROMPTS[ids.index(request)]
        assert tokens == kept(prompt, versions) != dense_greedy(prompt, 12)
    completions = gather(events)
    assert [len(c.versions) for c in completions] == [12] * 4
    (found,) = engine.generate(PROMPTS[:1], GREEDY)  # nothing of before is found
    assert found.tokens == dense_greedy(PROMPTS[0], 12, THIRD)
    assert found.versions == (base + 2,) * 12 and found.figures.cached_tokens == 0


def test_what_is_computed_again_goes_on_like_a_fresh_engine_from_the_first_new_token(engine, fresh):
    base = engine.version
    ids = [engine.submit(p, GREEDY) for p in PROMPTS]
    events = step_until(engine, lambda count: count >= 9)
    engine.update_params(OTHER)
    events += engine.stream()
    fresh.update_params(OTHER)
    for (request, _), pairs in streams(events).items():
        tokens, versions = zip(*pairs, strict=True)
        before = versions.count(base)
        assert versions == (base,) * before + (base + 1,) * (12 - before) and 0 < before < 12
        text = [*PROMPTS[ids.index(request)], *tokens[:before]]
        (rest,) = fresh.generate([text], SamplingParams(max_new_tokens=12 - before))
        assert tokens[before:] == rest.tokens


def test_requests_that_are_to_end_have_a_reason_of_their_own_wherever_they_are(engine):
    ids = [engine.submit(p, GREEDY, n=3) for p in PROMPTS]  # more than there are rows
    events = step_until(engine, lambda count: count >= 8)
    engine.update_params(OTHER, in_flight="end")
    assert engine.allocator.num_used == 0
    events += engine.stream()
    ends = {(e.request_id, e.sample): e for e in events if e.finish_reason}
    assert len(ends) == 9 and {r for r, _ in ends} == set(ids)
    assert {(e.finish_reason, e.token) for e in ends.values()} == {("new_weights", None)}
    for (request, sample), pairs in streams(events).items():
        tokens = tuple(token for token, _ in pairs)
        assert tokens == dense_greedy(PROMPTS[ids.index(request)], len(tokens))
        assert ends[request, sample].index == len(tokens)
    assert engine.generate(PROMPTS[:1], GREEDY)[0].tokens == dense_greedy(PROMPTS[0], 12, OTHER)


def test_forks_and_preempted_samples_of_kept_pages(engine):
    """A fork goes on from the same pages; who lost them computes them by the weights of now."""
    base, events = engine.version, []
    request = engine.submit(PROMPTS[0], LONG)
    events += step_until(engine, lambda count: count >= 4)
    engine.update_params(OTHER, in_flight="keep")
    events += step_until(engine, lambda count: count >= 3)
    child = engine.fork(request, LONG)
    shown = len(events)
    events += step_until(engine, lambda count: count >= 2)
    preempt(engine, at=0)  # whose tokens are read, but not shown
    at = len(engine.scheduler.living[request][0].tokens) - len(PROMPTS[0])
    events += engine.stream()
    pairs = streams(events)
    whole, versions = zip(*pairs[request, 0], strict=True)
    versions = [version - base for version in versions]
    assert whole[:at] == kept(PROMPTS[0], versions)[:at] and versions[at:] == [1] * (24 - at)
    assert whole[at:] == dense_greedy([*PROMPTS[0], *whole[:at]], 24 - at, OTHER)
    rest = tuple(token for token, _ in pairs[child, 0])
    assert rest == kept(PROMPTS[0], versions)[shown:]


def test_pins_are_computed_again_for_they_are_for_others(engine):
    system = list(range(3, 15))
    pin = engine.pin(system)
    engine.submit([*system, 40], GREEDY)
    step_until(engine, lambda count: count >= 2)
    engine.update_params(OTHER, in_flight="keep")
    list(engine.stream())
    (found,) = engine.generate([[*system, 41]], GREEDY)
    assert found.tokens == dense_greedy([*system, 41], 12, OTHER)
    assert found.figures.cached_tokens == 12 and engine.pinned_pages == 3
    engine.unpin(pin)
    engine.step()


def test_an_update_that_is_refused_changes_nothing(engine, unchecked):
    base, (first,) = engine.version, engine.generate(PROMPTS[:1], GREEDY)
    request = engine.submit([*PROMPTS[0], 5], GREEDY)
    events = step_until(engine, lambda count: count >= 2)
    gone = jax.device_put(OTHER["head"])
    gone.delete()
    wrong = {
        r"an array that was deleted at \['head'\]": (OTHER | {"head": gone}, "keep"),
        r"got a ShapeDtypeStruct at \['head'\]": (
            OTHER | {"head": jax.ShapeDtypeStruct(gone.shape, gone.dtype)},
            "end",
        ),
        "in_flight must be one of": (OTHER, "keep_all"),
        r"\['head'\].*\(32, 61\) and dtype float32, these \(32, 60\)": (
            OTHER | {"head": OTHER["head"][:, :60]},
            "end",
        ),
        r"\['head'\].*float32, these .* float16": (
            OTHER | {"head": OTHER["head"].astype(np.float16)},
            "keep",
        ),
        r"another structure than the old, such as at \['more'\]": (
            OTHER | {"more": OTHER["head"]},
            "recompute",
        ),
    }
    for text, (params, word) in wrong.items():
        with pytest.raises(ValueError, match=text):
            engine.update_params(params, in_flight=word, donate=True)
    assert engine.version == base and engine.params is PARAMS
    events += engine.stream()
    tokens, versions = zip(*streams(events)[request, 0], strict=True)
    assert tokens == dense_greedy([*PROMPTS[0], 5], 12) and set(versions) == {base}
    assert engine.generate(PROMPTS[:1], GREEDY)[0].figures.cached_tokens > 0
    assert first.versions == (base,) * 12


def test_arrays_are_used_as_they_are_and_old_ones_are_gone_at_once_if_they_are_donated(engine):
    first = jax.device_put(PARAMS)
    engine.update_params(first)
    second = jax.device_put(OTHER) | {"embed": first["embed"]}
    engine.submit(PROMPTS[0], GREEDY)
    step_until(engine, lambda count: count >= 2)
    engine.update_params(second, in_flight="keep", donate=True)
    assert all(engine.runner.params[name] is second[name] for name in second)
    assert [name for name, array in first.items() if not array.is_deleted()] == ["embed"]
    list(engine.stream())
    dense = {name: np.asarray(array) for name, array in second.items()}
    assert engine.generate(PROMPTS[:1], GREEDY)[0].tokens == dense_greedy(PROMPTS[0], 12, dense)


def test_the_update_of_an_idle_engine_moves_nothing(engine):
    """As google-tunix demands it of whoever has its weights."""
    new = jax.device_put(OTHER)
    engine.generate(PROMPTS[:1], GREEDY)
    with jax.transfer_guard("disallow_explicit"):
        engine.update_params(new)
    assert engine.generate(PROMPTS[:1], GREEDY)[0].tokens == dense_greedy(PROMPTS[0], 12, OTHER)


def test_a_hundred_updates_leak_nothing(engine, compiled):
    trees = [jax.device_put(PARAMS), jax.device_put(OTHER)]

    def live() -> int:
        gc.collect()
        return len(jax.live_arrays())

    engine.update_params(trees[1])
    engine.generate(PROMPTS[:1], GREEDY)
    before = live()
    compiled.clear()
    for at in range(100):
        if at % 25 == 0:
            engine.submit(PROMPTS[0], GREEDY)
        engine.step()
        engine.update_params(trees[at % 2], in_flight="keep" if at % 3 else "recompute")
    list(engine.stream())
    assert not compiled and live() <= before


def test_versions_pass_through_snapshots(engine, fresh, tmp_path):
    """With kept pages, which no file has: whoever restores them computes them by the new weights.

    The file of an engine whose weights were never replaced is what it was.
    """
    waiting = make_engine()
    waiting.submit(PROMPTS[0], GREEDY)
    waiting.save(tmp_path / "waiting")
    assert version_of(tmp_path / "waiting") == 1 and waiting.version == 0
    base, request = engine.version, engine.submit(PROMPTS[0], GREEDY)
    step_until(engine, lambda count: count >= 2)
    engine.update_params(OTHER, in_flight="keep")
    engine.save(tmp_path / "kept")
    agree(tmp_path / "kept")
    assert version_of(tmp_path / "kept") == 5
    fresh.update_params(OTHER, keep_cached=True)
    taken = dict(accept_fingerprint=inspect_snapshot(tmp_path / "kept").fingerprint)
    ids = fresh.restore(tmp_path / "kept", **taken)
    assert fresh.version == engine.version == base + 1
    (sample,) = fresh.scheduler.living[ids[request]]
    text = list(sample.tokens)
    pairs = streams(fresh.stream())[ids[request], 0]
    old = [token for token, version in pairs if version == base]
    new = [token for token, version in pairs if version == base + 1]
    assert old and old == text[-len(old) :] and len(old) + len(new) == len(pairs)
    assert tuple(new) == dense_greedy(text, len(new), OTHER) and new
    fresh.update_params(OTHER, keep_cached=True)
    ids = fresh.restore(tmp_path / "kept", **taken)
    assert fresh.version == base + 2
    fresh.cancel(ids[request])
    list(fresh.stream())
    list(engine.stream())


def test_kept_requests_whose_prompt_is_scored_are_scored_by_one_version():
    """A prompt that is half scored is scored again."""
    engine = make_engine(
        policies=dict(score=every_token), decode_steps=2, score_chunk=4, prefill_tokens=4
    )
    asking = SamplingParams(max_new_tokens=3, prompt_logprobs=0)
    prompt = list(range(2, 30))
    engine.submit(prompt, asking, n=2)
    for _ in range(2):
        engine.step()
    assert 0 < engine.scheduler.running[0].computed < len(prompt) - 1
    engine.update_params(OTHER, in_flight="keep")
    done = gather(engine.stream())
    engine.update_params(OTHER)
    (again,) = engine.generate([prompt], asking)
    for each in done:
        assert each.prompt_logprobs is not None and again.prompt_logprobs is not None
        assert each.tokens == dense_greedy(prompt, 3, OTHER) and each.versions == (1, 1, 1)
        np.testing.assert_allclose(
            each.prompt_logprobs.logprobs, again.prompt_logprobs.logprobs, atol=1e-5
        )


def test_a_tier_forgets_and_kept_pages_never_go_there():
    engine = make_engine(policies=dict(tier=HostTier(64)), decode_steps=2)
    request = engine.submit(PROMPTS[0], GREEDY)
    events = step_until(engine, lambda count: count >= 2)
    engine.update_params(OTHER, in_flight="keep")
    preempt(engine)
    at = len(engine.scheduler.living[request][0].tokens) - len(PROMPTS[0])
    events += engine.stream()
    tokens = tuple(token for token, _ in streams(events)[request, 0])
    assert tokens[at:] == dense_greedy([*PROMPTS[0], *tokens[:at]], 12 - at, OTHER)
    assert engine.stats.swapped_in_pages == 0 and at > 2
