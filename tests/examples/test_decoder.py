"""The paged forward equals a dense float64 one, and the real model says the golden words."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import decoder, gguf_families
from models.gguf_reader import GGUFError, read_gguf

from paged_decode import DecodeBatch, KVCache

from .tiny_gguf import (
    DIM,
    HEADS,
    KV_HEADS,
    LAYERS,
    VOCAB,
    gguf_bytes,
    llama_metadata,
    llama_weights,
    write_llama,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "smollm2_greedy.json"
PAGE = 4
PROMPTS = [[7], [3, 1, 4, 1, 5, 9, 2, 6, 5, 3], [28, 0, 28, 14, 2]]


# ---- a dense forward, to compare with


def dense_logits(weights, tokens, *, factors=1.0, scale=1.0, window=None) -> np.ndarray:
    """float64 logits `[T, V]` of one sequence, with nothing cached and nothing fused."""
    w = {name: weight.astype(np.float64) for name, weight in weights.items()}
    half = DIM // 2
    frequencies = 100.0 ** (-np.arange(half) / half) / scale / factors
    angles = np.arange(len(tokens))[:, None] * frequencies
    place = np.arange(len(tokens))
    hidden = place[None, :] > place[:, None]
    if window:
        hidden |= place[None, :] <= place[:, None] - window

    def norm(x, weight):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * weight

    def rotate(x):
        a, b = x[..., :half], x[..., half:]
        cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    x = w["token_embd"][tokens]
    for i in range(LAYERS):
        layer = {k.removeprefix(f"blk.{i}."): v for k, v in w.items()}
        h = norm(x, layer["attn_norm"])
        q = rotate((h @ layer["attn_q"].T).reshape(len(h), HEADS, DIM))
        k = rotate((h @ layer["attn_k"].T).reshape(len(h), KV_HEADS, DIM))
        v = (h @ layer["attn_v"].T).reshape(len(h), KV_HEADS, DIM)
        k, v = (np.repeat(a, HEADS // KV_HEADS, axis=1) for a in (k, v))
        logits = np.einsum("qhd,khd->hqk", q, k) / DIM**0.5
        logits[:, hidden] = -np.inf
        weight = np.exp(logits - logits.max(-1, keepdims=True))
        weight /= weight.sum(-1, keepdims=True)
        seen = np.einsum("hqk,khd->qhd", weight, v).reshape(len(h), -1)
        x = x + seen @ layer["attn_output"].T
        h = norm(x, layer["ffn_norm"])
        gate = h @ layer["ffn_gate"].T
        inner = gate / (1 + np.exp(-gate)) * (h @ layer["ffn_up"].T)
        x = x + inner @ layer["ffn_down"].T
    return norm(x, w["output_norm"]) @ w.get("output", w["token_embd"]).T


# ---- the paged one, driven by hand


class Paged:
    """A batch with scattered pages, advanced chunk by chunk."""

    def __init__(self, path, prompts, capacity: int, dtype="float32"):
        config, self.params = decoder.load(path, dtype)
        self.model = jax.jit(decoder.make_model(config), donate_argnums=1)
        columns = -(-capacity // PAGE)
        pages = 1 + np.random.default_rng(2).permutation(columns * len(prompts))
        self.table = pages.reshape(len(prompts), columns).astype(np.int32)
        self.cache = KVCache.create(
            num_layers=config.num_layers,
            num_pages=1 + pages.size,
            num_kv_heads=config.num_kv_heads,
            page_size=PAGE,
            head_dim=config.head_dim,
            dtype=jnp.dtype(dtype),
        )
        self.lengths = np.zeros(len(prompts), np.int32)

    def feed(self, chunks: list[list[int]], width: int) -> np.ndarray:
        """Compute the next tokens of every row in one step of `width` columns."""
        batch = len(chunks)
        tokens, positions, slots = (np.zeros((batch, width), np.int32) for _ in range(3))
        for row, chunk in enumerate(chunks):
            if chunk:
                at = self.lengths[row] + np.arange(len(chunk))
                tokens[row, -len(chunk) :], positions[row, -len(chunk) :] = chunk, at
                slots[row, -len(chunk) :] = self.table[row, at // PAGE] * PAGE + at % PAGE
        self.lengths = self.lengths + np.array([len(c) for c in chunks], np.int32)
        described = DecodeBatch.of(self.table, self.lengths, positions, slots)
        logits, self.cache = self.model(self.params, self.cache, tokens, described)
        return np.asarray(logits)

    def prefill(self, prompts: list[list[int]], width: int) -> np.ndarray:
        """Feed prompts in chunks; the logits of each row's last token `[B, V]`."""
        last = np.zeros((len(prompts), VOCAB), np.float32)
        for begin in range(0, max(map(len, prompts)), width):
            chunks = [prompt[begin : begin + width] for prompt in prompts]
            logits = self.feed(chunks, width)
            for row, chunk in enumerate(chunks):
                if chunk:
                    last[row] = logits[row]
        return last


MODELS = {
    "tied": dict(),
    "untied": dict(tied=False),
    "linear scaling": dict(scale=4.0),
    "frequency factors": dict(factors=np.array([1.0, 2.5])),
    "window": dict(window=3),
}


@pytest.mark.parametrize(
    ("name", "width"),
    [*((m, 4) for m in MODELS), ("tied", 1), pytest.param("tied", 16, marks=pytest.mark.long)],
)
def test_chunked_prefill_and_decode_equal_a_dense_float64_forward(tmp_path, name, width):
    options = dict(MODELS[name])
    weights = llama_weights(tied=options.pop("tied", True))
    changes, extra = {}, {}
    if "scale" in options:
        changes["llama.rope.scaling.type"] = ("string", "linear")
        changes["llama.rope.scaling.factor"] = ("f32", options["scale"])
    if "factors" in options:
        extra["rope_freqs"] = options["factors"]
    if "window" in options:
        changes["llama.attention.sliding_window"] = ("u32", options["window"])
    path = write_llama(tmp_path / "m.gguf", weights | extra, **changes)
    paged = Paged(path, PROMPTS, capacity=20)
    sequences = [list(p) for p in PROMPTS]
    logits = paged.prefill(sequences, width)
    for _ in range(6):
        for row, sequence in enumerate(sequences):
            expected = dense_logits(weights, sequence, **options)[-1]
            np.testing.assert_allclose(logits[row], expected, rtol=0, atol=2e-5)
        newest = logits.argmax(-1)
        for sequence, token in zip(sequences, newest, strict=True):
            sequence.append(int(token))
        logits = paged.feed([[int(t)] for t in newest], 1)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_logits_are_float32_and_close_in_half_precision(tmp_path, dtype):
    weights = llama_weights()
    paged = Paged(write_llama(tmp_path / "m.gguf", weights), PROMPTS, capacity=20, dtype=dtype)
    logits = paged.prefill(PROMPTS, 4)
    assert logits.dtype == np.float32
    expected = np.stack([dense_logits(weights, p)[-1] for p in PROMPTS])
    np.testing.assert_allclose(logits, expected, rtol=0, atol=0.05 * np.abs(expected).max())


def test_an_empty_row_changes_no_other_row(tmp_path):
    path = write_llama(tmp_path / "m.gguf", llama_weights())
    full = Paged(path, PROMPTS, capacity=20).prefill(PROMPTS, 4)
    paged = Paged(path, [*PROMPTS, []], capacity=20)
    np.testing.assert_allclose(paged.prefill([*PROMPTS, []], 4)[:3], full, rtol=0, atol=1e-6)


def test_no_step_copies_the_cache(tmp_path):
    paged = Paged(write_llama(tmp_path / "m.gguf", llama_weights()), PROMPTS, capacity=4096)
    batch = DecodeBatch.of(
        paged.table, paged.lengths, np.zeros((3, 1), np.int32), np.zeros((3, 1), np.int32)
    )
    args = (paged.params, paged.cache, np.zeros((3, 1), np.int32), batch)
    memory = paged.model.lower(*args).compile().memory_analysis()
    pool = sum(a.nbytes for a in jax.tree.leaves(paged.cache))
    assert memory.alias_size_in_bytes == pool
    assert memory.temp_size_in_bytes < pool / 4


# ---- what is refused


def test_a_file_without_a_tensor_names_it(tmp_path):
    weights = llama_weights()
    del weights["blk.1.ffn_up"]
    with pytest.raises(GGUFError, match=r"'blk\.1\.ffn_up\.weight'"):
        decoder.load(write_llama(tmp_path / "m.gguf", weights))


def test_a_tensor_of_another_shape_is_named_with_both_shapes(tmp_path):
    weights = llama_weights() | {"blk.0.attn_v": np.zeros((3, 3), np.float32)}
    with pytest.raises(GGUFError, match=r"attn_v.*\(8, 24\), got \(3, 3\)"):
        decoder.load(write_llama(tmp_path / "m.gguf", weights))


def test_a_tensor_without_a_place_is_refused_and_not_ignored(tmp_path):
    weights = llama_weights() | {"blk.0.attn_q_norm": np.zeros(4, np.float32)}
    with pytest.raises(NotImplementedError, match="attn_q_norm"):
        decoder.load(write_llama(tmp_path / "m.gguf", weights))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"general.architecture": ("string", "mamba")},
            NotImplementedError,
            "'gpt-oss', got 'mamba'",
        ),
        ({"llama.rope.scaling.type": ("string", "yarn")}, NotImplementedError, "'yarn'"),
        ({"llama.rope.dimension_count": ("u32", 2)}, NotImplementedError, "dimension_count"),
        ({"llama.attention.head_count": ("u32", 0)}, GGUFError, "positive"),
        ({"llama.attention.head_count_kv": ("u32", 4)}, GGUFError, "multiple"),
        ({"llama.attention.key_length": ("u32", 2**30)}, NotImplementedError, "2"),
        ({"llama.block_count": ("u32", 2**31 - 1)}, GGUFError, "'blk.2.attn_norm.weight'"),
        ({"llama.embedding_length": ("string", "24")}, GGUFError, "embedding_length"),
        ({"llama.rope.freq_base": ("f32", float("nan"))}, GGUFError, "freq_base"),
    ],
)
def test_a_configuration_that_is_not_served_is_named(tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        decoder.load(write_llama(tmp_path / "m.gguf", llama_weights(), **changes))


def config_of(tmp_path, **changes) -> decoder.ModelConfig:
    path = write_llama(tmp_path / "m.gguf", llama_weights(), **changes)
    return gguf_families.read_gguf_recipe(read_gguf(path)).config


@pytest.mark.parametrize(
    ("key", "kind", "value"),
    [
        ("attention.causal", "bool", False),
        ("attention.clamp_kqv", "f32", 1.0),
        ("attention.scale", "f32", 0.9),
        ("attention.sliding_window_pattern", "u32", 2),
        ("attention.temperature_scale", "f32", 0.1),
        ("attention.key_length_swa", "u32", DIM + 2),
        ("attn_logit_softcapping", "f32", 3.0),
        ("embedding_scale", "f32", 12.0),
        ("expert_count", "u32", 8),
        ("expert_used_count", "u32", 2),
        ("final_logit_softcapping", "f32", 3.0),
        ("logit_scale", "f32", 0.5),
        ("residual_scale", "f32", 0.2),
        ("rope.dimension_sections", "array:u32", [1, 1]),
        ("rope.scaling.attn_factor", "f32", 2.0),
        ("use_parallel_residual", "bool", True),
        ("vocab_size", "u32", VOCAB + 1),
        ("no_such_thing", "array:u8", [1, 2]),
    ],
)
def test_a_key_that_is_not_understood_is_refused_and_not_ignored(tmp_path, key, kind, value):
    with pytest.raises(NotImplementedError, match=f"'{key}' = "):
        config_of(tmp_path, **{f"llama.{key}": (kind, value)})


def test_keys_that_ask_for_nothing_change_nothing(tmp_path):
    """Of converters of several years; keys of others than the architecture are not its own."""
    said = {
        "vocab_size": ("u32", VOCAB),
        "attention.key_length": ("u32", DIM),
        "attention.value_length": ("u32", DIM),
        "attention.causal": ("bool", True),
        "attention.scale": ("f32", DIM**-0.5),
        "expert_count": ("u32", 0),
        "expert_used_count": ("u32", 0),
        "logit_scale": ("f32", 1.0),
        "rope.scaling.type": ("string", "none"),
        "rope.scaling.attn_factor": ("f32", 1.0),
        "rope.scaling.finetuned": ("bool", True),
        "rope.scaling.original_context_length": ("u32", 32),
        "tensor_data_layout": ("string", "Meta AI original pth"),
    }
    changes = {f"llama.{key}": entry for key, entry in said.items()}
    others = {"general.file_type": ("u32", 0), "quantize.imatrix.file": ("string", "x")}
    assert config_of(tmp_path, **changes, **others) == config_of(tmp_path)


@pytest.mark.parametrize("key", ["rope.scaling.factor", "rope.scale_linear"])
def test_a_factor_without_a_kind_slows_all_positions_down(tmp_path, key):
    found = config_of(tmp_path, **{f"llama.{key}": ("f32", 4.0)})
    assert found.rope == decoder.Rope(100.0, "linear", 4.0)


def test_a_file_that_is_no_model_is_refused(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_bytes(llama_metadata(), {}))
    with pytest.raises(GGUFError, match="token_embd"):
        decoder.load(path)


# ---- the real one


@pytest.mark.long
def test_the_real_model_says_the_golden_words(real_gguf):
    cases = json.loads(GOLDEN.read_text())["cases"]
    case = min(cases, key=lambda c: len(c["prompt_ids"]))
    paged = Paged(real_gguf, [case["prompt_ids"]], capacity=len(case["prompt_ids"]) + 64)
    logits = paged.feed([case["prompt_ids"]], len(case["prompt_ids"]))
    for token, expected in case["last_prompt_top5"]:
        assert abs(logits[0, token] - expected) < 1e-3
    said = []
    for _ in range(64):
        said.append(int(logits[0].argmax()))
        logits = paged.feed([said[-1:]], 1)
    assert said == case["greedy_ids"]
