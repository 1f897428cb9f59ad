"""Checkpoints that transformers' own classes saved say here what they say there.

`make_checkpoints.py` makes them: tiny, with random weights, and one for every family.
"""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import decoder, parallel
from models.checkpoint import CheckpointError, Safetensors
from models.families import read_recipe
from safetensors.numpy import save_file

from paged_decode import BlockAllocator, Engine, EngineConfig, KVCache, SamplingParams

from .test_generate import run

GOLDEN = Path(__file__).with_name("golden")
FAMILIES = sorted(path.parent.name for path in GOLDEN.glob("*/config.json"))
PAGE, CHUNK = 4, 8


def golden(family: str) -> list[tuple[list[int], list[int], np.ndarray]]:
    """Per prompt: its ids, the greedy ones, and float32 logits `[T, V]` of both."""
    with np.load(GOLDEN / family / "golden.npz") as file:
        return [
            (file[f"prompt{i}"].tolist(), file[f"greedy{i}"].tolist(), file[f"logits{i}"])
            for i in range(3)
        ]


def every_logit(model, config, params, sequences, **where) -> list[np.ndarray]:
    """Logits of all positions, in chunks through one group of pages."""
    columns = -(-max(map(len, sequences)) // PAGE)
    cache = KVCache.create(
        num_layers=config.num_layers,
        num_pages=columns * len(sequences) + 1,
        num_kv_heads=config.num_kv_heads,
        page_size=PAGE,
        head_dim=config.head_dim,
        **where,
    )
    allocator = BlockAllocator(cache.num_pages, PAGE)
    handles = [allocator.allocate(sequence) for sequence in sequences]
    step = jax.jit(model, donate_argnums=1)
    said: list[list[np.ndarray]] = [[] for _ in sequences]
    for begin in range(0, max(map(len, sequences)), CHUNK):
        begins, ends = (
            [min(len(sequence), at) for sequence in sequences] for at in (begin, begin + CHUNK)
        )
        batch = allocator.batch(handles, begins, ends, tokens_per_row=CHUNK, columns=columns)
        logits, cache = step(params, cache, batch.tokens, batch)
        allocator.commit(handles, ends)
        for row, new in enumerate(np.subtract(ends, begins)):
            said[row].append(np.asarray(logits)[row, CHUNK - new :])
    return [np.concatenate(each) for each in said]


# Keys and values that every device copies, biases, fused matrices, experts, sinks and windows.
SPLIT = "smollm2", "llama_biased", "phi3", "qwen3_moe", "gpt_oss"
# Layers without positions, two page groups with a cap, and with sinks and experts.
LAYERS = "smollm3", "gemma2", "gpt_oss"


def for_ci(family: str, few: tuple[str, ...]) -> object:
    return () if family in few else pytest.mark.long


@pytest.mark.parametrize(
    ("family", "devices"),
    [*((f, 1) for f in FAMILIES), *(pytest.param(f, 2, marks=for_ci(f, SPLIT)) for f in FAMILIES)],
)
def test_the_logits_of_every_position_are_those_of_transformers(family, devices):
    """In chunks that are longer than the window, on devices of which each has its heads."""
    cases, where = golden(family), {}
    if devices == 1:
        config, params = decoder.load(GOLDEN / family)
        model = decoder.make_model(config, every_token=True)
    else:
        if family == "smollm2":  # three query heads and one for keys, which every device copies
            devices = 3
        mesh = parallel.make_mesh(devices)
        config, params = decoder.load(GOLDEN / family, mesh=mesh)
        assert params["layers"][0]["out"].sharding.mesh.shape[parallel.AXIS] == devices
        model = decoder.make_model(config, mesh=mesh, every_token=True)
        where = dict(mesh=mesh, head_axis=parallel.AXIS)
    sequences = [prompt + greedy for prompt, greedy, _ in cases]
    said = every_logit(model, config, params, sequences, **where)
    for got, (_, _, want) in zip(said, cases, strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", [pytest.param(f, marks=for_ci(f, LAYERS)) for f in FAMILIES])
def test_an_engine_that_preempts_says_the_greedy_ids_of_transformers(family):
    """Prompts in chunks, three tokens a visit, and page groups that are too small for all."""
    cases = golden(family)
    config, params = decoder.load(GOLDEN / family)
    layout = decoder.layout(config, page_size=PAGE, num_pages=14)
    assert (len(layout.groups) > 1) == (0 < len(config.full_layers) < config.num_layers)
    shapes = EngineConfig(
        max_rows=3,
        row_buckets=(3,),
        chunk_buckets=(CHUNK,),
        decode_steps=3,
        prefill_chunk=CHUNK,
        max_sequence_tokens=36,
        top_logits=4,
        vocab_size=config.vocab_size,
    )
    cache, allocator = KVCache.create(layout=layout), BlockAllocator(layout)
    engine = Engine(decoder.make_model(config), params, cache, allocator, shapes)
    greedy = SamplingParams(max_new_tokens=len(cases[0][1]))
    done = engine.generate([prompt for prompt, _, _ in cases], greedy)
    assert engine.stats.preemptions > 0
    for completion, (prompt, ids, logits) in zip(done, cases, strict=True):
        assert list(completion.tokens) == ids
        assert completion.top_logits is not None
        for place, best in enumerate(completion.top_logits):
            for token, logit in best:
                assert abs(logits[len(prompt) - 1 + place, token] - logit) < 1e-4


# ---- how else a checkpoint may be written


def changed(tmp_path: Path, family: str, **changes: object) -> Path:
    """A copy of a checkpoint whose config.json says something else; None: no longer says it."""
    folder = tmp_path / family
    shutil.copytree(GOLDEN / family, folder)
    path = folder / "config.json"
    said = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in said.items() if value is not None}))
    return folder


NO_WINDOW = dict(use_sliding_window=None, max_window_layers=None)
YARN = dict(type="yarn", factor=4.0, original_max_position_embeddings=32)
LINEAR = dict(rope_type="linear", type="linear", factor=3.0)
LLAMA = dict(architectures=["LlamaForCausalLM"], model_type="llama")
LLAMA3 = dict(rope_type="llama3", factor=8.0, original_max_position_embeddings=32)
LLAMA3 |= dict(low_freq_factor=1.0, high_freq_factor=4.0)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama_biased", dict(rope_theta=1000.0, rope_scaling=LINEAR, torch_dtype="float32")),
        ("qwen3", dict(rope_theta=1000.0, rope_scaling=YARN)),
        ("qwen2", dict(rope_theta=100.0, layer_types=None)),
        ("qwen3_moe", dict(rope_theta=100.0, num_experts=5, num_local_experts=None)),
        ("gemma2", dict(rope_theta=100.0, layer_types=None, tie_word_embeddings=None)),
        ("phi3", dict(rope_theta=100.0, partial_rotary_factor=0.75, rope_scaling=None)),
        ("smollm3", dict(rope_theta=100.0, rope_scaling=None)),
        (
            "gemma3",
            dict(rope_theta=1000.0, rope_local_base_freq=100.0, rope_scaling=LINEAR),
        ),
    ],
)
def test_a_configuration_of_before_2026_is_the_same_model(tmp_path, family, changes):
    folder = changed(tmp_path, family, rope_parameters=None, **changes)
    (old, old_params), (new, params) = decoder.load(folder), decoder.load(GOLDEN / family)
    assert old == new
    jax.tree.map(np.testing.assert_array_equal, old_params, params)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("phi3", dict(attention_bias=False, lm_head_bias=False, use_mrope=False)),
        ("gemma2", dict(sliding_window_size=6)),
        ("qwen3_moe", dict(qkv_bias=False, use_qk_norm=True, shared_expert_intermediate_size=0)),
        ("llama", dict(unsloth_version="2025.1", torchscript=False, do_sample=True, top_p=0.9)),
        ("llama", dict(is_encoder_decoder=False, pruned_heads={}, temperature=0.6, num_beams=1)),
    ],
)
def test_keys_that_change_nothing_are_taken_from_whoever_wrote_them(tmp_path, family, changes):
    recipes = read_recipe(changed(tmp_path, family, **changes)), read_recipe(GOLDEN / family)
    assert recipes[0].config == recipes[1].config and recipes[0].names == recipes[1].names


def test_a_theta_may_be_large_or_beside_what_it_is_said_to_be_in(tmp_path):
    inside = dict(LLAMA3, rope_theta=3580165449.0)
    for number, own in enumerate((dict(), dict(rope_theta=3580165449.0))):
        changes = dict(rope_parameters=None, rope_scaling=inside) | own
        folder = changed(tmp_path / str(number), "llama", **changes)
        assert read_recipe(folder).config.rope == decoder.Rope(
            3580165449.0, "llama3", 8.0, first_positions=32, fast=4.0, slow=1.0
        )


@pytest.mark.parametrize(("said", "truncate"), [({}, True), ({"truncate": None}, False)])
def test_yarn_rounds_unless_the_file_says_null(tmp_path, said, truncate):
    rope = dict(YARN, rope_type="yarn", rope_theta=9.0) | said
    assert (
        read_recipe(changed(tmp_path, "qwen3", rope_parameters=rope)).config.rope.truncate
        == truncate
    )


def test_frequencies_are_rounded_as_in_training():
    """Those of PyTorch 2.14, `1 / 500000 ** (torch.arange(0, 128, 2).float() / 128)`."""
    got = decoder.rope_frequencies(decoder.Rope(500000.0), 128)
    want = {
        0: 1.0,
        1: 0.8146172165870667,
        7: 0.2380538135766983,
        20: 0.016560440883040428,
        33: 0.001152042648755014,
        47: 6.528582161990926e-05,
        63: 2.4551407022954663e-06,
    }
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got[list(want)], np.array([*want.values()], np.float32))


# ---- which tensors are read


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    source = Safetensors(folder)
    return {name: each[:] for name, each in source.tensors.items()}


def test_a_whole_file_goes_before_an_index(tmp_path):
    folder = changed(tmp_path, "llama")
    every = tensors_of(folder)
    every["lm_head.weight"] = every["lm_head.weight"] + np.float32(1)
    save_file(every, folder / "model.safetensors")
    _, params = decoder.load(folder)
    np.testing.assert_array_equal(params["head"].T, every["lm_head.weight"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda places: places.clear(), "expected files of tensors as its 'weight_map'"),
        (lambda places: places.update(x=3), "'x' in a file beside it, got 3"),
        (lambda places: places.update(x="../x.safetensors"), r"got '\.\./x\.safetensors'"),
        (lambda places: places.update(x="sub/x.safetensors"), "got 'sub/x.safetensors'"),
        (lambda places: places.pop("lm_head.weight"), r"another thing of \['lm_head\.weight'\]"),
        (lambda places: places.update(x=places["lm_head.weight"]), r"another thing of \['x'\]"),
    ],
)
def test_an_index_says_of_files_beside_it_what_they_hold(tmp_path, change, message):
    folder = changed(tmp_path, "llama")
    path = folder / "model.safetensors.index.json"
    said = json.loads(path.read_text())
    change(said["weight_map"])
    path.write_text(json.dumps(said))
    with pytest.raises(CheckpointError, match=message):
        decoder.load(folder)


def test_a_tied_head_may_be_held_once_more_but_not_another_one(tmp_path):
    folder = changed(tmp_path, "gemma2")
    every = tensors_of(folder)
    for added in (0, 1):
        head = every["model.embed_tokens.weight"] + np.float32(added)
        save_file({**every, "lm_head.weight": head}, folder / "model.safetensors")
        if added:
            with pytest.raises(CheckpointError, match=r"'lm_head\.weight' is not tied to"):
                decoder.load(folder)
        else:
            assert "head" not in decoder.load(folder)[1]


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tensors_of_several_dtypes_are_one_matrix_of_the_one_that_was_asked_for(
    tmp_path, family, dtype
):
    folder = changed(tmp_path, family)
    kinds = itertools.cycle([np.float16, jnp.bfloat16, np.float32])
    every = {name: each.astype(next(kinds)) for name, each in tensors_of(folder).items()}
    save_file(every, folder / "model.safetensors")
    _, params = decoder.load(folder, dtype)
    q, k, v = (every[f"model.layers.0.self_attn.{each}_proj.weight"] for each in "qkv")
    want = np.concatenate([each.astype(dtype) for each in (q, k, v)]).T
    np.testing.assert_array_equal(np.asarray(params["layers"][0]["qkv"]), want)
    assert {each.dtype for each in jax.tree.leaves(params)} <= {
        np.dtype(dtype),
        np.dtype("float32"),
    }


def test_weights_have_fractions():
    with pytest.raises(ValueError, match="floating dtype of weights, got int8"):
        decoder.load(GOLDEN / "llama", "int8")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen2", "gpt_oss"])
def test_matrices_are_of_the_dtype_that_was_asked_for(family, dtype):
    _, params = decoder.load(GOLDEN / family, dtype)
    layer = params["layers"][1]
    assert {params["embed"].dtype, layer["qkv"].dtype, layer["down"].dtype} == {np.dtype(dtype)}
    assert params["norm"].dtype == layer["inner_norm"].dtype == np.float32


# ---- experts of 4 bits


def packed(folder: Path, **tensors: np.ndarray) -> Safetensors:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    return Safetensors(folder, mxfp4=True)


def test_every_byte_under_every_kind_of_scale_says_what_transformers_says(tmp_path):
    with np.load(GOLDEN / "mxfp4.npz") as file:
        blocks, scales, whole = (file[name] for name in ("blocks", "scales", "whole"))
    read = packed(tmp_path / "x", x_blocks=blocks, x_scales=scales).tensor("x", whole.shape)
    assert read.dtype == jnp.bfloat16
    np.testing.assert_array_equal(read.astype(np.float32).view(np.uint32), whole.view(np.uint32))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_experts_of_4_bits_are_of_the_dtype_that_was_asked_for(dtype):
    _, params = decoder.load(GOLDEN / "gpt_oss_mxfp4", dtype)
    layer = params["layers"][0]
    assert layer["gate_up"].dtype == layer["down"].dtype == np.dtype(dtype)
    assert layer["gate_up"].shape == (3, 32, 64)


def test_blocks_that_do_not_fit_their_scales_are_named(tmp_path):
    blocks, scales = np.zeros((2, 4, 1, 16), np.uint8), np.zeros((2, 4, 1), np.uint8)
    with pytest.raises(CheckpointError, match="x_scales"):
        packed(tmp_path / "a", x_blocks=blocks)
    with pytest.raises(CheckpointError, match=r"'x' of blocks .*16\], scales \[2, 3, 1\]"):
        packed(tmp_path / "b", x_blocks=blocks, x_scales=scales[:, :3].copy())
    with pytest.raises(CheckpointError, match="'x' .*'U8', 'F32'"):
        packed(tmp_path / "c", x_blocks=blocks, x_scales=scales.astype(np.float32))
    with pytest.raises(CheckpointError, match=r"'x' of shape \(2, 32, 5\), got \(2, 32, 4\)"):
        packed(tmp_path / "d", x_blocks=blocks, x_scales=scales).tensor("x", (2, 32, 5))


def test_blocks_of_a_checkpoint_that_says_nothing_of_4_bits_are_not_read(tmp_path):
    with pytest.raises(CheckpointError, match=r"experts\.gate_up_proj'"):
        decoder.load(changed(tmp_path, "gpt_oss_mxfp4", quantization_config=None))


# ---- what is refused


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        (
            "llama",
            dict(architectures=["MambaForCausalLM"]),
            "'MambaForCausalLM'.* only one of Llama",
        ),
        ("gemma3", dict(architectures=["Gemma3ForConditionalGeneration"]), "Conditional"),
        ("llama", dict(use_alibi=True), "config.json: 'use_alibi' = True .*nobody here knows"),
        ("llama", dict(hidden_act="relu"), "'hidden_act' = 'relu' is not served, only 'silu'"),
        ("mistral", dict(attention_bias=True), "'attention_bias'"),
        ("llama", dict(rope_parameters=None, rope_scaling=dict(type="dynamic")), "'dynamic'"),
        ("phi3", dict(rope_parameters=dict(rope_type="longrope", rope_theta=1.0)), "'longrope'"),
        (
            "llama",
            dict(rope_parameters=dict(rope_type="linear", rope_theta=1.0, factor=2.0, shift=1)),
            "rope: 'shift' = 1",
        ),
        ("gpt_oss", dict(quantization_config=dict(quant_method="fp8")), "'fp8'.* only 'mxfp4'"),
        ("llama", dict(quantization_config=dict(quant_method="mxfp4")), "'mxfp4'.* dequantised"),
        ("qwen3", dict(quantization_config={}), "'quantization_config' = {} is not served"),
        ("gpt_oss", dict(swiglu_limit=5.0), "'swiglu_limit' = 5.0"),
        ("qwen3_moe", dict(mlp_only_layers=[1]), r"'mlp_only_layers' = \[1\]"),
        ("qwen3_moe", dict(decoder_sparse_step=2), "'decoder_sparse_step' = 2"),
        ("gemma2", dict(use_bidirectional_attention=True), "'use_bidirectional_attention'"),
        ("gemma2", dict(layer_types=["full_attention", "chunked_attention"]), "'layer_types'"),
        ("smollm3", dict(no_rope_layers=[1]), "'no_rope_layers'"),
        (
            "llama",
            dict(model_type="granite"),
            "'model_type' = 'granite' is not served, only 'llama'",
        ),
        ("gemma2", dict(model_type="gemma3_text"), "'gemma3_text' is not served, only 'gemma2'"),
        ("llama", dict(is_encoder_decoder=True), "'is_encoder_decoder' = True"),
        ("mistral", dict(mlp_bias=True), "'mlp_bias' = True"),
        ("gemma3", dict(attn_logit_softcapping=4.0), "'attn_logit_softcapping' = 4.0"),
        (
            "gemma3",
            dict(layer_types=None, _sliding_window_pattern=2),
            "'_sliding_window_pattern' = 2",
        ),
        ("gemma2", dict(sliding_window_size=7), "'sliding_window_size' = 7 is not served, only"),
        ("phi3", dict(layer_types=["sliding_attention"]), "'layer_types'"),
        ("qwen3_moe", dict(layer_types=["sliding_attention"]), "'layer_types'"),
        ("phi3", dict(rope_parameters=dict(rope_type="yarn", **YARN)), "'yarn' is not served by"),
        ("llama", dict(rope_theta=5.0), "'rope_theta' = 5.0 is not served, only 1"),
        (
            "llama",
            dict(rope_parameters=None, rope_theta=9.0, rope_scaling=dict(LLAMA3, rope_theta=7.0)),
            "'rope_theta' = 9.0 is not served, only 7.0",
        ),
        (
            "llama",
            dict(rope_parameters=dict(LLAMA3, rope_theta=7.0, low_freq_factor=4.0)),
            "'rope_parameters' = .*'low_freq_factor': 4.0",
        ),
        ("llama", dict(rope_parameters=dict(rope_theta=1.0)), "'rope_parameters'"),
        (
            "llama",
            dict(rope_parameters=dict(LLAMA3, rope_theta=9.0, top_p=0.9)),
            "rope: 'top_p' = 0.9",
        ),
    ],
)
def test_what_is_not_understood_is_refused_by_file_and_key(tmp_path, family, changes, message):
    folder = changed(tmp_path, family, **changes)
    with pytest.raises(NotImplementedError, match=message) as caught:
        decoder.load(folder)
    assert str(folder / "config.json") in str(caught.value)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama", dict(hidden_size=None), "expected a key 'hidden_size'"),
        ("llama", dict(num_hidden_layers=4), r"'model\.layers\.3\.input_layernorm\.weight'"),
        ("llama", dict(intermediate_size=10), r"gate_proj\.weight' .*\(10, 24\), got \(20, 24\)"),
        ("llama", dict(num_key_value_heads=4), "config.json: .*multiple of KV heads"),
        ("llama", dict(num_attention_heads="6"), "'num_attention_heads' of type"),
        ("llama", dict(rms_norm_eps=0), "positive 'rms_norm_eps'"),
        ("llama", dict(vocab_size=True), "'vocab_size' of type"),
        ("qwen3_moe", dict(num_experts_per_tok=6), "all 5 experts .* got 6"),
        ("smollm3", dict(rope_parameters=None), "'rope_theta'"),
        ("mistral", dict(sliding_window=None), "a key 'sliding_window', the file has none"),
        ("gemma2", dict(attn_logit_softcapping=None), "'attn_logit_softcapping'"),
        ("gemma2", dict(final_logit_softcapping=None), "'final_logit_softcapping'"),
        ("gpt_oss", dict(rope_parameters=None, rope_theta=9.0), "'rope_scaling'"),
        ("phi3", dict(rope_parameters=dict(rope_theta=9.0, partial_rotary_factor=0.4)), "even"),
    ],
)
def test_sizes_that_do_not_fit_the_files_are_named(tmp_path, family, changes, message):
    with pytest.raises(CheckpointError, match=message):
        decoder.load(changed(tmp_path, family, **changes))


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama_biased", dict(attention_bias=False), r"12 tensors .*k_proj\.bias"),
        (
            "qwen3",
            dict(LLAMA, layer_types=None, **NO_WINDOW),
            r"k_norm\.weight",
        ),
    ],
)
def test_tensors_that_nobody_asked_for_are_named(tmp_path, family, changes, message):
    with pytest.raises(NotImplementedError, match=message):
        decoder.load(changed(tmp_path, family, **changes))


def test_a_folder_that_is_no_checkpoint_names_what_it_lacks(tmp_path):
    with pytest.raises(CheckpointError, match="config.json"):
        decoder.load(tmp_path)
    folder = changed(tmp_path, "llama")
    (folder / "model-00002-of-00004.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model-00002-of-00004"):
        decoder.load(folder)
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        decoder.load(folder)


def test_a_file_that_was_cut_is_an_error(tmp_path):
    path = changed(tmp_path, "qwen3") / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        decoder.load(path.parent)


def test_generate_takes_a_folder_and_ids(tmp_path):
    cases = golden("gemma3")
    (tmp_path / "in.json").write_text(
        json.dumps([dict(name=f"{i}", prompt_ids=case[0]) for i, case in enumerate(cases)])
    )
    done = run(
        *("--model", GOLDEN / "gemma3", "--ids-file", tmp_path / "in.json", "--page-size", 4),
        *("--max-new", len(cases[0][1]), "--json", tmp_path / "out.json", "--devices", 2),
    )
    assert done.returncode == 0, done.stderr
    said = json.loads((tmp_path / "out.json").read_text())
    assert [each["greedy_ids"] for each in said] == [ids for _, ids, _ in cases]
    assert "pages for windows of 5" in done.stderr and "reading" not in done.stderr
