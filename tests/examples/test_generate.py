"""The commands a user types, on the real model."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import chat
import generate
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from .test_gemma import dense_logits
from .tiny_gguf import llama_weights, write_llama
from .tiny_models import VOCAB, gemma_weights, write_gemma

ROOT = Path(__file__).parents[2]
GOLDEN = json.loads((ROOT / "tests/golden/smollm2_greedy.json").read_text())["cases"]
GEMMA = json.loads((ROOT / "tests/golden/gemma3_greedy.json").read_text())["cases"]


def run(
    *args: object, script: str = "generate.py", cwd: Path = ROOT
) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "examples" / script), *map(str, args)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


def check(gguf: Path, golden: list[dict], folder: Path, options: str, atol: float = 1e-3) -> str:
    """Compare ids, and the logits that both sides have; what was said on stderr."""
    prompts = [{"name": c["name"], "prompt_ids": c["prompt_ids"]} for c in golden]
    (folder / "in.json").write_text(json.dumps(prompts))
    out = folder / "out.json"
    new = len(golden[0]["greedy_ids"])
    done = run(
        *("--model", gguf, "--ids-file", folder / "in.json", "--max-new", new),
        *("--dtype", "float32", "--top-logits", 5, "--json", out, *options.split()),
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    assert ("--num-pages" in options) == (" 0 preemptions" not in done.stderr)
    results = json.loads(out.read_text())
    assert [r["name"] for r in results] == [c["name"] for c in golden]
    for result, case in zip(results, golden, strict=True):
        assert result["greedy_ids"] == case["greedy_ids"]
        for place in ("last_prompt_top5", "final_step_top5"):
            for (got, logit), (want, reference) in zip(result[place], case[place], strict=True):
                assert got == want and abs(logit - reference) < atol
    return done.stderr


@pytest.mark.long
@pytest.mark.parametrize(
    "options",
    [
        "--page-size 16",
        "--page-size 1 --no-prefix-cache --num-pages 160",
        "--page-size 64 --num-pages 4 --prefill-chunk 8 --decode-steps 5",
        "--page-size 16 --one-by-one",
        "--page-size 16 --num-pages 10 --host-pages 20",
        "--page-size 16 --snapshot-at 40 answer.pgd",
    ],
)
def test_greedy_ids_and_logits_equal_the_golden_file(real_gguf, tmp_path, options):
    """Including pools in which samples must be preempted."""
    said = check(real_gguf, GOLDEN, tmp_path, options)
    assert ("--host-pages" in options) == ("back from the host" in said)
    assert " 0 back from the host" not in said


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        "--page-size 1 --no-prefix-cache --num-pages 1200 --window-pages 1100",
        "--page-size 16 --no-prefix-cache --num-pages 80 --window-pages 80 --host-pages 200",
        "--page-size 64 --prefill-chunk 96 --decode-steps 5 --snapshot-at 40 answer.pgd",
    ],
)
def test_gemma_says_the_golden_words_in_two_page_groups(real_gemma, tmp_path, options):
    said = check(real_gemma, GEMMA, tmp_path, options)
    assert "pages for windows of 512" in said


@pytest.mark.parametrize(
    "options",
    [
        pytest.param("--page-size 1 --no-prefix-cache --devices 2", marks=pytest.mark.long),
        "--page-size 4 --num-pages 18 --window-pages 11 --prefill-chunk 8 --decode-steps 3",
        pytest.param(
            "--num-pages 18 --page-size 4 --prefill-chunk 8 --no-prefix-cache --host-pages 40",
            marks=pytest.mark.long,
        ),
        "--page-size 4 --snapshot-at 20 answer.pgd",
    ],
)
def test_a_small_gemma_says_what_a_dense_forward_says(tmp_path, options):
    """Over windows many times; where pools are given, they are too small for all prompts."""
    weights, golden = gemma_weights(), []
    for length in (1, 9, 33, 20):
        prompt = np.random.default_rng(length).integers(0, VOCAB, length).tolist()
        tokens, every = list(prompt), []
        for _ in range(24):
            logits = dense_logits(weights, tokens)[-1]
            best = np.argsort(logits)[: -5 - 1 : -1]
            every.append([(int(i), float(logits[i])) for i in best])
            tokens.append(int(best[0]))
        case = dict(name=f"{length}", prompt_ids=prompt, greedy_ids=tokens[length:])
        golden.append(case | dict(last_prompt_top5=every[0], final_step_top5=every[-1]))
    said = check(write_gemma(tmp_path / "m.gguf", weights), golden, tmp_path, options, atol=2e-5)
    assert "pages for windows of 6" in said and " 0 back from the host" not in said


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
    done = run("--model", "none.gguf", "--ids-file", tmp_path / "in.json")
    assert done.returncode == 1 and message in done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) == 1


def test_no_answer_goes_past_what_the_model_was_made_for(tmp_path):
    path = write_llama(tmp_path / "m.gguf", llama_weights())  # for 64 tokens
    cases = [dict(name=f"{n}", prompt_ids=[i % 7 for i in range(n)]) for n in (3, 60, 63)]
    (tmp_path / "in.json").write_text(json.dumps(cases))
    new = ("--max-new", 61, "--json", tmp_path / "out.json")
    done = run("--model", path, "--ids-file", tmp_path / "in.json", *new)
    assert done.returncode == 0, done.stderr
    found = [(len(r["greedy_ids"]), r["finish_reason"]) for r in json.loads(new[-1].read_text())]
    assert found == [(61, "length"), (4, "capacity"), (1, "capacity")]
    said = [line.split(",")[0] for line in done.stderr.splitlines() if ": ends with" in line]
    assert said == ["60: ends with 64 tokens", "63: ends with 64 tokens"]


def test_a_prompt_that_the_model_was_not_made_for_is_refused(tmp_path):
    path = write_llama(tmp_path / "m.gguf", llama_weights())
    (tmp_path / "in.json").write_text(json.dumps([dict(name="a", prompt_ids=[1] * 64)]))
    done = run("--model", path, "--ids-file", tmp_path / "in.json")
    assert done.returncode == 1 and "at most 64 tokens" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("script", [chat, generate])
@pytest.mark.parametrize("count", ["0", "-1"])
def test_a_model_on_no_device_is_refused(script, count, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["script", "--devices", count, *["a"] * (script is generate)])
    with pytest.raises(SystemExit):
        script.arguments()
    assert f"--devices: expected at least 1, got {count}" in capsys.readouterr().err


def test_pages_for_a_window_that_no_layer_has_are_refused(tmp_path):
    path = write_llama(tmp_path / "m.gguf", llama_weights())
    (tmp_path / "in.json").write_text('[{"name": "a", "prompt_ids": [1, 2]}]')
    done = run("--model", path, "--ids-file", tmp_path / "in.json", "--window-pages", 9)
    assert done.returncode == 1 and "leave out --window-pages" in done.stderr


def test_a_missing_model_is_one_line_on_stderr(tmp_path):
    done = run("--model", tmp_path / "none.gguf", "hello")
    assert done.returncode == 1 and "none.gguf" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_folder_of_a_model_hub_reads_and_says_words(tmp_path):
    """Words of a checkpoint whose golden ids are known."""
    shutil.copytree(ROOT / "tests/examples/golden/smollm2", tmp_path, dirs_exist_ok=True)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(72)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.save(str(tmp_path / "tokenizer.json"))
    golden = np.load(tmp_path / "golden.npz")
    prompt, answer = (" ".join(f"w{i}" for i in golden[name]) for name in ("prompt1", "greedy1"))
    done = run("--model", tmp_path, prompt, "--max-new", len(golden["greedy1"]))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == [f"> {prompt}", answer]


@pytest.mark.long
def test_the_demo_prints_its_table_and_draws_its_timeline(real_gguf, tmp_path):
    done = run(script="demo.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for measure in ("computed", "generated", "prefix cache", "tail waste", "preemptions"):
        assert measure in done.stdout
    assert (tmp_path / "out" / "demo_timeline.png").stat().st_size > 10_000
