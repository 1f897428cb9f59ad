"""The shape of a model from the metadata of a GGUF file; its tensors are not looked at."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from .keys import Keys
from .shapes import LayerShape, ModelShape, alternating

__all__ = ["model_of_gguf", "read_metadata"]

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
_MAX_NESTING = 4

# Of which layers llama.cpp gives the window to all but the last of so many.
_FULL_EVERY = {"gemma2": 2, "gemma3": 6, "gpt-oss": 2}
# How a key behind the architecture begins, and what a model has where it is set.
_UNSERVED = {
    "attention.kv_lora_rank": "latent attention (MLA), which keeps one vector for all heads",
    "attention.shared_kv_layers": "layers that use the keys and values of others",
    "attention.key_length_swa": "window layers with a head dim of their own",
    "attention.chunk_size": "attention to chunks",
    "attention.indexer.": "attention to tokens that an indexer chooses",
    "nextn_predict_layers": "layers that predict later tokens",
    "decoder_block_count": "attention to another sequence",
    "full_attention_interval": "layers with a recurrent state",
    "shortconv.": "layers with a recurrent state",
    "ssm.": "layers with a recurrent state",
    "wkv.": "layers with a recurrent state",
}


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The metadata of a GGUF file, version 2 or 3, by key; arrays of strings are left out.

    Raises:
      ValueError: the file is cut, corrupt, of another version, or another kind of file.
      OSError: it cannot be read at all.
    """
    with Path(path).open("rb") as file:
        return _Header(Path(path), file).parse()


def model_of_gguf(metadata: Mapping[str, Any]) -> ModelShape:
    """The shape that a GGUF file's metadata describe.

    Raises:
      ValueError: a key is missing or cannot be.
      NotImplementedError: layers keep something else than keys and values of all tokens or of a
        window, or which of them have a window is not known.
    """
    name = metadata.get("general.architecture")
    if not isinstance(name, str):
        raise ValueError(f"expected the general.architecture of a model, got {name!r:.60}")
    prefix = f"{name}."
    keys = Keys(
        name,
        {k.removeprefix(prefix): v for k, v in metadata.items() if k.startswith(prefix)},
    )
    keys.refuse(_UNSERVED)
    num_layers = keys.count("block_count")
    heads = kv_heads = _per_layer(keys, "attention.head_count", num_layers)
    if keys.has("attention.head_count_kv"):
        kv_heads = _per_layer(keys, "attention.head_count_kv", num_layers)
    if 0 in kv_heads:
        raise NotImplementedError(
            f"{name}: layer {kv_heads.index(0)} has no KV heads, so it keeps no keys and values"
        )
    head_dim, windows = _head_dim(keys, heads), _windows(keys, num_layers)
    pairs = zip(kv_heads, windows, strict=True)
    return ModelShape(
        name,
        tuple(LayerShape(each, head_dim, window) for each, window in pairs),
        num_heads=heads[0] if len(set(heads)) == 1 else None,
        context=keys.count("context_length") if keys.has("context_length") else None,
        num_experts=keys.count("expert_count", 0) if keys.has("expert_count") else 0,
    )


def _head_dim(keys: Keys, heads: list[int]) -> int:
    if keys.has("attention.key_length"):
        head_dim = keys.count("attention.key_length")
    elif len(set(heads)) > 1 or (width := keys.count("embedding_length")) % max(heads[0], 1):
        raise ValueError(f"{keys.name}: expected attention.key_length, the head dim")
    else:
        head_dim = width // heads[0]
    if keys.values.get("attention.value_length", head_dim) != head_dim:
        raise NotImplementedError(
            f"{keys.name}: keys have {head_dim} numbers a head and values "
            f"{keys.values['attention.value_length']}; pages hold as many of both"
        )
    return head_dim


def _windows(keys: Keys, num_layers: int) -> Iterable[int | None]:
    """The window of each layer."""
    if not keys.values.get("attention.sliding_window"):
        return (None,) * num_layers
    window = keys.count("attention.sliding_window")
    every = _FULL_EVERY.get(keys.name)
    pattern = keys.values.get("attention.sliding_window_pattern", every)
    if isinstance(pattern, np.ndarray) and len(pattern) == num_layers:
        return [window if each else None for each in pattern]
    if every is None or not isinstance(pattern, int):  # some count from the first layer
        raise NotImplementedError(
            f"{keys.name} has attention.sliding_window = {window}: which of its {num_layers} "
            "layers have the window is not known; give sizes instead of a file"
        )
    return alternating(num_layers, window, pattern)


def _per_layer(keys: Keys, key: str, num_layers: int) -> list[int]:
    """One number for all layers, or one for each."""
    value = keys.values.get(key)
    if not isinstance(value, np.ndarray):
        return [keys.count(key, 0)] * num_layers
    if value.dtype.kind not in "iu" or len(value) != num_layers or value.min() < 0:
        raise ValueError(f"{keys.name}: expected {key} of {num_layers} layers, got {value!r:.60}")
    return value.tolist()


class _Header:
    """A cursor over the metadata that believes no length which the file has no room for."""

    def __init__(self, path: Path, file: BinaryIO):
        self.path, self.file = path, file
        self.left = os.fstat(file.fileno()).st_size

    def parse(self) -> dict[str, Any]:
        if (magic := self.take(4)) != b"GGUF":
            raise self.error(f"expected a GGUF file, which begins with b'GGUF', got {magic!r}")
        if (version := self.number("<I")) not in (2, 3):
            raise self.error(f"expected GGUF version 2 or 3 (little-endian), got {version}")
        self.number("<Q")  # of tensors
        metadata: dict[str, Any] = {}
        for _ in range(self.count(13)):  # bytes of the shortest entry
            key = self.take(self.number("<Q")).decode("utf-8", "replace")
            value = self.value(self.number("<I"))
            if value is not None:
                metadata[key] = value
        return metadata

    def error(self, message: str) -> ValueError:
        return ValueError(f"{self.path}: {message}")

    def take(self, num_bytes: int) -> bytes:
        data = self.file.read(num_bytes) if num_bytes <= self.left else b""
        if len(data) < num_bytes:
            raise self.error(
                f"expected {num_bytes} bytes more, got {self.left} up to the end: the file is cut "
                "short or corrupt"
            )
        self.left -= num_bytes
        return data

    def number(self, form: str) -> int:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def count(self, item_bytes: int) -> int:
        """A number of items that take at least so many bytes each."""
        number = self.number("<Q")
        if number * item_bytes > self.left:
            raise self.error(
                f"expected at most {self.left // item_bytes} items in the {self.left} bytes that "
                f"are left, got {number}: the file is cut short or corrupt"
            )
        return number

    def value(self, kind: int, depth: int = 0) -> Any:
        """A number, a string or an array of numbers; None is another array, which is passed."""
        if kind in _SCALARS:
            dtype = _SCALARS[kind]
            return np.frombuffer(self.take(dtype.itemsize), dtype)[0].item()
        if kind == _STRING:
            return self.take(self.number("<Q")).decode("utf-8", "replace")
        if kind != _ARRAY or depth == _MAX_NESTING:
            raise self.error(f"expected a value of a type from 0 to 12, got {kind} {depth} deep")
        item = self.number("<I")
        if item in _SCALARS:
            dtype = _SCALARS[item]
            return np.frombuffer(self.take(self.count(dtype.itemsize) * dtype.itemsize), dtype)
        for _ in range(self.count(8)):  # bytes of the shortest string; of an array, 12
            self.value(item, depth + 1)
        return None
