"""What a file costs to open grows with its bytes, not with what it claims or with a square."""

from __future__ import annotations

import time
import tracemalloc

import numpy as np
import pytest

from paged_decode import (
    BlockAllocator,
    SnapshotError,
    SnapshotMismatch,
    compact_snapshot,
    inspect_snapshot,
    load_snapshot,
    save_snapshot,
    verify_snapshot,
)
from paged_decode.allocator import AllocatorState

from .forge import build, plain, with_requests
from .small import make_allocator, make_cache

MIB = 1 << 20


def peak_of(work) -> int:
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("page_size", [1, 2**10, 2**24, 2**28, 2**31])
@pytest.mark.parametrize("requests", [False, True])
def test_a_file_without_pages_costs_nothing_whatever_page_size_it_claims(
    tmp_path, page_size, requests
):
    fields, arrays = plain(page_size, 0, [0, 0])
    path = tmp_path / "s"
    path.write_bytes(build(fields, with_requests(arrays, 2) if requests else arrays))
    into = make_cache(9), make_allocator(9)

    def work():
        assert inspect_snapshot(path).num_pages == verify_snapshot(path).num_pages == 0
        compact_snapshot(path, tmp_path / "t")
        with pytest.raises(SnapshotMismatch):
            load_snapshot(path, *into)

    assert peak_of(work) < 4 * MIB


@pytest.mark.parametrize("page_size", [1, 2**12, 2**24])
def test_an_empty_allocator_of_any_page_size_is_saved_and_loaded(tmp_path, page_size):
    pool = lambda: {"k": np.zeros((3, 5), np.int8)}  # noqa: E731
    saved, loaded = BlockAllocator(3, page_size), BlockAllocator(3, page_size)

    def work():
        save_snapshot(tmp_path / "s", pool(), saved)
        assert load_snapshot(tmp_path / "s", pool(), loaded).pages_loaded == 0

    work()  # compiles
    assert peak_of(work) < 4 * MIB
    assert (tmp_path / "s").stat().st_size < 2048


@pytest.mark.parametrize("shape", [[0, 2**31], [2**31, 0], [0] * 8, [0, *[2**31] * 7]])
@pytest.mark.parametrize("name", ["page/tokens", "sequence/length", "engine/stop_tokens", "kv/k"])
def test_axes_without_elements_size_nothing(tmp_path, name, shape):
    arrays = with_requests(plain(4, 0)[1], 0) | {"kv/k": np.zeros((0, 5), np.int8)}

    def claim(fields):
        for entry in fields["arrays"]:
            if entry[0] == name:
                entry[2] = shape

    path = tmp_path / "s"
    path.write_bytes(build(plain(4, 0)[0], arrays, claim))

    def work():
        for read in (inspect_snapshot, verify_snapshot, compact_snapshot):
            try:
                read(path)
            except SnapshotError:
                continue
            assert name == "kv/k" and shape[0] == 0

    assert peak_of(work) < 4 * MIB


@pytest.mark.parametrize("requests", [False, True])
def test_columns_are_worked_out_a_fixed_number_of_times_however_many_sequences(
    tmp_path, monkeypatch, requests
):
    counted, made = [], AllocatorState.page_counts.fget
    monkeypatch.setattr(
        AllocatorState, "page_counts", property(lambda s: counted.append(1) or made(s))
    )
    counts = []
    for number in (10, 400):
        table, kv = range(number), {"kv/k": np.zeros((number, 1), np.int8)}
        fields, arrays = plain(4, number, [3] * number, table, **kv)
        (tmp_path / "s").write_bytes(
            build(fields, with_requests(arrays, number) if requests else arrays)
        )
        counted.clear()
        verify_snapshot(tmp_path / "s")
        counts.append(len(counted))
    assert counts[0] == counts[1]


def test_a_page_that_sequences_share_is_digested_once(tmp_path):
    counts = []
    for number in (2, 300):
        kv = {"kv/k": np.zeros((2, 1), np.int8)}
        fields, arrays = plain(4, 2, [8] * number, [0, 1] * number, **kv)
        (tmp_path / "s").write_bytes(build(fields, arrays))
        digests = []

        def digest(key, payload, digests=digests):
            digests.append(payload)
            return payload[-32:]

        allocator = BlockAllocator(9, 4, digest=digest)
        load_snapshot(tmp_path / "s", {"k": np.zeros((9, 1), np.int8)}, allocator)
        counts.append(len(digests))
        allocator.check_invariants()
    assert counts[0] == counts[1]


def files_of(kind: str, number: int) -> bytes:
    kv = {"kv/k": np.zeros((number, 1), np.int8)}
    lengths, table = [4] * number, range(number)
    if kind == "one page of all":
        lengths, table, kv = [2**16] * number, [0] * number, {"kv/k": np.zeros((1, 1), np.int8)}
        fields, arrays = plain(2**16, 1, lengths, table, **kv)
    elif kind == "one slot of the page of all":
        kv = {"kv/k": np.zeros((1, 1), np.int8)}
        fields, arrays = plain(2**16, 1, [1] * number, [0] * number, **kv)
        arrays = with_requests(arrays, number)
    elif kind == "salts":
        salts = [b"s%d" % i for i in range(number)]
        fields, arrays = plain(4, number, lengths, table, **kv)
        arrays["salt/length"] = np.array([len(s) for s in salts], np.int64)
        arrays["salt/bytes"] = np.frombuffer(b"".join(salts), np.uint8)
    elif kind == "entries":
        fields, arrays = plain(4, number, **kv)
        arrays["page/tokens"] = np.arange(4 * number, dtype=np.int32).reshape(number, 4)
        arrays["entry/page"] = arrays["entry/evictable"] = np.arange(number, dtype=np.int32)
        arrays["entry/parent"] = np.arange(-1, number - 1, dtype=np.int32)
    else:
        fields, arrays = plain(4, number, lengths, table, **kv)
        waiting = number if kind == "siblings" else 0
        arrays = with_requests(arrays, number, waiting)
        if kind == "siblings":
            arrays["engine/sibling_of"][number + 1 :] = number
            arrays["engine/request"][number + 1 :] = number
            arrays["engine/sample"][number:] = np.arange(number)
        if kind == "events":
            for name in ("request", "sample", "index", "token", "reason", "shown", "top_length"):
                old = arrays[f"engine/event_{name}"]
                arrays[f"engine/event_{name}"] = np.zeros(number, old.dtype)
    return build(fields, arrays)


KINDS = ("one page of all", "one slot of the page of all", "salts", "entries", "running")
KINDS += ("siblings", "events")


@pytest.mark.parametrize("kind", KINDS)
def test_eight_times_as_much_takes_far_less_than_eight_times_eight_times_as_long(
    tmp_path, unchecked, kind
):
    """The least of three, and 30 where a square would be 64: a busy machine adds time."""
    least = []
    for number in (500, 4000):
        (tmp_path / "s").write_bytes(files_of(kind, number))
        seconds = []
        for _ in range(3):
            begin = time.perf_counter()
            verify_snapshot(tmp_path / "s")
            seconds.append(time.perf_counter() - begin)
        least.append(min(seconds))
    assert least[1] < 30 * max(least[0], 1e-3)


def test_rows_of_no_bytes_travel_whole_in_part_and_through_a_parent(tmp_path):
    pool = lambda n: {"k": np.zeros((n, 5), np.int8), "none": np.zeros((n, 0), np.int8)}  # noqa: E731
    allocator, cache = BlockAllocator(9, 4), pool(9)
    first = allocator.allocate(range(8))
    allocator.commit(first, 8)
    base = save_snapshot(tmp_path / "base", cache, allocator)
    allocator.allocate(range(20, 28))
    save_snapshot(tmp_path / "delta", cache, allocator, parent=base)
    compact_snapshot(tmp_path / "delta", tmp_path / "whole")
    for name in ("delta", "whole"):
        other = BlockAllocator(12, 4)
        assert load_snapshot(tmp_path / name, pool(12), other).pages_loaded == 4
        other.check_invariants()
