"""What `plan` says of a model and a memory is what the allocator and the cache then need."""

from __future__ import annotations

import ast
import json
from dataclasses import replace
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from paged_decode import (
    BlockAllocator,
    CacheLayout,
    EngineConfig,
    KVCache,
    OutOfPages,
    PageSpec,
    SamplingParams,
    ShardedAllocator,
    planning,
)
from paged_decode.allocator.windows import most_pages
from paged_decode.cli import main
from paged_decode.cli.plan import parse_size
from paged_decode.kernels import Placement
from paged_decode.planning import (
    CARDS,
    LayerShape,
    ModelShape,
    decode_step,
    model_of_config,
    plan_layout,
    read_model,
)

from ..tiny import DIM, KV_HEADS, make_engine, prompts

GEMMA = ModelShape.of_sizes(18, num_kv_heads=1, head_dim=256, window=512, full_every=6)
TINY = ModelShape.of_sizes(4, num_kv_heads=2, head_dim=8, window=6, full_every=2)
LLAMA = ModelShape.of_sizes(32, num_kv_heads=8, head_dim=128, num_heads=32)


def test_a_plan_is_the_arithmetic_of_pages():
    plan = plan_layout(GEMMA, rows=16, context=32768, tokens_in_flight=512)
    full, window = plan.layout.groups
    assert full.layers == (5, 11, 17) and len(window.layers) == 15
    assert full.num_pages == 16 * 2048 + 1
    assert window.num_pages == 16 * 65 + 16 * 32 + 1  # rows, cached tails, the null page
    assert plan.group_bytes == (32769 * 16 * 3 * 1024, 1553 * 16 * 15 * 1024)
    assert plan.nbytes == sum(plan.group_bytes) and plan.tokens == 16 * 32768


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "float8_e4m3fn"])
def test_a_plan_says_how_many_bytes_a_cache_has(dtype):
    plan = plan_layout(TINY, rows=3, context=40, dtype=dtype)
    assert KVCache.create(layout=plan.layout).nbytes == plan.nbytes


@pytest.mark.parametrize("tails", [0, 5, None])
def test_a_window_pool_is_the_bound_of_every_row_and_the_tails(tails):
    plan = plan_layout(
        TINY, rows=7, context=999, tokens_in_flight=9, page_size=4, cached_tails=tails
    )
    held, tail = most_pages(6, 9, 4), 2  # ceil((6 - 1) / 4)
    assert plan.layout.groups[1].num_pages == 7 * held + (7 if tails is None else tails) * tail + 1


def test_no_row_needs_more_pages_of_a_window_than_its_context_has():
    plan = plan_layout(GEMMA, rows=3, context=40, cached_tails=2)
    assert plan.layout.groups[1].num_pages == 3 * 3 + 2 * 3 + 1


def test_the_planned_layout_makes_cache_and_allocator():
    plan = plan_layout(TINY, rows=3, context=40, page_size=4, tokens_in_flight=8, dtype="float32")
    cache, allocator = KVCache.create(layout=plan.layout), BlockAllocator(plan.layout)
    cache.check_allocator(allocator)
    assert cache.nbytes == plan.nbytes
    assert allocator.can_ever_fit(40)


# ---- rows that run in the planned pool


class Rows:
    """Rows of a loop or an engine, each in a state of its own, that move in any order.

    Prompts go through in chunks of n, `commit` of one and `prepare` of the next back to back.
    Decode has pages for 2k tokens behind the k that are read next. Ended rows are replaced, and
    some go on with another prompt behind what they have.
    """

    def __init__(self, plan, steps, seed):
        self.allocator, self.chunk = BlockAllocator(plan.layout), plan.tokens_in_flight
        self.rng, self.steps, self.context = np.random.default_rng(seed), steps, plan.context
        self.handles: list[int | None] = [None] * plan.rows

    def tokens(self, count):
        return self.rng.integers(0, 50, count)

    def move(self):
        row = int(self.rng.integers(len(self.handles)))
        handle = self.handles[row]
        if handle is None:
            prompt = self.tokens(self.rng.integers(1, self.context - 2 * self.steps))
            self.handles[row] = self.allocator.allocate(prompt, chunk=self.chunk)
            return
        info = self.allocator.sequence(handle)
        if info.computed < info.length:
            computed = min(info.computed + self.chunk, info.length)
            self.allocator.commit([handle], [computed])
            more = 2 * self.steps if computed == info.length else self.chunk
            ahead = info.length + more if computed == info.length else computed + more
            self.allocator.prepare([handle], min(ahead, self.context))
            return
        room = self.context - 2 * self.steps - info.length
        count = int(self.rng.integers(1, self.steps + 1))
        if room < count or self.rng.random() < 0.02:
            self.allocator.free(handle)
            self.handles[row] = None
            return
        if self.rng.random() < 0.1:
            self.allocator.append([handle], [self.tokens(room)], chunk=self.chunk)
            return
        self.allocator.append([handle], [self.tokens(count)])
        self.allocator.commit([handle], [info.length + count])
        self.allocator.prepare([handle], info.length + count + 2 * self.steps)


@pytest.mark.parametrize("window, size, chunk, steps", [(6, 4, 5, 2), (8, 4, 16, 3), (5, 1, 3, 4)])
def test_the_planned_window_pool_runs_16_rows_in_any_order(window, size, chunk, steps):
    model = ModelShape.of_sizes(2, num_kv_heads=1, head_dim=8, window=window, full_every=2)
    plan = plan_layout(
        model,
        rows=16,
        context=90,
        page_size=size,
        tokens_in_flight=max(chunk, 2 * steps),
        cached_tails=0,
    )
    rows = Rows(plan, steps, seed=window)
    for _ in range(500):
        rows.move()  # OutOfPages would come out of here
    rows.allocator.check_invariants()
    usable = plan.layout.groups[1].num_pages - 1
    assert rows.allocator.stats(1).peak_used > 0.7 * usable  # they were in each other's way


@pytest.mark.parametrize("window, size, chunk", [(1, 4, 1), (6, 4, 1), (8, 4, 16), (5, 2, 3)])
def test_one_page_less_than_planned_fails_in_some_order(window, size, chunk):
    model = ModelShape.of_sizes(2, num_kv_heads=1, head_dim=8, window=window, full_every=2)
    plan = plan_layout(
        model, rows=3, context=64, page_size=size, tokens_in_flight=chunk, cached_tails=0
    )
    full, windowed = plan.layout.groups
    less = CacheLayout(size, (full, replace(windowed, num_pages=windowed.num_pages - 1)))

    def widest(layout):
        """All rows at the length at which a chunk more holds the most, one after the other."""
        allocator = BlockAllocator(layout, prefix_cache=False)
        ahead = [-(-(c + chunk) // size) - max(c - window + 1, 0) // size for c in range(1, 40)]
        start = 1 + int(np.argmax(ahead))
        for _ in range(plan.rows):
            handle = allocator.allocate(range(start), chunk=chunk)
            for end in (*range(chunk, start, chunk), start):
                allocator.prepare([handle], end)
                allocator.commit([handle], [end])
            allocator.append([handle], [range(chunk)], chunk=chunk)
        return allocator.stats(1).used

    assert widest(plan.layout) == windowed.num_pages - 1
    with pytest.raises(OutOfPages):
        widest(less)


def test_an_engine_runs_16_rows_in_the_planned_pools_without_a_preemption():
    model = ModelShape.of_sizes(2, num_kv_heads=KV_HEADS, head_dim=DIM, window=6, full_every=2)
    shapes: dict = dict(max_rows=16, row_buckets=(16,), max_sequence_tokens=64)
    shapes |= dict(prefill_chunk=8, prefill_rows=2, decode_steps=4)
    plan = plan_layout(
        model,
        rows=16,
        context=64,
        page_size=4,
        dtype="float32",
        tokens_in_flight=EngineConfig(**shapes).tokens_ahead,
        cached_tails=0,
    )
    engine, most = make_engine(layout=plan.layout, **shapes), 0
    for prompt in prompts(18, low=20, high=50):
        engine.submit(prompt, SamplingParams(max_new_tokens=9))
    while not engine.idle:
        engine.step()
        most = max(most, len(engine.scheduler.running))
    assert (most, engine.stats.preemptions) == (16, 0)


def test_rows_of_32k_tokens_hold_at_most_a_tenth_more_than_their_layers_see():
    rows, tokens, chunk = 2, 32768, 512
    plan = plan_layout(GEMMA, rows=rows, context=tokens, tokens_in_flight=chunk, cached_tails=0)
    allocator = BlockAllocator(plan.layout)
    handles = [allocator.allocate(range(tokens), chunk=chunk) for _ in range(rows)]
    for end in range(chunk, tokens + 1, chunk):
        for handle in handles:
            allocator.commit([handle], [end])
            allocator.prepare([handle], min(end + chunk, tokens))
    full, window = plan.token_bytes
    seen = rows * (full * tokens + window * 512)
    for counted in ("used", "peak_used"):
        pages = [getattr(allocator.stats(group), counted) for group in range(2)]
        assert seen <= 16 * (full * pages[0] + window * pages[1]) <= 1.1 * seen
    assert plan.nbytes <= 1.1 * seen


def test_a_model_of_window_layers_only_gets_a_group_for_the_books():
    model = ModelShape.of_sizes(2, num_kv_heads=1, head_dim=8, window=6)
    plan = plan_layout(model, rows=2, context=40, page_size=4, tokens_in_flight=8, dtype="float32")
    books, window = plan.layout.groups
    assert books.layers == () and window.layers == (0, 1)
    assert (books.num_pages, plan.group_bytes[0]) == (2 * 10 + 1, 0)
    cache, allocator = KVCache.create(layout=plan.layout), BlockAllocator(plan.layout)
    assert cache.nbytes == plan.nbytes
    handle = allocator.allocate(range(39), chunk=8)
    numbers = jnp.ones((1, 8, 1, 8))
    for end in (8, 16, 24, 32, 39):
        allocator.prepare([handle], end)
        begin = allocator.sequence(handle).computed
        batch = allocator.batch([handle], begin, end, tokens_per_row=8)
        out, cache = cache.append_and_attend(1, numbers, numbers, numbers, batch)
        allocator.commit([handle], [end])
        assert np.asarray(out)[0, begin - end :] == pytest.approx(1)


# ---- memory


def test_two_of_memory_rows_and_context_say_the_third():
    whole = plan_layout(GEMMA, rows=16, context=4096)
    assert plan_layout(GEMMA, cache_bytes=whole.nbytes, context=4096) == whole
    assert plan_layout(GEMMA, cache_bytes=whole.nbytes, rows=16).layout == whole.layout
    assert plan_layout(GEMMA, cache_bytes=whole.nbytes, rows=16).context == 4096
    assert plan_layout(GEMMA, cache_bytes=whole.nbytes - 1, context=4096).rows == 15


def test_layers_that_see_all_get_what_is_left_of_the_memory():
    memory = 10**9
    plan = plan_layout(GEMMA, cache_bytes=memory, rows=16, context=1024)
    page = plan.token_bytes[0] * 16
    assert plan.nbytes <= memory < plan.nbytes + page
    assert plan.layout.groups[1] == plan_layout(GEMMA, rows=16, context=1024).layout.groups[1]
    assert plan.tokens > 16 * 1024 == plan.rows * plan.context


def test_one_row_more_than_planned_does_not_fit():
    plan = plan_layout(GEMMA, cache_bytes=10**8, context=2048, cached_tails=4)
    with pytest.raises(
        ValueError, match=f"{plan.rows + 1} rows of 2048 tokens need .* got 100000000"
    ):
        plan_layout(GEMMA, cache_bytes=10**8, context=2048, cached_tails=4, rows=plan.rows + 1)


def test_a_pool_has_no_more_slots_than_an_int32_counts():
    plan = plan_layout(TINY, cache_bytes=10**13, rows=1, page_size=16)
    assert plan.layout.groups[0].num_pages == 2**31 // 16


def test_a_row_is_not_planned_longer_than_the_model_was_made_for():
    plan = plan_layout(replace(GEMMA, context=8192), cache_bytes=10**9, rows=2)
    assert plan.context == 8192 and plan.tokens > 2 * 8192


# ---- several devices


def test_heads_are_split_by_the_rule_of_the_mesh():
    for heads in range(1, 9):
        model = ModelShape.of_sizes(1, num_kv_heads=heads, head_dim=8)
        for devices in range(1, 9):
            mesh = AbstractMesh((devices,), ("x",))
            try:
                place = Placement.create(mesh, num_kv_heads=heads, num_pages=9, head_axis="x")
            except ValueError:
                with pytest.raises(ValueError, match="one number must divide the other"):
                    plan_layout(model, rows=1, context=16, head_shards=devices)
                continue
            each = heads * place.kv_copies // devices
            plan = plan_layout(model, rows=1, context=16, head_shards=devices)
            assert plan.token_bytes == (2 * each * 8 * 2,)


@pytest.mark.parametrize("heads, rows", [(1, 2), (2, 2), (4, 1)])
def test_the_planned_layout_lies_on_a_mesh_as_planned(heads, rows):
    model = ModelShape.of_sizes(2, num_kv_heads=2, head_dim=8, num_heads=4)
    plan = plan_layout(
        model, rows=5, context=30, page_size=4, dtype="float32", head_shards=heads, data_shards=rows
    )
    mesh = jax.make_mesh((rows, heads), ("data", "heads"), devices=jax.devices()[: rows * heads])
    cache = KVCache.create(layout=plan.layout, mesh=mesh, head_axis="heads", data_axis="data")
    (group,) = plan.layout.groups
    assert group.num_pages == rows * (-(-5 // rows) * 8 + 1)  # a null page in every shard
    pages = (*cache.k_pages, *cache.v_pages)
    assert sum(a.addressable_shards[0].data.nbytes for a in pages) == plan.nbytes
    allocator = ShardedAllocator(plan.layout, num_shards=rows)
    for _ in range(5):
        allocator.allocate(range(30))


def test_query_heads_are_split_evenly():
    with pytest.raises(ValueError, match="divide the 32 query heads"):
        plan_layout(LLAMA, rows=1, context=16, head_shards=64)


# ---- the roofline


def test_a_step_reads_the_weights_and_what_its_tokens_see():
    plan = plan_layout(GEMMA, rows=4, context=1000)
    step = decode_step(plan, weights_bytes=10**6, bandwidth_bytes=1e9)
    assert step.kv_bytes == 4 * 1024 * (3 * 1000 + 15 * 512)
    assert step.seconds == (10**6 + step.kv_bytes) / 1e9
    assert step.tokens_per_second == 4 / step.seconds
    short = decode_step(plan, weights_bytes=10**6, bandwidth_bytes=1e9, length=100)
    assert short.kv_bytes == 4 * 1024 * 18 * 100


def test_devices_divide_what_is_split():
    one, split = (
        decode_step(
            plan_layout(LLAMA, rows=8, context=64, head_shards=heads, data_shards=rows),
            weights_bytes=16 * 10**9,
            bandwidth_bytes=CARDS["h100"].bandwidth_bytes,
        )
        for heads, rows in ((1, 1), (16, 2))
    )
    assert split.weights_bytes == one.weights_bytes / 16
    assert split.kv_bytes == one.kv_bytes / 8 / 2  # of 8 KV heads, one lies on each device


# ---- models


def config(model_type, **keys):
    sizes = dict(num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, hidden_size=64)
    return {"model_type": model_type, **sizes, **keys}


@pytest.mark.parametrize(
    "what, windows",
    [
        (config("llama"), [None] * 4),
        (config("llama", num_key_value_heads=None), [None] * 4),
        (config("mistral"), [4096] * 4),
        (config("mistral", sliding_window=None), [None] * 4),
        (config("mixtral"), [None] * 4),
        (config("qwen2", sliding_window=9, max_window_layers=1), [None] * 4),
        (config("qwen3", sliding_window=9, max_window_layers=1, use_sliding_window=True),
         [None, 9, 9, 9]),
        (config("gemma2"), [4096, None] * 2),
        (config("gemma3_text", num_hidden_layers=7, sliding_window=512), [512] * 5 + [None, 512]),
        (config("gemma3_text", sliding_window_pattern=3), [4096, 4096, None, 4096]),
        (config("gpt_oss"), [128, None] * 2),
        (config("unheard_of"), [None] * 4),
        (config("unheard_of", sliding_window=8, use_sliding_window=False), [None] * 4),
        (config("unheard_of", sliding_window=8,
                layer_types=["full_attention", *["sliding_attention"] * 3]), [None, 8, 8, 8]),
    ],
)  # fmt: skip
def test_a_config_says_which_layers_have_a_window(what, windows):
    assert [layer.window for layer in model_of_config(what).layers] == windows


def test_a_config_may_leave_out_what_transformers_knows():
    text = {"model_type": "gemma3_text", "num_hidden_layers": 34, "sliding_window": 1024}
    model = model_of_config({"model_type": "gemma3", "text_config": text, "vision_config": {}})
    assert model.groups == {
        LayerShape(4, 256): (5, 11, 17, 23, 29),
        LayerShape(4, 256, 1024): tuple(i for i in range(34) if (i + 1) % 6),
    }
    assert model.num_heads == 8
    heads = model_of_config(config("llama", num_key_value_heads=None, head_dim=None))
    assert heads.layers[0] == LayerShape(4, 16)


@pytest.mark.parametrize(
    "keys, message",
    [
        (dict(kv_lora_rank=512), "latent attention"),
        (dict(linear_num_key_heads=16), "recurrent state"),
        (dict(mamba_d_state=16), "recurrent state"),
        (dict(num_kv_shared_layers=2), "keys and values of others"),
        (dict(global_head_dim=512), "differ"),
        (dict(sliding_window=8), "give sizes"),
        (dict(layer_types=["full_attention"] * 3 + ["linear_attention"]), "layer 3 is 'linear_"),
    ],
)
def test_what_has_no_pages_is_refused_by_name(keys, message):
    with pytest.raises(NotImplementedError, match=message):
        model_of_config(config("unheard_of", **keys))


@pytest.mark.parametrize(
    "keys, message",
    [
        (dict(num_key_value_heads=None), "num_key_value_heads to be an integer"),
        (dict(num_hidden_layers=True), "num_hidden_layers to be an integer"),
        (dict(num_hidden_layers=0), "num_hidden_layers to be an integer"),
        (dict(hidden_size=65), "expected head_dim"),
        (dict(layer_types=["full_attention"]), "name 4 layers"),
        (dict(layer_types=["sliding_attention"] * 4), "no sliding_window"),
        (dict(model_type=None), "expected the model_type"),
    ],
)
def test_a_config_that_cannot_be_is_an_error(keys, message):
    with pytest.raises(ValueError, match=message):
        model_of_config(config("unheard_of") | keys)


def write_gguf(path, arch, **keys):
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(4)
    writer.add_context_length(4096)
    writer.add_embedding_length(64)
    writer.add_head_count(4)
    writer.add_token_list([b"a", b"bc"])
    writer.add_token_scores([0.5, 1.5])
    for key, value in keys.items():
        getattr(writer, f"add_{key}")(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    "arch, keys, windows",
    [
        ("llama", dict(head_count_kv=2), [None] * 4),
        ("gemma3", dict(head_count_kv=2, sliding_window=512), [512] * 4),
        ("gemma2", dict(head_count_kv=2, sliding_window=512), [512, None] * 2),
        ("gpt-oss", dict(head_count_kv=2, sliding_window=128), [128, None] * 2),
        ("new", dict(head_count_kv=2, sliding_window=8,
                     sliding_window_pattern=[False, True, True, False]), [None, 8, 8, None]),
    ],
)  # fmt: skip
def test_a_gguf_file_says_which_layers_have_a_window(tmp_path, arch, keys, windows):
    model = read_model(path := write_gguf(tmp_path / "m.gguf", arch, **keys))
    assert model.layers == tuple(LayerShape(2, 16, window) for window in windows)
    assert (model.name, model.num_heads, model.context) == (arch, 4, 4096)
    assert model.weights_bytes == path.stat().st_size


def test_layers_of_a_gguf_file_may_differ_in_heads(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", "new", head_count_kv=[1, 2, 2, 1], key_length=32)
    assert read_model(path).groups == {LayerShape(1, 32): (0, 3), LayerShape(2, 32): (1, 2)}


@pytest.mark.parametrize(
    "keys, message",
    [
        (dict(kv_lora_rank=8), "latent attention"),
        (dict(ssm_state_size=8), "recurrent"),
        (dict(head_count_kv=[2, 2, 0, 2]), "layer 2 has no KV heads"),
        (dict(sliding_window=8), "give sizes"),
        (dict(key_length=32, value_length=16), "as many of both"),
    ],
)
def test_what_has_no_pages_in_a_gguf_file_is_refused_by_name(tmp_path, keys, message):
    with pytest.raises(NotImplementedError, match=message):
        read_model(write_gguf(tmp_path / "m.gguf", "new", **keys))


def test_a_cut_gguf_file_is_an_error_at_every_byte(tmp_path):
    whole = write_gguf(tmp_path / "m.gguf", "llama", head_count_kv=2).read_bytes()
    path = tmp_path / "cut.gguf"
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        with pytest.raises(ValueError, match="cut short or corrupt"):
            read_model(path)


def test_a_gguf_file_of_several_does_not_say_how_large_the_weights_are(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", "llama", head_count_kv=2)
    assert read_model(path).weights_bytes is not None
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in dict(block_count=1, embedding_length=64).items():
        getattr(writer, f"add_{key}")(value)
    writer.add_head_count(4)
    writer.add_uint16("split.count", 3)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert read_model(path).weights_bytes is None


def test_a_folder_has_a_config_and_perhaps_the_index_of_its_weights(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config("llama")))
    assert read_model(tmp_path).weights_bytes is None
    index = {"metadata": {"total_size": 123456}, "weight_map": {}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert read_model(tmp_path / "config.json").weights_bytes == 123456


# ---- the command


def plan(*words):
    return main(["plan", *map(str, words)])


def test_the_command_prints_a_layout_that_makes_an_allocator(capsys, tmp_path, unchecked):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config("gemma3_text", num_hidden_layers=6, sliding_window=32)))
    words = (path, "--rows", 3, "--context", 100, "--card", "h100", "--weights-bytes", "1MB")
    assert plan(*words, "--memory", "100MB", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    layout = said["plan"]["layout"]
    groups = tuple(PageSpec(**group) for group in layout["groups"])
    again = plan_layout(read_model(path), cache_bytes=said["cache_bytes"], rows=3, context=100)
    assert CacheLayout(layout["page_size"], groups) == again.layout
    assert said["cache_bytes"] == 90 * 10**6 - 10**6 and said["plan"]["nbytes"] == again.nbytes
    BlockAllocator(again.layout)
    assert plan(*words) == 0
    table = capsys.readouterr().out
    assert "3 rows of 100 tokens" in table and "32 tokens" in table and "roofline" in table


def test_the_docs_show_what_the_command_prints(capsys):
    page = (Path(__file__).parents[3] / "docs/planning.md").read_text()
    typed, shown = page.split("$ paged-decode plan ")[1].split("```")[0].split("\nmodel:", 1)
    assert plan(*typed.replace("\\\n", " ").split()) == 0
    assert capsys.readouterr().out == "model:" + shown


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "expected a file, or --layers"),
        (["--layers", 2, "--kv-heads", 1, "--head-dim", 8], "expected two of"),
        (["--layers", 2, "--kv-heads", 1, "--head-dim", 8, "--rows", 2, "--card", "v5e"],
         "expected --weights-bytes"),
        (["--layers", 2, "--kv-heads", 1, "--head-dim", 8, "--rows", 2, "--cache-bytes", 99],
         "2 rows need .* got 99"),
        (["--layers", 2, "--kv-heads", 1, "--head-dim", 8, "--context", 9, "--cache-bytes", 99],
         "one row of 1 pages of 16 tokens needs"),
        (["--layers", 2, "--kv-heads", 1, "--head-dim", 8, "--rows", 2, "--card", "v5e",
          "--weights-bytes", "16GB"], "do not fit"),
        (["--layers", 2, "--kv-heads", 1, "--head-dim", 8, "--full-every", 2, "--rows", 1],
         "give the window"),
        (["--layers", 2, "--heads", 4, "--kv-heads", 3, "--head-dim", 8, "--rows", 1],
         "query heads must be a multiple of KV heads, got 4 and 3"),
    ],
)  # fmt: skip
def test_the_command_explains_what_it_cannot_plan(capsys, words, message):
    assert plan(*words) == 1
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(capsys.readouterr().err)


@pytest.mark.parametrize(
    "text, size",
    [("80GB", 80 * 10**9), ("1.5GiB", 3 * 2**29), ("16e9", 16 * 10**9), ("0", 0), ("7B", 7),
     ("2kB", 2000), ("1KiB", 1024), ("3.35TB", 3_350_000_000_000)],
)  # fmt: skip
def test_sizes_are_bytes_with_a_unit_or_without(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    ["", "GB", "80 GB", "80gb", "80G", "-1", "nan", "inf", "1.5", "1e999999", "1_000", "80GBB",
     "٣", "0x10", "1e30"],
)  # fmt: skip
def test_what_is_no_size_is_refused(text):
    with pytest.raises(Exception, match="expected bytes"):
        parse_size(text)


def test_planning_needs_no_jax():
    folder = Path(planning.__file__).parent
    for path in folder.glob("*.py"):
        names = [
            alias.name
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Import)
            for alias in node.names
        ]
        assert "jax" not in names, path
