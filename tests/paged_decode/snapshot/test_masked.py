"""Requests with masks of the host, and with scored prompts, in a snapshot."""

from __future__ import annotations

import pytest

from paged_decode import SnapshotMismatch

from ..engine.test_masks import MASKED, PLAIN, P, Residues, masked_engine, params
from ..engine.test_scores import check
from ..engine.test_scores import params as scored
from ..tiny import every_token, make_engine, texts
from .test_asked import agree, version_of


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Two masked requests, one of two samples that wait for a row, and one without."""
    engine = masked_engine(max_rows=2, row_buckets=(2,), decode_steps=2)
    for i in range(3):
        engine.submit(P[i], params(), mask=Residues if i != 1 else None, n=1 + (i == 2))
    events = []
    while len(events) < 5:
        events += engine.step()
    path = tmp_path_factory.mktemp("masked") / "s"
    engine.save(path)
    assert texts([*events, *engine.stream()])[0, 0] == MASKED[0]
    return path, events


def test_masks_go_on_where_they_were_by_reading_the_text_again(saved):
    path, before = saved
    assert version_of(path) == 4
    agree(path)
    for masks in (Residues, {0: Residues, 2: Residues}):
        engine = masked_engine()
        assert dict(engine.restore(path, masks=masks)) == {0: 0, 1: 1, 2: 2}
        got = texts([*before, *engine.stream()])
        want = {(0, 0): MASKED[0], (1, 0): PLAIN[1], (2, 0): MASKED[2], (2, 1): MASKED[2]}
        assert got == want and engine.allocator.num_used == 0


@pytest.mark.parametrize(
    "masks, config, error, text",
    [
        (None, {}, SnapshotMismatch, "request 0 .* it has a mask: say masks={0: ...}"),
        ({0: Residues}, {}, SnapshotMismatch, "request 2 .* it has a mask: say masks={2: ...}"),
        (Residues, dict(token_masks=False), SnapshotMismatch, "EngineConfig.token_masks is False"),
        ({0: Residues, 2: lambda: 5}, {}, TypeError, "must make an object with fill"),
    ],
)
def test_a_mask_that_nobody_brings_is_missed(unchecked, saved, masks, config, error, text):
    engine = masked_engine(**config)
    with pytest.raises(error, match=text):
        engine.restore(saved[0], masks=masks)
    assert engine.idle and engine.allocator.num_used == 0


def test_a_prompt_is_scored_anew_until_its_first_event_has_told(tmp_path):
    def scoring():
        policies = dict(score=every_token)
        return make_engine(policies=policies, score_chunk=4, top_logits=3, prefill_tokens=4)

    prompts = P[0] * 2, P[1]
    engine = scoring()
    for prompt in prompts:
        engine.submit(prompt, scored(), n=2)
    before = []
    for visit in range(40):
        engine.save(tmp_path / str(visit))
        agree(tmp_path / str(visit))
        other = scoring()
        other.restore(tmp_path / str(visit))
        events = [*before, *other.stream()]
        for request, prompt in enumerate(prompts):
            for sample in range(2):
                mine = [e for e in events if (e.request_id, e.sample) == (request, sample)]
                assert [e.index for e in mine] == list(range(5))
                check(mine[0].prompt_logprobs, prompt)
        assert other.allocator.num_used == 0
        if engine.idle:
            break
        before += engine.step()
    assert engine.idle
