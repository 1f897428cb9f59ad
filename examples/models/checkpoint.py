"""From a GGUF file to a configuration and a pytree of weights: Llama, Gemma 3 and gpt-oss.

A family says what its layers have; names and shapes are those of llama.cpp's files.
"""

from __future__ import annotations

import math
from os import PathLike
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from .config import ModelConfig, read_config
from .gguf_reader import GGUF, read_gguf

__all__ = ["Params", "load", "rope_frequencies"]

Params = dict[str, Any]


def load(path: str | PathLike[str], dtype: Any = "float32") -> tuple[ModelConfig, Params]:
    """Read a GGUF file of a family that is served and convert its weights to `dtype`.

    Matrices are laid out `[in, out]`, and those that read the same input lie side by side: of
    all layouts tried with XLA on a CPU, one `[in, out]` product of all of them streams the weights
    fastest, for one row and for several. The embedding is `[E, V]`, so that a model whose
    output head is tied to it holds one copy.

    Raises:
      GGUFError: the file is broken, or its tensors do not fit its sizes.
      NotImplementedError: another architecture, or a feature of the family that is not here.

    Example:
      >>> config, params = load("SmolLM2-135M-Instruct.Q4_1.gguf")  # doctest: +SKIP
      >>> config.num_layers, params["embed"].shape  # doctest: +SKIP
      (30, (576, 49152))
    """
    gguf = read_gguf(path)
    architecture, config = read_config(gguf)
    return config, _FAMILIES[architecture](gguf, config, jnp.dtype(dtype)).params()


def rope_frequencies(config: ModelConfig) -> np.ndarray:
    """Radians per token of every pair of a head, float64 `[D / 2]`.

    With YaRN (Peng et al., "YaRN", 2023) those pairs that turn 32 times or more in the first
    context keep their speed, those that turn once or less are slowed down by the whole scale.
    """
    half, theta = config.head_dim // 2, config.rope_theta
    frequencies = theta ** -(np.arange(half) / half)
    slowed = frequencies / config.rope_scale
    if config.yarn_positions is None:
        return slowed
    turns = config.yarn_positions / (2 * math.pi)  # of the fastest pair, of which all are a power
    low, high = (half * math.log(turns / some) / math.log(theta) for some in (32, 1))
    low, high = max(low, 0), min(high, config.head_dim - 1)
    ramp = np.clip((np.arange(half) - low) / max(high - low, 1e-3), 0, 1)
    return slowed * ramp + frequencies * (1 - ramp)


class _Llama:
    """Reads every tensor once, and knows which ones nobody asked for."""

    inner_norm = "ffn_norm"

    def __init__(self, gguf: GGUF, config: ModelConfig, dtype: Any):
        self.gguf, self.config, self.dtype = gguf, config, dtype
        self.unread = set(gguf.tensors)

    def params(self) -> Params:
        config = self.config
        embedding = (config.vocab_size, config.width)
        params: Params = {
            "embed": self.joined(embedding, "token_embd"),
            "norm": self.vector("output_norm", config.width),
            "layers": [self.layer(f"blk.{i}.") for i in range(config.num_layers)],
            **self.frequencies(),  # last: now head_dim is known to be true
        }
        if "output.weight" in self.unread:
            params["head"] = self.joined(embedding, "output")
        if self.unread:
            raise NotImplementedError(
                f"{self.gguf.path}: {len(self.unread)} tensors have no place in this model, such "
                f"as {sorted(self.unread)[:3]}: this family is served without them"
            )
        return params

    def layer(self, prefix: str) -> Params:
        width = self.config.width
        return {
            "attention_norm": self.vector(prefix + "attn_norm", width),
            "inner_norm": self.vector(prefix + self.inner_norm, width),
            **self.attention(prefix),
            **self.feed_forward(prefix),
        }

    def attention(self, prefix: str) -> Params:
        c = self.config
        q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        return {
            "qkv": self.array(
                self.rotated(prefix + "attn_q", c.num_heads),
                self.rotated(prefix + "attn_k", c.num_kv_heads),
                self.read(prefix + "attn_v.weight", (kv, c.width)),
            ),
            "out": self.joined((c.width, q), prefix + "attn_output"),
        }

    def feed_forward(self, prefix: str) -> Params:
        wide, inner = self.config.width, self.config.inner_width
        return {
            "gate_up": self.joined((inner, wide), prefix + "ffn_gate", prefix + "ffn_up"),
            "down": self.joined((wide, inner), prefix + "ffn_down"),
        }

    def rotated(self, name: str, heads: int) -> np.ndarray:
        """A matrix whose heads are turned: here the two halves of every one are interleaved."""
        dim, width = self.config.head_dim, self.config.width
        matrix = self.read(name + ".weight", (heads * dim, width))
        return matrix.reshape(heads, dim // 2, 2, width).swapaxes(1, 2).reshape(-1, width)

    def frequencies(self) -> Params:
        """float32 `[D / 2]`; Llama 3.1 and later divide them by factors stored in the file."""
        frequencies = rope_frequencies(self.config)
        if "rope_freqs.weight" in self.unread:
            frequencies = frequencies / self.read("rope_freqs.weight", frequencies.shape)
        return {"rope_frequencies": jnp.asarray(frequencies.astype(np.float32))}

    # ---- how tensors are read

    def read(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        self.unread.discard(name)
        return self.gguf.tensor(name, shape)

    def vector(self, name: str, size: int) -> Array:
        return jnp.asarray(self.read(name + ".weight", (size,)).astype(self.dtype))

    def joined(self, shape: tuple[int, ...], *names: str) -> Array:
        return self.array(*(self.read(name + ".weight", shape) for name in names))

    def array(self, *matrices: np.ndarray) -> Array:
        """Side by side and transposed: `(..., out, in)` each, to `[..., in, out + out + ...]`."""
        joined = [matrix.astype(self.dtype).swapaxes(-1, -2) for matrix in matrices]
        return jnp.asarray(np.ascontiguousarray(np.concatenate(joined, axis=-1)))


class _Halves(_Llama):
    """Heads lie in two halves, as they are turned."""

    def rotated(self, name: str, heads: int) -> np.ndarray:
        return self.read(name + ".weight", (heads * self.config.head_dim, self.config.width))


class _Gemma3(_Halves):
    """Norms around both blocks and over queries and keys; the 1 is in the file's weights."""

    def layer(self, prefix: str) -> Params:
        dim, width = self.config.head_dim, self.config.width
        norms = (self.read(f"{prefix}attn_{each}_norm.weight", (dim,)) for each in "qk")
        return super().layer(prefix) | {
            "qk_norm": jnp.asarray(np.stack([*norms]).astype(self.dtype)),
            "attention_end_norm": self.vector(prefix + "post_attention_norm", width),
            "inner_end_norm": self.vector(prefix + "post_ffw_norm", width),
        }

    def frequencies(self) -> Params:
        """Those of the layers with a window beside them."""
        half = self.config.head_dim // 2
        theta = self.config.local_rope_theta or self.config.rope_theta
        local = theta ** -(np.arange(half) / half)
        return super().frequencies() | {
            "local_rope_frequencies": jnp.asarray(local.astype(np.float32))
        }


class _GptOss(_Halves):
    """Biases, a sink for every head, and experts in the place of one feed-forward block."""

    inner_norm = "post_attention_norm"

    def attention(self, prefix: str) -> Params:
        c = self.config
        q, kv = (c.num_heads * c.head_dim,), (c.num_kv_heads * c.head_dim,)
        sinks = self.read(prefix + "attn_sinks.weight", (c.num_heads,))
        return super().attention(prefix) | {
            "qkv_bias": self.biases(prefix, attn_q=q, attn_k=kv, attn_v=kv),
            "out_bias": self.biases(prefix, attn_output=(c.width,)),
            "sinks": jnp.asarray(sinks[:, None]),  # float32, as the softmax that they join
        }

    def feed_forward(self, prefix: str) -> Params:
        experts, width, inner = self.config.num_experts, self.config.width, self.config.inner_width
        up, down = (experts, inner), (experts, width)
        gate_up = (prefix + "ffn_gate_exps", prefix + "ffn_up_exps")
        return {
            "router": self.joined((experts, width), prefix + "ffn_gate_inp"),
            "router_bias": self.biases(prefix, ffn_gate_inp=(experts,)),
            "gate_up": self.joined((experts, inner, width), *gate_up),
            "gate_up_bias": self.biases(prefix, ffn_gate_exps=up, ffn_up_exps=up),
            "down": self.joined((experts, width, inner), prefix + "ffn_down_exps"),
            "down_bias": self.biases(prefix, ffn_down_exps=down),
        }

    def biases(self, prefix: str, **shapes: tuple[int, ...]) -> Array:
        """Of several tensors, side by side."""
        found = [self.read(f"{prefix}{name}.bias", shape) for name, shape in shapes.items()]
        return jnp.asarray(np.concatenate(found, axis=-1).astype(self.dtype))


_FAMILIES = {"llama": _Llama, "gemma3": _Gemma3, "gpt-oss": _GptOss}
