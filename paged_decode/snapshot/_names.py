"""Names that the format can hold."""

from __future__ import annotations

__all__ = ["EXTRA", "MAX_NAME_BYTES", "is_extra_name", "is_name", "is_plain_name", "is_text"]

MAX_NAME_BYTES = 255
EXTRA = "extra/"  # how names of the user's arrays begin


def is_name(name: str) -> bool:
    """Whether the format can hold it: 1 to 255 bytes of UTF-8."""
    return is_text(name) and 0 < len(name.encode()) <= MAX_NAME_BYTES


def is_text(text: str) -> bool:
    """Whether it is valid Unicode: a path that is not UTF-8 and half of a pair are not."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_plain_name(name: str) -> bool:
    """Whether it names a file in the same folder, on every system."""
    return is_name(name) and name not in (".", "..") and not set(name) & {"/", "\\", ":", "\0"}


def is_extra_name(name: str) -> bool:
    """Whether it is `extra/` and a name that no system takes for a path."""
    return name.startswith(EXTRA) and is_name(name) and is_plain_name(name.removeprefix(EXTRA))
