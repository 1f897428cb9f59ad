"""Saves that a thread writes: their futures, their order, and the end of the process."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path

import pytest

from paged_decode import (
    PendingSnapshot,
    inspect_snapshot,
    save_snapshot,
    save_snapshot_async,
    verify_snapshot,
)

from .small import busy, using
from .test_deltas import SlowFiles

ROOT = Path(__file__).parents[3]
AT_EXIT = """
import sys, threading
from paged_decode import save_snapshot_async
from paged_decode.snapshot._files import OSFiles
from tests.paged_decode.snapshot.small import busy, using
class Slow(OSFiles):
    def create(self, path):
        threading.main_thread().join(1)  # the interpreter exits meanwhile
        return super().create(path)
for name in ("a", "b"):
    with using(Slow()):
        save_snapshot_async(sys.argv[1] + "/" + name, *busy()[:2])
"""


def test_what_was_submitted_is_written_while_the_interpreter_exits(tmp_path):
    subprocess.run([sys.executable, "-c", AT_EXIT, tmp_path], cwd=ROOT, check=True, timeout=120)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
    for path in tmp_path.iterdir():
        verify_snapshot(path)


def test_a_save_is_a_future_that_callbacks_and_coroutines_wait_for(tmp_path):
    cache, allocator, _ = busy()
    names = []

    async def save():
        pending = save_snapshot_async(tmp_path / "s", cache, allocator)
        assert isinstance(pending, PendingSnapshot) and pending.path == tmp_path / "s"
        pending.add_done_callback(lambda _: names.append(threading.current_thread().name))
        return await asyncio.wrap_future(pending)

    assert asyncio.run(save()).id == inspect_snapshot(tmp_path / "s").id
    save_snapshot_async(tmp_path / "s", cache, allocator).result(60)
    assert names == ["paged-decode-snapshots_0"]


def test_a_save_that_has_not_begun_can_be_cancelled_and_later_ones_keep_their_order(tmp_path):
    cache, allocator, _ = busy()
    with using(SlowFiles()) as slow:
        first = save_snapshot_async(tmp_path / "s", cache, allocator, metadata={"n": 1})
    with pytest.raises(TimeoutError):
        first.result(timeout=0.01)
    second = save_snapshot_async(tmp_path / "s", cache, allocator, metadata={"n": 2})
    other = save_snapshot_async(tmp_path / "other", cache, allocator)
    assert second.cancel() and not first.cancel()
    threading.Timer(0.1, slow.go.set).start()
    save_snapshot(tmp_path / "s", cache, allocator, metadata={"n": 3})
    assert first.done() and inspect_snapshot(tmp_path / "s").metadata == {"n": 3}
    with pytest.raises(CancelledError):
        second.result()
    assert other.result(60).path == tmp_path / "other"


@pytest.mark.parametrize("at_once", [False, True])
def test_the_writing_thread_never_waits_for_itself(tmp_path, monkeypatch, at_once):
    """Also where it is faster than the caller who has given it the file."""
    cache, allocator, _ = busy()
    errors = []
    if at_once:
        submit = ThreadPoolExecutor.submit

        def slow(self, *args):
            future = submit(self, *args)
            time.sleep(0.2 if args[0].__name__ == "_run" else 0)
            return future

        monkeypatch.setattr(ThreadPoolExecutor, "submit", slow)

    def progress(done, total):
        if not errors:
            with pytest.raises(RuntimeError, match="yet to be written by this thread") as caught:
                save_snapshot(tmp_path / "s", cache, allocator)
            errors.append(caught.value)
            save_snapshot(tmp_path / "other", cache, allocator)

    save_snapshot_async(tmp_path / "s", cache, allocator, progress=progress).result(60)
    assert errors and inspect_snapshot(tmp_path / "s").id == inspect_snapshot(tmp_path / "other").id


def test_files_are_whole_when_no_thread_is_to_be_had(tmp_path, monkeypatch):
    cache, allocator, _ = busy()
    save_snapshot(tmp_path / "with", cache, allocator)

    def refuse(self):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        save_snapshot(tmp_path / "without", cache, allocator)
    assert (tmp_path / "with").read_bytes() == (tmp_path / "without").read_bytes()
