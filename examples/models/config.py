"""Sizes and constants of a model, from the metadata of a GGUF file; the cache that goes with them.

One record serves every family: what a plain Llama does not have is off by default. The names of
the keys are those of llama.cpp's files.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from paged_decode import CacheLayout, PageSpec

from .gguf_reader import GGUF, GGUFError

__all__ = ["ModelConfig", "layout", "read_config"]


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """What one model is; layers, KV heads, head_dim and windows are those of its cache.

    Attributes:
      vocab_size: V.
      num_layers: L.
      width: E.
      inner_width: of the feed-forward block, or of one expert.
      num_heads: Hq.
      num_kv_heads: Hk.
      head_dim: D.
      max_positions: tokens that the model was made for.
      rope_theta: base of the rotary frequencies.
      rope_scale: by how much they are slowed down.
      yarn_positions: the context before `rope_scale` made it longer, by YaRN; None: all
        frequencies are slowed down alike.
      norm_eps: of every RMS norm.
      sliding_window: W, the newest tokens that a layer sees, itself included; None: all.
      full_every: layer l sees all tokens in spite of it if (l + 1) is a multiple; None: none does.
      local_rope_theta: base in the layers with a window, never slowed down; None: they turn as
        the others do.
      query_scale: of the products of queries and keys; None is D**-0.5.
      embedding_scale: of the embedded tokens.
      gate: how that of a feed-forward block bends: "silu", "gelu", or "clamped" as in gpt-oss.
      num_experts: X, feed-forward blocks of a layer that a router chooses from; 0: there is one
        alone.
      experts_per_token: K, how many it chooses.
    """

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
    yarn_positions: int | None = None
    norm_eps: float = 1e-5
    sliding_window: int | None = None
    full_every: int | None = None
    local_rope_theta: float | None = None
    query_scale: float | None = None
    embedding_scale: float = 1.0
    gate: str = "silu"
    num_experts: int = 0
    experts_per_token: int = 1

    def window(self, layer: int) -> int | None:
        """How many of the newest tokens a layer sees, itself included; None: all of them."""
        if self.full_every is not None and (layer + 1) % self.full_every == 0:
            return None
        return self.sliding_window


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

    Example:
      >>> of_gemma = layout(config, page_size=16, num_pages=2049)  # doctest: +SKIP
      >>> [(group.window, len(group.layers)) for group in of_gemma.groups]  # doctest: +SKIP
      [(None, 3), (512, 15)]
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


def read_config(gguf: GGUF) -> tuple[str, ModelConfig]:
    """The architecture of a file, and its configuration.

    Raises:
      GGUFError: the file is no model, or its sizes do not fit each other.
      NotImplementedError: another architecture, or a feature of the family that is not here.
    """
    architecture = gguf.value("general.architecture", str)
    if architecture not in _FAMILIES:
        known = ", ".join(map(repr, _FAMILIES))
        raise NotImplementedError(
            f"{gguf.path}: expected an architecture of {known}, got {architecture!r}"
        )
    keys = _Keys(gguf, architecture)
    own = _FAMILIES[architecture](keys)
    width, heads = keys.size("embedding_length"), keys.size("attention.head_count")
    head_dim = keys.size("attention.key_length", max(width // heads, 1))
    kv_heads = keys.size("attention.head_count_kv", heads)
    if heads % kv_heads or head_dim % 2:
        raise GGUFError(
            f"{gguf.path}: expected query heads a multiple of KV heads and an even head size, got "
            f"{heads}, {kv_heads} and {head_dim}"
        )
    for key in ("rope.dimension_count", "attention.value_length"):
        keys.served(key, keys.size(key, head_dim), (head_dim,))
    return architecture, ModelConfig(
        vocab_size=gguf.info("token_embd.weight").shape[0],
        num_layers=keys.size("block_count"),
        width=width,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        max_positions=keys.size("context_length"),
        rope_theta=keys.number("rope.freq_base", 10000.0),
        norm_eps=keys.number("attention.layer_norm_rms_epsilon", 1e-5),
        **own,
    )


class _Keys:
    """The metadata of one architecture, with its checks."""

    def __init__(self, gguf: GGUF, architecture: str):
        self.gguf, self.prefix = gguf, architecture + "."

    def __contains__(self, key: str) -> bool:
        return self.prefix + key in self.gguf.metadata

    def size(self, key: str, default: int | None = None) -> int:
        found = self.gguf.value(self.prefix + key, int, default)
        if not 1 <= found < 2**31:
            raise GGUFError(
                f"{self.gguf.path}: expected a positive {self.prefix + key!r}, got {found}"
            )
        return found

    def number(self, key: str, default: float | None = None) -> float:
        found = self.gguf.value(self.prefix + key, (float, int), default)
        if not 0 < found < float("inf"):
            raise GGUFError(
                f"{self.gguf.path}: expected a positive {self.prefix + key!r}, got {found}"
            )
        return found

    def served(self, key: str, found: object, served: tuple[object, ...]) -> None:
        if found not in served:
            raise NotImplementedError(
                f"{self.gguf.path}: {self.prefix + key!r} = {found!r} is not served, only {served}"
            )

    def full_every(self, default: int) -> int:
        """Which layers have no window: a period in the file, a list of those that have one, or
        what files of the family leave out."""
        key = "attention.sliding_window_pattern"
        found = self.gguf.metadata.get(self.prefix + key)
        if not isinstance(found, np.ndarray):
            return self.size(key, default)
        local = found.astype(bool).tolist()
        period = local.index(False) + 1 if False in local else len(local) + 1
        regular = [(layer + 1) % period != 0 for layer in range(len(local))]
        self.served(key, local, (regular,))
        return period

    def scaling(self, *served: str) -> str:
        """How positions past the first context are served; "none" if the file says nothing."""
        found = self.gguf.value(self.prefix + "rope.scaling.type", str, "none")
        self.served("rope.scaling.type", found, ("none", *served))
        return found


def _llama(keys: _Keys) -> dict[str, Any]:
    own: dict[str, Any] = dict(inner_width=keys.size("feed_forward_length"))
    if keys.scaling("linear") == "linear":
        own["rope_scale"] = keys.number("rope.scaling.factor", 1.0)
    if "attention.sliding_window" in keys:
        own["sliding_window"] = keys.size("attention.sliding_window")
    return own


def _gemma3(keys: _Keys) -> dict[str, Any]:
    """Gemma 3 (Gemma Team, 2025). Files leave out what all of its sizes have in common."""
    width, heads = keys.size("embedding_length"), keys.size("attention.head_count")
    own = _llama(keys) | dict(
        sliding_window=keys.size("attention.sliding_window"),
        full_every=keys.full_every(6),
        local_rope_theta=keys.number("rope.freq_base_swa", 10000.0),
        embedding_scale=width**0.5,
        gate="gelu",
    )
    if keys.size("block_count") == 62:  # the 27B alone takes another scale, which no key tells
        own["query_scale"] = (width / heads) ** -0.5
    return own


def _gpt_oss(keys: _Keys) -> dict[str, Any]:
    """gpt-oss (OpenAI, 2025)."""
    own: dict[str, Any] = dict(
        inner_width=keys.size("expert_feed_forward_length"),
        sliding_window=keys.size("attention.sliding_window"),
        full_every=keys.full_every(2),
        gate="clamped",
        num_experts=keys.size("expert_count"),
        experts_per_token=keys.size("expert_used_count"),
    )
    if own["experts_per_token"] > own["num_experts"]:
        raise GGUFError(
            f"{keys.gguf.path}: expected at most all {own['num_experts']} experts to be used for a "
            f"token, got {own['experts_per_token']}"
        )
    if keys.scaling("yarn") == "yarn":
        own["rope_scale"] = keys.number("rope.scaling.factor")
        own["yarn_positions"] = keys.size("rope.scaling.original_context_length")
    return own


_FAMILIES: dict[str, Callable[[_Keys], dict[str, Any]]] = {
    "llama": _llama,
    "gemma3": _gemma3,
    "gpt-oss": _gpt_oss,
}
