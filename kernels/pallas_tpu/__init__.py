"""Paged decode attention for TPUs: one Pallas kernel, compiled by Mosaic."""

from .call import append_and_attend, attend, refusal

__all__ = ["append_and_attend", "attend", "refusal"]
