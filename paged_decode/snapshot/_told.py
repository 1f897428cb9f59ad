"""What events tell beside tokens and numbers: text, a prompt's log-probabilities, figures."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ..engine.events import TokenEvent
from ..engine.figures import Figures
from ..engine.scores import PromptLogprobs
from ..errors import SnapshotCorrupt
from ._state import pack_bytes, require_split, unpack_bytes

__all__ = ["TOLD", "told_columns", "told_from"]

TOLD = {
    "engine/event_text_length": ("int64", 1),
    "engine/event_text_bytes": ("uint8", 1),
    "engine/event_prompt_length": ("int64", 1),
    "engine/event_prompt_top": ("int64", 1),
    "engine/event_prompt_logprobs": ("float32", 1),
    "engine/event_prompt_ids": ("int32", 1),
    "engine/event_prompt_likely": ("float32", 1),
    "engine/event_figures": ("float64", 2),
}
"""Name, dtype and number of axes of their arrays, in a file of version 4."""
_WHOLE = dict(seed=2**32 - 1, prompt_tokens=2**31, cached_tokens=2**31, preemptions=2**53)
"""Which figures are whole numbers, and the largest that they can be."""
_MOST = sys.float_info.max  # of seconds
_OPTIONAL = ("cached_tokens", "queued_seconds", "first_token_seconds", "token_seconds")


def told_columns(events: Sequence[TokenEvent]) -> dict[str, Any]:
    """The arrays of these events."""
    texts = tuple(event.text.encode("utf-8", "surrogatepass") for event in events)
    lengths, data = pack_bytes(texts)
    prompts = [event.prompt_logprobs for event in events]
    scored = [each for each in prompts if each is not None]
    pairs = [pair for each in scored for row in each.top_logprobs for pair in row]
    none = (None,) * len(Figures._fields)
    figures = [
        f._replace(preemptions=min(f.preemptions, _WHOLE["preemptions"])) if f else none
        for f in (event.figures for event in events)
    ]
    return {
        "engine/event_text_length": lengths,
        "engine/event_text_bytes": data,
        "engine/event_prompt_length": [-1 if p is None else len(p.logprobs) for p in prompts],
        "engine/event_prompt_top": [
            len(p.top_logprobs[0]) if p is not None and p.top_logprobs else 0 for p in prompts
        ],
        "engine/event_prompt_logprobs": [x for each in scored for x in each.logprobs],
        "engine/event_prompt_ids": [i for i, _ in pairs],
        "engine/event_prompt_likely": [x for _, x in pairs],
        "engine/event_figures": np.array(figures, np.float64).reshape(-1, len(none)),  # None is NaN
    }


def told_from(columns: Mapping[str, np.ndarray], count: int) -> Iterator[dict[str, Any]]:
    """Of so many events, by the fields of `TokenEvent`.

    Args:
      columns: arrays without `engine/` in front of their names.
      count: how many events there are.

    Raises:
      SnapshotCorrupt: they are not what `told_columns` gives.
    """
    lengths, figures = columns["event_text_length"], columns["event_figures"]
    if len(lengths) != count:
        raise SnapshotCorrupt("event_text_length has not one value for every event")
    if figures.shape != (count, len(Figures._fields)):
        raise SnapshotCorrupt(
            f"event_figures has not {len(Figures._fields)} values for every event"
        )
    texts = unpack_bytes("engine/event_text", lengths, columns["event_text_bytes"])
    rows = zip(texts, _prompts(columns, count), figures.tolist(), strict=True)
    for data, prompt, row in rows:
        try:
            text = data.decode("utf-8", "surrogatepass")
        except UnicodeDecodeError as error:
            raise SnapshotCorrupt(f"the text of an event is not UTF-8: {error}") from None
        yield {"text": text, "prompt_logprobs": prompt, "figures": _figures(row)}


def _prompts(columns: Mapping[str, np.ndarray], count: int) -> list[PromptLogprobs | None]:
    parts = ("length", "top", "logprobs", "ids", "likely")
    lengths, tops, own, ids, likely = (columns[f"event_prompt_{part}"] for part in parts)
    if not len(lengths) == len(tops) == count:
        raise SnapshotCorrupt("event_prompt_length or event_prompt_top has not a value per event")
    if (lengths < -1).any() or (tops < 0).any() or (tops[lengths <= 0] != 0).any():
        raise SnapshotCorrupt("the log-probabilities of a prompt have an impossible length")
    if (tops > len(ids)).any() or len(ids) != len(likely) or (ids < 0).any():
        raise SnapshotCorrupt("the likeliest tokens of a prompt are not what they should be")
    sizes = np.maximum(lengths, 0)
    require_split("engine/event_prompt", sizes, len(own))
    require_split("engine/event_prompt_ids", sizes * tops, len(ids))
    pairs = list(zip(ids.tolist(), likely.tolist(), strict=True))
    numbers, found, end, used = own.tolist(), [], 0, 0
    for length, top in zip(lengths.tolist(), tops.tolist(), strict=True):
        if length < 0:
            found.append(None)
            continue
        begin, end = end, end + length
        rows = [tuple(pairs[used + i * top : used + (i + 1) * top]) for i in range(length)]
        used += length * top
        found.append(PromptLogprobs(tuple(numbers[begin:end]), tuple(rows) if top else ()))
    return found


def _figures(row: list[float]) -> Figures | None:
    """Those of one event; NaN is None."""
    if all(map(math.isnan, row)):
        return None
    values: list[Any] = []
    for name, value in zip(Figures._fields, row, strict=True):
        whole = name in _WHOLE
        if math.isnan(value):
            holds = name in _OPTIONAL
        else:
            holds = 0 <= value <= _WHOLE.get(name, _MOST) and not (whole and value % 1)
            holds = holds and math.copysign(1, value) > 0
        if not holds:
            raise SnapshotCorrupt(f"{name} of the figures of an event cannot be {value}")
        values.append(None if math.isnan(value) else int(value) if whole else value)
    return Figures(*values)
