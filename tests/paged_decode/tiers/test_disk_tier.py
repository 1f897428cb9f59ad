"""Whatever lies in the folder of a disk tier: a sound chunk is used, all else is not there."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import jax
import jax.numpy as jnp
import msgpack
import numpy as np
import pytest

from paged_decode import BlockAllocator, save_snapshot
from paged_decode.tiers import DiskTier, HostTier

from ..snapshot import independent_reader
from ..snapshot.forge import build, pack, put
from .test_tier import PAGES, SIZE, content, forget, random_bits, spilled, started

ROOM = 10**7
PROMPT = list(range(16))


def allocator_of_the_test() -> BlockAllocator:
    return BlockAllocator(PAGES, SIZE, hash_key=b"k")


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two chunks of four pages, of tokens 0 to 15 and 100 to 115."""
    spilled(tmp_path / "tier", allocator_of_the_test(), random_bits(jnp.float32))
    return tmp_path / "tier"


def chunk(folder: Path) -> Path:
    """The file with tokens 0 to 15."""
    return next(
        p for p in folder.iterdir() if independent_reader.read(p)[1]["tier/tokens"][0, 0] == 0
    )


def computed_after_load(folder: Path, *, change=None, tokens=PROMPT) -> int:
    """How much of a prompt a new tier on that folder brings back, none of it wrong."""
    allocator, cache = allocator_of_the_test(), random_bits(jnp.float32)
    saved = cache
    cache = jax.tree.map(lambda a: jnp.zeros_like(a), cache)
    tier = HostTier(8, disk=DiskTier(folder, ROOM))
    if change:
        change()
    handle = allocator.allocate(tokens)
    cache = tier.load(cache, allocator, handle)
    computed = allocator.sequence(handle).computed
    pages = allocator.sequence(handle).pages[: computed // SIZE]
    if tokens is PROMPT:
        assert content(cache, pages) == content(saved, range(1, 1 + len(pages)))
    other = started(allocator, list(range(300, 316)))
    tier.store(cache, allocator, other)
    tier.settle()
    tier.check_invariants()
    for start in (400, 500):  # and what is given up is written
        handle = started(allocator, list(range(start, start + 8)))
        tier.store(cache, allocator, handle)
        tier.settle()
        allocator.free([handle])
    tier.check_invariants()
    return computed


def forge(path: Path, change) -> None:
    fields, arrays, _ = independent_reader.read(path)
    arrays = dict(arrays)
    changed = change(fields, arrays)
    fields = changed if isinstance(changed, dict) else fields
    path.write_bytes(build(fields, arrays))


def on(name: str, pick):
    return lambda f, a: a.update({name: pick(a[name])})


def twice(a):
    return np.concatenate([a, a])


FORGED = {
    "no keys": lambda f, a: a.pop("tier/keys"),
    "no filled": lambda f, a: a.pop("tier/filled"),
    "no tokens": lambda f, a: a.pop("tier/tokens"),
    "no pages": lambda f, a: a.pop("tier/pages/0"),
    "no array at all": lambda f, a: a.clear(),
    "another array": lambda f, a: a.update(zzz=np.zeros(3)),
    "pages with a hole": lambda f, a: a.update({"tier/pages/2": a["tier/pages/0"]}),
    "pages more than the cache": lambda f, a: a.update({"tier/pages/1": a["tier/pages/0"]}),
    "keys of another width": on("tier/keys", lambda k: k[:, :20]),
    "keys of no width": on("tier/keys", lambda k: k[:, :0]),
    "long keys": on("tier/keys", lambda k: np.tile(k, (1, 9))),
    "keys of one axis": on("tier/keys", lambda k: k.reshape(-1)),
    "keys of another dtype": on("tier/keys", lambda k: k.astype(np.int32)),
    "keys too few": on("tier/keys", lambda k: k[:3]),
    "keys too many": on("tier/keys", twice),
    "no key": on("tier/keys", lambda k: k[:0]),
    "a key twice": on("tier/keys", lambda k: k[[0, 0, 2, 3]]),
    "keys of others": on("tier/keys", lambda k: k ^ 1),
    "keys in another order": on("tier/keys", lambda k: k[::-1]),
    "filled longer": on("tier/filled", twice),
    "filled shorter": on("tier/filled", lambda n: n[:2]),
    "filled 0": on("tier/filled", lambda n: n * 0),
    "filled -1": on("tier/filled", lambda n: n * 0 - 1),
    "filled 5": on("tier/filled", lambda n: n + 1),
    "filled 2**31 - 1": on("tier/filled", lambda n: np.full_like(n, 2**31 - 1)),
    "filled of 64 bits": on("tier/filled", lambda n: n.astype(np.int64)),
    "filled of two axes": on("tier/filled", lambda n: n[:, None]),
    "fewer tokens": on("tier/tokens", lambda t: t[:2]),
    "tokens of one axis": on("tier/tokens", lambda t: t.reshape(-1)),
    "tokens of three axes": on("tier/tokens", lambda t: t[..., None]),
    "tokens of no width": on("tier/tokens", lambda t: t[:, :0]),
    "wide tokens": on("tier/tokens", lambda t: np.concatenate([t, t], axis=1)),
    "other tokens": on("tier/tokens", lambda t: t + 1),
    "float tokens": on("tier/tokens", lambda t: t.astype(np.float32)),
    "pages of another dtype": on("tier/pages/0", lambda p: np.zeros(p.shape, np.float16)),
    "pages of the same width": on("tier/pages/0", lambda p: p.view(np.int32)),
    "pages of fewer rows": on("tier/pages/0", lambda p: p[:-1]),
    "pages of twice the rows": on("tier/pages/0", twice),
    "pages of no row": on("tier/pages/0", lambda p: p[:0]),
    "pages of another shape": on("tier/pages/0", lambda p: p[:, :1]),
    "pages of one axis": on("tier/pages/0", lambda p: p.reshape(-1)),
    "fewer pages claimed": lambda f, a: f | {"pages": 3},
    "no page claimed": lambda f, a: f | {"pages": 0},
    "2**31 pages claimed": lambda f, a: f | {"pages": 2**31},
    "another page size": lambda f, a: f | {"page_size": 2**31},
    "a parent": lambda f, a: f | {"parent": [b"x" * 16, "p", 1]},
    "a huge axis of nothing": lambda f, a: a.update({"tier/pages/0": np.zeros((8, 0), "f4")}),
}


@pytest.mark.parametrize("name", FORGED)
def test_a_file_with_sound_checksums_that_is_no_chunk_of_this_cache_is_not_there(folder, name):
    forge(chunk(folder), FORGED[name])
    assert computed_after_load(folder) == 0


@pytest.mark.parametrize("name", FORGED)
def test_a_file_that_is_forged_after_the_start_is_not_there_either(folder, name):
    path = chunk(folder)
    computed_after_load(folder, change=lambda: forge(path, FORGED[name]))


@pytest.mark.parametrize("name", FORGED)
def test_the_other_chunks_of_the_folder_are_found_all_the_same(folder, name):
    forge(chunk(folder), FORGED[name])
    assert computed_after_load(folder, tokens=list(range(100, 116))) == 16


def test_one_page_that_was_forged_to_other_tokens_ends_the_run_before_it(folder):
    forge(chunk(folder), lambda f, a: put("tier/tokens", (2, 1), 77)(a))
    assert computed_after_load(folder) == 8


def test_bytes_that_are_no_container_are_removed_and_the_rest_is_used(folder):
    (folder / "a.pgt").write_bytes(b"")
    (folder / "b.pgt").write_bytes(os.urandom(500))
    (folder / "c.pgt").write_bytes(pack(b"\x80"))
    cache, allocator = random_bits(jnp.float32), allocator_of_the_test()
    save_snapshot(folder / "d.pgt", cache, allocator)
    (folder / "mine.txt").write_bytes(b"kept")
    (folder / "e.pgt.tmp").write_bytes(b"kept")
    assert computed_after_load(folder) == 16
    names = {p.name for p in folder.iterdir()}
    assert {"mine.txt", "e.pgt.tmp"} <= names and not names & {"a.pgt", "b.pgt", "c.pgt", "d.pgt"}


def plant(kind: str, path: Path, outside: Path) -> None:
    if kind == "folder":
        path.mkdir()
        (path / "inside").write_bytes(b"kept")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        here = os.getcwd()
        os.chdir(path.parent)  # the address of a socket is short
        try:
            with socket.socket(socket.AF_UNIX) as s:
                s.bind(path.name)
        finally:
            os.chdir(here)
    else:
        target = {"link": outside, "link to nothing": "gone", "link to itself": path.name}[kind]
        os.symlink(target, path)


KINDS = ("folder", "pipe", "socket", "link", "link to nothing", "link to itself")


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_regular_file_is_neither_read_nor_removed_nor_waited_for(folder, tmp_path, kind):
    outside = tmp_path / "outside"
    outside.write_bytes(chunk(folder).read_bytes())
    plant(kind, folder / "x.pgt", outside)
    assert computed_after_load(folder) == 16
    assert os.path.lexists(folder / "x.pgt") and outside.exists()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("when", ["before", "after"])
def test_such_a_thing_in_the_place_of_a_chunk_hides_it_and_is_not_written_through(
    folder, tmp_path, kind, when
):
    outside, path = tmp_path / "outside", chunk(folder)
    outside.write_bytes(b"not the tier's")

    def change():
        os.unlink(path)
        plant(kind, path, outside)

    if when == "before":
        change()
    assert computed_after_load(folder, change=change if when == "after" else None) == 0
    tier = spilled(folder, allocator_of_the_test(), random_bits(jnp.float32))
    assert tier.stats.spilled == 4  # of two chunks; the other's place is taken
    assert outside.read_bytes() == b"not the tier's"
    assert os.path.lexists(path) and not path.is_file() or path.is_symlink()


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_file_that_is_gone_or_cannot_be_read_is_not_there(folder, when):
    path = chunk(folder)
    change = path.unlink
    assert computed_after_load(folder, change=change if when == "after" else change()) == 0


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads anything")
def test_a_file_that_may_not_be_read_is_left_alone(folder):
    path = chunk(folder)
    path.chmod(0)
    assert computed_after_load(folder) == 0 and path.exists()


def test_a_read_that_fails_leaves_the_file_for_another_day(folder, monkeypatch):
    def broken(*_):
        raise OSError(5, "Input/output error")

    path = chunk(folder)
    with monkeypatch.context() as patch:
        patch.setattr("paged_decode.snapshot._reader.os.preadv", broken)
        assert DiskTier(folder, ROOM).num_bytes == 0
    assert path.exists() and computed_after_load(folder) == 16


def test_a_chunk_that_was_exchanged_for_another_is_taken_for_what_it_is(folder):
    path = chunk(folder)
    (other,) = (p for p in folder.iterdir() if p != path)
    data = other.read_bytes()

    def change():
        path.write_bytes(data)
        os.unlink(other)

    assert computed_after_load(folder, change=change) == 0
    assert computed_after_load(folder, tokens=list(range(100, 116))) == 16


def test_a_chunk_larger_than_the_host_tier_gives_up_nothing_for_it(folder):
    allocator, cache = allocator_of_the_test(), random_bits(jnp.float32)
    tier = HostTier(3, disk=DiskTier(folder, ROOM))
    handle = started(allocator, [9, 9, 9, 9])
    tier.store(cache, allocator, handle)
    tier.settle()
    forget(allocator, handle)
    handle = allocator.allocate(PROMPT)
    tier.load(cache, allocator, handle)
    assert allocator.sequence(handle).computed == 0 and tier.stats.evicted == 0


def test_files_beyond_the_capacity_are_removed_when_the_tier_is_made(folder):
    sizes = sorted(p.stat().st_size for p in folder.iterdir())
    tier = DiskTier(folder, sizes[-1])
    assert tier.num_bytes <= sizes[-1] and len(list(folder.iterdir())) == 1
    assert DiskTier(folder, 100).num_bytes == 0 and not list(folder.iterdir())


def test_a_sparse_file_of_a_claimed_terabyte_costs_nothing(folder):
    rows = 2**31 - 1
    fields = {"arrays": [], "fingerprint": b"", "metadata": {}}
    fields |= {"page_size": 4, "pages": rows, "parent": None}

    def claim(f):
        f["arrays"] = [
            ["tier/keys", "uint8", [rows, 128], bytes(4 * 65536)],
            ["tier/filled", "int32", [rows], bytes(4 * 2048)],
            ["tier/tokens", "int32", [rows, 4], bytes(4 * 8192)],
            ["tier/pages/0", "uint8", [rows, 1], bytes(4 * 512)],
        ]

    data = build(fields, {}, claim)
    size = len(data) + sum(-(-rows * n // 64) * 64 for n in (128, 4, 16, 1))
    body = dict(fields)
    claim(body)
    data = pack(msgpack.packb(body), file_bytes=size)
    path = folder / "sparse.pgt"
    with path.open("wb") as file:
        file.write(data)
        file.truncate(size)
    assert computed_after_load(folder) == 16 and not path.exists()


def test_digests_of_several_lengths_stay_on_the_host(tmp_path):
    allocator = BlockAllocator(PAGES, SIZE, digest=lambda key, payload: payload[-9 - payload[-4] :])
    tier = spilled(tmp_path, allocator, random_bits(jnp.float32))
    tier.check_invariants()
    assert tier.stats.spilled == 0
