"""What one model is, in one record for all families; the cache that goes with it.

What a plain Llama does not have is off by default.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from paged_decode import CacheLayout, PageSpec

__all__ = ["ModelConfig", "Rope", "layout", "rope_frequencies"]


@dataclass(frozen=True, slots=True)
class Rope:
    """How heads are turned by their positions.

    Attributes:
      theta: base of the frequencies.
      kind: "plain"; "linear", where all are slowed down alike; "llama3" or "yarn", where only the
        slow ones are.
      factor: by how much they are slowed down.
      first_positions: the context before they were.
      fast: pairs that turn so often in it keep their speed.
      slow: those that do not turn oftener are slowed down by the whole factor.
      truncate: whether "yarn" rounds these two bounds outwards to whole pairs.
      magnitude: of what is turned; "yarn" sharpens attention over its longer context.
      divisors: of every pair's frequency, as some files list them; none: they stay.
    """

    theta: float = 10000.0
    kind: str = "plain"
    factor: float = 1.0
    first_positions: int = 0
    fast: float = 32.0
    slow: float = 1.0
    truncate: bool = False
    magnitude: float = 1.0
    divisors: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """What one model is; layers, KV heads, head_dim and windows are those of its cache.

    Attributes:
      vocab_size: V.
      num_layers: L.
      width: E.
      inner_width: I, of the feed-forward block, or of one expert.
      num_heads: Hq, a multiple of Hk.
      num_kv_heads: Hk.
      head_dim: D.
      max_positions: tokens that the model was made for.
      rope: of all layers, or of those that see all tokens.
      local_rope: of the layers with a window; None: they turn as the others do.
      rotary_dim: how many numbers of a head are turned, the first ones; None: all D.
      unturned_layers: whose heads are not turned at all.
      norm_eps: of every RMS norm.
      sliding_window: W, the newest tokens that a layer sees, itself included; None: all.
      full_layers: which see all tokens in spite of it.
      query_scale: of the products of queries and keys; None is D**-0.5.
      attention_cap: c of these products, which become c * tanh(x / c); None: they stay.
      logit_cap: the same of the logits.
      embedding_scale: of the embedded tokens.
      gate: how that of a feed-forward block bends: "silu", "gelu", or "clamped" as in gpt-oss.
      num_experts: X, feed-forward blocks of a layer that a router chooses from; 0: there is one
        alone.
      experts_per_token: K, how many it chooses.
      weigh_chosen: whether their weights are a softmax over the chosen ones; False: over all X.
    """

    vocab_size: int
    num_layers: int
    width: int
    inner_width: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    rope: Rope = Rope()
    local_rope: Rope | None = None
    rotary_dim: int | None = None
    unturned_layers: tuple[int, ...] = ()
    norm_eps: float = 1e-5
    sliding_window: int | None = None
    full_layers: tuple[int, ...] = ()
    query_scale: float | None = None
    attention_cap: float | None = None
    logit_cap: float | None = None
    embedding_scale: float = 1.0
    gate: str = "silu"
    num_experts: int = 0
    experts_per_token: int = 1
    weigh_chosen: bool = True

    def __post_init__(self) -> None:
        turned = self.head_dim if self.rotary_dim is None else self.rotary_dim
        if self.num_heads % self.num_kv_heads or turned % 2 or not 0 < turned <= self.head_dim:
            raise ValueError(
                "expected query heads a multiple of KV heads and an even number of turned "
                f"dimensions in a head, got {self.num_heads}, {self.num_kv_heads} and {turned} of "
                f"{self.head_dim}"
            )
        if self.num_experts and not 1 <= self.experts_per_token <= self.num_experts:
            raise ValueError(
                f"expected at most all {self.num_experts} experts to be used for a token, got "
                f"{self.experts_per_token}"
            )

    def window(self, layer: int) -> int | None:
        """How many of the newest tokens a layer sees, itself included; None: all of them."""
        return None if layer in self.full_layers else self.sliding_window


def rope_frequencies(rope: Rope, dim: int) -> np.ndarray:
    """Radians per token of every pair of `dim` numbers, float32 `[dim / 2]`, rounded as PyTorch
    does it in training: at far positions it can be told from other roundings.

    "llama3" (Llama 3.1) goes from kept to slowed frequencies by how often a pair turns in the
    first context; "yarn" (Peng et al., "YaRN", 2023) by the number of the pair.
    """
    half = dim // 2
    powers = (np.arange(half) / half).astype(np.float32).astype(float)
    frequencies = np.float32(1) / (rope.theta**powers).astype(np.float32)
    if rope.divisors:
        frequencies = frequencies / np.array(rope.divisors, np.float32)
    if rope.kind in ("plain", "linear"):
        return frequencies / rope.factor
    turns = rope.first_positions * frequencies / (2 * math.pi)
    if rope.kind == "llama3":
        kept = np.clip((turns - rope.slow) / (rope.fast - rope.slow), 0, 1)
    else:
        each = half / math.log(rope.theta)
        low, high = (each * math.log(turns[0] / t) for t in (rope.fast, rope.slow))
        if rope.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        kept = 1 - np.clip((np.arange(half, dtype=np.float32) - low) / max(high - low, 1e-3), 0, 1)
    return frequencies * kept + frequencies / rope.factor * (1 - kept)


def layout(
    config: ModelConfig,
    *,
    page_size: int,
    num_pages: int,
    window_pages: int | None = None,
    dtype: Any = "float32",
) -> CacheLayout:
    """The groups of layers of a model: those that see all tokens, and those with a window.

    A model whose layers are all alike has one full group, which keeps every page, also if all of
    them have a window.

    Args:
      config: of the model.
      page_size: S, in tokens.
      num_pages: of the full group, the null page included.
      window_pages: of the window group, likewise; None: as many, which is never too few.
      dtype: of keys and values.
    """
    layers = range(config.num_layers)
    local = tuple(layer for layer in layers if config.window(layer) is not None)
    full = tuple(layer for layer in layers if layer not in local)
    if not local or not full:
        local, full = (), tuple(layers)
    sizes = config.num_kv_heads, config.head_dim
    groups = (PageSpec(full, *sizes, num_pages, dtype),)
    if local:
        pages = num_pages if window_pages is None else window_pages
        groups += (PageSpec(local, *sizes, pages, dtype, config.sliding_window),)
    return CacheLayout(page_size, groups)
