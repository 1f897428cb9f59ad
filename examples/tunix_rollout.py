"""google-tunix's rollout interface over the engine, for its Llama 3, Qwen 3 and Gemma 3 models.

    cluster_config = ClusterConfig(..., rollout_engine=EngineRollout)  # or a partial of it

The modules of the model are called as they are, but for attention, whose keys and values go to
pages. The weights are the trainer's own arrays. Equal prompts of a call, such as the G of a group,
become the samples of one request, which share its pages.
"""

import sys
from collections import defaultdict
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tunix.generate.tokenizer_adapter import TokenizerAdapter
from tunix.rl import common, reshard, utils
from tunix.rl.rollout.base_rollout import BaseRollout, RolloutConfig, RolloutOutput

from paged_decode import (
    BlockAllocator,
    CacheLayout,
    Completion,
    Engine,
    EngineConfig,
    KVCache,
    PageSpec,
    SamplingParams,
)


def attention(module, x, positions, attend):
    """An attention module of any of the three; `attend(q, k, v, scale)` has the keys and values."""
    rope = sys.modules[type(module).__module__].apply_rope
    options = dict(head_dim=module.head_dim)
    if hasattr(module, "attn_vec_einsum"):  # Gemma 3
        whole = module.use_qkv_einsum
        q, k, v = module.qkv_einsum(x) if whole else (module.q_einsum(x), *module.kv_einsum(x))
        q, k = module._query_norm(q), module._key_norm(k)
        options |= dict(base_frequency=module.rope_base_frequency)
        options |= dict(scale_factor=module.rope_scale_factor)
        scale, out = module.query_pre_attn_scalar, module.attn_vec_einsum
    else:
        q, k, v = module.q_proj(x), module.k_proj(x), module.v_proj(x)
        if hasattr(module, "q_norm"):  # Qwen 3
            q, k = module.q_norm(q), module.k_norm(k)
        scale, out = module.scale, module.o_proj
    return out(attend(rope(q, positions, **options), rope(k, positions, **options), v, scale))


def block(layer, x, positions, attend):
    """A layer of any of the three."""
    if hasattr(layer, "pre_ffw_norm"):  # Gemma 3
        seen = attention(layer.attn, layer.pre_attention_norm(x), positions, attend)
        x = x + layer.post_attention_norm(seen)
        return x + layer.post_ffw_norm(layer.mlp(layer.pre_ffw_norm(x)))
    x = x + attention(layer.attn, layer.input_layernorm(x), positions, attend)
    return x + layer.mlp(layer.post_attention_layernorm(x))


def model_of(graph):
    """What the engine runs: a function of the weights, a state that `nnx.split` gave."""

    def model(weights, cache, tokens, batch):
        net = nnx.merge(graph, weights)
        x = net.embedder.encode(tokens)
        for number, layer in enumerate(net.layers):

            def attend(q, k, v, scale, number=number):
                nonlocal cache
                q, k, v = (each.astype(cache.k_pages[0].dtype) for each in (q, k, v))
                seen, cache = cache.append_and_attend(number, q, k, v, batch, scale=scale)
                return seen

            x = block(layer, x, batch.positions, attend)
        x = net.final_norm(x[:, -1:])
        logits = net.lm_head(x) if hasattr(net, "lm_head") else net.embedder.decode(x)
        return logits[:, -1], cache

    return model


def layout_of(net, rows, length, chunk, page_size, num_pages):
    """One group of layers that see all tokens, and for Gemma 3 one of those that see a window."""
    config, layers = net.config, range(len(net.layers))
    dtype = getattr(config, "dtype", net.embedder.input_embedding[...].dtype)
    local = [i for i in layers if "LOCAL" in str(getattr(net.layers[i].attn, "attn_type", ""))]
    sizes = config.num_kv_heads, config.head_dim
    full = tuple(i for i in layers if i not in local)
    pages = num_pages or 1 + rows * -(-length // page_size)
    groups = [PageSpec(full, *sizes, pages, jnp.dtype(dtype).name)]
    if local:
        window = config.sliding_window_size
        most = -(-(window + chunk - 2) // page_size) + 2
        own = 1 + rows * min(most, -(-length // page_size))
        groups.append(PageSpec(tuple(local), *sizes, own, jnp.dtype(dtype).name, window))
    return CacheLayout(page_size, tuple(groups))


class EngineRollout(BaseRollout):
    """Rollouts by a paged engine in the trainer's process.

    Args:
      rollout_actor: `Llama3`, `Qwen3` or `Gemma3` of tunix.
      tokenizer: as tunix takes it.
      mesh: where the model lies: one device, so far.
      rollout_config: of tunix, whose `kv_cache_size` is `max_tokens` if that is not given.
      max_rows: samples that are decoded at once; more wait.
      max_tokens: of a prompt and its completion.
      page_size: tokens of a page.
      num_pages: of the pool; None: enough for all rows at their longest.
      engine: further options of `Engine`, such as `tier`.

    Attributes:
      engine: for what tunix has no word for: `sleep`, `wake`, `gauges`, versions.
    """

    def __init__(
        self,
        rollout_actor: nnx.Module,
        tokenizer,
        mesh=None,
        rollout_config: RolloutConfig | None = None,
        *,
        max_rows: int = 64,
        max_tokens: int | None = None,
        page_size: int = 16,
        num_pages: int | None = None,
        prefill_chunk: int = 64,
        **engine,
    ):
        if mesh is not None and mesh.size > 1:
            raise NotImplementedError(f"rollouts on one device, got a mesh of {mesh.size}")
        max_tokens = max_tokens or (rollout_config or RolloutConfig()).kv_cache_size
        own = isinstance(tokenizer, TokenizerAdapter)
        self.tokenizer = tokenizer if own else TokenizerAdapter(tokenizer)
        self._actor, graph = rollout_actor, nnx.graphdef(rollout_actor)
        sizes = max_rows, max_tokens, prefill_chunk, page_size, num_pages
        layout = layout_of(rollout_actor, *sizes)
        config = EngineConfig(
            max_rows=max_rows,
            prefill_chunk=prefill_chunk,
            max_sequence_tokens=max_tokens,
        )
        pool = KVCache.create(layout=layout), BlockAllocator(layout)
        self.engine = Engine(model_of(graph), _state_of(self._actor), *pool, config, **engine)

    def generate(
        self, prompts: list[str], rollout_config: RolloutConfig, **_kwargs
    ) -> RolloutOutput:
        """Complete prompts; as in tunix, a stop token is not part of the tokens.

        Without top_p, or at temperature 0, tokens are greedy. Log-probabilities are those of the
        distribution that a token was drawn from; of greedy ones, the model's own. No `seed`: the
        engine draws one for each call.
        """
        self._follow()
        config = rollout_config
        tokens = [self._encode(prompt) for prompt in prompts]
        places = defaultdict(list)
        for place, prompt in enumerate(tokens):
            places[tuple(prompt)].append(place)
        greedy = config.top_p is None or not config.temperature
        stops, most = tuple(config.eos_tokens or [self.eos_id()]), config.max_tokens_to_generate
        params = SamplingParams(most, stop_tokens=stops, logprobs=0)
        if not greedy:
            kept = dict(top_p=config.top_p, top_k=max(config.top_k or 0, 0))
            params = replace(params, temperature=config.temperature, **kept)
        sizes = defaultdict(list)  # prompts by how often they are there
        for prompt, where in places.items():
            sizes[len(where)].append((prompt, where))
        rng, done = np.random.default_rng(_seed_of(config.seed)), dict[int, Completion]()
        for n, group in sizes.items():
            seeded = [replace(params, seed=int(rng.integers(2**32))) for _ in group]
            made = iter(self.engine.generate([prompt for prompt, _ in group], seeded, n=n))
            for place in (place for _, where in group for place in where):
                done[place] = next(made)
        out, logprobs = [], []
        for _, each in sorted(done.items()):
            count = len(each.tokens) - (each.finish_reason == "stop")
            out.append(np.array(each.tokens[:count], np.int32))
            numbers = each.logprobs if greedy else each.processed_logprobs
            logprobs.append(np.array(numbers[:count], np.float32))
        return RolloutOutput(
            text=[self.tokenizer.decode(each.tolist()) for each in out],
            logits=[],
            tokens=out,
            left_padded_prompt_tokens=self._padded(tokens, config.max_prompt_length),
            logprobs=logprobs if config.return_logprobs else None,
        )

    def get_per_token_logps(
        self, prompt_tokens: jax.Array, completion_tokens: jax.Array
    ) -> jax.Array:
        """Log-probabilities `[B, T]` of completions by tunix's own dense forward."""
        given = dict(prompt_tokens=prompt_tokens, completion_tokens=completion_tokens)
        own = dict(pad_id=self.pad_id(), eos_id=self.eos_id())
        return common.compute_per_token_logps(*nnx.split(self._actor), **given, **own)

    def update_params(self, params, filter_types=None) -> None:
        """Go on with these weights, or with these of all, such as LoRA's; none is copied that has
        the dtype and the place of those before."""
        if filter_types is not None:
            params = reshard.reshard_pytree(params, nnx.state(self._actor, filter_types))
        state = _state_of(self._actor)
        (new, _), (old, _) = map(utils.to_flat_dict, (params, state))
        if unknown := new.keys() - old.keys():
            raise ValueError(f"the model has no weights at {min(unknown)}")
        leaves = [new[path].astype(a.dtype) if path in new else a for path, a in old.items()]
        nnx.update(self._actor, jax.tree.unflatten(jax.tree.structure(state), leaves))
        self._follow()

    def _follow(self):
        """Take up the arrays that the actor has now: a trainer may share it, and tell nobody."""
        state = _state_of(self._actor)
        pairs = zip(*map(jax.tree.leaves, (state, self.engine.params)), strict=True)
        if any(a is not b for a, b in pairs):
            self.engine.update_params(state)

    def pad_id(self) -> int:
        return self.tokenizer.pad_id()

    def eos_id(self) -> int:
        return self.tokenizer.eos_id()

    def model(self) -> nnx.Module:
        return self._actor

    def _encode(self, text):
        """As tunix's own sampler does."""
        begin = [self.tokenizer.bos_id()] if self.tokenizer.bos_id() else []
        return self.tokenizer.dedup_bos_ids(begin + list(self.tokenizer.encode(text)))

    def _padded(self, prompts, length):
        longest = max(map(len, prompts))
        length = length if length and length >= longest else 1 << (longest - 1).bit_length()
        return np.array([[self.pad_id()] * (length - len(each)) + each for each in prompts])


def _state_of(module):
    """Its arrays of now; those of `nnx.state` change with the module."""
    return jax.tree.map(lambda array: array, nnx.state(module))


def _seed_of(seed):
    """Ints of what tunix takes for a seed; None stays."""
    return np.asarray(jax.random.key_data(seed)).tolist() if isinstance(seed, jax.Array) else seed
