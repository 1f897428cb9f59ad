"""Parents are looked for beside the file itself, behind whatever links lead to it."""

from __future__ import annotations

import os

import pytest

from paged_decode import (
    SnapshotMismatch,
    compact_snapshot,
    inspect_snapshot,
    load_snapshot,
    save_snapshot,
    verify_snapshot,
)

from .small import make_allocator, make_cache


@pytest.fixture
def grown(tmp_path, monkeypatch):
    """Folders `real` and `links`, and something to save that grows by a sequence at every call."""
    for name in ("real", "links"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    cache, allocator = make_cache(40), make_allocator(40)

    def save(path, parent=None):
        handle = allocator.allocate([allocator.num_used] * 8)
        allocator.commit(handle, 8)
        return save_snapshot(path, cache, allocator, parent=parent)

    return save


def all_four_read(path) -> None:
    pages = inspect_snapshot(path).num_pages
    assert verify_snapshot(path).num_pages == pages
    assert load_snapshot(path, make_cache(40), make_allocator(40)).pages_loaded == pages
    folded = compact_snapshot(path, "folded")
    assert folded.num_pages == pages and folded.parent is None


def link(name: str, target: str) -> str:
    os.symlink(target, name)
    return name


def test_a_delta_that_was_saved_through_a_link_loads_through_it_and_directly(grown):
    base = grown("real/base")
    grown(link("links/delta", "../real/delta"), base)  # dangles until it is written
    assert os.path.islink("links/delta")
    all_four_read("links/delta")
    all_four_read("real/delta")


def test_a_parent_that_was_saved_through_a_link_is_named_as_it_lies_there(grown):
    base = grown(link("links/other name", "../real/base"))
    grown("real/delta", base)
    assert inspect_snapshot("real/delta").parent.name == "base"
    os.unlink("links/other name")
    all_four_read("real/delta")


def test_a_link_to_a_parent_serves_where_it_lies_beside_the_delta(grown):
    base = grown(link("links/base", "../real/base"))
    middle = grown("links/middle", base)
    assert inspect_snapshot("links/middle").parent.name == "base"
    grown("links/last", middle)
    all_four_read("links/last")


def test_a_chain_whose_middle_is_a_link_goes_on_in_the_folder_of_the_file(grown):
    middle = grown("real/middle", grown("real/base"))
    link("links/middle", "../real/middle")
    grown("real/last", middle)
    os.rename("real/last", "links/last")  # its parent is a link here, whose parent is over there
    all_four_read("links/last")


def test_a_folder_may_be_a_link_and_a_way_may_lead_back_through_one(grown):
    link("alias", "real")
    link("links/deep", "../real")
    base = grown("alias/base")
    second = grown("real/second", base)
    third = grown("links/deep/../real/third", second)  # the parent of `deep` is the top folder
    assert sorted(os.listdir("real")) == ["base", "second", "third"]
    grown("alias/../real/fourth", third)
    for path in ("alias/fourth", "links/deep/fourth", "links/deep/../real/fourth"):
        all_four_read(path)


def test_a_delta_beside_the_link_and_not_beside_its_parent_is_refused_before_it_is_written(grown):
    base = grown(link("links/base", "../real/base"))
    os.unlink("links/base")
    with pytest.raises(ValueError, match="removed or replaced"):
        grown("links/delta", base)
    base = grown("real/base")
    with pytest.raises(ValueError, match="folder of its parent, .*real"):
        grown("links/delta", base)
    assert os.listdir("links") == []


def test_a_link_that_was_turned_to_another_file_is_noticed(grown):
    base = grown(link("links/base", "../real/one"))
    grown("real/two")
    os.unlink("links/base")
    link("links/base", "../real/two")
    with pytest.raises(ValueError, match="removed or replaced"):
        grown("real/delta", base)


def test_a_link_to_a_parent_is_a_parent_when_it_is_to_be_replaced(grown):
    base = grown("real/base")
    delta = grown("real/delta", base)
    for name, target in (("links/a", "../real/base"), ("links/b", "../real/delta")):
        with pytest.raises(ValueError, match="cannot replace its parent"):
            grown(link(name, target), delta)
    with pytest.raises(OSError, match="is a parent of"):
        compact_snapshot("real/delta", "links/a")
    all_four_read("real/delta")


def test_folding_through_a_link_replaces_the_file_and_not_the_link(grown):
    grown("real/delta", grown("real/base"))
    link("links/delta", "../real/delta")
    assert compact_snapshot("links/delta").parent is None
    assert os.path.islink("links/delta") and not os.path.islink("real/delta")
    os.unlink("real/base")
    all_four_read("real/delta")


def test_links_that_lead_nowhere_or_in_a_circle_are_errors_of_the_system(grown):
    link("links/a", "b")
    link("links/b", "a")
    link("links/nowhere", "gone")
    for read in (inspect_snapshot, verify_snapshot, compact_snapshot):
        for name in ("links/a", "links/nowhere"):
            with pytest.raises(OSError, match=name):
                read(name)
    with pytest.raises(OSError, match="links/a"):
        grown("links/a")
    base = grown("real/base")
    grown("real/delta", base)
    os.rename("real/base", "real/base of before")
    link("real/base", "gone")
    with pytest.raises(SnapshotMismatch, match="which is not in"):
        verify_snapshot("real/delta")
    os.unlink("real/base")
    link("real/base", "base")
    with pytest.raises(OSError, match="base"):
        verify_snapshot("real/delta")
    with pytest.raises(ValueError, match="removed or replaced"):
        grown("real/next", base)


def test_what_was_loaded_through_a_link_is_a_parent_of_what_is_saved_beside_the_file(
    grown, tmp_path
):
    grown("real/delta", grown("real/base"))
    link("links/delta", "../real/delta")
    allocator = make_allocator(40)
    restored = load_snapshot("links/delta", make_cache(40), allocator)
    handle = allocator.allocate([9] * 8)
    allocator.commit(handle, 8)
    for path in ("real/next", "links/next"):
        if path == "links/next":
            link(path, "../real/third")
        save_snapshot(path, restored.cache, allocator, parent=restored.snapshot)
        assert inspect_snapshot(path).parent.name == "delta"
        all_four_read(path)
