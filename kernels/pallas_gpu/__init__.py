"""Paged attention for Hopper in Pallas Mosaic GPU: TMA, a loading warpgroup, wgmma."""

from .call import attend, prefers, refusal

__all__ = ["attend", "prefers", "refusal"]
