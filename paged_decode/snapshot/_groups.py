"""From which groups of layers of a file those of a cache take their pages."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import SnapshotMismatch
from ._format import SavedGroup, layer_of
from ._parts import Part

__all__ = ["GroupMismatch", "match_groups"]


class GroupMismatch(SnapshotMismatch):
    """The groups of layers are all that does not fit: tokens and requests do."""


def match_groups(
    saved: Sequence[SavedGroup], parts: list[Part], pools: Sequence[tuple[int, int | None]]
) -> tuple[list[int], list[str]]:
    """For each of our groups the one of the file that its pages come from, and what hinders that.

    Pages that a window has given back are nowhere, so none becomes wider, and the pages of two
    groups are not those of one. The first group has the tokens, and so comes from the first.
    """
    if len(saved) == len(pools) == 1:
        return [0], []
    ours: list[dict[int, int]] = [{} for _ in pools]  # layer: its group in the file
    known = {layer: at for at, group in enumerate(saved) for layer in group.layers}
    for part in parts:
        layer = layer_of(part.name)
        if layer is not None and layer in known:
            ours[part.group][layer] = known[layer]
    sources, problems = [0] * len(pools), []
    for number, (layers, (_, window)) in enumerate(zip(ours, pools, strict=True)):
        at = sorted(set(layers.values()))
        if len(at) > 1 or (number == 0 and at not in ([], [0])):
            problems.append(
                f"layers {_shown(layers)}, one group here, are in groups {at} of the file"
            )
            continue
        sources[number] = at[0] if at else 0
        theirs = saved[sources[number]].window
        if theirs is not None and (window is None or window > theirs):
            problems.append(
                f"layers {_shown(layers)} see {_tokens(theirs)} in the file, {_tokens(window)} "
                "here, and what that needs was given back"
            )
    return sources, problems


def _shown(layers: dict[int, int]) -> str:
    """A few of them."""
    first = [str(layer) for layer in sorted(layers)]
    return ", ".join([*first[:4], *(["..."] if len(first) > 4 else [])])


def _tokens(window: int | None) -> str:
    return "all tokens" if window is None else f"a window of {window} tokens"
