"""From a folder with config.json and safetensors, or a GGUF file, to a pytree of weights.

A family says what its layers have and how that is called; what is read, it is read here. One layer
at a time goes to the device, or to several, so the host never holds many.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain
from os import PathLike
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from .config import ModelConfig
from .families import CheckpointError, Recipe, Stored, read_object, read_recipe
from .gguf_families import read_gguf_recipe
from .gguf_reader import GGUF, mxfp4, read_gguf
from .parallel import split_params

__all__ = ["CheckpointError", "Params", "Safetensors", "load", "pieces"]

Params = dict[str, Any]


def load(
    path: str | PathLike[str],
    dtype: Any = "float32",
    *,
    mesh: Mesh | None = None,
    shown: Callable[[range], Iterable[int]] = iter,
) -> tuple[ModelConfig, Params]:
    """Read a checkpoint's folder, or a GGUF file, and convert its weights to `dtype`.

    Matrices are laid out `[in, out]`, and those that read the same input lie side by side: of
    all layouts tried with XLA on a CPU, one `[in, out]` product of all of them streams the weights
    fastest, for one row and for several. The embedding is `[E, V]`, so that a model whose
    output head is tied to it holds one copy. Norms and sinks are float32, as all that they are
    used with. With `mesh`, every device gets its own part (`parallel.py`), layer by layer. `shown`
    may show how far it is, as a bar of progress does.

    Raises:
      CheckpointError, GGUFError: something is missing or broken, or does not fit the sizes.
      NotImplementedError: another architecture, or anything that is not understood.
    """
    path = Path(path)
    if path.is_dir():
        recipe = read_recipe(path)
        source = Safetensors(path, mxfp4=recipe.mxfp4)
    else:
        source = read_gguf(path)
        recipe = read_gguf_recipe(source)
    config = recipe.config
    put = jax.device_put if mesh is None else partial(split_params, config, mesh=mesh)
    reader = _Reader(source, recipe, jnp.dtype(dtype))
    reader.check_names()
    params = put(reader.parameters())
    params["layers"] = [put(reader.parameters(n)) for n in shown(range(config.num_layers))]
    return config, params


class Safetensors:
    """The tensors of a folder, in one file or in several with an index; files are mapped.

    With `mxfp4`, two tensors, `*_blocks` and `*_scales`, are shown as the one that they stand for.

    Raises:
      CheckpointError: no such files, or one that is broken or not what the index says.
    """

    def __init__(self, path: Path, *, mxfp4: bool = False):
        from safetensors import SafetensorError, safe_open

        self.path = path
        self.tensors: dict[str, Any] = {}
        index, files = path / "model.safetensors.index.json", ["model.safetensors"]
        try:
            if index.is_file():
                files = sorted({Path(f).name for f in read_object(index)["weight_map"].values()})
            for name in files:
                file = safe_open(path / name, framework="numpy")
                self.tensors |= {each: file.get_slice(each) for each in file.keys()}
            for name in [each for each in self.tensors if mxfp4 and each.endswith("_blocks")]:
                whole = name.removesuffix("_blocks")
                pair = self.tensors.pop(name), self.tensors.pop(whole + "_scales")
                self.tensors[whole] = _Mxfp4(whole, *pair)
        except (OSError, ValueError, KeyError, AttributeError, SafetensorError) as error:
            raise CheckpointError(f"{path}: expected {' and '.join(files)}: {error}") from error

    def info(self, name: str) -> Any:
        if name not in self.tensors:
            raise CheckpointError(f"{self.path}: expected a tensor {name!r}, the files have none")
        return self.tensors[name]

    def tensor(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        info = self.info(name)
        if (found := tuple(info.get_shape())) != shape:
            raise CheckpointError(f"{self.path}: expected {name!r} of shape {shape}, got {found}")
        if (kind := info.get_dtype()) not in ("F32", "F16", "BF16"):
            raise NotImplementedError(f"{self.path}: {name!r} of dtype {kind} is not served")
        return info[:]


class _Mxfp4:
    """Experts' matrices of 4 bits, as a tensor `(X, in, out)` in bfloat16, which loses nothing.

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


class _Reader:
    """Makes parameters of a file's tensors."""

    def __init__(self, source: Safetensors | GGUF, recipe: Recipe, dtype: Any):
        self.source, self.recipe, self.dtype = source, recipe, dtype
        self.pieces = pieces(recipe.config)

    def check_names(self) -> None:
        """Before anything is read: everything is there, and nothing that has no place."""
        known = ("rotary_emb.inv_freq", "rope_freqs.weight")  # of old files; in the configuration
        unread = {name for name in self.source.tensors if not name.endswith(known)}
        config, templates = self.recipe.config, [*chain(*self.recipe.names.values())]
        for layer, template in ((n, each) for n in range(config.num_layers) for each in templates):
            for expert in range(config.num_experts if "{expert}" in template else 1):
                name = template.format(layer=layer, expert=expert)
                self.source.info(name)
                unread.discard(name)
        if unread:
            raise NotImplementedError(
                f"{self.source.path}: {len(unread)} tensors have no place in this model, such "
                f"as {sorted(unread)[:3]}: this family is served without them"
            )

    def parameters(self, layer: int | None = None) -> Params:
        """Those of a layer, or of none."""
        own = {k: v for k, v in self.recipe.names.items() if ("{layer}" in v[0]) != (layer is None)}
        return {role: self.parameter(role, names, layer or 0) for role, names in own.items()}

    def parameter(self, role: str, names: tuple[str, ...], layer: int) -> np.ndarray:
        """A view of the file's own order: `device_put` turns matrices on the way, several times as
        fast as NumPy does."""
        pieces = self.pieces[role]
        if len(names) == 1:  # a tensor that has them all
            pieces = ((*pieces[0][:-1], sum(piece[-1] for piece in pieces)),)
        turned = role in _MATRICES
        found = [self.read(n, p, layer, turned) for n, p in zip(names, pieces, strict=True)]
        joined = np.concatenate(found, axis=-1) if len(found) > 1 else found[0]
        if role == "sinks":
            return joined.astype(np.float32)[:, None]
        if "norm" in role:
            joined = joined.astype(np.float32) + self.recipe.norm_offset
            return joined.reshape(2, -1) if role == "qk_norm" else joined
        return joined.astype(self.dtype, copy=False)

    def read(self, template: str, shape: tuple[int, ...], layer: int, turned: bool) -> np.ndarray:
        """A tensor, or those of all experts, of this shape; `turned`: matrices, as views."""
        stored = self.recipe.stored.get(template, Stored())
        turned = turned and not stored.in_out
        if turned:
            shape = (*shape[:-2], shape[-1], shape[-2])
        if "{expert}" in template:
            names = (template.format(layer=layer, expert=e) for e in range(shape[0]))
            found = np.stack([self.source.tensor(name, shape[1:]) for name in names])
        else:
            found = self.source.tensor(template.format(layer=layer), shape)
        return stored.ours(found.swapaxes(-1, -2) if turned else found)


_MATRICES = frozenset(("embed", "head", "qkv", "out", "gate_up", "down", "router"))


def pieces(c: ModelConfig) -> dict[str, tuple[tuple[int, ...], ...]]:
    """By parameter: the shapes `(..., in, out)` of what lies side by side in it."""
    q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    wide, inner = c.width, c.inner_width
    each = (c.num_experts,) if c.num_experts else ()
    norms = ("norm", "attention_norm", "inner_norm", "attention_end_norm", "inner_end_norm")
    return dict.fromkeys(norms, ((wide,),)) | {
        "embed": ((wide, c.vocab_size),),
        "head": ((wide, c.vocab_size),),
        "qk_norm": ((c.head_dim,), (c.head_dim,)),
        "qkv": ((wide, q), (wide, kv), (wide, kv)),
        "qkv_bias": ((q,), (kv,), (kv,)),
        "out": ((q, wide),),
        "out_bias": ((wide,),),
        "sinks": ((c.num_heads,),),
        "router": ((wide, c.num_experts),),
        "router_bias": ((c.num_experts,),),
        "gate_up": ((*each, wide, inner),) * 2,
        "gate_up_bias": ((*each, inner),) * 2,
        "down": ((*each, inner, wide),),
        "down_bias": ((*each, wide),),
    }
