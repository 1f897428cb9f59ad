"""Whatever fails or dies while a snapshot is written: the old file or the new one, whole."""

from __future__ import annotations

import os
import random
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from paged_decode import (
    SamplingParams,
    SnapshotError,
    load_snapshot,
    save_snapshot,
    save_snapshot_async,
    verify_snapshot,
)
from paged_decode.snapshot._files import OSFiles

from ..tiny import dense_greedy, make_engine
from .small import busy, make_allocator, make_cache, using

ROOT = Path(__file__).parents[3]


class Killed(BaseException):
    """Stands for the end of the process: nothing after it happens, no cleaning up either."""


class FailingFiles(OSFiles):
    """The n-th operation fails; with `kill`, all that follow do as well, and nothing is removed."""

    def __init__(self, at: int, error: BaseException, *, half: bool = False):
        self.at, self.error, self.half, self.calls = at, error, half, 0

    def _count(self) -> None:
        self.calls += 1
        if self.calls == self.at or (self.calls > self.at and isinstance(self.error, Killed)):
            raise self.error

    def create(self, path):
        self._count()
        return super().create(path)

    def write(self, file, data, offset):
        try:
            self._count()
        except BaseException:
            if self.half:
                super().write(file, data[: len(data) // 2], offset)
            raise
        return super().write(file, data[: max(1, len(data) // 2)], offset)  # always short

    def fsync(self, file):
        self._count()
        super().fsync(file)

    def rename(self, source, target):
        self._count()
        super().rename(source, target)

    def fsync_folder(self, folder):
        self._count()
        super().fsync_folder(folder)

    def remove(self, path):
        if isinstance(self.error, Killed):
            raise self.error
        super().remove(path)


@pytest.fixture(scope="module")
def states():
    """Two states, old and new, and how many operations the new one takes."""
    cache, allocator, handles = busy()
    newer = allocator.allocate([7, 7, 7])
    counting = FailingFiles(10**9, OSError(5, "never"))
    return cache, allocator, handles, newer, counting


def save_old(path, states) -> bytes:
    cache, allocator, handles, *_ = states
    save_snapshot(path, cache, allocator, handles=handles)
    return path.read_bytes()


def operations(tmp_path, states) -> int:
    cache, allocator, *_, counting = states
    counting.calls = 0
    with using(counting):
        save_snapshot(tmp_path / "count", cache, allocator)
    os.unlink(tmp_path / "count")
    return counting.calls


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), OSError(5, "Input/output error")]
)
def test_each_operation_that_fails_leaves_the_old_file_and_no_other(tmp_path, states, error):
    cache, allocator, *_ = states
    path = tmp_path / "s"
    old = save_old(path, states)
    count = operations(tmp_path, states)
    assert count > 50
    for at in range(1, count + 1):
        failing = using(FailingFiles(at, error))
        with failing, pytest.raises(OSError, match=str(path)) as caught:
            save_snapshot(path, cache, allocator)
        assert caught.value.errno == error.errno
        if at < count:  # the last one is the folder's fsync: the new file is in place
            assert path.read_bytes() == old
        else:
            assert "new file is in place" in str(caught.value)
            verify_snapshot(path)
        assert os.listdir(tmp_path) == ["s"]
    allocator.check_invariants()


@pytest.mark.parametrize("half", [False, True])
def test_a_writer_killed_at_each_operation_leaves_the_old_file_or_the_new_one(
    tmp_path, states, half
):
    cache, allocator, *_ = states
    path = tmp_path / "s"
    old = save_old(path, states)
    save_snapshot(tmp_path / "n", cache, allocator)
    new = (tmp_path / "n").read_bytes()
    count = operations(tmp_path, states)
    for at in range(1, count + 1):
        path.write_bytes(old)
        with using(FailingFiles(at, Killed(), half=half)), pytest.raises(Killed):
            save_snapshot(path, cache, allocator)
        assert path.read_bytes() == (new if at == count else old)
    leftovers = [p for p in os.listdir(tmp_path) if p.endswith(".tmp")]
    assert len(leftovers) > 50
    for name in leftovers:
        os.utime(tmp_path / name, (time.time() - 3600,) * 2)
    save_snapshot(path, cache, allocator)
    assert sorted(os.listdir(tmp_path)) == ["n", "s"]


def test_only_what_a_save_left_is_swept(tmp_path, states):
    cache, allocator, *_ = states
    others = [".s.my-notes.tmp", ".s.v2.1-0123456789abcdef.tmp", ".s.1-2.tmp", ".s.tmp"]
    left = [".s.1-0123456789abcdef.tmp", ".s.77-00000000deadbeef.tmp"]
    for name in (*others, *left):
        (tmp_path / name).write_bytes(b"")
        os.utime(tmp_path / name, (time.time() - 3600,) * 2)
    save_snapshot(tmp_path / "s", cache, allocator)
    assert sorted(os.listdir(tmp_path)) == sorted([*others, "s"])


@pytest.mark.parametrize("name", ["x" * 255, "\u6f22" * 80, "a*[b]?" * 20], ids=ascii)
def test_every_name_that_the_system_takes_can_be_saved_and_swept(tmp_path, states, name):
    cache, allocator, *_ = states
    for _ in range(2):
        with using(FailingFiles(3, Killed())), pytest.raises(Killed):
            save_snapshot(tmp_path / name, cache, allocator)
        for left in os.listdir(tmp_path):
            os.utime(tmp_path / left, (time.time() - 3600,) * 2)
        save_snapshot(tmp_path / name, cache, allocator)
        assert os.listdir(tmp_path) == [name]


class PowerLoss(OSFiles):
    """Keeps what is not synced apart, and at the n-th sync loses or garbles some of it."""

    def __init__(self, at: int, seed: int):
        self.at, self.random, self.syncs = at, random.Random(seed), 0
        self.unsynced: list[tuple[int, int, bytes]] = []
        self.renamed: tuple[Path, Path, bytes | None] | None = None

    def write(self, file, data, offset):
        before = os.pread(file, len(data), offset)
        self.unsynced.append((file, offset, before.ljust(len(data), b"\0")))
        return super().write(file, data, offset)

    def fsync(self, file):
        self._maybe_lose()
        self.unsynced = []
        super().fsync(file)

    def rename(self, source, target):
        old = target.read_bytes() if target.exists() else None
        super().rename(source, target)
        self.renamed = (source, target, old)

    def fsync_folder(self, folder):
        self._maybe_lose()
        self.renamed = None

    def remove(self, path):
        raise Killed

    def _maybe_lose(self) -> None:
        self.syncs += 1
        if self.syncs != self.at:
            return
        for file, offset, before in self.unsynced:
            fate = self.random.randrange(3)
            if fate == 0:
                os.pwrite(file, before, offset)
            elif fate == 1:
                os.pwrite(file, self.random.randbytes(len(before)), offset)
        if self.renamed and self.random.random() < 0.5:
            _, target, old = self.renamed
            if old is not None:
                target.write_bytes(old)
        raise Killed


@pytest.mark.parametrize("at", [1, 2])
def test_after_a_power_loss_the_old_file_or_the_new_one_is_there(tmp_path, states, at):
    cache, allocator, *_ = states
    path = tmp_path / "s"
    old = save_old(path, states)
    save_snapshot(tmp_path / "n", cache, allocator)
    new = (tmp_path / "n").read_bytes()
    seen = set()
    for seed in range(40):
        path.write_bytes(old)
        with using(PowerLoss(at, seed)), pytest.raises(Killed):
            save_snapshot(path, cache, allocator)
        found = path.read_bytes()
        assert found in (old, new)
        seen.add(found)
        for name in os.listdir(tmp_path):  # what is not renamed is rejected, if anybody opens it
            if name.endswith(".tmp"):
                if (tmp_path / name).read_bytes() != new:
                    with pytest.raises(SnapshotError):
                        verify_snapshot(tmp_path / name)
                os.unlink(tmp_path / name)
    assert seen == ({old} if at == 1 else {old, new})


def test_the_engine_goes_on_when_a_save_fails(tmp_path):
    engine = make_engine()
    engine.submit([5, 6, 7], SamplingParams(max_new_tokens=12))
    events = engine.step()
    for at in range(1, 12):
        with using(FailingFiles(at, OSError(28, "full"))), pytest.raises(OSError):
            engine.save(tmp_path / "s")
    with using(FailingFiles(3, OSError(28, "full"))):
        pending = engine.save_async(tmp_path / "s")
    events += engine.stream()
    with pytest.raises(OSError, match="full"):
        pending.result()
    assert tuple(e.token for e in events) == dense_greedy([5, 6, 7], 12)


def test_two_threads_that_write_one_path_leave_one_whole_file(tmp_path, states):
    cache, allocator, handles, *_ = states
    path = tmp_path / "s"
    wanted = [save_old(path, states)]
    save_snapshot(path, cache, allocator)
    wanted.append(path.read_bytes())
    errors = []

    def write(chosen) -> None:
        try:
            for _ in range(15):
                save_snapshot(path, cache, allocator, handles=chosen)
        except BaseException as error:
            errors.append(error)

    writers = [threading.Thread(target=write, args=(h,)) for h in (handles, None)]
    for thread in writers:
        thread.start()
    while any(thread.is_alive() for thread in writers):
        verify_snapshot(path)  # a reader sees one or the other
    assert errors == [] and path.read_bytes() in wanted and os.listdir(tmp_path) == ["s"]


WRITER = """
import sys
sys.path.insert(0, {root!r})
from tests.paged_decode.snapshot.small import busy
from paged_decode import save_snapshot
cache, allocator, _ = busy()
print("ready", flush=True)
while True:
    save_snapshot({path!r}, cache, allocator, metadata={{"writer": {name!r}}})
"""


@pytest.mark.slow
def test_processes_killed_while_they_write_one_path_leave_a_whole_file(tmp_path):
    path = tmp_path / "s"
    for turn in range(2):
        writers = [
            subprocess.Popen(
                [sys.executable, "-c", WRITER.format(root=str(ROOT), path=str(path), name=n)],
                cwd=ROOT,
                stdout=subprocess.PIPE,
            )
            for n in ("a", "b")
        ]
        for writer in writers:
            assert writer.stdout.readline() == b"ready\n"
        end = time.time() + 1.5 + turn / 7
        while time.time() < end:
            if path.exists():
                verify_snapshot(path)
        for writer in writers:
            writer.send_signal(signal.SIGKILL)
            writer.wait()
            writer.stdout.close()
        assert verify_snapshot(path).metadata["writer"] in ("a", "b")


def test_places_that_cannot_hold_a_snapshot_are_named(tmp_path, states):
    cache, allocator, *_ = states
    os.mkfifo(tmp_path / "pipe")
    cases = (
        (tmp_path, IsADirectoryError, "folder"),
        (tmp_path / "pipe", OSError, "regular file"),
        (Path("/dev/full"), OSError, "regular file"),
        (tmp_path / "no" / "such", FileNotFoundError, "such"),
        (tmp_path / ("x" * 300), OSError, "long"),
        (str(tmp_path) + "/nul\0", ValueError, "null"),
    )
    for path, error, text in cases:
        with pytest.raises(error, match=text):
            save_snapshot(path, cache, allocator)
        with pytest.raises((OSError, ValueError)):
            load_snapshot(path, make_cache(9), make_allocator(9))
    assert os.listdir(tmp_path) == ["pipe"]


def test_a_file_is_its_owners_and_a_link_is_followed(tmp_path, states):
    cache, allocator, *_ = states
    os.symlink(tmp_path / "real", tmp_path / "link")
    save_snapshot(tmp_path / "link", cache, allocator)
    assert (tmp_path / "link").is_symlink() and verify_snapshot(tmp_path / "real")
    assert stat.S_IMODE((tmp_path / "real").stat().st_mode) == 0o600


def overwrite(path) -> None:
    with path.open("r+b") as file:
        file.write(b"\xff" * path.stat().st_size)


def test_a_file_that_shrinks_or_changes_while_it_is_read_is_an_error(tmp_path, states):
    from paged_decode.snapshot._open import Opened

    cache, allocator, *_ = states
    path = tmp_path / "s"
    for harm in (
        lambda: os.truncate(path, path.stat().st_size - 200),
        lambda: overwrite(path),
    ):
        save_snapshot(path, cache, allocator)
        with Opened(path) as opened:
            harm()
            with pytest.raises(SnapshotError, match="ended early|not what was written"):
                opened.chain.files[0].verify()


class Failing:
    """Replaces a function: its n-th call raises."""

    def __init__(self, function, at: int):
        self.function, self.at, self.calls = function, at, 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        if self.calls == self.at:
            raise MemoryError("injected")
        return self.function(*args, **kwargs)


@pytest.mark.parametrize(
    "name", ["stage", "put", "put a first batch", "compile", "allocate", "run", "import"]
)
def test_a_load_that_fails_anywhere_changes_nothing(tmp_path, states, monkeypatch, name):
    from paged_decode import BlockAllocator
    from paged_decode.snapshot import _in, _load

    if name == "put a first batch":
        monkeypatch.setattr(_in, "_has_room", lambda device, nbytes: False)

    cache, allocator, *_ = states
    save_snapshot(tmp_path / "s", cache, allocator)
    there, other, residents = busy(40)
    before = [np.array(leaf).tobytes() for leaf in jax.tree.leaves(there)]
    state, _ = other.export_state()
    place = {
        "stage": (_load, "fresh_arrays"),
        "put": (_in.jax, "device_put"),
        "put a first batch": (_in.jax, "device_put"),
        "compile": (_in, "_compile"),
        "allocate": (BlockAllocator, "allocate_pages"),
        "run": (_load, "prepare_insert"),
        "import": (BlockAllocator, "import_state"),
    }[name]
    original = getattr(*place)
    for at in range(1, 5 if name == "put" else 2):
        if name == "run":
            broken = lambda *a: Failing(original(*a), 1)  # noqa: E731
        else:
            failing = Failing(original, at)
            broken = lambda *a, f=failing, **k: f(*a, **k)  # noqa: E731
        with monkeypatch.context() as patch, pytest.raises(MemoryError, match="injected"):
            patch.setattr(*place, broken)
            load_snapshot(tmp_path / "s", there, other)
        other.check_invariants()
        after, _ = other.export_state()
        for field in ("lengths", "table", "tokens", "entry_pages", "evictable"):
            np.testing.assert_array_equal(getattr(state, field), getattr(after, field))
        if name != "import":  # by then the pages are in the new cache, on free pages
            assert before == [np.array(leaf).tobytes() for leaf in jax.tree.leaves(there)]


def test_saving_in_the_background_hands_its_error_to_whoever_asks(tmp_path, states):
    cache, allocator, *_ = states
    with using(FailingFiles(2, OSError(28, "full"))):
        pending = save_snapshot_async(tmp_path / "s", cache, allocator)
    with pytest.raises(OSError, match="full"):
        pending.result(60)
    assert pending.done() and not os.listdir(tmp_path)
