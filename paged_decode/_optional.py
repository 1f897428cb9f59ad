"""Packages that only an extra brings: imported where they are needed, missed in one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from .errors import MissingExtra

__all__ = ["needs"]


@contextmanager
def needs(extra: str, *, or_exit: bool = False) -> Iterator[None]:
    """Around imports: what is not installed is an error that names the extra of paged-decode.

    Args:
      extra: which one brings the packages.
      or_exit: for the top of a script: end it with that line in the place of a traceback.

    Raises:
      MissingExtra: a package is missing.

    Example:
      >>> with needs("pressure"):
      ...     import tqdm_of_tomorrow
      Traceback (most recent call last):
      paged_decode.errors.MissingExtra: tqdm_of_tomorrow is not installed; get it with \
pip install 'paged-decode[pressure]'
    """
    try:
        yield
    except ModuleNotFoundError as error:
        # An inner `needs` knows better which extra it was.
        missing = error if isinstance(error, MissingExtra) else MissingExtra(error.name, extra)
        if or_exit:
            raise SystemExit(str(missing)) from None
        raise missing from None
