"""The allocator's state as arrays of the container, and back, with every type checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..allocator import AllocatorState, GroupState, check_state
from ..errors import PageTableError, SnapshotCorrupt
from ._format import ArraySpec, Header, SavedGroup

__all__ = [
    "STATE",
    "array_specs",
    "pack_bytes",
    "require_shapes",
    "require_split",
    "state_arrays",
    "state_from",
    "state_names",
    "typed",
    "unpack_bytes",
]

STATE = {
    "sequence/length": ("int64", 1),
    "sequence/computed": ("int64", 1),
    "sequence/cached": ("int64", 1),
    "sequence/salt": ("int32", 1),
    "sequence/pages": ("int32", 1),
    "entry/page": ("int32", 1),
    "entry/parent": ("int32", 1),
    "entry/evictable": ("int32", 1),
    "salt/length": ("int64", 1),
    "salt/bytes": ("uint8", 1),
    "page/tokens": ("int32", 2),
}
"""Name, dtype and number of axes of the arrays that every snapshot has."""

GROUP = {
    "first": "int64",
    "end": "int64",
    "pages": "int32",
    "entry": "int32",
    "entry_page": "int32",
    "evictable": "int32",
    "passed": "int64",
}
"""Name and dtype of the arrays, of one axis, of every group of layers but the first."""


def state_names(num_groups: int) -> dict[str, tuple[str, int]]:
    """`STATE` of a snapshot with so many groups."""
    own = {f"group/{i}/{n}": (kind, 1) for i in range(1, num_groups) for n, kind in GROUP.items()}
    return STATE | own


def state_arrays(state: AllocatorState) -> dict[str, np.ndarray]:
    """The state under the names and dtypes of `state_names`."""
    salt_lengths, salt_bytes = pack_bytes(state.salt_keys)
    columns: dict[str, Any] = {
        "sequence/length": state.lengths,
        "sequence/computed": state.computed,
        "sequence/cached": state.cached,
        "sequence/salt": state.salts,
        "sequence/pages": state.table,
        "entry/page": state.entry_pages,
        "entry/parent": state.entry_parents,
        "entry/evictable": state.evictable,
        "salt/length": salt_lengths,
        "salt/bytes": salt_bytes,
        "page/tokens": state.tokens,
    }
    for number, group in enumerate(state.groups, 1):
        columns |= {
            f"group/{number}/first": group.first,
            f"group/{number}/end": group.end,
            f"group/{number}/pages": group.table,
            f"group/{number}/entry": group.entries,
            f"group/{number}/entry_page": group.entry_pages,
            f"group/{number}/evictable": group.evictable,
            f"group/{number}/passed": [group.num_passed],
        }
    return typed(columns, state_names(1 + len(state.groups)))


def typed(
    columns: Mapping[str, Any], wanted: Mapping[str, tuple[str, int]]
) -> dict[str, np.ndarray]:
    """The columns as arrays of the wanted dtypes, in the order of those names, and no others."""
    if unknown := columns.keys() ^ wanted.keys():
        raise KeyError(f"columns {sorted(unknown)} are in one of the two alone")
    return {name: np.asarray(columns[name], dtype) for name, (dtype, _) in wanted.items()}


def state_from(arrays: Mapping[str, np.ndarray], header: Header) -> AllocatorState:
    """The checked state; raises SnapshotCorrupt."""
    pairs = enumerate(header.groups[1:], 1)
    groups = [_group_from(f"group/{number}", each, arrays) for number, each in pairs]
    state = AllocatorState(
        page_size=header.page_size,
        lengths=arrays["sequence/length"],
        computed=arrays["sequence/computed"],
        cached=arrays["sequence/cached"],
        salts=arrays["sequence/salt"],
        salt_keys=tuple(unpack_bytes("salt", arrays["salt/length"], arrays["salt/bytes"])),
        table=arrays["sequence/pages"],
        entry_pages=arrays["entry/page"],
        entry_parents=arrays["entry/parent"],
        evictable=arrays["entry/evictable"],
        tokens=arrays["page/tokens"],
        groups=tuple(groups),
    )
    try:
        check_state(state)
    except PageTableError as error:
        raise SnapshotCorrupt(str(error)) from None
    return state


def _group_from(name: str, group: SavedGroup, arrays: Mapping[str, np.ndarray]) -> GroupState:
    if len(passed := arrays[f"{name}/passed"]) != 1:
        raise SnapshotCorrupt(f"{name}/passed has not one value")
    return GroupState(
        window=group.window,
        num_pages=group.num_pages,
        first=arrays[f"{name}/first"],
        end=arrays[f"{name}/end"],
        table=arrays[f"{name}/pages"],
        entries=arrays[f"{name}/entry"],
        entry_pages=arrays[f"{name}/entry_page"],
        evictable=arrays[f"{name}/evictable"],
        num_passed=int(passed[0]),
    )


def array_specs(arrays: Mapping[str, np.ndarray]) -> list[ArraySpec]:
    return [ArraySpec(name, str(a.dtype), a.shape) for name, a in arrays.items()]


def require_shapes(specs: Mapping[str, ArraySpec], wanted: Mapping[str, tuple[str, int]]) -> None:
    """Raise SnapshotCorrupt unless every wanted array is there with its dtype and axes."""
    for name, (dtype, axes) in wanted.items():
        spec = specs.get(name)
        if spec is None:
            raise SnapshotCorrupt(f"array {name} is missing")
        if spec.dtype != dtype or len(spec.shape) != axes:
            raise SnapshotCorrupt(
                f"array {name} is {spec.dtype} with {len(spec.shape)} axes, not {dtype} with {axes}"
            )


def pack_bytes(strings: tuple[bytes, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Lengths int64 and the bytes one behind the other."""
    lengths = np.array([len(s) for s in strings], np.int64)
    return lengths, np.frombuffer(b"".join(strings), np.uint8)


def unpack_bytes(name: str, lengths: np.ndarray, data: np.ndarray) -> list[bytes]:
    require_split(name, lengths, len(data))
    ends = lengths.cumsum().tolist()
    return [data[end - n : end].tobytes() for end, n in zip(ends, lengths.tolist(), strict=True)]


def require_split(name: str, lengths: np.ndarray, total: int) -> None:
    """Raise SnapshotCorrupt unless the lengths are none negative and add up to `total`."""
    if (lengths < 0).any() or (lengths > total).any() or sum(lengths.tolist()) != total:
        raise SnapshotCorrupt(f"the lengths of {name} do not add up to its {total} entries")
