"""Inspect, verify, load and compact hold every file of a chain to one set of rules."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from paged_decode import (
    SnapshotCorrupt,
    SnapshotError,
    SnapshotMismatch,
    compact_snapshot,
    import_sequence,
    inspect_snapshot,
    load_snapshot,
    save_snapshot,
    verify_snapshot,
)

from ..tiny import make_engine
from . import independent_reader
from .forge import build, put, replace
from .small import make_allocator, make_cache
from .test_deltas import chain

NAMES = ("0", "1", "2")  # the oldest first; 2 is a delta of 1, which is one of 0


def rebuild(folder, broken: str, change) -> None:
    """Change the arrays of one file; the ids that its children name are made right."""
    ident, pages = None, 0
    for name in NAMES:
        fields, arrays, _ = independent_reader.read(folder / name)
        if name == broken:
            change(arrays)
        if ident is not None:
            fields["parent"] = [ident, fields["parent"][1], pages]
        (folder / name).write_bytes(build(fields, arrays))
        ident, pages = independent_reader.read(folder / name)[2], fields["pages"]


def outcomes(path) -> list:
    """What each of the four says: None, or the class of its error."""
    cache, allocator, folded = make_cache(60), make_allocator(60), Path(f"{path}.folded")
    folded.unlink(missing_ok=True)
    each = (
        lambda: inspect_snapshot(path),
        lambda: verify_snapshot(path),
        lambda: load_snapshot(path, cache, allocator),
        lambda: compact_snapshot(path, folded),
    )
    found = []
    for call in each:
        try:
            call()
        except SnapshotError as error:
            found.append(type(error))
        else:
            found.append(None)
    if found[2] is not None:
        assert allocator.num_free == 59 and not cache.is_deleted
        assert not folded.exists()
    return found


def kv_rows(pick):
    def change(arrays):
        arrays |= {n: pick(a) for n, a in arrays.items() if n.startswith("kv/")}

    return change


def longer(a, by):
    return np.concatenate([a, np.zeros((by, *a.shape[1:]), a.dtype)])


def without_keys_and_values(arrays):
    for name in [n for n in arrays if n.startswith("kv/")]:
        del arrays[name]


ROWS = {
    "a row too few": (kv_rows(lambda a: a[:-1]), SnapshotCorrupt),
    "a row too many": (kv_rows(lambda a: longer(a, 1)), SnapshotCorrupt),
    "five rows too many": (kv_rows(lambda a: longer(a, 5)), SnapshotCorrupt),
    "no row": (kv_rows(lambda a: a[:0]), SnapshotCorrupt),
    "rows differ": (
        lambda a: a.update({"kv/k_pages/0": longer(a["kv/k_pages/0"], 1)}),
        SnapshotCorrupt,
    ),
    "no array of keys and values": (without_keys_and_values, SnapshotError),
    "an array missing": (lambda a: a.pop("kv/v_pages/1"), SnapshotMismatch),
    "an array more": (
        lambda a: a.update({"kv/x": a["kv/v_pages/1"]}),
        SnapshotMismatch,
    ),
    "other bits": (
        lambda a: a.update({"kv/k_pages/0": a["kv/k_pages/0"].astype("f2")}),
        SnapshotMismatch,
    ),
    "a wider page": (kv_rows(lambda a: np.concatenate([a, a], axis=-1)), SnapshotMismatch),
    "a length": (put("sequence/length", 0, -1), SnapshotCorrupt),
    "an entry": (put("entry/parent", 0, 7), SnapshotCorrupt),
    "an unknown array": (lambda a: a.update(zzz=np.zeros(1)), SnapshotCorrupt),
    "a missing array": (lambda a: a.pop("salt/bytes"), SnapshotCorrupt),
}


@pytest.mark.parametrize("broken", NAMES)
@pytest.mark.parametrize("name", ROWS)
def test_all_four_refuse_what_one_refuses_in_any_file_of_the_chain(tmp_path, name, broken):
    chain(tmp_path)
    change, error = ROWS[name]
    rebuild(tmp_path, broken, change)
    found = outcomes(tmp_path / "2")
    assert all(kind is not None and issubclass(kind, error) for kind in found), found


@pytest.mark.parametrize("broken", NAMES)
@pytest.mark.parametrize("name", ["a row too few", "a length", "a missing array", "an array more"])
def test_an_error_names_the_broken_file_of_a_chain_once_in_its_text_and_as_path(
    tmp_path, name, broken
):
    chain(tmp_path)
    rebuild(tmp_path, broken, ROWS[name][0])
    for call in (inspect_snapshot, verify_snapshot, load_snapshot, compact_snapshot):
        with pytest.raises(SnapshotError) as caught:
            call(tmp_path / "2")
        found, text = caught.value.path, str(caught.value)
        assert found is not None and text.startswith(f"{found}: ") and text.count(str(found)) == 1
        if name != "an array more":  # that of the newest is missed in the first parent
            assert found == tmp_path / broken


def test_errors_about_what_a_file_is_of_name_it_too(tmp_path):
    cache, allocator = make_cache(9), make_allocator(9)
    save_snapshot(tmp_path / "s", cache, allocator)
    (tmp_path / "cut").write_bytes((tmp_path / "s").read_bytes()[:40])
    (tmp_path / "later").write_bytes(b"\x89PGD\r\n\x1a\n\x09" + bytes(60))
    other = make_allocator(9, fingerprint=b"other")
    calls = {
        "s": lambda path: load_snapshot(path, cache, other),
        "cut": inspect_snapshot,
        "later": inspect_snapshot,
    }
    for name, call in (*calls.items(), ("s", import_sequence), ("s", make_engine().restore)):
        with pytest.raises(SnapshotError) as caught:
            call(tmp_path / name)
        assert caught.value.path == tmp_path / name
        assert str(caught.value).startswith(f"{tmp_path / name}: ")
    assert SnapshotError("of no file").path is None


SOURCES = {
    "a row twice": lambda s: np.where(s == 1, 0, s),
    "a row left out": lambda s: np.where(s >= 1, s + 1, s),
    "rows out of order": lambda s: np.where(s == 0, 1, np.where(s == 1, 0, s)),
    "a page that the parent does not have": lambda s: np.where(s < 0, -100, s),
    "one more new page than rows": lambda s: np.where(
        np.cumsum(s < 0) == 1, (s >= 0).cumsum(), s + (np.cumsum(s < 0) >= 1) * (s >= 0)
    ),
    "a page of the parent in place of a row": lambda s: np.where(s == s.max(), -1, s),
    "too short": lambda s: s[:-1],
    "64 bits": lambda s: s.astype(np.int64),
}


@pytest.mark.parametrize("broken", NAMES[1:])
@pytest.mark.parametrize("name", SOURCES)
def test_all_four_refuse_sources_that_are_not_rows_and_pages_of_the_parent(tmp_path, name, broken):
    chain(tmp_path)

    def change(arrays):
        arrays["pages/source"] = SOURCES[name](arrays["pages/source"])

    rebuild(tmp_path, broken, change)
    assert outcomes(tmp_path / "2") == [SnapshotCorrupt] * 4


@pytest.mark.parametrize("rows", [0, 1, 2, 5])
def test_a_delta_of_one_page_has_one_row_if_it_is_new_and_none_if_it_is_the_parents(tmp_path, rows):
    cache, allocator = make_cache(9), make_allocator(9)
    handle = allocator.allocate(range(4))
    allocator.commit(handle, 4)

    save_snapshot(tmp_path / "base", cache, allocator)
    fields, arrays, ident = independent_reader.read(tmp_path / "base")
    for source in (0, -1):
        kv = {n: np.repeat(a, rows, axis=0) for n, a in arrays.items() if n.startswith("kv/")}
        delta = arrays | kv | {"pages/source": np.array([source], np.int32)}
        path = tmp_path / "delta"
        path.write_bytes(build(fields, delta, lambda f: f | {"parent": [ident, "base", 1]}))
        sound = rows == (source == 0)
        assert outcomes(path) == [None if sound else SnapshotCorrupt] * 4


def test_several_pages_may_be_the_same_page_of_the_parent(tmp_path):
    cache, allocator = make_cache(9), make_allocator(9)
    handle = allocator.allocate([1, 1, 1, 1] * 2)
    allocator.commit(handle, 8)

    save_snapshot(tmp_path / "base", cache, allocator)
    fields, arrays, ident = independent_reader.read(tmp_path / "base")
    kv = {n: a[:0] for n, a in arrays.items() if n.startswith("kv/")}
    delta = arrays | kv | {"pages/source": np.array([-1, -1], np.int32)}
    path = tmp_path / "delta"
    path.write_bytes(build(fields, delta, lambda f: f | {"parent": [ident, "base", 2]}))
    assert outcomes(path) == [None] * 4
    np.testing.assert_array_equal(
        independent_reader.pages(tmp_path / "delta.folded", "kv/k_pages/0"),
        arrays["kv/k_pages/0"][[0, 0]],
    )


def test_a_whole_file_with_a_list_of_sources_and_a_delta_without_one_are_refused(tmp_path):
    chain(tmp_path)
    rebuild(tmp_path, "0", replace("sequence/cached", [0, 0]))
    assert outcomes(tmp_path / "2") == [None] * 4
    fields, arrays, _ = independent_reader.read(tmp_path / "2")
    delta = {n: a for n, a in arrays.items() if n != "pages/source"}
    (tmp_path / "2").write_bytes(build(fields, delta))
    assert outcomes(tmp_path / "2") == [SnapshotCorrupt] * 4
    (tmp_path / "2").write_bytes(build(fields | {"parent": None}, arrays))
    assert outcomes(tmp_path / "2") == [SnapshotCorrupt] * 4
