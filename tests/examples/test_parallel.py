"""The Llama over several devices says what it says on one."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from smol import llama, parallel

from paged_decode import KVCache

from .test_generate import GOLDEN, run
from .test_llama import PAGE, PROMPTS, Paged
from .tiny_gguf import llama_metadata, llama_weights, write_llama


def split_paged(path, devices: int, capacity: int = 20) -> Paged:
    paged = Paged(path, PROMPTS, capacity=capacity)
    config, params = llama.load(path, "float32")
    mesh = parallel.make_mesh(devices)
    paged.model = jax.jit(parallel.make_parallel_model(config, params, mesh), donate_argnums=1)
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


@pytest.mark.parametrize("tied", [True, False])
def test_logits_on_several_devices_equal_those_of_one(tmp_path, tied):
    path = write_llama(tmp_path / "m.gguf", llama_weights(tied=tied))
    config, _ = llama.load(path)
    assert (config.num_heads, config.num_kv_heads) == SIZES
    one = Paged(path, PROMPTS, capacity=20).prefill(PROMPTS, 4)
    for devices in COUNTS:
        many = split_paged(path, devices).prefill(PROMPTS, 4)
        np.testing.assert_allclose(many, one, rtol=0, atol=2e-5)


def test_a_step_sums_once_a_block_and_gathers_nothing(tmp_path):
    paged = split_paged(write_llama(tmp_path / "m.gguf", llama_weights()), COUNTS[0])
    rows = np.zeros((3, 1), np.int32)
    batch = llama.DecodeBatch(paged.table, paged.lengths, rows, rows)
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


@pytest.mark.slow
def test_the_real_model_on_three_devices_says_the_golden_words(real_gguf, tmp_path):
    case = min(GOLDEN, key=lambda c: len(c["prompt_ids"]))
    (tmp_path / "in.json").write_text(json.dumps([case]))
    out = tmp_path / "out.json"
    files = ("--gguf", real_gguf, "--ids-file", tmp_path / "in.json", "--json", out)
    done = run(*files, "--max-new", 64, "--devices", 3)
    assert done.returncode == 0, done.stderr
    assert json.loads(out.read_text())[0]["greedy_ids"] == case["greedy_ids"]
