"""Text that a file chose reaches a terminal or a message only where it can do no harm."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from paged_decode import SnapshotError, compact_snapshot, load_snapshot, save_snapshot
from paged_decode._text import printable, shown
from paged_decode.cli import main

from . import independent_reader
from .forge import build
from .small import busy, make_allocator, make_cache

ROOT = Path(__file__).parents[3]
EVIL = {
    "escape": "\x1b[2J\x1b]0;owned\x07",
    "line ends": "a\nb\r\x85\u2028\u2029c",
    "direction": "\u202egnp.exe\u2066\u200f",
    "invisible": "a\u200bb\u2060c\ufeffd\xad",
    "controls": "\0\x08\x7f\x9b31m",
    "not assigned": "\U000e0001\uffff\ue000",
}


def assert_harmless(text: str, lines: int | None = None) -> None:
    assert all(line.isprintable() for line in text.split("\n")), text
    assert lines is None or text.count("\n") == lines


@pytest.mark.parametrize("kind", EVIL)
def test_what_is_not_printable_is_escaped_and_the_rest_is_kept(kind):
    text = printable(f"é 漢 {EVIL[kind]} ok")
    assert_harmless(text, 0)
    assert text.startswith("é 漢 ") and text.endswith(" ok") and "\\" in text
    assert printable("halves \udc80\ud800") == "halves \\udc80\\ud800"
    assert printable("x" * 300, 80) == "x" * 38 + "..." + "x" * 38
    assert len(shown("\x1b" * 10**6)) < 400 and shown([[[["deep"] * 99]]]).isprintable()


def forged(folder, text: str) -> Path:
    """A sound file: a name of an array, a name of a parent, metadata and a salt are `text`."""
    cache, allocator, _ = busy(fingerprint=text.encode())
    name = "".join(c for c in text if c not in "/\\:\0") or "x"
    save_snapshot(folder / name, cache, allocator)
    fields, arrays, ident = independent_reader.read(folder / name)
    for old in [n for n in arrays if n.startswith("kv/")]:
        arrays[f"{old}{text}"] = arrays.pop(old)
    (folder / name).write_bytes(build(fields, arrays))
    ident = independent_reader.read(folder / name)[2]
    arrays = arrays | {n: a[:0] for n, a in arrays.items() if n.startswith("kv/")}
    arrays["pages/source"] = np.arange(-1, -10, -1, dtype=np.int32)
    fields |= {"parent": [ident, name, 9], "metadata": {text: text, "x" * 10**5: "y" * 10**5}}
    (folder / "delta").write_bytes(build(fields, arrays))
    return folder / "delta"


@pytest.mark.parametrize("kind", EVIL)
def test_the_console_shows_names_of_a_file_escaped_and_short(tmp_path, capsys, kind):
    path = forged(tmp_path, EVIL[kind])
    for action in ("inspect", "verify", "compact"):
        assert main(["snapshot", action, str(path)]) == 0
        out = capsys.readouterr().out
        assert_harmless(out)
        assert max(map(len, out.split("\n"))) < 500


@pytest.mark.parametrize("kind", EVIL)
def test_messages_hold_names_of_a_file_and_paths_escaped_on_one_line(tmp_path, capsys, kind):
    folder = tmp_path / printable(EVIL[kind]).replace("/", "").replace("\\", "")
    folder.mkdir()
    path = forged(folder, EVIL[kind])
    with pytest.raises(SnapshotError) as caught:
        load_snapshot(path, make_cache(9), make_allocator(9))
    assert_harmless(str(caught.value), 0)
    assert "fingerprint" in str(caught.value) and len(str(caught.value)) < 2000
    good = path.read_bytes()
    for at in range(40, len(good), 211):  # whichever rule a flipped bit breaks
        path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        with pytest.raises(SnapshotError) as caught:
            compact_snapshot(path, tmp_path / "out")
        assert_harmless(str(caught.value), 0)
    (parent,) = (p for p in folder.iterdir() if p != path)
    os.unlink(parent)
    path.write_bytes(good)
    assert main(["snapshot", "verify", str(path)]) == 1
    assert_harmless(capsys.readouterr().err, 1)


@pytest.mark.parametrize("kind", sorted(set(EVIL) - {"controls"}))
def test_paths_in_messages_are_escaped_too(tmp_path, capsys, kind):
    path = tmp_path / EVIL[kind]
    path.write_bytes(b"\x89PGD\r\n\x1a\n")
    for action in ("inspect", "verify", "compact"):
        assert main(["snapshot", action, str(path)]) == 1
        assert_harmless(capsys.readouterr().err, 1)
    cache, allocator, _ = busy()
    base = save_snapshot(path, cache, allocator)
    assert main(["snapshot", "inspect", str(path)]) == 0
    assert_harmless(capsys.readouterr().out)
    os.unlink(path)
    with pytest.raises(ValueError) as caught:
        save_snapshot(tmp_path / "delta", cache, allocator, parent=base)
    assert_harmless(str(caught.value), 0)


@pytest.mark.parametrize(
    "change",
    [
        lambda arrays, text: arrays.update({text: np.zeros(1)}),
        lambda arrays, text: arrays.update({f"kv/{text}": np.zeros((3, 1), np.int8)}),
        lambda arrays, text: arrays.update({f"kv/{text}": np.zeros((9, 1), np.complex64)}),
    ],
    ids=["unknown name", "rows", "dtype"],
)
@pytest.mark.parametrize("kind", EVIL)
def test_a_name_in_a_refusal_is_escaped(tmp_path, kind, change):
    cache, allocator, _ = busy()
    save_snapshot(tmp_path / "s", cache, allocator)
    fields, arrays, _ = independent_reader.read(tmp_path / "s")
    change(arrays, EVIL[kind])
    (tmp_path / "s").write_bytes(build(fields, arrays))
    with pytest.raises(SnapshotError) as caught:
        load_snapshot(tmp_path / "s", cache, allocator)
    assert_harmless(str(caught.value), 0)


def test_a_terminal_without_the_letters_gets_escapes_and_no_traceback(tmp_path):
    cache, allocator, _ = busy()
    save_snapshot(tmp_path / "é", cache, allocator, metadata={"漢": "字"})
    command = [sys.executable, "-m", "paged_decode.cli", "snapshot", "inspect", tmp_path / "é"]
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert b"\\xe9" in done.stdout and b"\\u6f22" in done.stdout


def test_text_that_is_not_unicode_is_refused_before_anything_is_written(tmp_path):
    cache, allocator, _ = busy()
    for metadata in ({"\udc80": 1}, {"a": "\ud800"}):
        with pytest.raises(ValueError, match="metadata '.*' is not valid Unicode"):
            save_snapshot(tmp_path / "s", cache, allocator, metadata=metadata)
    with pytest.raises(ValueError, match="255 bytes of Unicode"):
        save_snapshot(tmp_path / "s", {"\udc80": np.zeros((24, 3))}, allocator)
    with pytest.raises(ValueError, match="axes in a page"):
        save_snapshot(tmp_path / "s", {"k": np.zeros((1, 24, *[1] * 8))}, allocator)
    odd = os.fsdecode(bytes(tmp_path) + b"/\xff")
    base = save_snapshot(odd, cache, allocator)
    with pytest.raises(ValueError, match="cannot be stored") as caught:
        save_snapshot(tmp_path / "s", cache, allocator, parent=base)
    assert_harmless(str(caught.value), 0)
    assert not (tmp_path / "s").exists()
