"""The same scenarios in the first of two groups of layers: a window beside changes none of them."""

from __future__ import annotations

import pytest

from paged_decode.allocator import BlockAllocator, CacheLayout, DecodeBatch, PageSpec

from . import test_scenarios
from .test_scenarios import *  # noqa: F403
from .test_scenarios import TestTruncation as Truncation


def of_first(batch: DecodeBatch) -> DecodeBatch:
    return DecodeBatch(batch.tokens, batch.seq_lens, batch.positions, batch.groups[:1])


class Beside(BlockAllocator):
    """An allocator of two groups that shows what is of the first one."""

    window = 0

    def __init__(self, num_pages, page_size, **options):
        kinds = dict(num_kv_heads=1, head_dim=8)
        full = PageSpec((0,), num_pages=num_pages, **kinds)
        windowed = PageSpec((1,), num_pages=4096, window=self.window, **kinds)
        super().__init__(CacheLayout(page_size, (full, windowed)), **options)

    def advance(self, *args, **options):
        batch, copies = super().advance(*args, **options)
        return of_first(batch), copies[0]

    def append(self, *args, **options):
        return super().append(*args, **options)[0]

    def reserve(self, *args, **options):
        return super().reserve(*args, **options)[0]

    def batch(self, *args, **options):
        return of_first(super().batch(*args, **options))

    def trim(self, handles):
        return super().trim(handles) // 2  # as many pages in either group


@pytest.fixture(autouse=True, params=[6, 64], ids="window {}".format)
def beside(request, monkeypatch):
    """`make` in the scenarios makes this one; a window of 64 passes nothing in them."""
    monkeypatch.setattr(Beside, "window", request.param)
    monkeypatch.setattr(test_scenarios, "BlockAllocator", Beside)


@pytest.mark.parametrize("beside", [64], indirect=True, ids="window {}".format)
class TestTruncation(Truncation):
    """What a smaller window has passed is not truncated: `test_windows.py` has that rule."""
