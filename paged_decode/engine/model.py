"""What an engine asks of a model, and the check that it gives it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ..cache import DecodeBatch, KVCache

__all__ = ["Model", "call_model", "check_alike", "check_arrays"]


@runtime_checkable
class Model(Protocol):
    """What an engine asks of a model: one function, which JAX traces.

    It writes the keys and values of every token and attends, with
    `cache.append_and_attend(layer, q, k, v, batch)`, and returns the cache that this gave.
    Arguments are passed by place, so their names are free.
    """

    def __call__(
        self, params: Any, cache: KVCache, tokens: Array, batch: DecodeBatch, /
    ) -> tuple[Array, KVCache]:
        """Logits `[B, V]` of the last token of each row, and the cache.

        For an engine with a drafter, logits `[B, T, V]` of every token.

        Args:
          params: a pytree, as the engine was given it.
          cache: the pool.
          tokens: int32 `[B, T]`; T is 1 in a decode step, k + 1 with k drafts, and more in a
            prefill chunk.
          batch: where they lie, and their positions.
        """
        ...


def call_model(
    model: Model, params: Any, cache: KVCache, batch: DecodeBatch, *, every: bool
) -> tuple[Array, KVCache]:
    """What the model returns, checked while it is traced: its slips compile without a word.

    `every`: logits of all tokens are wanted, as with drafts, and not only of the last.
    """
    tokens = batch.tokens
    out = model(params, cache, tokens, batch)
    if not isinstance(out, tuple | list) or len(out) != 2 or not isinstance(out[1], KVCache):
        kinds = [type(each).__name__ for each in (out if isinstance(out, tuple | list) else [out])]
        raise TypeError(f"the model must return (logits, cache); got {', '.join(kinds)}")
    logits, after = out
    shape, dtype = getattr(logits, "shape", None), getattr(logits, "dtype", None)
    if shape is None or dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        kind = type(logits).__name__ if dtype is None else f"dtype {dtype}"
        raise TypeError(f"the model's logits must be a floating-point array [B, V]; got {kind}")
    if shape[:-1] != (tokens.shape if every else tokens.shape[:1]) or shape[-1] == 0:
        wanted = f"[B, V] with B = {len(tokens)}; got shape {shape}"
        wanted += ": return those of column T-1, logits[:, -1]" if len(shape) == 3 else ""
        if every:
            wanted = f"[B, T, V] with B, T = {tokens.shape}, for the drafter; got shape {shape}"
        raise ValueError(f"the model's logits must be {wanted}")
    old, new = jax.tree.leaves(cache), jax.tree.leaves(after)
    if [(a.shape, a.dtype) for a in old] != [(a.shape, a.dtype) for a in new]:
        raise ValueError("the model must return a cache of the shapes and dtypes that it was given")
    if all(a is b for a, b in zip(old, new, strict=True)):
        raise ValueError(
            "the model returned the cache that it was given, without the new keys and values: "
            "return what cache.append or cache.append_and_attend returned last"
        )
    return logits, after


def check_arrays(leaves: Sequence[Any], params: Any) -> None:
    """Refuse weights, and these are their leaves, that no program can be launched with.

    Raises:
      ValueError: a leaf is no array and no number, or an array that was deleted; it is named.
    """
    for number, leaf in enumerate(leaves):
        if isinstance(leaf, jax.Array):
            what = "an array that was deleted" if leaf.is_deleted() else None
        else:
            known = isinstance(leaf, np.ndarray | np.generic | int | float | complex)
            what = None if known else f"a {type(leaf).__name__}"
        if what is not None:
            path = jax.tree_util.tree_leaves_with_path(params)[number][0]
            where = jax.tree_util.keystr(path) or "their root"
            raise ValueError(f"weights must be arrays or numbers; got {what} at {where}")


def check_alike(old: Any, new: Any) -> None:
    """Refuse weights for which the programs of others would have to be traced anew.

    Raises:
      ValueError: the trees differ, or the shape or dtype of a leaf, which is named.
    """
    (before, tree), (after, other) = map(jax.tree_util.tree_flatten_with_path, (old, new))
    if tree != other:
        paths = [{jax.tree_util.keystr(path) for path, _ in each} for each in (before, after)]
        which = sorted(paths[0] ^ paths[1])[:1]
        where = f", such as at {which[0]}" if which else ""
        raise ValueError(f"the new weights are a tree of another structure than the old{where}")
    for (path, a), (_, b) in zip(before, after, strict=True):
        kinds = [(getattr(x, "shape", None), getattr(x, "dtype", None)) for x in (a, b)]
        if kinds[0] != kinds[1]:
            raise ValueError(
                f"the new weights differ at {jax.tree_util.keystr(path) or 'their root'}: the old "
                "have shape {} and dtype {}, these {} and {}".format(*kinds[0], *kinds[1])
            )
