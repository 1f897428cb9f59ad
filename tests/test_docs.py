"""The examples of the documentation run."""

from __future__ import annotations

import doctest
import os
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.parametrize("page", sorted(p.name for p in DOCS.glob("*.md")))
def test_examples_of_a_page_run(page):
    lines = (DOCS / page).read_text().splitlines(keepends=True)
    text = "".join("\n" if line.startswith("```") else line for line in lines)
    test = doctest.DocTestParser().get_doctest(text, {}, page, None, 0)
    assert doctest.DocTestRunner().run(test).failed == 0


def test_the_table_of_backends_says_what_the_code_answers():
    pytest.importorskip("triton", reason="the table has a column for the Triton kernel")
    command = [sys.executable, "benchmarks/backend_table.py", "--check"]
    subprocess.run(command, cwd=DOCS.parent, check=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})


def test_the_tables_of_results_say_what_the_files_hold():
    command = [sys.executable, "benchmarks/report.py", "--check"]
    subprocess.run(command, cwd=DOCS.parent, check=True)
