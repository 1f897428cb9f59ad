"""What a launch of the Triton kernel may be, from its plan."""

from dataclasses import replace

import pytest

from paged_decode.kernels.triton.config import Config, Shape
from paged_decode.kernels.triton.plan import plan

SHAPE = Shape(rows=4, kv_heads=2, group=1, dim=64, page_size=16, capacity=2**16, itemsize=2)
CONFIG = Config(64, 4, 2, even=64, ragged=64)


@pytest.mark.parametrize(
    "shape, config, split",
    [
        (SHAPE, CONFIG, True),
        (SHAPE, replace(CONFIG, even=2**17), False),  # programs of a KV head beyond 16 bits
        (SHAPE, replace(CONFIG, ragged=2**17), False),
        (replace(SHAPE, rows=4096, capacity=2**26), CONFIG, False),  # tiles beyond 31 bits
        (replace(SHAPE, rows=4096, capacity=2**23), CONFIG, True),
    ],
)
def test_rows_are_split_only_where_the_packed_counts_of_a_program_fit(shape, config, split):
    size = dict(dtype="bfloat16", pages=9, columns=4, scale=1.0, window=None, soft_cap=None)
    made = plan(shape, config, **size)
    assert made.constants["SPLIT"] is split
    assert split or made.grid == shape.rows * shape.kv_heads
