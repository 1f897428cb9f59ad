"""Gemma 3 in two page groups equals a dense float64 forward, and the real one says its words."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from models import decoder, gguf_families, tokenizer
from models.gguf_reader import GGUFError, read_gguf

from paged_decode.planning import read_model

from .group_loop import Loop
from .tiny_models import (
    DIM,
    GEMMA_FULL_EVERY,
    GEMMA_WINDOW,
    HEADS,
    KV_HEADS,
    LAYERS,
    VOCAB,
    WIDTH,
    gemma_weights,
    gpt_oss_weights,
    write_gemma,
    write_gpt_oss,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "gemma3_greedy.json"
PROMPTS = [np.random.default_rng(n).integers(0, VOCAB, n).tolist() for n in (1, 5, 31)]


def dense_logits(weights, tokens, window=GEMMA_WINDOW) -> np.ndarray:
    """float64 logits `[T, V]` of one sequence, with nothing cached and nothing fused."""
    w = {name.removesuffix(".weight"): each.astype(np.float64) for name, each in weights.items()}
    place = np.arange(len(tokens))
    back = place[:, None] - place

    def norm(x, weight):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * weight

    def rotate(x, theta):
        angles = place[:, None, None] * theta ** (-np.arange(DIM // 2) / (DIM // 2))
        a, b = x[..., : DIM // 2], x[..., DIM // 2 :]
        cos, sin = np.cos(angles), np.sin(angles)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    x = w["token_embd"][tokens] * WIDTH**0.5
    for i in range(LAYERS):
        layer = {k.removeprefix(f"blk.{i}."): v for k, v in w.items()}
        local = (i + 1) % GEMMA_FULL_EVERY != 0
        theta = 100.0 if local else 1000.0
        h = norm(x, layer["attn_norm"])
        q = norm((h @ layer["attn_q"].T).reshape(len(h), HEADS, DIM), layer["attn_q_norm"])
        k = norm((h @ layer["attn_k"].T).reshape(len(h), KV_HEADS, DIM), layer["attn_k_norm"])
        v = (h @ layer["attn_v"].T).reshape(len(h), KV_HEADS, DIM)
        k, v = (np.repeat(a, HEADS // KV_HEADS, axis=1) for a in (rotate(k, theta), v))
        logits = np.einsum("qhd,khd->hqk", rotate(q, theta), k) / DIM**0.5
        logits[:, (back < 0) | (local & (back >= window))] = -np.inf
        weight = np.exp(logits - logits.max(-1, keepdims=True))
        weight /= weight.sum(-1, keepdims=True)
        seen = np.einsum("hqk,khd->qhd", weight, v).reshape(len(h), -1)
        x = x + norm(seen @ layer["attn_output"].T, layer["post_attention_norm"])
        h = norm(x, layer["ffn_norm"])
        gate = h @ layer["ffn_gate"].T
        gate = gate / 2 * (1 + np.tanh((2 / np.pi) ** 0.5 * (gate + 0.044715 * gate**3)))
        inner = gate * (h @ layer["ffn_up"].T)
        x = x + norm(inner @ layer["ffn_down"].T, layer["post_ffw_norm"])
    return norm(x, w["output_norm"]) @ w["token_embd"].T


@pytest.mark.parametrize(
    "page_size", [4, *(pytest.param(n, marks=pytest.mark.long) for n in (1, 16))]
)
def test_prefill_in_chunks_and_decode_equal_a_dense_float64_forward(tmp_path, page_size):
    """With pages of a window that are just enough, and NaN in all that went back."""
    weights = gemma_weights()
    path = write_gemma(tmp_path / "m.gguf", weights)
    loop = Loop(path, page_size=page_size, rows=3, capacity=48)
    assert [group.window for group in loop.layout.groups] == [None, GEMMA_WINDOW]
    assert [group.layers for group in loop.layout.groups] == [(2,), (0, 1, 3)]
    sequences = [list(prompt) for prompt in PROMPTS]
    logits = loop.prefill(sequences)
    for _ in range(10):
        for row, sequence in enumerate(sequences):
            expected = dense_logits(weights, sequence)[-1]
            np.testing.assert_allclose(logits[row], expected, rtol=0, atol=2e-5)
        newest = logits.argmax(-1).tolist()
        for sequence, token in zip(sequences, newest, strict=True):
            sequence.append(token)
        logits = loop.advance(newest)
    assert loop.allocator.sequence(loop.handles[2]).groups[1].first > 0
    loop.allocator.check_invariants()


def test_over_one_group_that_keeps_every_page_the_layers_see_the_same(tmp_path):
    path = write_gemma(tmp_path / "m.gguf", gemma_weights())
    sizes = dict(page_size=4, rows=3, capacity=32)
    two, one = (Loop(path, **sizes, one_group=alone).prefill(PROMPTS) for alone in (False, True))
    np.testing.assert_allclose(one, two, rtol=0, atol=1e-6)


def test_a_window_of_one_token_more_or_less_would_show():
    right, *wrong = (
        dense_logits(gemma_weights(), PROMPTS[2], GEMMA_WINDOW + off)[-1] for off in (0, -1, 1)
    )
    assert all(np.abs(other - right).max() > 1e-2 for other in wrong)


# ---- what a file says, and what is left out


def config_of(tmp_path, **changes):
    path = write_gemma(tmp_path / "m.gguf", gemma_weights(), **changes)
    return gguf_families.read_gguf_recipe(read_gguf(path)).config


def test_the_sixth_layer_sees_all_tokens_unless_the_file_says_otherwise(tmp_path):
    changes = {
        "gemma3.attention.sliding_window_pattern": None,
        "gemma3.rope.freq_base_swa": None,
        "gemma3.block_count": ("u32", 18),
    }
    found = config_of(tmp_path, **changes)
    windows = [found.window(layer) for layer in range(18)]
    assert [i for i, window in enumerate(windows) if window is None] == [5, 11, 17]
    assert set(windows) == {None, GEMMA_WINDOW}
    assert found.local_rope == decoder.Rope(10000.0) and found.embedding_scale == WIDTH**0.5
    assert (found.gate, found.query_scale) == ("gelu", None)


@pytest.mark.parametrize(
    "local", [[True] * 4, [True, True, True, False], [False, True, False, True]]
)
def test_a_list_says_which_layers_have_a_window(tmp_path, local):
    key = "gemma3.attention.sliding_window_pattern"
    found = config_of(tmp_path, **{key: ("array:bool", local)})
    assert [found.window(layer) is not None for layer in range(LAYERS)] == local


@pytest.mark.parametrize(
    "write, weights", [(write_gemma, gemma_weights), (write_gpt_oss, gpt_oss_weights)]
)
def test_a_planner_finds_the_windows_that_the_model_has(tmp_path, write, weights):
    path = write(tmp_path / "m.gguf", weights())
    found = gguf_families.read_gguf_recipe(read_gguf(path)).config
    planned = read_model(path)
    assert [layer.window for layer in planned.layers] == [found.window(i) for i in range(LAYERS)]


def test_only_the_layers_that_see_all_tokens_are_slowed_down(tmp_path):
    changes = {
        "gemma3.rope.scaling.type": ("string", "linear"),
        "gemma3.rope.scaling.factor": ("f32", 8.0),
    }
    plain, slow = (
        decoder.load(write_gemma(tmp_path / "m.gguf", gemma_weights(), **each))[0]
        for each in ({}, changes)
    )
    half = DIM // 2
    every = 1000.0 ** -(np.arange(half) / half)
    np.testing.assert_allclose(decoder.rope_frequencies(plain.rope, DIM), every)
    np.testing.assert_allclose(decoder.rope_frequencies(slow.rope, DIM) * 8, every)
    for config in (plain, slow):
        assert config.local_rope == decoder.Rope(100.0)


def test_logits_are_capped_where_the_file_says_so(tmp_path):
    assert config_of(tmp_path).logit_cap is None
    found = config_of(tmp_path, **{"gemma3.final_logit_softcapping": ("f32", 3.0)})
    assert found.logit_cap == 3.0


def test_the_largest_gemma_takes_another_scale(tmp_path):
    found = config_of(tmp_path, **{"gemma3.block_count": ("u32", 62)})
    assert found.query_scale == (WIDTH / HEADS) ** -0.5


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"gemma3.attention.sliding_window": None}, GGUFError, "sliding_window"),
        ({"gemma3.attention.sliding_window": ("u32", 0)}, GGUFError, "positive"),
        (
            {"gemma3.attention.sliding_window_pattern": ("array:bool", [True, False, False])},
            NotImplementedError,
            "sliding_window_pattern",
        ),
        (
            {"gemma3.attention.sliding_window_pattern": ("array:u32", [1, 2, 1, 0])},
            NotImplementedError,
            "sliding_window_pattern",
        ),
        ({"gemma3.rope.scaling.type": ("string", "yarn")}, NotImplementedError, "'yarn'"),
        ({"gemma3.attn_logit_softcapping": ("f32", 50.0)}, NotImplementedError, "softcapping"),
        ({"gemma3.attention.scale": ("f32", 0.1)}, NotImplementedError, "attention.scale"),
        ({"gemma3.attention.value_length": ("u32", 4)}, NotImplementedError, "value_length"),
        ({"gemma3.attention.head_count_kv": ("u32", 3)}, GGUFError, "multiple"),
    ],
)
def test_a_configuration_that_is_not_served_is_named(tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        config_of(tmp_path, **changes)


@pytest.mark.parametrize("name", ["attn_q_norm", "post_attention_norm", "post_ffw_norm"])
def test_a_file_without_a_norm_names_it(tmp_path, name):
    weights = gemma_weights()
    del weights[f"blk.1.{name}.weight"]
    with pytest.raises(GGUFError, match=rf"'blk\.1\.{name}\.weight'"):
        decoder.load(write_gemma(tmp_path / "m.gguf", weights))


def test_a_tensor_without_a_place_is_refused_and_not_ignored(tmp_path):
    weights = gemma_weights() | {"blk.0.attn_q.bias": np.zeros(HEADS * DIM, np.float32)}
    with pytest.raises(NotImplementedError, match="attn_q.bias"):
        decoder.load(write_gemma(tmp_path / "m.gguf", weights))


# ---- the cache of a model


def test_layers_that_differ_are_groups_and_layers_that_are_alike_are_one(tmp_path):
    gemma = config_of(tmp_path)
    sizes = dict(page_size=4, num_pages=9, dtype="bfloat16")
    full, local = decoder.layout(gemma, window_pages=7, **sizes).groups
    assert (full.layers, full.num_pages, full.window) == ((2,), 9, None)
    assert (local.layers, local.num_pages, local.window) == ((0, 1, 3), 7, GEMMA_WINDOW)
    assert (local.num_kv_heads, local.head_dim, local.dtype) == (KV_HEADS, DIM, "bfloat16")
    assert decoder.layout(gemma, **sizes).groups[1].num_pages == 9
    for changes in (dict(full_layers=()), dict(sliding_window=None)):  # Mistral, Llama
        (alone,) = decoder.layout(replace(gemma, **changes), **sizes).groups
        assert (alone.layers, alone.num_pages, alone.window) == ((0, 1, 2, 3), 9, None)


# ---- the real one


@pytest.mark.slow
def test_the_real_file_is_read_as_it_is_meant(real_gemma):
    gguf = read_gguf(real_gemma)
    found = gguf_families.read_gguf_recipe(gguf).config
    assert found.sliding_window == 512
    assert [i for i in range(found.num_layers) if found.window(i) is None] == [5, 11, 17]
    assert found.num_heads * found.head_dim != found.width
    words = tokenizer.load(real_gemma)
    for case in json.loads(GOLDEN.read_text())["cases"]:
        assert words.encode(case["text"]) == case["prompt_ids"], case["name"]
        assert words.decode(case["greedy_ids"]) == case["greedy_text"]
