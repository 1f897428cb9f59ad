"""A delta carries the pages that are new; chains load, fold, and never load a wrong parent."""

from __future__ import annotations

import functools
import os
import threading
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from paged_decode import (
    KVCache,
    PendingSnapshot,
    SamplingParams,
    SnapshotCorrupt,
    SnapshotMismatch,
    compact_snapshot,
    inspect_snapshot,
    load_snapshot,
    save_snapshot,
    save_snapshot_async,
    verify_snapshot,
)
from paged_decode.snapshot._files import OSFiles
from paged_decode.snapshot._format import MAX_HEADER_BYTES, encode_header
from paged_decode.snapshot._reader import SnapshotFile

from ..tiny import make_engine, prompts
from .asking import told
from .small import assert_same_content, busy, content, make_allocator, make_cache, using


def scribble(cache, allocator, handles, seed: int):
    """New bits in every slot that a step may still write: those not in full, committed pages."""
    rng = np.random.default_rng(seed)
    arrays = []
    for leaf in (*cache.k_pages, *cache.v_pages):
        out = np.array(leaf)
        for handle in handles:
            info = allocator.sequence(handle)
            for position in range(info.computed // 4 * 4, info.length):
                page = info.pages[position // 4]
                out[page, :, position % 4] = rng.standard_normal(out.shape[1::2])
        arrays.append(jnp.asarray(out))
    return type(cache)(tuple(arrays[:2]), tuple(arrays[2:]))


def grow(cache, allocator, handles, count: int, seed: int):
    """Append tokens and write their keys and values, copies first."""
    for token in range(count):
        _, copies = allocator.advance(handles, [token + seed] * len(handles))
        cache = cache.copy_pages(copies)
    cache = scribble(cache, allocator, handles, seed)
    allocator.commit(handles, [allocator.sequence(h).length for h in handles])
    return cache


def chain(folder):
    """Three generations: growth, a fork, a truncation, a freed sequence."""
    cache, allocator = make_cache(40), make_allocator(40)
    handles = [allocator.allocate(range(10)), allocator.allocate(range(50, 59))]
    cache = grow(cache, allocator, handles, 3, seed=1)
    first = save_snapshot(folder / "0", cache, allocator)
    handles += allocator.fork(handles[0])
    cache = grow(cache, allocator, handles, 4, seed=2)
    second = save_snapshot(folder / "1", cache, allocator, parent=first)
    allocator.truncate(handles[1], 6)
    cache = grow(cache, allocator, handles[1:2], 5, seed=3)
    allocator.free(handles[:1])
    third = save_snapshot(folder / "2", cache, allocator, parent=second)
    return cache, allocator, handles[1:], (first, second, third)


def test_a_chain_restores_the_last_state_and_writes_only_new_pages(tmp_path):
    cache, allocator, handles, saved = chain(tmp_path)
    assert [s.num_pages for s in saved] == [7, 11, 9]
    assert [s.written_pages for s in saved] == [7, 5, 3]
    other = make_allocator(60)
    restored = load_snapshot(tmp_path / "2", make_cache(60, seed=8), other)
    other.check_invariants()
    for old, new in zip(handles, restored.handles, strict=True):
        assert_same_content(content(restored.cache, other, new), content(cache, allocator, old))


def test_folding_a_chain_gives_the_bytes_of_a_whole_snapshot(tmp_path):
    cache, allocator, handles, _ = chain(tmp_path)
    save_snapshot(tmp_path / "whole", cache, allocator)
    info = compact_snapshot(tmp_path / "2", tmp_path / "folded")
    assert (tmp_path / "folded").read_bytes() == (tmp_path / "whole").read_bytes()
    assert info.parent is None and info.own_pages == info.num_pages
    compact_snapshot(tmp_path / "2")
    assert (tmp_path / "2").read_bytes() == (tmp_path / "whole").read_bytes()
    for name in ("0", "1"):
        os.unlink(tmp_path / name)
    verify_snapshot(tmp_path / "2")


def test_a_loaded_snapshot_can_be_a_parent_too(tmp_path):
    _, _, _, _ = chain(tmp_path)
    other = make_allocator(60)
    restored = load_snapshot(tmp_path / "2", make_cache(60, seed=8), other)
    handles = list(restored.handles)
    cache = grow(restored.cache, other, handles, 3, seed=4)
    saved = save_snapshot(tmp_path / "3", cache, other, parent=restored.snapshot)
    assert saved.written_pages < saved.num_pages / 2
    last = make_allocator(60)
    again = load_snapshot(tmp_path / "3", make_cache(60), last)
    for old, new in zip(handles, again.handles, strict=True):
        assert_same_content(content(again.cache, last, new), content(cache, other, old))


def test_a_missing_or_wrong_parent_is_an_error_before_anything_is_touched(tmp_path):
    cache, allocator, *_ = chain(tmp_path)
    there, other = make_cache(60), make_allocator(60)
    whole = (tmp_path / "0").read_bytes()

    def refused(error, text):
        with pytest.raises(error, match=text):
            load_snapshot(tmp_path / "2", there, other)
        assert not there.is_deleted and other.num_free == 59

    os.rename(tmp_path / "0", tmp_path / "elsewhere")
    refused(SnapshotMismatch, "delta of 0, which is not in")
    save_snapshot(tmp_path / "0", cache, allocator)
    refused(SnapshotMismatch, "it was replaced since")
    flipped = bytearray(whole)
    flipped[-100] ^= 1
    (tmp_path / "0").write_bytes(flipped)
    refused(SnapshotCorrupt, "chunk|padding")
    (tmp_path / "0").write_bytes(whole)
    load_snapshot(tmp_path / "2", there, other)


@pytest.mark.parametrize("parent", ["0", Path("0"), PendingSnapshot(Path("0"))], ids=type)
def test_a_parent_that_is_no_snapshot_is_refused_with_what_to_pass(tmp_path, unchecked, parent):
    with pytest.raises(TypeError, match="parent must be a Snapshot, got .*: pass what save_snap"):
        save_snapshot(tmp_path / "x", make_cache(40), make_allocator(40), parent=parent)
    assert not list(tmp_path.iterdir())


def test_a_delta_of_another_allocator_folder_or_of_itself_is_refused(tmp_path):
    cache, allocator, _, (first, *_) = chain(tmp_path)
    (tmp_path / "sub").mkdir()
    with pytest.raises(ValueError, match="another allocator"):
        save_snapshot(tmp_path / "x", make_cache(40), make_allocator(40), parent=first)
    with pytest.raises(ValueError, match="folder of its parent"):
        save_snapshot(tmp_path / "sub" / "x", cache, allocator, parent=first)
    with pytest.raises(ValueError, match="cannot replace its parent"):
        save_snapshot(tmp_path / "0", cache, allocator, parent=first)
    assert inspect_snapshot(tmp_path / "0").num_pages == 7


def test_a_page_used_again_or_cut_and_refilled_is_never_taken_from_the_parent(tmp_path):
    """Random lives: every delta restores what a whole snapshot of the same moment restores."""
    rng = np.random.default_rng(0)
    cache, allocator = make_cache(30), make_allocator(30)
    handles, parent = [], None
    for turn in range(25):
        move = rng.integers(5)
        if move == 0 and handles:
            allocator.free(handles.pop(int(rng.integers(len(handles)))))
        elif move == 1 and handles:
            handle = handles[int(rng.integers(len(handles)))]
            allocator.truncate(handle, int(rng.integers(allocator.sequence(handle).length + 1)))
        elif move == 2 and handles and len(handles) < 6:
            handles += allocator.fork(handles[int(rng.integers(len(handles)))])
        elif len(handles) < 4:
            handles.append(allocator.allocate(rng.integers(0, 3, int(rng.integers(1, 12)))))
            cache = scribble(cache, allocator, handles[-1:], turn)
            allocator.commit(handles[-1:], allocator.sequence(handles[-1]).length)
        if handles and allocator.num_free > 12:
            cache = grow(cache, allocator, handles, 2, seed=turn)
        parent = save_snapshot(tmp_path / f"{turn}", cache, allocator, parent=parent)
        save_snapshot(tmp_path / "whole", cache, allocator)
        compact_snapshot(tmp_path / f"{turn}", tmp_path / "folded")
        assert (tmp_path / "folded").read_bytes() == (tmp_path / "whole").read_bytes()


def test_an_engine_saves_deltas_between_its_steps(tmp_path):
    engine, twin = make_engine(80), make_engine(80)
    for each in (engine, twin):
        for prompt in prompts(3, seed=6, low=20, high=30):
            each.submit(prompt, SamplingParams(max_new_tokens=40, temperature=0.5), n=2)
    saved = None
    for turn in range(5):
        engine.step(), twin.step()
        saved = engine.save(tmp_path / f"{turn}", parent=saved)
    assert saved is not None and saved.written_pages < saved.num_pages / 2
    again = make_engine(80)
    again.restore(tmp_path / "4")
    assert list(map(told, again.stream())) == list(map(told, twin.stream()))


def test_a_delta_cannot_replace_any_file_that_it_needs(tmp_path):
    cache, allocator, _, (first, second, third) = chain(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    for name in ("0", "1", "2"):
        with pytest.raises(ValueError, match="cannot replace its parent"):
            save_snapshot(tmp_path / name, cache, allocator, parent=third)
    with pytest.raises(OSError, match="is a parent of"):
        compact_snapshot(tmp_path / "2", tmp_path / "0")
    os.symlink(tmp_path / "1", tmp_path / "link")
    with pytest.raises(OSError, match="is a parent of"):
        compact_snapshot(tmp_path / "2", tmp_path / "link")
    os.unlink(tmp_path / "link")
    assert before == {p.name: p.read_bytes() for p in tmp_path.iterdir()}


def test_a_delta_that_nothing_could_read_is_not_written(tmp_path, monkeypatch):
    cache, allocator, _, (first, second, third) = chain(tmp_path)
    monkeypatch.setattr("paged_decode.snapshot._save.MAX_PARENTS", 2)
    save_snapshot(tmp_path / "3", cache, allocator, parent=second)
    with pytest.raises(ValueError, match="at most 2 parents"):
        save_snapshot(tmp_path / "4", cache, allocator, parent=third)
    restored = load_snapshot(tmp_path / "2", make_cache(60), other := make_allocator(60))
    with pytest.raises(ValueError, match="at most 2 parents"):
        save_snapshot(tmp_path / "4", restored.cache, other, parent=restored.snapshot)
    compact_snapshot(tmp_path / "1")
    with pytest.raises(ValueError, match="removed or replaced"):
        save_snapshot(tmp_path / "4", cache, allocator, parent=second)
    os.unlink(tmp_path / "0")
    with pytest.raises(ValueError, match="removed or replaced"):
        save_snapshot(tmp_path / "4", cache, allocator, parent=first)
    assert not (tmp_path / "4").exists()


def test_paths_are_those_of_the_call_wherever_the_process_goes_then(tmp_path, monkeypatch):
    cache, allocator = make_cache(40), make_allocator(40)
    allocator.allocate(range(10))
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "a")
    base = save_snapshot("base", cache, allocator)
    with using(SlowFiles()) as files:
        pending = save_snapshot_async("behind", cache, allocator, parent=base)
    monkeypatch.chdir(tmp_path / "b")
    files.go.set()
    assert pending.result(60).path == tmp_path / "a" / "behind"
    verify_snapshot(tmp_path / "a" / "behind")
    with pytest.raises(ValueError, match="folder of its parent"):
        save_snapshot("delta", cache, allocator, parent=base)
    save_snapshot(tmp_path / "a" / "delta", cache, allocator, parent=base)
    verify_snapshot(tmp_path / "a" / "delta")


class SlowFiles(OSFiles):
    """Makes no file before `go` is set."""

    def __init__(self):
        self.go = threading.Event()

    def create(self, path):
        self.go.wait(60)
        return super().create(path)


def test_saves_to_one_path_are_written_in_the_order_of_the_calls(tmp_path):
    cache, allocator = make_cache(40), make_allocator(40)
    handle = allocator.allocate(range(10))
    metadata = {"turn": 0}
    with using(SlowFiles()) as slow:
        pending = [save_snapshot_async(tmp_path / "s", cache, allocator, metadata=metadata)]
    for turn in (1, 2):
        metadata["turn"] = turn
        allocator.advance([handle], [turn])
        pending.append(save_snapshot_async(tmp_path / "s", cache, allocator, metadata=metadata))
    assert not any(p.done() for p in pending)
    assert len(os.listdir(tmp_path)) == 0
    slow.go.set()
    save_snapshot(tmp_path / "s", cache, allocator, metadata={"turn": 3})
    assert all(p.done() for p in pending)
    assert inspect_snapshot(tmp_path / "s").metadata == {"turn": 3}
    assert len({p.result(60).id for p in pending}) == 3


def test_a_delta_whose_ancestors_are_gone_or_replaced_is_not_written(tmp_path):
    cache, allocator, _ = busy()
    paths = [tmp_path / f"{i}" for i in range(4)]
    whole = save_snapshot(paths[0], cache, allocator)
    first = save_snapshot(paths[1], cache, allocator, parent=whole)
    second = save_snapshot(paths[2], cache, allocator, parent=first)
    there = paths[0].read_bytes()
    for spoil in (paths[0].unlink, lambda: save_snapshot(paths[0], *busy(dtype=np.float16)[:2])):
        spoil()
        with pytest.raises(ValueError, match="0 is no longer the snapshot .* removed or replaced"):
            save_snapshot(paths[3], cache, allocator, parent=second)
        assert not paths[3].exists()
    paths[0].write_bytes(there)
    save_snapshot(paths[3], cache, allocator, parent=second)
    assert inspect_snapshot(paths[3]).num_pages == second.num_pages


def test_a_delta_of_a_cache_with_other_arrays_is_not_written(tmp_path):
    cache, allocator, _ = busy()
    whole = save_snapshot(tmp_path / "whole", cache, allocator)
    for other in (make_cache(24, np.float16), KVCache(cache.k_pages[:1], cache.v_pages[:1])):
        with pytest.raises(ValueError, match="the parent, has other arrays of keys and values"):
            save_snapshot(tmp_path / "delta", other, allocator, parent=whole)
    assert not (tmp_path / "delta").exists()


def test_a_parent_that_is_about_to_be_replaced_is_waited_for(tmp_path):
    cache, allocator, _ = busy()
    whole = save_snapshot(tmp_path / "whole", cache, allocator)
    later = save_snapshot_async(tmp_path / "whole", cache, allocator, metadata=dict(n=2))
    with pytest.raises(ValueError, match="removed or replaced"):
        save_snapshot_async(tmp_path / "delta", cache, allocator, parent=whole)
    assert later.done()


def test_a_delta_whose_fold_has_no_room_in_a_header_is_an_os_error(tmp_path):
    cache = KVCache(*(tuple(jnp.zeros((3, 1, 4, 1)) for _ in range(150)) for _ in "kv"))
    allocator = make_allocator(3)
    allocator.commit(allocator.allocate([1, 2, 3, 4]), 4)
    whole = save_snapshot(tmp_path / "whole", cache, allocator)
    delta = functools.partial(save_snapshot, tmp_path / "delta", cache, allocator, parent=whole)
    with SnapshotFile(delta(metadata={"a": ""}).path) as file:
        room = MAX_HEADER_BYTES - len(encode_header(file.header))
    delta(metadata={"a": "x" * room})
    before = (tmp_path / "delta").read_bytes()
    with pytest.raises(OSError, match="it cannot be folded: the header would take"):
        compact_snapshot(tmp_path / "delta")
    assert (tmp_path / "delta").read_bytes() == before
