"""The tree itself: names, imports, packaging."""

from __future__ import annotations

import ast
import doctest
import importlib
import pkgutil
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from jaxtyping import TypeCheckError

import paged_decode
from paged_decode.allocator import BlockAllocator
from paged_decode.kernels import paged_attention

ROOT = Path(__file__).parents[1]
ROOMS = ("allocator", "kernels", "paged_decode")
SOURCES = sorted(
    path
    for room in ROOMS
    for path in (ROOT / room).rglob("*.py")
    if not any(parent.is_symlink() for parent in path.parents if parent != ROOT)
)


def imports_of(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("." * node.level + (node.module or ""))
    return names


def test_every_room_is_listed_for_the_wheel():
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = {
        ".".join(("paged_decode", *path.parent.relative_to(ROOT).parts)).replace(
            "paged_decode.paged_decode", "paged_decode"
        )
        for path in SOURCES
    }
    assert found == set(setup["packages"]) == set(setup["package-dir"])


def test_the_rooms_depend_in_one_direction():
    for path in SOURCES:
        room = path.relative_to(ROOT).parts[0]
        for name in imports_of(path):
            if room == "allocator":
                assert not name.startswith(("jax", "paged_decode", "..")), (path, name)
            if room == "kernels":
                assert not name.startswith("paged_decode"), (path, name)


def test_no_library_code_asserts_or_unpickles():
    for path in SOURCES:
        tree = ast.parse(path.read_text())
        assert not [n.lineno for n in ast.walk(tree) if isinstance(n, ast.Assert)], path
        assert not imports_of(path) & {"pickle", "dill", "cloudpickle"}, path


def test_no_file_of_the_library_exceeds_500_lines():
    assert {p.name: n for p in SOURCES if (n := len(p.read_text().splitlines())) > 500} == {}


def test_annotations_are_checked_with_a_shape_and_without_one_until_a_test_turns_it_off(request):
    allocator, pages = BlockAllocator(9, 4), np.zeros((2, 1, 4, 8), np.float32)
    tables = np.zeros((1, 3), np.int32), np.zeros(1, np.int32)

    def wrong():
        yield TypeError, lambda: allocator.ref_count("a page")  # type: ignore
        yield ValueError, lambda: paged_attention(np.zeros(8, np.float32), pages, pages, *tables)

    for _, call in wrong():
        with pytest.raises(TypeCheckError):
            call()
    request.getfixturevalue("unchecked")
    for error, call in wrong():
        with pytest.raises(error) as caught:
            call()
        assert not isinstance(caught.value, TypeCheckError)


def test_importing_the_package_touches_no_device():
    code = "import jax; jax.devices = None; import paged_decode; import jax._src.xla_bridge as b; "
    code += "raise SystemExit(bool(b._backends))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_every_public_name_is_documented():
    for name in paged_decode.__all__:
        value = getattr(paged_decode, name)
        assert value.__doc__ and len(value.__doc__) > 20, name


MODULES = sorted(
    {"paged_decode"}
    | {m.name for m in pkgutil.walk_packages(paged_decode.__path__, "paged_decode.")}
)


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_run(name):
    if ".triton" in name:
        pytest.importorskip("triton", reason="the Triton kernels need the `cuda` extra")
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0
