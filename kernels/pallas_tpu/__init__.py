"""Paged attention for TPUs: one Pallas kernel for every T, compiled by Mosaic.

`decode.py` and `tail.py` of the other kernels are one file here, `decode_tail.py`: a step attends
with a tile of a row's queries, and one token is the tile of one. How pages come and go is in
`pages.py`, the products and the softmax of a tile of pages in `softmax.py`.
"""

from .call import append_and_attend, attend, refusal

__all__ = ["append_and_attend", "attend", "refusal"]
