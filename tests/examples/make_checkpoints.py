"""Make golden/<family>: tiny random checkpoints, and what transformers says with them.

    python tests/examples/make_checkpoints.py [FAMILY ...]  # with torch and transformers

Every folder is what `save_pretrained` of transformers' own class writes, and beside it
`golden.npz`: per prompt its ids, the greedy ids behind them, and the logits of every position of
both, in float32 with eager attention and without a cache. A seed is passed over if two tokens are
ever so close that rounding could choose between them. `mxfp4.npz` is what transformers makes of
every byte under several scales.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import PretrainedConfig
from transformers.integrations.mxfp4 import FP4_VALUES, convert_moe_packed_tensors

GOLDEN = Path(__file__).with_name("golden")
LENGTHS, NEW, MARGIN = (3, 11, 26), 10, 2e-3

SIZES: dict[str, Any] = dict(
    vocab_size=72,
    hidden_size=24,
    intermediate_size=20,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=128,
    rms_norm_eps=1e-5,
    bos_token_id=0,
    eos_token_id=1,
    pad_token_id=2,
)
LLAMA3 = dict(rope_type="llama3", rope_theta=1000.0, factor=4.0)
LLAMA3 |= dict(low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
YARN = dict(rope_type="yarn", rope_theta=1000.0, factor=4.0, original_max_position_embeddings=32)
LINEAR = dict(rope_type="linear", rope_theta=1000.0, factor=3.0)
PLAIN = dict(rope_type="default", rope_theta=100.0)
ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]
BACKWARD = ["full_attention", "sliding_attention", "sliding_attention"]

# By folder: the class, what differs from SIZES, and how it is saved.
FAMILIES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("Llama", dict(rope_parameters=LLAMA3), dict(max_shard_size="20KB")),
    "llama_biased": (
        "Llama",
        dict(attention_bias=True, mlp_bias=True, rope_parameters=LINEAR),
        {},
    ),
    "smollm2": (
        "Llama",
        dict(
            num_attention_heads=3,
            num_key_value_heads=1,
            intermediate_size=21,
            tie_word_embeddings=True,
        ),
        dict(dtype="bfloat16"),
    ),
    "smollm3": (
        "SmolLM3",
        dict(no_rope_layers=[1, 0, 1], rope_parameters=PLAIN, tie_word_embeddings=True),
        {},
    ),
    "mistral": ("Mistral", dict(sliding_window=7, rope_parameters=PLAIN), {}),
    "qwen2": (
        "Qwen2",
        dict(
            use_sliding_window=True,
            sliding_window=6,
            max_window_layers=1,
            layer_types=BACKWARD,
            rope_parameters=PLAIN,
        ),
        dict(dtype="bfloat16"),
    ),
    "qwen3": ("Qwen3", dict(tie_word_embeddings=True, rope_parameters=YARN), {}),
    "qwen3_moe": (
        "Qwen3Moe",
        dict(
            num_experts=5,
            num_experts_per_tok=2,
            moe_intermediate_size=12,
            norm_topk_prob=True,
            rope_parameters=PLAIN,
        ),
        {},
    ),
    "qwen3_moe_plain": (
        "Qwen3Moe",
        dict(num_experts=4, num_experts_per_tok=3, moe_intermediate_size=10, norm_topk_prob=False),
        dict(dtype="bfloat16"),
    ),
    "gemma2": (
        "Gemma2",
        dict(
            sliding_window=6,
            layer_types=ALTERNATING,
            query_pre_attn_scalar=11,
            attn_logit_softcapping=2.0,
            final_logit_softcapping=5.0,
            rope_parameters=PLAIN,
        ),
        {},
    ),
    "gemma3": (
        "Gemma3",
        dict(
            sliding_window=5,
            layer_types=BACKWARD,
            query_pre_attn_scalar=9,
            rope_parameters={
                "full_attention": LINEAR,
                "sliding_attention": PLAIN,
            },
        ),
        {},
    ),
    "gpt_oss": (
        "GptOss",
        dict(
            num_local_experts=4,
            num_experts_per_tok=2,
            sliding_window=6,
            layer_types=ALTERNATING,
            rope_parameters=YARN | dict(beta_fast=32.0, beta_slow=1.0, truncate=False),
        ),
        {},
    ),
    "gpt_oss_mxfp4": (
        "GptOss",
        dict(
            hidden_size=32,
            intermediate_size=32,
            num_local_experts=3,
            num_experts_per_tok=2,
            sliding_window=6,
            layer_types=ALTERNATING,
            rope_parameters=PLAIN,
        ),
        dict(dtype="bfloat16", mxfp4=True),
    ),
    "phi3": (
        "Phi3",
        dict(
            sliding_window=9,
            rope_parameters=PLAIN | dict(partial_rotary_factor=0.75),
            original_max_position_embeddings=128,
        ),
        {},
    ),
}


def of_class(name: str) -> tuple[type[PretrainedConfig], Any]:
    config = "Gemma3TextConfig" if name == "Gemma3" else f"{name}Config"
    return getattr(transformers, config), getattr(transformers, f"{name}ForCausalLM")


def build(family: str, seed: int, dtype: torch.dtype) -> Any:
    """A float32 model with random weights of `dtype`; norms are not one, biases not zero."""
    kind, changes, _ = FAMILIES[family]
    of_config, of_model = of_class(kind)
    config = of_config(**SIZES | changes)
    config._attn_implementation = config._experts_implementation = "eager"
    model = of_model(config).eval()
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=random)
            if "norm" in name:
                weight.copy_(noise * 0.3 + (0 if kind.startswith("Gemma") else 1))
            elif weight.ndim == 1 or name.endswith("bias"):
                weight.copy_(noise * 0.5)
            elif "embed_tokens" in name or "lm_head" in name:
                weight.copy_(noise * (1 if kind != "Gemma2" else 0.5))
            else:
                weight.copy_(noise * 1.3 / 24**0.5)
            weight.copy_(weight.to(dtype).float())
    return model


def packed(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks and scales of 4 bits, and near: uint8 `(X, out, in / 32, 16)` and `(X, out, in / 32)`,
    of a matrix `(X, in, out)`."""
    rows = weight.transpose(1, 2).unflatten(-1, (-1, 32))
    scales = rows.abs().amax(-1).div(6).log2().ceil().int()
    steps = torch.tensor(FP4_VALUES)
    numbers = (rows * 2.0 ** -scales[..., None])[..., None].sub(steps).abs().argmin(-1)
    numbers = numbers.to(torch.uint8).unflatten(-1, (16, 2))
    return numbers[..., 0] | numbers[..., 1] << 4, (scales + 127).to(torch.uint8)


def pack(model: Any) -> dict[str, torch.Tensor]:
    """Experts' matrices by the tensors that take their place; the model gets what those say."""
    found = {}
    for name, weight in model.named_parameters():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            found[name + "_blocks"], found[name + "_scales"] = packed(weight.data)
            pair = found[name + "_blocks"], found[name + "_scales"]
            weight.data.copy_(convert_moe_packed_tensors(*pair, dtype=torch.float32))
    return found


def save_packed(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """In the place of what was saved, as official checkpoints have it."""
    file, config = folder / "model.safetensors", folder / "config.json"
    old, replaced = load_file(file), {name.rpartition("_")[0] for name in tensors}
    save_file(
        {k: v for k, v in old.items() if k not in replaced} | tensors, file, dict(format="pt")
    )
    quantised = dict(quant_method="mxfp4", modules_to_not_convert=["lm_head"])
    content = json.loads(config.read_text()) | dict(quantization_config=quantised)
    config.write_text(json.dumps(content, indent=2) + "\n")


def every_byte() -> dict[str, np.ndarray]:
    """Under scales from the smallest to the largest that makes no infinity of 6."""
    bytes_, scales = np.arange(256, dtype=np.uint8), [0, 1, 2, 64, 117, 126, 127, 128, 200, 252]
    blocks = np.broadcast_to(bytes_.reshape(1, 8, 2, 16), (len(scales), 8, 2, 16)).copy()
    exponents = np.repeat(np.uint8(scales), 16).reshape(-1, 8, 2)
    pair = torch.from_numpy(blocks), torch.from_numpy(exponents)
    whole = convert_moe_packed_tensors(*pair, dtype=torch.float32).numpy()
    return dict(blocks=blocks, scales=exponents, whole=whole)


def said(model: Any, seed: int) -> dict[str, np.ndarray] | None:
    """Prompts, greedy ids and logits; None if a choice was too close."""
    random = np.random.RandomState(seed)
    arrays: dict[str, np.ndarray] = {}
    for index, length in enumerate(LENGTHS):
        tokens = random.randint(0, SIZES["vocab_size"], length).tolist()
        for _ in range(NEW + 1):
            with torch.no_grad():
                logits = model(torch.tensor([tokens]), use_cache=False).logits[0].float().numpy()
            best = np.sort(logits[-1])[-2:]
            if best[1] - best[0] < MARGIN:
                return None
            tokens.append(int(logits[-1].argmax()))
        arrays |= {
            f"prompt{index}": np.array(tokens[:length], np.int32),
            f"greedy{index}": np.array(tokens[length:-1], np.int32),
            f"logits{index}": logits.astype(np.float32),
        }
    return arrays


def make(family: str) -> None:
    folder = GOLDEN / family
    how = FAMILIES[family][2]
    dtype = getattr(torch, how.get("dtype", "float32"))
    for seed in range(100):
        model = build(family, seed, dtype)
        tensors = pack(model) if "mxfp4" in how else {}
        if arrays := said(model, seed):
            break
    else:
        raise SystemExit(f"{family}: no seed without two tokens that are close")
    shutil.rmtree(folder, ignore_errors=True)
    options = {k: v for k, v in how.items() if k not in ("dtype", "mxfp4")}
    model.to(dtype).save_pretrained(folder, **options)
    if tensors:
        save_packed(folder, tensors)
    (folder / "generation_config.json").unlink(missing_ok=True)
    np.savez_compressed(folder / "golden.npz", **arrays)
    spread = float(np.abs(arrays["logits2"]).max())
    files = sorted(path.name for path in folder.iterdir())
    print(f"{family}: seed {seed}, logits up to {spread:.2f}, {', '.join(files)}")


def main() -> None:
    for family in sys.argv[1:] or FAMILIES:
        make(family)
    np.savez_compressed(GOLDEN / "mxfp4.npz", **every_byte())
    versions = {each.__name__: each.__version__ for each in (np, torch, transformers)}
    (GOLDEN / "versions.json").write_text(json.dumps(versions) + "\n")
    print(sum(path.stat().st_size for path in GOLDEN.rglob("*.*")), "bytes in all")


if __name__ == "__main__":
    main()
