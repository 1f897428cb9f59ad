"""A model from the file that describes it."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from .gguf import model_of_gguf, read_metadata
from .hf import model_of_config
from .shapes import ModelShape

__all__ = ["read_model"]


def read_model(path: str | os.PathLike[str]) -> ModelShape:
    """The shape of the model in a GGUF file, a `config.json`, or a folder that has one.

    The bytes of its weights are the size of the GGUF file, unless it is one of several, or what the
    index of the safetensors files beside the `config.json` says.

    Raises:
      OSError: there is no such file.
      ValueError: it is damaged, or lacks what is asked of it.
      NotImplementedError: no pages are made for such layers.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "config.json"
    if path.suffix == ".gguf":
        metadata = read_metadata(path)
        whole = metadata.get("split.count", 1) in (0, 1)
        model = model_of_gguf(metadata)
        return replace(model, weights_bytes=path.stat().st_size if whole else None)
    model = model_of_config(_read_object(path))
    index = path.parent / "model.safetensors.index.json"
    if index.exists():
        about = _read_object(index).get("metadata")
        size = about.get("total_size") if isinstance(about, dict) else None
        if isinstance(size, int | float) and 0 < size < 2**63:
            return replace(model, weights_bytes=int(size))
    return model


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: expected a .gguf file or JSON, got neither: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got a {type(value).__name__}")
    return value
