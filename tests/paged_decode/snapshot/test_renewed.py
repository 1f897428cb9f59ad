"""The version of the weights in a snapshot: format version 5, and files that break its rules."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from paged_decode import SnapshotCorrupt, inspect_snapshot
from paged_decode.snapshot._open import Opened

from ..tiny import make_engine
from . import independent_reader
from .forge import build, put, replace
from .test_asked import agree
from .test_extra import with_version

GOLDEN = Path(__file__).parents[2] / "golden/snapshot_v5_waiting.pgd"
NOW, OF_EVENTS = "engine/version", "engine/event_version"


@pytest.fixture(scope="module")
def sample():
    fields, arrays, _ = independent_reader.read(GOLDEN)
    assert build(fields, arrays) == GOLDEN.read_bytes()
    return fields, arrays


def test_the_golden_requests_after_new_weights_are_read_alike_and_restored():
    agree(GOLDEN)
    with Opened(GOLDEN) as opened:
        assert opened.engine is not None and opened.engine.version == 2
    engine = make_engine()
    engine.restore(GOLDEN)
    assert engine.version == 2
    events = list(engine.stream())
    assert {e.finish_reason for e in events if e.request_id == 0} == {None, "new_weights"}
    assert {e.version for e in events if e.request_id == 0} == {1}
    assert [e.version for e in events if e.request_id == 1] == [2] * 5


RULES = {
    "no update": (put(NOW, 0, 0), "version 5, but the weights are of version 0"),
    "less than none": (put(NOW, 0, -1), "version 5, but the weights are of version -1"),
    "two values": (replace(NOW, np.array([2, 2])), "engine/version has not one value"),
    "newer event": (put(OF_EVENTS, 0, 3), "not from 0 to 2"),
    "negative event": (put(OF_EVENTS, 0, -1), "not from 0 to 2"),
    "fewer rows": (replace(OF_EVENTS, np.zeros(1, np.int64)), "not one value for every event"),
    "other dtype": (replace(NOW, np.array([2]), np.int32), "engine/version is"),
    "no event_version": (lambda a: a.pop(OF_EVENTS), "event_version is missing|not have"),
    "a token at the end": (
        put("engine/event_token", -1, 5),
        "has a token, and ends by new_weights",
    ),
    "reason 12": (put("engine/event_reason", -1, 12), "impossible value"),
}


@pytest.mark.parametrize("name", RULES)
def test_versions_that_contradict_themselves_are_refused(tmp_path, sample, name):
    fields, arrays = sample
    arrays, (change, text) = dict(arrays), RULES[name]
    change(arrays)
    (tmp_path / "s").write_bytes(build(fields, arrays))
    with pytest.raises(SnapshotCorrupt, match=text):
        inspect_snapshot(tmp_path / "s")


def test_what_an_older_release_would_misread_has_a_number_that_it_refuses(tmp_path, sample):
    fields, arrays = sample
    fourth = {name: a for name, a in arrays.items() if name not in (NOW, OF_EVENTS)}
    text = "engine/version is in a file of version 5, and in every one|impossible value"
    for data in (
        with_version(bytearray(build(fields, arrays)), 4),
        with_version(bytearray(build(fields, fourth)), 5),
        build(fields, fourth),  # whose reason is one of version 5
    ):
        (tmp_path / "s").write_bytes(data)
        with pytest.raises(SnapshotCorrupt, match=text):
            inspect_snapshot(tmp_path / "s")
