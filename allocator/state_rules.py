"""Every rule that the bookkeeping as plain arrays has to keep, wherever it comes from."""

from dataclasses import fields

import numpy as np

from .group_rules import check_groups, check_sharing
from .group_rules import require as _require
from .prefix import salt_key, salt_of
from .state import AllocatorState

__all__ = ["check_state"]

_MAX_TOKENS = 2**31


def check_state(state: AllocatorState) -> None:
    """Raise PageTableError with the first rule that the state breaks."""
    for rule in (
        _check_types,
        _check_sequences,
        _check_numbering,
        _check_sharing,
        _check_entries,
        _check_prefixes,
        _check_slots,
        check_groups,
    ):
        rule(state)


def _check_types(state: AllocatorState) -> None:
    for field in fields(state):
        value = getattr(state, field.name)
        if field.name not in ("page_size", "salt_keys", "groups"):
            axes = 2 if field.name == "tokens" else 1
            fits = isinstance(value, np.ndarray) and value.dtype.kind in "iu" and value.ndim == axes
            _require(fits, f"{field.name} must be an integer array of {axes} axes")


def _check_sequences(state: AllocatorState) -> None:
    lengths, computed, cached = state.lengths, state.computed, state.cached
    keys = state.salt_keys
    _require(len(set(keys)) == len(keys), "two salts are equal")
    for key in keys:
        try:
            valid = salt_key(salt_of(key)) == key
        except ValueError:
            valid = False
        _require(valid, f"salt {key[:40]!r} is not b'\\0', b's' and UTF-8, or b'b' and bytes")
    same = len(lengths) == len(computed) == len(cached) == len(state.salts)
    _require(same, "the columns of the sequences differ in length")
    for name, values in (("length", lengths), ("cached", cached)):
        _require(
            ((values >= 0) & (values <= _MAX_TOKENS)).all(),
            f"a sequence's {name} is outside 0..2**31",
        )
    _require(
        ((computed >= 0) & (computed <= lengths)).all(),
        "a sequence has more tokens computed than it has, or fewer than none",
    )
    _require(
        ((state.salts >= 0) & (state.salts < len(keys))).all(), "a sequence names no known salt"
    )
    total = int(state.page_counts.sum())
    _require(
        len(state.table) == total,
        f"the page table has {len(state.table)} entries, but the lengths need {total}",
    )
    _require(
        state.tokens.shape[1:] == (state.page_size,) and (state.tokens >= 0).all(),
        "a page holds a negative token, or another number of tokens than the page size",
    )
    _require((state.tokens < _MAX_TOKENS).all(), "a page holds a token beyond 2**31 - 1")


def _check_numbering(state: AllocatorState) -> None:
    num_pages, owned = state.num_pages, state.num_owned
    for name, ids in (("page table", state.table), ("prefix cache", state.entry_pages)):
        inside = ((ids >= 0) & (ids < num_pages)).all()
        _require(inside, f"the {name} names a page outside 0..{num_pages - 1}")
    named, first = np.unique(state.table, return_index=True)
    _require(
        len(named) == owned and (np.diff(first) > 0).all(),
        "pages are not numbered in the order in which the page table first names them",
    )
    only_cached = state.entry_pages[state.entry_pages >= owned]
    _require(
        np.array_equal(only_cached, np.arange(owned, num_pages)),
        "pages without an owner are not numbered in the order in which the prefix cache names them",
    )
    _require(
        len(np.unique(state.entry_pages)) == len(state.entry_pages),
        "the prefix cache names a page twice",
    )


def _check_sharing(state: AllocatorState) -> None:
    counts, columns = state.page_counts, state.columns
    check_sharing("page table", state.table, counts, columns, state.salts)


def _check_entries(state: AllocatorState) -> None:
    pages, parents = state.entry_pages, state.entry_parents
    _require(len(pages) == len(parents), "the columns of the prefix cache differ in length")
    known = (parents < np.arange(len(pages))) & (parents >= -len(state.salt_keys))
    _require(known.all(), "an entry's parent is neither an earlier entry nor a known salt")
    column, salt = np.full((2, state.num_pages), -1, np.int64)
    column[state.table] = state.columns
    salt[state.table] = np.repeat(state.salts, state.page_counts)
    depth = np.zeros(len(pages), np.int64)
    root = np.zeros(len(pages), np.int64)
    for at, parent in enumerate(parents.tolist()):
        depth[at], root[at] = (depth[parent] + 1, root[parent]) if parent >= 0 else (0, -1 - parent)
    owned = pages < state.num_owned
    _require(
        (column[pages][owned] == depth[owned]).all() and (salt[pages][owned] == root[owned]).all(),
        "an entry is published for another place or salt than its page has in a sequence",
    )
    _require(
        np.array_equal(np.sort(state.evictable), np.flatnonzero(~owned)),
        "the order of eviction does not name exactly the entries without an owner, once each",
    )


def _check_prefixes(state: AllocatorState) -> None:
    """What can be found by its tokens: each prefix once, and none that its page does not follow."""
    contents = state.contents
    prefixes: dict[tuple[int, int], int] = {}  # what a page is found by: parent and content
    for parent, page in zip(state.entry_parents.tolist(), state.entry_pages.tolist(), strict=True):
        prefixes.setdefault((parent, contents[page]), len(prefixes))
    _require(len(prefixes) == len(state.entry_pages), "two entries are of one prefix")
    entry_of = dict(zip(state.entry_pages.tolist(), range(len(prefixes)), strict=True))
    for salt, table in zip(state.salts.tolist(), state.tables, strict=True):
        before: int | None = -1 - salt
        for page in table.tolist():
            found = None if before is None else prefixes.get((before, contents[page]))
            _require(
                entry_of.get(page, found) == found,
                "an entry follows other tokens than its page does in a sequence",
            )
            before = found


def _check_slots(state: AllocatorState) -> None:
    _require(not state.tokens[state.empty_slots].any(), "a slot that holds nothing has a token")
