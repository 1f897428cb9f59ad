"""The Llama over several devices says what it says on one."""

import json
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import decoder, parallel

from paged_decode import BlockAllocator, DecodeBatch, KVCache, ShardedAllocator

from .test_decoder import PAGE, PROMPTS, Paged
from .test_generate import GOLDEN, run
from .tiny_gguf import llama_weights, write_llama
from .tiny_models import gemma_weights, write_gemma


def split_paged(path, devices: int, capacity: int = 20) -> Paged:
    paged = Paged(path, PROMPTS, capacity=capacity)
    config, params = decoder.load(path, "float32")
    mesh = parallel.make_mesh(devices)
    paged.model = jax.jit(decoder.make_model(config, mesh=mesh), donate_argnums=1)
    paged.params = parallel.split_params(config, params, mesh)
    paged.cache = KVCache.create(
        num_layers=config.num_layers,
        num_pages=paged.cache.num_pages,
        num_kv_heads=config.num_kv_heads,
        page_size=PAGE,
        head_dim=config.head_dim,
        mesh=mesh,
        head_axis=parallel.AXIS,
    )
    return paged


SMALL = decoder.ModelConfig(
    vocab_size=32,
    num_layers=2,
    width=24,
    inner_width=32,
    num_heads=8,
    num_kv_heads=2,
    head_dim=4,
    max_positions=64,
)


def random_params(config: decoder.ModelConfig, tied: bool) -> dict:
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape) / np.sqrt(shape[0]), jnp.float32)

    wide = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    layer = lambda: dict(  # noqa: E731
        attention_norm=1 + normal(config.width) / 8,
        inner_norm=1 + normal(config.width) / 8,
        qkv=normal(config.width, wide),
        out=normal(config.num_heads * config.head_dim, config.width),
        gate_up=normal(config.width, 2 * config.inner_width),
        down=normal(config.inner_width, config.width),
    )
    embed, head = (normal(config.width, config.vocab_size) for _ in range(2))
    params = dict(embed=embed, norm=1 + normal(config.width) / 8)
    params |= dict(layers=[layer() for _ in range(config.num_layers)])
    return params if tied else params | dict(head=head)


def first_logits(model, params, config, **where) -> np.ndarray:
    cache = KVCache.create(
        num_layers=config.num_layers,
        num_pages=9,
        num_kv_heads=config.num_kv_heads,
        page_size=4,
        head_dim=config.head_dim,
        **where,
    )
    allocator = BlockAllocator(9, 4)
    rows = [allocator.allocate([1] * n) for n in (5, 3)]
    batch = allocator.batch(rows, [0, 0], [5, 3], tokens_per_row=5)
    tokens = np.random.default_rng(1).integers(0, 32, (2, 5)).astype(np.int32) % config.vocab_size
    return np.asarray(jax.jit(model, donate_argnums=1)(params, cache, tokens, batch)[0])


@pytest.mark.parametrize(
    "devices, tied, vocab",  # 33 cannot be split, and every device has all of it
    [
        *((2, False, 33), (4, True, 32), (8, False, 33)),
        *(
            pytest.param(*each, marks=pytest.mark.long)
            for each in (
                (1, True, 32),
                (1, True, 33),
                (2, False, 32),
                (4, True, 33),
                (8, False, 32),
            )
        ),
    ],
)
def test_logits_on_several_devices_equal_those_of_one(devices, tied, vocab):
    """From 4 devices on there are several copies of every KV head."""
    config = replace(SMALL, vocab_size=vocab)
    params = random_params(config, tied)
    want = first_logits(decoder.make_model(config), params, config)
    mesh = parallel.make_mesh(devices)
    got = first_logits(
        decoder.make_model(config, mesh=mesh),
        parallel.split_params(config, params, mesh),
        config,
        mesh=mesh,
        head_axis=parallel.AXIS,
    )
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


def test_rows_over_a_data_axis_give_the_same_logits():
    params = random_params(SMALL, tied=True)
    want = first_logits(decoder.make_model(SMALL), params, SMALL)
    mesh = parallel.make_mesh(2, data=2)
    cache = KVCache.create(
        num_layers=2,
        num_pages=8,
        num_kv_heads=2,
        page_size=4,
        head_dim=4,
        mesh=mesh,
        head_axis=parallel.AXIS,
        data_axis=parallel.DATA,
    )
    allocator = ShardedAllocator(8, 4, num_shards=2)
    rows = [allocator.allocate([1] * n) for n in (5, 3)]
    batch = allocator.batch(rows, [0, 0], [5, 3], tokens_per_row=5)
    batch, spread = cache.split(batch, (1,))
    tokens = spread.put(np.random.default_rng(1).integers(0, 32, (2, 5)).astype(np.int32))
    model = jax.jit(decoder.make_model(SMALL, mesh=mesh), donate_argnums=1)
    got, _ = model(parallel.split_params(SMALL, params, mesh), cache, tokens, batch)
    np.testing.assert_allclose(spread.take(got), want, rtol=0, atol=1e-5)


def test_a_model_from_a_file_decodes_alike_on_two_devices(tmp_path):
    path = write_llama(tmp_path / "m.gguf", llama_weights())
    one, two = Paged(path, PROMPTS, capacity=20), split_paged(path, 2)
    logits = [paged.prefill(PROMPTS, 4) for paged in (one, two)]
    for _ in range(4):
        np.testing.assert_allclose(*logits, rtol=0, atol=2e-5)
        chunks = [[int(t)] for t in logits[0].argmax(-1)]
        logits = [paged.feed(chunks, 1) for paged in (one, two)]


def test_a_gemma_has_its_norms_on_every_device(tmp_path):
    config, params = decoder.load(write_gemma(tmp_path / "m.gguf", gemma_weights()))
    want = first_logits(decoder.make_model(config), params, config)
    mesh = parallel.make_mesh(4)  # two copies of each KV head
    got = first_logits(
        decoder.make_model(config, mesh=mesh),
        parallel.split_params(config, params, mesh),
        config,
        mesh=mesh,
        head_axis=parallel.AXIS,
    )
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


def test_a_step_sums_once_a_block_and_gathers_nothing(tmp_path):
    paged = split_paged(write_llama(tmp_path / "m.gguf", llama_weights()), 2)
    rows = np.zeros((3, 1), np.int32)
    batch = DecodeBatch.of(paged.table, paged.lengths, rows, rows)
    program = paged.model.lower(paged.params, paged.cache, rows, batch).compile().as_text()
    layers = len(paged.params["layers"])
    assert len(re.findall(r" all-reduce(?:-start)?\(", program)) <= 2 * layers + 1
    assert not re.findall("all-gather|all-to-all|collective-permute", program)


def test_numbers_that_do_not_divide_and_missing_devices_are_named(tmp_path):
    path = write_llama(tmp_path / "m.gguf", llama_weights())
    with pytest.raises(ValueError, match="over 5 devices"):
        split_paged(path, 5)
    with pytest.raises(ValueError, match="99 devices .* JAX sees"):
        parallel.make_mesh(99)


@pytest.mark.long
def test_the_real_model_on_three_devices_says_the_golden_words(real_gguf, tmp_path):
    case = min(GOLDEN, key=lambda c: len(c["prompt_ids"]))
    (tmp_path / "in.json").write_text(json.dumps([case]))
    out = tmp_path / "out.json"
    files = ("--model", real_gguf, "--ids-file", tmp_path / "in.json", "--json", out)
    done = run(*files, "--max-new", 64, "--devices", 3)
    assert done.returncode == 0, done.stderr
    assert json.loads(out.read_text())[0]["greedy_ids"] == case["greedy_ids"]
