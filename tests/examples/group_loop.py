"""A loop that runs the models of the examples over the page groups of their layers."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
from models import decoder

from paged_decode import BlockAllocator, CacheLayout, KVCache
from paged_decode.allocator.windows import most_pages
from paged_decode.faults import poison_free_pages

__all__ = ["Loop"]


class Loop:
    """A loop of one's own: prompts in chunks, then a token of each row at a time.

    The pool of a window has what all rows need at once and no page more, and what nobody owns is
    NaN before every step. With `one_group`, all layers keep all pages.
    """

    def __init__(self, path: Path, *, page_size: int, rows: int, capacity: int, one_group=False):
        self.config, self.params = decoder.load(path)
        self.columns, self.chunk = -(-capacity // page_size), 8
        window = min(most_pages(self.config.sliding_window, self.chunk, page_size), self.columns)
        pages, window_pages = (rows * columns + 1 for columns in (self.columns, window))
        self.layout = decoder.layout(
            self.config, page_size=page_size, num_pages=pages, window_pages=window_pages
        )
        if one_group:
            self.layout = CacheLayout.uniform(
                num_layers=self.config.num_layers,
                num_pages=pages,
                num_kv_heads=self.config.num_kv_heads,
                page_size=page_size,
                head_dim=self.config.head_dim,
            )
        self.model = jax.jit(decoder.make_model(self.config), donate_argnums=1)
        self.cache, self.allocator = KVCache.create(layout=self.layout), BlockAllocator(self.layout)

    def prefill(self, prompts: list[list[int]]) -> np.ndarray:
        """float32 `[B, V]` of the last token of every prompt."""
        self.handles = [self.allocator.allocate(p, chunk=self.chunk) for p in prompts]
        last: dict[int, np.ndarray] = {}
        for begin in range(0, max(map(len, prompts)), self.chunk):
            rows = [row for row, prompt in enumerate(prompts) if len(prompt) > begin]
            begins = [min(len(prompt), begin) for prompt in prompts]
            ends = [min(len(prompt), begin + self.chunk) for prompt in prompts]
            if len(self.layout.groups) > 1:
                done = self.allocator.prepare(self.handles, ends)
                self.cache = self.cache.copy_pages(tuple(each.copies for each in done))
            batch = self.allocator.batch(
                self.handles, begins, ends, tokens_per_row=self.chunk, columns=self.columns
            )
            logits = self.run(batch)
            self.allocator.commit(self.handles, ends)
            last |= {row: logits[row] for row in rows}
        return np.stack([last[row] for row in range(len(prompts))])

    def advance(self, tokens: list[int]) -> np.ndarray:
        self.cache, batch = self.cache.advance(
            self.allocator, self.handles, tokens, columns=self.columns
        )
        return self.run(batch)

    def run(self, batch) -> np.ndarray:
        self.cache = poison_free_pages(self.cache, self.allocator)
        logits, self.cache = self.model(self.params, self.cache, batch.tokens, batch)
        return np.asarray(logits)
