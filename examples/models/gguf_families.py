"""From the metadata of a GGUF file to a configuration and the names of its tensors.

All families of a model hub that llama.cpp knows; the names are those of its files. What such a
file does not tell, and a family has in one way only in what was published, is known here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from .config import ModelConfig, Rope
from .families import Keys, Names, Recipe, Stored
from .gguf_reader import GGUF, GGUFError

__all__ = ["read_gguf_recipe"]


def read_gguf_recipe(gguf: GGUF) -> Recipe:
    """Of a model in a GGUF file.

    Raises:
      GGUFError: the file is no model, or its sizes do not fit each other.
      NotImplementedError: another architecture, or a key of it that is not understood.
    """
    architecture = gguf.value("general.architecture", str)
    if architecture not in _FAMILIES:
        known = ", ".join(map(repr, _FAMILIES))
        raise NotImplementedError(
            f"{gguf.path}: expected an architecture of {known}, got {architecture!r}"
        )
    prefix, names = architecture + ".", _names()
    said = {k.removeprefix(prefix): v for k, v in gguf.metadata.items() if k.startswith(prefix)}
    said = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in said.items()}
    keys = Keys(gguf.path, said, GGUFError)
    keys.layers, keys.width = keys.size("block_count"), keys.size("embedding_length")
    keys.heads = keys.size("attention.head_count")
    keys.head_dim = keys.size("attention.key_length", max(keys.width // keys.heads, 1))
    if "rope_factors_long.weight" in gguf.tensors:
        keys.refuse("rope.scaling.type", "longrope")
    own, head_dim = _FAMILIES[architecture](keys, names), keys.head_dim
    for key in ("rope.dimension_count", "attention.value_length"):
        keys.only(key, head_dim)
        keys.only(key + "_swa", head_dim)
    keys.only("attention.key_length_swa", head_dim)
    scale = own.get("query_scale") or head_dim**-0.5
    keys.only("attention.scale", float(np.float32(scale)))
    if "rope_freqs.weight" in gguf.tensors:  # of Llama 3
        divisors = gguf.tensor("rope_freqs.weight", (head_dim // 2,)).tolist()
        own["rope"] = replace(own["rope"], divisors=tuple(divisors))
    sizes: dict[str, Any] = dict(
        vocab_size=gguf.info("token_embd.weight").shape[0],
        num_layers=keys.layers,
        width=keys.width,
        inner_width=own.pop("inner_width", None) or keys.size("feed_forward_length"),
        num_heads=keys.heads,
        num_kv_heads=keys.size("attention.head_count_kv", keys.heads),
        head_dim=head_dim,
        max_positions=keys.size("context_length"),
        norm_eps=keys.number("attention.layer_norm_rms_epsilon", 1e-5),
    )
    keys.only("vocab_size", sizes["vocab_size"])
    for key, off in _OFF.items():
        keys.only(key, off)
    for key in _WITHOUT_EFFECT:
        keys.left.pop(key, None)
    keys.nothing_left()
    try:
        config = ModelConfig(**sizes, **own)
    except ValueError as error:
        raise GGUFError(f"{gguf.path}: {error}") from error
    names = {role: tuple("blk.{layer}." + name for name in each) for role, each in names.items()}
    names |= {"embed": ("token_embd.weight",), "norm": ("output_norm.weight",)}
    if "output.weight" in gguf.tensors:
        names["head"] = ("output.weight",)
    stored = {}
    if architecture in ("llama", "smollm3"):  # the two halves of every head are interleaved
        halves = Stored(ours=lambda matrix: _halves(matrix.T, head_dim).T)
        stored = {f"blk.{{layer}}.attn_{each}.weight": halves for each in "qk"}
    return Recipe(config, names, stored)


# What says nothing of what is computed, or only of positions under YaRN.
_WITHOUT_EFFECT = ("rope.scaling.finetuned", "rope.scaling.original_context_length")
# What a family that has not read it does without, by the value that asks for nothing.
_OFF: dict[str, Any] = {
    "attention.causal": True,
    "attention.clamp_kqv": 0.0,
    "attention.max_alibi_bias": 0.0,
    "attn_logit_softcapping": 0.0,
    "expert_count": 0,
    "expert_used_count": 0,
    "final_logit_softcapping": 0.0,
    "logit_scale": 1.0,
    "pooling_type": 0,
    "residual_scale": 1.0,
    "rope.scaling.attn_factor": 1.0,
    "rope.scaling.yarn_log_multiplier": 0.0,
    "tensor_data_layout": "Meta AI original pth",  # with the heads of llama.cpp
    "use_parallel_residual": False,
}


def _halves(matrix: np.ndarray, dim: int) -> np.ndarray:
    heads = matrix.reshape(-1, dim // 2, 2, matrix.shape[1])
    return heads.swapaxes(1, 2).reshape(matrix.shape)


def _names() -> Names:
    return {
        "attention_norm": ("attn_norm.weight",),
        "inner_norm": ("ffn_norm.weight",),
        "qkv": tuple(f"attn_{each}.weight" for each in "qkv"),
        "out": ("attn_output.weight",),
        "gate_up": ("ffn_gate.weight", "ffn_up.weight"),
        "down": ("ffn_down.weight",),
    }


_QK_NORM: Names = {"qk_norm": ("attn_q_norm.weight", "attn_k_norm.weight")}
_EXPERTS: Names = {
    "router": ("ffn_gate_inp.weight",),
    "gate_up": ("ffn_gate_exps.weight", "ffn_up_exps.weight"),
    "down": ("ffn_down_exps.weight",),
}


def _windows(keys: Keys, default: int) -> dict[str, Any]:
    """The window, and the layers without one: a period in the file, a list of those that have
    one, or the period of a family whose files leave it out."""
    key, window = "attention.sliding_window_pattern", keys.size("attention.sliding_window")
    found = keys.left.get(key)
    if isinstance(found, list):
        if len(found) != keys.layers or not all(each in (False, True) for each in found):
            keys.refuse(key, found)
        full = [layer for layer, local in enumerate(keys.take(key, list)) if not local]
    else:
        every = keys.size(key, default)
        full = range(every - 1, min(keys.layers, 1 << 16), every)
    return dict(sliding_window=window, full_layers=tuple(full))


def _rope(keys: Keys, *served: str, truncate: bool = True) -> Rope:
    """With how positions past the first context are served: a factor alone is a linear one.

    No key tells whether "yarn" rounds its bounds.
    """
    theta = keys.number("rope.freq_base", 10000.0)
    factor = keys.number("rope.scaling.factor", keys.number("rope.scale_linear", None))
    keys.left.setdefault("rope.scaling.type", "none" if factor is None else "linear")
    kind = keys.left["rope.scaling.type"]
    keys.only("rope.scaling.type", "none", *served)
    if kind == "none":  # where a factor says nothing
        return Rope(theta)
    if kind == "linear":
        return Rope(theta, kind, factor or 1.0)
    factor = factor or keys.number("rope.scaling.factor")  # which there must be
    first = keys.size("rope.scaling.original_context_length")
    fast = keys.number("rope.scaling.yarn_beta_fast", 32.0)
    slow = keys.number("rope.scaling.yarn_beta_slow", 1.0)
    keys.only("rope.scaling.yarn_ext_factor", 1.0)
    if theta <= 1 or slow >= fast:
        keys.refuse("rope.scaling.type", kind, f" for a base of {theta} and {fast} to {slow} turns")
    magnitude = 0.1 * math.log(factor) + 1
    return Rope(theta, kind, factor, first, fast, slow, truncate, magnitude)


def _llama(keys: Keys, names: Names) -> dict[str, Any]:
    """Llama 2 and 3, Mistral, SmolLM2."""
    own: dict[str, Any] = dict(rope=_rope(keys, "linear"))
    if keys.left.get("attention.sliding_window") is not None:
        own["sliding_window"] = keys.size("attention.sliding_window")
    return own


def _smollm3(keys: Keys, names: Names) -> dict[str, Any]:
    """Every fourth layer does not turn its heads."""
    return dict(
        rope=_rope(keys, "linear", "yarn"),
        unturned_layers=tuple(range(3, min(keys.layers, 1 << 16), 4)),
    )


def _qwen2(keys: Keys, names: Names) -> dict[str, Any]:
    """Files know no windows; what was published does not use them."""
    names["qkv_bias"] = tuple(f"attn_{each}.bias" for each in "qkv")
    return dict(rope=_rope(keys, "linear", "yarn"))


def _qwen3(keys: Keys, names: Names) -> dict[str, Any]:
    own = _qwen2(keys, names)
    del names["qkv_bias"]
    names.update(_QK_NORM)
    return own


def _qwen3_moe(keys: Keys, names: Names) -> dict[str, Any]:
    """The weights of the chosen experts add up to one."""
    names.update(_QK_NORM | _EXPERTS)
    return _chosen(keys) | dict(rope=_rope(keys, "linear", "yarn"))


def _phi3(keys: Keys, names: Names) -> dict[str, Any]:
    """Phi-3 and Phi-4: matrices that read the same input are one tensor. The window must be said,
    0 if there is none: old files kept it to themselves."""
    names["qkv"], names["gate_up"] = ("attn_qkv.weight",), ("ffn_up.weight",)
    key = "attention.sliding_window"
    window = keys.take(key, int)
    return dict(
        rope=_rope(keys),
        rotary_dim=keys.size("rope.dimension_count", keys.head_dim),
        sliding_window=keys.positive(key, window) if window else None,
    )


def _gemma2(keys: Keys, names: Names) -> dict[str, Any]:
    """Gemma 2 (Gemma Team, 2024)."""
    return _gemma(keys, names, 2, largest=46) | dict(
        attention_cap=keys.number("attn_logit_softcapping"),
        logit_cap=keys.number("final_logit_softcapping"),
    )


def _gemma3(keys: Keys, names: Names) -> dict[str, Any]:
    """Gemma 3 (Gemma Team, 2025). Files leave out what all of its sizes have in common."""
    names.update(_QK_NORM)
    return _gemma(keys, names, 6, largest=62) | dict(
        local_rope=Rope(keys.number("rope.freq_base_swa", 10000.0)),
        logit_cap=keys.number("final_logit_softcapping", None),
    )


def _gemma(keys: Keys, names: Names, every: int, largest: int) -> dict[str, Any]:
    """Norms around both blocks, which have their 1."""
    names |= {
        "attention_end_norm": ("post_attention_norm.weight",),
        "inner_end_norm": ("post_ffw_norm.weight",),
    }
    own = _windows(keys, every) | dict(
        rope=_rope(keys, "linear"),
        embedding_scale=keys.width**0.5,
        gate="gelu",
    )
    if keys.layers == largest:  # the 27B alone takes another scale, which no key tells
        own["query_scale"] = (keys.width / keys.heads) ** -0.5
    return own


def _gpt_oss(keys: Keys, names: Names) -> dict[str, Any]:
    """gpt-oss (OpenAI, 2025)."""
    names |= _EXPERTS | {
        "inner_norm": ("post_attention_norm.weight",),
        "qkv_bias": tuple(f"attn_{each}.bias" for each in "qkv"),
        "out_bias": ("attn_output.bias",),
        "sinks": ("attn_sinks.weight",),
        "router_bias": ("ffn_gate_inp.bias",),
        "gate_up_bias": ("ffn_gate_exps.bias", "ffn_up_exps.bias"),
        "down_bias": ("ffn_down_exps.bias",),
    }
    rope = _rope(keys, "yarn", truncate=False)
    keys.only("rope.freq_base_swa", rope.theta)
    return _windows(keys, 2) | _chosen(keys) | dict(rope=rope, gate="clamped")


def _chosen(keys: Keys) -> dict[str, Any]:
    """The experts of a layer, and how many are chosen."""
    keys.take("feed_forward_length", int, None)  # of layers without experts
    return dict(
        inner_width=keys.size("expert_feed_forward_length"),
        num_experts=keys.size("expert_count"),
        experts_per_token=keys.size("expert_used_count"),
    )


_FAMILIES: dict[str, Callable[[Keys, Names], dict[str, Any]]] = {
    "llama": _llama,
    "smollm3": _smollm3,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "qwen3moe": _qwen3_moe,
    "phi3": _phi3,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "gpt-oss": _gpt_oss,
}
