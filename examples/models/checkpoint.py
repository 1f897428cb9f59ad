"""From a folder with config.json and safetensors, or a GGUF file, to a pytree of weights.

A family says what its layers have and how that is called; what is read, it is read here. One layer
at a time goes to the device, or to several, so the host never holds many.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
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
from .gguf_reader import GGUF, Mxfp4, read_gguf
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

    Matrices are laid out `[in, out]`, and those that read the same input lie side by side: of all
    layouts tried with XLA on a CPU, their one product streams weights fastest. The embedding is
    `[E, V]`, so that a model whose output head is tied to it holds one copy. Norms and sinks are
    float32, as all that they are used with. With `mesh`, every device gets its own part
    (`parallel.py`), layer by layer. `shown` may show how far it is, as a bar of progress does.

    Raises:
      CheckpointError, GGUFError: something is missing or broken, or does not fit the sizes.
      ValueError: weights of that dtype have no fractions.
      NotImplementedError: another architecture, or anything that is not understood.
    """
    path, dtype = Path(path), jnp.dtype(dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"expected a floating dtype of weights, got {dtype.name}")
    if path.is_dir():
        recipe = read_recipe(path)
        source = Safetensors(path, mxfp4=recipe.mxfp4)
    else:
        source = read_gguf(path)
        recipe = read_gguf_recipe(source)
    config = recipe.config
    put = jax.device_put if mesh is None else partial(split_params, config, mesh=mesh)
    reader = _Reader(source, recipe, dtype)
    reader.check_names()
    params = put(reader.parameters())
    params["layers"] = [put(reader.parameters(n)) for n in shown(range(config.num_layers))]
    return config, params


class Safetensors:
    """The tensors of a folder, in one file, or else in those of an index; files are mapped.

    With `mxfp4`, two tensors, `*_blocks` and `*_scales`, are shown as the one that they stand for.

    Raises:
      CheckpointError: no such files, or one that is broken or not what the index says.
    """

    def __init__(self, path: Path, *, mxfp4: bool = False):
        from safetensors import SafetensorError, safe_open

        self.path = path
        self.tensors: dict[str, Any] = {}
        index, name = path / "model.safetensors.index.json", "model.safetensors"
        alone = (path / name).is_file() or not index.is_file()
        files = {name: set[str]()} if alone else _files_of(index)
        try:
            for name, told in files.items():
                file = safe_open(path / name, framework="numpy")
                if told and (other := told.symmetric_difference(file.keys())):
                    raise ValueError(f"the index says another thing of {sorted(other)[:3]}")
                self.tensors |= {each: file.get_slice(each) for each in file.keys()}
            for name in [each for each in self.tensors if mxfp4 and each.endswith("_blocks")]:
                whole = name.removesuffix("_blocks")
                pair = self.tensors.pop(name), self.tensors.pop(whole + "_scales")
                self.tensors[whole] = Mxfp4(whole, *pair)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise CheckpointError(f"{path}: cannot read {name!r}: {error}") from error

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


def _files_of(index: Path) -> dict[str, set[str]]:
    """By file beside the index, the names of its tensors."""
    files: dict[str, set[str]] = {}
    places = read_object(index).get("weight_map")
    for tensor, file in places.items() if isinstance(places, dict) else ():
        if not isinstance(file, str) or file != Path(file).name:
            raise CheckpointError(f"{index}: expected {tensor!r} in a file beside it, got {file!r}")
        files.setdefault(file, set()).add(tensor)
    if not files:
        raise CheckpointError(f"{index}: expected files of tensors as its 'weight_map'")
    return files


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
        tied, shape = ("lm_head.weight", *self.recipe.names["embed"]), self.pieces["embed"][0][::-1]
        if tied[0] in unread and "head" not in self.recipe.names:  # some files hold it once more
            head, embedding = (self.source.tensor(name, shape) for name in tied)
            if not np.array_equal(head, embedding):
                raise CheckpointError(f"{self.source.path}: {tied[0]!r} is not tied to {tied[1]!r}")
            unread.discard(tied[0])
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
        kind = np.dtype(np.float32) if role == "sinks" or "norm" in role else self.dtype
        found = [self.read(n, p, layer, turned) for n, p in zip(names, pieces, strict=True)]
        if len(found) > 1:
            found = [np.concatenate(found, axis=-1, dtype=kind, casting="unsafe")]
        joined = found[0].astype(kind, copy=False)
        if "norm" in role:
            joined = joined + self.recipe.norm_offset
        return joined.reshape({"sinks": (-1, 1), "qk_norm": (2, -1)}.get(role, joined.shape))

    def read(self, template: str, shape: tuple[int, ...], layer: int, turned: bool) -> np.ndarray:
        """A tensor, or those of all experts, of this shape; `turned`: matrices, as views."""
        stored = self.recipe.stored.get(template, Stored())
        turned = turned and not stored.in_out
        if turned:
            shape = (*shape[:-2], shape[-1], shape[-2])
        if "{expert}" in template:
            names = (template.format(layer=layer, expert=e) for e in range(shape[0]))
            every = [self.source.tensor(name, shape[1:]) for name in names]
            found = np.stack(every, dtype=self.dtype, casting="unsafe")
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
