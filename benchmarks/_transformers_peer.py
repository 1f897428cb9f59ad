"""Greedy decoding by transformers and torch, each way that may be its fastest on a CPU."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

__all__ = ["VARIANTS", "TransformersPeer"]

ROOT = Path(__file__).resolve().parents[1]
VARIANTS = tuple(
    f"transformers/{loop}/{attention}"
    for loop in ("hand", "generate")
    for attention in ("sdpa", "eager")
)


class TransformersPeer:
    """The model with its default KV cache, float32, as many torch threads as cores."""

    def __init__(self, gguf: Path):
        # transformers imports a package `kernels`, which must not be the folder of this checkout.
        sys.path[:] = [path for path in sys.path if Path(path).resolve() != ROOT]
        try:
            import torch
            import transformers
        except ImportError as error:
            raise SystemExit(
                f"the peer needs torch, transformers, accelerate and gguf ({error}): install them, "
                "or name a Python that has them with --peer-python"
            ) from error
        transformers.utils.logging.disable_progress_bar()
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        self.torch, self.base = torch, transformers.StoppingCriteria
        self.model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32
        ).eval()

    def run(self, variant: str, prompts: list[list[int]], new: int) -> dict[str, Any]:
        """Generate `new` tokens per prompt: the tokens, and the seconds of both phases."""
        _, loop, attention = variant.split("/")
        self.model.set_attn_implementation(attention)
        width = max(map(len, prompts))
        ids = self.torch.tensor([[0] * (width - len(p)) + p for p in prompts])
        mask = self.torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        with self.torch.inference_mode():
            start = time.perf_counter()
            tokens, times = getattr(self, f"_{loop}")(ids, mask, new)
        return {
            "tokens": tokens.tolist(),
            "decode_s": times[-1] - times[0],
            "decode_tokens": (len(times) - 1) * len(prompts),
            "whole_s": times[-1] - start,
        }

    def _hand(self, ids: Any, mask: Any, new: int) -> tuple[Any, list[float]]:
        torch = self.torch
        ones = torch.ones(len(ids), new, dtype=mask.dtype)
        mask, prompt_width = torch.cat([mask, ones], 1), ids.shape[1]
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        cache, begin, chosen, times = None, 0, [], []
        for end in range(prompt_width, prompt_width + new):
            out = self.model(
                input_ids=ids,
                attention_mask=mask[:, :end],
                position_ids=positions[:, begin:end],
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache, begin = out.past_key_values, end
            ids = out.logits[:, -1].argmax(-1, keepdim=True)
            chosen.append(ids)
            times.append(time.perf_counter())
        return torch.cat(chosen, 1), times

    def _generate(self, ids: Any, mask: Any, new: int) -> tuple[Any, list[float]]:
        torch, times = self.torch, []

        class Clock(self.base):
            def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
                times.append(time.perf_counter())
                return torch.zeros(len(input_ids), dtype=torch.bool)

        out = self.model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=new,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            stopping_criteria=[Clock()],
        )
        return out[:, ids.shape[1] :], times
