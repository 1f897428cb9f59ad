"""What others install: wheel and sdist, in a Python that holds nothing but what they ask for."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
CONSUMER = Path(__file__).with_name("consumer.py")
SETUP = tomllib.loads((ROOT / "pyproject.toml").read_text())
HOME = SETUP["project"]["urls"]["Homepage"]
IGNORED = (".*", "build", "dist", "site", "out", "*.egg-info", "__pycache__")

pytestmark = pytest.mark.slow


def run(*command: str | Path, cwd: Path, status: int = 0, **variables: str) -> str:
    """What a command prints, all of it, with this exit status; our checkout is not on its path."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env |= {"JAX_PLATFORMS": "cpu", "COLUMNS": "100"} | variables
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == status, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, Path]:
    """The sdist of this checkout, and the wheel that is made of that sdist."""
    folder = tmp_path_factory.mktemp("built")
    tools, needs = folder / "tools", SETUP["build-system"]["requires"]
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", tools, *needs]
    if subprocess.run(pip, capture_output=True).returncode:
        pytest.skip(f"cannot install {', '.join(needs)}, which builds the package")
    tree = folder / "checkout"
    shutil.copytree(ROOT, tree, symlinks=True, ignore=shutil.ignore_patterns(*IGNORED))
    for hidden in (".ci", ".gitignore"):
        copy = shutil.copytree if (ROOT / hidden).is_dir() else shutil.copy
        copy(ROOT / hidden, tree / hidden)
    build = "from setuptools import build_meta; build_meta.build_{}('..')"
    run(sys.executable, "-c", build.format("sdist"), cwd=tree, PYTHONPATH=str(tools))
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as file:
        file.extractall(folder, filter="data")
    unpacked = folder / sdist.name.removesuffix(".tar.gz")
    run(sys.executable, "-c", build.format("wheel"), cwd=unpacked, PYTHONPATH=str(tools))
    return sdist, next(folder.glob("*.whl"))


def make_environment(folder: Path, wheel: Path, *extras: str) -> Path:
    """A Python with the wheel and what it asks for, linked from here; returns its `bin`."""
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    python = folder / "bin/python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-index"]
    run(*pip, "--no-deps", wheel, cwd=folder.parent)
    (site,) = folder.glob("lib/*/site-packages")
    (info,) = site.glob("paged_decode-*.dist-info")
    wanted, seen = [(metadata.Distribution.at(info), set(extras))], set[str]()
    while wanted:
        dist, chosen = wanted.pop()
        for each in map(Requirement, dist.requires or []):
            here = [
                e for e in ("", *chosen) if not each.marker or each.marker.evaluate({"extra": e})
            ]
            if here and each.name not in seen:
                seen.add(each.name)
                wanted.append((metadata.distribution(each.name), each.extras))
    for name in seen:
        for top in {file.parts[0] for file in metadata.files(name) or []} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(metadata.distribution(name).locate_file(top))
    return folder / "bin"


@pytest.fixture(scope="module")
def plain(built, tmp_path_factory) -> Path:
    return make_environment(tmp_path_factory.mktemp("plain") / "env", built[1])


@pytest.fixture(scope="module")
def whole(built, tmp_path_factory) -> Path:
    return make_environment(tmp_path_factory.mktemp("whole") / "env", built[1], "pressure")


def test_a_wheel_of_the_sdist_has_the_packages_and_nothing_bare(built):
    with zipfile.ZipFile(built[1]) as wheel:
        names = set(wheel.namelist())
        (about,) = (name for name in names if name.endswith("/METADATA"))
        text = wheel.read(about).decode()
    assert {n.split("/")[0] for n in names if ".dist-info" not in n} == {"paged_decode"}
    ours = {n for n in names if n.endswith(".py")}
    rooms = {"paged_decode": "paged_decode", "allocator": "paged_decode/allocator"}
    rooms |= {"kernels": "paged_decode/kernels"}
    assert ours == {
        f"{inside}/{path.relative_to(ROOT / room).as_posix()}"
        for room, inside in rooms.items()
        for path in (ROOT / room).rglob("*.py")
        if not any(parent.is_symlink() for parent in path.parents if ROOT in parent.parents)
    }
    assert "paged_decode/py.typed" in names
    assert "Classifier: Typing :: Typed" in text
    for label in ("Homepage", "Documentation", "Issues", "Changelog"):
        assert f"Project-URL: {label}, {HOME}" in text


def test_the_description_of_the_package_has_no_relative_link(built):
    with zipfile.ZipFile(built[1]) as wheel:
        about = next(name for name in wheel.namelist() if name.endswith("/METADATA"))
        text = wheel.read(about).decode().split("\n\n", 1)[1]
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert f"{HOME}/blob/main/docs/allocator.md#layers-that-see-a-window" in links
    assert f"{HOME}/raw/main/docs/demo_timeline.png" in links
    assert [link for link in links if not link.startswith("https://")] == []


def test_an_sdist_has_every_test_page_and_example_and_runs_like_a_checkout(built):
    sdist = built[0]
    with tarfile.open(sdist) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    folders = (".ci", "allocator", "benchmarks", "docs", "examples", "kernels", "tests")
    wanted = {
        path.relative_to(ROOT).as_posix()
        for folder in folders
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix not in (".pyc", ".gguf")
    }
    wanted |= {path.name for path in ROOT.glob("*.md")} | {"Makefile", "mkdocs.yml", "LICENSE"}
    assert wanted <= names
    unpacked = sdist.with_name(sdist.name.removesuffix(".tar.gz"))
    tests = ("tests/test_house.py", "-k", "room or lines", "-q", "-p", "no:cacheprovider")
    assert " passed" in run(sys.executable, "-m", "pytest", *tests, cwd=unpacked)
    where = "import paged_decode.kernels as k; print(k.__file__)"
    assert run(sys.executable, "-c", where, cwd=unpacked).startswith(str(unpacked))


def test_the_snippets_of_readme_run_one_after_the_other(plain, tmp_path):
    parts = re.findall(r"```python\n(.+?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (tmp_path / "snippets.py").write_text("\n".join(parts))
    said = run(plain / "python", "snippets.py", cwd=tmp_path).splitlines()
    assert [line.split(":")[0] for line in said[:3]] == [
        f"{found} of {length} prompt tokens found"
        for found, length in ((0, 42), (32, 43), (32, 41))
    ]
    assert len(said[3:]) == 4 * 8 and said[-1].endswith("length")


def test_every_command_of_a_plain_install_runs_or_names_the_extra_in_one_line(plain, tmp_path):
    version = f"paged-decode {SETUP['project']['version']}"
    assert run(plain / "paged-decode", "--version", cwd=tmp_path) == f"{version}\n"
    as_module = (plain / "python", "-m", "paged_decode.cli", "--version")
    assert run(*as_module, cwd=tmp_path) == f"{version}\n"
    said = run(plain / "paged-decode", "doctor", cwd=tmp_path)
    assert version in said and "agrees with the reference" in said

    (tmp_path / "mine.py").write_text(ENGINE)
    told = say(
        SAVE,
        "plan --layers 4 --kv-heads 2 --head-dim 64 --heads 4 --cache-bytes 1GiB --rows 4",
        "snapshot inspect one.pgd",
        "snapshot verify one.pgd",
        "snapshot compact two.pgd -o three.pgd",
        "pressure sweep tree --limit 2 --pages 50",
        "pressure run tree --limit 2 --num-pages 400 --engine mine.py:make",
        python=plain / "python",
        cwd=tmp_path,
    )
    assert [status for status, _ in told] == [0, 0, 0, 0, 1, 1]
    for (_, text), word in zip(told, ("32768", "pages", "sound", "three.pgd"), strict=False):
        assert word in text
    scripts = [
        run(plain / "python", ROOT / "examples" / name, cwd=tmp_path, status=1)
        for name in ("demo.py", "generate.py", "chat.py")
    ]
    for extra, text in zip(
        ("pressure", "pressure", "examples", "examples", "examples"),
        (told[4][1], told[5][1], *scripts),
        strict=True,
    ):
        (line,) = text.splitlines()
        assert "not installed" in line and f"pip install 'paged-decode[{extra}]'" in line


def test_pressure_runs_with_its_extra(whole, tmp_path):
    (tmp_path / "mine.py").write_text(ENGINE)
    told = say(
        "",
        "pressure sweep tree --limit 3 --pages 200 400 --out swept",
        "pressure compare swept/sweep.json",
        "pressure run tree --limit 2 --time-scale 0 --num-pages 400 --engine mine.py:make --out r",
        python=whole / "python",
        cwd=tmp_path,
    )
    assert [status for status, _ in told] == [0, 0, 0], told
    assert (tmp_path / "swept/report.html").exists() and (tmp_path / "r/report.json").exists()


def say(before: str, *commands: str, python: Path, cwd: Path) -> list[tuple[int, str]]:
    """Exit status and words of commands that one process runs, after the code `before`."""
    words = (python, "-c", before + COMMANDS, *commands)
    return json.loads(run(*words, cwd=cwd).splitlines()[-1])


COMMANDS = """
import contextlib, io, json, sys
from paged_decode.cli import main

said, commands = [], sys.argv[1:]
for words in commands:
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
        status = main(words.split())
    said.append((status, out.getvalue()))
print(json.dumps(said))
"""

SAVE = """
from paged_decode import BlockAllocator, KVCache, save_snapshot
allocator = BlockAllocator(9, 4)
cache = KVCache.create(num_layers=1, num_pages=9, num_kv_heads=1, page_size=4, head_dim=8)
handle = allocator.allocate([1, 2, 3, 4, 5])
allocator.commit(handle, 5)
one = save_snapshot("one.pgd", cache, allocator)
save_snapshot("two.pgd", cache, allocator, parent=one)
"""

ENGINE = """
import jax
import jax.numpy as jnp
from paged_decode import BlockAllocator, Engine, EngineConfig, KVCache


def model(params, cache, tokens, batch):
    x = params[tokens]
    seen, cache = cache.append_and_attend(0, x, x, x, batch)
    return jnp.einsum("bhd,vhd->bv", seen[:, -1], params), cache


def make(num_pages, page_size=16, *, eviction=None, **policies):
    cache = KVCache.create(
        num_layers=1, num_pages=num_pages, num_kv_heads=1, page_size=page_size, head_dim=8
    )
    allocator = BlockAllocator(num_pages, page_size, eviction=eviction)
    config = EngineConfig(
        max_rows=2, row_buckets=(2,), prefill_chunk=512, prefill_rows=1, vocab_size=64,
        max_sequence_tokens=4096,
    )
    params = jax.random.normal(jax.random.key(0), (64, 1, 8))
    return Engine(model, params, cache, allocator, config, **policies)
"""


def test_mypy_strict_of_a_user_sees_the_types(plain, tmp_path):
    if importlib.util.find_spec("mypy") is None:
        pytest.skip("mypy is not installed: it is part of the `test` extra")
    shutil.copy(CONSUMER, tmp_path)
    mypy = (sys.executable, "-m", "mypy", "--strict", "--python-executable", plain / "python")
    said = run(*mypy, "--cache-dir", tmp_path / "cache", CONSUMER.name, cwd=tmp_path)
    assert "Success" in said


def test_pyright_of_a_user_sees_the_types(plain, tmp_path):
    shutil.copy(CONSUMER, tmp_path)
    pyright = (sys.executable, "-m", "pyright", "--pythonpath", plain / "python")
    assert "0 errors, 0 warnings" in run(*pyright, CONSUMER.name, cwd=tmp_path)
