"""What the kernel fetches, counted from its own schedule, and how rows are dealt out to cores."""

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paged_decode.kernels.pallas_tpu import pages
from paged_decode.kernels.pallas_tpu.config import Config, choose_config
from paged_decode.kernels.pallas_tpu.plan import Plan
from paged_decode.kernels.pallas_tpu.work import deal
from paged_decode.kernels.record import AttentionCall

from ...selection import for_ci
from ..oracle import Case, build, check
from .interpret import NAME

EDGES = (0, 1, 15, 16, 17, 75)
BLOCKS, CORES = f"{NAME}-blocks", f"{NAME}-cores"
CASES = {
    "ragged": Case(EDGES, 2, 3, 64, 16, 5),
    "window": Case((75, 0, 33, 80), 2, 3, 64, 16, 5, options=dict(sliding_window=20)),
    "starts": Case((75, 0, 33, 80, 5), 1, 8, 64, 16, 5, starts=(40, 0, 33, 16, 0)),
    "empty rows in front": Case((0, 0, 33, 0, 80), 1, 2, 64, 16, 5),
    "no rows see anything": Case((0, 0), 2, 3, 64, 16, 3, sinks=(6, 1)),
    "bfloat16": Case((50, 0, 3, 70), 2, 3, 128, 16, 5, dtype="bfloat16", sinks=(3,)),
    "one row": Case((150,), 4, 2, 64, 16, 10, starts=(21,)),
    "a chunk": Case((75, 0, 33, 3), 2, 3, 64, 16, 5, tokens=9, starts=(0, 0, 7, 0)),
    "a chunk, bfloat16": Case((50, 1, 3, 70), 2, 4, 128, 16, 5, tokens=16, dtype="bfloat16"),
    "a chunk in a window": Case(
        (80, 33), 2, 2, 64, 8, 10, tokens=21, sinks=(3,), options=dict(sliding_window=11)
    ),
    "int8": Case((300, 0, 130, 640), 2, 3, 64, 128, 5, starts=(140, 0, 0, 0), pages="int8"),
    "a chunk, float8": Case(
        (140, 2, 384), 2, 3, 64, 128, 3, tokens=5, dtype="bfloat16", pages="float8_e4m3fn"
    ),
}


# What the common suite has, too, with one block a row.
FOR_CI = ("bfloat16", "a chunk, bfloat16", "one row", "no rows see anything")


@pytest.mark.parametrize("backend", [BLOCKS, pytest.param(CORES, marks=pytest.mark.long)])
@pytest.mark.parametrize("name", for_ci(CASES, FOR_CI))
def test_rows_of_several_blocks_match_the_oracle(backend, name):
    check(backend, CASES[name])


def visible_pages(inputs, size, queries):
    """Every page that holds a visible token, once for each tile of queries that sees it."""
    options, seen = inputs.options, Counter()
    tokens = inputs.q.shape[1] if inputs.q.ndim == 4 else 1
    for row, length in enumerate(map(int, inputs.seq_lens)):
        start = int(options["starts"][row]) if "starts" in options else 0
        for end in range(length, length - tokens, -queries):
            lowest = max(end - queries, length - tokens)
            first = max(start, lowest - options.get("sliding_window", length) + 1, 0)
            columns = np.unique(np.arange(first, end) // size)
            seen.update(inputs.page_table[row, columns].tolist())
    return seen


@pytest.mark.parametrize(
    "backend", [NAME, *(pytest.param(each, marks=pytest.mark.long) for each in (BLOCKS, CORES))]
)
@pytest.mark.parametrize(
    "name",
    [
        *("ragged", "window", "starts", "a chunk in a window", "int8"),
        *(pytest.param(n, marks=pytest.mark.long) for n in ("a chunk", "empty rows in front")),
    ],
)
def test_the_bytes_of_the_copies_are_those_of_the_visible_pages(backend, name):
    inputs = build(CASES[name])
    kinds = "kvKV" if inputs.scales else "kv"  # keys, values, and their scales
    fetched, sizes, copies_of = Counter(), [], pages._copies

    def recorded(refs, page, slot, place):
        copies = copies_of(refs, page, slot, place)

        def start(copy, kind):
            copy.start()
            jax.debug.callback(lambda page: fetched.update([(kind, int(page))]), page)
            sizes.append(copy.dst_ref.dtype.itemsize * np.prod(copy.dst_ref.shape[-3:]))

        return tuple(
            SimpleNamespace(start=lambda copy=copy, kind=kind: start(copy, kind))
            for kind, copy in zip(kinds, copies, strict=True)
        )

    jax.clear_caches()  # the launch must be traced again
    with mock.patch.object(pages, "_copies", recorded):
        inputs.call(backend)
        jax.effects_barrier()
    jax.clear_caches()
    page_bytes = {pool[0].nbytes for pool in (inputs.k_pages, *inputs.scales.values())}
    queries = 2 if backend in (BLOCKS, CORES) else 64
    want = visible_pages(inputs, inputs.k_pages.shape[2], queries)
    assert fetched == Counter({(kind, page): n for page, n in want.items() for kind in kinds})
    assert set(sizes) == page_bytes


def dealt(lens, cores, tokens=1, queries=1):
    """The items of every core, and the item that follows each; a row has `tiles` of them."""
    sizes = dict(kv_heads=1, group=1, dim=64, page_size=16, columns=1000, dtype=jnp.float32)
    call = AttentionCall.of_sizes(rows=len(lens), tokens=tokens, **sizes)
    call = replace(call, seq_lens=jnp.asarray(lens, jnp.int32))
    config = Config(queries, fetch=1, tile=1, unroll=1, heads=1, strip=8, cores=cores)
    plan = Plan.of(call, cores, config)
    items, following = deal(call, plan)
    return np.asarray(items).reshape(cores, -1), np.asarray(following).reshape(cores, -1)


@pytest.mark.parametrize("tokens", [1, 16])
@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(s, marks=pytest.mark.long) for s in (2, 3))])
def test_two_cores_get_every_item_once_and_nearly_equal_sums(seed, tokens):
    rng = np.random.default_rng(seed)
    lens = np.minimum(rng.lognormal(6, 1.5, rng.integers(2, 40)).astype(int), 16000)
    items, _ = dealt(lens, 2, tokens, min(tokens, 4))
    # A core that is one short repeats its last item, which it does not compute again.
    own = [list(dict.fromkeys(core.tolist())) for core in items]
    tiles = max(tokens // 4, 1)
    assert sorted(own[0] + own[1]) == list(range(len(lens) * tiles))
    ends = np.maximum(np.repeat(lens, tiles) - np.tile(np.arange(tiles)[::-1] * 4, len(lens)), 0)
    sums = [ends[core].sum() for core in own]
    assert abs(sums[0] - sums[1]) <= ends.max()


def test_the_next_item_is_the_next_one_that_has_pages():
    items, following = dealt([0, 5, 0, 0, 7, 0], 1)
    assert items.tolist() == [[0, 1, 2, 3, 4, 5]]
    assert following.tolist() == [[1, 4, 4, 4, -1, -1]]


def test_tiles_in_front_of_a_short_row_have_no_work():
    _, following = dealt([3, 16, 0, 9], 1, tokens=16, queries=4)
    row = [3, 3, 3, 4, 5, 6, 7, 13, 13, 13, 13, 13, 13, 14, 15, -1]
    assert following.tolist() == [row]


@pytest.mark.parametrize("tokens", [1, 3, 256])
@pytest.mark.parametrize("columns", [1, 5, 4096])
@pytest.mark.parametrize("size", [1, 16, 256])
@pytest.mark.parametrize(
    "kv_heads,group,dim,dtype",
    [(1, 8, 128, "bfloat16"), (8, 4, 128, "bfloat16"), (32, 1, 256, "float32"),
     (8, 16, 64, "bfloat16"), (3, 5, 80, "float32")],
)  # fmt: skip
def test_every_config_fits_the_smallest_chip(columns, size, kv_heads, group, dim, dtype, tokens):
    call = AttentionCall.of_sizes(
        rows=32, kv_heads=kv_heads, group=group, dim=dim, page_size=size, columns=columns,
        tokens=tokens, dtype=jnp.dtype(dtype),
    )  # fmt: skip
    config = choose_config(call, 1)
    assert config.fetch % config.tile == 0 and 1 <= config.unroll <= config.fetch <= columns
    assert config.queries < 2 * tokens and kv_heads % config.heads == 0
    lanes = -(-dim // 128) * 128
    buffers = 4 * config.fetch * kv_heads * size * lanes * call.itemsize
    assert buffers <= 8 << 20 or config.fetch == 1
    # Two buffers of q and out, and float32 sums.
    sums = call.heads * config.queries * (4 * lanes * call.itemsize + 4 * lanes + 1024)
    assert sums <= 6 << 20 or config.queries == 1


def test_one_item_has_one_core_and_a_tiling_that_cannot_be_says_so():
    sizes = dict(kv_heads=1, group=1, dim=64, page_size=16, columns=4)
    assert choose_config(AttentionCall.of_sizes(rows=1, **sizes), 2).cores == 1
    config = choose_config(AttentionCall.of_sizes(rows=2, **sizes), 2)
    assert config.cores == 2
    for wrong in (dict(queries=3), dict(fetch=3, tile=2), dict(heads=0), dict(unroll=99)):
        with pytest.raises(ValueError, match="must be"):
            replace(config, **wrong)
