"""Paged decode attention as one Triton kernel, for NVIDIA GPUs, called through jax-triton."""

from .call import attend, refusal

__all__ = ["attend", "refusal"]
