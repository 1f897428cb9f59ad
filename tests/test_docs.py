"""The documentation says what the code does: examples run, names exist, the API page is whole."""

from __future__ import annotations

import ast
import doctest
import importlib.util
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from . import page_setup
from .api_page import garbled_examples, missing_names

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
FENCED = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def snippets(text: str) -> list[tuple[int, str]]:
    """The Python blocks of a page that are no doctests, each with the line it begins at."""
    found = [(text[: m.start()].count("\n") + 1, m[1]) for m in FENCED.finditer(text)]
    return [(line, code) for line, code in found if ">>>" not in code]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_examples_of_a_page_run(page):
    lines = page.read_text().splitlines(keepends=True)
    text = "".join("\n" if line.startswith("```") else line for line in lines)
    test = doctest.DocTestParser().get_doctest(text, {}, page.name, None, 0)
    assert doctest.DocTestRunner().run(test).failed == 0


@pytest.mark.parametrize(
    "page",
    [p for p in PAGES if snippets(p.read_text()) and p.name not in page_setup.ELSEWHERE],
    ids=lambda page: page.name,
)
def test_snippets_of_a_page_run_in_order(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = getattr(page_setup, page.stem.replace("-", "_"), dict)()
    for line, code in snippets(page.read_text()):
        exec(compile("\n" * line + code, page, "exec"), names)


def test_pages_whose_snippets_run_elsewhere_name_a_test_that_exists():
    for page, test in page_setup.ELSEWHERE.items():
        assert (DOCS / page).exists() and (ROOT / test).exists(), (page, test)


# ---- the built pages


def test_the_docs_build_strictly_with_every_public_name_and_its_examples_as_code(tmp_path):
    if importlib.util.find_spec("mkdocs") is None:
        pytest.skip("mkdocs is not installed: pip install '.[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    html = (tmp_path / "api" / "index.html").read_text()
    assert missing_names(html) == set()
    assert garbled_examples(html) == set()


def test_a_page_without_a_method_or_with_a_prompt_in_its_prose_is_found_out():
    whole = '<h3 id="paged_decode.faults.Faults"></h3><h4 id="paged_decode.faults.Faults.install">'
    lost = missing_names(whole, ["paged_decode.faults"])
    assert "paged_decode.faults.FaultPlan" in lost  # no heading
    assert "paged_decode.faults.Faults.replay" in lost  # a heading, but not for this method
    assert "paged_decode.faults.Faults.install" not in lost
    assert garbled_examples("<pre>&gt;&gt;&gt; <b>1</b></pre>") == set()
    assert garbled_examples("<p>Example: &gt;&gt;&gt; 1 + 1</p>") == {">>> 1 + 1"}
    cache = '<h3 id="paged_decode.KVCache"></h3>'
    assert garbled_examples(cache) == {">>> cache = KVCache.create("}


# ---- names and links


@cache
def names_of_tests() -> set[str]:
    trees = [ast.parse(path.read_text()) for path in (ROOT / "tests").rglob("test_*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return {node.name for node in nodes if isinstance(node, kinds)}


def unproven(text: str, known: set[str]) -> list[str]:
    """Tests that a page names but that are not there, and rows of a table that name none."""
    wrong = [name for name in re.findall(r"`(test_\w+)`", text) if name not in known]
    rows = re.findall(r"^\|(?:.*)\| tests? \|\n\|[-| ]+\|\n((?:\|.*\n?)+)", text, re.MULTILINE)
    for row in "".join(rows).splitlines():
        if not re.search(r"`test_\w+`[^|]*\|$", row):
            wrong.append(row)
    return wrong


@pytest.mark.parametrize("page", [*PAGES, ROOT / "SECURITY.md"], ids=lambda page: page.name)
def test_every_test_that_a_page_names_exists_and_every_rule_has_one(page):
    assert unproven(page.read_text(), names_of_tests()) == []


def test_a_missing_test_and_a_rule_without_one_are_found_out():
    table = "| rule | test |\n|---|---|\n| a | `test_a` |\n| b | |\n| c | `test_c` |\n"
    assert unproven(table, {"test_a"}) == ["test_c", "| b | |"]


def test_the_start_page_and_the_navigation_lead_to_every_page():
    links = set(re.findall(r"\]\((\S+\.md)", (DOCS / "index.md").read_text()))
    pages = {page.name for page in PAGES}
    assert links | {"index.md"} == pages
    assert set(re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M)) == pages


# ---- tables that a program writes


def test_the_table_of_backends_says_what_the_code_answers():
    pytest.importorskip("triton", reason="the table has a column for the Triton kernel")
    command = [sys.executable, "benchmarks/backend_table.py", "--check"]
    subprocess.run(command, cwd=ROOT, check=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})


def test_the_tables_of_results_say_what_the_files_hold():
    command = [sys.executable, "benchmarks/report.py", "--check"]
    subprocess.run(command, cwd=ROOT, check=True)
