"""The block formats of GGUF tensors, each turned into float32.

A quantised tensor is a run of small blocks. Every block holds a few scales and, packed, the
integers that they multiply; each function below takes the raw blocks `uint8 [n, block_bytes]`
and gives `float32 [n, block_size]`. Each product is rounded once, in the order of the ggml
format's own definition, so that the values agree with other readers bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

__all__ = ["TENSOR_TYPES", "TensorType", "dequantise"]

# Blocks converted at once: small enough that the temporaries stay in the processor's cache.
_SLAB_BYTES = 1 << 18


class TensorType(NamedTuple):
    """A storage format: `block_size` values take `block_bytes` bytes."""

    name: str
    block_size: int
    block_bytes: int
    decode: Callable[[np.ndarray], np.ndarray]


def dequantise(kind: TensorType, raw: np.ndarray) -> np.ndarray:
    """Turn raw bytes of whole blocks, uint8 `[n * block_bytes]`, into float32 `[n * block_size]`.

    Example:
      >>> dequantise(TENSOR_TYPES[1], np.float16([1, 2.5]).view(np.uint8))
      array([1. , 2.5], dtype=float32)
    """
    blocks = raw.reshape(-1, kind.block_bytes)
    out = np.empty((len(blocks), kind.block_size), np.float32)
    slab = max(1, _SLAB_BYTES // kind.block_bytes)
    with np.errstate(all="ignore"):  # an odd scale (NaN, Inf) is the file's own affair
        for i in range(0, len(blocks), slab):
            out[i : i + slab] = kind.decode(blocks[i : i + slab])
    return out.reshape(-1)


def _f16(blocks: np.ndarray, at: int) -> np.ndarray:
    """The half-precision number at byte `at` of every block, as float32 `[n, 1]`."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").astype(np.float32)


def _nibbles(packed: np.ndarray) -> np.ndarray:
    """Split bytes `[..., m]` into `[..., 2 * m]`: first all low halves, then all high halves."""
    return np.concatenate([packed & 15, packed >> 4], axis=-1)


def _fifth_bits(blocks: np.ndarray, at: int) -> np.ndarray:
    """The 32 bits at byte `at`, worth 16 each: uint8 `[n, 32]`."""
    return np.unpackbits(blocks[:, at : at + 4], axis=1, bitorder="little") << 4


def _f32(b: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(b).view("<f4")


def _half(b: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(b).view("<f2")


def _bf16(b: np.ndarray) -> np.ndarray:
    return (np.ascontiguousarray(b).view("<u2").astype(np.uint32) << 16).view(np.float32)


def _q4_0(b: np.ndarray) -> np.ndarray:
    return (_nibbles(b[:, 2:]).astype(np.float32) - 8) * _f16(b, 0)


def _q4_1(b: np.ndarray) -> np.ndarray:
    return _nibbles(b[:, 4:]).astype(np.float32) * _f16(b, 0) + _f16(b, 2)


def _q5_0(b: np.ndarray) -> np.ndarray:
    q = _nibbles(b[:, 6:]) | _fifth_bits(b, 2)
    return (q.astype(np.float32) - 16) * _f16(b, 0)


def _q5_1(b: np.ndarray) -> np.ndarray:
    q = _nibbles(b[:, 8:]) | _fifth_bits(b, 4)
    return q.astype(np.float32) * _f16(b, 0) + _f16(b, 2)


def _q8_0(b: np.ndarray) -> np.ndarray:
    return b[:, 2:].view(np.int8).astype(np.float32) * _f16(b, 0)


def _k_scales(b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The 8 scales and 8 minima of a K-block, float32 `[n, 8]` each.

    They are 6-bit numbers in 12 bytes: the first four of each have a byte of their own, whose
    two spare bits are the top of the other four; these share the last four bytes, half each.
    """
    low, mid, high = b[:, 4:8], b[:, 8:12], b[:, 12:16]
    scale = np.concatenate([low & 63, (high & 15) | (low >> 6 << 4)], axis=1)
    minimum = np.concatenate([mid & 63, (high >> 4) | (mid >> 6 << 4)], axis=1)
    return _f16(b, 0) * scale.astype(np.float32), _f16(b, 2) * minimum.astype(np.float32)


def _k_affine(b: np.ndarray, q: np.ndarray) -> np.ndarray:
    """scale * q - minimum for eight runs of 32 integers `[n, 8, 32]`."""
    scale, minimum = _k_scales(b)
    x = scale[:, :, None] * q.astype(np.float32) - minimum[:, :, None]
    return x.reshape(len(b), 256)


def _q4_k(b: np.ndarray) -> np.ndarray:
    return _k_affine(b, _nibbles(b[:, 16:].reshape(-1, 4, 32)).reshape(-1, 8, 32))


def _q5_k(b: np.ndarray) -> np.ndarray:
    q = _nibbles(b[:, 48:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    fifth = b[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & 1
    return _k_affine(b, q | fifth << 4)


def _q6_k(b: np.ndarray) -> np.ndarray:
    # Two halves of 128 values: 64 bytes of low nibbles and 32 bytes of four 2-bit tops each.
    low = _nibbles(b[:, :128].reshape(-1, 2, 64)).reshape(-1, 2, 4, 32)
    shift = np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    top = b[:, 128:192].reshape(-1, 2, 1, 32) >> shift & 3
    q = (low | top << 4).reshape(-1, 16, 16).astype(np.float32) - 32
    scale = _f16(b, 208) * b[:, 192:208].view(np.int8).astype(np.float32)
    return (scale[:, :, None] * q).reshape(len(b), 256)


def _mxfp4(b: np.ndarray) -> np.ndarray:
    # Numbers of 1, 2 and 1 bits for sign, exponent and mantissa; twice their values are whole.
    steps = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.float32)
    scale = np.ldexp(np.float32(1), b[:, :1].astype(np.int32) - 128)
    return scale * steps[_nibbles(b[:, 1:])]


TENSOR_TYPES: dict[int, TensorType] = {
    0: TensorType("F32", 1, 4, _f32),
    1: TensorType("F16", 1, 2, _half),
    2: TensorType("Q4_0", 32, 18, _q4_0),
    3: TensorType("Q4_1", 32, 20, _q4_1),
    6: TensorType("Q5_0", 32, 22, _q5_0),
    7: TensorType("Q5_1", 32, 24, _q5_1),
    8: TensorType("Q8_0", 32, 34, _q8_0),
    12: TensorType("Q4_K", 256, 144, _q4_k),
    13: TensorType("Q5_K", 256, 176, _q5_k),
    14: TensorType("Q6_K", 256, 210, _q6_k),
    30: TensorType("BF16", 1, 2, _bf16),
    39: TensorType("MXFP4", 32, 17, _mxfp4),
}
