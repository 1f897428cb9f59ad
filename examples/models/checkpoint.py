"""From a GGUF file of architecture `llama` to a configuration and a pytree of weights."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from .gguf_reader import GGUF, GGUFError, read_gguf

__all__ = ["ModelConfig", "Params", "load"]

Params = dict[str, Any]


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Sizes and constants of one model; layers, KV heads and head_dim are those of its cache."""

    vocab_size: int
    num_layers: int
    width: int
    inner_width: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    rope_theta: float = 10000.0
    rope_scale: float = 1.0
    norm_eps: float = 1e-5
    sliding_window: int | None = None


def load(path: str | PathLike[str], dtype: Any = "float32") -> tuple[ModelConfig, Params]:
    """Read a GGUF file of architecture `llama` and convert its weights to `dtype`.

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
    config = _read_config(gguf)
    return config, _Loader(gguf, config, jnp.dtype(dtype)).params()


def _read_config(gguf: GGUF) -> ModelConfig:
    if (architecture := gguf.value("general.architecture", str)) != "llama":
        raise NotImplementedError(
            f"{gguf.path}: expected architecture 'llama', got {architecture!r}"
        )
    width, heads = _size(gguf, "embedding_length"), _size(gguf, "attention.head_count")
    head_dim = _size(gguf, "attention.key_length", max(width // heads, 1))
    kv_heads = _size(gguf, "attention.head_count_kv", heads)
    if heads % kv_heads or head_dim % 2:
        raise GGUFError(
            f"{gguf.path}: expected query heads a multiple of KV heads and an even head size, got "
            f"{heads}, {kv_heads} and {head_dim}"
        )
    scaling = gguf.value("llama.rope.scaling.type", str, "none")
    _served(gguf, "rope.scaling.type", scaling, ("none", "linear"))
    for key in ("rope.dimension_count", "attention.value_length"):
        _served(gguf, key, _size(gguf, key, head_dim), (head_dim,))
    window = "attention.sliding_window"
    return ModelConfig(
        vocab_size=gguf.info("token_embd.weight").shape[0],
        num_layers=_size(gguf, "block_count"),
        width=width,
        inner_width=_size(gguf, "feed_forward_length"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        max_positions=_size(gguf, "context_length"),
        rope_theta=_number(gguf, "rope.freq_base", 10000.0),
        rope_scale=_number(gguf, "rope.scaling.factor", 1.0) if scaling == "linear" else 1.0,
        norm_eps=_number(gguf, "attention.layer_norm_rms_epsilon", 1e-5),
        sliding_window=_size(gguf, window) if f"llama.{window}" in gguf.metadata else None,
    )


def _size(gguf: GGUF, key: str, default: int | None = None) -> int:
    found = gguf.value(f"llama.{key}", int, default)
    if not 1 <= found < 2**31:
        raise GGUFError(f"{gguf.path}: expected a positive 'llama.{key}', got {found}")
    return found


def _number(gguf: GGUF, key: str, default: float) -> float:
    found = gguf.value(f"llama.{key}", (float, int), default)
    if not 0 < found < float("inf"):
        raise GGUFError(f"{gguf.path}: expected a positive 'llama.{key}', got {found}")
    return found


def _served(gguf: GGUF, key: str, found: object, served: tuple[object, ...]) -> None:
    if found not in served:
        raise NotImplementedError(
            f"{gguf.path}: 'llama.{key}' = {found!r} is not served, only {served}"
        )


class _Loader:
    """Reads every tensor once, and knows which ones nobody asked for."""

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
            "rope_frequencies": self.rope_frequencies(),  # last: now head_dim is known to be true
        }
        if "output.weight" in self.unread:
            params["head"] = self.joined(embedding, "output")
        if self.unread:
            raise NotImplementedError(
                f"{self.gguf.path}: {len(self.unread)} tensors have no place in this model, such "
                f"as {sorted(self.unread)[:3]}: biases and mixtures of experts are not served"
            )
        return params

    def layer(self, prefix: str) -> Params:
        c = self.config
        q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        return {
            "attention_norm": self.vector(prefix + "attn_norm", c.width),
            "inner_norm": self.vector(prefix + "ffn_norm", c.width),
            "qkv": self.array(
                self.unpermuted(prefix + "attn_q", c.num_heads),
                self.unpermuted(prefix + "attn_k", c.num_kv_heads),
                self.read(prefix + "attn_v", (kv, c.width)),
            ),
            "out": self.joined((c.width, q), prefix + "attn_output"),
            "gate_up": self.joined(
                (c.inner_width, c.width), prefix + "ffn_gate", prefix + "ffn_up"
            ),
            "down": self.joined((c.width, c.inner_width), prefix + "ffn_down"),
        }

    def read(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        name += ".weight"
        self.unread.discard(name)
        return self.gguf.tensor(name, shape)

    def vector(self, name: str, size: int) -> Array:
        return jnp.asarray(self.read(name, (size,)).astype(self.dtype))

    def joined(self, shape: tuple[int, int], *names: str) -> Array:
        return self.array(*(self.read(name, shape) for name in names))

    def array(self, *matrices: np.ndarray) -> Array:
        """Side by side and transposed: `(out, in)` each, to `[in, out + out + ...]`."""
        joined = [matrix.astype(self.dtype).T for matrix in matrices]
        return jnp.asarray(np.ascontiguousarray(np.concatenate(joined, axis=1)))

    def unpermuted(self, name: str, heads: int) -> np.ndarray:
        """GGUF files of this architecture interleave the two halves of every Q and K head."""
        dim, width = self.config.head_dim, self.config.width
        matrix = self.read(name, (heads * dim, width))
        return matrix.reshape(heads, dim // 2, 2, width).swapaxes(1, 2).reshape(-1, width)

    def rope_frequencies(self) -> Array:
        """float32 `[D / 2]`; Llama 3.1 and later divide them by factors stored in the file."""
        half = self.config.head_dim // 2
        exponents = np.arange(half) / half
        frequencies = self.config.rope_theta**-exponents / self.config.rope_scale
        if "rope_freqs.weight" in self.unread:
            frequencies = frequencies / self.read("rope_freqs", (half,))
        return jnp.asarray(frequencies.astype(np.float32))
