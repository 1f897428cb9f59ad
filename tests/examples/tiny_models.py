"""Gemma 3 and gpt-oss, small enough to be computed by hand: their weights, and files of them.

Names are those of files; matrices are `(out, in)`. The numbers come from a stream that NumPy has
frozen, since a golden file rests on them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .tiny_gguf import f32, gguf_bytes

# Sizes of both: layers, width, inner width, query and KV heads, head dim, vocabulary.
LAYERS, WIDTH, INNER, HEADS, KV_HEADS, DIM, VOCAB = 4, 24, 16, 4, 2, 8, 29
GEMMA_WINDOW, GEMMA_FULL_EVERY = 6, 3
GPT_OSS = dict(window=128, experts=8, chosen=4, theta=150000.0, scale=32.0, first=4096)


class Numbers:
    def __init__(self, seed: int):
        self.random = np.random.RandomState(seed)

    def normal(self, *shape: int, scale: float = 1.0) -> np.ndarray:
        return (scale * self.random.standard_normal(shape)).astype(np.float32)

    def matrix(self, *shape: int, scale: float = 1.0) -> np.ndarray:
        """`(..., out, in)`, which keeps the size of what it is applied to."""
        return self.normal(*shape, scale=scale / shape[-1] ** 0.5)

    def norm(self, size: int) -> np.ndarray:
        return 1 + self.normal(size, scale=0.1)


def gemma_weights(seed: int = 0) -> dict[str, np.ndarray]:
    new = Numbers(seed)
    weights = {
        "token_embd.weight": new.matrix(VOCAB, WIDTH),
        "output_norm.weight": new.norm(WIDTH),
    }
    for i in range(LAYERS):
        layer = {
            "attn_norm": new.norm(WIDTH),
            "attn_q": new.matrix(HEADS * DIM, WIDTH),
            "attn_k": new.matrix(KV_HEADS * DIM, WIDTH),
            "attn_v": new.matrix(KV_HEADS * DIM, WIDTH),
            "attn_q_norm": 2 * new.norm(DIM),
            "attn_k_norm": new.norm(DIM),
            "attn_output": new.matrix(WIDTH, HEADS * DIM),
            "post_attention_norm": new.norm(WIDTH),
            "ffn_norm": new.norm(WIDTH),
            "ffn_gate": new.matrix(INNER, WIDTH),
            "ffn_up": new.matrix(INNER, WIDTH),
            "ffn_down": new.matrix(WIDTH, INNER),
            "post_ffw_norm": new.norm(WIDTH),
        }
        weights |= {f"blk.{i}.{name}.weight": value for name, value in layer.items()}
    return weights


def write_gemma(path: Path, weights: dict[str, np.ndarray], **changes) -> Path:
    keys = {
        "attention.key_length": ("u32", DIM),
        "attention.value_length": ("u32", DIM),
        "attention.sliding_window": ("u32", GEMMA_WINDOW),
        "attention.sliding_window_pattern": ("u32", GEMMA_FULL_EVERY),
        "attention.layer_norm_rms_epsilon": ("f32", 1e-6),
        "rope.freq_base": ("f32", 1000.0),
        "rope.freq_base_swa": ("f32", 100.0),
    }
    return _write(path, "gemma3", keys, weights, **changes)


def gpt_oss_weights(seed: int = 0) -> dict[str, np.ndarray]:
    """Large enough, some of them, to meet the limits of the gate."""
    new, experts = Numbers(seed), GPT_OSS["experts"]
    weights = {
        "token_embd.weight": new.normal(VOCAB, WIDTH),
        "output_norm.weight": new.norm(WIDTH),
        "output.weight": new.matrix(VOCAB, WIDTH),
    }
    for i in range(LAYERS):
        layer = {
            "attn_norm.weight": new.norm(WIDTH),
            "attn_q.weight": new.matrix(HEADS * DIM, WIDTH, scale=2),
            "attn_q.bias": new.normal(HEADS * DIM),
            "attn_k.weight": new.matrix(KV_HEADS * DIM, WIDTH, scale=2),
            "attn_k.bias": new.normal(KV_HEADS * DIM),
            "attn_v.weight": new.matrix(KV_HEADS * DIM, WIDTH),
            "attn_v.bias": new.normal(KV_HEADS * DIM),
            "attn_output.weight": new.matrix(WIDTH, HEADS * DIM),
            "attn_output.bias": new.normal(WIDTH, scale=0.1),
            "attn_sinks.weight": new.normal(HEADS, scale=2),
            "post_attention_norm.weight": new.norm(WIDTH),
            "ffn_gate_inp.weight": new.matrix(experts, WIDTH),
            "ffn_gate_inp.bias": new.normal(experts),
            "ffn_gate_exps.weight": new.matrix(experts, INNER, WIDTH, scale=4),
            "ffn_gate_exps.bias": new.normal(experts, INNER),
            "ffn_up_exps.weight": new.matrix(experts, INNER, WIDTH, scale=4),
            "ffn_up_exps.bias": new.normal(experts, INNER),
            "ffn_down_exps.weight": new.matrix(experts, WIDTH, INNER, scale=0.2),
            "ffn_down_exps.bias": new.normal(experts, WIDTH, scale=0.2),
        }
        weights |= {f"blk.{i}.{name}": value for name, value in layer.items()}
    return weights


def write_gpt_oss(path: Path, weights: dict[str, np.ndarray], **changes) -> Path:
    keys = {
        "attention.key_length": ("u32", DIM),
        "attention.value_length": ("u32", DIM),
        "attention.sliding_window": ("u32", GPT_OSS["window"]),
        "attention.layer_norm_rms_epsilon": ("f32", 1e-5),
        "rope.freq_base": ("f32", GPT_OSS["theta"]),
        "rope.scaling.type": ("string", "yarn"),
        "rope.scaling.factor": ("f32", GPT_OSS["scale"]),
        "rope.scaling.original_context_length": ("u32", GPT_OSS["first"]),
        "expert_feed_forward_length": ("u32", INNER),
        "expert_count": ("u32", GPT_OSS["experts"]),
        "expert_used_count": ("u32", GPT_OSS["chosen"]),
    }
    return _write(path, "gpt-oss", keys, weights, **changes)


def _write(path: Path, architecture: str, keys, weights, **changes) -> Path:
    sizes = {
        "block_count": LAYERS,
        "context_length": 4096,
        "embedding_length": WIDTH,
        "feed_forward_length": INNER,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
    }
    keys = {key: ("u32", size) for key, size in sizes.items()} | keys
    metadata = {"general.architecture": ("string", architecture)}
    metadata |= {f"{architecture}.{key}": entry for key, entry in keys.items()}
    metadata |= changes
    tensors = {name: f32(weight) for name, weight in weights.items()}
    path.write_bytes(gguf_bytes({k: v for k, v in metadata.items() if v is not None}, tensors))
    return path
