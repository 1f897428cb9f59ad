"""Reinforcement learning in plain JAX: rollouts by the engine, GRPO-like updates, one process.

A tiny transformer learns to count: a token is rewarded if it is the one before plus one. Each turn
the engine draws G samples of some prompts, the rewards of a group are normalised to advantages, a
train step changes the weights, and the engine goes on with them.

    python examples/rl_loop.py
"""

import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from paged_decode import BlockAllocator, Engine, EngineConfig, KVCache, SamplingParams

VOCAB, WIDTH, HEADS, DIM, LAYERS = 6, 32, 2, 16, 2
PROMPT, NEW, PROMPTS, GROUP = 4, 8, 8, 8  # tokens, tokens, prompts a turn, samples of each
RATE, CLIP = 8e-3, 0.2


def init(seed):
    keys = iter(jax.random.split(jax.random.key(seed), 3 + 6 * LAYERS))

    def normal(*shape):
        return jax.random.normal(next(keys), shape) / shape[0] ** 0.5

    sizes = {name: (WIDTH, HEADS * DIM) for name in "qkv"}
    sizes |= {"o": (HEADS * DIM, WIDTH), "up": (WIDTH, 4 * WIDTH), "down": (4 * WIDTH, WIDTH)}
    layers = [{name: normal(*size) for name, size in sizes.items()} for _ in range(LAYERS)]
    outer = dict(embed=normal(VOCAB, WIDTH), place=normal(PROMPT + NEW, WIDTH))
    head = normal(WIDTH, VOCAB) / 10  # every token is likely at first, so that much is tried
    return outer | dict(head=head, layers=layers)


def norm(x):
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)


def forward(params, tokens, positions, attend):
    """Logits `[B, T, V]`: one function for rollouts and training, which differ in `attend`."""
    x = params["embed"][tokens] + params["place"][positions]
    for layer, weights in enumerate(params["layers"]):
        q, k, v = ((norm(x) @ weights[n]).reshape(*tokens.shape, HEADS, DIM) for n in "qkv")
        x = x + attend(layer, q, k, v).reshape(*tokens.shape, -1) @ weights["o"]
        x = x + jax.nn.relu(norm(x) @ weights["up"]) @ weights["down"]
    return norm(x) @ params["head"]


def policy(params, cache, tokens, batch):
    """The same for the engine: keys and values are in its pages."""

    def attend(layer, q, k, v):
        nonlocal cache
        seen, cache = cache.append_and_attend(layer, q, k, v, batch)
        return seen

    logits = forward(params, tokens, batch.positions, attend)
    return logits[:, -1], cache


@jax.jit
def logprobs_of(params, tokens):
    """How likely the tokens behind the prompts are: `[N, PROMPT + NEW] -> [N, NEW]`."""

    def attend(layer, q, k, v):
        return jax.nn.dot_product_attention(q, k, v, is_causal=True)

    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    logits = forward(params, tokens, positions, attend)[:, PROMPT - 1 : -1]
    own = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, PROMPT:, None], -1)
    return own[..., 0]


@partial(jax.jit, donate_argnums=1)  # not the weights: the engine has them until the update
def train(params, adam, tokens, drawn, advantages):
    """One step of Adam on the clipped objective; `drawn` are the log-probabilities of rollouts."""

    def loss(params):
        ratio = jnp.exp(logprobs_of(params, tokens) - drawn)
        clipped = jnp.clip(ratio, 1 - CLIP, 1 + CLIP)
        return -jnp.minimum(ratio * advantages, clipped * advantages).mean()

    grads, (count, first, second) = jax.grad(loss)(params), adam
    count = count + 1
    first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, first, grads)
    second = jax.tree.map(lambda v, g: 0.99 * v + 0.01 * g * g, second, grads)
    scale = RATE * jnp.sqrt(1 - 0.99**count) / (1 - 0.9**count)
    new = jax.tree.map(lambda p, m, v: p - scale * m / (jnp.sqrt(v) + 1e-8), params, first, second)
    return new, (count, first, second)


def reward(tokens):
    """Which part of the new tokens is the one before plus one: `[N, PROMPT + NEW] -> [N]`."""
    return (tokens[:, PROMPT:] == (tokens[:, PROMPT - 1 : -1] + 1) % VOCAB).mean(1)


def make_engine(params):
    rows, pages = PROMPTS * GROUP, 1 + PROMPTS * GROUP * (PROMPT + NEW) // 4
    config = EngineConfig(
        max_rows=rows, row_buckets=(rows,), decode_steps=NEW, prefill_chunk=PROMPT, prefill_rows=8
    )
    cache = KVCache.create(
        num_layers=LAYERS, num_pages=pages, num_kv_heads=HEADS, page_size=4, head_dim=DIM
    )
    return Engine(policy, params, cache, BlockAllocator(pages, 4), config)


def learn(turns, seed=0, tell=print):
    """The mean reward of every turn, and how far the engine's and the trainer's numbers differ."""
    params, rng = init(seed), np.random.default_rng(seed)
    zeros = jax.tree.map(jnp.zeros_like, params)
    adam, engine = (jnp.zeros(()), zeros, jax.tree.map(jnp.zeros_like, params)), make_engine(params)
    rewards, furthest = [], 0.0
    for turn in range(turns):
        prompts = rng.integers(0, VOCAB, (PROMPTS, PROMPT)).tolist()
        seeds = ((turn * PROMPTS + at) * GROUP for at in range(PROMPTS))
        sampling = [SamplingParams(NEW, temperature=1.0, seed=s, logprobs=0) for s in seeds]
        done = engine.generate(prompts, sampling, n=GROUP)
        assert all(set(each.versions) == {engine.version} for each in done)  # on-policy
        engine.sleep()  # the train step may have the memory of the pages
        tokens = np.array([prompts[i // GROUP] + list(c.tokens) for i, c in enumerate(done)])
        drawn = np.array([each.logprobs for each in done], np.float32)
        own = np.asarray(logprobs_of(params, tokens))
        furthest = max(furthest, float(np.abs(own - drawn).max()))
        groups = reward(tokens).reshape(PROMPTS, GROUP)
        centred = groups - groups.mean(1, keepdims=True)
        advantages = (centred / (groups.std(1, keepdims=True) + 1e-4)).reshape(-1, 1)
        params, adam = train(params, adam, tokens, drawn, advantages.astype(np.float32))
        engine.update_params(params)
        engine.wake()
        rewards.append(float(groups.mean()))
        if turn % 10 == 0 or turn == turns - 1:
            tell(
                f"turn {turn:2}: reward {rewards[-1]:.2f}, log-probabilities within {furthest:.0e}"
            )
    return rewards, furthest


if __name__ == "__main__":
    begun = time.perf_counter()
    learn(48)
    print(f"{time.perf_counter() - begun:.1f} s")
