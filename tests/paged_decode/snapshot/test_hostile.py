"""Bytes that are not a snapshot are refused with their own message, and cost no memory.

Every rule of docs/snapshot_format.md is broken once by a file that is sound otherwise: its
lengths and checksums are right.
"""

from __future__ import annotations

import io
import pickle  # noqa: TID251  (to make a file that must not be unpickled)
import struct
import tracemalloc
import zipfile

import jax
import numpy as np
import pytest

from paged_decode import (
    SamplingParams,
    SnapshotCorrupt,
    SnapshotError,
    SnapshotVersion,
    inspect_snapshot,
    load_snapshot,
    save_snapshot,
    verify_snapshot,
)

from ..tiny import make_engine
from . import independent_reader
from .forge import build, pack, put, replace, swap
from .small import busy, make_allocator, make_cache

MIB = 1 << 20


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    """Path, header fields and arrays of a small sound snapshot."""
    cache, allocator, _ = busy()
    path = tmp_path_factory.mktemp("sound") / "s"
    save_snapshot(path, cache, allocator, metadata={"a": 1})
    fields, arrays, _ = independent_reader.read(path)
    assert build(fields, arrays) == path.read_bytes()
    return path, fields, arrays


@pytest.fixture
def refused(tmp_path):
    """Assert that bytes are refused by every entry, with a message, for next to no memory."""

    def check(data: bytes, text: str, error=SnapshotCorrupt, *, budget: int = 4 * MIB) -> None:
        path = tmp_path / "hostile"
        path.write_bytes(data)
        del data
        tracemalloc.start()
        try:
            for read in (inspect_snapshot, verify_snapshot):
                with pytest.raises(error, match=text):
                    read(path)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < budget

    return check


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> bytes:
    """One page of one layer: small enough for every bit of it."""
    allocator = make_allocator(4)
    allocator.allocate([1, 2, 3])
    path = tmp_path_factory.mktemp("tiny") / "s"
    save_snapshot(path, {"k": np.ones((4, 1, 4, 1), np.int8)}, allocator)
    return path.read_bytes()


def test_a_snapshot_cut_at_any_byte_is_refused_and_the_target_unchanged(tmp_path, tiny):
    data = tiny
    there, other = make_cache(30), make_allocator(30)
    path = tmp_path / "cut"
    for size in range(len(data)):
        path.write_bytes(data[:size])
        with pytest.raises(SnapshotCorrupt, match="cut|not a snapshot|bytes"):
            load_snapshot(path, there, other)
    assert other.num_free == 29 and not there.is_deleted


def test_every_single_bit_that_flips_is_noticed(tmp_path, tiny, unchecked):
    data = bytearray(tiny)
    path = tmp_path / "flipped"
    for bit in range(8 * len(data)):
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        with pytest.raises(SnapshotError):
            verify_snapshot(path)
        data[bit // 8] ^= 1 << bit % 8


def test_flipped_pages_are_noticed_by_load_and_leave_an_engine_decoding(tmp_path):
    engine = make_engine()
    engine.submit([1, 2, 3, 4, 5], SamplingParams(max_new_tokens=20))
    engine.step()
    engine.save(tmp_path / "s")
    data = (tmp_path / "s").read_bytes()
    other = make_engine()
    other.submit([7, 8, 9], SamplingParams(max_new_tokens=20))
    other.step()
    bits = [np.array(a).tobytes() for a in jax.tree.leaves(other.cache)]
    rng = np.random.default_rng(0)
    for place in rng.integers(0, len(data), 150):
        harmed = bytearray(data)
        harmed[place] ^= 1 << int(rng.integers(8))
        (tmp_path / "s").write_bytes(harmed)
        with pytest.raises(SnapshotError):
            other.restore(tmp_path / "s")
    assert bits == [np.array(a).tobytes() for a in jax.tree.leaves(other.cache)]
    other.allocator.check_invariants()
    assert len(list(other.stream())) > 0


def other_files() -> dict[str, bytes]:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as z:
        z.writestr("a", "b")
    table = io.BytesIO()
    np.savez(table, a=np.zeros(3))
    header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    return {
        "empty": b"",
        "pickle": pickle.dumps({"a": 1}),
        "zip": archive.getvalue(),
        "npz": table.getvalue(),
        "safetensors": struct.pack("<Q", len(header)) + header + bytes(4),
        "text": b"\x89PGD\n\x1a\n" + bytes(100),  # what a text mode makes of the magic
    }


@pytest.mark.parametrize("name", other_files())
def test_another_kind_of_file_is_no_snapshot(refused, name):
    refused(other_files()[name], "not a snapshot: it begins with")


@pytest.mark.parametrize("version", [0, 6, 2**31, 2**32 - 1])
def test_another_version_is_named_with_the_one_that_is_read(refused, version):
    refused(pack(b"\x80", version=version), f"version {version}, this .* 1 to 5", SnapshotVersion)


PREFIXES = {
    "header of no bytes": (pack(b""), "header claims 0 bytes"),
    "header over the cap": (pack(b"\x80", header_bytes=MIB + 1), "1 to 1048576 are allowed"),
    "header of 100 GiB": (pack(b"\x80", header_bytes=100 << 30), "claims 107374182400 bytes"),
    "header of 2^63": (pack(b"\x80", header_bytes=1 << 63), "claims 9223372036854775808 bytes"),
    "header past the end": (pack(b"\x80", header_bytes=5000), "the file has 64"),
    "file longer than it says": (pack(b"\x80") + b"\0", "has 65 bytes, its prefix says 64"),
    "two files in one": (pack(b"\x80") * 2, "has 128 bytes"),
    "file shorter than it says": (pack(b"\x80", file_bytes=1 << 62), "its prefix says"),
    "header checksum": (pack(b"\x80")[:-1] + b"\x01", "padding after byte 33 is not zero|keys"),
}


@pytest.mark.parametrize("name", PREFIXES)
def test_a_prefix_that_lies_is_refused(refused, name):
    refused(*PREFIXES[name])


def deep(levels: int) -> bytes:
    return b"\x91" * levels + b"\xc0"


def nested(levels: int) -> list:
    value: list = []
    for _ in range(levels):
        value = [value]
    return value


HEADERS = {
    "no map": (b"\x93\x01\x02\x03", "no map but list"),
    "empty map": (b"\x80", "keys are"),
    "key twice": (b"\x82\xa1a\x01\xa1a\x01", "shortest form, or names a key twice"),
    "integer key": (b"\x81\x01\x02", "not valid msgpack"),
    "long form": (b"\xcd\x00\x05", "shortest form"),
    "extension": (b"\xd4\x05\x00", "not valid msgpack"),
    "timestamp": (b"\xd6\xff\x00\x00\x00\x00", "not valid msgpack|no map|shortest"),
    "never used byte": (b"\xc1", "not valid msgpack"),
    "not UTF-8": (b"\xa2\xff\xfe", "not valid msgpack"),
    "nesting 900": (deep(900), "no map but list|not valid msgpack"),
    "nesting 2000": (deep(2000), "not valid msgpack"),
    "list of 4e9": (b"\xdd\xff\xff\xff\xff", "not valid msgpack"),
    "map of 4e9": (b"\xdf\xff\xff\xff\xff", "not valid msgpack"),
    "text of 4e9": (b"\xdb\xff\xff\xff\xff", "not valid msgpack"),
    "bytes of 4e9": (b"\xc6\xff\xff\xff\xff", "not valid msgpack"),
    "extension of 4e9": (b"\xc9\xff\xff\xff\xff\x05", "not valid msgpack"),
    "ends early": (b"\x92\x01", "not valid msgpack"),
    "goes on": (b"\x80\x80", "not valid msgpack"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_that_is_not_the_one_msgpack_is_refused(refused, name):
    body, text = HEADERS[name]
    refused(pack(body), text)


def test_a_megabyte_of_the_smallest_objects_costs_no_more_than_their_pointers(refused):
    for unit in (b"\x90", b"\x80", b"\xa0", b"\xc4\x00"):
        row = b"\xdc\xff\xff" + unit * 65535
        count = (MIB - 5) // len(row)
        refused(
            pack(b"\xdd" + struct.pack(">I", count) + row * count),
            "no map|shortest form",
            budget=128 * MIB,
        )


FIELDS = {
    "unknown key": (lambda f: f | {"zzz": 1}, "keys are"),
    "missing key": (lambda f: {k: v for k, v in f.items() if k != "pages"}, "keys are"),
    "order of keys": (lambda f: dict(reversed(f.items())), "keys are"),
    "fingerprint": (lambda f: f | {"fingerprint": "text"}, "fingerprint is not bytes"),
    "metadata": (lambda f: f | {"metadata": [1]}, "metadata must be a map"),
    "metadata value": (lambda f: f | {"metadata": {"a": [1]}}, "metadata must map"),
    "metadata size": (lambda f: f | {"metadata": {"a": 2**64 - 1}}, "does not fit 64 bits"),
    "page size 3": (lambda f: f | {"page_size": 3}, "power of two"),
    "page size 0": (lambda f: f | {"page_size": 0}, "page_size is 0, outside"),
    "pages 2^64-1": (lambda f: f | {"pages": 2**64 - 1}, "pages is 18446744073709551615"),
    "pages -1": (lambda f: f | {"pages": -1}, "pages is -1"),
    "one page more": (lambda f: f | {"pages": f["pages"] + 1}, "page/tokens is not"),
    "2^31 pages": (lambda f: f | {"pages": 2**31}, "page/tokens is not"),
    "4097 keys": (lambda f: f | {"metadata": {str(i): 1 for i in range(4097)}}, "max_map_len"),
    "parent short": (lambda f: f | {"parent": [b"x" * 16, "p"]}, "parent is not"),
    "parent id": (lambda f: f | {"parent": [b"x", "p", 1]}, "id is not 16 bytes"),
    "parent pages": (lambda f: f | {"parent": [b"x" * 16, "p", True]}, "pages is not an integer"),
    "arrays": (lambda f: f | {"arrays": {}}, "arrays is not a list"),
}
FIELDS |= {
    f"page_size {value!r}": (lambda f, v=value: f | {"page_size": v}, "page_size is not an integer")
    for value in (True, 4.0, "4", None)
}
FIELDS |= {
    f"{key} 1000 deep": (lambda f, k=key: f | {k: nested(1000)}, f"{key} is not")
    for key in ("page_size", "pages", "parent", "fingerprint")
}
FIELDS |= {
    f"parent {name!r}": (lambda f, n=name: f | {"parent": [b"x" * 16, n, 1]}, "same folder")
    for name in ("../s", "/etc/passwd", "a\\b", "..", ".", "", "C:x", "a\0b")
}


@pytest.mark.parametrize("name", FIELDS)
def test_a_header_field_that_breaks_its_rule_is_refused(refused, sample, name):
    _, fields, arrays = sample
    change, text = FIELDS[name]
    refused(build(fields, arrays, change), text)


def entry_with(at: int, value):
    def change(fields):
        fields["arrays"][0] = [value if i == at else x for i, x in enumerate(fields["arrays"][0])]

    return change


ENTRIES = {
    "not four": (lambda f: f["arrays"].__setitem__(0, [1, 2]), "an array is not"),
    "name": (entry_with(0, 5), "name is not text"),
    "empty name": (entry_with(0, ""), "name is not text"),
    "long name": (entry_with(0, "x" * 256), "name is not text"),
    "same name": (entry_with(0, "page/tokens"), "two arrays have one name"),
    "unknown name": (entry_with(0, "zzz"), "is missing"),
    "no axes": (entry_with(2, []), "list of 1 to 8 axes"),
    "64 axes": (entry_with(2, [1] * 64), "list of 1 to 8 axes"),
    "axis -1": (entry_with(2, [-1]), "an axis is -1"),
    "axis true": (entry_with(2, [True]), "axis is not an integer"),
    "axis 5.0": (entry_with(2, [5.0]), "axis is not an integer"),
    "axis 2^63": (entry_with(2, [2**63]), "an axis is 9223372036854775808"),
    "product over 2^63": (entry_with(2, [2**31] * 4), "bytes of checksums"),
    "huge and empty": (entry_with(2, [0, 2**31, 2**31]), "bytes of checksums|axes"),
    "more than the file": (entry_with(2, [10**6]), "bytes of checksums"),
    "fewer than the file": (entry_with(2, [1]), "arrays end at byte|padding|not what was written"),
    "checksums": (entry_with(3, "text"), "checksums are not bytes"),
    "no checksums": (entry_with(3, b""), "0 bytes of checksums for 1 chunks"),
    "wrong checksum": (entry_with(3, b"\0\0\0\0"), "chunk 0 is not what was written"),
}
ENTRIES |= {
    f"dtype {dtype!r}": (entry_with(1, dtype), "unknown dtype")
    for dtype in ("object", "V2", ">f4", "O", "int4", "bool", "complex64", 5, None)
}


@pytest.mark.parametrize("name", ENTRIES)
def test_a_directory_entry_that_breaks_its_rule_is_refused(refused, sample, name):
    _, fields, arrays = sample
    change, text = ENTRIES[name]
    refused(build(fields, arrays, change), text)


STATES = {
    "length -1": (put("sequence/length", 0, -1), "length is outside"),
    "length 2^31+1": (put("sequence/length", 0, 2**31 + 1), "length is outside"),
    "length beyond its pages": (put("sequence/length", 0, 13), "page table has"),
    "length zero with pages": (put("sequence/length", 0, 0), "more tokens computed|page table"),
    "computed -1": (put("sequence/computed", 0, -1), "more tokens computed"),
    "computed over length": (put("sequence/computed", 0, 11), "more tokens computed"),
    "cached -1": (put("sequence/cached", 0, -1), "cached is outside"),
    "salt unknown": (put("sequence/salt", 0, 9), "names no known salt"),
    "salt -1": (put("sequence/salt", 0, -1), "names no known salt"),
    "salt without tag": (put("salt/bytes", 0, 1), "is not b'"),
    "salt not UTF-8": (put("salt/bytes", 2, 255), "is not b'"),
    "salt lengths": (put("salt/length", 0, 2), "lengths of salt do not add up"),
    "salt length -1": (put("salt/length", 0, -1), "lengths of salt do not add up"),
    "salt length 2^62": (put("salt/length", 0, 2**62), "lengths of salt do not add up"),
    "page -1": (put("sequence/pages", 0, -1), "page table names a page outside"),
    "page M": (put("sequence/pages", 0, 9), "page table names a page outside"),
    "page twice": (put("sequence/pages", 1, 0), "numbered|twice"),
    "page left out": (put("sequence/pages", -1, 4), "numbered"),
    "pages out of order": (swap("sequence/pages", 0, 1), "not numbered in the order"),
    "two places": (put("sequence/pages", 5, 0), "more than one place|numbered|twice|salt"),
    "negative token": (put("page/tokens", (0, 0), -1), "negative token"),
    "entry page -1": (put("entry/page", 0, -1), "prefix cache names a page outside"),
    "entry page M": (put("entry/page", 0, 9), "prefix cache names a page outside"),
    "entry twice": (put("entry/page", 1, 0), "names a page twice|another place"),
    "entry is its parent": (put("entry/parent", 1, 1), "neither an earlier entry"),
    "parent later": (put("entry/parent", 0, 3), "neither an earlier entry"),
    "parent unknown salt": (put("entry/parent", 0, -9), "neither an earlier entry"),
    "entry at another place": (put("entry/parent", 1, -1), "another place or salt"),
    "entry under another salt": (put("entry/parent", 0, -2), "another place or salt"),
    "entry after other tokens": (
        lambda a: (swap("entry/page", 0, 2)(a), put("entry/evictable", 0, 0)(a)),
        "follows other tokens",
    ),
    "two entries of one prefix": (
        replace("page/tokens", np.zeros((9, 4)), np.int32),
        "two entries are of one prefix",
    ),
    "token in an empty slot": (put("page/tokens", (2, 3), 9), "slot that holds nothing"),
    "evictable twice": (put("entry/evictable", 0, 4), "order of eviction|not name exactly"),
    "evictable but used": (put("entry/evictable", 0, 0), "order of eviction"),
    "evictable missing": (replace("entry/evictable", []), "order of eviction"),
    "columns differ": (replace("sequence/cached", [0]), "columns of the sequences"),
    "entry columns differ": (replace("entry/parent", [-1]), "columns of the prefix cache"),
    "another dtype": (replace("sequence/length", [1.0], np.float64), "not int64 with 1"),
    "another rank": (replace("sequence/length", [[1]]), "with 2 axes"),
    "missing": (lambda a: a.pop("sequence/salt"), "sequence/salt is missing"),
    "unknown": (lambda a: a.update(zzz=np.zeros(1)), "arrays that the format does not have"),
    "source without parent": (
        lambda a: a.update({"pages/source": np.zeros(9, np.int32)}),
        "only a delta, has pages/source",
    ),
    "one page less": (
        lambda a: a.update({"kv/k_pages/0": a["kv/k_pages/0"][:-1]}),
        "kv/k_pages/0 has 8 rows for 9 pages",
    ),
}


@pytest.mark.parametrize("name", STATES)
def test_bookkeeping_that_contradicts_itself_is_refused(refused, sample, name):
    _, fields, arrays = sample
    change, text = STATES[name]
    arrays = dict(arrays)
    change(arrays)
    refused(build(fields, arrays), text)


@pytest.fixture(scope="module")
def engine_sample(tmp_path_factory):
    engine = make_engine(top_logits=2)
    engine.submit([1, 2, 3, 4, 5], SamplingParams(max_new_tokens=30, stop_tokens=(60,)), n=2)
    for i in range(4):
        engine.submit([4, 4, i], SamplingParams(max_new_tokens=30), cache_salt="s", n=2)
    engine.step()
    engine.cancel(4)
    path = tmp_path_factory.mktemp("engine") / "s"
    engine.save(path)
    fields, arrays, _ = independent_reader.read(path)
    return fields, arrays


ENGINES = {
    "request not below next_id": (put("engine/next_id", 0, 1), "not below next_id"),
    "next_id too large": (put("engine/next_id", 0, 2**53 + 1), "above 2"),
    "sample twice": (put("engine/sample", -1, 0), "sample of a request is there twice"),
    "next_id twice": (replace("engine/next_id", [9, 9]), "not one value"),
    "running more": (put("engine/running", 0, 5), "requests run, but there are"),
    "running -1": (put("engine/running", 0, -1), "cannot run"),
    "rows": (replace("engine/seed", [1]), "not one row per request"),
    "stop columns": (replace("engine/stop_tokens", np.zeros((10, 7))), "rows? per|8 columns"),
    "stop hole": (put("engine/stop_tokens", (0, 2), 5), "hole"),
    "tokens": (put("engine/length", 0, 500), "engine/tokens do not add up"),
    "negative token": (put("engine/tokens", 0, -3), "negative token"),
    "empty prompt": (put("engine/prompt_length", 0, 0), "prompt is empty"),
    "prompt too long": (put("engine/prompt_length", 0, 99), "prompt is empty or longer"),
    "sample -1": (put("engine/sample", 0, -1), "negative"),
    "temperature NaN": (put("engine/temperature", 0, np.nan), "temperature must be finite"),
    "top_p 0": (put("engine/top_p", 0, 0.0), "top_p must be"),
    "seed": (put("engine/seed", 0, 2**32), "seed must be"),
    "no tokens left": (put("engine/max_new_tokens", 0, 1), "ended already"),
    "other tokens": (put("engine/tokens", 0, 9), "other tokens or another salt"),
    "sibling of itself": (put("engine/sibling_of", 0, 0), "sibling does not follow"),
    "sibling of nobody": (put("engine/sibling_of", -1, 99), "sibling does not follow"),
    "salt": (put("engine/salt_bytes", 0, 7), "is not b'"),
    "event reason": (put("engine/event_reason", 0, 99), "impossible value"),
    "event token": (put("engine/event_token", 0, -2), "impossible value"),
    "event shown": (put("engine/event_shown", 0, 2), "impossible value"),
    "event columns": (replace("engine/event_token", []), "columns of the events"),
    "event logits": (put("engine/event_top_length", 0, 1), "event_top do not add up"),
    "logit columns": (replace("engine/event_top_logits", [0.5]), "largest logits differ"),
    "missing": (lambda a: a.pop("engine/seed"), "does not have|missing"),
}


@pytest.mark.parametrize("name", ENGINES)
def test_requests_that_contradict_themselves_are_refused(refused, engine_sample, name):
    fields, arrays = engine_sample
    arrays = dict(arrays)
    change, text = ENGINES[name]
    change(arrays)
    refused(build(fields, arrays), text)


@pytest.mark.parametrize(
    ("name", "at", "value"),
    [
        ("engine/tokens", -1, 9),
        ("engine/salt_bytes", -1, ord("t")),
        ("engine/request", 1, 1),
        ("engine/prompt_length", 1, 2),
    ],
)
def test_a_sibling_is_a_further_sample_of_the_same_prompt(tmp_path, refused, name, at, value):
    engine = make_engine()
    engine.submit([1, 2, 3], SamplingParams(max_new_tokens=9), cache_salt="s", n=2)
    engine.submit([5], SamplingParams(max_new_tokens=9))
    engine.cancel(1)
    engine.save(tmp_path / "s")
    fields, arrays, _ = independent_reader.read(tmp_path / "s")
    put(name, at, value)(arrays)
    refused(build(fields, arrays), "no further sample")


def test_a_hostile_name_is_only_looked_for_beside_the_file(tmp_path, sample):
    _, fields, arrays = sample
    arrays = dict(arrays, **{"pages/source": np.arange(9, dtype=np.int32)})
    path = tmp_path / "s"
    path.write_bytes(build(fields, arrays, lambda f: f | {"parent": [b"x" * 16, "s", 1]}))
    with pytest.raises(SnapshotError, match="replaced since"):  # itself, but with another id
        verify_snapshot(path)


@pytest.mark.parametrize("source", [[0, 0], [1, 2], [-1, 0], [-(2**31), 0]])
def test_pages_of_a_parent_that_are_not_there_are_refused(tmp_path, source):
    cache, allocator = make_cache(9), make_allocator(9)
    save_snapshot(tmp_path / "p", cache, allocator)  # no pages at all
    allocator.allocate(range(8))
    save_snapshot(tmp_path / "whole", cache, allocator)
    fields, arrays, _ = independent_reader.read(tmp_path / "whole")
    ident = independent_reader.read(tmp_path / "p")[2]
    arrays = dict(arrays, **{"pages/source": np.array(source, np.int32)})
    path = tmp_path / "s"
    path.write_bytes(build(fields, arrays, lambda f: f | {"parent": [ident, "p", 0]}))
    with pytest.raises(SnapshotCorrupt, match="names a page that is not there"):
        verify_snapshot(path)


@pytest.mark.parametrize("name", ["sequence/length", "page/tokens"])
def test_a_parent_is_held_to_the_same_rules(tmp_path, refused, name):
    cache, allocator = make_cache(9), make_allocator(9)
    allocator.allocate(range(8))
    save_snapshot(tmp_path / "p", cache, allocator)
    fields, arrays, _ = independent_reader.read(tmp_path / "p")
    (tmp_path / "p").write_bytes(build(fields, arrays | {name: -1 - arrays[name]}))
    ident = independent_reader.read(tmp_path / "p")[2]
    kv = {n: a[:0] for n, a in arrays.items() if n.startswith("kv/")}
    delta = arrays | kv | {"pages/source": np.array([-1, -2], np.int32)}
    refused(build(fields, delta, lambda f: f | {"parent": [ident, "p", 2]}), "length is|negative")


def test_a_parent_cannot_claim_pages_that_it_does_not_have(tmp_path, refused):
    cache, allocator = make_cache(9), make_allocator(9)
    save_snapshot(tmp_path / "p", cache, allocator)
    fields, arrays, _ = independent_reader.read(tmp_path / "p")
    (tmp_path / "p").write_bytes(build(fields, arrays, lambda f: f | {"pages": 2**31}))
    ident = independent_reader.read(tmp_path / "p")[2]
    delta = arrays | {"pages/source": np.zeros(0, np.int32)}
    refused(
        build(fields, delta, lambda f: f | {"parent": [ident, "p", 2**31]}), "page/tokens is not"
    )
