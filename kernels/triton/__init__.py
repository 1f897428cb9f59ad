"""Paged decode attention as one Triton kernel, for NVIDIA GPUs, called through jax-triton."""

from .call import append_and_attend, attend, attend_joined, refusal

__all__ = ["append_and_attend", "attend", "attend_joined", "refusal"]
