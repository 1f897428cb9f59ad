"""What loads can go on, and what goes on can be saved and loaded again, up to every limit."""

from __future__ import annotations

import numpy as np
import pytest

from paged_decode import PagedDecodeError, SamplingParams, SequenceTooLong, SnapshotError

from ..tiny import dense_greedy, make_engine, preempt
from . import independent_reader
from .forge import build, put

EDGES = [0, 1, 2, 2**31 - 1, 2**31, 2**52, 2**53 - 1, 2**53, 2**63 - 2, 2**63 - 1, -1, -(2**63)]
FEW = [0, 1, 2, 2**31 - 1, 2**53, 2**63 - 1, -1]
COLUMNS = [
    *("next_id", "running", "request", "sample", "sibling_of", "prompt_length", "length"),
    *("preemptions", "max_new_tokens", "top_k", "seed", "stop_tokens", "tokens", "salt_length"),
    *("event_request", "event_sample", "event_index", "event_token", "event_reason"),
    *("event_shown", "event_top_length"),
]
AGREE = ("running", "prompt_length", "length", "salt_length", "sequence/length", "sequence/salt")
SEQUENCE = ("length", "computed", "cached", "salt", "pages")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Requests that decode, prefill and wait, siblings of one, events that were not returned."""
    engine = make_engine(top_logits=2)
    engine.submit([1, 2, 3, 4, 5], SamplingParams(max_new_tokens=9, stop_tokens=(60,)), n=2)
    engine.submit([7] * 9, SamplingParams(max_new_tokens=9, temperature=0.5), cache_salt="s")
    engine.step()
    engine.submit([8] * 30, SamplingParams(max_new_tokens=9), n=2)
    engine.submit([4, 4], SamplingParams(max_new_tokens=9), cache_salt="s", n=2)
    engine.step()
    engine.cancel(3)
    path = tmp_path_factory.mktemp("saved") / "s"
    engine.save(path)
    fields, arrays, _ = independent_reader.read(path)
    assert arrays["engine/running"][0] == 4 and len(arrays["engine/event_request"]) >= 2
    return fields, arrays


def goes_on(path, engine) -> bool:
    """Whether it is restored; if it is, everything that a user may do next must work."""
    try:
        engine.restore(path)
    except (SnapshotError, PagedDecodeError):
        return False
    engine.step()
    engine.submit([9, 9, 9], SamplingParams(max_new_tokens=3), n=2)
    preempt(engine)
    engine.save(f"{path}.again")
    other = make_engine(top_logits=2)
    other.restore(f"{path}.again")
    other.submit([5], SamplingParams(max_new_tokens=2))
    for _ in range(20):
        other.step()
    for request in list(other.scheduler.living):
        other.cancel(request)
    other.step()
    assert other.idle and other.allocator.num_used == 0
    other.allocator.check_invariants()
    return True


@pytest.mark.parametrize(
    "edges", [FEW, pytest.param(EDGES, marks=pytest.mark.long)], ids=["few", "all"]
)
@pytest.mark.parametrize(
    "name", [f"engine/{c}" for c in COLUMNS] + [f"sequence/{c}" for c in SEQUENCE]
)
def test_every_number_of_a_file_is_refused_or_survived(tmp_path, saved, name, edges):
    fields, arrays = saved
    path, limits, taken = tmp_path / "s", np.iinfo(arrays[name].dtype), 0
    for value in edges:
        if not limits.min <= value <= limits.max:
            continue
        for at in (0, ...):
            changed = dict(arrays)
            put(name, at, value)(changed)
            path.write_bytes(build(fields, changed))
            engine = make_engine(top_logits=2)
            if at == 0:  # the ids of the file are given anew
                engine.submit([1, 2], SamplingParams(max_new_tokens=2))
            taken += goes_on(path, engine)
    assert taken or name.removeprefix("engine/") in AGREE


@pytest.mark.parametrize("value", [0.0, 5e-324, 1e-300, 1e-40, 3.5e38, 1e300, 1.7e308])
def test_a_temperature_of_any_size_is_survived(tmp_path, saved, value):
    fields, arrays = saved
    changed = dict(arrays)
    put("engine/temperature", ..., value)(changed)
    (tmp_path / "s").write_bytes(build(fields, changed))
    assert goes_on(tmp_path / "s", make_engine(top_logits=2))


def test_the_last_id_of_a_file_leaves_room_for_more(tmp_path, saved):
    fields, arrays = saved
    changed = dict(arrays)
    put("engine/next_id", 0, 2**53)(changed)
    put("engine/request", 0, 2**53 - 1)(changed)
    put("engine/event_request", 0, 2**53 - 2)(changed)
    (tmp_path / "s").write_bytes(build(fields, changed))
    engine = make_engine(top_logits=2)
    ids = engine.restore(tmp_path / "s")
    assert set(ids) >= {2**53 - 1, 2**53 - 2}
    assert sorted(ids.values()) == list(range(len(ids))) and engine.submit([1]) == len(ids)
    engine.save(tmp_path / "again")
    again = make_engine(top_logits=2)
    assert again.restore(tmp_path / "again")[ids[2**53 - 1]] == ids[2**53 - 1]


def test_ids_far_apart_are_given_anew_side_by_side(tmp_path, saved):
    fields, arrays = saved
    changed = dict(arrays)
    put("engine/next_id", 0, 2**53)(changed)
    put("engine/request", -1, 2**53 - 1)(changed)
    put("engine/sibling_of", -1, -1)(changed)
    (tmp_path / "s").write_bytes(build(fields, changed))
    engine = make_engine(top_logits=2)
    engine.submit([1], SamplingParams(max_new_tokens=2))
    ids = engine.restore(tmp_path / "s")
    assert sorted(ids.values()) == list(range(1, 1 + len(ids)))


def test_an_id_that_no_reader_takes_is_not_written(tmp_path):
    engine = make_engine()
    engine._calls.next_id = 2**53
    engine.save(tmp_path / "most")
    engine.submit([1])
    with pytest.raises(ValueError, match="at most 2"):
        engine.save(tmp_path / "more")
    assert not (tmp_path / "more").exists()


def test_preemptions_count_to_the_end_of_the_format_and_stay_there(tmp_path, saved):
    fields, arrays = saved
    changed = dict(arrays)
    put("engine/preemptions", ..., 2**63 - 1)(changed)
    (tmp_path / "s").write_bytes(build(fields, changed))
    engine = make_engine(top_logits=2)
    engine.restore(tmp_path / "s")
    while engine.scheduler.running:
        preempt(engine)
    engine.save(tmp_path / "again")
    _, arrays, _ = independent_reader.read(tmp_path / "again")
    assert set(arrays["engine/preemptions"]) == {2**63 - 1}


def test_rows_that_would_write_one_page_wait_and_get_the_same_tokens(tmp_path):
    """Two running samples of one prompt on the same pages, nothing computed: a file may say so."""
    engine = make_engine()
    prompt = [3, 1, 4, 1, 5, 9, 2, 6, 5]
    engine.submit(prompt, SamplingParams(max_new_tokens=12), n=3)
    engine.step(), engine.step()
    engine.save(tmp_path / "s")
    fields, arrays, _ = independent_reader.read(tmp_path / "s")
    assert arrays["engine/running"][0] == 3
    for computed in ([0, 0, 0], [0, None, 4], [None, 5, 5]):
        changed = dict(arrays)
        for at, value in enumerate(computed):
            if value is not None:
                put("sequence/computed", at, value)(changed)
        (tmp_path / "s").write_bytes(build(fields, changed))
        other = make_engine()
        other.restore(tmp_path / "s")
        other.allocator.check_invariants()
        events = list(other.stream())
        for sample in range(3):
            ends = [e.token for e in events if e.sample == sample]
            assert tuple(ends) == dense_greedy(prompt, 12)[-len(ends) :]


def test_siblings_of_a_sample_that_decodes_already_run_too(tmp_path):
    engine = make_engine(prefill_rows=1)
    prompt = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]
    engine.submit(prompt, SamplingParams(max_new_tokens=5), n=6)
    engine.step()  # a chunk of the prompt; the samples that wait for it are in the file
    engine.save(tmp_path / "s")
    fields, arrays, _ = independent_reader.read(tmp_path / "s")
    assert (arrays["engine/sibling_of"] == 0).sum() == 5
    arrays = dict(arrays)
    arrays["sequence/computed"] = arrays["sequence/length"]
    (tmp_path / "s").write_bytes(build(fields, arrays))
    other = make_engine()
    other.restore(tmp_path / "s")
    other.save(tmp_path / "again")
    make_engine().restore(tmp_path / "again")
    ends = [(e.sample, e.finish_reason) for e in other.stream() if e.finish_reason]
    assert sorted(ends) == [(i, "length") for i in range(6)]


def test_a_sequence_too_long_for_the_engine_is_refused_and_nothing_has_changed(tmp_path, saved):
    fields, arrays = saved
    (tmp_path / "s").write_bytes(build(fields, arrays))
    engine = make_engine(max_sequence_tokens=30)
    with pytest.raises(SequenceTooLong):
        engine.restore(tmp_path / "s")
    assert engine.idle and engine._calls.next_id == 0 and engine.allocator.num_used == 0
