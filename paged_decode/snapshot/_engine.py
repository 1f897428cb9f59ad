"""Requests in flight as arrays of the container, and back, with every value checked."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..allocator import AllocatorState
from ..allocator.prefix import salt_key, salt_of
from ..engine.events import TokenEvent
from ..engine.masks import Constraint
from ..engine.params import MAX_STOP_TOKENS, SamplingParams
from ..engine.requests import Sample
from ..errors import SnapshotCorrupt
from ._asked import OWN, pack_asked, require_one_form, unpack_asked
from ._beside import own_of, require_own, require_pins, require_places, turn_and_limits
from ._format import ASKED_LENGTH, WEIGHTS, Header, require
from ._state import pack_bytes, require_split, typed, unpack_bytes
from ._told import TOLD, told_columns, told_from

__all__ = [
    "EngineState",
    "PendingEvent",
    "arrays_of",
    "engine_arrays",
    "engine_from",
]

MAX_ID = 2**53
_MAX_COUNT = _MAX_VERSION = 2**63 - 1
_NEW = ("no_allowed_token", "waited_too_long", "timeout", "detokenizer_failed", "mask_failed")
"""Of version 4; none has a token."""
_NEWEST = ("new_weights",)
"""Of version 5; none has a token."""
_OLD = (None, "stop", "length", "capacity", "cancelled", "invalid_logits")
REASONS = _OLD + _NEW + _NEWEST

ENGINE = {
    "engine/next_id": ("int64", 1),
    "engine/running": ("int64", 1),
    "engine/request": ("int64", 1),
    "engine/sample": ("int64", 1),
    "engine/sibling_of": ("int64", 1),
    "engine/prompt_length": ("int64", 1),
    "engine/length": ("int64", 1),
    "engine/tokens": ("int32", 1),
    "engine/preemptions": ("int64", 1),
    "engine/max_new_tokens": ("int64", 1),
    "engine/temperature": ("float64", 1),
    "engine/top_k": ("int64", 1),
    "engine/top_p": ("float64", 1),
    "engine/seed": ("int64", 1),
    "engine/stop_tokens": ("int32", 2),
    "engine/salt_length": ("int64", 1),
    "engine/salt_bytes": ("uint8", 1),
    "engine/event_request": ("int64", 1),
    "engine/event_sample": ("int64", 1),
    "engine/event_index": ("int64", 1),
    "engine/event_token": ("int64", 1),
    "engine/event_reason": ("int64", 1),
    "engine/event_shown": ("uint8", 1),
    "engine/event_top_length": ("int64", 1),
    "engine/event_top_ids": ("int32", 1),
    "engine/event_top_logits": ("float32", 1),
}
"""Name, dtype and number of axes of the arrays that a snapshot of an engine has besides `STATE`."""

ASKED = {
    ASKED_LENGTH: ("int64", 1),
    "engine/asked_bytes": ("uint8", 1),
    "engine/event_logprob": ("float32", 2),
    "engine/event_likely_length": ("int64", 1),
    "engine/event_likely_ids": ("int32", 1),
    "engine/event_likely_logprobs": ("float32", 1),
    **TOLD,
}
"""Those that one of version 4 has besides `ENGINE`."""
RENEWED = {WEIGHTS: ("int64", 1), "engine/event_version": ("int64", 1)}
"""Those that one of version 5 has besides both."""


@dataclass(frozen=True, slots=True)
class PendingEvent:
    """An event that `step` has not returned yet; `shown` to its callback already or not."""

    event: TokenEvent
    shown: bool

    @property
    def is_new(self) -> bool:
        """Whether older versions cannot hold it."""
        event = self.event
        numbers = event.logprob, event.processed_logprob
        known = event.finish_reason not in _NEW and not event.top_logprobs and not event.text
        numbers = *numbers, event.prompt_logprobs, event.figures
        return not known or any(each is not None for each in numbers)


@dataclass(frozen=True, slots=True)
class EngineState:
    """Samples in order: those with pages by admission, the others as they queue; what time it is
    by the clock of their limits; and the version of the weights."""

    running: list[Sample]
    waiting: list[Sample]
    events: list[PendingEvent]
    next_id: int
    now: float = 0.0
    version: int = 0

    @property
    def samples(self) -> list[Sample]:
        """All of them, siblings behind the one that they wait for."""
        return [s for first in (*self.running, *self.waiting) for s in (first, *first.siblings)]


def arrays_of(header: Header) -> dict[str, tuple[str, int]]:
    """Those that a snapshot of an engine with that header has."""
    newest = RENEWED if header.renewed else {}
    return ENGINE | ASKED | newest if header.asks else ENGINE | newest


def engine_arrays(state: EngineState) -> dict[str, np.ndarray]:
    """The state under the names and dtypes of `ENGINE`, and of the others where they are needed.

    Raises:
      ValueError: no reader would take it.
    """
    if state.next_id > MAX_ID:
        raise ValueError(
            f"request ids are at most 2**53 in a snapshot, the next is {state.next_id}"
        )
    samples, params = state.samples, [s.sampling for s in state.samples]
    place = {id(s): at for at, s in enumerate(samples)}
    sibling_of = np.full(len(samples), -1)
    for first in samples:
        for sibling in first.siblings:
            sibling_of[place[id(sibling)]] = place[id(first)]
    stops = np.full((len(samples), MAX_STOP_TOKENS), -1)
    for row, p in enumerate(params):
        first = p.stop_tokens[:MAX_STOP_TOKENS]
        stops[row, : len(first)] = first
    salt_lengths, salt_bytes = pack_bytes(tuple(salt_key(s.cache_salt) for s in samples))
    columns = {
        "engine/next_id": [state.next_id],
        "engine/running": [len(state.running)],
        "engine/request": [s.request_id for s in samples],
        "engine/sample": [s.index for s in samples],
        "engine/sibling_of": sibling_of,
        "engine/prompt_length": [s.prompt_len for s in samples],
        "engine/length": [len(s.tokens) for s in samples],
        "engine/tokens": [t for s in samples for t in s.tokens],
        "engine/preemptions": [min(s.preemptions, _MAX_COUNT) for s in samples],
        "engine/max_new_tokens": [p.max_new_tokens for p in params],
        "engine/temperature": [p.temperature for p in params],
        "engine/top_k": [p.top_k for p in params],
        "engine/top_p": [p.top_p for p in params],
        "engine/seed": [p.seed for p in params],
        "engine/stop_tokens": stops,
        "engine/salt_length": salt_lengths,
        "engine/salt_bytes": salt_bytes,
    }
    arrays = typed(columns | _event_columns(state.events), ENGINE)
    asked = tuple(map(pack_asked, params, own_of(samples, state.now)))
    if any(asked) or any(p.is_new for p in state.events) or state.version:
        arrays |= typed(_asked_columns(asked, state.events), ASKED)
    if state.version:
        versions = [min(p.event.version, _MAX_VERSION) for p in state.events]
        now = [min(state.version, _MAX_VERSION)]
        arrays |= typed({WEIGHTS: now, "engine/event_version": versions}, RENEWED)
    return arrays


def _asked_columns(asked: tuple[bytes, ...], pending: Sequence[PendingEvent]) -> dict[str, Any]:
    asked_lengths, asked_bytes = pack_bytes(asked)
    events = [p.event for p in pending]
    numbers = [(e.logprob, e.processed_logprob) for e in events]
    likely = [each for e in events for each in e.top_logprobs]
    return {
        ASKED_LENGTH: asked_lengths,
        "engine/asked_bytes": asked_bytes,
        "engine/event_logprob": np.array(numbers, np.float32).reshape(-1, 2),  # None is NaN
        "engine/event_likely_length": [len(e.top_logprobs) for e in events],
        "engine/event_likely_ids": [i for i, _ in likely],
        "engine/event_likely_logprobs": [x for _, x in likely],
        **told_columns(events),
    }


def _event_columns(pending: Sequence[PendingEvent]) -> dict[str, Any]:
    events = [p.event for p in pending]
    tops = [top for e in events for top in e.top_logits]
    return {
        "engine/event_request": [e.request_id for e in events],
        "engine/event_sample": [e.sample for e in events],
        "engine/event_index": [e.index for e in events],
        "engine/event_token": [-1 if e.token is None else e.token for e in events],
        "engine/event_reason": [REASONS.index(e.finish_reason) for e in events],
        "engine/event_shown": [p.shown for p in pending],
        "engine/event_top_length": [len(e.top_logits) for e in events],
        "engine/event_top_ids": [i for i, _ in tops],
        "engine/event_top_logits": [x for _, x in tops],
    }


def engine_from(arrays: Mapping[str, np.ndarray], pages: AllocatorState) -> EngineState:
    """The checked state: it agrees with itself, and with the sequences of the allocator.

    Args:
      arrays: those of `arrays_of`.
      pages: what the allocator has.

    Raises:
      SnapshotCorrupt: which rule is broken.
    """
    columns = {name.removeprefix("engine/"): array for name, array in arrays.items()}
    count, new = len(columns["request"]), ASKED_LENGTH in arrays
    for name in (
        "sample",
        "sibling_of",
        "prompt_length",
        "length",
        "preemptions",
        "max_new_tokens",
        "temperature",
        "top_k",
        "top_p",
        "seed",
        "stop_tokens",
        "salt_length",
        *(["asked_length"] if new else []),
    ):
        require(len(columns[name]) == count, f"engine/{name} has not one row per request")
    require(columns["stop_tokens"].shape[1] == MAX_STOP_TOKENS, "stop_tokens has not 8 columns")
    for name in ("next_id", "running"):
        require(len(columns[name]) == 1, f"engine/{name} has not one value")
    running, next_id = int(columns["running"][0]), int(columns["next_id"][0])
    samples = list(_samples(columns))
    events = list(_events(columns, new))
    version = _version(columns, events)
    if new and not version:
        require(
            bool(columns["asked_length"].any()) or any(p.is_new for p in events),
            "it is of version 4, but nothing in it needs that",
        )
    ids = [s.request_id for s in samples] + [p.event.request_id for p in events]
    require(
        0 <= next_id <= MAX_ID and all(0 <= i < next_id for i in ids),
        "a request id is not below next_id, or that is above 2**53",
    )
    require_places(samples)
    names = {(s.request_id, s.index) for s in samples}
    require(len(names) == count, "a sample of a request is there twice")
    firsts = _link_siblings(samples, columns["sibling_of"].tolist())
    require(0 <= running <= len(firsts), f"{running} of {len(firsts)} requests cannot run")
    state = EngineState(firsts[:running], firsts[running:], events, next_id, version=version)
    require(
        all(s.admit_by == math.inf for s in state.running),
        "a request has pages and a max_wait",
    )
    _require_agreement(state, pages)
    told = {p.event.request_id for p in events}
    require_pins(samples, state.running, told, pages.page_size)
    return state


def _samples(columns: Mapping[str, np.ndarray]) -> Iterator[Sample]:
    lengths, prompts = columns["length"], columns["prompt_length"]
    require_split("engine/tokens", lengths, len(columns["tokens"]))
    require(
        ((prompts >= 1) & (prompts <= lengths)).all(),
        "a prompt is empty or longer than its request",
    )
    require((columns["tokens"] >= 0).all(), "engine/tokens holds a negative token")
    require(
        (columns["sample"] >= 0).all() and (columns["preemptions"] >= 0).all(),
        "a sample's number or its preemptions are negative",
    )
    salts = unpack_bytes("engine/salt", columns["salt_length"], columns["salt_bytes"])
    asked = [b""] * len(lengths)
    if "asked_length" in columns:
        asked = unpack_bytes("engine/asked", columns["asked_length"], columns["asked_bytes"])
    begins = lengths.cumsum() - lengths
    for row, salt in enumerate(salts):
        tokens = columns["tokens"][begins[row] : begins[row] + lengths[row]].tolist()
        more = unpack_asked(row, asked[row])
        own = {name: more.pop(name) for name in OWN if name in more}
        require_own(row, own)
        own = OWN | own
        params = _params(columns, row, more)
        sample = Sample(
            int(columns["request"][row]),
            int(columns["sample"][row]),
            int(prompts[row]),
            tokens,
            params,
            _salt_of(salt),
            preemptions=int(columns["preemptions"][row]),
            priority=own["priority"],
            place=own["place"],
            admit_by=own["max_wait"],
            end_by=own["timeout"],
            constraint=Constraint.missing() if own["masked"] else None,
            pinned=own["pinned"],
        )
        require(sample.left >= 1, f"request {sample.request_id} has ended already")
        yield sample


def _params(columns: Mapping[str, np.ndarray], row: int, asked: dict[str, Any]) -> SamplingParams:
    stops = columns["stop_tokens"][row]
    used = int((stops >= 0).sum())
    require((stops[:used] >= 0).all() and (stops[used:] == -1).all(), "stop tokens have a hole")
    first = tuple(stops[:used].tolist())
    fields: dict[str, Any] = {
        "max_new_tokens": int(columns["max_new_tokens"][row]),
        "temperature": float(columns["temperature"][row]),
        "top_k": int(columns["top_k"][row]),
        "top_p": float(columns["top_p"][row]),
        "seed": int(columns["seed"][row]),
        "stop_tokens": first,
    }
    try:
        params = SamplingParams(**fields | dict(asked))
    except (TypeError, ValueError) as error:
        raise SnapshotCorrupt(f"sampling of request {row}: {error}") from None
    require_one_form(row, asked, first, params)
    return params


def _events(columns: Mapping[str, np.ndarray], new: bool) -> Iterator[PendingEvent]:
    of_events = ("request", "sample", "index", "token", "reason", "shown", "top_length")
    fields = {name: columns[f"event_{name}"] for name in of_events}
    counts = {len(field) for field in fields.values()}
    require(len(counts) == 1, "the columns of the events differ in length")
    ids, values = columns["event_top_ids"], columns["event_top_logits"]
    require_split("engine/event_top", fields["top_length"], len(ids))
    require(len(ids) == len(values), "the columns of the largest logits differ in length")
    chances = _chances(columns, len(fields["token"]), new)
    count = len(fields["token"])
    told = told_from(columns, count) if new else ({} for _ in range(count))
    versions = columns.get("event_version", np.zeros(count, np.int64)).tolist()
    require(len(versions) == count, "event_version has not one value for every event")
    known = REASONS if "version" in columns else _OLD + _NEW if new else _OLD
    end, rows = 0, zip(*(field.tolist() for field in fields.values()), strict=True)
    for row, chance, more, version in zip(rows, chances, told, versions, strict=True):
        each = dict(zip(fields, row, strict=True))
        require(
            0 <= each["reason"] < len(known)
            and -1 <= each["token"] < 2**31
            and each["sample"] >= 0
            and each["index"] >= 0
            and each["shown"] in (0, 1),
            "an event has an impossible value",
        )
        require(
            each["token"] < 0 or known[each["reason"]] not in _NEW + _NEWEST,
            f"an event has a token, and ends by {known[each['reason']]}",
        )
        require(
            each["token"] >= 0 or not chance,
            "an event without a token has log-probabilities",
        )
        first, last = each["token"] >= 0 and each["index"] == 0, each["reason"] > 0
        require(
            first or more.get("prompt_logprobs") is None,
            "an event without the first token has the log-probabilities of a prompt",
        )
        require(
            last or more.get("figures") is None,
            "an event that is not the last of its sample has figures",
        )
        begin, end = end, end + each["top_length"]
        event = TokenEvent(
            request_id=each["request"],
            sample=each["sample"],
            index=each["index"],
            token=None if each["token"] < 0 else each["token"],
            finish_reason=REASONS[each["reason"]],
            top_logits=tuple(zip(ids[begin:end].tolist(), values[begin:end].tolist(), strict=True)),
            version=version,
            **chance,
            **more,
        )
        yield PendingEvent(event, bool(each["shown"]))


def _version(columns: Mapping[str, np.ndarray], events: Sequence[PendingEvent]) -> int:
    """Of the weights; 0 before version 5."""
    if "version" not in columns:
        return 0
    require(len(columns["version"]) == 1, "engine/version has not one value")
    version = int(columns["version"][0])
    require(version >= 1, f"it is of version 5, but the weights are of version {version}")
    require(
        all(0 <= p.event.version <= version for p in events),
        f"an event has a version of the weights that is not from 0 to {version}",
    )
    return version


def _chances(columns: Mapping[str, np.ndarray], count: int, new: bool) -> Iterator[dict[str, Any]]:
    """The log-probabilities of every event, by the fields of `TokenEvent`."""
    if not new:
        yield from ({} for _ in range(count))
        return
    both, lengths = columns["event_logprob"], columns["event_likely_length"]
    ids, values = columns["event_likely_ids"], columns["event_likely_logprobs"]
    require(both.shape == (count, 2), "event_logprob has not 2 numbers for every event")
    require(len(lengths) == count, "event_likely_length has not one value for every event")
    require_split("engine/event_likely", lengths, len(ids))
    require(len(ids) == len(values), "the columns of the likeliest tokens differ in length")
    require((ids >= 0).all(), "engine/event_likely_ids holds a negative token")
    none = np.isnan(both)
    require(
        (none[:, 0] == none[:, 1]).all(),
        "of a log-probability and that of the processed logits one is NaN",
    )
    require(
        not (none[:, 0] & (lengths > 0)).any(),
        "an event has the likeliest tokens, but no log-probability of its own",
    )
    end = 0
    for (logprob, processed), length, without in zip(
        both.tolist(), lengths.tolist(), none[:, 0].tolist(), strict=True
    ):
        begin, end = end, end + length
        yield (
            {}
            if without
            else {
                "logprob": logprob,
                "processed_logprob": processed,
                "top_logprobs": tuple(
                    zip(ids[begin:end].tolist(), values[begin:end].tolist(), strict=True)
                ),
            }
        )


def _link_siblings(samples: list[Sample], sibling_of: list[int]) -> list[Sample]:
    firsts: list[Sample] = []
    places: set[int] = set()
    for at, parent in enumerate(sibling_of):
        if parent == -1:
            firsts.append(samples[at])
            places.add(at)
            continue
        require(
            parent in places and samples[parent] is firsts[-1],
            "a sibling does not follow the request that it waits for",
        )
        first, sibling = samples[parent], samples[at]
        require(
            first.request_id == sibling.request_id
            and first.prompt_len == len(first.tokens) == sibling.prompt_len
            and first.tokens == sibling.tokens
            and first.cache_salt == sibling.cache_salt
            and turn_and_limits(first) == turn_and_limits(sibling),
            "a sibling is no further sample of the prompt that it waits for",
        )
        first.siblings.append(sibling)
    return firsts


def _require_agreement(state: EngineState, pages: AllocatorState) -> None:
    require(
        len(pages.lengths) == len(state.running),
        f"{len(state.running)} requests run, but there are {len(pages.lengths)} sequences",
    )
    lengths = [len(sample.tokens) - 1 for sample in state.running]
    same = pages.lengths.tolist() == lengths  # so that no sequence has more tokens than the file
    require(same, "a request has another number of tokens than its sequence")
    for sample, salt, tokens in zip(
        state.running, pages.salts.tolist(), pages.sequence_tokens(), strict=True
    ):
        require(
            tokens.tolist() == sample.tokens[:-1]
            and salt_key(sample.cache_salt) == pages.salt_keys[salt],
            f"request {sample.request_id} has other tokens or another salt than its sequence",
        )


def _salt_of(key: bytes) -> str | bytes | None:
    try:
        salt = salt_of(key)
        valid = salt_key(salt) == key
    except ValueError:
        valid, salt = False, None
    require(valid, f"salt {key[:40]!r} is not b'\\0', b's' and UTF-8, or b'b' and bytes")
    return salt
