"""From the parts of a call, one for each shard, to what it returns."""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import numpy as np

from .batch import PageCopies, Prepared
from .bookkeeping import Bookkeeping, Growing

__all__ = ["Copies", "Grown", "in_groups", "merged_copies", "prepared", "run"]

T = TypeVar("T")
Copies = PageCopies | tuple[PageCopies, ...]
"""Of the only group, or of each of several."""
Grown = list[tuple[Bookkeeping, np.ndarray, Any, Growing]]
"""A shard, its rows, their places in the call, and the plan for them."""


def run(plans: Iterable[Callable[[], T]]) -> list[T]:
    """First make all of the plans, then carry all of them out."""
    return [plan() for plan in list(plans)]


def prepared(parts: Grown, size: int) -> Prepared | tuple[Prepared, ...]:
    """Carry out the growth of every shard; its places become those among `size` handles."""
    done = [(at, books.grow(growing)) for books, _, at, growing in parts]
    if len(done) == 1:
        each = tuple(done[0][1])
    else:
        where = np.arange(size)
        groups = range(len(done[0][1]))
        each = tuple(_joined([(where[at], found[group]) for at, found in done]) for group in groups)
    return each[0] if len(each) == 1 else each


def in_groups(done: Prepared | tuple[Prepared, ...]) -> tuple[Prepared, ...]:
    """What `prepare` returned, one for each group."""
    return (done,) if isinstance(done, Prepared) else done


def _joined(parts: list[tuple[np.ndarray, Prepared]]) -> Prepared:
    return Prepared(
        _copies([each.copies for _, each in parts]),
        np.concatenate([where[each.places] for where, each in parts]),
        *(np.concatenate([each[i] for _, each in parts]) for i in (2, 3)),
    )


def merged_copies(parts: list[list[PageCopies]]) -> Copies:
    """Of every shard, a list with those of each group."""
    each = tuple(_copies(list(group)) for group in zip(*parts, strict=True))
    return each[0] if len(each) == 1 else each


def _copies(parts: list[PageCopies]) -> PageCopies:
    if len(parts) == 1:
        return parts[0]
    src, dst = ([copies[i] for copies in parts] for i in (0, 1))
    return PageCopies(np.concatenate(src), np.concatenate(dst))
