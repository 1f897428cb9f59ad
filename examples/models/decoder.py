"""A decoder in JAX that keeps its keys and values in a paged cache, for all families.

Everything the cache needs from a model is one call in `_attention`, which writes this step's K and
V and attends through `batch`. The rest is an ordinary decoder, in which the weights of a layer say
what it has: norms behind its blocks or over its heads, biases, sinks, experts.

Axes: B rows, T tokens per row, M = B * T, E model width, V vocabulary, Hq and Hk query and KV
heads, D head dim, I inner width, X experts, K of them for a token.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from paged_decode import (
    DecodeBatch,
    DeviceSum,
    KVCache,
    add_and_norm,
    group_rows,
    grouped_matmul,
)

from .checkpoint import Params, load
from .config import ModelConfig, Rope, layout, rope_frequencies
from .parallel import AXIS, local_config, mapped

__all__ = ["ModelConfig", "Rope", "layout", "load", "make_model", "rope_frequencies"]

_ALPHA, _LIMIT = 1.702, 7.0  # of gpt-oss's gate
_TWO_ROWS = 10_000_000  # numbers of a matrix; one row times a smaller one is not a product to XLA
Model = Callable[[Params, KVCache, Array, DecodeBatch], tuple[Array, KVCache]]


def make_model(
    config: ModelConfig,
    *,
    every_token: bool = False,
    mesh: Mesh | None = None,
    sums: DeviceSum | None = None,
) -> Model:
    """Return `model(params, cache, tokens, batch) -> (logits, cache)` for these sizes.

    tokens is int32 `[B, T]`, right-aligned as `batch` says; logits are float32 `[B, V]` of each
    row's last token, or with `every_token` `[B, T, V]`, as a check of drafts needs them. Compute
    follows the dtype of the weights, with norms, rotary angles and logits in float32. The cache
    should be donated by whoever compiles the step. On GPU and TPU, float32 weights compute in
    float32 only under `jax_default_matmul_precision="highest"`.

    The cache may be of one group, which keeps every page, or of the groups of `layout`.

    With `mesh`, the weights lie on its devices, as `load` with that mesh puts them or
    `parallel.split_params`, and so does the cache. `sums` over its axis `AXIS` takes the place of
    `psum` and of what follows it.
    """
    devices, axis = (1, None) if mesh is None else (mesh.shape[AXIS], AXIS)
    whole, config = config, local_config(config, devices)
    split_vocabulary = axis is not None and config.vocab_size % devices == 0

    def total(part: Float[Array, "M E"]) -> Float[Array, "M E"]:  # the only talk of a block
        if sums is not None:
            return sums(part)
        return part if axis is None else jax.lax.psum(part, axis)

    def embedded(embed: Float[Array, "E V"], tokens: Int[Array, " M"]) -> Float[Array, "M E"]:
        if not split_vocabulary:
            return jnp.take(embed, tokens, axis=1).T
        own = tokens - jax.lax.axis_index(AXIS) * embed.shape[1]
        here = (own >= 0) & (own < embed.shape[1])  # every token is on one device; others add 0
        x = jnp.take(embed, jnp.where(here, own, 0), axis=1).T
        return total(jnp.where(here[:, None], x, jnp.zeros_like(x)))

    def added(x: Array, part: Array, end: Array | None, following: Array) -> tuple[Array, Array]:
        """x and what a block made, under a norm of its own if the family has one; and the norm."""
        if sums is not None and end is None:
            return sums.add_and_norm(part, x, following, config.norm_eps)
        part = _rms_norm(total(part), end, config.norm_eps)
        return add_and_norm(x, part, following, config.norm_eps)

    def model(
        params: Params, cache: KVCache, tokens: Int[Array, "B T"], batch: DecodeBatch
    ) -> tuple[Float[Array, "B *T V"], KVCache]:
        rows, columns = tokens.shape
        embed, layers = params["embed"], params["layers"]
        x = embedded(embed, tokens.reshape(-1))
        if config.embedding_scale != 1.0:
            x = x * jnp.asarray(config.embedding_scale, x.dtype)
        ropes = _ropes(config, batch.positions)
        norms = [layer["attention_norm"] for layer in layers[1:]] + [params["norm"]]
        normed = _rms_norm(x, layers[0]["attention_norm"], config.norm_eps)
        for index, (layer, following) in enumerate(zip(layers, norms, strict=True)):
            unturned = index in config.unturned_layers
            rope = None if unturned else ropes[config.window(index) is not None]
            mixed, cache = _attention(config, layer, index, normed, rope, cache, batch)
            x, normed = added(x, mixed, layer.get("attention_end_norm"), layer["inner_norm"])
            block = _mix_experts if "router" in layer else _feed_forward
            mixed = block(config, layer, normed)
            x, normed = added(x, mixed, layer.get("inner_end_norm"), following)
        x = normed.reshape(rows, columns, -1)[:, slice(None) if every_token else -1]
        logits = jnp.matmul(x, params.get("head", embed), preferred_element_type=jnp.float32)
        if config.logit_cap is not None:
            logits = config.logit_cap * jnp.tanh(logits / config.logit_cap)
        return logits, cache

    return model if mesh is None else mapped(model, whole, mesh, every_token)


def _attention(
    config: ModelConfig,
    layer: Params,
    index: int,
    x: Float[Array, "M E"],
    rope: tuple[Array, Array] | None,
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
    if rope is not None:
        turned = _rotate(turned, *rope)
    q, k = jnp.split(turned, [config.num_heads], axis=2)
    # A group with a window passes it itself; said here, a cache of one group sees the same.
    seen, cache = cache.append_and_attend(
        index,
        *(q, k, heads[:, :, rotated:], batch),
        sliding_window=config.window(index),
        scale=config.query_scale,
        soft_cap=config.attention_cap,
        sinks=layer.get("sinks"),
    )
    return _linear(seen.reshape(len(x), -1), layer, "out"), cache


def _feed_forward(config: ModelConfig, layer: Params, x: Array, *how: Callable) -> Array:
    """Dense, or with experts, where `how` says which of them a row of x asks; see `_linear`."""
    inner = _gated(config.gate, _linear(x, layer, "gate_up", *how))
    return _linear(inner, layer, "down", *how)


def _gated(kind: str, gate_up: Float[Array, "M 2I"]) -> Float[Array, "M I"]:
    """What a feed-forward block passes on: its gate, bent, times what lies beside it."""
    gate, up = jnp.split(gate_up, 2, axis=-1)
    if kind == "silu":
        return jax.nn.silu(gate) * up
    if kind == "gelu":
        return jax.nn.gelu(gate, approximate=True) * up
    gate, up = jnp.minimum(gate, _LIMIT), jnp.clip(up, -_LIMIT, _LIMIT)
    return gate * jax.nn.sigmoid(_ALPHA * gate) * (up + 1)


def _mix_experts(config: ModelConfig, layer: Params, x: Float[Array, "M E"]) -> Array:
    """The K experts with the best scores for each token, weighted by a softmax."""
    scores = _linear(x, layer, "router")
    best, chosen = jax.lax.top_k(scores, config.experts_per_token)
    expert = chosen.reshape(-1)
    rows = group_rows(expert, config.num_experts)
    product = partial(grouped_matmul, rows=rows)
    out = _feed_forward(config, layer, x, product, lambda bias: bias[expert])
    out = out.reshape(*chosen.shape, -1)
    best, scores = best.astype(jnp.float32), scores.astype(jnp.float32)
    over = best if config.weigh_chosen else scores
    weight = jnp.exp(best - jax.nn.logsumexp(over, axis=-1, keepdims=True)).astype(x.dtype)
    return jnp.einsum("mk,mke->me", weight, out)


def _linear(
    x: Float[Array, "*M in"],
    layer: Params,
    name: str,
    product: Callable[[Array, Array], Array] | None = None,
    own: Callable[[Array], Array] = lambda bias: bias,
) -> Float[Array, "*M out"]:
    """A product with weights, and their bias if there is one; of experts, those of each row."""
    out = (product or _product)(x, layer[name])
    return out + own(layer[name + "_bias"]) if name + "_bias" in layer else out


def _product(x: Float[Array, "M in"], matrix: Float[Array, "in out"]) -> Float[Array, "M out"]:
    if len(x) > 1 or matrix.size >= _TWO_ROWS:
        return x @ matrix
    # XLA for GPUs makes two slow kernels of one row and so small a matrix. Two rows are a product.
    two = jnp.broadcast_to(x, (2, x.shape[1]))
    return jax.lax.platform_dependent(
        two, matrix, cuda=lambda x, m: (x @ m)[:1], default=lambda x, m: x[:1] @ m
    )


def _rms_norm(x: Float[Array, "*M E"], weight: Float[Array, "*H E"] | None, eps: float) -> Array:
    if weight is None:  # of a family that has no such norm
        return x
    wide = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (wide * scale * weight.astype(jnp.float32)).astype(x.dtype)


def _ropes(
    config: ModelConfig, positions: Int[Array, "B T"]
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    """cos and sin `[B, T, 1, R/2]`, made once a step for all heads of all layers: of layers that
    see all tokens, and of those with a window."""

    def turns(rope: Rope) -> tuple[Array, Array]:
        frequencies = rope_frequencies(rope, config.rotary_dim or config.head_dim)
        angles = positions[:, :, None, None].astype(jnp.float32) * frequencies
        return jnp.cos(angles) * rope.magnitude, jnp.sin(angles) * rope.magnitude

    whole = turns(config.rope)
    return whole, turns(config.local_rope) if config.local_rope else whole


def _rotate(x: Float[Array, "B T H D"], cos: Array, sin: Array) -> Float[Array, "B T H D"]:
    """Rotate the pairs (i, i + R/2) of the first R numbers of a head."""
    turned, rest = jnp.split(x, [2 * cos.shape[-1]], axis=-1)
    pairs = turned.astype(jnp.float32).reshape(*x.shape[:-1], 2, -1)
    cos, sin = cos[..., None, :], jnp.stack([-sin, sin], axis=-2)
    turned = (pairs * cos + pairs[..., ::-1, :] * sin).reshape(turned.shape).astype(x.dtype)
    return jnp.concatenate([turned, rest], axis=-1) if rest.shape[-1] else turned
