"""The Triton kernel, interpreted: what the common suite cannot see from outside one launch.

Small tiles cut every row of these cases into several programs, so partial results and merges are
on trial; and each variant runs its programs in an order of its own.
"""

import numpy as np
import pytest

from ...selection import for_ci
from ..oracle import Case, build, check, same_bits
from .interpret import INSTALLED, NAME, worker

pytestmark = pytest.mark.skipif(not INSTALLED, reason="triton has no wheel for this platform")

SPLIT, OTHER_CARD = f"{NAME}-split", f"{NAME}-other-card"
EDGES = (0, 1, 15, 16, 17, 75)

CASES = {
    "ragged": Case(EDGES, 2, 3, 64, 16, 5),
    "even": Case((77, 80, 79), 2, 4, 64, 16, 5),
    "one row": Case((150,), 4, 2, 64, 16, 10, starts=(21,)),
    "one row of one page": Case((3,), 2, 1, 64, 4, 1),
    "starts behind tiles": Case((100, 40, 150), 2, 2, 64, 16, 10, starts=(37, 0, 100)),
    "window": Case((100, 0, 150), 2, 2, 16, 1, 150, options=dict(sliding_window=77)),
    "starts past the end": Case((64, 1, 90), 2, 8, 16, 64, 2, starts=(70, 0, 95)),
    "all options, float16": Case(
        (70, 0, 3, 140),
        2,
        5,
        80,
        16,
        9,
        dtype="float16",
        starts=(0, 0, 2, 90),
        sinks=(10, 2),
        options=dict(sliding_window=60, soft_cap=2.0, scale=0.4),
    ),  # fmt: skip
    "even, but for empty rows": Case((0, 77, 0, 80, 79, 0), 2, 4, 64, 16, 5),
    "bfloat16": Case((50, 0, 3, 70), 2, 3, 128, 16, 5, dtype="bfloat16", sinks=(3,)),
    "D 256": Case((40, 64), 2, 1, 256, 32, 2, dtype="float16"),
    "D 96": Case((40, 64), 2, 7, 96, 32, 2),
    "pages of 256": Case((300, 1), 2, 1, 64, 256, 2),
    "many rows": Case(tuple(range(0, 40, 3)), 2, 1, 16, 8, 5),
    "no rows see anything": Case((0, 0), 2, 3, 64, 16, 3, sinks=(6, 1)),
}


# One shape of tiles more.
FOR_CI = ("even", "one row of one page", "D 96", "pages of 256", "many rows", "bfloat16")


@pytest.mark.parametrize("name", for_ci(CASES, FOR_CI))
def test_rows_cut_into_programs_match_the_oracle(name):
    check(SPLIT, CASES[name])


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_the_default_for_a_card_without_a_table_matches_the_oracle(dtype):
    check(OTHER_CARD, Case(EDGES, 2, 3, 64, 16, 5, dtype=dtype))


@pytest.mark.parametrize("backend", [pytest.param(NAME, marks=pytest.mark.long), SPLIT])
@pytest.mark.parametrize("name", ["ragged", "one row", "all options, float16"])
def test_no_bit_depends_on_which_program_comes_last(backend, name):
    inputs = build(CASES[name])
    same_bits(inputs.call(f"{backend}-other-order"), inputs.call(backend))


def test_poison_and_page_order_change_no_bit_of_a_cut_row():
    case = CASES["all options, float16"]
    clean = build(case).call(SPLIT)
    for fill in (np.nan, np.inf):
        same_bits(build(case, fill=fill, order=3).call(SPLIT), clean)


def test_poison_in_front_of_starts_changes_no_bit_of_a_cut_row():
    inputs = build(CASES["starts behind tiles"])
    clean = inputs.call(SPLIT)
    for row, start in enumerate(inputs.options["starts"]):
        inputs.poison(row, range(start), np.nan)
    same_bits(inputs.call(SPLIT), clean)


# With T > 1 the page lies behind what the first tile of the row sees.
BROKEN = {
    "T = 1": (Case((40, 64, 2, 0), 2, 3, 16, 4, 16), 9),
    "several tiles": (Case((40, 64, 9, 0), 1, 3, 16, 4, 16, tokens=30), 15),
}


@pytest.mark.parametrize("name", BROKEN)
def test_all_queries_of_a_broken_row_are_nan_and_the_others_keep_their_bits(name):
    import jax

    from paged_decode.kernels import paged_attention

    case, column = BROKEN[name]
    inputs = build(case)
    call = jax.jit(lambda *a: paged_attention(*a, return_lse=True, implementation=SPLIT))
    arrays = [inputs.q, inputs.k_pages, inputs.v_pages, inputs.page_table, inputs.seq_lens]
    clean, others = [np.asarray(array) for array in call(*arrays)], np.array([0, 2, 3])

    def check_broken(*tables):
        broken = [np.asarray(array) for array in call(*arrays[:3], *tables)]
        assert all(np.isnan(array[1]).all() for array in broken)
        same_bits([a[others] for a in broken], [a[others] for a in clean])

    for page in (len(inputs.k_pages), -1):
        table = inputs.page_table.copy()
        table[1, column] = page
        check_broken(table, inputs.seq_lens)
    past_the_table = np.where(np.arange(4) == 1, 65, inputs.seq_lens).astype(np.int32)
    check_broken(inputs.page_table, past_the_table)


def test_the_interpreter_stays_in_its_own_process():
    import os

    import triton

    from paged_decode.kernels.triton.decode import decode_kernel

    check(NAME, Case((3, 1)))
    assert "TRITON_INTERPRET" not in os.environ and not triton.knobs.runtime.interpret
    assert type(decode_kernel).__name__ == "JITFunction"


def test_an_address_outside_the_arrays_is_caught():
    """The worker is on trial: an address one number too far, and a write into an input."""
    from concurrent.futures import ProcessPoolExecutor

    from . import faults, interpret

    pool: ProcessPoolExecutor = interpret._worker()
    where, ones = (faults.__name__, "read_next"), np.ones(8, np.float32)
    with pytest.raises(Exception, match="lie outside all the arrays"):
        pool.submit(worker.run, *where, [ones], [((8,), "float32")], 1, dict(N=9), 0).result()
    with pytest.raises(AssertionError, match="input 0 of scribble was changed"):
        where = (faults.__name__, "scribble")
        pool.submit(worker.run, *where, [ones], [((8,), "float32")], 1, dict(N=8), 0).result()
