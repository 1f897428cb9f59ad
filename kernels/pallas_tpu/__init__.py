"""Paged attention for TPUs: one Pallas kernel for every T, compiled by Mosaic.

`decode.py` and `tail.py` of the other kernels are one file here, `decode_tail.py`: a step attends
with a tile of a row's queries, and one token is the tile of one. How pages come and go is in
`pages.py`, the products and the softmax of a tile of pages in `softmax.py`.

Pages of 8 bits come with their scales, `[Hk, S]` of a page in one copy more. S must be a multiple
of 128: a TPU gives each row of float32 whole rows of 128 lanes, so the scales of a page of 16
would take eight times their bytes, and XLA, which avoids that, lays them out with the pages along
the lanes, where no copy can take those of one page.
"""

from .call import append_and_attend, attend, refusal

__all__ = ["append_and_attend", "attend", "refusal"]
