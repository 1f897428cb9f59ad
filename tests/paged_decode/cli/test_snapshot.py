"""The console command says what a file holds, and fails with a message and not a traceback."""

from __future__ import annotations

from paged_decode import inspect_snapshot, save_snapshot
from paged_decode.cli import main

from ..snapshot.grouped import LEDGER, with_pages
from ..snapshot.small import busy
from ..snapshot.test_groups import cached


def test_inspect_verify_and_compact_a_chain(tmp_path, capsys):
    cache, allocator, handles = busy(fingerprint=b"\xab")
    parent = save_snapshot(tmp_path / "a", cache, allocator, metadata={"turn": 1})
    allocator.free(handles[0])
    save_snapshot(tmp_path / "b", cache, allocator, parent=parent)
    assert main(["snapshot", "inspect", str(tmp_path / "a")]) == 0
    shown = capsys.readouterr().out
    for part in ("none: whole", "9 of 4 tokens", "5 with 28 tokens", "metadata 'turn'", "ab"):
        assert part in shown
    assert "kv/k_pages/0" in shown and "9x2x4x3" in shown and "float32" in shown
    assert main(["snapshot", "verify", str(tmp_path / "b")]) == 0
    assert "every checksum compared" in capsys.readouterr().out
    assert main(["snapshot", "compact", str(tmp_path / "b"), "-o", str(tmp_path / "a")]) == 1
    assert "is a parent of" in capsys.readouterr().err
    assert main(["snapshot", "compact", str(tmp_path / "b"), "-o", str(tmp_path / "c")]) == 0
    assert inspect_snapshot(tmp_path / "c").parent is None
    assert main(["snapshot", "compact", str(tmp_path / "b")]) == 0
    assert (tmp_path / "b").read_bytes() == (tmp_path / "c").read_bytes()


def test_inspect_says_what_each_group_of_layers_has(tmp_path, capsys):
    life = cached(with_pages(LEDGER, 80, 80, 80))
    save_snapshot(tmp_path / "a", life.cache, life.allocator)
    assert main(["snapshot", "inspect", str(tmp_path / "a")]) == 0
    shown = capsys.readouterr().out
    for part in ("pages, no layers", "1 layers see 6 tokens", "1 layers see 1 tokens"):
        assert part in shown
    assert "group/1/entry_page" in shown


def test_a_bad_file_is_one_line_and_status_1(tmp_path, capsys):
    (tmp_path / "bad").write_bytes(b"nothing")
    for path, text in ((tmp_path / "bad", "SnapshotCorrupt"), (tmp_path / "no", "FileNotFound")):
        for action in ("inspect", "verify", "compact"):
            assert main(["snapshot", action, str(path)]) == 1
            error = capsys.readouterr().err
            assert text in error and str(path) in error and error.count("\n") == 1
