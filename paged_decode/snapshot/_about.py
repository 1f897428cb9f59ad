"""Which file an error is about."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .._text import printable
from ..errors import SnapshotError

__all__ = ["about"]


@contextmanager
def about(path: str | os.PathLike[str]) -> Iterator[None]:
    """Let a SnapshotError of the block name the file, in its text and as `path`.

    The innermost block has the say: of a chain the one file that breaks a rule is named.
    """
    try:
        yield
    except SnapshotError as error:
        if error.path is None:
            error.path = Path(path)
            error.args = (f"{printable(path)}: {error}",)
        raise
