"""Rollouts for google-tunix: on tiny models, what its own sampler gives."""

from __future__ import annotations

from functools import partial
from importlib import import_module

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("tunix", reason="google-tunix is not installed: pip install google-tunix")
pytestmark = pytest.mark.filterwarnings("ignore")  # of tunix and what it imports

SIZES = dict(num_heads=4, head_dim=16, num_kv_heads=2, embed_dim=64, hidden_dim=128)
PROMPTS = ["hello world", "abc", "a longer prompt than the others", "abc"]
VOCAB = 256


class Letters:
    """A tokenizer of characters."""

    def encode(self, text, **_):
        return [ord(c) % 250 + 3 for c in text]

    def decode(self, ids, **_):
        return "".join(chr(i % 90 + 33) for i in ids)

    def bos_id(self):
        return 1

    def eos_id(self):
        return 2

    def pad_id(self):
        return 0


def make(family: str, seed: int = 0):
    from flax import nnx

    own = dict(num_layers=2, vocab_size=VOCAB, rope_theta=10_000, norm_eps=1e-6)
    if family == "gemma3":  # five layers of six see a window, shorter than what is generated
        own = dict(num_layers=6, num_embed=VOCAB, sliding_window_size=9, param_dtype=jnp.float32)
    name = {"llama3": "Llama3", "qwen3": "Qwen3", "gemma3": "Gemma3"}[family]
    module = import_module(f"tunix.models.{family}.model")
    model = getattr(module, name)(module.ModelConfig(**SIZES | own), rngs=nnx.Rngs(seed))
    embedding = model.embedder.input_embedding
    embedding[...] = embedding[...].at[0].set(0)  # so that no padding is drawn, which tunix masks
    if hasattr(model, "lm_head"):
        model.lm_head.w[...] = model.lm_head.w[...].at[:, 0].set(0)
    return model


@pytest.fixture(autouse=True)
def of_its_own():
    """tunix does not promise strict promotion, in whatever thread of its own."""
    jax.config.update("jax_numpy_dtype_promotion", "standard")
    yield
    jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.mark.parametrize("family", ["llama3", "qwen3", "gemma3"])
def test_greedy_tokens_and_log_probabilities_are_those_of_tunixs_own_sampler(family):
    from flax import nnx
    from tunix.generate.sampler import CacheConfig
    from tunix.rl.rollout.base_rollout import RolloutConfig
    from tunix.rl.rollout.vanilla_rollout import VanillaRollout

    ours, model = import_module("tunix_rollout"), make(family)
    cache = CacheConfig(256, len(model.layers), SIZES["num_kv_heads"], SIZES["head_dim"])
    vanilla = VanillaRollout(model, Letters(), cache)
    rollout = ours.EngineRollout(
        model, Letters(), max_rows=4, max_tokens=128, page_size=4, prefill_chunk=16
    )
    config = RolloutConfig(24, temperature=0.0, top_p=None, return_logprobs=True)

    def compare() -> None:
        mine, theirs = (each.generate(PROMPTS, config) for each in (rollout, vanilla))
        assert [t.tolist() for t in mine.tokens] == [t.tolist() for t in theirs.tokens]
        assert mine.text == theirs.text and {len(t) for t in mine.tokens} != {0}
        assert mine.left_padded_prompt_tokens.tolist() == theirs.left_padded_prompt_tokens.tolist()
        assert mine.logprobs is not None and theirs.logprobs is not None
        for a, b in zip(mine.logprobs, theirs.logprobs, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-4)
        width = max(map(len, mine.tokens))
        padded = np.array([[*t.tolist(), *[0] * (width - len(t))] for t in mine.tokens])
        given = jnp.asarray(mine.left_padded_prompt_tokens), jnp.asarray(padded)
        both = [np.asarray(each.get_per_token_logps(*given)) for each in (rollout, vanilla)]
        np.testing.assert_allclose(*both, atol=1e-5)
        for row, numbers in zip(both[0], mine.logprobs, strict=True):
            np.testing.assert_allclose(row[: len(numbers)], numbers, atol=1e-4)

    compare()
    new = nnx.state(make(family, seed=1), nnx.Param)
    for each in (rollout, vanilla):
        each.update_params(new)
    compare()
    assert rollout.engine.version == 1 and type(rollout.model()) is type(model)
    assert (rollout.pad_id(), rollout.eos_id()) == (0, 2)


def test_grpo_of_tunix_learns_a_toy_reward_through_the_engine():
    """Actor and rollout share their module, and the trainer tells nobody of its steps."""
    import optax
    from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner
    from tunix.rl.rl_cluster import ClusterConfig, RLCluster, RLTrainingConfig, Role
    from tunix.rl.rollout.base_rollout import RolloutConfig

    rewards = []

    def reward(prompts, completions, **_):
        """Which part of a text is of odd letters."""
        each = [float(np.mean([ord(c) % 2 for c in text])) if text else 0.0 for text in completions]
        rewards.append(float(np.mean(each)))
        return each

    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
    adam = RLTrainingConfig(actor_optimizer=optax.adam(3e-3), eval_every_n_steps=100, max_steps=20)
    cluster = RLCluster(
        actor=make("qwen3"),
        tokenizer=Letters(),
        cluster_config=ClusterConfig(
            role_to_mesh=dict.fromkeys((Role.ACTOR, Role.REFERENCE, Role.ROLLOUT), mesh),
            rollout_engine=partial(
                import_module("tunix_rollout").EngineRollout, max_rows=32, page_size=4
            ),
            training_config=adam,
            rollout_config=RolloutConfig(
                8, temperature=1.0, max_prompt_length=8, kv_cache_size=64, seed=7
            ),
        ),
    )
    config = GRPOConfig(num_generations=8, num_iterations=1, beta=0.0)
    learner = GRPOLearner(rl_cluster=cluster, reward_fns=reward, algo_config=config)
    learner.train([{"prompts": np.array(["ab", "cd", "ef", "gh"])}] * 20)
    assert len(rewards) == 20 and cluster.rollout.engine.version == 19
    assert np.mean(rewards[:3]) < 0.6 and np.mean(rewards[-3:]) > 0.75


def test_groups_share_a_request_and_drawn_log_probabilities_are_the_trainers():
    from tunix.rl.rollout.base_rollout import RolloutConfig

    ours = import_module("tunix_rollout")
    rollout = ours.EngineRollout(make("qwen3"), Letters(), max_rows=8, max_tokens=64, page_size=4)
    config = RolloutConfig(16, temperature=1.0, top_p=1.0, return_logprobs=True)
    config.seed = jax.random.key(3)
    prompts = [prompt for prompt in PROMPTS[:2] for _ in range(4)]
    done = rollout.generate(prompts, config)
    assert rollout.engine.allocator.stats().copies > 0  # samples of one prompt
    assert len({tuple(t) for t in done.tokens}) > 4
    again = rollout.generate(prompts, config)
    assert [t.tolist() for t in again.tokens] == [t.tolist() for t in done.tokens]
    padded = np.array([[*t.tolist(), *[0] * (16 - len(t))] for t in done.tokens])
    given = jnp.asarray(done.left_padded_prompt_tokens), jnp.asarray(padded)
    own = np.asarray(rollout.get_per_token_logps(*given))
    assert done.logprobs is not None
    for row, numbers, tokens in zip(own, done.logprobs, done.tokens, strict=True):
        count = [*tokens.tolist(), 0].index(0)  # tunix masks a padding that is drawn
        np.testing.assert_allclose(row[:count], numbers[:count], atol=1e-4)
