"""The commands a user types, on the real model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GOLDEN = json.loads((ROOT / "tests/golden/smollm2_greedy.json").read_text())["cases"]


def run(
    *args: object, script: str = "generate.py", cwd: Path = ROOT
) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "examples" / script), *map(str, args)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        "--page-size 16",
        "--page-size 1 --no-prefix-cache --num-pages 160",
        "--page-size 64 --num-pages 4 --prefill-chunk 8 --decode-steps 5",
        "--page-size 16 --one-by-one",
    ],
)
def test_greedy_ids_and_logits_equal_the_golden_file(real_gguf, tmp_path, options):
    """Including pools in which samples must be preempted."""
    prompts = [{"name": c["name"], "prompt_ids": c["prompt_ids"]} for c in GOLDEN]
    (tmp_path / "in.json").write_text(json.dumps(prompts))
    out = tmp_path / "out.json"
    done = run(
        *("--gguf", real_gguf, "--ids-file", tmp_path / "in.json", "--max-new", 64),
        *("--dtype", "float32", "--top-logits", 5, "--json", out, *options.split()),
    )
    assert done.returncode == 0, done.stderr
    assert ("--num-pages" in options) == (" 0 preemptions" not in done.stderr)
    results = json.loads(out.read_text())
    assert [r["name"] for r in results] == [c["name"] for c in GOLDEN]
    for result, case in zip(results, GOLDEN, strict=True):
        assert result["greedy_ids"] == case["greedy_ids"]
        for (got, logit), (want, reference) in zip(
            result["last_prompt_top5"], case["last_prompt_top5"], strict=True
        ):
            assert got == want and abs(logit - reference) < 1e-3


@pytest.mark.parametrize(
    "ids, message",
    [
        ("[]", "at least one"),
        ("{}", "must hold"),
        ('[{"name": "a"}]', "must hold"),
        ("[", "JSON"),
    ],
)
def test_a_bad_ids_file_is_one_line_on_stderr(tmp_path, ids, message):
    (tmp_path / "in.json").write_text(ids)
    done = run("--gguf", "none.gguf", "--ids-file", tmp_path / "in.json")
    assert done.returncode == 1 and message in done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_missing_model_is_one_line_on_stderr(tmp_path):
    done = run("--gguf", tmp_path / "none.gguf", "hello")
    assert done.returncode == 1 and "none.gguf" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_the_demo_prints_its_table_and_draws_its_timeline(real_gguf, tmp_path):
    done = run(script="demo.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for measure in ("computed", "generated", "prefix cache", "tail waste", "preemptions"):
        assert measure in done.stdout
    assert (tmp_path / "out" / "demo_timeline.png").stat().st_size > 10_000
