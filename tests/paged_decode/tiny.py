"""A two-layer attention model small enough to check against a dense NumPy forward."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from paged_decode import BlockAllocator, CacheLayout, Engine, EngineConfig, KVCache
from paged_decode.engine.events import gather

VOCAB, WIDTH, HEADS, KV_HEADS, DIM, LAYERS, MAX_LEN = 61, 32, 4, 2, 8, 2, 256


def make_params(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) / np.sqrt(shape[-2])).astype(np.float32)

    layers = {
        f"{name}{layer}": normal(*shape)
        for layer in range(LAYERS)
        for name, shape in dict(
            q=(WIDTH, HEADS * DIM),
            k=(WIDTH, KV_HEADS * DIM),
            v=(WIDTH, KV_HEADS * DIM),
            o=(HEADS * DIM, WIDTH),
        ).items()
    }
    return {
        "embed": normal(VOCAB, WIDTH) * 6,
        "place": normal(MAX_LEN, WIDTH) * 8,
        "head": normal(WIDTH, VOCAB) * 3,
        **layers,
    }


PARAMS = make_params()


@jax.default_matmul_precision("highest")  # a GPU takes fewer bits of a float32 by default
def every_token(params, cache, tokens, batch):
    """Logits `[B, T, V]`, as an engine with a drafter wants them."""
    x = jnp.asarray(params["embed"])[tokens] + jnp.asarray(params["place"])[batch.positions]
    for layer in range(LAYERS):
        q, k, v = (
            (x @ params[f"{name}{layer}"]).reshape(*tokens.shape, heads, DIM)
            for name, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS))
        )
        cache = cache.append(layer, k, v, batch)
        seen = cache.attend(layer, q, batch)
        x = x + jnp.tanh(seen.reshape(*tokens.shape, -1) @ params[f"o{layer}"])
    return x @ params["head"], cache


def model(params, cache, tokens, batch):
    logits, cache = every_token(params, cache, tokens, batch)
    return logits[:, -1], cache


def dense_logits(tokens, params=PARAMS, windows=(None,) * LAYERS) -> np.ndarray:
    """Float64 logits after the last token, computed without any cache; a window for each layer."""
    p = {name: value.astype(np.float64) for name, value in params.items()}
    n = len(tokens)
    back = np.subtract.outer(np.arange(n), np.arange(n))
    x = p["embed"][tokens] + p["place"][:n]
    for layer, window in enumerate(windows):
        q = (x @ p[f"q{layer}"]).reshape(n, KV_HEADS, HEADS // KV_HEADS, DIM)
        k = (x @ p[f"k{layer}"]).reshape(n, KV_HEADS, DIM)
        v = (x @ p[f"v{layer}"]).reshape(n, KV_HEADS, DIM)
        scores = np.einsum("tkgd,skd->kgts", q, k) * DIM**-0.5
        scores = np.where((back >= 0) & (back < (window or n)), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        seen = np.einsum("kgts,skd->tkgd", weights, v).reshape(n, -1)
        x = x + np.tanh(seen @ p[f"o{layer}"])
    return x[-1] @ p["head"]


def dense_greedy(prompt, count: int, params=PARAMS, windows=(None,) * LAYERS) -> tuple[int, ...]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(np.argmax(dense_logits(tokens, params, windows))))
    return tuple(tokens[len(prompt) :])


class Wrapped:
    """A part of an engine, some of whose methods are others."""

    def __init__(self, part, **methods):
        self._part = part
        for name, method in methods.items():
            setattr(self, name, method)

    def __getattr__(self, name):
        return getattr(self._part, name)


def fail_decode(engine, at: set[int], error: BaseException, *, deleting: bool = False) -> None:
    """Let the launches of decode programs with these numbers raise, with the cache or without."""
    runner, calls = engine.loop.runner, itertools.count()

    def decode(plan):
        if next(calls) in at:
            if deleting:
                for array in (*engine.cache.k_pages, *engine.cache.v_pages):
                    array.delete()
            raise error
        return runner.decode(plan)

    engine.loop.runner = Wrapped(runner, decode=decode)


def preempt(engine, at: int = -1) -> None:
    """Let a running sample lose its pages."""
    engine.loop.collect()
    if running := engine.scheduler.running:
        engine.loop.change(lambda: engine.scheduler.preempt(running[at]))


def prompts(count: int, seed: int = 1, low: int = 1, high: int = 30) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCAB, rng.integers(low, high + 1)).tolist() for _ in range(count)]


def texts(events) -> dict[tuple[int, int], tuple[int, ...]]:
    """The tokens of every sample; all must have ended."""
    return {(c.request_id, c.sample): c.tokens for c in gather(events)}


def make_engine(
    num_pages: int = 64,
    page_size: int = 4,
    *,
    prefix_cache: bool = True,
    fn=model,
    policies: dict | None = None,
    allocator: BlockAllocator | None = None,
    layout: CacheLayout | None = None,
    stacked: bool = False,
    **config,
) -> Engine:
    shapes = (
        dict(max_rows=4, row_buckets=(4,), prefill_chunk=8, prefill_rows=2, decode_steps=4) | config
    )
    layout = layout or CacheLayout.uniform(
        num_layers=LAYERS,
        num_pages=num_pages,
        num_kv_heads=KV_HEADS,
        page_size=page_size,
        head_dim=DIM,
    )
    cache = KVCache.create(layout=layout, stacked=stacked)
    if allocator is None:
        allocator = BlockAllocator(layout, prefix_cache=prefix_cache, hash_key=b"test")
    shapes.setdefault(
        "max_sequence_tokens", min(MAX_LEN, allocator.usable_pages * layout.page_size)
    )
    own = dict(clock=lambda: 0.0) | (policies or {})  # so that equal lives have equal events
    return Engine(fn, PARAMS, cache, allocator, EngineConfig(**shapes), **own)
