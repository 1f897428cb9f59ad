"""A reader for GGUF model files: metadata, tensor directory, and tensors as float32 arrays.

```
"GGUF" | version u32 | tensors u64 | entries u64
entry:   key string | type u32 | value            (string: length u64 + UTF-8)
tensor:  name string | dims u32 | dim u64 ... | type u32 | offset u64
padding to general.alignment | tensor data, each tensor aligned
```

Every count, length and offset is compared with the size of the file before anything is
allocated for it. The file is read, not mapped: one that is cut while it is open gives an error
and not a bus error.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from ml_dtypes import bfloat16

__all__ = ["GGUF", "GGUFError", "TENSOR_TYPES", "TensorInfo", "dequantise", "read_gguf"]

_SCALARS = {
    0: np.dtype("u1"),
    1: np.dtype("i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    7: np.dtype("?"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}
_STRING, _ARRAY = 8, 9
_MAX_DIMS, _MAX_NESTING = 4, 4
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")


class GGUFError(ValueError):
    """The file is not a whole, well-formed GGUF file, or does not hold what was asked for."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies.

    Attributes:
      shape: outermost axis first; a weight is `(out, in)`.
      kind: its storage format.
      offset: of its first byte in the file.
      num_bytes: stored size.
    """

    name: str
    shape: tuple[int, ...]
    kind: TensorType
    offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class GGUF:
    """An opened file: its metadata and its tensor directory; tensors are read when asked for.

    Attributes:
      path: the file.
      metadata: values by key; arrays of numbers are NumPy arrays, arrays of strings are lists.
      tensors: the directory, by name.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]

    def info(self, name: str) -> TensorInfo:
        """The directory's entry of one tensor, which must be there."""
        if name not in self.tensors:
            raise GGUFError(f"{self.path}: expected a tensor {name!r}, the file has none")
        return self.tensors[name]

    def tensor(self, name: str, shape: tuple[int, ...] | None = None) -> np.ndarray:
        """Read one tensor as float32, outermost axis first.

        Raises:
          GGUFError: there is no such tensor, its shape is not `shape`, or the file was cut.
        """
        info = self.info(name)
        if shape is not None and info.shape != shape:
            raise GGUFError(f"{self.path}: expected {name!r} of shape {shape}, got {info.shape}")
        with self.path.open("rb") as file:
            file.seek(info.offset)
            raw = np.fromfile(file, np.uint8, info.num_bytes)
        if raw.size != info.num_bytes:
            raise GGUFError(
                f"{self.path}: expected {info.num_bytes} bytes of {name!r}, got {raw.size}: "
                "the file was changed after it was opened"
            )
        return dequantise(info.kind, raw).reshape(info.shape)

    def value(self, key: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        """Metadata by key, of the expected Python type; without a default the key must exist."""
        found = self.metadata.get(key, default)
        if found is None:
            raise GGUFError(f"{self.path}: expected metadata {key!r}, the file has none")
        if not isinstance(found, kind) or (isinstance(found, bool) and kind is not bool):
            raise GGUFError(f"{self.path}: expected {key!r} of type {kind}, got {found!r:.80}")
        return found


def read_gguf(path: str | os.PathLike[str]) -> GGUF:
    """Open a GGUF file, version 2 or 3, and check its whole directory.

    Raises:
      GGUFError: the file is cut, corrupt, of another version, or another kind of file.
      NotImplementedError: a tensor is stored in a format that this reader lacks.
      OSError: it cannot be read at all.

    Example:
      >>> gguf = read_gguf("SmolLM2-135M-Instruct.Q4_1.gguf")  # doctest: +SKIP
      >>> gguf.tensor("output_norm.weight").shape  # doctest: +SKIP
      (576,)
    """
    path = Path(path)
    with path.open("rb") as file:
        return _Parser(path, file).parse()


class _Parser:
    """A cursor over the header that knows how many bytes are left."""

    def __init__(self, path: Path, file: BinaryIO):
        self.path, self.file = path, file
        self.size = os.fstat(file.fileno()).st_size
        self.left = self.size

    def parse(self) -> GGUF:
        magic = self.take(4, "the magic")
        if magic != b"GGUF":
            raise self.error(
                f"expected a GGUF file, which begins with b'GGUF', got {magic!r}; of a checkpoint "
                "in other files, give the folder"
            )
        version = self.u32("the version")
        if version not in (2, 3):
            raise self.error(f"expected GGUF version 2 or 3 (little-endian), got {version}")
        # The shortest tensor entry takes 32 bytes, the shortest metadata entry 13.
        num_tensors = self.count(32, "tensors")
        num_entries = self.count(13, "metadata entries")
        metadata: dict[str, Any] = {}
        for _ in range(num_entries):
            key = self.string("a metadata key")
            if key in metadata:
                raise self.error(f"expected each metadata key once, got {key!r} again")
            metadata[key] = self.value(self.u32(f"the type of {key!r}"), key)
        directory = [self.tensor_entry() for _ in range(num_tensors)]
        return GGUF(self.path, metadata, self.place(directory, metadata))

    def error(self, message: str) -> GGUFError:
        return GGUFError(f"{self.path}: {message}")

    def take(self, num_bytes: int, what: str) -> bytes:
        if num_bytes > self.left:
            raise self.error(
                f"expected {num_bytes} bytes for {what} at byte {self.size - self.left}, got "
                f"{self.left} up to the end: the file is cut short or corrupt"
            )
        data = self.file.read(num_bytes)
        if len(data) != num_bytes:
            raise self.error(f"expected {num_bytes} bytes for {what}, got {len(data)}")
        self.left -= num_bytes
        return data

    def u32(self, what: str) -> int:
        return _U32.unpack(self.take(4, what))[0]

    def u64(self, what: str) -> int:
        return _U64.unpack(self.take(8, what))[0]

    def count(self, item_bytes: int, what: str) -> int:
        """A number of items, of which each takes at least `item_bytes` of what is left."""
        number = self.u64(f"the number of {what}")
        if number * item_bytes > self.left:
            raise self.error(
                f"expected at most {self.left // item_bytes} {what} in the {self.left} bytes "
                f"that are left, got {number}: the file is cut short or corrupt"
            )
        return number

    def string(self, what: str) -> str:
        data = self.take(self.u64(f"the length of {what}"), what)
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise self.error(f"expected {what} in UTF-8, got {data[:40]!r}") from error

    def value(self, kind: int, key: str, depth: int = 0) -> Any:
        if kind in _SCALARS:
            dtype = _SCALARS[kind]
            return np.frombuffer(self.take(dtype.itemsize, key), dtype)[0].item()
        if kind == _STRING:
            return self.string(key)
        if kind != _ARRAY:
            raise self.error(f"expected a value type from 0 to 12 for {key!r}, got {kind}")
        if depth == _MAX_NESTING:
            raise self.error(f"expected at most {_MAX_NESTING} nested arrays in {key!r}")
        item = self.u32(f"the item type of {key!r}")
        if item in _SCALARS:
            number = self.count(_SCALARS[item].itemsize, key)
            return np.frombuffer(self.take(number * _SCALARS[item].itemsize, key), _SCALARS[item])
        number = self.count(12 if item == _ARRAY else 8, key)
        return [self.value(item, key, depth + 1) for _ in range(number)]

    def tensor_entry(self) -> tuple[str, tuple[int, ...], TensorType, int]:
        name = self.string("a tensor name")
        dims = self.u32(f"the number of axes of {name!r}")
        if not 1 <= dims <= _MAX_DIMS:
            raise self.error(f"expected 1 to {_MAX_DIMS} axes of {name!r}, got {dims}")
        shape = tuple(self.u64(f"the shape of {name!r}") for _ in range(dims))[::-1]
        kind = self.u32(f"the type of {name!r}")
        if kind not in TENSOR_TYPES:
            known = ", ".join(t.name for t in TENSOR_TYPES.values())
            raise NotImplementedError(
                f"{self.path}: {name!r} is stored as ggml type {kind}; this reader knows {known}"
            )
        return name, shape, TENSOR_TYPES[kind], self.u64(f"the offset of {name!r}")

    def place(self, directory: list, metadata: dict[str, Any]) -> dict[str, TensorInfo]:
        """Turn the directory's entries into places in the file, having checked each of them."""
        align = metadata.get("general.alignment", 32)
        if not isinstance(align, int) or align < 1 or align & (align - 1):
            raise self.error(f"expected a power of two as general.alignment, got {align!r:.80}")
        header = self.size - self.left
        start = header + -header % align
        tensors: dict[str, TensorInfo] = {}
        end, before = start, "the header"
        for name, shape, kind, offset in sorted(directory, key=lambda entry: entry[3]):
            if name in tensors:
                raise self.error(f"expected each tensor once, got {name!r} again")
            if min(shape) < 1 or shape[-1] % kind.block_size:
                raise self.error(
                    f"expected {name!r} ({kind.name}) to have axes of at least 1, the last a "
                    f"multiple of {kind.block_size}, got {shape}"
                )
            num_bytes = math.prod(shape) // kind.block_size * kind.block_bytes
            first = start + offset
            if offset % align or first < end or first + num_bytes > self.size:
                raise self.error(
                    f"expected the {num_bytes} bytes of {name!r} at a multiple of {align}, after "
                    f"{before} (which ends at {end}) and before the end of the file at "
                    f"{self.size}, got byte {first}: the file is cut short or corrupt"
                )
            tensors[name] = TensorInfo(name, shape, kind, first, num_bytes)
            end, before = first + num_bytes, repr(name)
        return tensors


# ---- the block formats of tensors, each turned into float32
#
# A quantised tensor is a run of small blocks. Every block holds a few scales and, packed, the
# integers that they multiply; each function below takes the raw blocks `uint8 [n, block_bytes]`
# and gives `float32 [n, block_size]`. Each product is rounded once, in the order of the ggml
# format's own definition, so that the values agree with other readers bit for bit.

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


def mxfp4(packed: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Numbers of 4 bits under scales 2**(s - 127), exactly: uint8 `[..., m]` and `[...]` to
    bfloat16 `[..., 2 * m]`, of every byte first its low half."""
    where = scales[..., None].astype(np.uint16) << 8 | packed
    return _two_numbers()[where].view(bfloat16)


@cache
def _two_numbers() -> np.ndarray:
    """What a byte says under a scale: two bfloat16 numbers as one uint32, `[256 * 256]`."""
    # One bit for the sign, two for the exponent, one for the mantissa.
    positive = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    number, byte = np.concatenate([positive, -positive]), np.arange(256)
    pairs = np.stack([number[byte & 15], number[byte >> 4]], axis=-1)
    with np.errstate(over="ignore"):  # of scales that no file has
        scaled = np.ldexp(pairs, np.arange(-127, 129)[:, None, None])
    return scaled.astype(bfloat16).view(np.uint32).reshape(-1)


def _mxfp4(b: np.ndarray) -> np.ndarray:
    # The low halves of all bytes come before the high ones, and no zero has a sign.
    pairs = mxfp4(b[:, 1:], b[:, 0]).reshape(-1, 16, 2)
    return pairs.swapaxes(1, 2).reshape(-1, 32).astype(np.float32) + np.float32(0)


class Mxfp4:
    """Experts' matrices of 4 bits in two tensors, as one `(X, in, out)` in bfloat16, exactly.

    32 numbers along `in` share a scale, of 2**(s - 127): uint8 `(X, out, in / 32)`. Of the two in
    a byte, the first is in the low bits: uint8 `(X, out, in / 32, 16)`.
    """

    def __init__(self, name: str, blocks: Any, scales: Any):
        packed, shape = blocks.get_shape(), scales.get_shape()
        kinds = blocks.get_dtype(), scales.get_dtype()
        if packed != [*shape, 16] or len(shape) != 3 or kinds != ("U8", "U8"):
            raise ValueError(f"{name!r} of blocks {packed}, scales {shape}, dtypes {kinds}")
        self.blocks, self.scales = blocks, scales

    def get_shape(self) -> list[int]:
        experts, out, count = self.scales.get_shape()
        return [experts, 32 * count, out]

    def get_dtype(self) -> str:
        return "BF16"

    def __getitem__(self, every: slice) -> np.ndarray:
        with ThreadPoolExecutor() as pool:  # experts side by side
            rows = pool.map(mxfp4, self.blocks[every], self.scales[every])
            return np.stack([each.reshape(len(each), -1) for each in rows]).swapaxes(1, 2)


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
