"""A gpt-oss of two page groups says what transformers' own implementation says.

Sinks per head, a window on every other layer, YaRN, biases, four experts of eight for a token.
"""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from models import decoder, gguf_families
from models.gguf_reader import GGUFError, read_gguf

from tests.golden import make_gpt_oss as golden

from .group_loop import Loop
from .tiny_models import GPT_OSS, gpt_oss_weights, write_gpt_oss

CASES = json.loads(golden.FILE.read_text())["cases"]


@pytest.mark.long
def test_prefill_in_chunks_and_decode_equal_the_golden_file(tmp_path):
    """Across the window, in a pool that has no page too many, with NaN in what went back."""
    path = write_gpt_oss(tmp_path / "m.gguf", gpt_oss_weights())
    loop = Loop(path, page_size=16, rows=len(CASES), capacity=224)
    assert [group.layers for group in loop.layout.groups] == [(1, 3), (0, 2)]
    assert loop.layout.groups[1].window == GPT_OSS["window"]
    logits = loop.prefill([case["prompt_ids"] for case in CASES])
    for step in range(golden.NEW):
        want = np.array([case["logits"][step] for case in CASES])
        np.testing.assert_allclose(logits, want, rtol=0, atol=1e-4)
        assert logits.argmax(-1).tolist() == [case["greedy_ids"][step] for case in CASES]
        if step < golden.NEW - 1:
            logits = loop.advance(logits.argmax(-1).tolist())
    assert loop.allocator.sequence(loop.handles[3]).groups[1].first > 0
    loop.allocator.check_invariants()


def test_transformers_still_says_what_the_golden_file_says():
    pytest.importorskip("transformers", reason="the golden file stands for it")
    logits = golden.reference(gpt_oss_weights())
    for prompt, case in zip(golden.prompts(), CASES, strict=True):
        assert prompt == case["prompt_ids"]
        got = logits(prompt + case["greedy_ids"])[len(prompt) - 1 : -1]
        np.testing.assert_allclose(got, case["logits"], rtol=0, atol=1e-5)


def test_yarn_leaves_fast_pairs_as_they_are_and_slows_the_others_by_the_whole_scale():
    large = decoder.Rope(150000.0, "yarn", factor=32.0, first_positions=4096)
    plain = 150000.0 ** -(np.arange(32) / 32)
    slowed_by = plain / decoder.rope_frequencies(large, 64)
    np.testing.assert_allclose(slowed_by[:9], 1)  # these turn 32 times or more in 4096 tokens
    np.testing.assert_allclose(slowed_by[18:], 32)  # and these less than once
    assert (np.diff(slowed_by[8:19]) > 0).all()


def test_the_bounds_of_yarn_are_the_files_own(tmp_path):
    changes = {
        "gpt-oss.rope.scaling.yarn_beta_fast": ("f32", 16.0),
        "gpt-oss.rope.scaling.yarn_beta_slow": ("f32", 2.0),
        "gpt-oss.rope.scaling.yarn_ext_factor": ("f32", 1.0),
        "gpt-oss.rope.freq_base_swa": ("f32", GPT_OSS["theta"]),
    }
    plain, own = (
        gguf_families.read_gguf_recipe(
            read_gguf(write_gpt_oss(tmp_path / "m.gguf", gpt_oss_weights(), **each))
        ).config
        for each in ({}, changes)
    )
    assert (plain.rope.fast, plain.rope.slow) == (32.0, 1.0)
    assert own == replace(plain, rope=replace(plain.rope, fast=16.0, slow=2.0))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"gpt-oss.attention.sliding_window": None}, GGUFError, "sliding_window"),
        ({"gpt-oss.expert_count": None}, GGUFError, "expert_count"),
        ({"gpt-oss.expert_used_count": ("u32", 9)}, GGUFError, "all 8 experts .* got 9"),
        ({"gpt-oss.rope.scaling.type": ("string", "linear")}, NotImplementedError, "'linear'"),
        ({"gpt-oss.rope.scaling.original_context_length": None}, GGUFError, "original_context"),
        ({"gpt-oss.rope.scaling.factor": None}, GGUFError, "scaling.factor"),
        (
            {"gpt-oss.rope.scaling.yarn_attn_factor": ("f32", 1.3)},
            NotImplementedError,
            "yarn_attn_factor",
        ),
        (
            {"gpt-oss.rope.scaling.yarn_beta_slow": ("f32", 32.0)},
            NotImplementedError,
            "32.0 to 32.0 turns",
        ),
        ({"gpt-oss.rope.freq_base_swa": ("f32", 100.0)}, NotImplementedError, "freq_base_swa"),
        ({"gpt-oss.expert_gating_func": ("u32", 2)}, NotImplementedError, "gating_func"),
    ],
)
def test_a_configuration_that_is_not_served_is_named(tmp_path, changes, error, message):
    path = write_gpt_oss(tmp_path / "m.gguf", gpt_oss_weights(), **changes)
    with pytest.raises(error, match=message):
        gguf_families.read_gguf_recipe(read_gguf(path))


@pytest.mark.parametrize("name", ["attn_sinks.weight", "attn_v.bias", "ffn_up_exps.bias"])
def test_a_file_without_a_tensor_names_it(tmp_path, name):
    weights = gpt_oss_weights()
    del weights[f"blk.1.{name}"]
    with pytest.raises(GGUFError, match=rf"'blk\.1\.{name}'"):
        decoder.load(write_gpt_oss(tmp_path / "m.gguf", weights))
