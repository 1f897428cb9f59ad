"""Files of format version 4 that break one rule each, and are sound otherwise."""

from __future__ import annotations

from collections.abc import Mapping

import msgpack
import numpy as np
import pytest

from paged_decode import Figures, SamplingParams, SnapshotCorrupt, inspect_snapshot, verify_snapshot

from ..tiny import make_engine
from . import independent_reader
from .asking import EVERYTHING, SERVING, events
from .forge import build, put, replace
from .test_extra import with_version
from .test_hostile import MIB, refused  # noqa: F401  (a fixture)

INF, NAN = float("inf"), float("nan")
ROW = 1  # of the request that asks for everything; request 0 asks for nothing


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    """Requests that wait, and events of every kind."""
    engine = make_engine(**SERVING)
    for at, params in enumerate((SamplingParams(), EVERYTHING, SamplingParams(min_p=0.5))):
        engine.submit([at + 1, 2, 3], params)
    engine._outbox.put_back(events()[:3], events()[3:])
    path = tmp_path_factory.mktemp("sound") / "s"
    engine.save(path)
    fields, arrays, _ = independent_reader.read(path)
    assert build(fields, arrays) == path.read_bytes() and path.read_bytes()[8] == 4
    return fields, arrays


@pytest.fixture
def rejected(tmp_path):
    """`refused`, which measures memory, in a tenth of the time without."""

    def check(data: bytes, text: str) -> None:
        (tmp_path / "hostile").write_bytes(data)
        for read in (inspect_snapshot, verify_snapshot):
            with pytest.raises(SnapshotCorrupt, match=text):
                read(tmp_path / "hostile")

    return check


def split(arrays) -> list[bytes]:
    lengths, data = arrays["engine/asked_length"], arrays["engine/asked_bytes"]
    return [each.tobytes() for each in independent_reader.split(lengths, data)]


def asking(arrays, data: bytes | Mapping | list, row: int = ROW) -> dict:
    """The arrays, where one request asks for something else."""
    parts = split(arrays)
    parts[row] = data if isinstance(data, bytes) else msgpack.packb(dict(data))
    return arrays | {
        "engine/asked_length": np.array([len(each) for each in parts], np.int64),
        "engine/asked_bytes": np.frombuffer(b"".join(parts), np.uint8),
    }


def asked(arrays) -> dict:
    return msgpack.unpackb(split(arrays)[ROW])


BYTES = {
    "nothing of msgpack": (lambda old: b"\xc1", "is not a map in msgpack"),
    "a list": (lambda old: b"\x91\x01", "is not a map in msgpack"),
    "a number": (lambda old: b"\x05", "is not a map in msgpack"),
    "no keys": (lambda old: b"\x80", "0 keys"),
    "2^32 keys": (lambda old: b"\xdf\xff\xff\xff\xff", "4294967295 keys"),
    "cut": (lambda old: old[:-1], "is not a map in msgpack"),
    "a byte more": (lambda old: old + b"\0", "the map ends at byte"),
    "twice": (lambda old: old + old, "the map ends at byte"),
    "a map in it": (lambda old: msgpack.packb({"min_p": {"a": 1}}), "a map or an extension"),
    "an extension": (lambda old: b"\x81\xa5min_p\xd4\x05\0", "is not a map in msgpack"),
    "a time": (lambda old: b"\x81\xa5min_p\xd6\xff\0\0\0\0", "is not a map in msgpack"),
    "an empty list": (lambda old: msgpack.packb({"bad_tokens": []}), "an empty list"),
    "an empty run": (lambda old: msgpack.packb({"stop_sequences": [[]]}), "an empty list"),
    "no UTF-8": (lambda old: b"\x81\xa4stop\x91\xa1\xff", "is not a map in msgpack"),
    "half a pair": (lambda old: b"\x81\xa4stop\x91\xa3\xed\xa0\x80", "is not a map in msgpack"),
    "bytes": (lambda old: msgpack.packb({"min_p": b"a"}), "is not a map in msgpack"),
    "5000 deep": (lambda old: b"\x81\xa5min_p" + b"\x91" * 5000, "is not a map in msgpack"),
    "900 deep": (lambda old: b"\x81\xa5min_p" + b"\x91" * 900 + b"\0", "min_p is not a float but"),
    "900 deep in a list": (
        lambda old: b"\x81\xaabad_tokens" + b"\x91" * 900 + b"\0",
        "bad_tokens is not a list of integers|is not a map in msgpack",
    ),
    "an unknown key": (lambda old: msgpack.packb({"zzz": 1}), "does not have: 'zzz'"),
    "a key of the columns": (lambda old: msgpack.packb({"top_k": 1}), "does not have: 'top_k'"),
    "a key that is no text": (lambda old: msgpack.packb({5: 1}), "does not have: 5"),
    "a key that is a list": (lambda old: b"\x81\x91\x01\x01", "is not a map in msgpack"),
    "keys in another order": (
        lambda old: msgpack.packb(dict(reversed(msgpack.unpackb(old).items()))),
        "with sorted keys",
    ),
    "a key twice": (
        lambda old: b"\x82" + 2 * msgpack.packb({"min_p": 0.5})[1:],
        "shortest form with sorted keys",
    ),
    "a long integer": (lambda old: b"\x81\xa8logprobs\xcd\0\1", "shortest form"),
    "a long map": (lambda old: b"\xde\0\1" + msgpack.packb({"min_p": 0.5})[1:], "shortest form"),
    "a short float": (
        lambda old: msgpack.packb({"min_p": 0.5}, use_single_float=True),
        "shortest form",
    ),
}


@pytest.mark.parametrize("name", BYTES)
def test_bytes_that_are_no_map_in_its_one_form_are_refused(refused, sample, name):  # noqa: F811
    fields, arrays = sample
    change, text = BYTES[name]
    refused(build(fields, asking(arrays, change(split(arrays)[ROW]))), text)


FLOATS = ("frequency_penalty", "min_p", "presence_penalty", "repetition_penalty")
KINDS = dict.fromkeys(FLOATS, [1, True, None, "1", [0.5]])
KINDS |= dict.fromkeys(("logprobs", "min_new_tokens"), [1.0, True, None, "1", [1]])
KINDS |= dict.fromkeys(("allowed_tokens", "bad_tokens"), [1, None, "1", [1.0], [True], [[1]]])
KINDS |= dict.fromkeys(
    ("detokenize", "ignore_eos", "include_stop_str_in_output"), [1, None, "true"]
)
KINDS |= {
    "prompt_logprobs": [1.0, True, None, "1", [1]],
    "logits_args": [1.0, None, [1], ["1"], [True], [[1.0]]],
    "masked": [1, None, "true"],
    "stop": [1, None, "ab", [1], [["ab"]], ["ab", 1]],
    "logit_bias": [1, None, [1], [[1]], [[1, 2]], [[1.0, 2.0]], [[1, 2.0, 3]], [[True, 2.0]]],
    "stop_sequences": [1, None, [1], ["1"], [[1.0]], [[True]], [[[1]]]],
    "stop_tokens": [1, None, "123456789", [1.0] * 9, [True] * 9, [[1]] * 9],
}
WRONG = [(name, value) for name, values in KINDS.items() for value in values]


@pytest.mark.parametrize(("name", "value"), WRONG, ids=lambda each: f"{each!r}")
def test_a_value_of_another_type_is_refused(rejected, sample, name, value):
    fields, arrays = sample
    text = f"what request 1 asks for: {name} is not .* but "
    rejected(build(fields, asking(arrays, asked(arrays) | {name: value})), text)


VALUES = {
    "min_p": [(2.0, "min_p must be"), (-0.5, "min_p must be"), (NAN, "min_p must be")],
    "presence_penalty": [(2.5, "presence_penalty must"), (NAN, "presence_penalty must")],
    "frequency_penalty": [(-3.0, "frequency_penalty must"), (INF, "frequency_penalty must")],
    "repetition_penalty": [(x, "repetition_penalty must be") for x in (0.0, -1.0, INF, NAN, 1e39)],
    "min_new_tokens": [(15, "at most max_new_tokens 14"), (-1, "from 0"), (2**31, "from 0")],
    "prompt_logprobs": [(-1, "prompt_logprobs must be from 0"), (2**63, "must be from 0")],
    "logits_args": [([x], "must be finite float32") for x in (NAN, INF, 1e39)],
    "logprobs": [(-1, "logprobs must be from 0"), (2**63, "logprobs must be from 0")],
    "allowed_tokens": [([-1], "from 0"), ([2**31], "from 0"), ([12], "leaves no token")],
    "bad_tokens": [([-1], "from 0"), ([2**64 - 1], "from 0")],
    "stop": [([""], "empty string"), (["a", ""], "empty string")],
    "detokenize": [(False, "detokenize must be True with stop")],
    "stop_sequences": [([[-1]], "from 0"), ([[1, 2**31]], "from 0")],
    "stop_tokens": [([-1] * 9, "from 0"), ([2**31] * 9, "from 0")],
    "logit_bias": [
        ([[-1, 1.0]], "from 0"),
        ([[2**31, 1.0]], "from 0"),
        *(([[7, x]], "must be a float32 or -inf") for x in (NAN, INF, 1e39)),
    ],
}
REFUSED = [(name, *each) for name, values in VALUES.items() for each in values]


@pytest.mark.parametrize(("name", "value", "text"), REFUSED, ids=lambda each: f"{each!r}")
def test_a_value_that_no_request_can_have_is_refused(rejected, sample, name, value, text):
    fields, arrays = sample
    text = f"sampling of request 1: .*{text}"
    rejected(build(fields, asking(arrays, sorted((asked(arrays) | {name: value}).items()))), text)


USUAL = [("ignore_eos", False), ("min_new_tokens", 0), ("stop_tokens", [58, 3, *range(48, 54)])]
USUAL += [("repetition_penalty", 1.0)]
USUAL += [(name, value) for name in FLOATS[:3] for value in (0.0, -0.0)]


@pytest.mark.parametrize(("name", "value"), USUAL, ids=lambda each: f"{each!r}")
def test_a_value_that_need_not_be_there_is_refused(rejected, sample, name, value):
    fields, arrays = sample
    text = f"{name} is at its default, or in the columns alone"
    rejected(build(fields, asking(arrays, asked(arrays) | {name: value})), text)


OTHERWISE = [
    ("allowed_tokens", [4, 2]),
    ("allowed_tokens", [2, 2, 4]),
    ("logits_args", [0.1]),
    ("bad_tokens", [12, 11]),
    ("bad_tokens", [11, 11]),
    ("logit_bias", [[7, 1.5], [4, -3.0]]),
    ("logit_bias", [[7, 1.5], [7, 1.5]]),
    ("logit_bias", [[4, -0.0]]),
]


@pytest.mark.parametrize(("name", "value"), OTHERWISE, ids=lambda each: f"{each!r}")
def test_a_value_that_would_be_kept_in_another_form_is_refused(rejected, sample, name, value):
    fields, arrays = sample
    text = f"{name} is not in the form in which it is kept"
    rejected(build(fields, asking(arrays, asked(arrays) | {name: value})), text)


def without(name):
    return lambda arrays: arrays.pop(f"engine/{name}")


def unasked(arrays) -> None:
    """Nobody asks for anything."""
    arrays["engine/asked_length"] = np.zeros(3, np.int64)
    arrays["engine/asked_bytes"] = np.zeros(0, np.uint8)


def untold(arrays) -> None:
    arrays["engine/event_logprob"] = np.full((6, 2), NAN, np.float32)
    arrays["engine/event_likely_length"] = np.zeros(6, np.int64)
    arrays["engine/event_likely_ids"] = np.zeros(0, np.int32)
    arrays["engine/event_likely_logprobs"] = np.zeros(0, np.float32)
    arrays["engine/event_text_length"] = np.zeros(6, np.int64)
    arrays["engine/event_text_bytes"] = np.zeros(0, np.uint8)
    arrays["engine/event_figures"] = np.full((6, 8), NAN)
    arrays["engine/event_prompt_length"] = np.full(6, -1)
    arrays["engine/event_prompt_top"] = np.zeros(6, np.int64)
    for name, dtype in (("logprobs", np.float32), ("ids", np.int32), ("likely", np.float32)):
        arrays[f"engine/event_prompt_{name}"] = np.zeros(0, dtype)
    put("engine/event_reason", [2, 4], 4)(arrays)


def both(*changes):
    return lambda arrays: [change(arrays) for change in changes]


LOGPROB, LENGTH = "engine/event_logprob", "engine/event_likely_length"
FIGURES = "engine/event_figures"
TEXTS = "engine/event_text_length"
PROMPT, TOP = "engine/event_prompt_length", "engine/event_prompt_top"
IDS, LIKELY = "engine/event_likely_ids", "engine/event_likely_logprobs"
COLUMNS = {
    "nothing needs it": (both(unasked, untold), "version 4, but nothing in it needs that"),
    "lengths": (put("engine/asked_length", 0, 1), "lengths of engine/asked do not add up"),
    "length -1": (put("engine/asked_length", 0, -1), "lengths of engine/asked do not add up"),
    "length 2^62": (put("engine/asked_length", 0, 2**62), "lengths of engine/asked do not add"),
    "rows": (replace("engine/asked_length", [0]), "asked_length has not one row per request"),
    "of another": (
        lambda a: a.update({"engine/asked_length": a["engine/asked_length"][[1, 0, 2]]}),
        "sampling of request 0|stop_tokens does not begin|min_new_tokens must",
    ),
    "another first stop": (put("engine/stop_tokens", (ROW, 0), 57), "does not begin with those"),
    "seven first stops": (put("engine/stop_tokens", (ROW, 7), -1), "does not begin with those"),
    "three columns": (replace(LOGPROB, np.ones((6, 3))), "not 2 numbers for every event"),
    "an event less": (replace(LOGPROB, np.ones((5, 2))), "not 2 numbers for every event"),
    "one NaN": (put(LOGPROB, (0, 0), NAN), "one is NaN"),
    "the other NaN": (put(LOGPROB, (0, 1), NAN), "one is NaN"),
    "likely lengths": (put(LENGTH, 0, 4), "lengths of engine/event_likely do not add up"),
    "likely length -1": (put(LENGTH, 1, -1), "lengths of engine/event_likely do not add up"),
    "likely rows": (replace(LENGTH, [4]), "not one value for every event"),
    "likely columns": (replace(LIKELY, [0.5]), "columns of the likeliest tokens differ"),
    "likely id -1": (put(IDS, 0, -1), "holds a negative token"),
    "likely without one": (put(LOGPROB, 0, NAN), "no log-probability of its own"),
    "told of no token": (put(LOGPROB, 2, -1.0), "event without a token has log-probabilities"),
    "a token that is not allowed": (put("engine/event_token", 2, 5), "ends by no_allowed_token"),
    "a token of a timeout": (put("engine/event_reason", 0, 8), "ends by timeout"),
    "a token without text": (put("engine/event_token", 4, 5), "ends by detokenizer_failed"),
    "text lengths": (put(TEXTS, 0, 8), "lengths of engine/event_text do not add up"),
    "text length -1": (put(TEXTS, 1, -1), "lengths of engine/event_text do not add up"),
    "text rows": (replace(TEXTS, [7]), "not one value for every event"),
    "half a character": (put("engine/event_text_bytes", 2, 97), "an event is not UTF-8"),
    "a prompt longer": (put(PROMPT, 1, 3), "lengths of engine/event_prompt do not add up"),
    "a prompt of -2": (put(PROMPT, 2, -2), "prompt have an impossible length"),
    "a prompt of 2^62": (put(PROMPT, 1, 2**62), "lengths of engine/event_prompt do not add up"),
    "a prompt too many": (put(PROMPT, 2, 0), "without the first token has the log-prob"),
    "prompt rows": (replace(PROMPT, [-1]), "has not a value per event"),
    "alternatives of nothing": (put(TOP, 2, 1), "prompt have an impossible length"),
    "alternatives -1": (put(TOP, 3, -1), "prompt have an impossible length"),
    "alternatives 2^61": (put(TOP, 1, 2**61), "likeliest tokens of a prompt are not what"),
    "alternatives more": (put(TOP, 1, 3), "lengths of engine/event_prompt_ids do not add up"),
    "alternative -1": (put("engine/event_prompt_ids", 0, -1), "of a prompt are not what they"),
    "alternatives alone": (
        replace("engine/event_prompt_likely", [0.5]),
        "likeliest tokens of a prompt are not what they should be",
    ),
    "seven figures": (replace(FIGURES, np.full((6, 7), NAN)), "not 8 values for every event"),
    "figures rows": (replace(FIGURES, np.full((5, 8), NAN)), "not 8 values for every event"),
    "figures of a first event": (put(FIGURES, 0, 1.0), "not the last of its sample has figures"),
    "reason 11": (put("engine/event_reason", 0, 11), "impossible value"),
    "reason -1": (put("engine/event_reason", 0, -1), "impossible value"),
}
NEW = {name: name.removeprefix("engine/") for name in independent_reader.ASKED}
COLUMNS |= {
    f"without {short}": (
        without(short),
        f"{name} is missing|is in a file of version 4 or 5|not have",
    )
    for name, short in NEW.items()
}
COLUMNS |= {
    f"{short} of another dtype": (
        lambda a, n=name: replace(n, a[n], np.float32 if n == FIGURES else np.float64)(a),
        f"{name} is",
    )
    for name, short in NEW.items()
}


@pytest.mark.parametrize("name", COLUMNS)
def test_arrays_that_contradict_themselves_are_refused(rejected, sample, name):
    fields, arrays = sample
    arrays = dict(arrays)
    change, text = COLUMNS[name]
    change(arrays)
    rejected(build(fields, arrays), text)


WRONG_FIGURES = [(at, value) for at in range(8) for value in (-1.0, INF, -INF, -0.0)]
WRONG_FIGURES += [(at, value) for at in range(4) for value in (0.5, 1e300)]
WRONG_FIGURES += [(0, 2.0**32), (1, 2.0**31 + 1), (3, 2.0**54)] + [(at, NAN) for at in (0, 1, 3, 7)]


@pytest.mark.parametrize(("at", "value"), WRONG_FIGURES)
def test_figures_that_no_sample_can_have_are_refused(rejected, sample, at, value):
    fields, arrays = sample
    arrays = dict(arrays)
    put(FIGURES, (1, at), value)(arrays)
    rejected(build(fields, arrays), f"{Figures._fields[at]} of the figures of an event cannot be")


@pytest.mark.parametrize("needs", [unasked, untold], ids=["events", "requests"])
def test_one_thing_that_needs_it_is_enough(tmp_path, sample, needs):
    fields, arrays = sample
    arrays = dict(arrays)
    needs(arrays)
    (tmp_path / "s").write_bytes(build(fields, arrays))
    other = make_engine(**SERVING)
    assert len(other.restore(tmp_path / "s")) == 3


def test_the_version_says_whether_there_are_these_arrays(rejected, sample):
    """What an older release would misread has a number that it refuses."""
    fields, arrays = sample
    old = {name: array for name, array in arrays.items() if name not in NEW}
    put("engine/event_reason", [2, 4], 4)(old)
    text = "asked_length is in a file of version 4 or 5, and in every one|keys are"
    for version in (1, 2, 3):
        rejected(with_version(bytearray(build(fields, arrays)), version), text)
    rejected(with_version(bytearray(build(fields, old)), 4), text)
    put("engine/event_reason", 2, 6)(old)
    rejected(build(fields, old), "impossible value")


@pytest.mark.parametrize("unit", [b"\x90", b"\x80", b"\xa0", b"\xc4\0", b"\xc0"])
def test_a_megabyte_of_the_smallest_objects_costs_no_more_than_real_ones(refused, sample, unit):  # noqa: F811
    fields, arrays = sample
    count = MIB // len(unit)
    data = b"\x81\xaabad_tokens\xdd" + count.to_bytes(4, "big") + unit * count
    refused(build(fields, asking(arrays, data)), "request 1", budget=64 * MIB)
