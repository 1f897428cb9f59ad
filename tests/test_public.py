"""What README, docs and metadata promise to users: names, links, extras, versions."""

from __future__ import annotations

import builtins
import importlib
import os
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

import paged_decode
from paged_decode import errors

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
FOLDERS = ("allocator", "engine", "kernels", "planning", "pressure", "snapshot", "tiers")
FILES = ("errors", "faults", "policies", "sharding")
MODULES = [
    paged_decode,
    *(importlib.import_module(f"paged_decode.{name}") for name in (*FOLDERS, *FILES)),
]


def named(path: Path) -> set[str]:
    """Names of Python in the tables of a page: `LRU`, `Engine.restore`, `EvictionRank.rank`."""
    rows = [line for line in path.read_text().splitlines() if line.startswith("|")]
    spans = re.findall(r"`([^`]+)`", "\n".join(rows))
    name = re.compile(r"((?:\w+\.)*(?:[A-Z]+[a-z]\w+|[A-Z]{3,4})(?:\.\w+)*)(?:\(.*)?")
    return {found[1] for span in spans if (found := name.fullmatch(span))}


def has(module: object, name: str) -> bool:
    for part in name.split("."):
        if (module := getattr(module, part, None)) is None:
            return False
    return True


# Pages for those who come from elsewhere name what is there.
OURS = [page for page in PAGES if not page.name.startswith("from-")]


@pytest.mark.parametrize("page", OURS, ids=lambda path: path.name)
def test_every_name_in_the_tables_of_a_page_is_where_a_reader_looks_for_it(page):
    lost = {name for name in named(page) if not any(has(m, name) for m in (*MODULES, builtins))}
    assert not lost


def test_the_table_of_policies_is_about_names_of_policies():
    from paged_decode import policies

    table = named(ROOT / "docs/pressure.md")
    assert {"LRU", "FIFO", "Swap", "MustFit", "LastAdmitted", "VictimPolicy.choose"} <= table
    assert not {name for name in table if not has(policies, name) and not has(paged_decode, name)}


def test_errors_has_every_exception_that_the_library_shows():
    shown = {
        value
        for module in MODULES
        for name in module.__all__
        if isinstance(value := getattr(module, name), type) and issubclass(value, BaseException)
    }
    assert shown == {getattr(errors, name) for name in errors.__all__}
    bad_state = {each for each in shown if issubclass(each, errors.PagedDecodeError)}
    assert {getattr(paged_decode, each.__name__) for each in bad_state} == bad_state


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_a_public_module_lists_what_it_has_once(module):
    assert len(set(module.__all__)) == len(module.__all__)
    assert [name for name in module.__all__ if not hasattr(module, name)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_what_a_page_links_to_is_there(page):
    targets = re.findall(r"\]\((?!\w+:|#)([^)#\s]+)", page.read_text())
    assert [each for each in targets if not (page.parent / each).exists()] == []


def test_readme_has_a_line_for_every_extra():
    text = (ROOT / "README.md").read_text()
    table = text[text.index("| extra |") :].split("\n\n")[0]
    cells = [line.split("|")[1] for line in table.splitlines()[2:]]
    assert set(re.findall(r"`(\w+)`", "".join(cells))) == set(PROJECT["optional-dependencies"])


def test_the_version_is_one_and_the_changelog_has_its_day():
    assert paged_decode.__version__ == metadata.version("paged-decode") == PROJECT["version"]
    heads = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert heads[0] == "Unreleased"
    assert re.fullmatch(rf"{re.escape(PROJECT['version'])} - \d{{4}}-\d\d-\d\d", heads[1])
    assert set(PROJECT["urls"]) == {"Homepage", "Documentation", "Issues", "Changelog"}


def test_a_missing_package_is_one_line_that_names_the_extra():
    from paged_decode._optional import needs

    with pytest.raises(errors.MissingExtra) as caught, needs("pressure"):
        importlib.import_module("tqdm_of_tomorrow")
    assert str(caught.value).count("\n") == 0
    assert "tqdm_of_tomorrow is not installed" in str(caught.value)
    assert "pip install 'paged-decode[pressure]'" in str(caught.value)
    assert (caught.value.name, caught.value.extra) == ("tqdm_of_tomorrow", "pressure")
    with pytest.raises(errors.MissingExtra, match=r"\[pressure\]"), needs("examples"):
        raise caught.value  # the inner one knows better
    with pytest.raises(SystemExit, match=r"\[examples\]"), needs("examples", or_exit=True):
        importlib.import_module("tokenizers_of_tomorrow")


def test_the_peer_of_a_benchmark_does_not_take_our_kernels_for_a_package(tmp_path):
    (tmp_path / "torch.py").write_text("set_num_threads = print\n")
    (tmp_path / "transformers.py").write_text("import kernels\n")
    code = "import _transformers_peer as peer; peer.TransformersPeer(peer.Path('model.gguf'))"
    path = os.pathsep.join(map(str, (tmp_path, ROOT, ROOT / "benchmarks")))
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "No module named 'kernels'" in done.stderr
