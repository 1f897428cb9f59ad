"""Paged decode attention for Hopper in Pallas Mosaic GPU: TMA, a loading warpgroup, wgmma."""

from .call import attend, refusal

__all__ = ["attend", "refusal"]
