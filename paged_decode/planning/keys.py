"""What a file says of a model, by key, with the errors of what it should say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["Keys"]


@dataclass(frozen=True, slots=True)
class Keys:
    """Values by key.

    Attributes:
      name: of the model, for messages.
      values: the keys without the prefix that all of them have in the file.
    """

    name: str
    values: Mapping[str, Any]

    def has(self, key: str) -> bool:
        """Whether it says anything; JSON's null does not."""
        return self.values.get(key) is not None

    def count(self, key: str, least: int = 1) -> int:
        """An integer of at least so much, which must be there."""
        value = self.values.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(
                f"{self.name}: expected {key} to be an integer of at least {least}, got "
                f"{value!r:.60}"
            )
        return value

    def refuse(self, unserved: Mapping[str, str]) -> None:
        """Raise NotImplementedError if a key that begins so is there, and not 0, false or empty."""
        for key, value in self.values.items():
            if not (value.any() if isinstance(value, np.ndarray) else value):
                continue
            for begin, what in unserved.items():
                if key.startswith(begin):
                    raise NotImplementedError(
                        f"{self.name} has {what} ({key}): no pages are made for that; if every "
                        "layer keeps keys and values, give sizes instead of a file"
                    )
