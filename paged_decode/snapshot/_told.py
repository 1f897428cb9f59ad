"""What events tell beside tokens and numbers: text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ..engine.requests import TokenEvent
from ..errors import SnapshotCorrupt
from ._state import pack_bytes, unpack_bytes

__all__ = ["TOLD", "told_columns", "told_from"]

TOLD = {
    "engine/event_text_length": ("int64", 1),
    "engine/event_text_bytes": ("uint8", 1),
}
"""Name, dtype and number of axes of their arrays, in a file of version 4."""


def told_columns(events: Sequence[TokenEvent]) -> dict[str, Any]:
    """The arrays of these events."""
    texts = tuple(event.text.encode("utf-8", "surrogatepass") for event in events)
    lengths, data = pack_bytes(texts)
    return {"engine/event_text_length": lengths, "engine/event_text_bytes": data}


def told_from(columns: Mapping[str, np.ndarray], count: int) -> Iterator[dict[str, Any]]:
    """Of so many events, by the fields of `TokenEvent`.

    Args:
      columns: arrays without `engine/` in front of their names.
      count: how many events there are.

    Raises:
      SnapshotCorrupt: they are not what `told_columns` gives.
    """
    lengths = columns["event_text_length"]
    if len(lengths) != count:
        raise SnapshotCorrupt("event_text_length has not one value for every event")
    for data in unpack_bytes("engine/event_text", lengths, columns["event_text_bytes"]):
        try:
            yield {"text": data.decode("utf-8", "surrogatepass")}
        except UnicodeDecodeError as error:
            raise SnapshotCorrupt(f"the text of an event is not UTF-8: {error}") from None
