"""A decoder in JAX that keeps its keys and values in a paged cache: Llama, Gemma 3 and gpt-oss.

Everything the cache needs from a model is one call in `_attention`, which writes this step's K and
V and attends through `batch`. The rest is an ordinary decoder, in which the weights of a layer say
what it has: norms behind its blocks or over its heads, biases, sinks, experts.

Axes: B rows, T tokens per row, M = B * T, E model width, V vocabulary, Hq and Hk query and KV
heads, D head dim, X experts, K of them for a token.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from paged_decode import DecodeBatch, KVCache

from .checkpoint import Params, load, rope_frequencies
from .config import ModelConfig, layout
from .experts import gated, mix_experts

__all__ = ["ModelConfig", "layout", "load", "make_model", "rope_frequencies"]

Model = Callable[[Params, KVCache, Array, DecodeBatch], tuple[Array, KVCache]]


def make_model(
    config: ModelConfig,
    *,
    every_token: bool = False,
    axis: str | None = None,
    split_vocabulary: bool = False,
) -> Model:
    """Return `model(params, cache, tokens, batch) -> (logits, cache)` for these sizes.

    tokens is int32 `[B, T]`, right-aligned as `batch` says; logits are float32 `[B, V]` of each
    row's last token, or with `every_token` `[B, T, V]`, as a check of drafts needs them. Compute
    follows the dtype of the weights, with norms, rotary angles and logits in float32. The cache
    should be donated by whoever compiles the step. On GPU and TPU, float32 weights compute in
    float32 only under `jax_default_matmul_precision="highest"`.

    The cache may be of one group, which keeps every page, or of the groups of `layout`.

    With `axis`, `config` and the weights are one device's part inside a `shard_map` over that mesh
    axis (`parallel.py` makes them), and so are the logits if the vocabulary is split.

    Example:
      >>> step = jax.jit(make_model(config), donate_argnums=1)  # doctest: +SKIP
      >>> logits, cache = step(params, cache, tokens, batch)  # doctest: +SKIP
    """

    def model(
        params: Params, cache: KVCache, tokens: Int[Array, "B T"], batch: DecodeBatch
    ) -> tuple[Float[Array, "B *T V"], KVCache]:
        rows, columns = tokens.shape
        embed = params["embed"]
        x = _embed(embed, tokens.reshape(-1), axis if split_vocabulary else None)
        if config.embedding_scale != 1.0:
            x = x * jnp.asarray(config.embedding_scale, x.dtype)
        ropes = _ropes(config, params, batch.positions)
        for index, layer in enumerate(params["layers"]):
            rope = ropes[config.window(index) is not None]
            normed = _rms_norm(x, layer["attention_norm"], config.norm_eps)
            mixed, cache = _attention(config, layer, index, normed, rope, cache, batch)
            x = x + _end_norm(config, layer, "attention_end_norm", _total(mixed, axis))
            normed = _rms_norm(x, layer["inner_norm"], config.norm_eps)
            mixed = _feed_forward(config, layer, normed)
            x = x + _end_norm(config, layer, "inner_end_norm", _total(mixed, axis))
        x = x.reshape(rows, columns, -1)
        x = _rms_norm(x if every_token else x[:, -1], params["norm"], config.norm_eps)
        head = params.get("head", embed)
        return jnp.matmul(x, head, preferred_element_type=jnp.float32), cache

    return model


def _total(part: Float[Array, "M E"], axis: str | None) -> Float[Array, "M E"]:
    """The sum over the devices, the only talk of a block."""
    return part if axis is None else jax.lax.psum(part, axis)


def _embed(
    embed: Float[Array, "E V"], tokens: Int[Array, " M"], axis: str | None
) -> Float[Array, "M E"]:
    if axis is None:
        return jnp.take(embed, tokens, axis=1).T
    own = tokens - jax.lax.axis_index(axis) * embed.shape[1]
    here = (own >= 0) & (own < embed.shape[1])  # every token is on one device; the others add 0
    x = jnp.take(embed, jnp.where(here, own, 0), axis=1).T
    return jax.lax.psum(jnp.where(here[:, None], x, jnp.zeros_like(x)), axis)


def _attention(
    config: ModelConfig,
    layer: Params,
    index: int,
    x: Float[Array, "M E"],
    rope: tuple[Array, Array],
    cache: KVCache,
    batch: DecodeBatch,
) -> tuple[Float[Array, "M E"], KVCache]:
    rotated = config.num_heads + config.num_kv_heads
    heads = _linear(x, layer, "qkv").reshape(
        *batch.positions.shape, rotated + config.num_kv_heads, config.head_dim
    )
    turned = heads[:, :, :rotated]
    if "qk_norm" in layer:
        counts = np.array([config.num_heads, config.num_kv_heads])
        weight = jnp.repeat(layer["qk_norm"], counts, axis=0, total_repeat_length=rotated)
        turned = _rms_norm(turned, weight, config.norm_eps)
    q, k = jnp.split(_rotate(turned, *rope), [config.num_heads], axis=2)
    # A group with a window passes it itself; said here, a cache of one group sees the same.
    seen, cache = cache.append_and_attend(
        index,
        *(q, k, heads[:, :, rotated:], batch),
        sliding_window=config.window(index),
        scale=config.query_scale,
        sinks=layer.get("sinks"),
    )
    return _linear(seen.reshape(len(x), -1), layer, "out"), cache


def _feed_forward(config: ModelConfig, layer: Params, x: Float[Array, "M E"]) -> Array:
    if config.num_experts:
        return mix_experts(config, layer, x)
    return gated(config.gate, x @ layer["gate_up"]) @ layer["down"]


def _linear(x: Float[Array, "M in"], layer: Params, name: str) -> Float[Array, "M out"]:
    product = x @ layer[name]
    return product + layer[name + "_bias"] if name + "_bias" in layer else product


def _end_norm(config: ModelConfig, layer: Params, name: str, x: Array) -> Array:
    """The norm behind a block, in families that have one."""
    return _rms_norm(x, layer[name], config.norm_eps) if name in layer else x


def _rms_norm(x: Float[Array, "*M E"], weight: Float[Array, "*H E"], eps: float) -> Array:
    wide = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (wide * scale * weight.astype(jnp.float32)).astype(x.dtype)


def _ropes(
    config: ModelConfig, params: Params, positions: Int[Array, "B T"]
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    """Of layers that see all tokens, and of those with a window; each once a step."""
    magnitude = 1.0
    if config.yarn_positions is not None:  # YaRN sharpens attention over its longer context
        magnitude = 0.1 * math.log(config.rope_scale) + 1
    angles = _rope_angles(params["rope_frequencies"], positions, magnitude)
    if config.local_rope_theta is None:
        return angles, angles
    return angles, _rope_angles(params["local_rope_frequencies"], positions)


def _rope_angles(
    frequencies: Float[Array, " half"], positions: Int[Array, "B T"], magnitude: float = 1.0
) -> tuple[Array, Array]:
    """cos and sin `[B, T, 1, D/2]`, made once a step for all layers and heads."""
    angles = positions.astype(jnp.float32)[:, :, None, None] * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return (cos, sin) if magnitude == 1.0 else (cos * magnitude, sin * magnitude)


def _rotate(x: Float[Array, "B T H D"], cos: Array, sin: Array) -> Float[Array, "B T H D"]:
    """Rotate the pairs (i, i + D/2)."""
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], 2, -1)
    cos, sin = cos[..., None, :], jnp.stack([-sin, sin], axis=-2)
    return (pairs * cos + pairs[..., ::-1, :] * sin).reshape(x.shape).astype(x.dtype)
