"""The shape of a model from what transformers says of it, its `config.json`.

Which layers see a window is known for a few model types, and for any that lists its `layer_types`.
What a file may leave out is what transformers 5.24 takes for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from .keys import Keys
from .shapes import LayerShape, ModelShape, alternating

__all__ = ["model_of_config"]

_GEMMA = dict(
    num_hidden_layers=26,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=256,
    sliding_window=4096,
)
_DEFAULTS: dict[str, dict[str, int]] = {
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "gpt_oss": dict(
        num_hidden_layers=36,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=64,
        sliding_window=128,
    ),
    "mistral": dict(num_key_value_heads=8, sliding_window=4096),
    "mixtral": dict(num_key_value_heads=8),
    "qwen2": dict(sliding_window=4096, max_window_layers=28),
    "qwen3": dict(sliding_window=4096, max_window_layers=28, head_dim=128),
}
_FULL_EVERY = {"gemma2": 2, "gemma3_text": 6, "gpt_oss": 2}
_ALL_WINDOWS = ("mistral", "mixtral")
_LAST_WINDOWS = ("qwen2", "qwen3")
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")

_RECURRENT = "layers with a recurrent state"
_SIZES = "layers whose keys and values differ from what the other keys say"
# How a key begins, and what a model has where it is set.
_UNSERVED = {
    "kv_lora_rank": "latent attention (MLA), which keeps one vector for all heads",
    "attention_chunk_size": "attention to chunks",
    "cross_attention_layers": "attention to another sequence",
    "is_encoder_decoder": "attention to another sequence",
    "use_bidirectional_attention": "attention to later tokens",
    "num_kv_shared_layers": "layers that use the keys and values of others",
    "per_layer_config": _SIZES,
    "global_head_dim": _SIZES,
    "num_global_key_value_heads": _SIZES,
    "swa_": _SIZES,
    "v_head_dim": _SIZES,
    "attn_layer_": _RECURRENT,
    "attn_type_list": _RECURRENT,
    "block_types": _RECURRENT,
    "conv_L_cache": _RECURRENT,
    "full_attention_interval": _RECURRENT,
    "hybrid_": _RECURRENT,
    "layers_block_type": _RECURRENT,
    "linear_attn": _RECURRENT,
    "linear_num_": _RECURRENT,
    "lru_width": _RECURRENT,
    "mamba_": _RECURRENT,
    "ssm_": _RECURRENT,
    "state_size": _RECURRENT,
}


def model_of_config(config: Mapping[str, Any]) -> ModelShape:
    """The shape that a `config.json` describes; of what has a text model inside, that one's.

    Raises:
      ValueError: a key is missing or cannot be.
      NotImplementedError: layers keep something else than keys and values of all tokens or of a
        window, or which of them have a window is not known.
    """
    text = config.get("text_config")
    if isinstance(text, Mapping):
        config = text
    name = config.get("model_type")
    if not isinstance(name, str):
        raise ValueError(f"expected the model_type of a transformers model, got {name!r}")
    keys = Keys(name, {**_DEFAULTS.get(name, {}), **config})
    keys.refuse(_UNSERVED)
    heads = kv_heads = keys.count("num_attention_heads")
    if keys.has("num_key_value_heads") or name not in (*_DEFAULTS, "llama"):
        kv_heads = keys.count("num_key_value_heads")
    if keys.has("head_dim"):
        head_dim = keys.count("head_dim")
    elif (width := keys.count("hidden_size")) % heads == 0:
        head_dim = width // heads
    else:
        raise ValueError(f"{name}: expected head_dim, as {heads} heads do not divide {width}")
    known = keys.has("max_position_embeddings")
    return ModelShape(
        name,
        tuple(LayerShape(kv_heads, head_dim, window) for window in _windows(keys)),
        num_heads=heads,
        context=keys.count("max_position_embeddings") if known else None,
        num_experts=next((keys.count(key) for key in _EXPERTS if keys.has(key)), 0),
    )


def _windows(keys: Keys) -> Iterable[int | None]:
    """The window of each layer."""
    name, num_layers, window = keys.name, keys.count("num_hidden_layers"), None
    if keys.values.get("use_sliding_window", name not in _LAST_WINDOWS):
        window = keys.count("sliding_window") if keys.has("sliding_window") else None
    if keys.has("layer_types"):
        return _windows_of_types(keys, window, num_layers)
    if window is None or name in _ALL_WINDOWS:
        return (window,) * num_layers
    if name in _FULL_EVERY:
        pattern = keys.has("sliding_window_pattern")
        every = keys.count("sliding_window_pattern") if pattern else _FULL_EVERY[name]
        return alternating(num_layers, window, every)
    if name in _LAST_WINDOWS:
        full = min(keys.count("max_window_layers", 0), num_layers)
        return (None,) * full + (window,) * (num_layers - full)
    raise NotImplementedError(
        f"{name} has sliding_window = {window} and no layer_types: which of its {num_layers} "
        "layers have the window is not known; give sizes instead of a file"
    )


def _windows_of_types(keys: Keys, window: int | None, num_layers: int) -> list[int | None]:
    name, types = keys.name, keys.values["layer_types"]
    if not isinstance(types, list) or len(types) != num_layers:
        raise ValueError(
            f"{name}: expected layer_types to name {num_layers} layers, got {types!r:.60}"
        )
    windows: list[int | None] = []
    for layer, kind in enumerate(types):
        if kind not in ("full_attention", "sliding_attention"):
            raise NotImplementedError(
                f"{name}: layer {layer} is {kind!r:.60}; pages are for full_attention and "
                "sliding_attention"
            )
        if kind == "sliding_attention" and window is None:
            raise ValueError(f"{name}: layer {layer} is {kind}, but there is no sliding_window")
        windows.append(window if kind == "sliding_attention" else None)
    return windows
