"""Drafts by prompt lookup: what is looked up, and that the tokens are those of plain decoding."""

from __future__ import annotations

import json
import re
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import speculative

from .test_generate import run
from .tiny_gguf import llama_weights, write_llama
from .tiny_models import VOCAB, gemma_weights, write_gemma

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/smollm2_greedy.json").read_text())["cases"]
drafts = import_module("08_drafts")


@pytest.mark.parametrize(
    "text, k, found",
    [
        ([1, 2, 3, 4, 1, 2], 2, [3, 4]),
        ([1, 2, 3, 4, 1, 2], 9, [3, 4, 1, 2, 3, 4, 1, 2, 3]),  # goes round
        ([7, 1, 2, 5, 8, 1, 2, 6, 7, 1, 2], 1, [5]),  # three alike, before two that are nearer
        ([8, 1, 2, 5, 9, 1, 2, 6, 7, 1, 2], 1, [6]),  # two alike: the nearest
        ([5, 5, 5], 3, [5, 5, 5]),
        ([1, 2, 3, 2], 3, []),  # one alike says little
        ([4], 3, []),
        ([1, 2, 1, 2], 0, []),
    ],
)
def test_a_draft_is_what_followed_when_the_newest_tokens_were_last_seen(text, k, found):
    assert drafts.look_up(text, k) == found


def known(answers):
    """Drafts of 0 to k tokens from answers that are known, every fifth token of them wrong."""
    told = {a[0]: [t if i % 5 else (t + 1) % VOCAB for i, t in enumerate(a)] for a in answers}
    return lambda text, k: told[text[0]][len(text) :][: len(text) % (k + 1)]


@pytest.mark.parametrize(
    "family", [pytest.param(llama_weights, marks=pytest.mark.long), gemma_weights]
)
def test_ragged_drafts_that_are_partly_wrong_change_no_token(tmp_path, monkeypatch, family):
    """Prompts of 1 to 33 tokens in one batch; of Gemma, layers with windows of 6 tokens, too."""
    write = {llama_weights: write_llama, gemma_weights: write_gemma}[family]
    monkeypatch.setattr(speculative, "PAGE_SIZE", 4)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, VOCAB, n).tolist() for n in (1, 9, 33)]
    speaker = speculative.Speaker(write(tmp_path / "m.gguf", family()), prompts, 24)
    which, news = range(3), (24, 7, 20)
    plain = speaker.answer(which, news, 0)
    assert [len(said) for said in plain.tokens] == [*news] and plain.steps == 24
    assert plain.offered == plain.accepted == 0
    answers = [prompt + said for prompt, said in zip(prompts, plain.tokens, strict=True)]
    monkeypatch.setattr(drafts.speculate, "__defaults__", (known(answers),))
    checked = speaker.answer(which, news, 3)
    assert checked.tokens == plain.tokens
    assert checked.steps < plain.steps and 0 < checked.accepted < checked.offered
    speaker.allocator.check_invariants()
    again = speaker.answer([1], [7], 3)  # its prompt and answer are found in the prefix cache
    assert again.tokens == [plain.tokens[1]]


@pytest.mark.slow
@pytest.mark.long
def test_the_real_model_says_the_golden_words_with_drafts_too(real_gguf):
    """One program of T = 5 for prompts of 5 to 39 tokens; the file holds the plain answers."""
    speaker = speculative.Speaker(real_gguf, [case["prompt_ids"] for case in GOLDEN], 64)
    run = speaker.answer(range(len(GOLDEN)), [64] * len(GOLDEN), 4)
    assert run.tokens == [case["greedy_ids"] for case in GOLDEN]
    assert run.steps < 64 and run.accepted > 0


@pytest.mark.long
def test_the_command_shows_fewer_steps_and_the_same_tokens(real_gguf, tmp_path):
    text = "Say this again: one, two, three, four, five, six, seven."
    done = run("--gguf", real_gguf, "--max-new", 16, text, script="speculative.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    told = re.search(r"(\d+) tokens, (.*) a step; (\d+) of (\d+) drafts right;", done.stdout)
    assert float(told[2]) > 1 and 0 < int(told[3]) <= int(told[4])
    assert done.stdout.endswith("x; the same tokens\n")
