"""Files of format version 2 that break one rule each, and are sound otherwise."""

from __future__ import annotations

import numpy as np
import pytest

from paged_decode import SnapshotCorrupt, inspect_snapshot, load_snapshot, save_snapshot

from . import independent_reader
from .forge import build, put, replace, swap
from .grouped import TWO, Life, allocator_of, cache_of
from .test_hostile import MIB, refused  # noqa: F401  (a fixture)


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    """Three sequences: a fork that shares a tail, one in mid-prompt, one that was only begun."""
    life = Life(TWO)
    life.prefill([*range(14)])
    life.handles += life.allocator.fork(life.handles[0])
    life.grow([[30, 31, 32], [40, 41, 42]])
    life.prefill([*range(60, 80)], end=9)
    path = tmp_path_factory.mktemp("groups") / "s"
    save_snapshot(path, life.cache, life.allocator, handles=life.handles, metadata={"a": 1})
    fields, arrays, _ = independent_reader.read(path)
    assert build(fields, arrays) == path.read_bytes()
    return path, fields, arrays


def test_what_the_sample_holds(sample):
    """Computed 17, 17 and 9; windows of 6 tokens in pages of 4."""
    path, fields, _ = sample
    assert fields["groups"] == [[0, 12, [1]], [6, 10, [0, 2]]]
    assert independent_reader.held(path, 1) == [(3, [0, 1]), (3, [2, 3]), (1, [4, 5])]


def group(number: int, at: int, value):
    def change(fields):
        groups = [list(each) for each in fields["groups"]]
        groups[number][at] = value
        return fields | {"groups": groups}

    return change


FIELDS = {
    "no list": (lambda f: f | {"groups": {}}, "groups is not a list"),
    "one group": (lambda f: f | {"groups": f["groups"][:1]}, "not a list of 2"),
    "too many": (lambda f: f | {"groups": f["groups"] * 200}, "not a list of 2 to 256"),
    "two fields": (lambda f: f | {"groups": [[0, 12], [6, 10]]}, "a group is not"),
    "window text": (group(1, 0, "6"), "window is not an integer"),
    "window -1": (group(1, 0, -1), "window is -1"),
    "window 2^31+1": (group(1, 0, 2**31 + 1), "window is 2147483649"),
    "first with a window": (group(0, 0, 6), "first group has a window"),
    "other pages than the header": (group(0, 1, 11), "other pages than the header"),
    "pages true": (group(1, 1, True), "pages is not an integer"),
    "pages 2^31": (group(1, 1, 2**31), "more pages than it names"),
    "a page less": (group(1, 1, 9), "has 10 rows for 9 pages"),
    "layers text": (group(1, 2, "02"), "a group is not"),
    "layer -1": (group(1, 2, [0, -1]), "layer is -1"),
    "a layer twice": (group(1, 2, [0, 0]), "not the layers 0 to L-1"),
    "a layer of two groups": (group(1, 2, [0, 1]), "not the layers 0 to L-1"),
    "a layer left out": (group(1, 2, [0]), "arrays of keys and values|has 10 rows"),
    "a layer without arrays": (group(1, 2, [0, 2, 3]), "not those of the groups' layers"),
    "layers exchanged": (
        lambda f: f | {"groups": [[0, 12, [0, 2]], [6, 10, [1]]]},
        "rows for 12 pages|rows for 10 pages",
    ),
    "no groups": (lambda f: {k: v for k, v in f.items() if k != "groups"}, "kv/|does not have"),
}


@pytest.mark.parametrize("name", FIELDS)
def test_groups_of_a_header_that_break_their_rule_are_refused(refused, sample, name):  # noqa: F811
    _, fields, arrays = sample
    change, text = FIELDS[name]
    refused(build(change(fields), arrays), text)


STATES = {
    "first -1": (put("group/1/first", 0, -1), "columns that it does not have"),
    "first past the end": (put("group/1/first", 0, 6), "columns that it does not have"),
    "first past what is seen": (put("group/1/first", 2, 2), "lacks a page"),
    "first 2^62": (put("group/1/first", 0, 2**62), "columns that it does not have"),
    "end before what is computed": (put("group/1/end", 0, 4), "lacks a page"),
    "end past the length": (put("group/1/end", 0, 6), "columns that it does not have"),
    "end 2^62": (put("group/1/end", 0, 2**62), "columns that it does not have"),
    "one more page": (put("group/1/first", 0, 2), "page table has 6 entries"),
    "columns differ": (replace("group/1/first", [3, 3]), "sequences differ in length"),
    "page -1": (put("group/1/pages", 0, -1), "outside 0..9"),
    "page M": (put("group/1/pages", 0, 10), "outside 0..9"),
    "page twice": (put("group/1/pages", 1, 0), "numbered|twice"),
    "pages out of order": (swap("group/1/pages", 0, 1), "not numbered in the order"),
    "two places": (put("group/1/pages", 3, 0), "numbered|place"),
    "entry without page": (
        replace("group/1/entry_page", [6, 7, 8, 0, 2, 9, 4, 5, 1]),
        "columns of the entries",
    ),
    "entry unknown": (put("group/1/entry", 6, 7), "entries are not known ones"),
    "entry -1": (put("group/1/entry", 0, -1), "entries are not known ones"),
    "entry twice": (put("group/1/entry", 1, 0), "entries are not known ones"),
    "entries out of order": (swap("group/1/entry", 0, 1), "entries are not known ones"),
    "a page of two entries": (put("group/1/entry_page", 6, 2), "two entries have one page"),
    "entry page M": (put("group/1/entry_page", 0, 10), "outside 0..9"),
    "entry pages out of order": (swap("group/1/entry_page", 0, 1), "not numbered in the order"),
    "entry at another place": (swap("group/1/entry_page", 3, 6), "at another place or salt"),
    "entry of another prefix": (swap("group/1/entry_page", 3, 4), "of more than one prefix"),
    "evictable missing": (
        lambda a: (replace("group/1/evictable", [0, 1, 2])(a), put("group/1/passed", 0, 3)(a)),
        "order of eviction",
    ),
    "evictable twice": (put("group/1/evictable", 0, 1), "order of eviction"),
    "evictable but used": (replace("group/1/evictable", [0, 1, 2, 5, 3]), "order of eviction"),
    "evictable unknown": (put("group/1/evictable", 0, 7), "order of eviction"),
    "passed -1": (put("group/1/passed", 0, -1), "-1 of 4 pages"),
    "passed more than there are": (put("group/1/passed", 0, 5), "5 of 4 pages"),
    "passed twice": (replace("group/1/passed", [4, 4]), "passed has not one value"),
    "another dtype": (replace("group/1/first", [3, 3, 1], np.int32), "not int64 with 1"),
    "another rank": (replace("group/1/pages", [[0, 1, 2, 3, 4, 5]]), "more pages|with 2 axes"),
    "missing": (lambda a: a.pop("group/1/end"), "group/1/end is missing"),
    "a third group": (
        lambda a: a.update({"group/2/end": a["group/1/end"]}),
        "arrays that the format does not have",
    ),
    "source without parent": (
        lambda a: a.update({"group/1/source": np.zeros(10, np.int32)}),
        "only a delta, has group/1/source",
    ),
    "a row less": (
        lambda a: a.update({"kv/k_pages/2": a["kv/k_pages/2"][:-1]}),
        "kv/k_pages/2 has 9 rows for 10 pages",
    ),
    "no layer": (
        lambda a: a.update({"kv/k_pages/x": a["kv/k_pages/2"]}),
        "not those of the groups' layers",
    ),
    "layer 02": (
        lambda a: a.update({"kv/k_pages/02": a["kv/k_pages/2"]}),
        "not those of the groups' layers",
    ),
}


@pytest.mark.parametrize("name", STATES)
def test_bookkeeping_of_a_group_that_contradicts_itself_is_refused(refused, sample, name):  # noqa: F811
    _, fields, arrays = sample
    change, text = STATES[name]
    arrays = dict(arrays)
    change(arrays)
    refused(build(fields, arrays), text)


def test_a_page_that_sequences_of_other_tokens_share_is_refused(refused, sample):  # noqa: F811
    _, fields, arrays = sample
    shared = dict(arrays)
    for name, value in dict(
        pages=[0, 1, 0, 2, 3, 4],  # column 3, where the two have parted
        entry=[0, 1, 2, 5, 6],
        entry_page=[5, 6, 7, 8, 3],
        evictable=[0, 1, 2, 3],
    ).items():
        shared[f"group/1/{name}"] = np.array(value, np.int32)
    shared |= {n: a[:9] for n, a in arrays.items() if n.startswith("kv/") and len(a) == 10}
    refused(build(group(1, 1, 9)(fields), shared), "of more than one prefix")


def test_a_file_that_is_refused_leaves_cache_and_allocator_as_they_were(tmp_path, sample):
    _, fields, arrays = sample
    arrays = dict(arrays)
    put("group/1/first", 2, 0)(arrays)
    (tmp_path / "s").write_bytes(build(fields, arrays))
    allocator, cache = allocator_of(TWO), cache_of(TWO)
    with pytest.raises(SnapshotCorrupt):
        load_snapshot(tmp_path / "s", cache, allocator)
    assert allocator.stats(0).used == allocator.stats(1).used == 0


def test_axes_without_elements_name_no_pages(refused, sample):  # noqa: F811
    _, fields, arrays = sample

    def claim(fields):
        fields["groups"] = [[0, 12, [1]], [6, 2**31, [0, 2]]]
        for entry in fields["arrays"]:
            if entry[0] == "group/1/pages":
                entry[2], entry[3] = [2**31, 0], b""

    arrays = arrays | {"group/1/pages": np.zeros((0,), np.int32)}
    refused(build(fields, arrays, claim), "more pages than it names", budget=4 * MIB)
    assert inspect_snapshot(sample[0]).groups[1].layers == (0, 2)
