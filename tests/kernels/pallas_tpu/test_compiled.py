"""The compiler for TPUs accepts the kernels, copies no pool, spills no register. No TPU is needed.

`benchmarks/_tpu_aot.py` compiles, in a process for each generation; `libtpu` comes with the `tpu`
extra, or by itself as `.ci/run` installs it.
"""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "benchmarks"))

from _tpu_aot import GENERATIONS, INSTALLED, Case, compile_all  # noqa: E402

pytestmark = pytest.mark.skipif(
    not INSTALLED, reason="needs libtpu: pip install 'paged-decode[tpu]', see .ci/run"
)

OPTIONS = dict(window=100, soft_cap=30.0, starts=True, sinks=True)
EIGHT = dict(page_size=128, columns=32, pages=512)  # bits
INT8, FLOAT8 = dict(dtype="int8", **EIGHT), dict(dtype="float8_e4m3fn", **EIGHT)
FEW = {
    "Llama 8B": Case(),
    "every option, float32": Case(dtype="float32", page_size=8, **OPTIONS),
    "append, stacked": Case(system="ours/append", layers=4, pages=1024, **OPTIONS),
    "write, stacked": Case(system="ours/write", layers=4, pages=1024),
    "a scan over layers": Case(system="ours/scan", layers=4, pages=1024),
    "heads on 4 devices": Case(shards=4),
    "append on 4 devices": Case(system="ours/append", shards=4),
    "a table larger than SMEM": Case(rows=256, columns=1024),
    "D 64": Case(dim=64, kv_heads=8, group=8),
    "8 drafts": Case(tokens=8),
    "append of a chunk, stacked": Case(
        system="ours/append", layers=4, pages=1024, rows=2, tokens=256, **OPTIONS
    ),
    "a chunk, every option, float32": Case(
        dtype="float32", page_size=8, rows=2, tokens=64, **OPTIONS
    ),
    "int8": Case(**INT8),
    "int8, every option, float32 queries": Case(q_dtype="float32", **INT8, **OPTIONS),
    "append, int8, stacked": Case(system="ours/append", layers=4, **INT8, **OPTIONS),
    "append, float8, stacked": Case(system="ours/append", layers=4, **FLOAT8, **OPTIONS),
    "a scan over layers of int8": Case(system="ours/scan", layers=4, **INT8),
    "append of a chunk, float8, stacked": Case(
        system="ours/append", layers=4, rows=2, tokens=256, **FLOAT8, **OPTIONS
    ),
    "append of a chunk, int8, no stack": Case(
        system="ours/append", layers=0, rows=2, tokens=64, **INT8
    ),
    "append of int8 on 4 devices": Case(system="ours/append", shards=4, **INT8),
}
MANY = {
    **{f"G {group}": Case(group=group, kv_heads=2) for group in (1, 3, 5, 7, 16, 128)},
    **{f"D {dim}": Case(dim=dim, kv_heads=4) for dim in (80, 96, 256)},
    **{f"page {size}": Case(page_size=size, kv_heads=2) for size in (1, 2, 4, 8, 24, 256)},
    "MHA": Case(kv_heads=32, group=1, pages=1024),
    "one head of a split 70B": Case(kv_heads=1, group=8),
    "gpt-oss": Case(dim=64, window=128, sinks=True, group=8),
    "append, pages of 256": Case(system="ours/append", page_size=256, pages=256),
    "append, float32, D 64": Case(system="ours/append", dtype="float32", dim=64),
    "write, float32": Case(system="ours/write", dtype="float32", page_size=64, pages=1024),
    "write a chunk on 4 devices": Case(system="ours/write", layers=4, tokens=16, shards=4),
    "float32 queries over bfloat16": Case(q_dtype="float32"),
    "one row": Case(rows=1),
    "the widest table": Case(rows=4, columns=49000),
    "an odd number of rows": Case(rows=7),
    "a chunk": Case(rows=2, tokens=256),
    "a chunk of MHA": Case(kv_heads=32, group=1, pages=1024, rows=2, tokens=256),
    "a chunk of one head": Case(kv_heads=1, group=8, rows=2, tokens=256),
    "a chunk on 4 devices": Case(rows=2, tokens=256, shards=4),
    "a chunk, float32 queries over bfloat16": Case(q_dtype="float32", rows=2, tokens=64),
    **{f"T {tokens}": Case(rows=2, tokens=tokens, group=3, kv_heads=2) for tokens in (2, 3, 5, 17)},
    **{f"T 16, D {dim}": Case(rows=2, dim=dim, kv_heads=4, tokens=16) for dim in (64, 80, 96, 256)},
    **{
        f"T 16, page {size}": Case(rows=2, page_size=size, kv_heads=2, tokens=16)
        for size in (1, 4, 24, 256)
    },
    **{
        f"T 16, G {group}": Case(rows=2, group=group, kv_heads=2, tokens=16)
        for group in (1, 5, 16, 128)
    },
    "write, int8, stacked": Case(system="ours/write", layers=4, **INT8),
    "write, float8, of one head": Case(system="ours/write", layers=4, kv_heads=1, **FLOAT8),
    "append, float8, float32 queries": Case(system="ours/append", q_dtype="float32", **FLOAT8),
    "append, int8, MHA": Case(system="ours/append", kv_heads=32, group=1, layers=2, **INT8),
    "append of a chunk, int8, one head": Case(
        system="ours/append", kv_heads=1, group=8, rows=2, tokens=256, **INT8
    ),
    "append, int8, pages of 256": Case(system="ours/append", **INT8 | dict(page_size=256)),
    "append, int8, the largest pages": Case(
        system="ours/append", kv_heads=31, group=1, dim=256, layers=1, **INT8 | dict(page_size=256)
    ),
    **{
        f"append, int8, {heads} heads": Case(system="ours/append", kv_heads=heads, **INT8)
        for heads in (1, 2, 3, 4, 5, 12)
    },
    **{
        f"append, float8, D {dim}": Case(system="ours/append", dim=dim, kv_heads=4, **FLOAT8)
        for dim in (64, 80, 96, 256)
    },
}


def check(generation: str, cases: dict[str, Case]) -> None:
    answers = dict(zip(cases, compile_all(generation, list(cases.values())), strict=True))
    wrong = {name: answer["error"] for name, answer in answers.items() if "error" in answer}
    assert not wrong
    for name, case in cases.items():
        answer, where = answers[name], (generation, name)
        pool_bytes = _pool_bytes(case)
        # Tables and queries may be copied; the keys of one layer would be an eighth or more.
        assert answer["temp_bytes"] < pool_bytes / 32, where
        assert answer["alias_bytes"] == (0 if case.system == "ours" else pool_bytes), where
        assert answer["collectives"] == 0, where
        allowed = answer.get("bundles", 0) // 2 if _may_spill(generation, case) else 0
        assert answer.get("spills", 0) <= allowed, (where, answer["spills"])


def _pool_bytes(case: Case) -> int:
    """Of keys and values and their scales on one device, as a TPU lays them out."""
    tokens = max(case.layers, 1) * case.pages * case.page_size
    heads = case.kv_heads // case.shards
    lanes = -(-case.dim // 128) * 128
    itemsize = 1 if case.scaled else 4 if case.dtype == "float32" else 2
    sublanes = min(1 << (heads - 1).bit_length(), 8)
    scales = 4 * -(-heads // sublanes) * sublanes if case.scaled else 0
    return 2 * tokens * (heads * lanes * itemsize + scales)


def _may_spill(generation: str, case: Case) -> bool:
    """What is known to spill, and told in docs/backends.md."""
    if case.scaled and generation == "v4":  # which has no instructions to unpack bytes
        return True
    if case.tokens > 1:  # a head's tile at a time, scheduled as a whole: fewer bundles all the same
        return True
    small_pages = case.page_size < 8  # gathered into registers, some by way of memory
    exact = "float32" in (case.dtype, case.q_dtype)
    return small_pages or case.group > 64 or (generation == "v4" and exact)


def test_v5e_takes_the_kernels_as_they_are():
    check("v5e", FEW)


@pytest.mark.slow
@pytest.mark.parametrize("generation", [name for name in GENERATIONS if name != "v5e"])
def test_every_generation_takes_the_kernels_as_they_are(generation):
    check(generation, FEW)


@pytest.mark.slow
def test_every_shape_of_the_contract_compiles():
    check("v6e", MANY)


def test_a_kernel_that_spills_and_a_pool_that_is_copied_are_caught():
    """The checker is on trial: XLA's scatter into a stacked pool, and a peer that spills."""
    scatter = Case(system="xla/scan", layers=4, pages=1024)
    peer = Case(system="jax/ragged", block=dict(pages=32, queries=8))
    copied, spilt = compile_all("v5e", [scatter, peer])
    assert copied["temp_bytes"] > 2 * 1024 * 8 * 16 * 128 * 2
    assert spilt["spills"] > 0


def test_a_refusal_is_an_answer():
    (answer,) = compile_all("v5e", [Case(rows=10**5)])
    assert "B = 100000 rows of T = 1 with P = 256 columns need" in answer["error"]
