"""A state in other groups of layers: one group becomes several, or sees a window of its tokens."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from .group_state import GroupState
from .state import AllocatorState
from .windows import first_column

__all__ = ["regrouped"]


def regrouped(
    state: AllocatorState, wanted: Sequence[tuple[int, int | None]]
) -> tuple[AllocatorState, tuple[np.ndarray, ...]]:
    """The same sequences and entries in other groups; the first group stays.

    A window that becomes narrower, or that all tokens become, lets go of the columns that it has
    passed. Pages of entries stay where a sequence has them, and in the last columns before the end
    of what can be found: nobody goes on from further in front. What is not computed yet stays as
    far as a window reaches.

    Args:
      wanted: of every group but the first, from which group of the state its pages come, and its
        window.

    Returns:
      The state, and for every group int64 `[M']`: which pages of the group that they come from its
      pages are.

    Raises:
      ValueError: a window would become wider: pages that it needs were given back.
    """
    sources = [state.first_group, *state.groups]
    found = [_narrowed(state, sources[source], window) for source, window in wanted]
    kept = (np.arange(state.num_pages), *(pages for _, pages in found))
    return replace(state, groups=tuple(group for group, _ in found)), kept


def _narrowed(
    state: AllocatorState, group: GroupState, window: int | None
) -> tuple[GroupState, np.ndarray]:
    if window == group.window:
        return group, np.arange(group.num_pages)
    if window is None or (group.window is not None and window > group.window):
        raise ValueError(f"a window of {group.window} tokens cannot become one of {window}")
    size, computed = state.page_size, state.computed
    first = np.maximum(group.first, first_column(computed, window, size))
    end = group.end
    if group.window is None:
        end = np.minimum(end, -(-(computed + window) // size))
    column, counts = group.columns, group.page_counts
    held = (column >= np.repeat(first, counts)) & (column < np.repeat(end, counts))
    table, idle = group.table[held], group.evicted_first
    near = _columns_behind(state) < -(-(window - 1) // size)
    stays = np.isin(group.entry_pages, table) | near[group.entries]
    entries, pages = group.entries[stays], group.entry_pages[stays]
    passed = pages[pages < group.num_owned].tolist()  # of which those in the table have an owner
    order, passed = [*passed, *idle], {*passed, *idle[: group.num_passed]}
    return GroupState.of(window, (first, end), table, entries, pages, order, passed)


def _columns_behind(state: AllocatorState) -> np.ndarray:
    """int64 `[E]`: how many columns behind each entry the nearest one is that has no child."""
    behind = np.full(len(state.entry_pages), -1, np.int64)
    for entry in range(len(behind) - 1, -1, -1):  # children come before their parents
        behind[entry] = max(0, behind[entry])
        if (parent := int(state.entry_parents[entry])) >= 0:
            through = behind[entry] + 1
            behind[parent] = through if behind[parent] < 0 else min(behind[parent], through)
    return behind
