"""From the config.json of a checkpoint to a configuration and the names of its tensors.

A family is one small function. What a file says and nobody here understands is refused by its
name: a key that was not read, another way to stretch positions, a quantised checkpoint.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .config import ModelConfig, Rope

__all__ = ["CheckpointError", "Keys", "Names", "Recipe", "Stored", "read_object", "read_recipe"]


class CheckpointError(ValueError):
    """The folder is no whole checkpoint, or what it holds does not fit together."""


@dataclass(frozen=True, slots=True)
class Stored:
    """How a tensor lies in a file: a matrix as `(in, out)` or `(out, in)`, and what puts its
    columns, seen as `(in, out)`, in our order."""

    in_out: bool = False
    ours: Callable[[np.ndarray], np.ndarray] = lambda columns: columns


Names = dict[str, tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Recipe:
    """What is needed to read a checkpoint.

    Attributes:
      config: of the model.
      names: by the name of a parameter, the tensors that make it up. In a layer, its number goes
        in for `{layer}`. A name with `{expert}` stands for a tensor of every expert; one name in
        the place of several, for a tensor that has them all.
      stored: by name, tensors that lie in another way than matrices of `(out, in)`.
      norm_offset: what is added to the weights of norms.
      mxfp4: whether tensors of experts are stored so.
    """

    config: ModelConfig
    names: Names
    stored: dict[str, Stored] = field(default_factory=dict)
    norm_offset: float = 0.0
    mxfp4: bool = False


def read_object(path: Path) -> dict[str, Any]:
    """The entries of a JSON file; CheckpointError if it has none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not JSON that can be read: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: expected an object, got {type(found).__name__}")
    return found


def read_recipe(folder: Path) -> Recipe:
    """Of the checkpoint in a folder.

    Raises:
      CheckpointError: there is no config.json, or its sizes do not fit each other.
      NotImplementedError: another architecture, or anything that is not understood.
    """
    path = folder / "config.json"
    keys = Keys(path, {k: v for k, v in read_object(path).items() if k not in _WITHOUT_EFFECT})
    kinds = keys.take("architectures", list)
    if len(kinds) != 1 or kinds[0] not in _FAMILIES:
        keys.refuse("architectures", kinds, f", only one of {', '.join(_FAMILIES)}")
    kind, family = _FAMILIES[kinds[0]]
    keys.only("model_type", kind)
    quantised = keys.take("quantization_config", dict, None)
    if quantised is not None and (kind, quantised.get("quant_method")) != ("gpt_oss", "mxfp4"):
        told = ", only 'mxfp4' of gpt-oss: save it dequantised, such as in bfloat16"
        keys.refuse("quantization_config", quantised, told)
    names = dict(_OF_LLAMA)
    keys.layers, keys.width = keys.size("num_hidden_layers"), keys.size("hidden_size")
    keys.heads = keys.size("num_attention_heads")
    keys.head_dim = keys.size("head_dim", keys.width // keys.heads)
    own = family(keys, names)
    keys.only("hidden_act", "silu")  # of the families that have not taken it
    tied = keys.take("tie_word_embeddings", bool, kind.startswith(("gemma", "smollm3")))
    sizes: dict[str, Any] = dict(
        vocab_size=keys.size("vocab_size"),
        num_layers=keys.layers,
        width=keys.width,
        inner_width=own.pop("inner_width", None) or keys.size("intermediate_size"),
        num_heads=keys.heads,
        num_kv_heads=keys.size("num_key_value_heads", keys.heads),
        head_dim=keys.head_dim,
        max_positions=keys.size("max_position_embeddings"),
        norm_eps=keys.number("rms_norm_eps"),
    )
    stored, offset = own.pop("stored", {}), own.pop("norm_offset", 0.0)
    keys.nothing_left(_OFF)
    try:
        config = ModelConfig(**sizes, **own)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    prefix = "model.layers.{layer}."
    names = {role: tuple(prefix + name for name in each) for role, each in names.items()}
    names |= {"embed": ("model.embed_tokens.weight",), "norm": ("model.norm.weight",)}
    if not tied:
        names["head"] = ("lm_head.weight",)
    stored = {prefix + name: each for name, each in stored.items()}
    return Recipe(config, names, stored, offset, bool(quantised))


_REQUIRED: Any = object()
_SAID: Any = object()  # null is served, but must be said: the family's own default is another
# What says nothing of what a trained model computes, nor does how old files would draw tokens.
_WITHOUT_EFFECT = frozenset(
    "_attn_implementation_autoset _name_or_path attention_dropout auto_map bos_token_id "
    "cache_implementation chunk_size_feed_forward do_sample dtype embd_pdrop eos_token_id "
    "finetuning_task id2label initial_context_length initializer_range is_decoder is_llama_config "
    "label2id length_penalty max_length min_length num_beam_groups num_beams num_return_sequences "
    "output_attentions output_hidden_states output_router_logits pad_token_id prefix "
    "pretraining_tp problem_type repetition_penalty resid_pdrop return_dict router_aux_loss_coef "
    "sep_token_id task_specific_params temperature tokenizer_class top_k top_p torch_dtype "
    "torchscript transformers.js_config transformers_version typical_p unsloth_fixed "
    "unsloth_version use_bfloat16 use_cache".split()
)
# What may be false, or nothing, where the family has not taken it.
_OFF = frozenset(
    "add_cross_attention attention_bias bad_words_ids diversity_penalty early_stopping "
    "encoder_no_repeat_ngram_size is_encoder_decoder lm_head_bias mlp_bias mlp_only_layers "
    "no_repeat_ngram_size output_scores pruned_heads qkv_bias remove_invalid_values "
    "return_dict_in_generate rope_interleaved shared_expert_intermediate_size "
    "tie_encoder_decoder use_bidirectional_attention use_mrope".split()
)


class Keys:
    """What a file says, with checks; every key is taken once."""

    layers = width = heads = head_dim = 0  # of the model, which several families ask for

    def __init__(self, path: object, content: dict[str, Any], error: Any = CheckpointError):
        self.path, self.left, self.error = path, dict(content), error

    def take(self, key: str, kind: type | tuple[type, ...], default: Any = _REQUIRED) -> Any:
        """The value of a key; null is as good as none, but where it must be said."""
        missing, found = key not in self.left, self.left.pop(key, None)
        if found is None:
            if default is _REQUIRED or (default is _SAID and missing):
                raise self.error(f"{self.path}: expected a key {key!r}, the file has none")
            return None if default is _SAID else default
        if not isinstance(found, kind) or (isinstance(found, bool) and kind is not bool):
            raise self.error(f"{self.path}: expected {key!r} of type {kind}, got {found!r:.80}")
        return found

    def size(self, key: str, default: int = _REQUIRED) -> int:
        return self.positive(key, self.take(key, int, default))

    def number(self, key: str, default: Any = _REQUIRED) -> Any:
        found = self.take(key, (int, float), default)
        return found if found is None else float(self.positive(key, found, math.inf))

    def positive(self, key: str, found: Any, below: float = 2**31) -> Any:
        if 0 < found < below:
            return found
        raise self.error(f"{self.path}: expected a positive {key!r}, got {found}")

    def only(self, key: str, *served: Any) -> None:
        """Refuse another value than those that are served; none at all is as good as these."""
        if (found := self.left.pop(key, None)) is not None and found not in served:
            self.refuse(key, found, f", only {' or '.join(map(repr, served))}")

    def refuse(self, key: str, found: object, more: str = "") -> None:
        raise NotImplementedError(f"{self.path}: {key!r} = {found!r:.200} is not served{more}")

    def nothing_left(self, off: frozenset[str] = frozenset()) -> None:
        for key, found in self.left.items():
            if found is not None and (found or key not in off):
                self.refuse(key, found, ": nobody here knows what it means")


# ---- what several families have


_OF_LLAMA: Names = {
    "attention_norm": ("input_layernorm.weight",),
    "inner_norm": ("post_attention_layernorm.weight",),
    "qkv": tuple(f"self_attn.{each}_proj.weight" for each in "qkv"),
    "out": ("self_attn.o_proj.weight",),
    "gate_up": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "down": ("mlp.down_proj.weight",),
}
_QK_NORM: Names = {"qk_norm": ("self_attn.q_norm.weight", "self_attn.k_norm.weight")}
_QKV_BIAS: Names = {"qkv_bias": tuple(f"self_attn.{each}_proj.bias" for each in "qkv")}
_OUT_BIAS: Names = {"out_bias": ("self_attn.o_proj.bias",)}


def _attention_bias(keys: Keys, names: Names) -> None:
    if keys.take("attention_bias", bool, False):
        names.update(_QKV_BIAS | _OUT_BIAS)


def _biases(keys: Keys, names: Names) -> None:
    _attention_bias(keys, names)
    if keys.take("mlp_bias", bool, False):
        names["gate_up_bias"] = ("mlp.gate_proj.bias", "mlp.up_proj.bias")
        names["down_bias"] = ("mlp.down_proj.bias",)


def _windows(
    keys: Keys, local: Callable[[int], bool] = lambda layer: True, *, optional: bool = False
) -> dict[str, Any]:
    """The window, and which layers have none: by the file's list, or as `local` says.

    Where it is optional, the file must say that it is used.
    """
    used = not optional or keys.take("use_sliding_window", bool, False)
    window = keys.take("sliding_window", int, _SAID if used else None)
    keys.only("sliding_window_size", window)  # the same, said twice
    window = window if used else None
    count, kinds = keys.layers, {True: "sliding_attention", False: "full_attention"}
    default = [kinds[window is not None and local(layer)] for layer in range(count)]
    found = keys.take("layer_types", list, default)
    if len(found) != count or any(
        each not in kinds.values() or (each == kinds[True] and window is None) for each in found
    ):
        keys.refuse("layer_types", found)
    full = tuple(layer for layer, each in enumerate(found) if each == kinds[False])
    if window is None or len(full) == count:
        return {}
    return dict(sliding_window=keys.positive("sliding_window", window), full_layers=full)


def _rope(keys: Keys, theta: float = _REQUIRED, scaling: Any = None) -> dict[str, Any]:
    """As files of today say it, or those of before 2026: `rope_theta` and `rope_scaling`."""
    found = keys.take("rope_parameters", dict, None)
    found = found or keys.take("rope_scaling", dict, scaling) or {}
    if "rope_theta" not in found:
        found = found | {"rope_theta": keys.number("rope_theta", theta)}
    keys.only("rope_theta", found["rope_theta"])  # or the same, said twice
    keys.only("rope_scaling", found)
    return dict(rope=_one_rope(keys, found))


def _one_rope(keys: Keys, found: dict[str, Any]) -> Rope:
    own = Keys(f"{keys.path}: rope", found)
    kind = own.take("rope_type", str, own.left.get("type", "default"))
    own.only("type", kind)
    if kind not in ("default", "linear", "llama3", "yarn"):
        raise NotImplementedError(f"{keys.path}: 'rope_type' = {kind!r} is not served")
    said: dict[str, Any] = dict(theta=own.number("rope_theta"))
    if kind != "default":
        said |= dict(kind=kind, factor=own.number("factor"))
    if kind in ("llama3", "yarn"):
        said["first_positions"] = own.size("original_max_position_embeddings")
    if kind == "llama3":
        said |= dict(fast=own.number("high_freq_factor"), slow=own.number("low_freq_factor"))
    if kind == "yarn":
        said |= dict(fast=own.number("beta_fast", 32.0), slow=own.number("beta_slow", 1.0))
        grown = 0.1 * math.log(max(said["factor"], 1.0))
        above, below = own.number("mscale", None), own.number("mscale_all_dim", None)
        both = (above, below) if above and below else (1.0, 0.0)
        magnitude = (both[0] * grown + 1) / (both[1] * grown + 1)
        said["magnitude"] = own.number("attention_factor", magnitude)
        said["truncate"] = own.take("truncate", bool, "truncate" not in own.left)
    own.nothing_left()
    if said["theta"] <= 1 or not said.get("slow", 0) < said.get("fast", 1):
        keys.refuse("rope_parameters", found)
    return Rope(**said)


# ---- the families


def _llama(keys: Keys, names: Names) -> dict[str, Any]:
    """Llama 2 and 3, SmolLM2."""
    _biases(keys, names)
    return _rope(keys, 10000.0)


def _mistral(keys: Keys, names: Names) -> dict[str, Any]:
    return _rope(keys, 10000.0) | _windows(keys)


def _smollm3(keys: Keys, names: Names) -> dict[str, Any]:
    """Every fourth layer does not turn its heads, unless the file lists others."""
    every = keys.size("no_rope_layer_interval", 4)
    turned = [(layer + 1) % every != 0 for layer in range(keys.layers)]
    turned = keys.take("no_rope_layers", list, turned)  # 1 for layers that do turn them
    if len(turned) != keys.layers:
        keys.refuse("no_rope_layers", turned)
    unturned = tuple(layer for layer, each in enumerate(turned) if not each)
    keys.take("max_window_layers", int, None)  # unlike Qwen's, it says nothing
    own = _windows(keys, lambda layer: layer in unturned, optional=True)
    _biases(keys, names)
    return _rope(keys) | own | dict(unturned_layers=unturned)


def _qwen2(keys: Keys, names: Names) -> dict[str, Any]:
    """Windows, where they are used at all, from one layer on."""
    names.update(_QKV_BIAS)
    first = keys.take("max_window_layers", int, 28)
    return _rope(keys, 10000.0) | _windows(keys, lambda layer: layer >= first, optional=True)


def _qwen3(keys: Keys, names: Names) -> dict[str, Any]:
    keys.only("use_qk_norm", True)
    own = _qwen2(keys, names)
    del names["qkv_bias"]
    names.update(_QK_NORM)
    _attention_bias(keys, names)
    return own


def _qwen3_moe(keys: Keys, names: Names) -> dict[str, Any]:
    """Experts in all layers, each with matrices of its own in the file."""
    keys.left["max_window_layers"] = 0  # the file's own says nothing
    keys.only("layer_types", None)  # which its class does not ask
    own = _qwen3(keys, names)
    keys.only("decoder_sparse_step", 1)
    keys.take("intermediate_size", int, None)  # of layers without experts
    of_expert = "mlp.experts.{{expert}}.{}_proj.weight".format
    names["router"] = ("mlp.gate.weight",)
    names["gate_up"], names["down"] = (of_expert("gate"), of_expert("up")), (of_expert("down"),)
    experts = "num_experts" if "num_experts" in keys.left else "num_local_experts"
    return own | dict(
        inner_width=keys.size("moe_intermediate_size"),
        num_experts=keys.size(experts),
        experts_per_token=keys.size("num_experts_per_tok"),
        weigh_chosen=keys.take("norm_topk_prob", bool),
    )


def _gpt_oss(keys: Keys, names: Names) -> dict[str, Any]:
    """Gates lie between what they multiply, and matrices as `[in, out]`. "silu", as files say, is
    not what it computes."""
    keys.only("swiglu_alpha", 1.702)
    keys.only("swiglu_limit", 7.0)
    keys.only("attention_bias", True)
    names.update(_QKV_BIAS | _OUT_BIAS)
    names["sinks"] = ("self_attn.sinks",)
    names["router"], names["router_bias"] = ("mlp.router.weight",), ("mlp.router.bias",)
    for role in ("gate_up", "down"):
        names[role] = (f"mlp.experts.{role}_proj",)
        names[role + "_bias"] = (f"mlp.experts.{role}_proj_bias",)
    chosen = keys.size("num_experts_per_tok")
    keys.only("experts_per_token", chosen)  # the same, said twice
    return (
        _rope(keys, scaling=_SAID)
        | _windows(keys, lambda layer: layer % 2 == 0)
        | dict(
            gate="clamped",
            num_experts=keys.size("num_local_experts"),
            experts_per_token=chosen,
            stored={
                "mlp.experts.gate_up_proj": Stored(True, _apart),
                "mlp.experts.gate_up_proj_bias": Stored(ours=_apart),
                "mlp.experts.down_proj": Stored(True),
            },
        )
    )


def _apart(both: np.ndarray) -> np.ndarray:
    """`(..., 2I)` of gates and what they multiply in turn, to first all of the former."""
    return np.concatenate([both[..., ::2], both[..., 1::2]], axis=-1)


def _gemma2(keys: Keys, names: Names) -> dict[str, Any]:
    return _gemma(keys, names) | _rope(keys, 10000.0) | _windows(keys, lambda i: i % 2 == 0)


def _gemma3(keys: Keys, names: Names) -> dict[str, Any]:
    """The text model."""
    names.update(_QK_NORM)
    every = keys.size("sliding_window_pattern", 6)
    if "layer_types" not in keys.left:
        keys.only("_sliding_window_pattern", every)
    keys.take("_sliding_window_pattern", int, None)
    keys.only("attn_logit_softcapping", None)
    own = _gemma(keys, names, default=None) | _windows(keys, lambda layer: (layer + 1) % every != 0)
    if ropes := keys.take("rope_parameters", dict, None):
        both = Keys(keys.path, ropes)
        full, local = (both.take(f"{each}_attention", dict) for each in ("full", "sliding"))
        both.nothing_left()
        return own | dict(rope=_one_rope(keys, full), local_rope=_one_rope(keys, local))
    return own | _rope(keys) | dict(local_rope=Rope(keys.number("rope_local_base_freq")))


def _gemma(keys: Keys, names: Names, *, default: Any = _SAID) -> dict[str, Any]:
    """Norms around both blocks, whose weights lack a 1."""
    for key in ("hidden_act", "hidden_activation"):
        keys.only(key, "gelu_pytorch_tanh")
    names |= {
        "attention_end_norm": ("post_attention_layernorm.weight",),
        "inner_norm": ("pre_feedforward_layernorm.weight",),
        "inner_end_norm": ("post_feedforward_layernorm.weight",),
    }
    _attention_bias(keys, names)
    return dict(
        gate="gelu",
        norm_offset=1.0,
        embedding_scale=keys.width**0.5,
        query_scale=keys.number("query_pre_attn_scalar") ** -0.5,
        attention_cap=keys.number("attn_logit_softcapping", default),
        logit_cap=keys.number("final_logit_softcapping", default),
    )


def _phi3(keys: Keys, names: Names) -> dict[str, Any]:
    """Phi-3 and Phi-4: matrices that read the same input are one tensor."""
    names["qkv"], names["gate_up"] = ("self_attn.qkv_proj.weight",), ("mlp.gate_up_proj.weight",)
    keys.take("original_max_position_embeddings", int, None)  # of "longrope", which is refused
    part = keys.number("partial_rotary_factor", 1.0)
    if isinstance(rope := keys.left.get("rope_parameters"), dict):
        keys.left["rope_parameters"] = rope = dict(rope)
        part = float(rope.pop("partial_rotary_factor", part))
    keys.only("layer_types", None)  # which its class does not ask
    turns: Rope = (own := _rope(keys, 10000.0))["rope"]
    if turns.kind != "plain":
        keys.refuse("rope_type", turns.kind, " by this family")
    return own | _windows(keys) | dict(rotary_dim=int(keys.head_dim * part))


_FAMILIES: dict[str, tuple[str, Callable[[Keys, Names], dict[str, Any]]]] = {
    "LlamaForCausalLM": ("llama", _llama),
    "MistralForCausalLM": ("mistral", _mistral),
    "SmolLM3ForCausalLM": ("smollm3", _smollm3),
    "Qwen2ForCausalLM": ("qwen2", _qwen2),
    "Qwen3ForCausalLM": ("qwen3", _qwen3),
    "Qwen3MoeForCausalLM": ("qwen3_moe", _qwen3_moe),
    "Gemma2ForCausalLM": ("gemma2", _gemma2),
    "Gemma3ForCausalLM": ("gemma3_text", _gemma3),
    "GptOssForCausalLM": ("gpt_oss", _gpt_oss),
    "Phi3ForCausalLM": ("phi3", _phi3),
}
