"""The rules of a state in groups of layers beside the first; that one has kept its own."""

import numpy as np

from .errors import PageTableError
from .group_state import GroupState
from .state import AllocatorState
from .windows import first_column

__all__ = ["check_groups", "check_sharing", "require"]

_MAX_WINDOW = 2**31


def require(holds: bool | np.bool_, message: str) -> None:
    if not holds:
        raise PageTableError(message)


def check_groups(state: AllocatorState) -> None:
    """Raise PageTableError with the first rule that is broken."""
    for number, group in enumerate(state.groups, 1):
        name = f"group {number}"
        _check_types(name, group)
        _check_spans(name, state, group)
        _check_numbering(name, state, group)
        check_sharing(name, group.table, group.page_counts, group.columns, state.salts)
    if state.groups:
        _check_prefixes(state)


def _check_types(name: str, group: GroupState) -> None:
    for field in ("first", "end", "table", "entries", "entry_pages", "evictable"):
        value = getattr(group, field)
        fits = isinstance(value, np.ndarray) and value.dtype.kind == "i" and value.ndim == 1
        require(fits, f"{name}: {field} must be an array of signed integers with 1 axis")
    window = group.window
    require(
        window is None or (type(window) is int and 1 <= window <= _MAX_WINDOW),
        f"{name}: the window must be None, or from 1 to 2**31",
    )


def _check_spans(name: str, state: AllocatorState, group: GroupState) -> None:
    """Which columns a sequence has pages in: those that its next query sees, at the least."""
    first, end = group.first, group.end
    require(
        len(first) == len(end) == len(state.lengths),
        f"{name}: the columns of the sequences differ in length",
    )
    counts = state.page_counts
    require(
        ((first >= 0) & (first <= end) & (end <= counts)).all(),
        f"{name}: a sequence has pages in columns that it does not have",
    )
    if group.window is None:
        all_of_them = (first == 0).all() and (end == counts).all()
        require(all_of_them, f"{name}: a sequence has not all of its pages, and there is no window")
    else:
        seen = first_column(state.computed, group.window, state.page_size)
        require(
            (first <= seen).all() and (end * state.page_size >= state.computed).all(),
            f"{name}: a sequence lacks a page that its next query sees",
        )
    total = int(group.page_counts.sum())
    require(
        len(group.table) == total,
        f"{name}: the page table has {len(group.table)} entries, but the sequences need {total}",
    )


def _check_numbering(name: str, state: AllocatorState, group: GroupState) -> None:
    num_pages, entries, pages = group.num_pages, group.entries, group.entry_pages
    require(len(entries) == len(pages), f"{name}: the columns of the entries differ in length")
    most = len(group.table) + len(pages)
    require(
        type(num_pages) is int and 0 <= num_pages <= most,
        f"{name}: of {num_pages} pages at most {most} are named",
    )
    for ids in (group.table, pages):
        inside = ((ids >= 0) & (ids < num_pages)).all()
        require(inside, f"{name}: a page is outside 0..{num_pages - 1}")
    named, first = np.unique(np.concatenate([group.table, pages]), return_index=True)
    require(
        len(named) == num_pages and (np.diff(first) > 0).all(),
        f"{name}: pages are not numbered in the order in which they are first named",
    )
    require(len(np.unique(pages)) == len(pages), f"{name}: two entries have one page")
    known = entries.size == 0 or (
        entries[0] >= 0 and entries[-1] < len(state.entry_pages) and (np.diff(entries) > 0).all()
    )
    require(known, f"{name}: entries are not known ones, in their order, once each")
    require(
        type(group.num_passed) is int and 0 <= group.num_passed <= len(group.evictable),
        f"{name}: {group.num_passed} of {len(group.evictable)} pages without an owner were passed",
    )
    require(
        np.array_equal(np.sort(group.evictable), np.flatnonzero(pages >= group.num_owned)),
        f"{name}: the order of eviction does not name exactly the pages of entries without an "
        "owner, once each",
    )


def check_sharing(
    name: str, table: np.ndarray, counts: np.ndarray, columns: np.ndarray, salts: np.ndarray
) -> None:
    """An owned page has one place and one salt, whoever its owners are."""
    owner = np.repeat(np.arange(len(counts)), counts)
    num_owned = int(table.max(initial=-1)) + 1
    pairs = owner * (num_owned + 1) + table
    require(len(np.unique(pairs)) == len(pairs), f"{name}: a sequence holds a page twice")
    for what, values in (("place", columns), ("salt", salts[owner])):
        seen = np.zeros(num_owned, np.int64)
        seen[table] = values
        require((seen[table] == values).all(), f"{name}: a shared page has more than one {what}")


def _check_prefixes(state: AllocatorState) -> None:
    """A page is of one prefix: that of its entry, and of every sequence that computed it.

    Prefixes get numbers column by column, so that only those of one column are kept: an entry has
    its own, what only sequences have is numbered behind them.
    """
    contents = state.contents
    depths = _check_companions(state)
    levels: dict[int, dict[tuple[int, int], int]] = {}
    parents, pages = state.entry_parents.tolist(), state.entry_pages.tolist()
    for entry, key in enumerate(zip(parents, pages, strict=True)):
        levels.setdefault(int(depths[entry]), {})[key[0], contents[key[1]]] = entry
    prefix_of = []  # of every page of every group
    for group in state.groups:
        known = np.full(group.num_pages, -1, np.int64)
        known[group.entry_pages] = group.entries
        prefix_of.append(known)
    full, number = state.computed // state.page_size, len(pages)
    tables, prefix = state.tables, (-1 - state.salts.astype(np.int64)).tolist()
    held = [(group.first, np.minimum(group.end, full), group.tables) for group in state.groups]
    rows = [row for row in (-full).argsort(kind="stable").tolist() if full[row]]
    for column in range(int(full.max(initial=0))):
        level = levels.pop(column, {})
        while full[rows[-1]] <= column:
            rows.pop()
        for row in rows:
            key = prefix[row], contents[tables[row][column]]
            prefix[row] = found = level.setdefault(key, number)
            number += found == number
            for at, (known, (first, end, table)) in enumerate(zip(prefix_of, held, strict=True), 1):
                if first[row] <= column < end[row]:
                    page = table[row][column - first[row]]
                    same = known[page] in (-1, found)
                    require(same, f"group {at}: a page is of more than one prefix")
                    known[page] = found


def _check_companions(state: AllocatorState) -> np.ndarray:
    """The page of an entry lies at its depth and under its salt; returns the depths."""
    depth, root = np.zeros((2, len(state.entry_pages)), np.int64)
    for at, parent in enumerate(state.entry_parents.tolist()):
        depth[at], root[at] = (depth[parent] + 1, root[parent]) if parent >= 0 else (0, -1 - parent)
    for number, group in enumerate(state.groups, 1):
        place = np.full(group.num_pages, -1, np.int64)
        salt = place.copy()
        place[group.table] = group.columns
        salt[group.table] = np.repeat(state.salts, group.page_counts)
        owned, entries = group.entry_pages < group.num_owned, group.entries
        its = group.entry_pages[owned]
        require(
            (place[its] == depth[entries[owned]]).all()
            and (salt[its] == root[entries[owned]]).all(),
            f"group {number}: the page of an entry is at another place or salt in a sequence",
        )
    return depth
