"""GGUF files made of the golden checkpoints say what transformers says of them.

They are made here as llama.cpp's converter makes them (convert_hf_to_gguf.py): its names and keys,
and what it stacks, turns over, adds to or leaves out. Where it leaves out what a golden checkpoint
has, the file is made to say that in another way.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import decoder
from models.checkpoint import Safetensors
from models.gguf_families import read_gguf_recipe
from models.gguf_reader import GGUFError, read_gguf

from paged_decode.planning import read_model

from .test_families import GOLDEN, every_logit, golden
from .tiny_gguf import f32, gguf_bytes, interleaved

ARCHITECTURES = dict(
    qwen2="qwen2",
    qwen3="qwen3",
    qwen3_moe="qwen3moe",
    gemma2="gemma2",
    phi3="phi3",
    smollm3="smollm3",
)
# By what a tensor is called in a layer of a checkpoint.
NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
}
OF_GEMMA = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
Tensors = dict[str, np.ndarray]


def config_of(family: str) -> dict[str, Any]:
    return json.loads((GOLDEN / family / "config.json").read_text())


def keys_of(family: str) -> dict[str, tuple[str, object]]:
    said, rope = config_of(family), config_of(family)["rope_parameters"]
    keys: dict[str, tuple[str, object]] = {
        "block_count": ("u32", said["num_hidden_layers"]),
        "context_length": ("u32", said["max_position_embeddings"]),
        "embedding_length": ("u32", said["hidden_size"]),
        "feed_forward_length": ("u32", said["intermediate_size"]),
        "attention.head_count": ("u32", said["num_attention_heads"]),
        "attention.head_count_kv": ("u32", said["num_key_value_heads"]),
        "attention.layer_norm_rms_epsilon": ("f32", said["rms_norm_eps"]),
        # Of Phi-3, the converter knows heads of E / Hq alone; of Gemma 2, a base of 10,000 alone.
        "attention.key_length": ("u32", said["head_dim"]),
        "attention.value_length": ("u32", said["head_dim"]),
        "rope.freq_base": ("f32", rope["rope_theta"]),
    }
    if rope["rope_type"] == "yarn":
        keys["rope.scaling.type"] = ("string", "yarn")
        keys["rope.scaling.factor"] = ("f32", rope["factor"])
        first = rope["original_max_position_embeddings"]
        keys["rope.scaling.original_context_length"] = ("u32", first)
    if family == "qwen3_moe":
        keys["expert_count"] = ("u32", said["num_local_experts"])
        keys["expert_used_count"] = ("u32", said["num_experts_per_tok"])
        keys["expert_feed_forward_length"] = ("u32", said["moe_intermediate_size"])
    if family == "gemma2":
        for cap in ("attn_logit_softcapping", "final_logit_softcapping"):
            keys[cap] = ("f32", said[cap])
    if family in ("gemma2", "phi3"):
        keys["attention.sliding_window"] = ("u32", said["sliding_window"])
    if family == "phi3":
        part = rope["partial_rotary_factor"] * said["head_dim"]
        keys["rope.dimension_count"] = ("u32", int(part))
        first = said["original_max_position_embeddings"]
        keys["rope.scaling.original_context_length"] = ("u32", first)
    if family == "smollm3":
        keys["rope.dimension_count"] = ("u32", said["head_dim"])
        keys["vocab_size"] = ("u32", said["vocab_size"])
    return keys


def tensors_of(family: str) -> Tensors:
    said, tensors, experts = config_of(family), {}, {}
    names = NAMES | OF_GEMMA if family == "gemma2" else NAMES
    for name, each in Safetensors(GOLDEN / family).tensors.items():
        weight = each[:].astype(np.float32)
        if family == "gemma2" and name.endswith("norm.weight"):
            weight = weight + 1
        if family == "smollm3" and name.endswith(("q_proj.weight", "k_proj.weight")):
            weight = interleaved(weight, said["head_dim"])
        if "layers" not in name:
            tops = {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}
            whole, kind = name.rsplit(".", 1)
            tensors[f"{tops.get(whole, 'output')}.{kind}"] = weight
            continue
        layer, rest = name.removeprefix("model.layers.").split(".", 1)
        if ".experts." in rest:
            number, matrix, _ = rest.removeprefix("mlp.experts.").split(".")
            own = f"blk.{layer}.{NAMES['mlp.' + matrix]}_exps.weight"
            experts.setdefault(own, {})[int(number)] = weight
        else:
            whole, kind = rest.rsplit(".", 1)
            tensors[f"blk.{layer}.{names[whole]}.{kind}"] = weight
    stacked = {name: np.stack([own[n] for n in range(len(own))]) for name, own in experts.items()}
    return tensors | stacked


def write(path: Path, family: str, tensors: Tensors | None = None, **changes) -> Path:
    """`changes` are keys of the architecture; None: the file does not have them."""
    keys = {key: entry for key, entry in (keys_of(family) | changes).items() if entry}
    name = ARCHITECTURES[family]
    metadata: dict[str, tuple[str, object]] = {"general.architecture": ("string", name)}
    metadata |= {f"{name}.{key}": entry for key, entry in keys.items()}
    tensors = tensors_of(family) if tensors is None else tensors
    path.write_bytes(gguf_bytes(metadata, {key: f32(each) for key, each in tensors.items()}))
    return path


def scaled_queries(tensors: Tensors) -> Tensors:
    """Gemma 2's scale is told by its size, so that of the checkpoint goes into the queries."""
    said = config_of("gemma2")
    by = np.float32((said["head_dim"] / said["query_pre_attn_scalar"]) ** 0.5)
    return {name: each * by if ".attn_q." in name else each for name, each in tensors.items()}


def with_idle_layers(tensors: Tensors) -> Tensors:
    """The second of three layers does not turn its heads. In a file, that is the fourth: between
    it and the first are two that add nothing."""
    places: dict[str, tuple[int, ...]] = {"0": (0, 1, 2), "1": (3,), "2": (4,)}
    found = {}
    for name, each in tensors.items():
        if not name.startswith("blk."):
            found[name] = each
            continue
        _, layer, rest = name.split(".", 2)
        for place in places[layer]:
            idle = place in (1, 2) and rest.startswith(("attn_output", "ffn_down"))
            found[f"blk.{place}.{rest}"] = np.zeros_like(each) if idle else each
    return found


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_the_logits_of_a_converted_file_are_those_of_transformers(tmp_path, family):
    cases, tensors, changes, told = golden(family), tensors_of(family), {}, None
    if family == "gemma2":
        tensors = scaled_queries(tensors)
    if family == "smollm3":
        tensors, changes = with_idle_layers(tensors), dict(block_count=("u32", 5))
    if family == "qwen2":  # as far as a window that files do not know changes nothing
        told = config_of(family)["sliding_window"]
    config, params = decoder.load(write(tmp_path / "m.gguf", family, tensors, **changes))
    sequences = [prompt + greedy for prompt, greedy, _ in cases]
    said = every_logit(decoder.make_model(config, every_token=True), config, params, sequences)
    for got, (_, _, want) in zip(said, cases, strict=True):
        np.testing.assert_allclose(got[:told], want[:told], rtol=0, atol=1e-4)


# ---- what no file tells


def read(tmp_path: Path, family: str, **changes) -> decoder.ModelConfig:
    return read_gguf_recipe(read_gguf(write(tmp_path / "m.gguf", family, **changes))).config


def test_only_the_largest_gemma_2_takes_another_scale(tmp_path):
    assert read(tmp_path, "gemma2").query_scale is None
    assert read(tmp_path, "gemma2", block_count=("u32", 46)).query_scale == (24 / 6) ** -0.5


def test_every_fourth_layer_of_smollm3_does_not_turn_its_heads(tmp_path):
    found = read(tmp_path, "smollm3", block_count=("u32", 36)).unturned_layers
    assert found == (3, 7, 11, 15, 19, 23, 27, 31, 35)


def test_yarn_rounds_its_bounds_but_for_gpt_oss(tmp_path):
    assert read(tmp_path, "qwen3").rope == decoder.Rope(
        1000.0, "yarn", 4.0, first_positions=32, truncate=True, magnitude=0.1 * np.log(4) + 1
    )


def test_every_layer_of_phi_3_has_the_window_unless_it_is_none(tmp_path):
    found = read(tmp_path, "phi3")
    assert [found.window(layer) for layer in range(3)] == [9, 9, 9] and found.rotary_dim == 6
    assert read(tmp_path, "phi3", **{"attention.sliding_window": ("u32", 0)}).window(0) is None
    assert read(tmp_path, "phi3", **{"rope.dimension_count": None}).rotary_dim == 8


@pytest.mark.parametrize("family", ["qwen2", "qwen3_moe", "gemma2", "smollm3"])
def test_a_planner_finds_the_windows_that_the_model_has(tmp_path, family):
    path = write(tmp_path / "m.gguf", family)
    found = read_gguf_recipe(read_gguf(path)).config
    assert [layer.window for layer in read_model(path).layers] == [
        found.window(layer) for layer in range(found.num_layers)
    ]


# ---- what is refused


@pytest.mark.parametrize(
    ("family", "key", "entry", "error"),
    [
        ("qwen2", "attention.sliding_window", ("u32", 6), NotImplementedError),
        ("qwen2", "rope.scaling.type", ("string", "longrope"), NotImplementedError),
        ("qwen2", "rope.dimension_count", ("u32", 4), NotImplementedError),
        ("qwen3", "pooling_type", ("u32", 3), NotImplementedError),
        ("qwen3", "rope.scaling.yarn_attn_factor", ("f32", 1.1), NotImplementedError),
        ("qwen3_moe", "expert_gating_func", ("u32", 2), NotImplementedError),
        ("qwen3_moe", "expert_weights_norm", ("bool", False), NotImplementedError),
        ("qwen3_moe", "expert_shared_feed_forward_length", ("u32", 8), NotImplementedError),
        ("qwen3_moe", "expert_feed_forward_length", None, GGUFError),
        ("gemma2", "attention.scale", ("f32", 0.3), NotImplementedError),
        ("gemma2", "rope.freq_base_swa", ("f32", 10.0), NotImplementedError),
        ("gemma2", "attn_logit_softcapping", None, GGUFError),
        ("gemma2", "final_logit_softcapping", None, GGUFError),
        ("gemma2", "attention.sliding_window", None, GGUFError),
        ("phi3", "attention.sliding_window", None, GGUFError),
        ("phi3", "rope.scaling.attn_factor", ("f32", 1.19), NotImplementedError),
        ("phi3", "rope.scaling.type", ("string", "yarn"), NotImplementedError),
        ("smollm3", "attention.sliding_window", ("u32", 6), NotImplementedError),
        ("smollm3", "rope.dimension_count", ("u32", 4), NotImplementedError),
    ],
)
def test_a_key_that_is_missing_or_not_served_is_named(tmp_path, family, key, entry, error):
    with pytest.raises(error, match=f"'{key}'"):
        read(tmp_path, family, **{key: entry})


def test_factors_of_a_longer_context_are_refused(tmp_path):
    factors = {f"rope_factors_{each}.weight": np.ones(3) for each in ("long", "short")}
    path = write(tmp_path / "m.gguf", "phi3", tensors_of("phi3") | factors)
    with pytest.raises(NotImplementedError, match="'longrope' is not served"):
        decoder.load(path)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("qwen2", "attn_k.bias"),
        ("qwen3", "attn_q_norm.weight"),
        ("qwen3_moe", "ffn_gate_inp.weight"),
        ("gemma2", "post_ffw_norm.weight"),
        ("phi3", "attn_qkv.weight"),
    ],
)
def test_a_file_without_a_tensor_names_it(tmp_path, family, name):
    tensors = tensors_of(family)
    del tensors[f"blk.1.{name}"]
    with pytest.raises(GGUFError, match=rf"'blk\.1\.{name}'"):
        decoder.load(write(tmp_path / "m.gguf", family, tensors))


def test_a_bias_that_the_family_does_not_have_is_refused(tmp_path):
    tensors = tensors_of("qwen3") | {"blk.0.attn_q.bias": np.zeros(48)}
    with pytest.raises(NotImplementedError, match="attn_q.bias"):
        decoder.load(write(tmp_path / "m.gguf", "qwen3", tensors))
