"""Make gpt_oss_logits.json: what transformers' GptOssForCausalLM says with the tests' tiny weights.

    python -m tests.golden.make_gpt_oss  # with numpy, torch and transformers (Apache-2.0)

Its eager attention, in float32 on a CPU, without a cache: every logit is of a forward pass over all
tokens before it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from tests.examples import tiny_models as tiny

FILE = Path(__file__).with_name("gpt_oss_logits.json")
LENGTHS, NEW = (1, 40, 120, 200), 16  # within the window, across it while decoding, behind it


def reference(weights: dict[str, np.ndarray]):
    """`logits(tokens)`, float32 `[T, V]`, of the model with these weights, named as in a file."""
    import torch

    sys.modules["kernels"] = None  # transformers would take ours for a package of that name
    try:
        from transformers import GptOssConfig, GptOssForCausalLM
    finally:
        del sys.modules["kernels"]

    sizes = tiny.GPT_OSS
    config = GptOssConfig(
        num_hidden_layers=tiny.LAYERS,
        num_local_experts=sizes["experts"],
        num_experts_per_tok=sizes["chosen"],
        vocab_size=tiny.VOCAB,
        hidden_size=tiny.WIDTH,
        intermediate_size=tiny.INNER,
        head_dim=tiny.DIM,
        num_attention_heads=tiny.HEADS,
        num_key_value_heads=tiny.KV_HEADS,
        sliding_window=sizes["window"],
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": sizes["theta"],
            "factor": sizes["scale"],
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": sizes["first"],
        },
        attn_implementation="eager",
    )
    model = GptOssForCausalLM(config).eval()
    state = {name: torch.tensor(array) for name, array in renamed(weights).items()}
    model.load_state_dict(state, strict=True)

    def logits(tokens: list[int]) -> np.ndarray:
        with torch.no_grad():
            return model(torch.tensor([tokens]), use_cache=False).logits[0].numpy()

    return logits


def renamed(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same under the names of transformers, which interleaves gates and what they multiply."""
    state = {
        "model.embed_tokens.weight": weights["token_embd.weight"],
        "model.norm.weight": weights["output_norm.weight"],
        "lm_head.weight": weights["output.weight"],
    }
    for i in range(tiny.LAYERS):
        layer = {k.removeprefix(f"blk.{i}."): v for k, v in weights.items()}
        here = {
            "input_layernorm.weight": layer["attn_norm.weight"],
            "post_attention_layernorm.weight": layer["post_attention_norm.weight"],
            "self_attn.sinks": layer["attn_sinks.weight"],
            "mlp.experts.gate_up_proj": both(layer, "weight").swapaxes(1, 2),
            "mlp.experts.gate_up_proj_bias": both(layer, "bias"),
            "mlp.experts.down_proj": layer["ffn_down_exps.weight"].swapaxes(1, 2),
            "mlp.experts.down_proj_bias": layer["ffn_down_exps.bias"],
        }
        for kind in ("weight", "bias"):
            here[f"mlp.router.{kind}"] = layer[f"ffn_gate_inp.{kind}"]
            for theirs, ours in (("q", "attn_q"), ("k", "attn_k"), ("v", "attn_v")):
                here[f"self_attn.{theirs}_proj.{kind}"] = layer[f"{ours}.{kind}"]
            here[f"self_attn.o_proj.{kind}"] = layer[f"attn_output.{kind}"]
        state |= {f"model.layers.{i}.{name}": array for name, array in here.items()}
    return state


def both(layer: dict[str, np.ndarray], kind: str) -> np.ndarray:
    pair = layer[f"ffn_gate_exps.{kind}"], layer[f"ffn_up_exps.{kind}"]
    return np.stack(pair, axis=2).reshape(len(pair[0]), -1, *pair[0].shape[2:])


def prompts() -> list[list[int]]:
    random = np.random.RandomState(1)
    return [random.randint(0, tiny.VOCAB, n).tolist() for n in LENGTHS]


def main() -> None:
    import torch
    import transformers

    logits, cases = reference(tiny.gpt_oss_weights()), []
    for prompt in prompts():
        tokens = list(prompt)
        for _ in range(NEW):
            tokens.append(int(logits(tokens)[-1].argmax()))
        said = logits(tokens)[len(prompt) - 1 : -1]
        case = dict(prompt_ids=prompt, greedy_ids=tokens[len(prompt) :])
        cases.append(case | dict(logits=[[float(f"{x:.7g}") for x in row] for row in said]))
    versions = {each.__name__: each.__version__ for each in (np, torch, transformers)}
    FILE.write_text(json.dumps(dict(versions=versions, cases=cases)) + "\n")


if __name__ == "__main__":
    main()
