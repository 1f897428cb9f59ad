"""What the kernel fetches, counted from its own schedule, and how rows are dealt out to cores."""

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paged_decode.kernels.pallas_tpu import call as library
from paged_decode.kernels.pallas_tpu import kernel
from paged_decode.kernels.pallas_tpu.config import Shape, choose_config
from paged_decode.kernels.record import AttentionCall

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
}


@pytest.mark.parametrize("backend", [BLOCKS, pytest.param(CORES, marks=pytest.mark.long)])
@pytest.mark.parametrize("name", CASES)
def test_rows_of_several_blocks_match_the_oracle(backend, name):
    check(backend, CASES[name])


def visible_pages(inputs, size):
    """Every page that holds a visible token, once for each row that sees it."""
    options, seen = inputs.options, Counter()
    for row, length in enumerate(map(int, inputs.seq_lens)):
        first = int(options["starts"][row]) if "starts" in options else 0
        first = max(first, length - options.get("sliding_window", length))
        tokens = np.arange(first, length)
        seen.update(inputs.page_table[row, np.unique(tokens // size)].tolist())
    return seen


@pytest.mark.parametrize(
    "backend", [NAME, *(pytest.param(each, marks=pytest.mark.long) for each in (BLOCKS, CORES))]
)
@pytest.mark.parametrize("name", ["ragged", "window", "starts", "empty rows in front"])
def test_the_bytes_of_the_copies_are_those_of_the_visible_pages(backend, name):
    inputs = build(CASES[name])
    fetched, sizes, copies_of = Counter(), [], kernel._copies

    def recorded(refs, static, page, slot, place):
        copies = copies_of(refs, static, page, slot, place)

        def start(copy, kind):
            copy.start()
            jax.debug.callback(lambda page: fetched.update([(kind, int(page))]), page)
            sizes.append(copy.dst_ref.dtype.itemsize * np.prod(copy.dst_ref.shape[-3:]))

        return tuple(
            SimpleNamespace(start=lambda copy=copy, kind=kind: start(copy, kind))
            for kind, copy in zip("kv", copies, strict=True)
        )

    jax.clear_caches()  # the launch must be traced again
    with mock.patch.object(kernel, "_copies", recorded):
        inputs.call(backend)
        jax.effects_barrier()
    jax.clear_caches()
    page_bytes = inputs.k_pages[0].nbytes
    want = visible_pages(inputs, inputs.k_pages.shape[2])
    assert fetched == Counter({(kind, page): n for page, n in want.items() for kind in "kv"})
    assert set(sizes) == {page_bytes}


def dealt(lens, cores):
    rows = len(lens)
    call = AttentionCall(
        q=jnp.zeros((rows, 1, 1, 64)),
        k_pages=jnp.zeros((1, 2, 1, 16, 64)),
        v_pages=jnp.zeros((1, 2, 1, 16, 64)),
        layer=jnp.int32(0),
        page_table=jnp.zeros((rows, 1000), jnp.int32),
        seq_lens=jnp.asarray(lens, jnp.int32),
        starts=None,
        sink=None,
        scale=1.0,
        window=None,
        soft_cap=None,
        platform="tpu",
    )
    rows, following = library.deal(call, cores, False)
    return np.asarray(rows).reshape(cores, -1), np.asarray(following).reshape(cores, -1)


@pytest.mark.parametrize("seed", range(4))
def test_two_cores_get_every_row_once_and_nearly_equal_sums(seed):
    rng = np.random.default_rng(seed)
    lens = np.minimum(rng.lognormal(6, 1.5, rng.integers(2, 40)).astype(int), 16000)
    rows, _ = dealt(lens, 2)
    # A core that is one short repeats its last row, which it does not compute again.
    own = [list(dict.fromkeys(core.tolist())) for core in rows]
    assert sorted(own[0] + own[1]) == list(range(len(lens)))
    sums = [lens[core].sum() for core in own]
    assert abs(sums[0] - sums[1]) <= lens.max()


def test_the_next_row_is_the_next_one_that_has_pages():
    rows, following = dealt([0, 5, 0, 0, 7, 0], 1)
    assert rows.tolist() == [[0, 1, 2, 3, 4, 5]]
    assert following.tolist() == [[1, 4, 4, 4, -1, -1]]


@pytest.mark.parametrize("columns", [1, 5, 4096])
@pytest.mark.parametrize("size", [1, 16, 256])
@pytest.mark.parametrize(
    "kv_heads,group,dim,itemsize", [(1, 8, 128, 2), (8, 4, 128, 2), (32, 1, 256, 4), (8, 16, 64, 1)]
)
def test_every_config_fits_the_smallest_chip(columns, size, kv_heads, group, dim, itemsize):
    shape = Shape(32, kv_heads, group, dim, size, columns, itemsize)
    config = choose_config(shape)
    assert config.fetch % config.tile == 0 and 1 <= config.unroll <= config.fetch <= columns
    assert choose_config(replace(shape, rows=1, cores=2)).cores == 1
    lanes = -(-dim // 128) * 128
    buffers = 4 * config.fetch * kv_heads * size * lanes * itemsize
    assert buffers <= 8 << 20 or config.fetch == 1
