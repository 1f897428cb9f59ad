"""The numbered examples: each runs, says what it should, and copies no pool."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import io
import re
import sys
import textwrap
from importlib import import_module
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from paged_decode import Engine, EngineConfig, SamplingParams, load_snapshot, save_snapshot
from paged_decode.kernels import copy_pages

ROOT = Path(__file__).parents[2]
NAMES = sorted(path.stem for path in ROOT.glob("examples/[0-9]*.py"))
loop = import_module("01_custom_loop")


@functools.cache
def said(name: str) -> list[str]:
    """The lines that an example prints; 02 runs itself as a script, too."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(sys, "argv", [name])
        try:
            if inspect.iscoroutine(running := import_module(name).main()):
                asyncio.run(running)
        except SystemExit as end:
            assert not end.code, end.code
    return printed.getvalue().splitlines()


@pytest.mark.parametrize("name", NAMES)
def test_an_example_is_short_and_runs(name):
    assert len((ROOT / "examples" / f"{name}.py").read_text().splitlines()) < 60
    assert said(name)


def test_the_second_use_of_a_prompt_finds_its_full_pages_and_gets_the_same_tokens():
    lines = [line.split(" tokens were cached: ") for line in said("01_custom_loop")]
    assert [int(found) for found, _ in lines] == [0, 0, 0, 4, 0, 8]
    assert [text for _, text in lines[:3]] == [text for _, text in lines[3:]]


@pytest.mark.parametrize("name", ["03_steps_in_one_scan", "05_flax_nnx", "06_equinox", "08_drafts"])
def test_other_ways_to_the_same_loop_get_the_same_tokens(name):
    tokens = [line.split(": ")[1] for line in said("01_custom_loop")[:3]]
    got = [line.split(": ")[-1] for line in said(name)[:3]]
    assert len(set(tokens)) == 3
    assert [text[: len(want)] for text, want in zip(got, tokens, strict=True)] == tokens


def test_drafts_save_steps():
    steps = [re.match(r"31 tokens in (\d+) steps", line) for line in said("08_drafts")]
    assert all(8 <= int(number[1]) < 31 for number in steps)


def test_a_window_keeps_few_pages_whatever_the_length():
    assert said("10_layers_that_differ")[1:] == [
        "layers (1,), window None: 13 pages",
        "layers (0, 2), window 6: 3 pages",
    ]


# ---- in place


@pytest.fixture
def large():
    """Weights, a cache of 2 MiB and a batch of one row."""
    params, _, _ = loop.make()
    allocator = loop.BlockAllocator(4096, loop.PAGE)
    sizes = dict(num_layers=1, num_pages=4096, page_size=loop.PAGE)
    cache = loop.KVCache.create(**sizes, num_kv_heads=loop.KV_HEADS, head_dim=loop.DIM)
    return params, cache, allocator.batch([allocator.allocate([1])], 0, 1, columns=1)


def assert_in_place(program, pool_bytes: int) -> None:
    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes >= pool_bytes
    assert memory.temp_size_in_bytes < pool_bytes / 20


def test_nnx_jit_writes_into_the_pages_of_a_model(large):
    nnx_loop, (params, cache, batch) = import_module("05_flax_nnx"), large
    model = nnx_loop.Toy(params, cache)
    assert_in_place(nnx_loop.step.lower(model, batch).compile(), cache.nbytes)


def test_of_a_split_nnx_model_the_pages_alone_can_be_given_away(large):
    nnx_loop, (params, cache, batch) = import_module("05_flax_nnx"), large
    graph, pages, rest = nnx.split(nnx_loop.Toy(params, cache), nnx_loop.Pages, ...)

    def step(pages, rest, batch):
        model = nnx.merge(graph, pages, rest)
        return jnp.argmax(model(batch), axis=-1), nnx.state(model, nnx_loop.Pages)

    jitted = jax.jit(step, donate_argnums=0)
    assert_in_place(jitted.lower(pages, rest, batch).compile(), cache.nbytes)
    chosen, pages = jitted(pages, rest, batch)
    assert cache.is_deleted and not params["q"].is_deleted()
    assert chosen.shape == (1,) and len(jax.tree.leaves(pages)) == 2


@pytest.mark.filterwarnings("ignore:Some donated buffers")  # of the batch; a call says nothing
def test_filter_jit_writes_into_the_cache_and_keeps_the_weights(large):
    equinox_loop, (params, cache, batch) = import_module("06_equinox"), large
    model = equinox_loop.Toy(**params)
    program = equinox_loop.step.lower(model, cache, batch).compile()
    assert_in_place(program.compiled, cache.nbytes)
    equinox_loop.step(model, cache, batch)
    assert cache.is_deleted and not params["q"].is_deleted()


def test_a_module_that_holds_the_cache_is_given_away_and_returned(large):
    equinox_loop, (params, cache, batch) = import_module("06_equinox"), large

    class Holder(eqx.Module):
        model: equinox_loop.Toy
        cache: loop.KVCache

    @eqx.filter_jit(donate="all")
    def step(holder, batch):
        logits, cache = holder.model(holder.cache, batch)
        return jnp.argmax(logits, axis=-1), eqx.tree_at(lambda h: h.cache, holder, cache)

    _, holder = step(Holder(equinox_loop.Toy(**params), cache), batch)
    assert cache.is_deleted and params["q"].is_deleted() and not holder.cache.is_deleted


def nnx_in_the_engine(params, cache):
    Toy, Pages = (getattr(import_module("05_flax_nnx"), name) for name in ("Toy", "Pages"))
    graph, pages, weights = nnx.split(Toy(params, cache), Pages, ...)
    tree = jax.tree.structure(pages)

    def model(weights, cache, tokens, batch):
        pages = jax.tree.unflatten(tree, jax.tree.leaves(cache))
        toy = nnx.merge(graph, pages, weights)
        return toy(batch), toy.pages.get_value()

    return model, weights


def equinox_in_the_engine(params, cache):
    def model(toy, cache, tokens, batch):
        return toy(cache, batch)

    return model, import_module("06_equinox").Toy(**params)


@pytest.mark.parametrize("wrapped", [nnx_in_the_engine, equinox_in_the_engine])
def test_a_module_of_nnx_or_equinox_is_the_model_of_an_engine(wrapped):
    params, cache, allocator = loop.make()
    config = EngineConfig(max_rows=2, row_buckets=(2,), prefill_chunk=8, max_sequence_tokens=32)
    engine = Engine(*wrapped(params, cache), cache, allocator, config)
    done = engine.generate(loop.PROMPTS[:2], SamplingParams(max_new_tokens=20))
    for prompt, each, line in zip(loop.PROMPTS, done, said("01_custom_loop"), strict=False):
        assert line.split(": ")[1] == " ".join(map(str, [*prompt, *each.tokens]))


def test_a_latent_that_lies_there_once_is_written_in_place_copied_and_saved(tmp_path):
    latent = import_module("11_latent_attention")
    shapes = [(latent.RANK, latent.HEADS, latent.DIM)] * 2
    shapes += [(1, 1, latent.HEADS, latent.DIM + latent.ROPE), (1, 1, latent.RANK + latent.ROPE)]
    allocator = loop.BlockAllocator(4096, 4)
    batch = allocator.batch([allocator.allocate([1])], 0, 1)
    pages = jax.ShapeDtypeStruct((4096, 1, 4, latent.RANK + latent.ROPE), jnp.float32)
    given = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    step = jax.jit(latent.in_one_array, donate_argnums=0)
    pool_bytes = 4 * np.prod(pages.shape)
    assert_in_place(step.lower(pages, *given, batch).compile(), pool_bytes)
    copy = jax.jit(lambda pages, src, dst: copy_pages(pages, pages, src, dst)[0], donate_argnums=0)
    ids = np.array([1]), np.array([2])
    assert_in_place((program := copy.lower(pages, *ids).compile()), pool_bytes)
    numbers = np.arange(pool_bytes // 4, dtype=np.float32).reshape(pages.shape)
    copied = program(jnp.array(numbers), *ids)
    np.testing.assert_array_equal(copied[1:3], numbers[[1, 1]])
    save_snapshot(tmp_path / "s", {"latent": copied}, allocator)
    empty = {"latent": jnp.zeros_like(copied)}, loop.BlockAllocator(4096, 4)
    back = load_snapshot(tmp_path / "s", *empty).cache["latent"]
    assert np.isin(numbers[1, 0, 0], back).all()


# ---- the page


def test_the_page_on_embedding_quotes_the_examples_line_by_line():
    sections = re.split("^## ", (ROOT / "docs" / "embedding.md").read_text(), flags=re.M)[1:]
    quoted = set()
    for section in sections:
        names = re.findall(r"`examples/(\d\d_\w+)\.py`", section)
        for block in re.findall(r"^```python\n(.*?)^```$", section, re.M | re.S):
            files = [ROOT / "examples" / f"{name}.py" for name in names] + [Path(__file__)]
            indented = ["\n" + textwrap.indent(block, " " * n) for n in range(0, 16, 4)]
            found = [
                path.stem for path in files if any(each in path.read_text() for each in indented)
            ]
            assert found, f"in no example of {section.splitlines()[0]}:\n{block}"
            quoted.update(found)
    assert quoted == {*NAMES, "test_numbered"} - {"02_stop_and_resume", "04_asyncio"}


# ---- transfers


def test_every_transfer_of_an_own_loop_is_one_that_it_asks_for():
    """Its batch goes to the device, its tokens come back; copies for a fork go by themselves."""
    params, cache, allocator = loop.make()
    handles = [allocator.allocate(loop.PROMPTS[0])]
    batch = allocator.batch(handles, 0, 5, tokens_per_row=5, columns=8)
    with jax.transfer_guard("disallow"):
        chosen, cache = loop.step(loop.toy_model, params, cache, jax.device_put(batch))
        cache, twins = cache.fork(allocator, handles[0])
        handles += twins
        newest = np.repeat(jax.device_get(chosen), 2)
        for _ in range(6):
            cache, batch = cache.advance(allocator, handles, newest, columns=8)
            chosen, cache = loop.step(loop.toy_model, params, cache, jax.device_put(batch))
            newest = jax.device_get(chosen)
        with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
            loop.step(loop.toy_model, params, cache, batch)
    texts = [allocator.tokens(handle).tolist() for handle in handles]
    assert texts[0] == texts[1] and allocator.stats().copies
    assert " ".join(map(str, texts[0])) in said("01_custom_loop")[0]
